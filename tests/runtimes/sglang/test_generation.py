"""Greedy generation by the engine is the hf runtime's: both signs, all perturbations, stops; and whole runs."""

import dataclasses
import json

import pytest

from mezo.api import train
from mezo.config import Config
from mezo.errors import RunError
from mezo.method.sampling import Sampling, text_seed
from mezo.method.step import Step, Update
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.base import TokenCount
from tests.runtimes.sglang.conftest import ALL, LAST, engine, examples, noisy, reference
from tests.tiny_models import WORDS

NEW = 8
TEXT = {"task": "squad", "generate": "on", "max_new_tokens": NEW}
everywhere = pytest.mark.engine("all")
ADAPTED = [
    pytest.param("qwen2", {}, {"target_modules": ALL}, id="a namespace a version", marks=everywhere),
    pytest.param(
        "llama", {"tie_word_embeddings": True}, {"layers_to_transform": (2,), "target_modules": (*LAST, "lm_head")},
        id="one namespace, head", marks=pytest.mark.engine("head"),
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def data():
    return [dataclasses.replace(example, references=("good",)) for example in examples(12)]


@pytest.fixture
def both(family, shape, adapted, model, data):
    """The engine and transformers at the same theta, which changes the texts."""
    path, options = model(family, **shape), {**adapted, **TEXT}
    plain = reference(path, data, **options)
    with engine(path, data, num_perturbations=2, **options) as running:
        for one in (running, plain):
            one.load(noisy(one))
        yield running, plain


each = pytest.mark.parametrize(("family", "shape", "adapted"), ADAPTED)


@each
def test_texts_are_those_of_transformers(both):
    running, plain = both
    assert running.generate("train", range(12), NEW, ()) == plain.generate("train", range(12), NEW, ())


@each
def test_both_signs_of_all_perturbations_are_one_batch(both, monkeypatch):
    running, plain = both
    calls = []
    generate = running.engine.generate
    monkeypatch.setattr(running.engine, "generate", lambda **request: calls.append(request) or generate(**request))
    running.perturb(Step([7, 8], 0.3))
    pairs = running.generate_pairs("train", range(6), NEW, ())
    written = [request for request in calls if request["sampling_params"]["max_new_tokens"]]
    assert len(written) == 1
    assert {n: written[0]["lora_path"].count(n) for n in ("plus0", "minus0", "plus1", "minus1")} == dict.fromkeys(
        ("plus0", "minus0", "plus1", "minus1"), 6
    )
    for seed, pair in zip((7, 8), pairs, strict=True):
        plain.perturb(Step([seed], 0.3))
        assert [pair] == plain.generate_pairs("train", range(6), NEW, ())
        assert pair[0] != pair[1]


@each
def test_sampled_texts_are_those_of_transformers_and_alike_at_equal_copies(both):
    """The same random numbers in both runtimes, at both signs, and along all directions."""
    running, plain = both
    sampling = Sampling(1.5, text_seed(0, 3))
    running.perturb(Step([7, 8], 0.3))
    pairs = running.generate_pairs("train", range(6), NEW, (), sampling=sampling)
    expected = []
    for seed in (7, 8):
        plain.perturb(Step([seed], 0.3))
        expected += plain.generate_pairs("train", range(6), NEW, (), sampling=sampling)
    assert pairs == expected
    assert pairs[0][0] != pairs[0][1] != pairs[1][0]
    assert pairs != running.generate_pairs("train", range(6), NEW, ()), "they are sampled"
    other = running.generate_pairs("train", range(6), NEW, (), sampling=Sampling(1.5, text_seed(0, 4)))
    assert all(text != again for text, again in zip(pairs[0][0], other[0][0], strict=True)), "by another seed"
    running.equalise()
    ((plus, minus),) = running.generate_pairs("train", range(6), NEW, (), sampling=sampling)
    assert plus == minus
    assert len(set(plus)) > 1


@each
def test_groups_of_a_batch_are_sampled_as_in_transformers(both):
    running, plain = both
    sampling, shares = Sampling(1.0, 7), [[0, 3], [1, 2]]
    running.perturb(Step([7, 8], 0.3))
    got = running.generate_pairs("train", [4, 2, 9, 5], NEW, (), shares, sampling)
    for seed, share, pair in zip((7, 8), shares, got, strict=True):
        plain.perturb(Step([seed], 0.3))
        batch = [[4, 2, 9, 5][i] for i in share]
        assert [pair] == plain.generate_pairs("train", batch, NEW, (), sampling=sampling)


@each
def test_an_update_changes_the_texts_and_evaluation_leaves_the_slots(both):
    running, plain = both
    for one in (running, plain):
        one.update([Update([5], [0.5])], Step([7], 0.3))
    pair = running.generate_pairs("train", range(6), NEW, ())
    assert pair == plain.generate_pairs("train", range(6), NEW, ())
    running.generate("train", range(6), NEW, ())
    running.score("train", range(6))
    assert running.generate_pairs("train", range(6), NEW, ()) == pair


@each
def test_stops_are_the_hf_runtimes(both):
    running, plain = both
    whole = plain.generate("train", range(12), NEW, ())
    word = next(w for w in WORDS for text in whole if len(w) > 3 and text.find(w) > 0)
    stopped = running.generate("train", range(12), NEW, (word,))
    assert stopped == plain.generate("train", range(12), NEW, (word,))
    assert stopped != whole


@each
def test_tokens_are_the_engines_count(both):
    running, plain = both
    running.eval_tokens, plain.eval_tokens = TokenCount(), TokenCount()
    for one in (running, plain):
        one.generate("train", range(8, 12), NEW, ())
    ahead = running.eval_tokens.scored - plain.eval_tokens.scored
    assert 0 <= ahead <= sum(len(e.prompt) for e in running.examples["train"][8:12]), "first visits"
    assert running.eval_tokens.computed <= running.eval_tokens.scored


@each
def test_texts_of_the_base_model_are_caught(both, monkeypatch):
    running, _ = both
    generate = running.engine.generate

    def forget(**request):
        request["lora_path"] = [None] * len(request["lora_path"])
        return generate(**request)

    monkeypatch.setattr(running.engine, "generate", forget)
    with pytest.raises(RunError, match="some were not scored by the adapter they belong to"):
        running.generate("train", range(3), NEW, ())


@everywhere
@pytest.mark.parametrize(
    "sampled", [{}, {"temperature": 1.0, "z_score_rewards": True, "center_rewards": True}], ids=["greedy", "sampled"]
)
def test_a_run_on_a_reward_is_the_hf_runtimes(model, tmp_path, sampled):
    """Losses of texts are exact numbers: the logs of both runtimes are the same, byte for byte."""
    rows = [{"prompt": f"the {noun} was {word}"} for noun in ("film", "plot", "story") for word in ("good", "poor")]
    for split in ("train", "dev"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text("def variety(example, output):\n    return len(set(output)) / 64\n")
    logs = {}
    for runtime in ("hf", "sglang"):
        config = Config.of(
            model=model("qwen2"), output_dir=str(tmp_path / runtime), runtime=runtime, objective="reward",
            train_file=str(tmp_path / "train.jsonl"), dev_file=str(tmp_path / "dev.jsonl"), batch_size=3, steps=3,
            reward=f"{tmp_path / 'mine.py'}:variety", max_new_tokens=NEW, lr=0.1, eps=0.3, target_modules=ALL,
            **sampled,
        )  # fmt: skip
        result = train(config)
        logs[runtime] = (tmp_path / runtime / "trajectory.jsonl").read_bytes(), result["dev"]
    assert logs["hf"] == logs["sglang"]
    losses = {r.losses.plus for r in read_trajectory(tmp_path / "hf" / "trajectory.jsonl")[1]}
    assert len(losses) > 1
