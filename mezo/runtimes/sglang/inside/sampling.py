"""Sampled texts of the trainer: tokens by random numbers that both signs of a step share (`mezo/method/sampling.py`).

SGLang (0.5.23) reads a request's seed in its deterministic mode alone, which a CPU does not have, and draws by a kernel
that CPUs lack. Its random numbers would also be others than those of the hf runtime.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mezo.method.sampling import sampled
from mezo.runtimes.sglang.inside.worker import seen

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
    from sglang.srt.managers.scheduler import Scheduler

_running: list["Req"] = []


def see_batch(scheduler: "Scheduler", batch: "ScheduleBatch", *args, **kwargs) -> None:
    """Before `Scheduler.run_batch`: remember whose tokens are sampled, row by row."""
    _running[:] = batch.reqs


def sample(original: Callable, sampler: object, probabilities: torch.Tensor, *args, **kwargs) -> tuple:
    """Around `Sampler._sample_from_probs`: the trainer's requests that have a seed get the tokens that follow from it.

    Args:
        original: the method.
        sampler: whose method it is.
        probabilities: (rows, vocabulary), by each request's temperature.
        args, kwargs: its other arguments.
    Returns:
        Tokens (rows,) int32, and what the method tells of the others' sampling.
    """
    if len(_running) != len(probabilities):
        raise RuntimeError(f"{len(probabilities)} rows are sampled for {len(_running)} requests")
    rows = [row for row, req in enumerate(_running) if _is_ours(req)]
    drawn = _drawn(probabilities, rows) if rows else None
    if len(rows) == len(_running):
        return drawn, None
    tokens, capture = original(sampler, probabilities, *args, **kwargs)
    if rows:
        tokens[rows] = drawn
    return tokens, capture


def _drawn(probabilities: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Tokens of some rows, int32."""
    reqs = [_running[row] for row in rows]
    seeds, places = [req.sampling_params.sampling_seed for req in reqs], [len(req.output_ids) for req in reqs]
    return sampled(probabilities[rows], seeds, places).int()


def _is_ours(req: "Req") -> bool:
    return req.lora_id in seen.own and req.sampling_params.sampling_seed is not None
