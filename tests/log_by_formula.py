"""A run's log against the formulas of its update rule, written out anew: no function that wrote the log is used."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import rankdata

from mezo_kernels import perturbation_seed, standard_normal


def follows(run: str | Path) -> int:
    """Assert that every line follows from its losses and config.json by the formulas; return the number of steps."""
    config = json.loads(Path(run, "config.json").read_text())
    header, *lines = [json.loads(line) for line in Path(run, "trajectory.jsonl").read_text().splitlines()]
    moments = {}  # of subspace-adam
    before = []  # lengths of the steps that changed something
    for step, line in enumerate(lines):
        assert line["step"] == step
        n = len(line["seeds"])
        drawn = step - step % config["refresh_every"] if config["update_rule"] == "subspace-adam" else step
        assert line["seeds"] == [perturbation_seed(config["seed"], drawn, k) for k in range(n)]
        if line["skipped"]:
            assert (line["coefficients"], line["decay"]) == ([0.0] * n, 1.0)
            continue
        plus, minus = np.array(line["loss_plus"]), np.array(line["loss_minus"])
        if config["update_rule"] == "guided":
            assert minus == pytest.approx(np.full(n, plus.mean()), rel=1e-12)
        one_sided = config["update_rule"] in ("fzoo", "one-sided", "guided")
        distance = config["eps"] if one_sided else 2 * config["eps"]
        assert line["projected_grads"] == pytest.approx(list((plus - minus) / distance), rel=1e-12)
        coefficients, decay = _expected(config, header, line, moments)
        factor, length = 1.0, np.linalg.norm(coefficients)
        if config.get("max_step_ratio") and len(before) >= 20:
            factor = min(1.0, config["max_step_ratio"] * np.median(before[-100:]) / max(length, 1e-300))
        assert line.get("shortened", 1.0) == pytest.approx(factor, rel=1e-9)
        assert line["coefficients"] == pytest.approx([factor * c for c in coefficients], rel=1e-9)
        before += [np.linalg.norm(line["coefficients"])] * any(line["coefficients"])
        assert line["decay"] == pytest.approx(decay, rel=1e-12)
        if config["update_rule"] in ("momentum", "adam", "adamw", "sign"):
            assert line["lr"] == pytest.approx(_rate(config, step), rel=1e-12)
    return len(lines)


def _expected(config: dict, header: dict, line: dict, moments: dict) -> tuple[list[float], float]:
    """Coefficients and decay of a step."""
    rule, lr, n = config["update_rule"], _rate(config, line["step"]), len(line["seeds"])
    grads, decay = np.array(line["projected_grads"]), 1 - lr * config["weight_decay"]
    both = np.array(line["loss_plus"] + line["loss_minus"])
    if rule == "ranks":
        grads = -np.diff(rankdata(both).reshape(2, n), axis=0)[0] / (2 * n - 1)
    if rule == "guided":
        elite, above, below = math.floor(config["elite_share"] * n), *line["tried"]
        place = rankdata(line["loss_plus"], method="ordinal")
        slope = (above - below) / (2 * config["eps"])
        slope = np.clip(slope, -config["clip"], config["clip"]) if config["clip"] else slope
        grads = n * slope * np.where(place <= elite, 1 / elite, -1 / (n - elite))
    elif config["clip"]:
        grads = np.clip(grads, -config["clip"], config["clip"])
    if rule == "subspace-adam":
        grads = n * _adam_step(config, line["step"], grads, moments)
    if config["normalise_z"]:
        grads = grads / [_length(header["shapes"], seed) for seed in line["seeds"]]
    if rule == "aligned":
        z = np.round(np.stack([_direction(header["shapes"], seed) for seed in line["seeds"]]) * 2**17) / 2**17
        grads = np.linalg.solve(z @ z.T, grads) * np.mean(np.square(z).sum(1))
    if rule in ("momentum", "adam", "adamw", "sign"):
        return list(grads / n), 1.0 if rule == "adam" else decay
    if rule == "fzoo":
        if len(set(line["loss_plus"])) == 1:
            return [0.0] * n, 1.0
        return list(lr * grads / n / np.std(line["loss_plus"], ddof=1)), decay
    if rule == "z-score":
        return ([0.0] * n, 1.0) if np.ptp(both) == 0 else (list(lr * grads / n / np.std(both, ddof=1)), decay)
    if rule == "conservative":
        here, after, against = line["tried"]
        return [lr * grads[0] if after < min(here, math.nextafter(against, math.inf)) else
                -lr * grads[0] if against < here else 0.0], decay  # fmt: skip
    return list(lr * grads / n), decay


def _adam_step(config: dict, step: int, grads: np.ndarray, moments: dict) -> np.ndarray:
    """Adam's step of the slopes; first moments are of the subspace, second ones of all steps that changed theta."""
    subspace = step // config["refresh_every"]
    moments.setdefault("second", []).append(grads)
    moments.setdefault(subspace, []).append(grads)
    means = []
    for kept, beta in ((np.array(moments[subspace]), config["beta1"]), (np.square(moments["second"]), config["beta2"])):
        weights = beta ** np.arange(len(kept))[::-1]
        means.append(weights @ kept / weights.sum())  # the bias correction makes it a weighted mean
    return means[0] / (np.sqrt(means[1]) + config["adam_eps"])


def _rate(config: dict, step: int) -> float:
    """The learning rate of a step."""
    warmup, lr = config["warmup_steps"], config["lr"]
    if step < warmup:
        return lr * step / warmup
    left = (config["steps"] - step) / (config["steps"] - warmup)
    return lr * {"constant": 1, "linear": left, "cosine": math.sin(math.pi / 2 * left) ** 2}[config["lr_schedule"]]


def _length(shapes: dict[str, list[int]], seed: int) -> float:
    """Root mean square of a z over all parameters."""
    return float(np.sqrt(np.mean(_direction(shapes, seed) ** 2)))


def _direction(shapes: dict[str, list[int]], seed: int) -> np.ndarray:
    """z over all parameters."""
    z = np.concatenate([standard_normal(seed, name, 0, math.prod(shape)).numpy() for name, shape in shapes.items()])
    return z.astype(np.float64)
