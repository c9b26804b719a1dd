"""What an evaluation shows of single examples, and how the best step is chosen."""

import json
from pathlib import Path

import pytest
import torch

from mezo.api import evaluate_target, train
from mezo.cli.main import main
from mezo.config import Method
from mezo.data.example import Example
from mezo.report import page, tables
from mezo.report.monitor import as_markdown
from mezo.report.samples import class_names, yardstick
from mezo.training.details import LONGEST, answers, texts
from mezo.training.evaluation import beats

NAMES = {1: "bad", 2: "good"}


def decode(ids):
    return " ".join(NAMES.get(i, str(i)) for i in ids)


def example(prompt, label, **others):
    return Example((prompt,), ((1,), (2,)), label, where=f"rows.jsonl line {prompt}", **others)


def test_answers_count_by_class_and_the_surest_mistakes_come_first():
    rows = [example(number, label) for number, label in ((10, 0), (11, 0), (12, 1), (13, 1), (14, 1))]
    scores = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0], [4.0, 0.0], [0.1, 0.0]], dtype=torch.float64)
    found = answers(scores, rows, decode)
    assert found["classes"] == ["bad", "good"]
    assert found["confusion"] == [[1, 1], [2, 1]]
    assert [each["where"] for each in found["mistakes"]] == [f"rows.jsonl line {n}" for n in (13, 11, 14)]
    first = found["mistakes"][0]
    assert (first["prompt"], first["right"], first["chosen"]) == ("13", 1, 0)
    assert first["probability"] == pytest.approx(1 / (1 + torch.tensor(-4.0).exp().item()))
    assert yardstick({"accuracy": 0.4, **found}).endswith("always the most common class: 60.0 %")
    assert answers(scores * torch.nan, rows, decode) == {}
    several = [*rows[:4], Example((14,), ((1,), (3,)), 1)]
    assert answers(scores, several, decode) == {}, "options of their own are no classes"


def test_texts_stand_beside_what_is_right_and_what_judges_say():
    rows = [example(10, 1), example(11, 0, references=("ice", "snow")), example(12, 0), example(13, 0)]
    outputs = ["good", "x" * 1000, "", "no"]
    (one, two, three) = texts(rows, outputs, {"reward": [1.0, 0.5, 0.0, 0.0]}, decode)["samples"]
    assert one == {"prompt": "10", "text": "good", "references": ["good"], "judged": {"reward": 1.0}}
    assert (two["references"], len(two["text"]), three["text"]) == (["ice", "snow"], LONGEST, "")
    assert "**good** (right: good; reward 1)" in as_markdown({"samples": [one]})


@pytest.mark.parametrize(
    ("options", "found"),
    [({}, [True, False, True]), ({"best_metric": "accuracy"}, [True, True, False]), ({"objective": "accuracy"}, None)],
    ids=["auto", "accuracy", "accuracy is trained"],
)
def test_an_accuracy_within_its_error_decides_nothing(options, found):
    """Of 150 dev examples, standard error 4.1 points: 10 more are a gain, 3 more with a higher loss are none."""
    best, n = {"accuracy": 0.50, "loss": 0.7}, 150
    rows = [{"accuracy": 0.60, "loss": 0.9}, {"accuracy": 0.53, "loss": 0.8}, {"accuracy": 0.49, "loss": 0.6}]
    assert [beats(row, best, Method(**options), n) for row in rows] == (found or [True, True, False])


def test_a_run_shows_examples_wherever_it_is_looked_at(tiny_config, capsys):
    """In metrics.jsonl, TensorBoard, the page, `mezo report` and `mezo eval`."""
    train(tiny_config)
    run = Path(tiny_config.machine.output_dir)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    scored = [row for row in rows if row["split"] in ("dev", "test")]
    assert all(sum(map(sum, row["confusion"])) == 20 for row in scored)
    last = scored[-1]
    right = sum(counts[i] for i, counts in enumerate(last["confusion"]))
    assert last["accuracy"] == pytest.approx(right / 20)
    assert last["mistakes"][0]["prompt"].endswith("It was")
    assert class_names(last) == ["terrible", "great"]
    assert class_names(last, (" bad", " good")) == ["bad", "good"]
    shown = tables.tables(str(run))
    assert ("is", "answered terrible", "answered great", "of these right") in shown["answers on test"]
    text = page.html([str(run)])
    assert "answered terrible" in text
    assert last["mistakes"][0]["prompt"] in text
    capsys.readouterr()
    assert main(["eval", str(run)]) == 0
    assert "answered terrible" in capsys.readouterr().out
    events = b"".join(path.read_bytes() for path in (run / "tensorboard").iterdir())
    assert b"test/examples" in events
    assert evaluate_target({}, run, examples=True)["test"]["confusion"] == last["confusion"]
    assert "confusion" not in evaluate_target({}, run)["test"]
