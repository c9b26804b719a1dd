"""Whole runs on a tiny model: what they write, that they resume and replay to the bit, and how they stop."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mezo import api
from mezo.api import replay, resume, train
from mezo.config import Config
from mezo.errors import RunError, UserError
from mezo.method.batches import Batches
from mezo.method.objectives import OBJECTIVES, cross_entropy, evaluate
from mezo.report.monitor import Monitor
from mezo.run.adapter import WEIGHTS
from mezo.run.directory import RunDirectory
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from mezo.runtimes.hf.runtime import HFRuntime
from tests.tiny_models import LAST_LAYER, build


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_data):
    """A finished run; tests must copy it before they change it."""
    run = tmp_path_factory.mktemp("runs") / "run"
    config = Config.of(
        model=tiny_model, **tiny_data, output_dir=str(run), prompt="{text} It was", label_words=(" terrible", " great"),
        target_modules=("q_proj", "o_proj", "up_proj"), layers_to_transform=(2,), steps=40, batch_size=8,
        lr=1e-2, eps=1e-2, eval_every=10, weight_decay=0.1, num_perturbations=2, eval_train=True,
    )  # fmt: skip
    return run, config, train(config)


def adapter(run):
    return load_file(Path(run) / "adapter" / WEIGHTS)


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.int32), b[k].view(torch.int32)) for k in a)


def test_run_directory(finished):
    run, config, result = finished
    first, records = read_trajectory(run / "trajectory.jsonl")
    assert first["run_seed"] == 0
    assert len(first["model_hash"]) == 64
    assert [record.step for record in records] == list(range(40))
    assert {len(record.update.seeds) for record in records} == {2}
    assert {record.update.decay for record in records} == {1 - 1e-2 * 0.1}
    for record in records:
        pairs = zip(record.losses.plus, record.losses.minus, strict=True)
        assert record.projected_grads == tuple((plus - minus) / (2 * config.method.eps) for plus, minus in pairs)
        assert record.update.coefficients == tuple(config.method.lr * g / 2 for g in record.projected_grads)
    assert json.loads((run / "result.json").read_text()) == result
    assert [row["step"] for row in result["dev"]] == [0, 10, 20, 30, 40]
    best, *others = result["dev"]
    for row in others:  # 20 examples of dev
        accuracy = max(row["accuracy"], best["accuracy"])
        error, gain = math.sqrt(accuracy * (1 - accuracy) / 20), row["accuracy"] - best["accuracy"]
        if gain > error or (abs(gain) <= error and row["loss"] < best["loss"]):
            best = row
    assert result["best_step"] == best["step"]
    assert set(result["test"]["after"]) == {"accuracy", "loss", "f1", "auc"}
    assert result["train"]["before"]["loss"] > 0
    assert result["tokens_scored"] == round(result["tokens_computed"] + result["tokens_reused"])
    assert (run / "report.html").read_text().count("<figure>") == 3
    assert any((run / "tensorboard").iterdir())


def test_adapter_is_the_best_checkpoint_and_loads_in_peft(finished, tiny_model):
    run, config, result = finished
    peft = PeftModel.from_pretrained(build("llama"), str(run / "adapter")).eval()
    scored = api.evaluate(config, run / "adapter")
    for split in ("train", "test"):
        assert scored[split] == pytest.approx(result[split]["after"], abs=1e-6)
    names = {name for name, _ in peft.named_parameters() if "lora_" in name}
    assert len(names) == len(adapter(run)) == 6


@pytest.mark.parametrize("backend", [None, "reference", "numba"])
def test_replay_gives_the_adapter_bit_for_bit(finished, backend, tmp_path):
    run, _, result = finished
    steps = replay(str(run), str(tmp_path / "replayed"), backend=backend)
    assert steps == result["best_step"]
    assert same_bits(adapter(run), load_file(tmp_path / "replayed" / WEIGHTS))


def test_replay_needs_the_logs_alone(finished, tmp_path):
    run, _, _ = finished
    (tmp_path / "log").mkdir()
    for name in ("trajectory.jsonl", "metrics.jsonl"):
        shutil.copy(run / name, tmp_path / "log" / name)
    theta, _, _ = rebuild(tmp_path / "log")
    assert same_bits(theta, adapter(run))
    zero, _, steps = rebuild(tmp_path / "log", until="0")
    assert steps == 0
    assert all(torch.count_nonzero(t) == 0 for name, t in zero.items() if "lora_B" in name)
    with pytest.raises(UserError, match="--until must be best, last or a number of steps from 0 to 40, got 41"):
        rebuild(tmp_path / "log", until="41")


def interrupted_copy(run, target, steps, torn=b""):
    """A copy of a finished run as a crash after `steps` records would have left it."""
    shutil.copytree(run, target)
    for name in ("result.json", "adapter", "report.html"):
        path = target / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    lines = (target / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    (target / "trajectory.jsonl").write_bytes(b"".join(lines[: steps + 1]) + torn)
    rows = (target / "metrics.jsonl").read_text().splitlines()
    tests = [i for i, row in enumerate(rows) if json.loads(row)["split"] == "test"]
    # the second score of the test set ends a run
    rows = [row for row in rows[: tests[1]] if json.loads(row)["step"] < steps]
    (target / "metrics.jsonl").write_text("".join(row + "\n" for row in rows))
    if rows and any(json.loads(row).get("is_best") for row in rows):
        best = max(json.loads(row)["step"] for row in rows if json.loads(row).get("is_best"))
        replay(str(run), str(target / "adapter"), until=str(best))


@pytest.mark.parametrize(("steps", "torn"), [(0, b""), (1, b'{"step": 1, "se'), (10, b""), (27, b"{"), (40, b"")])
def test_resume_is_exact(finished, tmp_path, steps, torn):
    run, _, result = finished
    copy = tmp_path / "copy"
    interrupted_copy(run, copy, steps, torn)
    again = resume(str(copy))
    assert (copy / "trajectory.jsonl").read_bytes() == (run / "trajectory.jsonl").read_bytes()
    assert same_bits(adapter(copy), adapter(run))
    assert again["test"] == result["test"]
    assert again["best_step"] == result["best_step"]


CONFIGURATIONS = {
    "layer trunk": {"layers_to_transform": (1, 2)},
    "no trunk": {"layers_to_transform": (), "trunk_cache": "off"},
    "evicting": {"trunk_cache_bytes": 4000},
    "bfloat16": {"dtype": "bfloat16"},
    "lm_cross_entropy": {"objective": "lm_cross_entropy"},
    "accuracy": {"objective": "accuracy"},
    "schedule and clipping": {"lr_schedule": "cosine", "warmup_steps": 3, "clip": 0.2, "weight_decay": 0.1},
    "no dev set": {"dev_file": ""},
    "micro-batches": {"micro_batch_size": 3},
}


@pytest.mark.parametrize("name", list(CONFIGURATIONS))
def test_resume_is_exact_in_every_configuration(tiny_config, tmp_path, name):
    config = tiny_config.replace(steps=20, **CONFIGURATIONS[name])
    train(config)
    run, copy = Path(config.machine.output_dir), tmp_path / "copy"
    interrupted_copy(run, copy, 13)
    result = resume(str(copy))
    assert (copy / "trajectory.jsonl").read_bytes() == (run / "trajectory.jsonl").read_bytes()
    assert same_bits(adapter(copy), adapter(run))
    assert result["best_step"] == json.loads((run / "result.json").read_text())["best_step"]
    # 10 steps until the clock was last written, with the noise if there is no dev set, and 7 after the crash at 13
    assert result["steps_counted"] == 17


def test_lm_cross_entropy_keeps_the_lowest_dev_loss(tiny_config, tmp_path):
    """With one option there is no accuracy: the loss of the option's tokens must decide."""
    files = {}
    for split in ("train", "dev"):
        rows = [{"prompt": f"the {word} was", "options": [" good"], "answer": 0} for word in ("film", "plot", "story")]
        files[f"{split}_file"] = str(tmp_path / f"{split}.jsonl")
        Path(files[f"{split}_file"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
    plain = {"prompt": "", "label_words": (), "test_file": "", "objective": "lm_cross_entropy", "batch_size": 3}
    result = train(tiny_config.replace(**files, **plain))
    losses = {row["step"]: row["loss"] for row in result["dev"]}
    assert losses[result["best_step"]] == min(losses.values()) < losses[0]


def test_a_nan_evaluation_is_never_the_best(tiny_config, monkeypatch):
    calls = iter(range(100))

    def broken(scores, labels, objective):
        values = evaluate(scores, labels, objective)
        # call 0 scores the test set, call 1 dev at step 0
        return {**values, "accuracy": None, "loss": None} if next(calls) == 1 else values

    monkeypatch.setattr("mezo.training.evaluation.evaluate", broken)
    result = train(tiny_config)
    assert result["dev"][0]["accuracy"] is None
    assert result["best_step"] > 0


def test_resume_refuses_other_data(finished, tiny_config, tmp_path):
    run, config, _ = finished
    copy = tmp_path / "copy"
    interrupted_copy(run, copy, 20)
    lines = Path(config.data.train_file).read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(reversed(lines)))
    saved = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**saved, "train_file": str(tmp_path / "train.jsonl")}))
    with pytest.raises(UserError, match="data_hash of the log and of the model at hand differ"):
        resume(str(copy))


def test_an_adapter_brings_its_own_scale(finished, tiny_options):
    run, _, _ = finished
    own = {"adapter": str(run / "adapter"), "steps": 1, "lora_alpha": 16}
    start = Config.of(**{k: v for k, v in tiny_options.items() if k != "target_modules"} | own)
    train(start)
    assert RunDirectory(Path(start.machine.output_dir)).read_config().model.tuning.target_modules == (
        "o_proj",
        "q_proj",
        "up_proj",
    )
    with pytest.raises(UserError, match=r"--lora-alpha 64 contradicts --adapter .*, which has 16: leave it out"):
        train(start.replace(lora_alpha=64, output_dir=start.machine.output_dir + "-2"))
    with pytest.raises(UserError, match=r"is a run directory: give .*adapter"):
        train(start.replace(adapter=str(run), output_dir=start.machine.output_dir + "-2"))


def test_every_perturbation_of_a_step_is_verified(tiny_config, monkeypatch):
    update = HFRuntime.update

    def flip_second(self, updates, then=None, *, watch=False):
        update(self, updates, then, watch=watch)
        if not updates and self.tokens.scored:
            self.plus.tensors[0].view(torch.int32)[0, 0] ^= 1

    monkeypatch.setattr(HFRuntime, "update", flip_second)
    with pytest.raises(RunError, match=r"plus of .*lora_A.weight at index 0"):
        train(tiny_config.replace(num_perturbations=2, verify_every=1))


def test_best_needs_the_evaluations(finished, tmp_path):
    run, _, _ = finished
    (tmp_path / "log").mkdir()
    shutil.copy(run / "trajectory.jsonl", tmp_path / "log")
    with pytest.raises(UserError, match=r"metrics.jsonl is missing, which says which step was best"):
        rebuild(tmp_path / "log")
    assert rebuild(tmp_path / "log", until="last")[2] == 40


def test_resume_of_a_finished_run_checks_it(finished, tmp_path):
    run, _, result = finished
    assert resume(str(run))["checked_steps"] == result["best_step"]
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "adapter" / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"adapter_model.safetensors is not what was written \(SHA-256\)"):
        resume(str(tmp_path / "copy"))
    (path.parent / "mezo_base.json").unlink()  # as of a run of an older program, or by somebody who meant it
    with pytest.raises(UserError, match="adapter/ is not what the log gives"):
        resume(str(tmp_path / "copy"))


def test_resume_refuses_another_base_model(finished, tmp_path):
    """Altered in its place, so that nothing but its hash tells."""
    _, config, _ = finished
    shutil.copytree(config.model.base, tmp_path / "model")
    config = config.replace(model=str(tmp_path / "model"), output_dir=str(tmp_path / "run"))
    train(config, until=5)
    model = build("llama")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="model_hash of the log and of the model at hand differ"):
        resume(config.machine.output_dir)


def test_sigkill_loses_nothing(finished, tmp_path, as_flags):
    """A process killed at full speed, then resumed, ends where the uninterrupted one did."""
    run, config, _ = finished
    values = {k: v for k, v in config.to_dict().items() if v not in ("", (), 0, 0.0, True)}
    values["output_dir"] = str(tmp_path / "killed")
    log = tmp_path / "killed" / "trajectory.jsonl"
    command = [sys.executable, "-m", "mezo", "train", *as_flags(values), "--eval-train"]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_bytes().count(b"\n") > 8) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if not (tmp_path / "killed" / "result.json").exists():
        resume(str(tmp_path / "killed"))
    assert log.read_bytes() == (run / "trajectory.jsonl").read_bytes()
    assert same_bits(adapter(tmp_path / "killed"), adapter(run))


def test_ctrl_c_finishes_the_step_and_resumes(tiny_config, monkeypatch, tmp_path):
    whole = train(tiny_config.replace(output_dir=str(tmp_path / "whole")))
    shown = Monitor.step

    def press(self, record, rate):
        shown(self, record, rate)
        if record.step == 13:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Monitor, "step", press)
    assert train(tiny_config) is None
    assert len(read_trajectory(Path(tiny_config.machine.output_dir) / "trajectory.jsonl")[1]) == 14
    monkeypatch.setattr(Monitor, "step", shown)
    assert resume(tiny_config.machine.output_dir)["test"] == whole["test"]
    assert same_bits(adapter(tiny_config.machine.output_dir), adapter(tmp_path / "whole"))


def test_training_learns(tiny_config):
    everywhere = {"target_modules": LAST_LAYER["llama"], "layers_to_transform": ()}
    result = train(tiny_config.replace(steps=200, batch_size=16, lr=3e-3, eval_every=50, **everywhere))
    assert result["test"]["before"]["accuracy"] < 0.6
    assert result["test"]["after"]["accuracy"] >= 0.9


@pytest.mark.parametrize("size", [1, 3, 8])
def test_micro_batches_give_the_losses_of_the_batch(tiny_config, tmp_path, size):
    whole = tiny_config.replace(steps=3)
    parts = whole.replace(micro_batch_size=size, output_dir=str(tmp_path / "parts"))
    logs = []
    for config in (whole, parts):
        train(config)
        logs.append(read_trajectory(Path(config.machine.output_dir) / "trajectory.jsonl")[1])
    for a, b in zip(*logs, strict=True):
        # float32 forward passes of other shapes; the mean itself is float64
        assert b.losses.plus == pytest.approx(a.losses.plus, abs=1e-6)
        assert b.losses.minus == pytest.approx(a.losses.minus, abs=1e-6)


def nan_at(steps):
    """cross_entropy that is NaN at the given calls, two of which make a step."""
    calls = iter(range(10**6))
    return lambda *scored: cross_entropy(*scored) * (float("nan") if next(calls) // 2 in steps else 1.0)


def test_a_loss_that_is_not_finite_skips_the_step(tiny_config, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "cross_entropy", nan_at({3, 4}))
    result = train(tiny_config)
    assert result["skipped_steps"] == 2
    records = read_trajectory(Path(tiny_config.machine.output_dir) / "trajectory.jsonl")[1]
    assert [record.step for record in records if record.update.skipped] == [3, 4]
    assert records[3].update.coefficients == (0.0,)
    before, after = (rebuild(tiny_config.machine.output_dir, until=str(n))[0] for n in (3, 5))
    assert same_bits(before, after)


def test_ten_bad_losses_in_a_row_stop_the_run(tiny_config, monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "cross_entropy", nan_at(range(5, 10**6)))
    with pytest.raises(RunError, match="not finite in 10 steps in a row; lower --lr or --eps"):
        train(tiny_config)
    log = Path(tiny_config.machine.output_dir) / "trajectory.jsonl"
    before = log.read_bytes()
    assert len(read_trajectory(log)[1]) == 15
    with pytest.raises(RunError, match="not finite in 10 steps in a row"):
        resume(tiny_config.machine.output_dir)
    assert log.read_bytes() == before


def test_a_wrong_kernel_stops_the_run(tiny_config, monkeypatch):
    update = HFRuntime.update

    def flip(self, updates, then=None, *, watch=False):
        update(self, updates, then, watch=watch)
        self.minus.tensors[1].view(torch.int32)[0, 0] ^= 1

    monkeypatch.setattr(HFRuntime, "update", flip)
    with pytest.raises(RunError, match=r"step 0: .*minus of .*lora_B.weight at index 0: expected"):
        train(tiny_config)


def test_a_run_directory_has_one_process(finished, tmp_path):
    run, _, _ = finished
    interrupted_copy(run, tmp_path / "copy", 20)
    held = RunDirectory.open(str(tmp_path / "copy"))
    with pytest.raises(UserError, match="another process is training in this run directory"):
        RunDirectory.open(str(tmp_path / "copy"))
    held.release()


def test_start_from_an_adapter(finished, tiny_config):
    run, _, result = finished
    started = tiny_config.replace(adapter=str(run / "adapter"), steps=5, eval_every=5)
    again = train(started)
    assert again["test"]["before"] == pytest.approx(result["test"]["after"], abs=1e-6)
    theta, _, _ = rebuild(started.machine.output_dir, until="0")
    assert same_bits(theta, adapter(run))


@pytest.mark.parametrize(("n", "size", "steps"), [(10, 4, 5), (3, 8, 3), (7, 7, 4)])
def test_batches_are_shuffled_epochs(n, size, steps):
    batches = Batches(n, size, run_seed=2**64 - 1)
    drawn = [i for step in range(steps) for i in batches(step)]
    whole = len(drawn) // n * n
    assert all(sorted(drawn[at : at + n]) == list(range(n)) for at in range(0, whole, n))
    assert Batches(n, size, run_seed=2**64 - 1)(steps - 1) == batches(steps - 1)
