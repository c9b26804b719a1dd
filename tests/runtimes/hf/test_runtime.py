"""The hf runtime: exact trunk cache on every family, kernels in use, PEFT equivalence."""

import dataclasses
import random

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM, MistralConfig, MistralForCausalLM

from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.step import Step, Update
from mezo.models.families import FAMILIES, GENERIC
from mezo.models.merge import merge
from mezo.run.adapter import save_adapter
from mezo.runtimes.hf.reading import ByParts
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.hf.trunk import Trunk
from mezo_kernels import lora_init
from tests.tiny_models import ENCODERS, LAST_LAYER, SIZES, build, save

ROUNDING = 2e-5  # float32 scores of order 10; batches are shaped differently, so sums are ordered differently


@pytest.fixture(scope="module", params=list(LAST_LAYER))
def family(request, tmp_path_factory):
    return request.param, save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def examples(n, masked=False, several=False):
    """Random prompts of 5 to 20 tokens with two options."""
    rng = random.Random(0)
    options = ((5, 7), (9, 11, 13)) if several else ((5,), (9,))
    made = []
    for _ in range(n):
        prompt = tuple(rng.randrange(3, SIZES["vocab_size"]) for _ in range(rng.randint(5, 20)))
        made.append(Example(prompt, options, rng.randint(0, 1), rng.randrange(len(prompt)) if masked else None))
    return made


def runtime(model, data, done=0, **options):
    """A prepared runtime whose adapter has an effect, of a run with so many steps done."""
    config = Config.of(**{"model": model, "output_dir": "unused", "task": "sst2", **options})
    model, machine, work = config.for_runtime
    built = HFRuntime(model, machine, dataclasses.replace(work, done=done))
    built.prepare({"train": data})
    for copy in (built.plus, built.minus):  # what no step has written must reach no score
        for tensor in copy.tensors:
            tensor.fill_(torch.nan)
    built.load({name: lora_init(3, name, shape) for name, shape in built.spec.shapes.items()})
    return built


ADAPTED = {
    "all layers": lambda family: {},
    "two layers": lambda family: {"layers_to_transform": (1, 2)},
    "last layer": lambda family: {"layers_to_transform": (2,), "target_modules": LAST_LAYER[family]},
    "last layer and head": lambda family: {
        "layers_to_transform": (2,),
        "target_modules": (*LAST_LAYER[family], "lm_head"),
    },
    "head": lambda family: {"target_modules": ("lm_head",)},
}


def adapters(adapted, family):
    """Options of a kind of adapter; an encoder's head is not a linear layer."""
    if "head" in adapted and family in ENCODERS:
        pytest.skip("the head of an encoder is not adapted")
    return ADAPTED[adapted](family)


@pytest.mark.parametrize("adapted", list(ADAPTED))
@pytest.mark.parametrize("several", [False, True], ids=["one token", "several tokens"])
def test_trunk_cache_is_exact(family, adapted, several):
    name, model = family
    masked = name in ENCODERS
    if several and masked:
        pytest.skip("a mask holds one token")
    data, options = examples(40, masked, several), adapters(adapted, name)
    cached = runtime(model, data, **options)
    plain = runtime(model, data, trunk_cache="off", **options)
    for one in (cached, plain):
        one.perturb(Step([7], 1e-2))
    batch = [0, 33, 5, 17]
    for a, b in zip(cached.score_pairs("train", batch)[0], plain.score_pairs("train", batch)[0], strict=True):
        assert torch.allclose(a, b, atol=ROUNDING, rtol=0)
    assert torch.allclose(cached.score("train", range(9)), plain.score("train", range(9)), atol=ROUNDING, rtol=0)
    plus, minus = cached.score_pairs("train", batch)[0]
    assert (plus - minus).abs().max() > 10 * ROUNDING


@pytest.mark.parametrize("adapted", list(ADAPTED))
def test_trunk_plan_follows_the_adapted_modules(family, adapted):
    name, model = family
    built = runtime(model, examples(4, name in ENCODERS), **adapters(adapted, name))
    kind = None if built.scorer.trunk is None else "scored" if built.scorer.trunk.keep_kv else "layers"
    assert kind == {"all layers": None, "two layers": "layers"}.get(adapted, "scored")
    layers = {GENERIC.layer_of(name) for name in built.spec.shapes}
    assert (
        layers
        == {
            "all layers": {0, 1, 2},
            "two layers": {1, 2},
            "last layer": {2},
            "last layer and head": {2, None},
            "head": {None},
        }[adapted]
    )


def test_key_adapters_keep_whole_rows(llama):
    built = runtime(llama, examples(4), layers_to_transform=(2,), target_modules=("q_proj", "k_proj"))
    assert not built.scorer.trunk.keep_kv


def assert_scored_as_by_the_model(built, data):
    """Log-odds are those of the PEFT model at hand, one prompt at a time."""
    got = built.score("train", range(len(data)))
    for example, score in zip(data, got, strict=True):
        with torch.no_grad():
            logits = built.parts.model(input_ids=torch.tensor([example.prompt])).logits[0, -1]
        want = logits[[option[0] for option in example.options]].double()
        assert torch.allclose(score.log_softmax(-1), want.log_softmax(-1), atol=ROUNDING, rtol=0)


def test_a_trunk_cache_planned_wrongly_keeps_whole_rows(llama, monkeypatch, caplog):
    """Keys of the last layer do depend on a k_proj adapter: forcing their reuse must be caught at start-up."""
    wrong = dataclasses.replace(FAMILIES["llama"], kv_free=frozenset({"q_proj", "k_proj"}))
    monkeypatch.setitem(FAMILIES, "llama", wrong)
    with caplog.at_level("INFO", "mezo"):
        built = runtime(llama, examples(8), layers_to_transform=(2,), target_modules=("q_proj", "k_proj"))
    (line,) = [message for message in caplog.messages if "differ by" in message]
    assert line.endswith("the trunk cache keeps whole rows, the last layer runs for all tokens")
    assert isinstance(built.scorer.reading, ByParts)
    assert built.scorer.trunk.keep_kv is False
    assert_scored_as_by_the_model(built, examples(8))


RIGHT = Trunk._run
FAULTS = {
    "wrong": lambda trunk, ids, at, hidden, *others, **inputs: RIGHT(trunk, ids, at, 2 * hidden, *others, **inputs),
    "fails": lambda trunk, *others, **inputs: trunk.nonsense,
}


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_trunk_cache_that_is_wrong_is_not_used(llama, monkeypatch, caplog, fault):
    monkeypatch.setattr(Trunk, "_run", FAULTS[fault])
    options = ADAPTED["last layer"]("llama")
    with caplog.at_level("INFO", "mezo"):
        built = runtime(llama, examples(8), **options)
    (line,) = [message for message in caplog.messages if "no trunk cache" in message]
    assert ("differ by" in line) == (fault == "wrong")
    assert fault == "wrong" or "does not run in parts (AttributeError: 'Trunk' object has no" in line
    assert line.endswith("no trunk cache, all 3 layers run for each score")
    assert built.scorer.trunk is None
    assert_scored_as_by_the_model(built, examples(8))
    with pytest.raises(UserError, match=r"--trunk-cache: .*; use --trunk-cache off"):
        runtime(llama, examples(8), trunk_cache="cpu", **options)


def save_model(model, directory):
    model.save_pretrained(directory)
    return str(directory)


@pytest.mark.parametrize("layers", [(), (1, 2)], ids=["no trunk", "trunk"])
def test_models_that_change_their_logits_unknown_to_the_table_are_scored_by_their_own_head(
    tmp_path, monkeypatch, layers, caplog
):
    """Granite divides its logits: where nobody had said so, scores of its bare head would be wrong by that factor."""
    monkeypatch.delitem(FAMILIES, "granite")
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, num_key_value_heads=2, logits_scaling=8.0))
    path, adapted = save_model(model, tmp_path), {"layers_to_transform": layers, "target_modules": ("q_proj", "v_proj")}
    with caplog.at_level("INFO", "mezo"):
        built = runtime(path, examples(4), **adapted)
    (line,) = [message for message in caplog.messages if "differ by" in message]
    assert line.endswith(": logits by the model's own forward pass, of all tokens of the vocabulary")
    assert (built.scorer.trunk is None) == (not layers)
    assert_scored_as_by_the_model(built, examples(4))


@pytest.mark.parametrize("layers", [(), (1, 2)], ids=["no trunk", "trunk"])
def test_a_model_that_overflows_in_float16_is_told_to_run_in_bfloat16(tmp_path, layers):
    torch.manual_seed(0)
    model = GraniteForCausalLM(GraniteConfig(**SIZES, num_key_value_heads=2, embedding_multiplier=1e6))
    path, adapted = save_model(model, tmp_path), {"layers_to_transform": layers, "target_modules": ("q_proj", "v_proj")}
    with pytest.raises(UserError, match=r"NaN in torch\.float16: use --dtype bfloat16"):
        runtime(path, examples(4), dtype="float16", **adapted)


def test_a_sliding_window_shorter_than_a_row_keeps_whole_rows(tmp_path):
    """The short rows come first: the window matters for the last one alone."""
    torch.manual_seed(0)
    model = save_model(MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)), tmp_path)
    options = {"layers_to_transform": (2,), "target_modules": ("q_proj", "o_proj")}
    short = [Example(example.prompt[:5], example.options, example.label) for example in examples(9)]
    data = [*short, Example(tuple(range(3, 33)), ((5,), (9,)), 0)]
    assert runtime(model, short, **options).scorer.trunk.keep_kv
    cached, plain = runtime(model, data, **options), runtime(model, data, trunk_cache="off", **options)
    assert not cached.scorer.trunk.keep_kv
    assert torch.allclose(cached.score("train", range(10)), plain.score("train", range(10)), atol=ROUNDING, rtol=0)


def test_a_trunk_cache_asked_for_in_vain_is_refused(llama):
    with pytest.raises(UserError, match="--trunk-cache: layer 0 is adapted"):
        runtime(llama, examples(2), trunk_cache="cpu")


def test_prompts_longer_than_the_model_are_refused(llama):
    with pytest.raises(UserError, match="--max-length: a prompt has 200 tokens, the model takes 128"):
        runtime(llama, [Example((5,) * 200, ((5,), (9,)), 0)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda"}, "--device cuda: torch sees no GPU here"),
        ({"device": "gpu"}, "--device must be cpu, cuda or cuda:N, got gpu"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_devices_that_are_not_there_are_refused(llama, options, message):
    with pytest.raises(UserError, match=message):
        runtime(llama, examples(2), **options)


def test_backends_that_do_not_run_are_refused(llama, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match="--backend triton does not run on cpu; available there: reference, numba"):
        runtime(llama, examples(2), backend="triton", device="cpu")


@pytest.mark.parametrize("adapted", ["two layers", "last layer"])
def test_eviction_changes_no_bit(llama, adapted):
    data, options = examples(100), ADAPTED[adapted]("llama")
    whole = runtime(llama, data, **options)
    limit = whole.scorer.trunk.nbytes // 10
    small = runtime(llama, data, trunk_cache_bytes=limit, **options)
    assert "it is full" in small.describe()
    for step in range(6):
        batch = random.Random(step).sample(range(100), 16)
        for one in (whole, small):
            one.perturb(Step([step], 1e-2))
        for a, b in zip(whole.score_pairs("train", batch)[0], small.score_pairs("train", batch)[0], strict=True):
            assert torch.equal(a, b)
        assert small.scorer.trunk.nbytes <= limit or len(small.scorer.trunk.groups) == 1


@pytest.mark.parametrize("adapted", ["all layers", "two layers", "last layer"])
@pytest.mark.parametrize("several", [False, True], ids=["one token", "several tokens"])
def test_examples_that_come_later_are_scored_as_those_that_were_there(llama, adapted, several):
    data, options = examples(60, several=several), adapters(adapted, "llama")
    whole, grown = runtime(llama, data, **options), runtime(llama, data[:20], **options)
    batch = [3, 19, 20, 21, 37, 38, 59]
    grown.score("train", [0, 5, 19])  # what is kept of these stays
    for part in (data[20:38], data[38:]):
        grown.grow("train", part)
    for one in (whole, grown):
        one.perturb(Step([7], 1e-2))
    for a, b in zip(whole.score_pairs("train", batch)[0], grown.score_pairs("train", batch)[0], strict=True):
        assert torch.allclose(a, b, atol=ROUNDING, rtol=0)
    scores = whole.score("train", range(60))
    assert torch.allclose(scores, grown.score("train", range(60)), atol=ROUNDING, rtol=0)
    assert (scores - scores.roll(1, 0)).abs().max() > 10 * ROUNDING


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (Example((5,) * 200, ((5,), (9,)), 0), "the model takes"),
        (Example((5,), ((5,), (9, 11)), 0), "options: those of the run have one token each"),
        (Example((5,), ((5,),), 0), "options: those of the run have one token each"),
    ],
)
def test_examples_that_come_later_and_do_not_fit_are_refused(llama, example, message):
    built = runtime(llama, examples(4), layers_to_transform=(2,), target_modules=LAST_LAYER["llama"])
    with pytest.raises(UserError, match=message):
        built.grow("train", [example])
    assert built.score("train", range(4)).shape == (4, 2)


@pytest.mark.parametrize("adapted", ["two layers", "last layer"])
def test_a_run_too_short_to_see_every_example_keeps_none(llama, adapted):
    """It computes the trunk of a batch once for all signs and instruments; scores are those without a cache."""
    data, options = examples(40), {"steps": 2, "batch_size": 4, **ADAPTED[adapted]("llama")}
    built, plain = runtime(llama, data, **options), runtime(llama, data, **options, trunk_cache="off")
    assert built.tokens.computed == 0
    drawn, scores = [3, 9, 27, 3], []
    for one in (built, plain):
        one.perturb(Step([1], 1e-2))
        scores.append(one.score_pairs("train", drawn)[0])
    for of_built, of_plain in zip(*scores, strict=True):
        assert torch.allclose(of_built, of_plain, atol=1e-5)
        assert torch.allclose(
            of_built[0], of_built[3], atol=1e-5
        )  # one example twice; some CPUs round rows differently
    assert built.tokens.computed < plain.tokens.computed
    assert not built.scorer.trunk.groups
    computed = built.tokens.computed
    again = built.score_pairs("train", drawn)[0]
    assert all(torch.equal(a, b) for a, b in zip(scores[0], again, strict=True))
    assert built.tokens.computed - computed < computed, "the trunk of this batch is known"


def test_what_is_left_of_a_resumed_run_fills_what_it_draws(llama):
    data, options = examples(40), {"steps": 20, "batch_size": 4, **ADAPTED["last layer"]("llama")}
    whole, rest = (runtime(llama, data, done=done, **options) for done in (0, 19))
    assert rest.tokens.computed == 0
    assert len(whole.scorer.trunk.groups) == 3
    scores = []
    for one in (whole, rest):
        one.perturb(Step([1], 1e-2))
        scores.append(one.score_pairs("train", [3, 9, 27, 3])[0])
    assert all(torch.equal(a, b) for a, b in zip(*scores, strict=True)), "the groups are those of the whole run"


def test_tokens_are_counted(llama):
    data = examples(40)
    built = runtime(llama, data, **ADAPTED["last layer"]("llama"))
    total = sum(len(example.prompt) for example in data)
    assert built.tokens.computed == pytest.approx(total), "filling the cache runs every layer once"
    built.perturb(Step([1], 1e-2))
    built.score_pairs("train", range(10))
    scored = 2 * sum(len(example.prompt) for example in data[:10])
    assert built.tokens.scored == scored
    assert built.tokens.computed == pytest.approx(total + 2 * 10 / 3), "one position through one of three layers"


@pytest.mark.parametrize("options", [{}, {"layers_to_transform": (2,)}])
def test_one_option_of_one_token_has_its_log_probability(llama, options):
    """There is no other option to be compared with: what is reported of it is a loss of the language model."""
    data = [Example(example.prompt, example.options[:1], 0) for example in examples(6)]
    built = runtime(llama, data, **options)
    built.load({name: torch.zeros(shape) for name, shape in built.spec.shapes.items()})
    scores = built.score("train", range(6))
    plain = AutoModelForCausalLM.from_pretrained(llama)
    for example, score in zip(data, scores, strict=True):
        logits = plain(torch.tensor([example.prompt])).logits[0, -1].double()
        expected = logits.log_softmax(-1)[example.options[0][0]].item()
        assert score.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("adapted", ["last layer", "last layer and head"])
def test_adapter_loads_in_peft_with_equal_logits(family, adapted, tmp_path):
    name, model = family
    data = examples(6, name in ENCODERS)
    built = runtime(model, data, **adapters(adapted, name))
    save_adapter(tmp_path / "adapter", built.spec.peft, built.theta())
    peft = PeftModel.from_pretrained(build(name), str(tmp_path / "adapter")).eval()
    for i, example in enumerate(data):
        with torch.no_grad():
            logits = peft(input_ids=torch.tensor([example.prompt])).logits[0]
        at = logits[-1 if example.mask is None else example.mask, [5, 9]].double()
        got = built.score("train", [i])[0]
        assert torch.allclose(got - got[0], at - at[0], atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_an_adapted_head_is_merged_and_the_embeddings_are_left_alone(tmp_path, tied):
    model = save("llama", tmp_path / "llama", tie_word_embeddings=tied)
    built = runtime(model, examples(6), **ADAPTED["last layer and head"]("llama"))
    save_adapter(tmp_path / "adapter", built.spec.peft, built.theta())
    merge(model, tmp_path / "adapter", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    embeddings = build("llama", tie_word_embeddings=tied).get_input_embeddings().weight
    assert torch.equal(merged.get_input_embeddings().weight, embeddings)
    for i, example in enumerate(examples(6)):
        with torch.no_grad():
            at = merged(input_ids=torch.tensor([example.prompt])).logits[0, -1, [5, 9]].double()
        got = built.score("train", [i])[0]
        assert torch.allclose(got - got[0], at - at[0], atol=ROUNDING, rtol=0)


def test_verify_names_a_flipped_bit(llama):
    built = runtime(llama, examples(4), **ADAPTED["last layer"]("llama"))
    built.update([Update([5], [1e-3], 0.999)], Step([6], 1e-2), watch=True)
    assert built.verify() is None
    name = built.plus.names[3]
    built.plus.tensors[3].view(torch.int32)[1, 2] ^= 1
    assert built.verify().startswith(f"plus of {name} at index {built.plus.tensors[3].shape[1] + 2}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_base_uses_single_roundings(llama, dtype):
    built = runtime(llama, examples(8), dtype=dtype, **ADAPTED["last layer"]("llama"))
    built.update([Update([5], [1e-3])], Step([6], 1e-2), watch=True)
    assert {t.dtype for t in built.plus.tensors} == {getattr(torch, dtype)}
    assert {t.dtype for t in built.master.tensors} == {torch.float32}
    plus, minus = built.score_pairs("train", range(4))[0]
    assert torch.isfinite(plus).all()
    assert not torch.equal(plus, minus)
    assert built.verify() is None


def test_evaluation_leaves_the_perturbed_copies(llama):
    built = runtime(llama, examples(8), **ADAPTED["last layer"]("llama"))
    built.perturb(Step([6], 1e-2))
    before = built.score_pairs("train", range(4))[0]
    built.score("train", range(8))
    for a, b in zip(before, built.score_pairs("train", range(4))[0], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ("q_proj", "nonsense")}, "--target-modules: no linear layer named nonsense; .*q_proj"),
        ({"layers_to_transform": (3,)}, "--layers-to-transform: layer 3 does not exist; the model has layers 0 to 2"),
    ],
)
def test_unknown_modules_and_layers_are_refused(llama, options, message):
    with pytest.raises(UserError, match=message):
        runtime(llama, examples(2), **options)


def test_missing_model_is_refused():
    with pytest.raises(UserError, match=r"--model ./nowhere: it could not be loaded"):
        runtime("./nowhere", examples(2))
