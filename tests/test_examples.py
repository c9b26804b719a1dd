"""The examples run, and do what they say."""

import difflib
import importlib.util
import inspect
import json
from pathlib import Path

import pytest
import torch

from mezo import tasks
from mezo.cli.main import main
from tests.tiny_models import save

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def dropin():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is tiny: waking a second thread costs more than it computes
    yield load("dropin_original_loop")
    torch.set_num_threads(threads)


def body(function):
    return inspect.getsource(function).splitlines()[2:]


def test_at_most_five_lines_change(dropin):
    changes = list(difflib.ndiff(body(dropin.plain), body(dropin.fused)))
    assert sum(line.startswith("- ") for line in changes) <= 5
    assert sum(line.startswith("+ ") for line in changes) <= 5


@pytest.mark.parametrize("loop", ["plain", "fused"])
def test_both_loops_learn(dropin, loop):
    model = dropin.make_model(torch.float32)
    before = dropin.loss_of(model)
    getattr(dropin, loop)(model, dropin.loss_of, steps=300, lr=2e-2, eps=1e-3)
    assert dropin.loss_of(model) < 0.7 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_the_plain_loop_drifts(dropin, dtype):
    assert dropin.drift(dropin.plain, dtype, steps=50) > 0
    assert dropin.drift(dropin.fused, dtype, steps=50) == 0


def test_main_prints_both(dropin, capsys):
    dropin.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("plain: loss")
    assert lines[1].endswith("torch.float32 0.0e+00, torch.bfloat16 0.0e+00")


def test_a_plain_loop_learns():
    assert load("plain_loop").main() > 0.9


def test_lightning_learns(tmp_path):
    """Where Lightning is installed."""
    pytest.importorskip("lightning")
    assert load("lightning_module").main(output_dir=str(tmp_path)) > 0.9


def test_a_reward_of_your_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    example = load("reward")
    tasks.register(example.REPLIES)
    fields = {"message": "the film was poor"}
    assert [example.cheer(fields, text) for text in ("", "great", "a great film", "poor film")] == [0, 1, 0, -1]
    run, reward = tmp_path / "run", f"{EXAMPLES / 'reward.py'}:cheer"
    options = ["--task", "replies", "--objective", "reward", "--reward", reward, "--max-new-tokens", "6"]
    size = ["--output-dir", str(run), "--steps", "4", "--batch-size", "4"]
    assert main(["train", "--model", save("llama", tmp_path / "model"), *options, *size]) == 0
    result = json.loads((run / "result.json").read_text())
    assert all(row["reward"] is not None for row in result["dev"])
    assert result["test"]["after"]["accuracy"] is None
    assert main(["train", "--resume", str(run)]) == 0


@pytest.mark.parametrize("family", ["llama", "roberta"])
def test_a_task_of_your_own(family, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "TASKS", dict(tasks.TASKS))
    tasks.register(load("own_task").WEATHER)
    assert main(["tasks"]) == 0
    assert "    fills a mask \"{report} The weather is<mask>.\"  ' terrible' ' great'\n" in capsys.readouterr().out
    run = tmp_path / "run"
    options = ["--task", "weather", "--output-dir", str(run), "--steps", "4", "--batch-size", "4"]
    assert main(["train", "--model", save(family, tmp_path / "model"), *options]) == 0
    result = json.loads((run / "result.json").read_text())
    assert [row["step"] for row in result["dev"]] == [0, 1, 2, 3, 4]
    assert result["test"]["after"]["accuracy"] is not None
    assert main(["train", "--resume", str(run)]) == 0


def test_countdown_can_be_solved_and_its_reward_takes_any_text(tmp_path):
    example = load("countdown")
    options = example.write(tmp_path, seed=1, sizes={"train": 30, "dev": 10}, numbers=(2, 3))
    rows = [json.loads(line) for path in options.values() for line in Path(path).read_text().splitlines()]
    assert len(rows) == 40
    assert len({(*sorted(row["numbers"]), row["target"]) for row in rows}) == 40, "no puzzle is in two splits"
    for row in rows:
        found = example.answers(row["numbers"], row["target"])
        assert found
        assert {example.solved(row, text) for text in found} == {1.0}
        assert row["prompt"].endswith(f"Target: {row['target']}. Answer:")
    puzzle = {"numbers": [9, 9], "target": 18}
    assert [example.solved(puzzle, text) for text in ("9 + 9", " (9+9)", "9 * 9", "9 + 9 + 0", "18", "9 9", "")] == [
        1.0, 1.0, example.PARTIAL, 0.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip
    for text in ("__import__('os')", "9 ** 9 ** 9", "9 / 9", "(" * 500, "True + 9", "9 + 9\0", "9 + -9", "9.0 + 9"):
        assert example.solved(puzzle, text) == 0.0
