"""The engine on a GPU: 16 bits, a quantised frozen base, deterministic mode. Not run without one."""

from importlib.util import find_spec

import pytest
import torch
from transformers import AutoModelForCausalLM

from mezo.method.step import Step, Update
from mezo.models.quantization import FORMATS
from tests.models.test_quantization import SCHEMES, compressed
from tests.runtimes.sglang.conftest import ALL, engine, examples, noisy, reference, torch_equal
from tests.tiny_models import tokenizer

pytestmark = pytest.mark.gpu
NF4 = ("quantization=bitsandbytes", "load_format=bitsandbytes")
bitsandbytes = pytest.mark.skipif(not find_spec("bitsandbytes"), reason="bitsandbytes is not installed")
ENGINES = {
    "bfloat16": {},
    "fp8": {"engine_arg": ("quantization=fp8",)},
    "w8a8_fp8": {"engine_arg": ("quantization=w8a8_fp8",)},
    "nf4": {"engine_arg": NF4},
    "deterministic": {"deterministic": True, "engine_arg": ("attention_backend=triton",)},
}
KINDS = [pytest.param(kind, marks=[bitsandbytes] if kind == "nf4" else []) for kind in ENGINES]


@pytest.mark.parametrize("kind", KINDS)
def test_both_signs_are_scored_and_theta_is_the_replays(model, kind):
    """The start-up proof compares scores with transformers; here the adapter must act, and its bits be the log's."""
    data, path = examples(8), model("llama")
    with engine(path, data, target_modules=ALL, dtype="bfloat16", **ENGINES[kind]) as runtime:
        runtime.load(noisy(runtime))
        runtime.update([Update([5], [1e-2], 0.999)], Step([7], 1e-1), watch=True)
        plus, minus = runtime.score_pairs("train", range(8))[0]
        assert runtime.verify() is None
        assert float((plus - minus).abs().max()) > 0
        theta = runtime.theta()
        if kind == "deterministic":
            runtime.perturb(Step([7], 1e-1))  # the same bits, and a cache that is cold again
            again = runtime.score_pairs("train", range(8))[0]
            assert torch.equal(plus, again[0])
            assert torch.equal(minus, again[1])
    plain = reference(path, data, target_modules=ALL, device="cpu", dtype="bfloat16")
    plain.load(noisy(plain))
    plain.update([Update([5], [1e-2], 0.999)], Step([7], 1e-1))
    assert torch_equal(theta, plain.theta())


@bitsandbytes
def test_a_checkpoint_that_is_quantised_already(model, tmp_path):
    """transformers and the engine multiply by the same packed weights: the proof at the start compares them."""
    packing = FORMATS["nf4"].config(torch.bfloat16)
    packed = AutoModelForCausalLM.from_pretrained(model("llama"), quantization_config=packing, dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    options = {"target_modules": ALL, "dtype": "bfloat16", "engine_arg": NF4}
    with engine(str(tmp_path), examples(8), **options) as runtime:
        runtime.load(noisy(runtime))
        runtime.perturb(Step([7], 1e-1))
        plus, minus = runtime.score_pairs("train", range(8))[0]
        assert float((plus - minus).abs().max()) > 0


@pytest.mark.skipif(not find_spec("compressed_tensors"), reason="compressed-tensors is not installed")
@pytest.mark.parametrize("scheme", ["8 bits, inputs too", "fp8"])
def test_a_checkpoint_of_compressed_tensors(scheme, model, tmp_path):
    """The engine multiplies by the packed weights, transformers by the floats that they mean."""
    path = compressed(model("llama", hidden_size=128, intermediate_size=128), tmp_path, *SCHEMES[scheme])
    tokenizer().save_pretrained(path)
    with engine(path, examples(8), target_modules=ALL, dtype="bfloat16") as runtime:
        runtime.load(noisy(runtime))
        runtime.perturb(Step([7], 1e-1))
        plus, minus = runtime.score_pairs("train", range(8))[0]
        assert float((plus - minus).abs().max()) > 0
