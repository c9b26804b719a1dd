"""Real SGLang engines on the CPU, one at a time. Without SGLang these tests are skipped, unless it is required."""

import importlib.util
import os
import random
from contextlib import contextmanager

import pytest
import torch

from mezo.config import Config
from mezo.data.example import Example
from tests.tiny_models import SIZES, save

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LAST = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("sglang") is None and not os.environ.get("MEZO_REQUIRE_SGLANG"):
        for item in items:
            if "runtimes/sglang" in item.path.as_posix():
                item.add_marker(pytest.mark.skip(reason="SGLang is not installed: make test installs it"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Path of a tiny model of a family."""
    return lambda family: save(family, tmp_path_factory.mktemp(family))


def examples(n, several=False, prefix=(), low=5, high=20):
    """Random prompts after a common prefix, with two options of one token or of two and three."""
    rng = random.Random(0)
    options = ((5, 7), (9, 11, 13)) if several else ((5,), (9,))
    words = lambda k: tuple(rng.randrange(3, SIZES["vocab_size"]) for _ in range(k))  # noqa: E731
    return [Example(tuple(prefix) + words(rng.randint(low, high)), options, rng.randint(0, 1)) for _ in range(n)]


def options(model, **others):
    return Config.of(**{"model": model, "output_dir": "unused", "task": "sst2", "batch_size": 8, **others})


@contextmanager
def engine(model, data, hooks="1", interpret="0", **others):
    """A prepared SGLang runtime; the environment is that of the engine's processes."""
    from mezo.runtimes.sglang.runtime import SGLangRuntime

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEZO_TEST_HOOKS", hooks)
        patch.setenv("TRITON_INTERPRET", interpret)
        runtime = SGLangRuntime(*options(model, runtime="sglang", **others).for_runtime)
        try:
            runtime.prepare({"train": data})
            yield runtime
        finally:
            runtime.close()


def reference(model, data, **others):
    """The same in transformers and PEFT, without any cache."""
    from mezo.runtimes.hf.runtime import HFRuntime

    runtime = HFRuntime(*options(model, trunk_cache="off", **others).for_runtime)
    runtime.prepare({"train": data})
    return runtime


def noisy(runtime, seed=3):
    """Theta with which the adapter has an effect."""
    from mezo_kernels import lora_init

    return {name: lora_init(seed, name, shape) for name, shape in runtime.spec.shapes.items()}


def worst(a, b):
    """Largest difference of centred option scores: hf leaves out a constant of each position.

    The same options must be missing (-inf) on both sides, and every other score must be a number.
    """
    missing = a.isneginf()
    assert torch.equal(missing, b.isneginf()), "options are missing on one side alone"
    differences = ((a - a[:, :1]) - (b - b[:, :1])).abs()[~missing]
    assert differences.isfinite().all(), "a score is not a number"
    return float(differences.max())


def torch_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)) for n in a)
