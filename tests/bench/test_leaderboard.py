"""`make leaderboard` on a tiny model: its numbers are those of the runs, and what is there is not made again."""

import json
from dataclasses import replace

import leaderboard
import pytest
from leaderboard_text import reached

from mezo.config import Config
from mezo.run import logbook
from mezo.run.directory import RunDirectory
from mezo.runtimes.hf.trunk import Trunk
from mezo.studies import demo
from tests.tiny_data import write_jsonl
from tests.tiny_models import save

ROWS = {n: replace(leaderboard.ROWS[n], lrs=(4e-3,)) for n in ("adamw", "mezo", "directions-8")}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Runs the command with options for rows of the table on a tiny model; (JSON, LEADERBOARD.md) afterwards."""
    files = {f"{s}_file": write_jsonl(tmp_path / f"{s}.jsonl", 16, i) for i, s in enumerate(("train", "dev", "test"))}
    config = Config.of(
        model=save("llama", tmp_path / "llama"), output_dir="unused", prompt="{text} It was", batch_size=32, steps=1,
        label_words=(" terrible", " great"), objective="cross_entropy", layers_to_transform=(2,), **files,
    )  # fmt: skip
    monkeypatch.setattr(demo, "demo_config", lambda prompt, steps, output_dir: config)
    monkeypatch.setattr(Trunk, "_capture", Trunk._capture)  # which the command replaces
    monkeypatch.setattr(leaderboard, "ROWS", ROWS)
    monkeypatch.setattr(leaderboard, "GROWTH", 0)
    monkeypatch.setattr(leaderboard, "BUDGETS", (128,))

    def run(*options):
        json_file, table = tmp_path / "out.json", tmp_path / "table.md"
        files = ["--runs", str(tmp_path / "runs"), "--output", str(json_file), "--markdown", str(table)]
        leaderboard.main([*files, "--seeds", "2", *options])
        return json.loads(json_file.read_text())["cells"], table.read_text()

    return run


def test_a_table_is_made_in_parts_of_what_its_runs_measured(make, tmp_path):
    cells, table = make("--budgets", "128", "--rows", "adamw", "mezo")
    for name, steps in {"adamw": 4, "mezo": 2}.items():
        cell = cells[name]["128"]
        assert (cell["steps"], cell["rows"], len(cell["auc"]["of"])) == (steps, 128, 2)
        assert cell["dev_loss_by_lr"][repr(cell["lr"])] == min(cell["dev_loss_by_lr"].values())
    adamw, mezo = (cells[name]["128"] for name in ("adamw", "mezo"))
    made = json.loads((tmp_path / f"runs/adamw/128/seed-1-lr-{adamw['lr']:g}/made.json").read_text())
    assert min(line["loss"] for line in made["dev"]) < 0.995 * made["dev"][0]["loss"]
    runs = [tmp_path / f"runs/mezo/128/seed-{seed}-lr-{mezo['lr']:g}" for seed in (1, 2)]
    assert mezo["loss"]["of"] == [RunDirectory(run).read_result()["test"]["after"]["loss"] for run in runs]
    assert [logbook.verify(str(run)) for run in runs] == [2, 2]
    assert table.index("| zero-shot | 0 | 0 |") > table.index("## 128 scored rows")
    assert f"Not made yet: {ROWS['directions-8'].title}." in table
    assert ROWS["adamw"].title in (tmp_path / "out.svg").read_text()

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("result.json")}
    again, _ = make("--budgets", "128", "256", "--rows", "mezo")
    assert (again["mezo"]["128"], again["adamw"]["128"]) == (mezo, adamw)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert {mezo["lr"] / 2, mezo["lr"]} <= set(map(float, again["mezo"]["256"]["dev_loss_by_lr"]))


def test_a_further_task_has_a_file_of_its_own_and_a_part_of_the_table(make, tmp_path, monkeypatch):
    def written(output_dir, kind):
        asked.append(kind)
        return {split: write_jsonl(tmp_path / f"{kind}-{split}.jsonl", 16, 5) for split in ("train", "dev", "test")}

    asked = []
    monkeypatch.setattr(leaderboard.assets, "write_demo_data", written)
    words = replace(leaderboard.TASKS["tweet"], label_words=(" terrible", " great"))  # which the tiny tokenizer knows
    monkeypatch.setitem(leaderboard.TASKS, "tweet", words)
    monkeypatch.setattr(leaderboard, "FEWER", ("directions-8", "mezo"))
    make("--rows", "mezo")
    assert not asked
    films, table = make("--task", "tweet", "--budgets", "64", "128")
    tweets = json.loads((tmp_path / "out-tweet.json").read_text())["cells"]
    assert list(films) == ["mezo"]
    assert set(asked) == {"tweet"}
    assert {name: list(own) for name, own in tweets.items()} == {n: ["64", "128"] for n in ("directions-8", "mezo")}
    run = RunDirectory(tmp_path / f"runs/tweet/mezo/128/seed-1-lr-{tweets['mezo']['128']['lr']:g}")
    assert run.read_config().data.prompt == leaderboard.TASKS["tweet"].prompt
    part = table[table.index("## Tweets: 64 and 128 scored rows") : table.index("## 128 scored rows")]
    accuracy = 100 * tweets["mezo"]["64"]["accuracy"]["mean"]
    assert f"| {ROWS['mezo'].title} | 2 | {accuracy:.1f} (" in part
    assert (tmp_path / "out-tweet.svg").exists()


def test_the_first_budget_that_reaches_the_demo_is_named(make):
    def found(auc):
        return {"title": "a row", "dev_auc": {"mean": auc}, "rows": 10, "steps": 5, "seconds": {"mean": 2.0}}

    cells = {"mezo": {"100": found(0.8), "200": found(0.92), "400": found(0.95)}, "adamw": {"100": found(0.9)}}
    assert list(reached(cells)) == ["mezo"]
    assert reached(cells)["mezo"] == cells["mezo"]["200"]
