"""The sweep: what it estimates, that trials are ordinary runs, that it halves, resumes and refuses."""

import json
import math
import os
import shlex
import shutil
import signal
from pathlib import Path

import optuna
import pytest
import torch

from mezo.api import train
from mezo.cli.main import main
from mezo.config import Config
from mezo.data.rewards import reward_hash
from mezo.errors import RunError, UserError
from mezo.method.estimator import projected_grad
from mezo.method.objectives import cross_entropy
from mezo.method.step import Step
from mezo.models.load import load_tokenizer
from mezo.report.monitor import Monitor
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.studies import tune
from mezo.studies.step_sizes import derivatives, estimate, fourth_differences
from mezo.tasks import load_splits
from mezo.training.instruments import rms
from mezo_kernels import lora_init, standard_normal
from tests.log_by_formula import follows
from tests.tiny_models import LAST_LAYER

GRID = {"grid_lr": (1e-3, 1e-2, 3e-2), "grid_eps": (1e-2,), "rungs": 2, "trial_steps": 16}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory, tiny_model, tiny_data):
    """(directory, config, result) of a finished sweep; tests must copy it before they change it."""
    directory = tmp_path_factory.mktemp("sweeps") / "sweep"
    config = Config.of(
        model=tiny_model, **tiny_data, output_dir=str(directory), prompt="{text} It was",
        label_words=(" terrible", " great"), target_modules=LAST_LAYER["llama"], layers_to_transform=(2,), steps=64,
        batch_size=8,
    )  # fmt: skip
    return directory, config, tune.tune(config, **GRID)


def test_a_trial_goes_on_if_it_is_in_the_better_half_of_those_before_it(sweep):
    directory, _, result = sweep
    first, second = ([row for row in result["rungs"] if row["rung"] == number] for number in (0, 1))
    assert [row["lr"] for row in first] == list(GRID["grid_lr"])
    assert ({row["steps"] for row in first}, {row["steps"] for row in second}) == ({8}, {16})
    losses = [row["dev_loss"] for row in first]
    goes_on = [loss <= sorted(losses[: i + 1])[max((i + 1) // 2 - 1, 0)] for i, loss in enumerate(losses)]
    assert [row["trial"] for row in second] == [row["trial"] for row, on in zip(first, goes_on, strict=True) if on]
    assert 1 <= len(second) < len(first) == 3
    assert result["best"] == min(second, key=lambda row: row["dev_loss"])
    assert json.loads((directory / "result.json").read_text()) == result


def test_a_trial_is_the_run_that_mezo_train_makes(sweep, tmp_path):
    """Paused at a rung and resumed, beside other trials in one process: the same log as alone and in one piece."""
    directory, _, result = sweep
    trial = directory / result["best"]["trial"]
    saved = Config.of(**json.loads((trial / "config.json").read_text()))
    assert (saved.method.lr, saved.method.steps, saved.method.eval_every, saved.method.eval_test) == (
        result["best"]["lr"],
        16,
        8,
        False,
    )
    train(saved.replace(output_dir=str(tmp_path / "alone")))
    assert (trial / "trajectory.jsonl").read_bytes() == (tmp_path / "alone" / "trajectory.jsonl").read_bytes()
    assert follows(trial) == 16
    alone, own = (json.loads((run / "result.json").read_text()) for run in (tmp_path / "alone", trial))
    assert [own[key] for key in ("dev", "tokens_scored", "best_step")] == [
        alone[key] for key in ("dev", "tokens_scored", "best_step")
    ]
    assert main(["train", "--resume", str(trial)]) == 0
    names = (row["trial"] for row in result["rungs"])
    dropped = next(name for name in names if not (directory / name / "result.json").exists())
    shutil.copytree(directory / dropped, tmp_path / "dropped")
    assert main(["train", "--resume", str(tmp_path / "dropped")]) == 0
    assert follows(tmp_path / "dropped") == 16


def test_the_command_is_the_run_that_was_tuned_for(sweep, tmp_path):
    _, config, result = sweep
    words = shlex.split(result["command"].replace("--output-dir RUN", f"--output-dir {tmp_path / 'run'}"))
    assert words[:2] == ["mezo", "train"]
    assert main([*words[1:], "--steps", "2"]) == 0
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    best = {"lr": result["best"]["lr"], "eps": result["best"]["eps"]}
    wanted = config.replace(**best, steps=2, objective="cross_entropy", generate="off", output_dir=saved["output_dir"])
    assert Config.of(**saved) == wanted.absolute()


def as_killed(directory, target, share):
    """A copy of a finished sweep as a kill would have left it after a share of its journal, in the middle of a line."""
    shutil.copytree(directory, target)
    (target / "result.json").unlink()
    lines = (target / tune.STUDY).read_text().splitlines(keepends=True)
    number = int(share * len(lines))
    (target / tune.STUDY).write_text("".join(lines[:number]) + lines[number][:20])


@pytest.mark.parametrize("share", [0.35, 0.6, 0.99])
@pytest.mark.parametrize("lost", [False, True])
def test_a_sweep_resumes_to_the_same_result(sweep, tmp_path, share, lost):
    """What the journal lost is made again: the runs are there, at the rung's end or past it, or not at all."""
    directory, _, result = sweep
    as_killed(directory, tmp_path / "copy", share)
    for row in result["rungs"] if lost else ():
        shutil.rmtree(tmp_path / "copy" / row["trial"], ignore_errors=True)
    assert tune.resume(str(tmp_path / "copy")) == result
    assert tune.resume(str(tmp_path / "copy")) == result


def test_a_sought_sweep_resumes_with_the_same_proposals(sweep, tmp_path, monkeypatch):
    """Stopped in its third trial, a sweep without a grid of lr goes on as one that was never stopped."""
    config = sweep[1]
    options = {"grid_eps": (1e-2,), "rungs": 2, "trial_steps": 4, "num_trials": 6}
    whole = tune.tune(config.replace(output_dir=str(tmp_path / "whole")), **options)
    first = [row for row in whole["rungs"] if row["rung"] == 0]
    assert len({row["lr"] for row in first}) > 4
    assert first[0]["lr"] == pytest.approx(whole["estimate"]["lr"])
    assert all(whole["estimate"]["lr"] / 10.1 <= row["lr"] <= whole["estimate"]["lr"] * 10.1 for row in first)

    def die(*args):
        raise RunError("the engine died")

    with monkeypatch.context() as patch:
        runs = iter([tune._run] * 3 + [die])
        patch.setattr(tune, "_run", lambda *args: next(runs)(*args))
        with pytest.raises(RunError, match="the engine died"):
            tune.tune(config.replace(output_dir=str(tmp_path / "stopped")), **options)
    assert tune.resume(str(tmp_path / "stopped"))["rungs"] == whole["rungs"]


def test_a_sweep_resumes_from_any_directory(sweep, tmp_path, monkeypatch):
    _, config, result = sweep
    paths = {name: os.path.relpath(config.to_dict()[name]) for name in ("model", "train_file", "dev_file", "test_file")}
    here, config = Path.cwd(), config.replace(output_dir=str(tmp_path / "sweep"), **paths)
    tune.tune(config, **GRID)
    as_killed(tmp_path / "sweep", tmp_path / "copy", 0.5)
    for row in result["rungs"]:
        shutil.rmtree(tmp_path / "copy" / row["trial"], ignore_errors=True)
    monkeypatch.chdir(tmp_path)
    assert Path.cwd() != here
    assert tune.resume("copy")["rungs"] == result["rungs"]


def test_an_engine_that_dies_is_no_failed_trial(sweep, tmp_path, monkeypatch):
    """Its trials are not to be dropped for good: the sweep ends, and resumes."""
    _, config, result = sweep
    config = config.replace(output_dir=str(tmp_path / "sweep"))

    def die(*args):
        raise RunError("the engine died")

    with monkeypatch.context() as patch:
        patch.setattr(HFRuntime, "score_pairs", die)
        with pytest.raises(RunError, match="the engine died"):
            tune.tune(config, **GRID)
    assert tune.resume(config.machine.output_dir)["rungs"] == result["rungs"]


def test_ctrl_c_ends_the_sweep_and_it_resumes(sweep, tmp_path, monkeypatch, capsys):
    _, config, result = sweep
    shown, presses = Monitor.step, iter([False] * 10 + [True] + [False] * 1000)

    def press(self, record, rate):
        shown(self, record, rate)
        if next(presses):
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Monitor, "step", press)
    stopped = config.replace(output_dir=str(tmp_path / "stopped"))
    assert tune.tune(stopped, **GRID) is None
    assert "continue with: mezo tune --resume" in capsys.readouterr().err
    assert main(["tune", "--resume", str(tmp_path / "stopped")]) == 0
    again = json.loads((tmp_path / "stopped" / "result.json").read_text())
    assert again["rungs"] == result["rungs"]
    assert again["command"] == result["command"]


def test_a_trial_that_fails_is_dropped(sweep, tmp_path):
    _, config, _ = sweep
    config = config.replace(output_dir=str(tmp_path / "sweep"))
    result = tune.tune(config, grid_lr=(1e37, 1e-2), grid_eps=(1e-2,), rungs=1, trial_steps=16)
    failed, done = result["rungs"]
    assert (failed["lr"], done["lr"]) == (1e37, 1e-2)
    assert "not finite in 10 steps in a row" in failed["failed"]
    assert failed["dev_loss"] is None
    assert result["best"] == done


def test_order():
    cases = (("a", 8, 0.1, 0.9, None), ("a", 16, None, None, "it broke"), ("b", 8, 0.2, 0.4, None))
    cases += (("c", 16, 0.5, 0.6, None), ("d", 16, 0.5, 0.7, None))
    rows = [dict(zip(("trial", "steps", "dev_loss", "dev_accuracy", "failed"), case, strict=True)) for case in cases]
    assert [row["trial"] for row in tune.order(rows)] == ["d", "c", "b", "a", "a"]
    text = [
        {"trial": str(f1), "steps": 8, "dev_f1": f1, "dev_accuracy": None, "failed": None} for f1 in (None, 0.1, 0.3)
    ]
    assert (
        tune.order(text, *tune.compared_by(Config.of(model="m", output_dir="o", task="squad", generate="on")))
        == text[::-1]
    )
    assert tune.compared_by(Config.of(model="m", output_dir="o", task="sst2")) == (-1, "loss")


MISTAKES = {
    "no dev set": ({"dev_file": ""}, {}, "compares trials by dev loss: give --dev-file"),
    "accuracy": ({"objective": "accuracy"}, {"grid_lr": (1.0,)}, "no slope to estimate: give --grid-lr and --grid-eps"),
    "no rungs": ({}, {"rungs": 0}, "--rungs must be at least 1, got 0"),
    "too short": ({}, {"rungs": 4, "trial_steps": 7}, "--trial-steps 7 is too short for 4 rungs: give at least 8"),
    "rule": ({"update_rule": "adam"}, {"grid_eps": (1e-2,)}, "lr is estimated for steps of plain SGD: give --grid-lr"),
    "trials": ({}, {"num_trials": -1}, "--num-trials must be 0 or more, got -1"),
    "negative lr": ({}, {"grid_lr": (1e-3, -1.0)}, "--lr must be a float32 number above 0, got -1.0"),
    "eps nan": ({}, {"grid_eps": (float("nan"),)}, "--eps must be a float32 number above 0, got nan"),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
def test_mistakes(tiny_config, mistake):
    options, own, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        tune.tune(tiny_config.replace(**options), **own)
    assert not Path(tiny_config.machine.output_dir).exists()


def test_command_line(tiny_options, as_flags, tmp_path, capsys):
    options = {k: v for k, v in tiny_options.items() if k not in ("lr", "eps")} | {
        "rungs": 1,
        "trial_steps": 4,
        "num_trials": 4,
    }
    assert main(["tune", *as_flags(options)]) == 0
    out = capsys.readouterr().out
    assert "estimated at the start: eps" in out
    assert out.splitlines()[-1].startswith("mezo train --train-file")
    result = json.loads((Path(options["output_dir"]) / "result.json").read_text())
    assert len(result["rungs"]) == 4
    assert len({row["lr"] for row in result["rungs"]}) == 4
    assert main(["tune", *as_flags(options)]) == 2
    assert "exists and is never overwritten" in capsys.readouterr().err
    assert main(["tune", "--resume", str(tmp_path), "--rungs", "2"]) == 2
    assert "takes no other option, got --rungs" in capsys.readouterr().err
    assert main(["tune", "--resume", str(tmp_path)]) == 2
    assert "not a sweep of mezo tune" in capsys.readouterr().err


def test_an_adapter_names_the_model_of_a_sweep(sweep, monkeypatch, tmp_path):
    directory, config, result = sweep
    adapter, seen = directory / result["best"]["trial"] / "adapter", []
    monkeypatch.setattr(tune, "tune", lambda config, **options: seen.append(config))
    rest = ["--train-file", config.data.train_file, "--output-dir", str(tmp_path / "sweep")]
    assert main(["tune", "--adapter", str(adapter), *rest]) == 130
    assert seen[0].model.base == config.model.base


def test_a_sweep_runs_a_reward_only_where_the_user_says_so(sweep, tmp_path, capsys):
    """As `mezo train --resume` does; a file that is imported leaves a mark."""
    reward, mark, directory = tmp_path / "theirs.py", tmp_path / "mark", tmp_path / "sweep"
    reward.write_text(f"open({str(mark)!r}, 'w')\ndef score(example, output):\n    return 1\n")
    options = {"objective": "reward", "reward": f"{reward}:score", "output_dir": str(directory)}
    plan = {
        "config": sweep[1].replace(**options).to_dict(),
        "rungs": [4],
        "reward_hash": reward_hash(options["reward"]),
    }
    directory.mkdir()
    study = optuna.create_study(storage=tune._journal(directory), study_name="mezo")
    study.set_user_attr("plan", plan)
    assert main(["tune", "--resume", str(directory)]) == 2
    assert "is Python code that this would run" in capsys.readouterr().err
    reward.write_text(reward.read_text().replace("1", "2"))
    assert main(["tune", "--resume", str(directory), "--trust-reward"]) == 2
    assert "was made with another file" in capsys.readouterr().err
    assert not mark.exists()


def test_noise_is_found_in_fourth_differences():
    """Of a smooth line with normal noise: sigma, whatever the line."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for k in range(500):
        line = 3 + k * torch.linspace(-1, 1, 7).double() * 1e-3
        found += fourth_differences((line + 1e-5 * torch.randn(7, generator=generator, dtype=torch.float64)).tolist())
    assert rms(found) / math.sqrt(70) == pytest.approx(1e-5, rel=0.1)


def test_derivatives_along_z_are_those_of_autograd():
    """Of a smooth function in float64: a model of transformers takes its softmax in float32."""
    inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    start = {
        name: lora_init(5, name, shape).double() for name, shape in {"1.lora_A": (8, 6), "2.lora_A": (2, 8)}.items()
    }
    z = {name: standard_normal(7, name, 0, p.numel()).double().view_as(p) for name, p in start.items()}

    def loss(distance):
        first, second = (start[name] + distance * z[name] for name in start)
        scores = torch.tanh(inputs @ first.T) @ second.T
        return cross_entropy(scores.log_softmax(-1), torch.tensor([0, 1, 1, 0]))

    distance = torch.zeros((), dtype=torch.float64, requires_grad=True)
    expected, value = [], loss(distance)
    for _ in range(3):
        (value,) = torch.autograd.grad(value, distance, create_graph=True)
        expected.append(value.item())
    line = [loss(i * 1e-3).item() for i in (-2, -1, 0, 1, 2)]
    assert min(map(abs, expected)) > 0.05, "no derivative is nearly zero"
    assert derivatives(line, 1e-3)[1:] == pytest.approx(expected, rel=1e-3)


@pytest.fixture
def at_start(tiny_config):
    """(config, runtime, examples, labels) of a run whose adapter has a B, so that every derivative is there."""
    config = tiny_config.replace(batch_size=48, objective="cross_entropy")
    runtime, splits = HFRuntime(*config.for_runtime), load_splits(config, load_tokenizer(config.model.base))
    runtime.prepare(splits)
    runtime.load({name: 0.3 * lora_init(3, name, shape) for name, shape in runtime.spec.shapes.items()})
    return config, runtime, splits["train"], torch.tensor([example.label for example in splits["train"]])


def test_the_slope_is_the_norm_of_the_gradient(at_start):
    config, runtime, examples, labels = at_start
    found = estimate(config, runtime, examples)
    gradient = runtime.gradient("train", range(48), lambda scores: cross_entropy(scores, labels))
    norm = math.sqrt(sum(part.square().sum().item() for part in gradient.values()))
    # 16 squares of normals: a relative standard error of sqrt(2 / 16) / 2 on the root
    assert found.slope == pytest.approx(norm, rel=4 * math.sqrt(2 / 16) / 2)
    assert 1e-9 < found.loss_noise < 1e-6
    assert 0.1 <= found.signal <= 1


def test_the_estimated_eps_is_near_the_best(at_start):
    """Against autograd: ten times smaller is worse for noise, ten times larger for bias."""
    config, runtime, examples, labels = at_start
    eps = estimate(config, runtime, examples).eps
    gradient = runtime.gradient("train", range(48), lambda scores: cross_entropy(scores, labels))

    def error(eps):
        off = []
        for seed in range(24):
            runtime.perturb(Step([seed], eps))
            losses = [cross_entropy(scores, labels).item() for scores in runtime.score_pairs("train", range(48))[0]]
            slope = sum((standard_normal(seed, n, 0, g.numel()) @ g.flatten()).item() for n, g in gradient.items())
            off.append(projected_grad(*losses, eps) - slope)
        return rms(off)

    assert error(eps) < 0.5 * min(error(eps / 10), error(10 * eps))
