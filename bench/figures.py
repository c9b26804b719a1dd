"""Draws the figures of a results folder from its JSON files alone: nothing is measured here.

Run: python bench/figures.py bench/results/MACHINE
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib import pyplot as plt

plt.rcParams["svg.hashsalt"] = "mezo-kernels"  # the same JSON gives the same bytes
# series of growth.json: (label of x, title)
GROWTH = {
    "parameters": ("parameters, one float32 tensor", "perturb_ as parameters grow"),
    "tensors": ("tensors that {elements:,} float32 parameters are split into", "perturb_ as tensors multiply"),
    "updates": ("updates in a pass, {elements:,} float32 parameters", "step_ as updates multiply"),
}
OPS = ("perturb", "step")


def read(path: Path, command: str) -> dict:
    """A JSON file of the folder."""
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise SystemExit(f"{path}: {error.strerror}; run `{command}` first") from None
    except ValueError as error:
        raise SystemExit(f"{path} is not JSON ({error}); run `{command}` again") from None


def grid(axes, machine: dict) -> None:
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    name = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    axes.text(1, -0.2, f"{name}, torch {machine['torch']}", transform=axes.transAxes, ha="right", fontsize=7)


def draw_growth(name: str, points: list[dict], machine: dict, path: Path) -> None:
    """Seconds of a call over x, both logarithmic; the limits dashed, drawing z once for each update."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    x = [point["x"] for point in points]
    for run in points[0]["seconds"]:
        seconds = [point["seconds"][run] for point in points]
        if name == "updates" and run == "drawing z":
            seconds = [k * value for k, value in zip(x, seconds, strict=True)]
        limit = {"copy": "copy of the same bytes (limit)", "drawing z": "drawing z alone (limit)"}.get(run)
        axes.loglog(x, seconds, "--" if limit else "o-", color="gray" if run == "copy" else None, label=limit or run)
    label, title = GROWTH[name]
    axes.set(xlabel=label.format(elements=points[0]["elements"]), ylabel="seconds a call", title=title)
    axes.set_xscale("log", base=2)
    grid(axes, machine)
    save(figure, path)


def draw_op(op: str, rows: list[dict], machine: dict, path: Path) -> None:
    """Float32 rows of an op: the fraction of a copy's rate, a bar for each provider on each shape."""
    bars = {(r["shape"], r["provider"]): r["fraction_of_copy"] for r in rows if r["dtype"] == "float32"}
    shapes, providers = (list(dict.fromkeys(key[i] for key in bars)) for i in (0, 1))
    figure, axes = plt.subplots(figsize=(8, 4.2))
    width = 0.8 / len(providers)
    for i, provider in enumerate(providers):
        at = [k + i * width for k, shape in enumerate(shapes) if (shape, provider) in bars]
        axes.bar(at, [bars[s, provider] for s in shapes if (s, provider) in bars], width, label=provider)
    axes.axhline(1, color="gray", linestyle="--", label="copy of the same bytes (limit)")
    axes.set(ylabel="fraction of a copy", yscale="log", title=f"{op}, float32")
    axes.set_xticks([k + 0.4 - width / 2 for k in range(len(shapes))], shapes, fontsize=7)
    grid(axes, machine)
    save(figure, path)


def draw_step(name: str, points: list[dict], machine: dict, path: Path) -> None:
    """Seconds of a training step over the batch or the prompt's length; two forward passes are the limit, dashed."""
    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for run in points[0]["seconds"]:
        limit = run == "two forwards"
        label = "two forward passes, adapters on all layers (limit without a cache)" if limit else run
        style = {"color": "gray", "linestyle": "--"} if limit else {"marker": "o"}
        axes.loglog([p["x"] for p in points], [p["seconds"][run] for p in points], label=label, **style)
    fixed = "batch 4" if name == "prompt length" else "32 tokens a prompt"
    axes.set(xlabel=f"{name} ({fixed})", ylabel="seconds a step", title="a training step, 135M parameters, float32")
    axes.set_xscale("log", base=2)
    grid(axes, machine)
    save(figure, path)


def draw_alternatives(rows: list[dict], machine: dict, path: Path) -> None:
    """Peak memory and seconds of a step over the batch, a line for each method."""
    figure, (memory, seconds) = plt.subplots(1, 2, figsize=(10, 4.2))
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        batches = [row["batch"] for row in own]
        memory.plot(batches, [row["peak_bytes"] / 2**30 for row in own], "o-", label=method)
        seconds.plot(batches, [row["seconds"] for row in own], "o-", label=method)
    memory.set(xlabel="batch", ylabel="GiB", title="peak memory of a step", ylim=(0, None))
    seconds.set(xlabel="batch", ylabel="seconds", title="a step", yscale="log")
    for axes in (memory, seconds):
        axes.set_xscale("log", base=2)
        grid(axes, machine)
    save(figure, path)


def draw_accuracy_objective(study: dict, path: Path) -> None:
    """A run on accuracy as the objective: training accuracy, cross-entropy, dev accuracy, |projected_grad|."""
    curves, figure = study["learning"]["curves"], plt.figure(figsize=(9, 6))
    panels = (
        ("step", "training_accuracy", "training accuracy (mean of both signs)"),
        ("dev_step", "dev_cross_entropy", "cross-entropy on dev (not trained)"),
        ("dev_step", "dev_accuracy", "dev accuracy"),
        ("step", "abs_projected_grad", "|projected_grad|"),
    )
    for place, (x, y, title) in enumerate(panels, 1):
        axes = figure.add_subplot(2, 2, place)
        axes.plot(curves[x], curves[y], marker="." if x == "dev_step" else None)
        axes.set(xlabel="step", title=title)
        axes.grid(alpha=0.3)
    options = ", ".join(f"{name} {study['learning'][name]}" for name in ("batch_size", "eps", "lr"))
    figure.suptitle(f"accuracy as the objective: {options}")
    save(figure, path)


def draw_leaderboard(cells: dict, machine: dict, path: Path) -> None:
    """Test AUC over scored rows, a line for each row of the table with its deviation over seeds; AdamW dashed."""
    figure, axes = plt.subplots(figsize=(8, 5))
    for own in filter(None, cells.values()):
        budgets = sorted(own, key=int)
        rows = [own[budget] for budget in budgets]
        style = {"linestyle": "--", "color": "gray"} if rows[0]["gradients"] else {"marker": "o", "capsize": 3}
        mean, std = ([row["auc"][name] or 0.0 for row in rows] for name in ("mean", "std"))
        axes.errorbar([row["rows"] for row in rows], mean, std, label=rows[0]["title"], **style)
    axes.set(xlabel="rows scored", ylabel="AUC on test", title="what forward passes buy, by row of the leaderboard")
    axes.set_xscale("log")
    grid(axes, machine)
    axes.legend(fontsize=6, loc="lower right")
    save(figure, path)


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    print(path)


def main() -> int:
    """growth_*.svg from growth.json, bench_*.svg from bench.json, the others from the files of their names."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="bench/results/<machine>")
    folder = parser.parse_args().folder
    growth, bench = read(folder / "growth.json", "make bench-growth"), read(folder / "bench.json", "make bench")
    for name in GROWTH:
        draw_growth(name, growth["series"][name], growth["machine"], folder / f"growth_{name}.svg")
    rows = [row["extra_info"] for row in bench["benchmarks"]]
    for op in OPS:
        timed = [r for r in rows if r["op"] == op and "fraction_of_copy" in r and r.get("updates", 1) == 1]
        if not timed:
            raise SystemExit(f"{folder / 'bench.json'} has no row of {op}; run all of `make bench`")
        draw_op(op, timed, bench["machine_info"], folder / f"bench_{op}.svg")
    # measured on a CPU alone
    if (folder / "training_step.json").is_file():
        steps = read(folder / "training_step.json", "make bench-training")
        for name, points in steps["series"].items():
            draw_step(name, points, steps["machine"], folder / f"step_{name.replace(' ', '_')}.svg")
    if (folder / "alternatives.json").is_file():
        methods = read(folder / "alternatives.json", "make bench-alternatives")
        draw_alternatives(methods["rows"], methods["machine"], folder / "alternatives.svg")
    for file in sorted(folder.glob("leaderboard*.json")):
        board = read(file, "make leaderboard")
        cells = {name: own for name, own in board["cells"].items() if own}
        draw_leaderboard(cells, board["machine"], file.with_suffix(".svg"))
    if (folder / "reproduce_small.json").is_file():
        parts = read(folder / "reproduce_small.json", "make reproduce-small")
        if "accuracy objective" in parts:
            draw_accuracy_objective(parts["accuracy objective"], folder / "reproduce_accuracy_objective.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
