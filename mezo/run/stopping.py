"""When a run ends before its last step. Pure functions of what is logged, so a resumed run ends where it would have."""

from collections.abc import Sequence

from mezo.run.trajectory import StepRecord

WINDOW = 100  # steps whose mean loss is looked at
WARNED = 2.0  # ratio to the loss of the start, from where it is warned of


def stalled(metrics: Sequence[dict], patience: int) -> bool:
    """True if none of the last `patience` dev evaluations was better than all before; never where patience is 0.

    >>> rows = [{"split": "dev", "is_best": best} for best in (True, True, False, False)]
    >>> stalled(rows, 2), stalled(rows, 3), stalled(rows, 0)
    (True, False, False)
    """
    best = [row["is_best"] for row in metrics if row["split"] == "dev"]
    return 0 < patience < len(best) and not any(best[-patience:])


def loss_ratio(records: Sequence[StepRecord]) -> float | None:
    """Mean loss of the last whole window of steps over that of the first.

    Returns:
        None below two windows, where a window has no finite loss, and where the loss is not positive (the accuracy).
    """
    windows = [records[:WINDOW], records[: len(records) // WINDOW * WINDOW][-WINDOW:]]
    losses = [[x for r in part if not r.update.skipped for x in r.losses.plus + r.losses.minus] for part in windows]
    if len(records) < 2 * WINDOW or not all(losses):
        return None
    first, last = (sum(part) / len(part) for part in losses)
    return last / first if first > 0 else None
