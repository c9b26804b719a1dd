"""Data parallelism by scalars: real processes on gloo, equal to one process, stopped by a rank that differs.

A start of torchrun costs more than all of these runs: one of them carries out a list, whose outcomes the tests read.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mezo.api import _started_here, train
from mezo.config import Config
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.directory import RunDirectory
from mezo.run.trajectory import read_trajectory
from tests.tiny_data import flags_of
from tests.tiny_models import LAST_LAYER, WORDS, save

SUMS = 1e-6  # float32 forward passes of other batch shapes; the sums over ranks are float64
RANKS = 3  # which share 8 examples and 4 perturbations unevenly
SHORT = {"steps": 12, "eval_every": 6}
PERTURBATIONS = {**SHORT, "num_perturbations": 4, "parallel": "perturbations", "verify_every": 3}
EXACT = {
    "sgd": {},
    "adam": {"update_rule": "adam", "weight_decay": 0.5},
    "fzoo": {"update_rule": "fzoo", "lr": 1e-4},
    "guided": {"update_rule": "guided", "lr": 1e-3},
    "subspace": {"update_rule": "subspace-adam", "lr": 1e-3, "refresh_every": 5},
    "momentum": {"update_rule": "momentum", "normalise_z": True, "lr": 1e-3},
    "prefix": {"tuning": "prefix", "eps": 1e-1},
    # a perturbation at a time, as the ranks have them: in one pass of all of them sums are ordered otherwise
    "directions": {"directions": 4, "num_perturbations": 1, "copies_bytes": 1},
    # dev does not improve: the ranks end together
    "early stopping": {"lr": 1e-12, "eval_every": 2, "early_stopping": 3},
}
REWARDS = ("data", "perturbations")


def torchrun(directory, ranks, runs, restarts=0):
    """Carry out runs, (configuration, fault) each, in several processes.

    Returns:
        The process, and for each attempt the exit codes of rank 0.
    """
    path = directory / "runs.json"
    flags = [{"flags": ["train", *flags_of(config.changes())], "fault": fault} for config, fault in runs]
    path.write_text(json.dumps(flags))
    launch = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    script = str(Path(__file__).with_name("runs_of_a_rank.py"))
    command = [sys.executable, "-m", "torch.distributed.run", *launch, script, str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150, check=False)
    found = [path.with_suffix(f".codes-{attempt}") for attempt in range(restarts + 1)]
    return done, [json.loads(codes.read_text()) for codes in found if codes.is_file()]


def outcome(directory):
    """(records, adapter)."""
    return read_trajectory(Path(directory) / "trajectory.jsonl")[1], read_adapter(Path(directory) / "adapter")


def run_of(options, output_dir):
    """A run's configuration; with a prefix it has no options of LoRA."""
    lora = ("target_modules", "layers_to_transform") if options.get("tuning") == "prefix" else ()
    given = {name: value for name, value in options.items() if name not in lora}
    return Config.of(**{**given, "report": False, "output_dir": str(output_dir)})


def same_run(one, several):
    """Whether two runs have one log and one adapter."""
    (records, adapter), (again, same) = outcome(one), outcome(several)
    return again == records and same_bits(adapter, same) is None


@pytest.fixture(scope="module")
def base(tiny_model, tiny_data):
    """Options of every run but those with a reward."""
    return {
        "model": tiny_model, **tiny_data, "prompt": "{text} It was", "label_words": (" terrible", " great"),
        "target_modules": ("q_proj", "o_proj", "up_proj"), "layers_to_transform": (2,), "batch_size": 8, "lr": 1e-2,
        "eps": 1e-2,
    }  # fmt: skip


@pytest.fixture(scope="module")
def rewarded(tmp_path_factory):
    """Options of a run on a reward, the share of "great" in the text; every token of the model is a word."""
    folder = tmp_path_factory.mktemp("reward")
    rows = [{"prompt": f"{a} {n} was {w}"} for a in ("the", "a") for n in WORDS[9:13] for w in ("good", "poor", "nice")]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "mine.py").write_text("def share(example, output):\n    return output.split().count('great') / 8\n")
    modules = (*LAST_LAYER["llama"], "k_proj", "v_proj")
    return {
        "model": save("llama", folder / "model", vocab_size=len(WORDS) + 3), "train_file": str(folder / "train.jsonl"),
        "objective": "reward", "reward": f"{folder / 'mine.py'}:share", "z_score_rewards": True, "max_new_tokens": 8,
        "target_modules": modules, "steps": 6, "batch_size": 8, "num_perturbations": 3, "lr": 0.05, "eps": 0.1,
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory, base, rewarded):
    """What one launch left: (directory, the process, exit codes by the name of the run)."""
    folder = tmp_path_factory.mktemp("ranks")
    wanted = {
        "data": {**base, **SHORT},
        "data directions": {**base, **SHORT, "directions": 4},
        **{name: {**base, **PERTURBATIONS, **options} for name, options in EXACT.items()},
        **{f"reward {parallel}": {**rewarded, "parallel": parallel} for parallel in REWARDS},
        "more ranks than work": {**base, **SHORT, "parallel": "perturbations"},
        "differing": {**base, **SHORT, "verify_every": 3},
    }
    faults = {"differing": "flip_a_bit"}  # the last one: it stays
    runs = [(run_of(options, folder / name), faults.get(name, "")) for name, options in wanted.items()]
    done, codes = torchrun(folder, RANKS, runs)
    assert codes, done.stderr
    return folder, done, dict(zip(wanted, codes[0], strict=False))


def alone(tmp_path, **options):
    """The directory of the same run by this process."""
    train(run_of(options, tmp_path / "alone"))
    return tmp_path / "alone"


def same_losses(one, several):
    for a, b in zip(outcome(one)[0], outcome(several)[0], strict=True):
        assert b.update.seeds == a.update.seeds
        assert b.losses.plus == pytest.approx(a.losses.plus, abs=SUMS)


def test_sharing_the_batch_equals_one_process_to_summation_order(finished, base, tmp_path):
    folder, done, codes = finished
    assert codes["data"] == 0, done.stderr
    same_losses(alone(tmp_path, **base, **SHORT), folder / "data")
    result = json.loads((folder / "data" / "result.json").read_text())
    assert result["ranks"] == RANKS
    assert codes["data directions"] == 0, done.stderr
    same_losses(alone(tmp_path / "directions", **base, **SHORT, directions=4), folder / "data directions")
    # three float64 numbers a rank each step, and two where theta is compared: a hash, and whether to stop
    assert 3 * 8 * RANKS <= result["bytes_exchanged_per_step"] <= 5 * 8 * RANKS


@pytest.mark.parametrize("name", EXACT)
def test_sharing_perturbations_equals_one_process_bit_for_bit(finished, base, tmp_path, name):
    folder, done, codes = finished
    assert codes[name] == 0, done.stderr
    one = alone(tmp_path, **{**base, **PERTURBATIONS, **EXACT[name]})
    assert same_run(one, folder / name)
    assert len(outcome(one)[0]) == (6 if name == "early stopping" else 12)


@pytest.mark.parametrize("parallel", REWARDS)
def test_rewards_shared_equal_one_process_bit_for_bit(finished, rewarded, tmp_path, parallel):
    """Rewards of the whole batch are standardised together, wherever they were given."""
    folder, done, codes = finished
    assert codes[f"reward {parallel}"] == 0, done.stderr
    assert outcome(folder / f"reward {parallel}")[0] == outcome(alone(tmp_path, **rewarded, noise=False))[0]


def test_a_rank_whose_theta_differs_stops_the_run_by_name(finished):
    _, done, codes = finished
    assert codes["differing"] == 1
    assert "step 3: theta of rank 1 differs from that of rank 0" in done.stderr


def test_more_ranks_than_work_are_refused(finished):
    folder, done, codes = finished
    assert codes["more ranks than work"] == 2
    assert "--num-perturbations 1 cannot be shared by 3 ranks" in done.stderr
    assert not (folder / "more ranks than work").exists()


@pytest.fixture(scope="module")
def restarted(tmp_path_factory, base):
    """What two attempts of a launch left: rank 1 is killed in step 7 of the second run, all ranks start again.

    The last run, which the second attempt alone comes to, is to go where a run of this process is already.
    """
    folder = tmp_path_factory.mktemp("restarted")
    earlier = Config.of(**{**base, "steps": 5, "output_dir": str(folder / "earlier")})
    train(earlier)
    before = RunDirectory(folder / "earlier").trajectory.read_bytes()
    data = Config.of(**base, **SHORT, output_dir=str(folder / "data"))
    killed = Config.of(**base, **PERTURBATIONS, output_dir=str(folder / "killed"))
    done, codes = torchrun(folder, 2, [(data, ""), (killed, "die_in_step_7"), (earlier, "")], restarts=1)
    assert len(codes) == 2, done.stderr
    return folder, done, codes, before


@pytest.mark.slow  # a second launch, of two attempts
def test_a_killed_rank_is_restarted_and_the_log_carries_on(restarted, base, tmp_path):
    folder, done, (first, second), _ = restarted
    assert first == [0, 1], done.stderr
    assert second[1] == 0, done.stderr
    assert same_run(alone(tmp_path, **base, **PERTURBATIONS), folder / "killed")


@pytest.mark.slow  # a second launch, of two attempts
def test_two_ranks_share_the_batch_and_a_restart_leaves_a_finished_run(restarted, base, tmp_path):
    folder, _, codes, _ = restarted
    assert [attempt[0] for attempt in codes] == [0, 0]
    same_losses(alone(tmp_path, **base, **SHORT), folder / "data")


@pytest.mark.slow  # a second launch, of two attempts
def test_a_restart_never_continues_a_run_of_another_launch(restarted):
    """The directory was there before the launch: it is refused, although the ranks were restarted."""
    folder, done, (_, second), before = restarted
    assert second[2] == 2
    assert done.returncode != 0
    assert "exists and is never overwritten" in done.stderr
    assert RunDirectory(folder / "earlier").trajectory.read_bytes() == before


@pytest.mark.parametrize(("name", "known"), [("a1b2", True), ("none", False), ("", False)])
def test_a_launch_without_a_name_of_its_own_is_nobodys(tiny_config, monkeypatch, name, known):
    """torchrun calls every launch "none" that meets at a given address."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", name)
    train(tiny_config.replace(steps=2), until=1)
    config = RunDirectory(Path(tiny_config.machine.output_dir)).read_config()
    assert _started_here(config) is known
