"""Greedy generation by the hf runtime: padding changes nothing, adapters do, texts end where they should."""

import pytest
import torch
from transformers import GenerationConfig

from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.step import Step, Update
from mezo.models.load import Checkpoint
from mezo.runtimes.generation import Writing
from mezo.runtimes.hf.runtime import HFRuntime
from mezo_kernels import lora_init
from tests.runtimes.hf.test_runtime import examples
from tests.tiny_models import LAST_LAYER, WORDS, save, tokenizer

DECODERS = [family for family in LAST_LAYER if family not in ("bert", "roberta")]
NEW = 12


@pytest.fixture(scope="module", params=DECODERS)
def model(request, tmp_path_factory):
    return save(request.param, tmp_path_factory.mktemp(request.param), vocab_size=len(WORDS) + 3)


def runtime(model, data, seed=3, ends=False, **others):
    """A prepared runtime whose adapter has an effect; unless `ends`, no token ends a text."""
    fields = {"model": model, "output_dir": "unused", "task": "squad", "generate": "on", "max_new_tokens": NEW}
    built = HFRuntime(*Config.of(**{**fields, "objective": "f1", **others}).for_runtime)
    built.prepare({"train": data})
    built.load({name: lora_init(seed, name, shape) for name, shape in built.spec.shapes.items()})
    if not ends:
        built.writing = Writing(built.writing.tokenizer, frozenset())
    return built


@pytest.fixture(scope="module")
def data():
    """Prompts of 5 to 20 tokens."""
    return [Example(tuple(t % (len(WORDS)) + 3 for t in e.prompt), ((5,), (9,)), 0) for e in examples(12)]


def test_a_batch_is_written_as_its_rows_one_by_one(model, data):
    built = runtime(model, data)
    together = built.generate("train", range(12), NEW, ())
    assert together == [built.generate("train", [i], NEW, ())[0] for i in range(12)]
    assert len(set(together)) > 6


@pytest.mark.parametrize("adapted", [{}, {"target_modules": ("lm_head",)}], ids=["layers", "head"])
def test_texts_are_those_of_transformers(model, data, adapted):
    """`generate` of the PEFT model itself, a row at a time, without padding."""
    built = runtime(model, data, **adapted)
    built.parts.model.generation_config.eos_token_id = None
    for i, text in enumerate(built.generate("train", range(6), NEW, ())):
        prompt = torch.tensor([data[i].prompt])
        options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        ids = built.parts.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)
        wanted = built.writing.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
        assert text == wanted.strip()


def test_both_signs_are_texts_of_their_own_theta(model, data):
    built = runtime(model, data)
    built.perturb(Step([7], 0.3))
    ((plus, minus),) = built.generate_pairs("train", range(8), NEW, ())
    again = runtime(model, data)
    again.load({name: tensor.clone() for name, tensor in zip(built.spec.shapes, built.plus.tensors, strict=True)})
    assert plus == again.generate("train", range(8), NEW, ())
    assert plus != minus
    assert plus != built.generate("train", range(8), NEW, ())
    assert ((plus, minus),) == tuple(built.generate_pairs("train", range(8), NEW, ())), "evaluation leaves the copies"
    built.update([Update([5], [0.5])], Step([7], 0.3))
    assert built.generate_pairs("train", range(8), NEW, ())[0][0] != plus


def test_a_text_ends_before_a_stop_or_with_the_end_token(model, data):
    built = runtime(model, data)
    whole = built.generate("train", range(12), NEW, ())
    word = next(w for w in WORDS if len(w) > 3 and w in whole[0] and not whole[0].startswith(w))
    stopped = built.generate("train", range(12), NEW, (word,))
    assert stopped == [text.split(word)[0].strip() for text in whole]
    built.writing = Writing(built.writing.tokenizer, frozenset({tokenizer().convert_tokens_to_ids(word)}))
    assert built.generate("train", range(12), NEW, ()) == stopped


def test_the_end_tokens_are_those_of_tokenizer_config_and_generation_config(tmp_path):
    model = save("llama", tmp_path)
    config = GenerationConfig(eos_token_id=[7, 9])
    config.save_pretrained(model)
    assert Writing.of(Checkpoint.of(model)).ends == {2, 7, 9}


def test_tokens_are_those_that_were_run(model, data):
    built = runtime(model, data)
    before = built.eval_tokens.scored
    built.generate("train", range(4), 3, ())
    assert built.eval_tokens.scored - before == sum(len(data[i].prompt) + 2 for i in range(4))
    assert built.eval_tokens.scored == built.eval_tokens.computed


LAST = {"layers_to_transform": (2,), "target_modules": ("q_proj",)}


def test_the_trunk_cache_is_for_scores(tmp_path, data):
    model = save("llama", tmp_path, vocab_size=len(WORDS) + 3)
    assert runtime(model, data, **LAST).scorer.trunk is None
    with pytest.raises(UserError, match="--trunk-cache: --objective f1 generates text, which takes nothing from it"):
        runtime(model, data, trunk_cache="cpu", **LAST)
    mixed, plain = (runtime(model, data, objective=kind, **LAST) for kind in ("cross_entropy:1,f1:1", "f1"))
    assert mixed.scorer.trunk is not None
    for one in (mixed, plain):
        one.perturb(Step([7], 0.5))
    mixed.score_pairs("train", range(12))
    texts = mixed.generate_pairs("train", range(12), NEW, ())
    assert texts == plain.generate_pairs("train", range(12), NEW, ())


def test_prompts_without_options_are_written_after(tmp_path, data):
    model = save("llama", tmp_path, vocab_size=len(WORDS) + 3)
    bare = [Example(example.prompt, (), 0) for example in data]
    assert runtime(model, bare).generate("train", [3, 1], NEW, ()) == runtime(model, data).generate(
        "train", [3, 1], NEW, ()
    )


def test_texts_that_do_not_fit_are_refused(tmp_path, data):
    model = save("llama", tmp_path / "llama")
    longest = max(len(example.prompt) for example in data)
    message = rf"a prompt with --max-new-tokens 120 has {longest + 120} tokens, the model takes 128; use --max-length 8"
    with pytest.raises(UserError, match=message):
        runtime(model, data, max_new_tokens=120)


def test_models_that_fill_masks_write_nothing(tmp_path, data):
    with pytest.raises(UserError, match="fills masks and generates no text"):
        runtime(save("bert", tmp_path), data)
