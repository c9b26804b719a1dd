"""The GPU day's times: ops beside their peers and beside what bounds them, by wall clock and by replays of a graph."""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from unittest import mock

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
PEERS = (
    "ours", "original loop", "torch._foreach, stored z", "torch.compile of the reference", "Triton tutorial",
)  # fmt: skip
# what was chosen by counting instructions and registers, to be chosen by time: elements of a program, and whether the
# registers of rules are limited
TILES = ((1024, True), (2048, True), (2048, False), (4096, True), (4096, False))
TILED = {"perturb": "bfloat16", "step": "bfloat16", "momentum": "float32", "adamw": "float32", "sign": "float32"}


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
                for name in PEERS[: -1 if rehearse else None]:
                    row = {"op": op, "shape": shape, "dtype": dtype, "provider": name}

                    def measure(op=op, shape=shape, sizes=sizes, dtype=dtype, name=name, row=row):
                        return row | _timed(op, case_of(shape, sizes, FLOATS[dtype], device), dtype, name, device)

                    kept.once(
                        " ".join(row.values()), measure, needed=name == "ours" and shape == next(iter(SIZES[rehearse]))
                    )


def drawing(kept: Kept, rehearse: bool) -> None:
    """A row for each size: z drawn and not kept, which no op that draws can be faster than.

    Args:
        kept: where the rows go.
        rehearse: on the CPU, of nothing.
    """
    device = "cpu" if rehearse else "cuda"
    for shape, sizes in SIZES[rehearse].items():
        if shape.startswith("flat"):
            (elements,) = sizes["w"]
            kept.once(f"draw limit {shape}", lambda elements=elements: _drawn(elements, device))


def _drawn(elements: int, device: str) -> dict:
    from draw_limit import drawer  # Triton is imported where it is timed

    run, sums = drawer(elements, device)
    row = {"elements": elements} | _seconds(run, device)
    # of so many z the sum is normal, with their number as its variance
    return row | {"sum_by_its_deviation": sums.double().sum().item() / elements**0.5}


def tiles(kept: Kept, rehearse: bool) -> None:
    """A row for each op and size of a program, of one large parameter.

    Args:
        kept: where the rows go.
        rehearse: on the CPU, of nothing.
    """
    device, elements = ("cpu", 4096) if rehearse else ("cuda", 1 << 28)
    for op, dtype in TILED.items():
        for size, limited in TILES:
            if not limited and op != "momentum":
                continue

            def measure(op=op, dtype=dtype, size=size, limited=limited):
                with _tile(size, limited):
                    case = case_of("flat", {"w": (elements,)}, FLOATS[dtype], device)
                    work = providers.by_rule(case, op) if op in providers.RULES else providers.ours(op, case)
                    return {"elements": elements} | _seconds(work.run, device)

            registers = "" if limited else ", registers not limited"
            kept.once(f"{op} {dtype}, programs of {size}{registers}", measure)


@contextlib.contextmanager
def _tile(size: int, limited: bool) -> Iterator[None]:
    from mezo_kernels.triton import rules, table

    registers = rules.REGISTERS if limited else (None,) * len(rules.REGISTERS)
    with mock.patch.object(table, "BLOCK_SIZE", size), mock.patch.object(rules, "REGISTERS", registers):
        yield


def _seconds(run: Callable, device: str) -> dict:
    (times,) = rows.in_turn([run], device)
    replayed = {"replay_seconds": _replayed(run)} if device == "cuda" else {}
    return {"seconds": statistics.median(times)} | replayed


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
