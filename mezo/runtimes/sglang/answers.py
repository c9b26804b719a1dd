"""The engine's answers to requests: what was asked for, what it says, and which answers are none."""

from collections.abc import Sequence

from mezo.errors import RunError
from mezo.method.sampling import Sampling
from mezo.runtimes.base import TokenCount
from mezo.runtimes.rows import Row

SCORE_ONLY = {"max_new_tokens": 0, "temperature": 0.0}


def sampling_of(
    examples: Sequence[int],
    max_new_tokens: int,
    stop: Sequence[str],
    ends: frozenset[int],
    sampling: Sampling | None = None,
) -> dict | list[dict]:
    """Sampling parameters of requests for texts.

    Args:
        examples: number of each request's example in its split.
        max_new_tokens: most tokens of a text.
        stop: a text ends before the first of these.
        ends: token ids that end a text.
        sampling: with the seed that `inside/sampling.py` draws a request's random numbers from; None takes the most
            likely token each time.
    Returns:
        The same for all requests, or for each its own.
    """
    common = {"max_new_tokens": max_new_tokens, "stop": list(stop), "stop_token_ids": sorted(ends)}
    if sampling is None:
        return {**common, "temperature": 0.0}
    drawn = {"temperature": sampling.temperature, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
    return [{**common, **drawn, "sampling_seed": sampling.seed_of(i)} for i in examples]


def count_tokens(ids: Sequence[int], answer: dict, count: TokenCount) -> None:
    """Add a request's tokens as the engine counts them; a text's last token is never run.

    Args:
        ids: token ids that were sent.
        answer: the engine's.
        count: what is added to.
    Raises:
        RunError: the engine gave the request up.
    """
    meta = answer["meta_info"]
    if meta["finish_reason"]["type"] not in ("length", "stop") or meta["prompt_tokens"] != len(ids):
        raise RunError(f"the SGLang engine did not score a request: {meta['finish_reason']}; resume the run")
    tokens = meta["prompt_tokens"] + max(meta["completion_tokens"] - 1, 0)
    count.scored += tokens
    count.computed += tokens - meta["cached_tokens"]


def start_of(row: Row) -> int:
    """From where log-probabilities are wanted; -1, after the last token alone, leaves the whole cache usable."""
    return -1 if len(row.positions) == 1 else row.positions[0]


def table_of(row: Row, answer: dict) -> list[dict[int, float]]:
    """Log-probability by token at each scored position."""
    meta = answer["meta_info"]
    inner = meta["input_token_ids_logprobs"][1:] if len(row.positions) > 1 else []
    positions = [*inner, meta["output_token_ids_logprobs"][0]]
    if len(positions) != len(row.positions):
        raise RunError(
            f"the SGLang engine scored {len(positions)} positions of {len(row.positions)}; use another version"
        )
    return [{token: value for value, token, _ in position} for position in positions]
