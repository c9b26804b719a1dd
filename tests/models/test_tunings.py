"""A tuning is one function: a toy that trains the norms of the last layer alone runs like those that are there."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from mezo.config import Machine, Model, Workload
from mezo.config.model import Tuning
from mezo.method.step import Step
from mezo.models.parts import TUNINGS
from mezo.models.tuning import Attached
from mezo.runtimes.hf.runtime import HFRuntime
from mezo_kernels import standard_normal
from tests.models.test_families import difference, log_odds
from tests.runtimes.hf.test_runtime import ROUNDING, examples
from tests.tiny_models import save

NORMS = ["model.layers.2.input_layernorm.weight", "model.layers.2.post_attention_layernorm.weight"]


class Norms(Tuning):
    """Its options: none."""

    name = "norms"


def attach(tuning, base):
    params = {name: p for name, p in base.model.named_parameters() if name in NORMS}
    return Attached(base.model, params, None, "parameters of norms", noise)


def noise(theta, seed):
    return (t + 0.1 * standard_normal(seed, name, 0, t.numel()).view_as(t) for name, t in theta.items())


@pytest.fixture
def built(monkeypatch, tmp_path):
    monkeypatch.setitem(TUNINGS, "norms", attach)
    made = HFRuntime(Model(save("llama", tmp_path), tuning=Norms()), Machine(output_dir="unused"), Workload())
    made.prepare({"train": examples(6)})
    return made


def test_it_is_proven_and_described_like_any_other(built):
    assert list(built.spec.shapes) == NORMS
    assert built.parts.kv_depends == f"{NORMS[0]} may change keys or values of its layer"
    assert built.describe().startswith("64 parameters of norms, torch.float32 base on cpu, trunk cache")


def test_scores_are_those_of_a_model_perturbed_by_hand(built):
    built.perturb(Step([7], 0.1))
    for got, sign in zip(built.score_pairs("train", range(6))[0], (1, -1), strict=True):
        by_hand = AutoModelForCausalLM.from_pretrained(built.source)
        for name in NORMS:
            p = by_hand.get_parameter(name)
            p.data += sign * torch.tensor(0.1) * standard_normal(7, name, 0, p.numel())
        assert torch.allclose(difference(got), log_odds(by_hand, examples(6)), atol=ROUNDING, rtol=0)
