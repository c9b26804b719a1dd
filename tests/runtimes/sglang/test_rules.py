"""Update rules inside the engine: state lives in its workers, equals the reference and the hf runtime, and resumes."""

from pathlib import Path

import pytest

from mezo.api import resume, train
from mezo.config import Config
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from tests.log_by_formula import follows
from tests.runtimes.sglang.conftest import LAST
from tests.tiny_data import write_jsonl

pytestmark = pytest.mark.engine("last")  # layer alone
STEPS = 12
NOISE = 1e-5  # on losses near 1, after a few steps of two implementations


@pytest.fixture
def options(tmp_path, model):
    files = {f"{s}_file": write_jsonl(tmp_path / f"{s}.jsonl", n, i) for i, (s, n) in enumerate({"train": 32}.items())}
    words = {"prompt": "{text} It was", "label_words": (" terrible", " great")}
    shape = {"target_modules": LAST, "layers_to_transform": (2,)}
    return {"model": model("llama"), **files, **words, **shape, "steps": STEPS, "batch_size": 8, "eps": 1e-2,
            "verify_every": 1, "noise": False}  # fmt: skip


@pytest.mark.parametrize(
    "rule",
    [
        {"update_rule": "adamw", "num_perturbations": 2, "lr": 1e-4, "weight_decay": 0.1, "no_decay": ("*lora_B*",)},
        {"update_rule": "conservative", "lr": 1e-3},
        {"update_rule": "guided", "num_perturbations": 3, "lr": 1e-3},
    ],
    ids=["adamw", "conservative", "guided"],
)
def test_a_rule_in_the_engine(rule, options, tmp_path):
    """Every step is compared with the reference on the worker (--verify-every 1), moments too."""
    runs = {}
    for runtime in ("hf", "sglang"):
        config = Config.of(**options, **rule, runtime=runtime, output_dir=str(tmp_path / runtime))
        if runtime == "sglang" and rule["update_rule"] == "adamw":  # moments are rebuilt from the log
            assert train(config, until=5) is None
            resume(config.machine.output_dir)
        else:
            train(config)
        assert follows(config.machine.output_dir) == STEPS
        runs[runtime] = read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))
        kept = read_adapter(Path(config.machine.output_dir, "adapter"))
        assert same_bits(rebuild(config.machine.output_dir, "last")[0], kept) is None
    assert runs["sglang"][0] == runs["hf"][0], "header"
    for ours, theirs in zip(runs["sglang"][1], runs["hf"][1], strict=True):
        assert ours.losses.plus == pytest.approx(theirs.losses.plus, abs=NOISE)
        assert ours.tried == pytest.approx(theirs.tried, abs=NOISE)
