"""The table of model families: scores with every quirk are the model's own, and a quirk is one entry."""

import dataclasses

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.step import Step
from mezo.models.families import FAMILIES, GENERIC, Family
from mezo.models.parts import load_parts
from mezo.runtimes.hf.reading import ByModel, ByParts
from tests.runtimes.hf.test_runtime import ROUNDING, examples, runtime
from tests.tiny_models import SIZES

GROUPED = {**SIZES, "num_key_value_heads": 2}
CHANGED_LOGITS = {
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**GROUPED, logits_scaling=8.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**GROUPED, logit_scale=0.25)),
    "cohere2": lambda: Cohere2ForCausalLM(Cohere2Config(**GROUPED, logit_scale=0.25)),
    "gemma3_text": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GROUPED, head_dim=8, final_logit_softcapping=2.0)),
}
ADAPTED = {"all layers": {}, "last layer": {"layers_to_transform": (2,), "target_modules": ("q_proj", "o_proj")}}


def save(model, directory):
    model.save_pretrained(directory)
    return str(directory)


@torch.no_grad()
def log_odds(model, data):
    """log p of the first option over the second, by a model's own logits, one prompt at a time."""
    logits = [model(input_ids=torch.tensor([example.prompt])).logits[0, -1].double() for example in data]
    return torch.stack([at[5] - at[9] for at in logits])


def difference(scores):
    return scores[:, 0] - scores[:, 1]


@pytest.mark.parametrize("adapted", list(ADAPTED))
@pytest.mark.parametrize("name", list(CHANGED_LOGITS))
def test_logits_that_are_changed_after_the_head_are_scored_so(name, adapted, tmp_path):
    torch.manual_seed(0)
    path, data = save(CHANGED_LOGITS[name](), tmp_path), examples(6)
    built = runtime(path, data, **ADAPTED[adapted])
    assert (built.scorer.trunk is not None) == (adapted == "last layer")
    built.perturb(Step([7], 1e-2))
    for got, sign in zip(built.score_pairs("train", range(6))[0], ("plus0", "minus0"), strict=True):
        built._use(built.copies[sign])
        want = log_odds(built.parts.model, data)
        assert torch.allclose(difference(got), want, atol=ROUNDING, rtol=0)
    assert (log_odds(AutoModelForCausalLM.from_pretrained(path), data) - want).abs().max() > 100 * ROUNDING


class ToyConfig(LlamaConfig):
    """A family of our own: Llama, but for what `TOY` says of it."""

    model_type = "mezo_toy"


class ToyForCausalLM(LlamaForCausalLM):
    """Its logits are three times what its head gives."""

    config_class = ToyConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 3 * out.logits
        return out


TOY = Family(
    layers="layers",
    kv_free=frozenset({"o_proj"}),
    targets=("o_proj",),
    first_position=lambda config: 28,
    window=lambda config, layer: 10 if layer == 2 else None,
    logits=lambda logits, config: 3 * logits,
    attentions=frozenset(),
)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    AutoConfig.register("mezo_toy", ToyConfig)
    AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
    torch.manual_seed(0)
    config = ToyConfig(**GROUPED, layer_types=["full_attention"] * 3)
    return save(ToyForCausalLM(config), tmp_path_factory.mktemp("toy"))


def test_a_family_that_is_not_in_the_table_is_scored_by_its_own_forward_pass(toy):
    built = runtime(toy, examples(6))
    adapted = {name.rsplit(".", 3)[-3] for name in built.spec.shapes}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert isinstance(built.scorer.reading, ByModel)
    assert torch.allclose(
        difference(built.score("train", range(6))), log_odds(built.parts.model, examples(6)), atol=ROUNDING
    )


def test_one_entry_in_the_table_is_all_that_a_new_family_takes(toy, monkeypatch):
    monkeypatch.setitem(FAMILIES, "mezo_toy", TOY)
    data = examples(6)
    built = runtime(toy, data)
    assert {name.rsplit(".", 3)[-3] for name in built.spec.shapes} == {"o_proj"}
    assert isinstance(built.scorer.reading, ByParts)
    assert torch.allclose(difference(built.score("train", range(6))), log_odds(built.parts.model, data), atol=ROUNDING)
    with pytest.raises(UserError, match="a prompt has 101 tokens, the model takes 100"):
        runtime(toy, [Example((5,) * 101, ((5,), (9,)), 0)])
    with pytest.raises(UserError, match="no place for a prefix, it has layers of full_attention"):
        runtime(toy, data, tuning="prefix")


@pytest.mark.parametrize(
    ("leaf", "tokens", "scored_only"), [("o_proj", 8, True), ("o_proj", 11, False), ("q_proj", 8, False)]
)
def test_what_may_be_reused_follows_the_table(toy, monkeypatch, leaf, tokens, scored_only):
    """Only adapters of o_proj leave keys alone, and only rows as short as the window need no others."""
    monkeypatch.setitem(FAMILIES, "mezo_toy", TOY)
    data = [Example(tuple(range(3, 3 + tokens)), ((5,), (9,)), 0)]
    built = runtime(toy, data, layers_to_transform=(2,), target_modules=(leaf,))
    assert built.scorer.trunk.keep_kv is scored_only
    assert (built.parts.kv_depends is None) == (leaf == "o_proj")


def test_layers_are_known_by_the_path_of_the_family():
    name = "base_model.model.model.decoder.layers.2.fc1.lora_A.weight"
    assert FAMILIES["opt"].layer_of(name) == GENERIC.layer_of(name) == 2
    odd = dataclasses.replace(GENERIC, layers="transformer.stage")
    assert odd.layer_of("base_model.model.transformer.stage.1.mlp.fc1.lora_A.weight") == 1
    assert odd.layer_of(name) is None


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        (("q_proj",), "experts: down_proj, gate_up_proj stay as they are, which are no linear layers"),
        (
            ("all-linear",),
            "experts: down_proj, gate_up_proj stay as they are, which are no linear layers; LoRA is beside down_proj,"
            " gate_proj, shared_expert_gate, up_proj of the others",
        ),
    ],
)
def test_which_experts_are_trained_is_one_line(targets, line, tmp_path, caplog):
    sizes = GROUPED | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    config = AutoConfig.for_model("qwen2_moe", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with caplog.at_level("INFO", "mezo"):
        options = Config.of(model=str(tmp_path), task="sst2", output_dir="unused", target_modules=targets)
        load_parts(options.model, torch.device("cpu"), torch.float32)
    assert [text for text in caplog.messages if text.startswith("experts")] == [line]
