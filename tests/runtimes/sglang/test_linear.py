"""Packed weights inside the engine: the same scores, on and off, and a run that keeps what it began with."""

import json
from pathlib import Path

import pytest
import torch

from mezo.api import resume, train
from mezo.config import Config
from mezo.errors import UserError
from mezo.method.step import Step
from mezo.models import linear
from tests.runtimes.sglang.conftest import LAST, engine, examples, noisy, options, reference, worst

ROUNDING = 5e-5
pytestmark = [
    pytest.mark.engine("last"),
    pytest.mark.skipif(linear.why_not_by("packed", torch.float32, torch.device("cpu")) is not None, reason="no oneDNN"),
]


def test_scores_are_those_of_transformers_with_packed_weights_and_without(model):
    """In an engine that is packed, unpacked and packed again."""
    data = [*examples(12), *examples(4, several=True)]
    adapted = {"target_modules": LAST, "layers_to_transform": (2,)}
    plain = reference(model("llama"), data, linear="torch", **adapted)
    plain.load(noisy(plain))
    plain.perturb(Step([7], 1e-2))
    wanted, nbytes = plain.score_pairs("train", range(16))[0], []
    for product in ("packed", "torch", "packed"):
        with engine(model("llama"), data, linear=product, **adapted) as running:
            assert running.linear == product
            nbytes.append(sum(rank["packed"] for rank in running.ranks))
            running.load(noisy(running))
            running.perturb(Step([7], 1e-2))
            for a, b in zip(running.score_pairs("train", range(16))[0], wanted, strict=True):
                assert worst(a, b) < ROUNDING
    layers = plain.parts.body.layers
    frozen = sum(
        p.numel() for n, p in layers.named_parameters() if n.endswith("weight") and p.ndim == 2 and "lora" not in n
    )
    assert nbytes == [4 * frozen, 0, 4 * frozen]


def test_a_run_goes_on_with_the_product_it_began_with(model, tiny_data, tiny_options, monkeypatch):
    chosen = {**tiny_options, "runtime": "sglang", "model": model("llama"), "steps": 2, "eval_every": 2, "noise": False}
    monkeypatch.setattr(linear, "SMALLEST", 1)
    monkeypatch.setattr(linear, "measured_gain", lambda *args: 2.0)
    config = Config.of(**chosen | {"target_modules": LAST})
    assert train(config, until=1) is None
    monkeypatch.setattr(linear, "measured_gain", lambda *args: 0.5)
    said = []
    monkeypatch.setattr(
        "mezo.runtimes.sglang.runtime.tell", lambda product, nbytes: said.append((product.name, nbytes > 0))
    )
    resume(config.machine.output_dir)
    assert said == [("packed", True)]
    log = Path(config.machine.output_dir, "trajectory.jsonl").read_text().splitlines()
    assert json.loads(log[0])["linear"] == "packed"


def test_what_the_engine_cannot_is_refused_before_it_starts(model):
    from mezo.runtimes.sglang.runtime import SGLangRuntime

    with pytest.raises(UserError, match="--linear onednn: the engine's weights are frozen"):
        SGLangRuntime(*options(model("llama"), runtime="sglang", linear="onednn").for_runtime)
