"""mezo from Python: rows and functions in place of files, and the run as an object."""

import json
from pathlib import Path

import datasets
import pytest

import mezo
from mezo.data import files
from mezo.errors import UserError
from tests.test_examples import EXAMPLES, load
from tests.tiny_data import GOOD

ROWS = [{"text": f"the film was {word}", "label": int(word in GOOD)} for word in ("bad", "good", "poor", "fine")] * 2


def cheer(example, output):
    return float("good" in output) - float(example["text"] in output)


@pytest.fixture
def options(tiny_options):
    return {
        **{name: value for name, value in tiny_options.items() if not name.endswith("_file")},
        "steps": 4, "batch_size": 4, "eval_every": 2, "noise": False,
    }  # fmt: skip


@pytest.fixture
def run(options):
    return mezo.train(train=ROWS, dev=datasets.Dataset.from_list(ROWS), test=ROWS[:4], **options)


def test_a_run_of_rows_is_that_of_a_file(run, options, tmp_path):
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    test = tmp_path / "test.jsonl"
    test.write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    options["output_dir"] = str(tmp_path / "of-a-file")
    same = mezo.train(train=file, dev=str(file), test=test, **options)
    assert (run.path / "trajectory.jsonl").read_bytes() == (same.path / "trajectory.jsonl").read_bytes()
    assert run.result["test"] == same.result["test"]


def test_what_a_run_offers(run, tmp_path):
    assert len(run.steps) == run.result["steps"] == 4
    assert {row["split"] for row in run.metrics} == {"dev", "test"}
    assert run.config.method.lr == 1e-2
    assert "best step" in repr(run)
    run.replay(tmp_path / "again")
    saved = run.save(tmp_path / "saved")
    for folder in (tmp_path / "again", saved):
        replayed = mezo.scripting.read_adapter(folder)
        assert all(replayed[name].equal(tensor) for name, tensor in run.theta.items())
    assert run.theta.keys() == replayed.keys()
    assert "srcdoc" in run._repr_html_()
    assert (run.path / "report.html").is_file()
    assert mezo.evaluate(run)["test"]["accuracy"] == run.result["test"]["after"]["accuracy"]
    assert mezo.evaluate(run, test=ROWS[:2])["test"]["loss"] != run.result["test"]["after"]["loss"]


def test_another_process_is_given_the_rows_again(options, monkeypatch):
    paused = mezo.train(train=ROWS, until=2, **options)
    assert paused.result is None
    monkeypatch.setattr(files, "_held", {})
    with pytest.raises(UserError, match="go on from Python, mezo"):
        mezo.resume(paused.path)
    with pytest.raises(UserError, match="given to mezo"):
        mezo.resume(paused.path, train=ROWS[:4])
    run = mezo.resume(paused.path, train=ROWS)
    assert run.result["steps"] == 4
    assert paused.resume(steps=6).result["steps"] == 6


def test_a_reward_is_a_function(options, monkeypatch):
    options |= {"label_words": (), "prompt": "{text} It", "max_new_tokens": 3}
    run = mezo.train(train=ROWS, reward=cheer, until=2, **options)
    assert run.config.method.objective == "reward"
    monkeypatch.setattr(files, "_held", {})
    with pytest.raises(UserError, match="given to mezo"):
        mezo.resume(run.path, train=ROWS)
    assert mezo.resume(run.path, train=ROWS, reward=cheer).result["steps"] == 4
    with pytest.raises(UserError, match="has the function cheer"):
        mezo.resume(run.path, train=ROWS, reward=lambda example, output: 0.0, steps=8)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (7, "train must be a path, a list of dicts or a datasets.Dataset, got int"),
        (["a"], "got list"),
        (datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}), "a DatasetDict has one of these"),
        ([], "is empty: give at least one example"),
    ],
    ids=["number", "texts", "splits", "nothing"],
)
def test_other_things_are_refused_by_name(options, rows, message):
    with pytest.raises(UserError, match=message):
        mezo.train(train=rows, **options)
    assert not Path(options["output_dir"]).exists()


def test_a_config_takes_no_options_beside_it(tiny_config):
    with pytest.raises(UserError, match="a Config or options, not both"):
        mezo.train(tiny_config, lr=1.0)


def test_the_quickstart_runs(tiny_model, tmp_path, capsys):
    run = load("quickstart").main(tiny_model, steps=3, output_dir=str(tmp_path / "run"))
    assert capsys.readouterr().out.startswith("accuracy ")
    assert (run.path / "report.html").is_file()


def test_the_notebook_runs(tiny_model, tmp_path, monkeypatch):
    """Its cells as they stand, in order, with fewer steps."""
    monkeypatch.setenv("MODEL", tiny_model)
    monkeypatch.setenv("RUN", str(tmp_path / "run"))
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: None)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    namespace = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]).replace("steps=100", "steps=3"), namespace)
    assert len(namespace["losses"]) == 3
    assert (tmp_path / "run" / "replayed").is_dir()
