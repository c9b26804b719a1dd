"""Real SGLang engines on the CPU, one at a time. Without SGLang these tests are skipped, unless it is required.

An engine takes ten seconds of two cores to start, so the tests share them: see `shared.Engines`. Tests whose engine is
the same are marked `engine(name)` and run one after another.
"""

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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    ours = [i for i, item in enumerate(items) if "runtimes/sglang" in item.path.as_posix()]
    if importlib.util.find_spec("sglang") is None and not os.environ.get("MEZO_REQUIRE_SGLANG"):
        for i in ours:
            items[i].add_marker(pytest.mark.skip(reason="SGLang is not installed: make test installs it"))
    named = lambda item: getattr(item.get_closest_marker("engine"), "args", ("",))  # noqa: E731
    for i, item in zip(ours, sorted((items[i] for i in ours), key=named), strict=True):
        items[i] = item


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """Path of a tiny model of a family, made once; options are of its configuration."""
    made = {}

    def path(family, **others):
        key = (family, *others.items())
        if key not in made:
            made[key] = save(family, tmp_path_factory.mktemp(family), **others)
        return made[key]

    return path


@pytest.fixture(scope="session")
def engines(tmp_path_factory):
    """The engines of all tests."""
    from tests.runtimes.sglang.shared import Engines

    kept = Engines(tmp_path_factory.mktemp("engines"))
    yield kept
    kept.close()
    print(f"\n{kept.starts} SGLang engines were started to be shared")


@pytest.fixture(scope="module", autouse=True)
def sharing(request):
    """Every runtime of this process takes its engine from `engines`; one thread each, kernels compiled."""
    if importlib.util.find_spec("sglang") is None:
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"MEZO_TEST_HOOKS": "1", "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}.items():
            patch.setenv(name, value)
        patch.setattr("mezo.runtimes.sglang.runtime.EngineHandle", request.getfixturevalue("engines").take)
        yield


@pytest.fixture(autouse=True)
def end_with_the_last_test(request, engines):
    """An engine that nobody asks is busy all the same: none runs beside tests of other folders."""
    yield
    following = request.session.items[request.session.items.index(request.node) + 1 :][:1]
    if not following or "runtimes/sglang" not in following[0].path.as_posix():
        engines.close()


@pytest.fixture
def unguarded(engines, monkeypatch):
    """The workers let adapters that change keys or values share a cache."""
    monkeypatch.setattr(engines, "unguarded", True)


@pytest.fixture
def own_engine(engines, monkeypatch):
    """A runtime of this test starts an engine of its own, as it does outside of tests."""
    from mezo.runtimes.sglang.engine import EngineHandle

    engines.close()
    monkeypatch.setattr("mezo.runtimes.sglang.runtime.EngineHandle", EngineHandle)


def examples(n, several=False, prefix=(), low=5, high=20):
    """Random prompts after a common prefix, with two options of one token or of two and three."""
    rng = random.Random(0)
    options = ((5, 7), (9, 11, 13)) if several else ((5,), (9,))
    words = lambda k: tuple(rng.randrange(3, SIZES["vocab_size"]) for _ in range(k))  # noqa: E731
    return [Example(tuple(prefix) + words(rng.randint(low, high)), options, rng.randint(0, 1)) for _ in range(n)]


def options(model, **others):
    return Config.of(**{"model": model, "output_dir": "unused", "task": "sst2", "batch_size": 8, **others})


@contextmanager
def engine(model, data, **others):
    """A prepared SGLang runtime at theta 0."""
    from mezo.runtimes.sglang.runtime import SGLangRuntime

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
