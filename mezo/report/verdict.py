"""What a finished run's own numbers say of it in words, and what to do then."""

import math
from collections.abc import Mapping
from typing import Any

from mezo.method.objectives import standard_error

MUCH_NOISE = 1.0  # times the signal
STILL = 0.9  # of the fall of the dev loss: if less of it was done a quarter before the end, it goes on
RISEN = 0.25  # of that fall, lost again
FEWEST = 4  # evaluations to judge by


def verdicts(result: Mapping[str, Any], run: str = "RUN") -> list[str]:
    """A sentence on each thing that the run knows of itself: whether it still learns, its signal, its dev set.

    Args:
        result: what result.json holds; what an older program did not write is not judged.
        run: its directory, for the commands.
    """
    return [text for text in (_learning(result, run), _signal(result), _dev_size(result)) if text]


def _learning(result: Mapping[str, Any], run: str) -> str:
    """From the dev losses, or rewards where these are trained: getting better to the end, at rest, or worse again."""
    rewarded = bool(result["dev"]) and all(row.get("reward") is not None for row in result["dev"])
    what, key, sign, better, worse = (
        ("reward", "reward", -1, "rising", "fell") if rewarded else ("loss", "loss", 1, "falling", "rose")
    )
    points = [(sign * row[key], row["step"]) for row in result["dev"] if row.get(key) is not None]
    if len(points) < FEWEST:
        return ""
    losses = [loss for loss, _ in points]
    first, last, (lowest, at) = losses[0], losses[-1], min(points)
    shown = lambda loss: f"{sign * loss:.4f}"  # noqa: E731
    if lowest == first:
        never = f"not learning: the dev {what} was never better than its first, {shown(first)}"
        return f"{never}; find --lr and --eps by mezo tune"
    if last - lowest > RISEN * (first - lowest):
        since = f"the dev {what} was best at step {at}, {shown(lowest)}, and {worse} to {shown(last)}"
        return f"{since}: lower --lr, or stop there"
    before = min(losses[: -max(1, len(losses) // 4)])
    if last == lowest and first - before < STILL * (first - last):
        longer = f"mezo train --resume {run} --steps {2 * result['steps']}"
        still = f"learning: the dev {what} was still {better} at the end, {shown(first)} to {shown(last)}"
        return f"{still}; go on with {longer}"
    end = "little is gained any more" if last == lowest else "and is at rest"
    return f"learned: the dev {what} went from {shown(first)} to {shown(lowest)} at step {at}, {end}"


def _signal(result: Mapping[str, Any]) -> str:
    """Of projected_grad: what is left of its size without the chance of the batch, against that chance."""
    size, noise = result.get("projected_grad_rms"), result.get("projected_grad_batch_error")
    if not size or not noise:
        return ""
    signal = math.sqrt(max(0.0, (size - noise) * (size + noise)))
    if signal < MUCH_NOISE * noise:
        return (
            f"signal below noise: projected_grad is {size:.3g} in size, and another batch alone changes it by"
            f" {noise:.3g}: a larger --batch-size or more --num-perturbations would make steps steadier"
        )
    return f"the signal is {signal / noise:.1f} times the noise that the batch puts on projected_grad"


def _dev_size(result: Mapping[str, Any]) -> str:
    """Whether the gain in dev accuracy is more than the chance of so few examples; not where texts are judged."""
    if any(row.get(name) is not None for row in result["dev"] for name in ("reward", "exact_match")):
        return ""  # these choose the best step, and accuracy has no part in it
    n = result.get("examples", {}).get("dev")
    accuracies = [row["accuracy"] for row in result["dev"] if row.get("accuracy") is not None]
    if not n or len(accuracies) < 2:
        return ""
    best = max(accuracies)
    error, gain = standard_error(best, n), best - accuracies[0]
    if gain > 2 * error:
        return ""
    small = f"dev is small: the standard error of its accuracy is {100 * error:.1f} points with {n} examples"
    if gain <= 0:
        return f"{small}, and no step had a better one than the first: take more examples to see smaller gains"
    return (
        f"{small}, the best is {100 * gain:.1f} above the first, which may be chance: take more examples (among steps"
        " so near each other the loss chooses, unless --best-metric is accuracy)"
    )
