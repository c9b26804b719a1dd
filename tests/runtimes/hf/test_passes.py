"""Rows in one forward pass, padded or end to end: the same scores, and none that sees another row."""

import itertools
from dataclasses import replace

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from mezo.data.example import Example
from mezo.models import attention
from mezo.runtimes.hf import passes, scorer
from mezo.runtimes.hf.passes import EndToEnd, PaddedRows, RowsEndToEnd, filled
from mezo.runtimes.rows import RowBatch, rows_of
from tests.runtimes.hf.test_prefix import runtime as with_prefix
from tests.runtimes.hf.test_runtime import ROUNDING, examples
from tests.runtimes.hf.test_runtime import runtime as with_adapter
from tests.tiny_models import ENCODERS, LAST_LAYER, SIZES, save

OPTIONS = {
    "all layers": lambda name: {},
    "trunk": lambda name: {"layers_to_transform": (1, 2)},
    "keys and values": lambda name: {"layers_to_transform": (2,), "target_modules": LAST_LAYER[name]},
    "prefix": lambda name: {},
}


def scores(built, layout, count=12):
    """Of all examples with rows run so, whatever was computed of them before."""
    built.scorer.way = replace(built.scorer.way, layout=layout)
    if built.scorer.trunk:
        built.scorer.trunk.layout = layout
        built.scorer.trunk.clear()
    return built.score("train", range(count))


@pytest.mark.parametrize("name", ["llama", "opt", "bert", "roberta"])
@pytest.mark.parametrize("what", list(OPTIONS))
def test_how_rows_are_run_changes_no_score(name, what, tmp_path, monkeypatch):
    """One padded pass, one of each length, and one with all rows end to end."""
    make = with_prefix if what == "prefix" else with_adapter
    built = make(save(name, tmp_path), examples(12, masked=name in ENCODERS), **OPTIONS[what](name))
    chosen = built.scorer.way.layout
    assert isinstance(chosen, PaddedRows if what == "prefix" else RowsEndToEnd)
    calls, run = [], scorer.Scorer._run_of
    monkeypatch.setattr(scorer.Scorer, "_run_of", lambda *arguments: calls.append(1) or run(*arguments))
    padded, found = built.scorer._padded(built.scorer.reading), []
    for call in (10**9, 1):
        monkeypatch.setattr(passes, "CALL", call)
        found.append(scores(built, padded))
    found.append(scores(built, chosen))
    by_keys = built.scorer.trunk and built.scorer.trunk.keep_kv
    assert len(calls) > 3 or by_keys
    assert found[0].std() > 100 * ROUNDING
    for other in found[1:]:
        assert torch.allclose(other, found[0], rtol=0, atol=ROUNDING)


def test_a_row_sees_no_other(tmp_path):
    """To the bit: what lies before and after it is changed, its own score is not."""
    data = examples(6)
    others = [replace(e, prompt=tuple(reversed(e.prompt))) if i != 2 else e for i, e in enumerate(data)]
    model = save("llama", tmp_path)
    found = [with_adapter(model, each).score("train", range(6)) for each in (data, others)]
    assert torch.equal(found[0][2], found[1][2])
    changed = [i for i in range(6) if data[i] != others[i]]
    assert (found[0][changed] - found[1][changed]).abs().min() > ROUNDING


def test_a_pass_that_mixes_rows_up_is_not_used(tmp_path, monkeypatch, caplog):
    own = attention._attention_within_rows

    def seeing_all(module, *parts, **kwargs):
        groups, attention._groups = attention._groups, [(1, parts[0].shape[2])]
        try:
            return own(module, *parts, **kwargs)
        finally:
            attention._groups = groups

    monkeypatch.setattr(attention, "_attention_within_rows", seeing_all)
    with caplog.at_level("INFO", "mezo"):
        built = with_adapter(save("llama", tmp_path), examples(8))
    (line,) = [message for message in caplog.messages if "padded" in message]
    assert "differ by" in line
    assert line.endswith("rows are padded to the longest of those that run together")
    assert isinstance(built.scorer.way.layout, PaddedRows)


@pytest.mark.parametrize(("window", "layout"), [(4, PaddedRows), (64, RowsEndToEnd)])
def test_rows_longer_than_the_window_are_padded(tmp_path, window, layout):
    torch.manual_seed(0)
    MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=window)).save_pretrained(tmp_path)
    built = with_adapter(str(tmp_path), examples(8), target_modules=("q_proj", "v_proj"))
    assert isinstance(built.scorer.way.layout, layout)


def test_no_pass_has_more_tokens_than_the_model_has_positions(tmp_path):
    built = with_adapter(save("bert", tmp_path), examples(8, masked=True))
    assert built.scorer.way.layout.most == built.parts.position_limit < passes.MOST


def test_what_is_put_together_comes_apart():
    lengths = [5, 2, 7, 2]
    rows = [row for n in lengths for row in rows_of(Example(tuple(range(3, 3 + n)), ((5,), (9,)), 0))]
    batch = RowBatch.of(rows, 0, "cpu")
    run = EndToEnd(batch, first_position=2)
    assert run.ids.tolist() == [[3, 4, 3, 4, *range(3, 8), *range(3, 10)]]
    assert run.inputs["position_ids"].tolist() == [[2, 3, 2, 3, *range(2, 7), *range(2, 9)]]
    assert run.groups == [(2, 2), (1, 5), (1, 7)]
    parts = [torch.full((n, 3), float(i)) for i, n in enumerate(lengths)]
    again = run.apart(run.joined(parts))
    assert all(torch.equal(a, b) for a, b in zip(parts, again, strict=True))
    read = run.joined(parts).gather(1, run.positions[..., None].expand(-1, -1, 3))
    assert run.results(read)[:, 0, 0].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("most", [1, 9, 40, 10**6])
def test_groups_are_filled_in_order(most):
    lengths = [7, 3, 12, 3, 9, 40, 1]
    groups = filled(lengths, most)
    in_order = [lengths[row] for row in itertools.chain(*groups)]
    assert in_order == sorted(lengths)
    assert sorted(itertools.chain(*groups)) == list(range(len(lengths)))
    for group, after in itertools.pairwise(groups):
        total = sum(lengths[row] for row in group)
        assert total <= most or len(group) == 1
        assert total + lengths[after[0]] > most
