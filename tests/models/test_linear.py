"""Frozen weights packed for oneDNN: the scores, the weights that can be read, the run that goes on with them."""

import json
import logging

import pytest
import torch

from mezo.api import resume, train
from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.step import Step
from mezo.models import linear
from mezo.models.linear import PackedLinear, choose
from mezo.models.load import Checkpoint, load_base
from mezo.runtimes.hf.runtime import HFRuntime
from mezo_kernels import lora_init
from tests import tiny_families
from tests.tiny_models import ENCODERS, LAST_LAYER, save

ROUNDING = 2e-5  # float32 scores of order 10
CPU = torch.device("cpu")

pytestmark = pytest.mark.skipif(
    linear.why_not_packed(torch.float32, CPU) is not None, reason="this torch is built without oneDNN"
)


by_onednn = pytest.mark.skipif(
    linear.why_not_by("onednn", torch.float32, CPU) is not None, reason="oneDNN rounds float32 to bfloat16 here"
)


def runtime(model, masked=False, **options):
    """A prepared runtime whose adapter has an effect, at a step's copies."""
    data = [Example(tuple(range(3, 9 + n)), ((5,), (9,)), n % 2, 2 if masked else None) for n in range(4)]
    config = Config.of(**{"model": model, "output_dir": "unused", "task": "sst2", "batch_size": 4, **options})
    built = HFRuntime(*config.for_runtime)
    built.prepare({"train": data})
    if built.spec.peft:
        built.load({name: lora_init(3, name, shape) for name, shape in built.spec.shapes.items()})
    built.perturb(Step([7, 8][: options.get("directions", 1)], 1e-2))
    return built


def packed_in(built):
    return {name: module for name, module in built.parts.body.named_modules() if isinstance(module, PackedLinear)}


@pytest.fixture(scope="module", params=list(LAST_LAYER))
def family(request, tmp_path_factory):
    return request.param, save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("directions", [1, 2])
def test_packed_weights_score_as_plain_ones(family, directions):
    """Adapters on all layers, and with two directions rows with copies of their own."""
    name, model = family
    shares = None if directions == 1 else [[0, 1], [2, 3]]
    scores = []
    for product in ("torch", "packed"):
        built = runtime(model, name in ENCODERS, linear=product, directions=directions)
        assert built.linear == product
        assert bool(packed_in(built)) == (product == "packed")
        assert directions == 1 or built.scorer.rowwise
        scores.append([s for pair in built.score_pairs("train", range(4), shares) for s in pair])
    for plain, packed in zip(*scores, strict=True):
        assert torch.allclose(plain, packed, atol=ROUNDING, rtol=0)


def test_packed_weights_are_read_to_the_bit_and_held_once(family):
    name, model = family
    built, plain = runtime(model, name in ENCODERS, linear="packed"), load_base(Checkpoint.of(model), torch.float32)
    weights = dict(plain.base_model.named_parameters())
    packed = {name.replace(".base_layer", ""): module for name, module in packed_in(built).items()}
    assert set(packed) == {n for n, module in plain.base_model.named_modules() if type(module) is torch.nn.Linear}
    for path, module in packed.items():
        assert torch.equal(module.weight, weights[f"{path}.weight"])
        assert "weight" not in dict(module.named_parameters()), "the plain weight is freed"
    assert not any(p.requires_grad for p in built.parts.model.parameters())


def test_layers_with_one_input_are_one_product(tmp_path):
    built = runtime(save("llama", tmp_path), linear="packed")
    stacks = {name.split("layers.0.")[1]: m.stack for name, m in packed_in(built).items() if "layers.0." in name}
    sizes = {name.split(".")[1]: stack.sizes for name, stack in stacks.items()}
    assert len(set(map(id, stacks.values()))) == 4
    assert sizes["q_proj"] == sizes["v_proj"]
    assert [len(sizes[name]) for name in ("q_proj", "o_proj", "gate_proj", "down_proj")] == [3, 1, 2, 1]


def test_what_is_kept_of_one_input_is_not_taken_for_another(tmp_path):
    """The same tensor with other numbers in it, and layers that are called alone or in another order."""
    built = runtime(save("llama", tmp_path), linear="packed")
    q, k, _ = (m for name, m in packed_in(built).items() if "layers.0.self_attn" in name and "o_proj" not in name)
    x = torch.randn(3, 32)
    with torch.no_grad():
        for module in (q, k, k, q):
            assert torch.allclose(module(x), x @ module.weight.T, atol=1e-5)
            x.mul_(2)
        before = q(x)
        x.zero_()
        assert not k(x).any()
        assert before.any()


def test_a_proof_that_fails_halfway_keeps_no_unpacked_weight(tmp_path):
    built = runtime(save("llama", tmp_path), linear="packed")
    q = next(module for name, module in packed_in(built).items() if ".q_proj" in name)

    @torch.no_grad()
    def proof():
        with linear.as_loaded():
            q(torch.ones(1, 32))
            assert [place for _, place in linear._unpacked] == [1, 2], "of keys and values"
            q(torch.ones(1, 31))

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        proof()
    assert not linear._unpacked


@pytest.mark.parametrize("name", list(tiny_families.FAMILIES))
def test_models_of_every_family_keep_their_logits_and_their_state(name):
    """GPT-2's weights lie transposed, Mamba's are read without a call, Falcon's are in a class of its own."""
    model, ids = tiny_families.build(name), torch.tensor([[5, 7, 9, 11, 13]])
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    with torch.no_grad():
        plain = model(**inputs).logits
        nbytes = linear.pack(model.base_model, trained=set())
        packed = model(**inputs).logits
    assert torch.allclose(plain, packed, atol=1e-4, rtol=1e-5)
    packed_here = sum(module.weight.nbytes for module in model.modules() if isinstance(module, PackedLinear))
    assert nbytes == packed_here
    assert bool(nbytes) == (name != "falcon")
    again = model.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())


def test_the_gradient_goes_through_packed_weights(tmp_path):
    model = save("llama", tmp_path)
    of = lambda product: runtime(model, linear=product).gradient("train", range(4), lambda s: s[:, 0].sum())  # noqa: E731
    plain, packed = of("torch"), of("packed")
    assert any(g.abs().max() > 1e-3 for g in plain.values())
    for name, gradient in plain.items():
        assert torch.allclose(gradient, packed[name], atol=1e-4), name


def test_small_models_are_left_alone_and_impossible_wishes_refused():
    assert choose("auto", 64, torch.float32, CPU).name == "torch"
    assert choose("torch", 4096, torch.float32, CPU).name == "torch"
    assert choose("auto", 4096, torch.float32, torch.device("meta")).name == "torch"
    with pytest.raises(UserError, match="--linear packed: weights are packed on a CPU, not on meta; use --linear"):
        choose("packed", 4096, torch.float32, torch.device("meta"))
    with pytest.raises(UserError, match=r"--linear packed: this CPU multiplies torch\.float16"):
        choose("packed", 4096, torch.float16, CPU)

    with pytest.raises(UserError, match="--linear onednn: torch's own bfloat16 products are oneDNN's already"):
        choose("onednn", 4096, torch.bfloat16, CPU)
    with pytest.raises(UserError, match="--linear packed: --tuning full trains every weight"):
        choose("packed", 4096, torch.float32, CPU, frozen=False)


@pytest.mark.parametrize("product", ["packed", "onednn"])
def test_float32_that_is_rounded_to_bfloat16_is_not_taken(monkeypatch, product):
    exact = linear._product
    monkeypatch.setattr(linear, "_product", lambda name, w: lambda x: exact(name, w)(x.bfloat16().float()))
    frozen = product == "packed"
    assert "rounded to fewer bits" in choose("auto", 4096, torch.float32, CPU, frozen).why
    with pytest.raises(UserError, match=f"--linear {product}: float32 products are rounded to fewer bits"):
        choose(product, 4096, torch.float32, CPU, frozen)


@by_onednn
@pytest.mark.parametrize("name", list(LAST_LAYER))
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_onednn_multiplies_by_weights_as_they_lie(name, tuning, tmp_path, monkeypatch):
    """Within the forward pass of the runtime alone, and never for what a proof compares with."""
    model, settings = save(name, tmp_path), torch.backends.mkldnn.matmul
    seen, multiply = [], torch.nn.functional.linear
    monkeypatch.setattr(
        torch.nn.functional, "linear", lambda *args: seen.append(settings.fp32_precision) or multiply(*args)
    )
    scores = {}
    for product in ("torch", "onednn"):
        built = runtime(model, name in ENCODERS, linear=product, tuning=tuning)
        assert built.linear == product
        seen.clear()
        scores[product] = built.score_pairs("train", range(4))
        assert ("bf16" in seen) == (product == "onednn")
        seen.clear()
        with linear.as_loaded():
            built.score("train", range(4))
        assert "bf16" not in seen
        assert settings.fp32_precision == "none"
    for plain, other in zip(scores["torch"][0], scores["onednn"][0], strict=True):
        assert torch.allclose(plain, other, atol=ROUNDING)


def test_auto_takes_what_is_faster(monkeypatch):
    monkeypatch.setattr(linear, "is_exact", lambda *args: True)
    for gain, name, frozen in (
        (0.9, "torch", True),
        (2.0, "packed", True),
        (0.9, "torch", False),
        (2.0, "onednn", False),
    ):
        monkeypatch.setattr(linear, "measured_gain", lambda *args, gain=gain: gain)
        product = choose("auto", 576, torch.float32, CPU, frozen)
        assert product.name == name
        assert f"{gain:.2f} times as fast" in product.why
    monkeypatch.undo()
    for name in ("packed", "onednn"):
        assert 0.1 < linear.measured_gain(256, torch.float32, name) < 10


@pytest.mark.parametrize("product", ["packed", pytest.param("onednn", marks=by_onednn)])
def test_a_run_goes_on_with_the_product_it_began_with(tiny_options, tmp_path, monkeypatch, caplog, product):
    """Whatever a trial would say by then; its log is that of a run that was never stopped."""
    options = {**tiny_options, "steps": 4, "eval_every": 4, "layers_to_transform": (), "noise": False}
    if product == "onednn":
        del options["layers_to_transform"], options["target_modules"]
        options |= {"tuning": "full", "lr": 1e-4}
    monkeypatch.setattr(linear, "SMALLEST", 1)
    monkeypatch.setattr(linear, "measured_gain", lambda *args: 2.0)
    whole, parts = (options | {"output_dir": str(tmp_path / name)} for name in ("whole", "parts"))
    train(Config.of(**whole))
    assert train(Config.of(**parts), until=2) is None
    monkeypatch.setattr(linear, "measured_gain", lambda *args: 0.5)
    with caplog.at_level(logging.INFO, logger="mezo"):
        resume(parts["output_dir"])
    said = [line for line in caplog.messages if "products" in line][0]
    assert said.startswith(f"float32 products: {linear.LIBRARY[product]}")
    logs = [(tmp_path / name / "trajectory.jsonl").read_bytes() for name in ("whole", "parts")]
    assert logs[0] == logs[1]
    assert json.loads(logs[0].splitlines()[0])["linear"] == product
