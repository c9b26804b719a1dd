"""`make bench-figures`: figures of the JSON files and of nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "imagined", "threads": 2, "torch": "2.13.0"}
FIGURES = [
    *(f"growth_{name}.svg" for name in ("parameters", "tensors", "updates")),
    "bench_perturb.svg",
    "bench_step.svg",
]


def growth():
    def series(*xs):
        seconds = [{"copy": x, "drawing z": 2.0 * x, "ours": 3.0 * x, "original loop": 20.0 * x} for x in xs]
        return [{"x": x, "elements": 1024, "seconds": s} for x, s in zip(xs, seconds, strict=True)]

    return {"machine": MACHINE, "series": {name: series(1, 2, 4) for name in ("parameters", "tensors", "updates")}}


def bench(ops=("perturb", "step"), fraction=0.5):
    facts = [{"op": op, "shape": s, "provider": p} for op in ops for s in ("a", "b") for p in ("ours", "peer " + s)]
    rows = [f | {"dtype": "float32", "fraction_of_copy": fraction} for f in facts]
    rows.append({"op": "first call", "seconds": 3.0})
    return {"machine_info": MACHINE, "benchmarks": [{"extra_info": row} for row in rows]}


def study():
    points = {"step": [20, 40], "training_accuracy": [0.5, 0.6], "abs_projected_grad": [0.1, 0.2]}
    dev = {"dev_step": [0, 40], "dev_accuracy": [0.5, 0.7], "dev_cross_entropy": [1.1, 0.6]}
    return {"accuracy objective": {"learning": {"batch_size": 64, "eps": 0.03, "lr": 0.5, "curves": points | dev}}}


def draw(folder, **files):
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    command = [sys.executable, str(ROOT / "bench/figures.py"), str(folder)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def drawn(tmp_path):
    result = draw(tmp_path, growth=growth(), bench=bench())
    assert result.returncode == 0, result.stderr
    return {name: (tmp_path / name).read_bytes() for name in FIGURES}


def test_one_figure_a_question_with_the_limits_in_it(drawn):
    for name in FIGURES:
        assert drawn[name].startswith(b"<?xml")
        assert b"copy of the same bytes (limit)" in drawn[name]
        assert b"imagined, 2 threads" in drawn[name]
    assert all(b"drawing z alone (limit)" in drawn[name] for name in FIGURES[:3])


def test_the_same_json_gives_the_same_bytes_and_other_json_others(drawn, tmp_path):
    draw(tmp_path, growth=growth(), bench=bench())
    assert {name: (tmp_path / name).read_bytes() for name in FIGURES} == drawn
    draw(tmp_path, bench=bench(fraction=0.7))
    assert (tmp_path / "bench_step.svg").read_bytes() != drawn["bench_step.svg"]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"bench": bench()}, "run `make bench-growth` first"),
        ({"growth": growth()}, "run `make bench` first"),
        ({"growth": growth(), "bench": bench(ops=["perturb"])}, "has no row of step"),
    ],
    ids=["no growth", "no bench", "no step"],
)
def test_what_is_missing_is_said(tmp_path, files, says):
    result = draw(tmp_path, **files)
    assert result.returncode == 1
    assert says in result.stderr
    assert "Traceback" not in result.stderr


def test_steps_and_alternatives_are_drawn_where_they_were_measured(tmp_path):
    seconds = {"ours, all layers": 2.0, "original": 3.0, "two forwards": 1.9}
    steps = {"series": {name: [{"x": x, "seconds": seconds} for x in (1, 2)] for name in ("batch", "prompt length")}}
    rows = [{"method": m, "batch": b, "peak_bytes": 1 << 30, "seconds": 1.0} for m in ("MeZO", "AdamW") for b in (1, 4)]
    files = {"training_step": steps | {"machine": MACHINE}, "alternatives": {"machine": MACHINE, "rows": rows}}
    result = draw(tmp_path, growth=growth(), bench=bench(), **files)
    assert result.returncode == 0, result.stderr
    assert b"two forward passes" in (tmp_path / "step_batch.svg").read_bytes()
    assert b"batch 4" in (tmp_path / "step_prompt_length.svg").read_bytes()
    assert b"AdamW" in (tmp_path / "alternatives.svg").read_bytes()


def test_the_four_curves_of_a_run_on_accuracy(tmp_path):
    assert draw(tmp_path, growth=growth(), bench=bench(), reproduce_small=study()).returncode == 0
    drawn = (tmp_path / "reproduce_accuracy_objective.svg").read_text()
    for title in ("training accuracy", "cross-entropy on dev", "dev accuracy", "|projected_grad|", "lr 0.5"):
        assert title in drawn


def test_reproduced_parts_without_a_curve_draw_nothing(tmp_path):
    assert draw(tmp_path, growth=growth(), bench=bench(), reproduce_small={"linear": {}}).returncode == 0
    assert not (tmp_path / "reproduce_accuracy_objective.svg").exists()
