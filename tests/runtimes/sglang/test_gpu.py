"""The engine on a GPU: 16 bits, a quantised frozen base, deterministic mode. Not run without one."""

import pytest
import torch

from mezo.method.step import Step, Update
from tests.runtimes.sglang.conftest import ALL, engine, examples, noisy, reference, torch_equal

pytestmark = pytest.mark.gpu
ENGINES = {
    "bfloat16": {},
    "quantised": {"engine_arg": ("quantization=fp8",)},
    "deterministic": {"deterministic": True, "engine_arg": ("attention_backend=triton",)},
}


@pytest.mark.parametrize("kind", list(ENGINES))
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
