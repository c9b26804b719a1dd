"""The benches of a whole step: the original's step and the gradients' are the work they are said to be."""

import json
import os

import pytest
import torch
from alternatives import Gradients, forget_peaks, peak_bytes, tree
from training_step import OriginalStep, OurStep, hf

from mezo.config import Config
from mezo.data.example import Example
from mezo.method.objectives import cross_entropy
from mezo.runtimes.hf.runtime import HFRuntime
from mezo_kernels import lora_init
from tests.tiny_models import save


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    model = save("llama", tmp_path_factory.mktemp("bench") / "llama")
    return Config.of(model=model, output_dir="unused", task="sst2", objective="cross_entropy", batch_size=4, steps=1000)


@pytest.fixture
def data():
    return [Example(tuple(range(3 + i, 12 + 2 * i)), ((5,), (9,)), i % 2) for i in range(4)]


@pytest.mark.parametrize(("everywhere", "product"), [(True, "torch"), (False, "torch"), (False, "packed")])
def test_the_original_scores_what_the_runtime_scores(config, data, everywhere, product):
    runtime = HFRuntime(*config.replace(linear=product).for_runtime)
    runtime.prepare({"train": data})
    runtime.load({name: lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()})
    expected = cross_entropy(runtime.score("train", range(4)), torch.tensor([0, 1, 0, 1])).item()
    original = OriginalStep(runtime, config, data, everywhere, as_ours=product == "packed")
    original.in_place()
    assert original.loss() == pytest.approx(expected, abs=1e-5)


def test_the_originals_step_is_a_step_of_mezo(config, data):
    """z is put on, taken off twice and put on again; what stays is -lr g z."""
    runtime = HFRuntime(*config.for_runtime)
    still, moving = (OriginalStep(runtime, config.replace(lr=lr), data, True) for lr in (1e-30, 1e-2))
    start = [w.clone() for w in still.weights]
    for step in (still, moving):
        step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(still.weights, start, strict=True))
    torch.manual_seed(1)
    first = torch.normal(0, 1, start[0].shape)
    assert abs(torch.corrcoef(torch.stack([(moving.weights[0] - start[0]).flatten(), first.flatten()]))[0, 1]) > 0.999


def test_our_step_is_logged_and_moves_theta(config, data, tmp_path):
    runtime = HFRuntime(*config.for_runtime)
    step = OurStep(runtime, config, data, tmp_path / "log")
    before = runtime.theta()
    step()
    step()
    assert [json.loads(line)["step"] for line in (tmp_path / "log").read_text().splitlines()] == [0, 1]
    assert not all(torch.equal(before[name], t) for name, t in runtime.theta().items())


def test_tokens_and_parts_of_a_step(config, tmp_path):
    row = hf(config, [Example((3,) * 8, ((5,), (9,)), 0)] * 4, tmp_path / "log", 1)
    assert row["tokens_a_step"] == {"scored": 2 * 4 * 8, "computed": 2 * 4 * 8}
    parts = row["seconds_of_a_step"]
    assert parts["kernels"] + parts["forward"] + parts["bookkeeping"] == pytest.approx(parts["step"])


@pytest.mark.parametrize("trained", ["adapter", "all weights"])
def test_adamw_learns_what_it_is_said_to_train(config, data, trained):
    step = Gradients(config, data, trained)
    frozen = [p for p in step.parts.model.parameters() if not any(p is q for q in step.trained)]
    kept = [p.detach().clone() for p in frozen]
    losses = [step() for _ in range(60)]
    assert losses[-1] < losses[0]
    assert all(torch.equal(p, q) for p, q in zip(frozen, kept, strict=True))
    assert (trained == "all weights") == (sum(p.numel() for p in step.trained) > 10_000)


def test_inference_keeps_nothing(config, data):
    step = Gradients(config, data, "nothing")
    assert step() == step()
    assert not any(".lora_" in name for name, _ in step.parts.body.named_parameters())


def test_the_peak_of_a_step_is_counted_from_the_last_forgetting():
    forget_peaks([os.getpid()])
    before = peak_bytes(tree(os.getpid()))
    held = torch.ones(1 << 26)
    after = peak_bytes(tree(os.getpid()))
    assert after - before > 0.9 * held.nbytes
