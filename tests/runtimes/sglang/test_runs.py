"""Whole runs through the engine: equal to the hf runtime's, resumed on either, killed, stopped, and reported."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
from peft import LoraConfig, PeftModel

from mezo.api import evaluate, evaluate_target, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.data.files import forget
from mezo.errors import UserError
from mezo.report import tables
from mezo.run import logbook
from mezo.run.adapter import adapter_options, read_adapter, same_bits
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from mezo.studies import tune
from tests.data.test_large import set_large
from tests.log_by_formula import follows
from tests.runtimes.sglang.conftest import LAST
from tests.tiny_data import flags_of, write_jsonl
from tests.tiny_models import build

last = pytest.mark.engine("last")  # layer alone
SHAPE = {"target_modules": LAST, "layers_to_transform": (2,)}
STEPS = 30
NOISE = 1e-5  # on losses near 1, after a few steps of two implementations


@pytest.fixture(scope="module")
def common(tmp_path_factory, model):
    directory = tmp_path_factory.mktemp("data")
    sizes = {"train": 48, "dev": 20, "test": 20}
    files = {f"{s}_file": write_jsonl(directory / f"{s}.jsonl", n, i) for i, (s, n) in enumerate(sizes.items())}
    words = {"prompt": "{text} It was", "label_words": (" terrible", " great")}
    return {"model": model("llama"), **files, **words, **SHAPE, "steps": STEPS, "batch_size": 8, "lr": 1e-3,
            "eps": 1e-2, "eval_every": 10, "num_perturbations": 2, "weight_decay": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, common):
    """The same run by both runtimes: {runtime: (directory, result)}."""
    made = {}
    for runtime in ("hf", "sglang"):
        path = tmp_path_factory.mktemp(runtime) / "run"
        config = Config.of(**common, runtime=runtime, output_dir=str(path), verify_every=1)
        made[runtime] = path, train(config)
    return made


def losses(path):
    records = read_trajectory(path / "trajectory.jsonl")[1]
    return [loss for record in records for loss in record.losses.plus + record.losses.minus]


@last
def test_a_run_is_the_hf_runtimes(runs):
    (hf, hf_result), (ours, result) = runs["hf"], runs["sglang"]
    assert read_trajectory(hf / "trajectory.jsonl")[0] == read_trajectory(ours / "trajectory.jsonl")[0], "header"
    assert losses(ours) == pytest.approx(losses(hf), abs=NOISE)
    assert result["best_step"] == hf_result["best_step"]
    assert result["test"]["after"] == pytest.approx(hf_result["test"]["after"], abs=NOISE)
    assert follows(ours) == STEPS


@last
def test_a_mapped_training_set_gives_the_losses_of_one_that_is_held(runs, common, tmp_path, monkeypatch):
    """Above the limit rows are tokenised as they are drawn."""
    with monkeypatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        set_large(patch, limit=40)
        out = tmp_path / "run"
        config = Config.of(**common, runtime="sglang", output_dir=str(out), eval_test=False, max_length=64)
        assert train(config, until=6) is None
    forget()
    header, records = read_trajectory(out / "trajectory.jsonl")
    assert header["data_hash"].startswith("rows:")
    assert len(records) == 6
    held = losses(runs["sglang"][0])
    assert losses(out) == pytest.approx(held[: len(losses(out))], abs=NOISE)


def read_as_plain(directory, monkeypatch):
    """An adapter of rsLoRA that is taken for one of plain LoRA, as a field that nobody knows of would be."""
    shape = {"target_modules": list(LAST), "layers_to_transform": [2], "init_lora_weights": False}
    PeftModel(build("llama"), LoraConfig(r=8, lora_alpha=16, use_rslora=True, **shape)).save_pretrained(directory)
    as_plain = {**adapter_options(directory), "use_rslora": False}
    monkeypatch.setattr("mezo.api.adapter_options", lambda path: as_plain)


@last
def test_an_adapter_that_peft_reads_otherwise_is_refused(runs, common, tmp_path, monkeypatch):
    """Scores of what a run starts from are compared with PEFT's own reading of it, once."""
    options = {name: value for name, value in common.items() if name not in SHAPE} | {"runtime": "sglang", "steps": 2}
    own = Config.of(**options, adapter=str(runs["hf"][0] / "adapter"), output_dir=str(tmp_path / "own"))
    assert train(own)["steps"] == 2
    read_as_plain(tmp_path / "foreign", monkeypatch)
    foreign = Config.of(**options, adapter=str(tmp_path / "foreign"), output_dir=str(tmp_path / "run"))
    with pytest.raises(UserError, match=r"it is another function where PEFT loads it: .* differ by"):
        train(foreign)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # above: an engine for one direction
@last
def test_so_is_one_that_is_evaluated(common, tmp_path, monkeypatch):
    read_as_plain(tmp_path / "foreign", monkeypatch)
    given = {name: common[name] for name in ("dev_file", "prompt", "label_words", "model")} | {"runtime": "sglang"}
    with pytest.raises(UserError, match=r"it is another function where PEFT loads it: .* differ by"):
        evaluate_target(given, tmp_path / "foreign")


@last
def test_tokens_are_the_engines_count(runs):
    """Every prompt of the training set is visited for the first time once; after that a request is one token."""
    _, result = runs["sglang"]
    requests = STEPS * 8 * 2 * 2
    assert result["tokens_computed"] + result["tokens_reused"] == result["tokens_scored"]
    assert requests < result["tokens_computed"] < requests + 48 * 7
    assert result["eval_tokens_computed"] < result["eval_tokens_scored"] / 2


@last
def test_time_and_noise_are_reported(runs):
    path, result = runs["sglang"]
    parts = result["seconds_of_training"]
    assert set(parts) == {"kernels", "rpc", "engine", "bookkeeping"}
    assert all(seconds > 0 for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(result["seconds_training"])
    assert 0 <= result["projected_grad_noise"] < 1e-3 * result["projected_grad_rms"]
    found = tables.tables(str(path))
    assert [row[0] for row in found["seconds of training"]] == list(parts)
    assert ("runtime", "sglang") in found["result"]
    assert ("runtime", "hf") in tables.tables(str(runs["hf"][0]))["result"]


@last
@pytest.mark.parametrize(("first", "second"), [("hf", "sglang"), ("sglang", "hf")])
def test_a_run_of_one_runtime_resumes_on_the_other(runs, common, tmp_path, first, second):
    """Cut back to 10 steps and carried on elsewhere: old steps are kept, new ones are the same but for noise."""
    path, result = runs[first]
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", path, copy], check=True)
    logbook.truncate(str(copy), 10)
    again = resume(str(copy), machine={"runtime": second})
    old, new = ((p / "trajectory.jsonl").read_bytes().splitlines() for p in (path, copy))
    assert old[:11] == new[:11]
    assert losses(copy) == pytest.approx(losses(path), abs=NOISE)
    assert again["best_step"] == result["best_step"]
    theta, _, _ = rebuild(copy)
    assert same_bits(theta, read_adapter(copy / "adapter")) is None


def start(common, output_dir, steps, launcher=()):
    """`python -m mezo train --runtime sglang` as a user starts it."""
    flags = flags_of({**common, "steps": steps, "runtime": "sglang", "output_dir": output_dir})
    argv = [sys.executable, *launcher, "-m", "mezo", "train", *flags]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_steps(process, log, n):
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.is_file() and log.read_bytes().count(b"\n") > n:
            return
        time.sleep(0.01)
    pytest.fail(f"no {n} steps: {process.communicate()[1][-2000:]}")


def kill_a_worker(engines, log, n):
    """Once n steps are logged; returns the engine's processes."""
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_bytes().count(b"\n") > n) and time.monotonic() < deadline:
        time.sleep(0.01)
    processes = list(engines.handle.processes)
    next(process for process in processes if "scheduler" in "".join(process.cmdline())).kill()
    return processes


@pytest.mark.engine("last, for the last time")
def test_a_killed_worker_ends_the_run_and_loses_nothing(common, tmp_path, engines, capsys):
    run = tmp_path / "run"
    flags = flags_of({**common, "steps": 4000, "runtime": "sglang", "output_dir": run})
    with ThreadPoolExecutor(1) as pool:
        killing = pool.submit(kill_a_worker, engines, run / "trajectory.jsonl", 5)
        assert main(["train", *flags]) == 1
    processes, error = killing.result(), capsys.readouterr().err
    assert "mezo: error: the SGLang engine died" in error
    assert "nothing that was trained is lost, resume the run" in error
    assert not [process for process in processes if process.is_running() and process.status() != "zombie"]
    done = len(read_trajectory(run / "trajectory.jsonl")[1])
    assert 5 <= done < 4000
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    logbook.truncate(str(copy), done)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "steps": done + 10}))
    result = resume(str(copy), machine={"runtime": "hf"})
    assert result["steps"] == done + 10
    theta, _, _ = rebuild(copy)
    assert same_bits(theta, read_adapter(copy / "adapter")) is None, "fed the same projected_grads"


@pytest.mark.slow  # test_scratch.py: ways to end; test_trainer.py: Ctrl-C; above: no process outlives a dead worker
def test_ctrl_c_ends_after_the_step_and_the_engine_with_it(common, tmp_path, own_engine):
    run = tmp_path / "run"
    process = start(common, run, 4000)
    wait_for_steps(process, run / "trajectory.jsonl", 5)
    children = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the engine's processes as well
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130, error
    assert "stopped after step" in error
    assert not [child for child in children if child.is_running() and child.status() != "zombie"]
    assert follows(run) >= 5


@pytest.mark.slow  # test_others.py: torchrun's variables are hidden; training/test_ranks.py: ranks share a batch
def test_two_trainers_share_a_batch_with_an_engine_each(runs, common, tmp_path, own_engine):
    """torchrun's own addresses must not reach the engines; the ranks' losses add up to those of one process."""
    run = tmp_path / "run"
    process = start(common, run, 10, ("-m", "torch.distributed.run", "--nproc-per-node", "2"))
    error = process.communicate(timeout=180)[1]
    assert process.returncode == 0, error[-2000:]
    assert losses(run) == pytest.approx(losses(runs["sglang"][0])[: 10 * 4], abs=NOISE)
    assert json.loads((run / "result.json").read_text())["ranks"] == 2


@last
def test_eval_through_the_engine(runs, common, capsys):
    """A run's adapter, and a model without one: the noise of the start-up proof must be gone."""
    path, result = runs["hf"]
    assert main(["eval", str(path), "--runtime", "sglang"]) == 0
    assert f"{result['test']['after']['accuracy']:.4f}" in capsys.readouterr().out
    data = {k: v for k, v in common.items() if k.endswith("_file") or k in (*SHAPE, "prompt", "label_words", "model")}
    base = {r: evaluate(Config.of(**data, runtime=r, output_dir="unused"), None) for r in ("hf", "sglang")}
    assert base["sglang"]["test"] == pytest.approx(base["hf"]["test"], abs=NOISE)


@last
def test_a_run_with_engine_options_resumes_in_process(runs, tmp_path, capsys):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", runs["sglang"][0], copy], check=True)
    config = json.loads((copy / "config.json").read_text())
    given = {"tp": 2, "engine_arg": ["attention_backend=torch_native"], "radix": "off"}
    (copy / "config.json").write_text(json.dumps({**config, **given}))
    logbook.truncate(str(copy), 10)
    assert main(["train", "--resume", str(copy), "--runtime", "hf"]) == 0, capsys.readouterr().err
    assert losses(copy) == pytest.approx(losses(runs["sglang"][0]), abs=NOISE)


@last
def test_a_sweep_through_the_engine_is_the_hf_runtimes(common, tmp_path):
    """Trials share one engine, are paused and resumed in it, and its noise decides nothing."""
    found = {}
    for runtime in ("hf", "sglang"):
        config = Config.of(**common, runtime=runtime, output_dir=str(tmp_path / runtime))
        found[runtime] = tune.tune(config, grid_lr=(1e-3, 3e-3), grid_eps=(1e-2,), rungs=2, trial_steps=12)
    rows = [found[runtime]["rungs"] for runtime in found]
    assert [row["trial"] for row in rows[0]] == [row["trial"] for row in rows[1]]
    assert [row["dev_loss"] for row in rows[0]] == pytest.approx([row["dev_loss"] for row in rows[1]], abs=1e-4)
    assert found["sglang"]["command"].startswith("mezo train --")
