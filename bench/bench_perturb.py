"""perturb_, one pass over all parameters, against other ways to add scale * z."""

import original
import pytest
import torch
from shapes import SHAPES, make

from mezo_kernels import ParamLayout, perturb_, tensor_id

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SCALE = 1e-6


def facts_of(shape, dtype, provider):
    params = make(shape, FLOATS[dtype])
    elements = sum(p.numel() for p in params.values())
    return params, elements, {"shape": shape, "tensors": len(params), "dtype": dtype, "provider": provider}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_ours(measure, shape, dtype):
    params, elements, facts = facts_of(shape, dtype, "ours (numba)")
    layout, copies = ParamLayout(params), [p.clone() for p in params.values()]
    loop = lambda: original.perturb(copies, SCALE, 1)  # noqa: E731
    measure(
        "perturb", lambda: perturb_(layout, SCALE, 1), elements, 2 * elements * FLOATS[dtype].itemsize, loop, **facts
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_original(measure, shape, dtype):
    params, elements, facts = facts_of(shape, dtype, "original loop")
    params = list(params.values())
    nbytes = 2 * elements * FLOATS[dtype].itemsize
    measure("perturb", lambda: original.perturb(params, SCALE, 1), elements, nbytes, **facts)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_foreach(measure, shape, dtype):
    params, elements, facts = facts_of(shape, dtype, "torch._foreach, stored z")
    params = list(params.values())
    z = [torch.randn_like(p) for p in params]
    nbytes = 2 * elements * FLOATS[dtype].itemsize
    measure("perturb", lambda: original.foreach_perturb(params, z, SCALE), elements, nbytes, **facts)


@pytest.mark.parametrize("shape", ["lora-r8-qv", "flat-16M"])
def test_compiled(measure, compiler, shape):
    params, elements, facts = facts_of(shape, "float32", "torch.compile of the reference")
    tags = [torch.tensor(tensor_id(name)) for name in params]
    params = list(params.values())
    run = lambda: original.compiled_perturb(params, tags, SCALE, 1)  # noqa: E731
    measure("perturb", run, elements, 8 * elements, **facts)
