"""One forward pass for all directions of a step: what rows score with copies of their own, and with each alone."""

from dataclasses import replace

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaMLP

from mezo.config import Config
from mezo.data.example import Example
from mezo.method.step import Step
from mezo.runtimes.hf import rowwise
from mezo.runtimes.hf.passes import RowsEndToEnd
from mezo.runtimes.hf.runtime import HFRuntime
from tests.runtimes.hf.test_runtime import ADAPTED, ROUNDING, adapters, examples, family, llama, runtime
from tests.tiny_models import ENCODERS, LAST_LAYER, save

__all__ = ["family", "llama"]  # fixtures
STEP = Step([11, 12, 13, 14], 0.1)
SHARES = [[0, 1], [2, 3], [4, 5], [6, 7]]


def both_ways(built, shares=SHARES, indices=range(8), step=STEP):
    """Scores by one pass for all copies, and by a pass for each."""
    assert built.scorer.rowwise is not None, built.scorer.why_not_rowwise
    built.perturb(step)
    together, passes = built.score_pairs("train", indices, shares), built.scorer.rowwise
    built.scorer.rowwise = None
    alone = built.score_pairs("train", indices, shares)
    built.scorer.rowwise = passes
    return together, alone


def assert_close(together, alone):
    assert len(together) == len(alone)
    for got, want in zip(together, alone, strict=True):
        for a, b in zip(got, want, strict=True):
            assert len(a) == len(b)
            width = b.shape[1] if len(b) else 0
            b = torch.as_tensor(b).view(len(a), width)
            assert ((a[:, :width] - b).nan_to_num().abs() < ROUNDING).all()
            assert (a[:, :width].isinf() == b.isinf()).all()
            assert a[:, width:].isinf().all()


@pytest.mark.parametrize("adapted", list(ADAPTED))
@pytest.mark.parametrize("several", [False, True], ids=["one token", "several tokens"])
def test_rows_score_as_their_copies_do(family, adapted, several):
    name, model = family
    masked = name in ENCODERS
    if masked and several:
        pytest.skip("a mask holds one token")
    options = {**adapters(adapted, name), "directions": 4, "batch_size": 8}
    if several:
        options["objective"] = "lm_cross_entropy"
    built = runtime(model, examples(8, masked, several), **options)
    together, alone = both_ways(built)
    assert_close(together, alone)
    different = torch.cat([plus - minus for plus, minus in alone]).nan_to_num().abs().amax(1)
    assert (different > 10 * ROUNDING).all(), "every row is told apart by its copy"


@pytest.mark.parametrize("shares", [[[0], [1], [2], [3]], [[3, 0], [], [1, 2, 5], [4]], [[1, 0, 2]]], ids=str)
def test_shares_may_be_of_any_size(llama, shares):
    built = runtime(llama, examples(8), directions=4, batch_size=8)
    assert_close(*both_ways(built, shares))


@pytest.mark.parametrize("cache", ["off", "auto"])
def test_the_trunk_cache_serves_all_directions(llama, cache):
    last = {"layers_to_transform": (2,), "target_modules": LAST_LAYER["llama"]}
    built = runtime(llama, examples(8), directions=8, batch_size=8, trunk_cache=cache, **last)
    assert (built.scorer.trunk is not None) == (cache == "auto")
    step = Step(range(8), 0.1)
    assert_close(*both_ways(built, [[i] for i in range(8)], step=step))
    assert built.tokens.scored == 2 * 2 * sum(len(row.ids) for rows in built.scorer.rows["train"] for row in rows)


def test_a_linear_head_of_each_direction(tmp_path):
    data = [Example(e.prompt, ((0,), (1,)), e.label, pooled=True) for e in examples(8)]
    options = {"head": "linear", "label_words": (" terrible", " great"), "task": "", "train_file": "unused"}
    built = runtime(save("roberta", tmp_path), data, prompt="{text}", directions=4, batch_size=8, **options)
    together, alone = both_ways(built)
    for got, want in zip(together, alone, strict=True):
        for a, b in zip(got, want, strict=True):
            assert (a.log_softmax(-1) - b.log_softmax(-1)).abs().max() < ROUNDING


@pytest.mark.parametrize("tuning", ["lora-xs", "lora-b"])
@pytest.mark.parametrize("adapted", ["all layers", "last layer"])
def test_small_adapters_of_each_direction(llama, adapted, tuning):
    options = {**adapters(adapted, "llama"), "tuning": tuning, "r": 4, "directions": 4, "batch_size": 8}
    built = runtime(llama, examples(8), **options)
    built.load(built.initial_theta(1))
    assert (built.scorer.trunk is not None) == (adapted == "last layer")
    together, alone = both_ways(built)
    assert_close(together, alone)
    assert (torch.cat([plus - minus for plus, minus in alone]).nan_to_num().abs().amax(1) > 10 * ROUNDING).all()


def test_a_prefix_of_each_direction(family):
    name, model = family
    built = runtime(model, examples(8, name in ENCODERS), tuning="prefix", directions=4, batch_size=8)
    assert_close(*both_ways(built))


def test_texts_of_each_direction(llama):
    options = {"objective": "f1", "task": "drop", "directions": 4, "batch_size": 8}
    built = runtime(llama, [Example(e.prompt, (), 0) for e in examples(8)], **options)
    assert built.scorer.rowwise is not None
    built.perturb(STEP)
    together = built.generate_pairs("train", range(8), 6, (), SHARES)
    built.scorer.rowwise = None
    assert together == built.generate_pairs("train", range(8), 6, (), SHARES)
    assert len({text for plus, minus in together for text in (*plus, *minus)}) > 4


def test_copies_that_do_not_fit_take_turns(llama):
    built = runtime(llama, examples(8), directions=4, batch_size=8, copies_bytes=1)
    assert built.pairs == 1
    assert built.describe().endswith("4 directions, a forward pass holds 1 of 4 perturbations at both signs")
    half = 2 * 2 * 4 * built.master.n_elements
    assert runtime(llama, examples(8), directions=4, batch_size=8, copies_bytes=half).pairs == 2


def test_the_base_itself_is_scored_a_copy_at_a_time(llama):
    built = runtime_of_the_base(llama)
    assert (built.pairs, built.scorer.rowwise) == (1, None)
    assert "4 directions, a forward pass each: model.embed_tokens.weight is no adapter" in built.describe()


def runtime_of_the_base(model):
    options = {"tuning": "full", "directions": 4, "batch_size": 8}
    built = HFRuntime(*Config.of(model=model, output_dir="unused", task="sst2", **options).for_runtime)
    built.prepare({"train": examples(8)})
    return built


def test_a_wrong_copy_is_found_at_the_start(llama, monkeypatch):
    """Every row run by the first copy: the proof says no, and each copy is run alone."""
    monkeypatch.setattr(rowwise, "_chosen", lambda copies, views=True: [0] * len(copies))
    built = runtime(llama, examples(8), directions=4, batch_size=8)
    assert built.scorer.rowwise is None
    assert "not exact on this model" in built.describe()


@pytest.mark.parametrize(
    ("parts", "why"),
    [((-1,), "tokens where the rows have"), ((None,), "not exact on this model")],
    ids=["lost", "sorted"],
)
def test_a_module_that_sorts_tokens_is_found_at_the_start(llama, monkeypatch, parts, why):
    """As a mixture of experts does: some tokens for one expert, the others for another."""
    whole, (end,) = LlamaMLP.forward, parts

    def sorted_tokens(self, x):
        tokens = x.flatten(0, 1).flip(0)
        done = [whole(self, part) for part in (tokens[:end], tokens[end:] if end else tokens[:0]) if len(part)]
        return torch.cat(done).flip(0).view_as(x)

    monkeypatch.setattr(LlamaMLP, "forward", sorted_tokens)
    built = runtime(llama, examples(8), directions=4, batch_size=8, target_modules=("q_proj", "up_proj"))
    assert built.scorer.rowwise is None
    assert why in built.describe()
    built.perturb(STEP)
    assert len(built.score_pairs("train", range(8), SHARES)) == 4


@pytest.mark.parametrize("layers", [(), (1, 2)], ids=["all layers", "trunk"])
def test_rows_beside_one_another_and_end_to_end_have_the_same_scores(llama, layers):
    built = runtime(llama, examples(8), directions=4, batch_size=8, layers_to_transform=layers)
    built.perturb(STEP)
    assert isinstance(built.scorer.way.layout, RowsEndToEnd)
    end_to_end = built.score_pairs("train", range(8), SHARES)
    padded = built.scorer._padded(built.scorer.reading)
    built.scorer.way = replace(built.scorer.way, layout=padded)
    assert_close(built.score_pairs("train", range(8), SHARES), end_to_end)
