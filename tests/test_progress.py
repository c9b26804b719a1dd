"""What begins is said at once, and a line a minute says how far it is, where there is no terminal."""

import re
import time
from pathlib import Path

import pytest
from rich.table import Table

from mezo import progress
from mezo.cli.main import main
from mezo.report import monitor, tables
from mezo.run.trajectory import read_trajectory


def test_a_long_loop_says_how_far_it_is(caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.1)
    with caplog.at_level("INFO", "mezo"):
        for _ in progress.told(range(20), "filling", first=0.05):
            time.sleep(0.02)
    assert 2 <= len(caplog.messages) <= 5
    assert all(re.fullmatch(r"filling: \d+ of 20, about 1 s left", text) for text in caplog.messages)


def test_what_takes_long_by_itself_says_that_it_lasts(caplog, monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    with caplog.at_level("INFO", "mezo"), progress.waiting("starting the engine"):
        time.sleep(0.18)
    first, *rest = caplog.messages
    assert first == "starting the engine"
    assert 1 <= len(rest) <= 3
    assert set(rest) == {"starting the engine: still, after 1 s"}
    time.sleep(0.12)
    assert len(caplog.messages) == 1 + len(rest), "it is silent once it has ended"


def test_what_is_no_terminal_cuts_no_table(capsys):
    words = "a sentence of more than eighty columns, which a terminal would break and a file should hold as it is " * 2
    progress.console().print(Table(words))
    assert words.strip() in capsys.readouterr().out


def test_what_begins_is_said_before_it_is_done_and_no_line_is_wrapped(tiny_options, as_flags, capfd):
    """Standard error is no terminal here. Each line is one: paths and texts are longer than 80 columns."""
    assert main(["train", *as_flags(tiny_options)]) == 0
    out, error = capfd.readouterr()
    begins = ["loading the data and", "proving that", "filling the trunk cache: 48 rows of train"]
    assert all(error.count(text) == 1 for text in begins)
    places = [error.index(text) for text in [*begins, "step      0  test"]]
    assert places == sorted(places)
    assert re.search(r"^1,792 LoRA parameters, .* cache on cpu .*\)$", error, re.MULTILINE)
    assert len(error.split("LoRA parameters")[1].splitlines()[0]) > 80
    assert "in all" in out


def test_a_line_a_minute_tells_of_steps(tiny_options, as_flags, monkeypatch, capfd):
    monkeypatch.setattr(monitor, "EVERY", 0.0)
    assert main(["train", *as_flags({**tiny_options, "steps": 3})]) == 0
    assert re.search(r"step +2  of 3  loss \d.*steps/s, about 1 s left", capfd.readouterr().err)


def test_nothing_of_it_goes_to_scripts(tiny_config, capfd):
    from mezo.api import train

    result = train(tiny_config)
    assert "loading" not in capfd.readouterr().err
    records = read_trajectory(Path(tiny_config.machine.output_dir) / "trajectory.jsonl")[1]
    assert len(records) == result["steps"]
    rows = tables.time_spent(result)
    assert [row[0] for row in rows] == ["loading", "proof", "compilation", "cache", "evaluation", "steps", "in all"]
    seconds = [float(row[1].removesuffix(" s")) for row in rows]
    assert seconds[-1] == pytest.approx(sum(seconds[:-1]), abs=0.5)
    assert all("tokens/s" in row[3] for row in rows[3:6])
    old = {name: value for name, value in result.items() if name not in ("seconds_proof", "tokens_cache_filled")}
    assert [row[0] for row in tables.time_spent(old)] == [row[0] for row in rows if row[0] != "proof"]
