"""A server of two tensor-parallel ranks that learns from a reward, by a population of directions and sampled texts."""

import json
import random
import time

import pytest

from mezo.cli.main import main
from mezo.run.adapter import load_adapter, same_bits
from mezo.run.directory import RunDirectory
from mezo.run.replay import theta_after
from mezo.run.trajectory import read_trajectory
from tests.serve.conftest import LAYERS
from tests.serve.server import Reference, Server
from tests.tiny_data import flags_of
from tests.tiny_models import WORDS, save

NEW, STEPS, DIRECTIONS = 8, 24, 8
NAME = "adapter_model.safetensors"
REWARD = f"def share(example, output):\n    return output.split().count('great') / {NEW}\n"
FED = [{"prompt": f"a {word} story was"} for word in ("bad", "fine", "poor", "great")]
TOLERANCE = 2e-4  # of log-probabilities in float32, on another way through the layers


@pytest.fixture
def rewarded(installed, tmp_path):
    """Options of a run on a reward, of all layers."""
    rows = [{"prompt": f"{a} {n} was"} for a in ("the", "a", "a nice") for n in ("film", "plot", "story", "acting")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(REWARD)
    return {
        "model": save("llama", tmp_path / "words", vocab_size=len(WORDS) + 3),
        "output_dir": str(tmp_path / "run"),
        **{f"{split}_file": str(tmp_path / "rows.jsonl") for split in ("train", "dev")},
        "objective": "reward",
        "reward": f"{tmp_path / 'mine.py'}:share",
        "max_new_tokens": NEW,
        "temperature": 1.0,
        "z_score_rewards": True,
        "center_rewards": True,
        "num_perturbations": DIRECTIONS,
        "target_modules": LAYERS,
        "steps": STEPS,
        "batch_size": 4,  # three steps an epoch
        "lr": 0.05,
        "eps": 0.1,
        "eval_every": 6,
        "verify_every": 6,  # of the bits on every rank
        "eval_test": False,
        "report": False,
        "tp": 2,
        "max_latency_cost": 10,
    }


@pytest.mark.slow  # two ranks, a minute; test_server.py and runtimes/sglang/test_parallel.py have the parts
def test_two_ranks_serve_and_learn_and_their_log_gives_what_users_had(rewarded, tmp_path):
    run, rng, answers = tmp_path / "run", random.Random(0), []
    server = Server(flags_of(rewarded), run)
    try:
        assert server.ask("/mezo/examples", FED)[0] == 200
        while (status := server.status())["state"] == "training":
            adapter = rng.choice(("", "mezo", f"mezo@{rng.randrange(status['step'] + 1)}"))
            prompt = f"{rng.choice(('the', 'a'))} film was"
            answers.append((adapter, prompt, *server.complete(adapter, prompt)))
            time.sleep(0.05)
        assert (status["state"], status["step"]) == ("finished", STEPS), server.output
        for adapter in ("mezo", f"mezo@{STEPS}"):
            answers.append((adapter, "the plot was", *server.complete(adapter, "the plot was")))
    finally:
        assert server.end() == 143, server.output
    reference = Reference(run)
    wrong = [a for a in answers if not reference.difference(a[2], a[1], *a[3:]) <= TOLERANCE]
    assert not wrong
    assert len({version for _, _, version, *_ in answers}) > 2

    first_line, records = read_trajectory(run / "trajectory.jsonl")
    assert len(records) == STEPS
    assert all(len(record.update.seeds) == DIRECTIONS and record.text_seed is not None for record in records)
    assert len({record.text_seed for record in records}) == STEPS
    assert status["fed"] == {"feedback": 0, "example": len(FED), "refused": 0, "in_use": len(FED)}
    rewards = {row["step"]: row["reward"] for row in RunDirectory(run).read_metrics() if row["split"] == "dev"}
    assert status["promoted"] == max(rewards, key=lambda step: (rewards[step], -step)) > 0
    assert main(["trajectory", "verify", str(run)]) == 0
    assert main(["replay", str(run), "--output-dir", str(tmp_path / "replayed")]) == 0
    assert (tmp_path / "replayed" / NAME).read_bytes() == (run / "adapter" / NAME).read_bytes()
    promoted = theta_after(first_line, run, records[: status["promoted"]])
    kept = load_adapter(run / "adapter", {name: tuple(tensor.shape) for name, tensor in promoted.items()})
    assert same_bits(kept, promoted) is None
