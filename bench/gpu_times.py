"""The GPU day's times: ops beside their peers, by wall clock and by replays of a captured graph."""

import statistics
from collections.abc import Callable

import providers
import rows
import torch
from kept import Kept
from shapes import FLOATS, SHAPES, case_of

SIZES = {
    False: {
        **{f"flat-{n}": {"w": (n,)} for n in (1 << 20, 1 << 24, 1 << 28, 1 << 30)},
        **{name: SHAPES[name] for name in ("lora-r8-qv", "lora-r16-all")},
    },
    True: {"flat": {"w": (4096,)}},
}
PEERS = ("ours", "original loop", "torch._foreach, stored z", "Triton tutorial")


def ops_beside_peers(kept: Kept, rehearse: bool) -> None:
    """A row for each op, shape, dtype and provider.

    Args:
        kept: where the rows go.
        rehearse: on the CPU, of nothing.
    """
    device = "cpu" if rehearse else "cuda"
    for shape, sizes in SIZES[rehearse].items():
        for dtype in ("float32", "bfloat16"):
            for op in providers.PASSES:
                for name in PEERS[: 3 if rehearse else 4]:
                    row = {"op": op, "shape": shape, "dtype": dtype, "provider": name}

                    def measure(op=op, shape=shape, sizes=sizes, dtype=dtype, name=name, row=row):
                        return row | _timed(op, case_of(shape, sizes, FLOATS[dtype], device), dtype, name, device)

                    kept.once(
                        " ".join(row.values()), measure, needed=name == "ours" and shape == next(iter(SIZES[rehearse]))
                    )


def _timed(op: str, case, dtype: str, name: str, device: str) -> dict:
    nbytes = rows.bytes_of(op, case.elements, FLOATS[dtype])
    run = providers.PROVIDERS[name](op, case).run
    seconds, copy = map(statistics.median, rows.in_turn([run, rows.copier(nbytes, device)], device))
    row = {"elements": case.elements, "bytes": nbytes, "seconds": seconds, "copy_seconds": copy}
    if device == "cuda" and name == "ours":
        row |= {"replay_seconds": _replayed(run), "copy_replay_seconds": _replayed(rows.copier(nbytes, device))}
    return row


def _replayed(run: Callable, calls: int = 10, rounds: int = 9) -> float:
    """Median seconds of a call out of a captured graph of several, without any time of the host."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    found = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / calls)
    return statistics.median(found)
