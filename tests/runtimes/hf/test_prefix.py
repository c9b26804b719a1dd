"""Prefix tuning on the hf runtime: what it scores, writes and differentiates is what PEFT's own prefix model does."""

import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    EsmConfig,
    EsmForMaskedLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.step import Step
from mezo.models.attention import cache_argument
from mezo.models.prefix import PROMPT, Prefix, vocabulary_tokens
from mezo.run.adapter import save_adapter
from mezo.runtimes.generation import written
from mezo_kernels import standard_normal
from tests.runtimes.hf.test_runtime import ROUNDING, examples
from tests.runtimes.hf.test_runtime import runtime as lora_runtime
from tests.runtimes.test_generation import DECODERS, NEW
from tests.runtimes.test_generation import runtime as writing_runtime
from tests.tiny_models import ENCODERS, LAST_LAYER, SIZES, WORDS, save

CLOSE = 1e-5


@pytest.fixture(scope="module", params=list(LAST_LAYER))
def family(request, tmp_path_factory):
    return request.param, save(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def noise(built, seed):
    """A prefix of no real tokens, of the size of those."""
    tensor = built.initial_theta(0)[PROMPT]
    return {PROMPT: tensor + 0.5 * standard_normal(seed, PROMPT, 0, tensor.numel()).view_as(tensor)}


def runtime(model, data, **options):
    """A prepared runtime with such a prefix."""
    built = lora_runtime(model, data, tuning="prefix", **options)
    built.load(noise(built, 3))
    return built


def stock(name, model, built, directory, seed=3):
    """PEFT's model of an adapter file, on a base that transformers loads as it does by default."""
    save_adapter(directory, built.spec.peft, noise(built, seed))
    auto = AutoModelForMaskedLM if name in ENCODERS else AutoModelForCausalLM
    return PeftModel.from_pretrained(auto.from_pretrained(model), str(directory)).eval()


@torch.no_grad()
def option_scores(model, example):
    """Mean log-probabilities of an example's options by a model's own logits, one sequence at a time."""
    scores = []
    for option in example.options:
        ids = torch.tensor([example.prompt if example.mask is not None else example.prompt + option[:-1]])
        log_probs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].double().log_softmax(-1)
        start = len(example.prompt) - 1 if example.mask is None else example.mask
        scores.append(sum(log_probs[start + i, token] for i, token in enumerate(option)) / len(option))
    return torch.stack(scores)


@pytest.mark.parametrize("several", [False, True], ids=["one token", "several tokens"])
def test_scores_are_those_of_peft(family, several, tmp_path):
    name, model = family
    if several and name in ENCODERS:
        pytest.skip("a mask holds one token")
    data = examples(12, name in ENCODERS, several)
    built = runtime(model, data, objective="lm_cross_entropy" if several else "cross_entropy")
    adapted = stock(name, model, built, tmp_path / "adapter")
    got = built.score("train", range(12))
    want = torch.stack([option_scores(adapted, example) for example in data])
    if not several:  # one-token options are scored up to the normaliser
        got, want = got.log_softmax(-1), want.log_softmax(-1)
    assert (got - want).abs().max() < CLOSE
    other = stock(name, model, built, tmp_path / "other", seed=4)
    assert (torch.stack([option_scores(other, e) for e in data]).log_softmax(-1) - want).abs().max() > 1e-2


def test_both_signs_are_those_of_a_prefix_perturbed_by_hand(family):
    name, model = family
    data = examples(8, name in ENCODERS)
    built = runtime(model, data)
    built.perturb(Step([7], 0.1))
    ((plus, minus),) = built.score_pairs("train", range(8))
    theta = noise(built, 3)[PROMPT]
    z = standard_normal(7, PROMPT, 0, theta.numel()).view_as(theta)
    for sign, got in ((1, plus), (-1, minus)):
        built.load({PROMPT: theta + sign * (torch.tensor(0.1) * z)})
        assert torch.equal(built.score("train", range(8)), got)
    assert (plus - minus).abs().max() > 1e-2


@pytest.mark.parametrize("name", DECODERS)
def test_a_fresh_prefix_is_tokens_in_front_of_the_text(name, tmp_path):
    """Keys with their rotary embedding, grouped heads and shifted positions: exact only if every one is right."""
    model = save(name, tmp_path)
    data = examples(10)
    built = runtime(model, data, num_prefix_tokens=7)
    built.load(built.initial_theta(5))
    tokens = tuple(vocabulary_tokens(7, SIZES["vocab_size"], 5))
    base = AutoModelForCausalLM.from_pretrained(model)
    want = torch.stack([option_scores(base, Example(tokens + e.prompt, e.options, e.label)) for e in data])
    assert (built.score("train", range(10)).log_softmax(-1) - want.log_softmax(-1)).abs().max() < CLOSE


def test_tokens_are_a_function_of_the_seed_alone():
    assert vocabulary_tokens(5, 50272, 0) == [8877, 30557, 44735, 42636, 43760]
    assert vocabulary_tokens(3, 50272, 2**64 - 1) != vocabulary_tokens(3, 50272, 2**32 - 1)
    assert max(vocabulary_tokens(1000, 10, 1)) == 9
    assert len(set(vocabulary_tokens(1000, 10, 1))) == 10


def test_a_prefix_lies_in_the_file_as_peft_reads_it(llama):
    built = runtime(llama, examples(2), num_prefix_tokens=4)
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    own = get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config).peft_config["default"]
    for field in ("num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"):
        assert getattr(own, field) == built.spec.peft[field]
    assert built.spec.shapes == {PROMPT: (4, 3 * 2 * 2 * 8)}  # layers, keys and values, grouped heads, their width


def test_rows_of_other_lengths_change_nothing(family):
    name, model = family
    data = examples(12, name in ENCODERS)
    built = runtime(model, data)
    together = built.score("train", range(12))
    alone = torch.cat([built.score("train", [i]) for i in range(12)])
    assert (together - alone).abs().max() < ROUNDING


@pytest.mark.parametrize("window", [4, 64])
def test_a_sliding_window_slides_over_the_prefix_as_in_peft(window, tmp_path):
    sizes = {**SIZES, "sliding_window": window, "num_key_value_heads": 2}
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(tmp_path)
    data = examples(8)
    built = runtime(str(tmp_path), data)
    adapted = stock("mistral", str(tmp_path), built, tmp_path / "adapter")
    want = torch.stack([option_scores(adapted, example) for example in data]).log_softmax(-1)
    assert (built.score("train", range(8)).log_softmax(-1) - want).abs().max() < CLOSE


def test_a_window_counts_no_padding_between_prefix_and_prompt(tmp_path):
    sizes = SIZES | {"vocab_size": len(WORDS) + 3, "num_key_value_heads": 2, "sliding_window": 12}
    MistralForCausalLM(MistralConfig(**sizes)).save_pretrained(tmp_path)
    body = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    layers, heads, width = sizes["num_hidden_layers"], 2, sizes["hidden_size"] // sizes["num_attention_heads"]
    weight = torch.nn.Parameter(torch.randn(5, layers * 2 * heads * width, generator=torch.Generator().manual_seed(0)))
    prompts = [(3, 4, 5), tuple(range(3, 23))]
    prefix = Prefix(weight, layers, heads, cache_argument(body.model))
    run = lambda own: written(body.model, body.lm_head, own, 8, lambda ids: False, 0, prefix)  # noqa: E731
    assert run(prompts) == [run([prompt])[0] for prompt in prompts]


@pytest.mark.parametrize("name", DECODERS)
def test_texts_are_those_of_peft(name, tmp_path):
    model = save(name, tmp_path / "model", vocab_size=len(WORDS) + 3)
    data = [Example(tuple(t % len(WORDS) + 3 for t in e.prompt), ((5,), (9,)), 0) for e in examples(8)]
    built = writing_runtime(model, data, tuning="prefix")
    built.load(noise(built, 3))
    adapted = stock(name, model, built, tmp_path / "adapter")
    texts = built.generate("train", range(8), NEW, ())
    assert texts == [built.generate("train", [i], NEW, ())[0] for i in range(8)]
    assert len(set(texts)) > 3
    for example, text in zip(data, texts, strict=True):
        ids = torch.tensor([example.prompt])
        for _ in range(NEW):  # the generate of PEFT 0.21.2 leaves the prefix out under transformers 5.24
            ids = torch.cat([ids, adapted(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        assert text == built.writing.tokenizer.decode(ids[0, -NEW:], skip_special_tokens=True).strip()


def test_texts_of_both_signs_are_their_own(llama, tmp_path):
    model = save("llama", tmp_path, vocab_size=len(WORDS) + 3)
    data = [Example(tuple(t % len(WORDS) + 3 for t in e.prompt), ((5,), (9,)), 0) for e in examples(8)]
    built = writing_runtime(model, data, tuning="prefix")
    built.load(noise(built, 3))
    built.perturb(Step([7], 0.5))
    ((plus, minus),) = built.generate_pairs("train", range(8), NEW, ())
    assert plus != minus
    built.load({PROMPT: built.plus.tensors[0].clone()})
    assert built.generate("train", range(8), NEW, ()) == plus


def test_the_gradient_is_the_slope_of_the_loss(family):
    name, model = family
    built = runtime(model, examples(8, name in ENCODERS))
    loss = lambda scores: -scores.log_softmax(-1)[:, 0].mean()  # noqa: E731
    gradient = built.gradient("train", range(8), loss)[PROMPT]
    built.perturb(Step([7], 1e-2))
    plus, minus = built.score_pairs("train", range(8))[0]
    z = standard_normal(7, PROMPT, 0, gradient.numel()).view_as(gradient)
    slope = float((gradient.double() * z).sum())
    assert abs(slope) > 1e-3
    assert (loss(plus) - loss(minus)).item() / 2e-2 == pytest.approx(slope, rel=1e-2)


def test_in_16_bits_both_signs_are_one_rounding_of_the_master(llama):
    built = runtime(llama, examples(8), dtype="bfloat16")
    built.perturb(Step([7], 0.1), watch=True)
    assert built.verify() is None
    assert built.parts.prefix.weight.data_ptr() == built.minus.tensors[0].data_ptr()
    z = standard_normal(7, PROMPT, 0, built.master.n_elements).view_as(built.master.tensors[0])
    assert torch.equal(built.minus.tensors[0], (noise(built, 3)[PROMPT] - torch.tensor(0.1) * z).bfloat16())
    plus, minus = built.score_pairs("train", range(8))[0]
    assert (plus - minus).abs().max() > 1e-2


def test_a_wrong_prefix_is_found_at_the_start(llama, monkeypatch):
    """Values taken for keys: PEFT's forward pass says otherwise."""
    right = Prefix.cache

    def swapped(self, rows, weights=None):
        cache = right(self, rows)
        for layer in cache.layers:
            layer.keys, layer.values = layer.values, layer.keys
        return cache

    monkeypatch.setattr(Prefix, "cache", swapped)
    with pytest.raises(UserError, match="not exact on this model"):
        runtime(llama, examples(4))


def test_positions_of_the_prefix_count(tmp_path):
    sizes = {"bert": 128, "roberta": 128 - 2, "llama": 128}
    for name, room in sizes.items():
        model = save(name, tmp_path / name)
        fits = [Example((3,) * (room - 5), ((5,), (9,)), 0, mask=4 if name in ENCODERS else None)]
        runtime(model, fits)
        longer = [Example((3,) * (room - 4), ((5,), (9,)), 0, mask=4 if name in ENCODERS else None)]
        message = f"has {room - 4} tokens, the model takes {room - 5} after a prefix of 5; use --max-length {room - 5}"
        with pytest.raises(UserError, match=message):
            runtime(model, longer)


def test_roberta_has_room_for_fewer_tokens_than_positions(tmp_path):
    model = save("roberta", tmp_path)
    lora_runtime(model, [Example((3,) * 126, ((5,), (9,)), 0, mask=4)])
    with pytest.raises(UserError, match="use --max-length 126"):
        lora_runtime(model, [Example((3,) * 127, ((5,), (9,)), 0, mask=4)])


UNFIT = {
    "it takes no keys and values": lambda: EsmForMaskedLM(EsmConfig(**SIZES, pad_token_id=0, mask_token_id=1)),
    "it has layers of linear_attention": lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, num_experts=2)),
    "its layers do not keep keys and values of one shape": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**SIZES, q_lora_rank=None, first_k_dense_replace=3)
    ),
}


@pytest.mark.parametrize("why", list(UNFIT))
def test_models_without_room_for_a_prefix_are_refused(why, tmp_path):
    UNFIT[why]().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"has no place for a prefix, {why}; use --tuning lora"):
        runtime(str(tmp_path), examples(2))
