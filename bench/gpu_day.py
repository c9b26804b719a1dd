"""Everything that a GPU can tell, in one command that needs no network: `make gpu-day`, or `--rehearse` without a GPU.

Each part is a process of its own of at most ten minutes and writes its JSON as it ends, so one that fails or hangs
stops no other. Parts that went well are not run again. A rehearsal runs the same
parts on the CPU, with compiled kernels by `mezo_kernels.ptx` and sizes of nothing: its times mean nothing, and say so.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import machine
import providers
import rows
import torch
from shapes import FLOATS, SHAPES, case_of

import mezo_kernels as mk
from mezo_kernels import dispatch

ROOT = Path(__file__).parents[1]
LIMIT = 600  # seconds of a part
SIZES = {
    False: {f"flat-{n}": {"w": (n,)} for n in (1 << 20, 1 << 24, 1 << 28, 1 << 30)},
    True: {"flat": {"w": (4096,)}},
}
MODEL = {
    False: {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    True: {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
}


def environment(rehearse: bool) -> dict:
    """What the numbers depend on, and what Triton needs at its first launch."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    smi = shutil.which("nvidia-smi")
    facts = machine.describe("cpu" if rehearse else "cuda")
    facts |= {"compiler": shutil.which("gcc") or shutil.which("cc"), "Python.h": header.is_file()}
    facts["packages"] = {name: machine._version(name) for name in ("numpy", "transformers", "peft", "sglang")}
    facts["nvidia-smi"] = subprocess.run([smi], capture_output=True, text=True).stdout if smi else None
    facts["ok"] = rehearse or bool(facts["compiler"] and facts["Python.h"])
    return facts


def verify(rehearse: bool) -> dict:
    """Every case of every op against the reference, and the seconds that it took to compile and run them."""
    begin = time.perf_counter()
    found = mk.verify(compiled="sm_90") if rehearse else mk.verify("cuda")
    return {
        "ok": all(row.ok for row in found),
        "seconds": time.perf_counter() - begin,
        "checks": {f"{row.backend} {row.check}": row.detail for row in found},
    }


def tests(rehearse: bool) -> dict:
    """The tests of the kernels that need a GPU; a rehearsal collects them."""
    options = ["-m", "gpu", "-p", "no:cacheprovider", *(["--collect-only"] if rehearse else [])]
    return _pytest(*options, "tests/kernels")


def engine(rehearse: bool) -> dict:
    """The tests of the SGLang runtime that need a GPU, where SGLang is installed."""
    if importlib.util.find_spec("sglang") is None:
        return {"ok": True, "skipped": "sglang is not installed"}
    options = ["-m", "gpu", "-p", "no:cacheprovider", *(["--collect-only"] if rehearse else [])]
    return _pytest(*options, "tests/runtimes/sglang/test_gpu.py")


def _pytest(*arguments: str) -> dict:
    run = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, capture_output=True, text=True)
    return {"ok": run.returncode == 0, "output": run.stdout[-8000:] + run.stderr[-2000:]}


def times(rehearse: bool) -> dict:
    """Ops beside their peers: seconds of a call by wall clock, and of a replay of a captured graph by device events."""
    device, found = "cpu" if rehearse else "cuda", []
    loras = {} if rehearse else {name: SHAPES[name] for name in ("lora-r8-qv", "lora-r16-all")}
    with _emulated(rehearse):
        for shape, sizes in (SIZES[rehearse] | loras).items():
            for dtype in ("float32", "bfloat16"):
                found += _rows(shape, sizes, dtype, device)
    return {"ok": all("error" not in row for row in found), "rows": found}


def _rows(shape: str, sizes: dict, dtype: str, device: str) -> list[dict]:
    made = []
    for op in providers.PASSES:
        for name in ("ours", "original loop", "torch._foreach, stored z", "Triton tutorial"):
            if name == "Triton tutorial" and device == "cpu":
                continue
            row = {"op": op, "shape": shape, "dtype": dtype, "provider": name}
            try:  # a size may not fit
                made.append(row | _timed(op, case_of(shape, sizes, FLOATS[dtype], device), dtype, name, device))
            except Exception as error:
                ours = name == "ours" and not isinstance(error, torch.OutOfMemoryError)
                made.append(row | {"error" if ours else "not measured": f"{type(error).__name__}: {error}"})
    return made


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


def step(rehearse: bool) -> dict:
    """A step that trains every weight of a random Llama (1.1B parameters) in bfloat16, beside two forward passes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from mezo import MeZO

    device = "cpu" if rehearse else "cuda"
    with _emulated(rehearse):
        config = LlamaConfig(**MODEL[rehearse], vocab_size=32000 if not rehearse else 64)
        model = LlamaForCausalLM(config).to(device, torch.bfloat16).eval()
        tokens = torch.randint(config.vocab_size, (8, 16 if rehearse else 256), device=device)

        @torch.no_grad()
        def loss():
            return model(tokens, labels=tokens, use_cache=False).loss

        two = statistics.median(*rows.in_turn([lambda: (loss(), loss())], device))
        inference = None if rehearse else torch.cuda.max_memory_allocated()
        optimizer = MeZO(model.named_parameters(), lr=1e-9, eps=1e-3, seed=0)
        whole = statistics.median(*rows.in_turn([lambda: optimizer.step(loss)], device))
        peak = None if rehearse else torch.cuda.max_memory_allocated()
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "two_forward_passes": two, "step": whole}
    return facts | {"ok": True, "inference_bytes": inference, "step_bytes": peak}


@contextlib.contextmanager
def _emulated(rehearse: bool):
    """In a rehearsal the backend `triton` is emulated, and the default for CPU tensors."""
    if not rehearse:
        yield
        return
    from mezo_kernels.ptx import emulated

    with emulated("sm_90"):
        for name, default_on in (("numba", ""), ("triton", "cpu")):
            dispatch.BACKENDS[name] = replace(dispatch.BACKENDS[name], default_on=default_on)
        yield


PARTS = {part.__name__: part for part in (environment, verify, tests, times, step, engine)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny sizes")
    parser.add_argument("--output-dir", type=Path, help="by default bench/results/<gpu>, of a rehearsal /rehearsal")
    parser.add_argument("--part", choices=PARTS, help="run this one here, and write its JSON")
    options = parser.parse_args()
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("no GPU that torch sees; --rehearse runs everything on the CPU")
    default = ROOT / "bench" / "results" / "rehearsal" if options.rehearse else machine.results_folder("cuda")
    folder = options.output_dir or default
    folder.mkdir(parents=True, exist_ok=True)
    if options.part:
        return _write(folder / f"gpu_day_{options.part}.json", PARTS[options.part], options.rehearse)
    return _all(folder, options.rehearse)


def _write(path: Path, part: Callable, rehearse: bool) -> int:
    begin = time.perf_counter()
    try:
        found = part(rehearse)
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    found |= {"rehearsal": rehearse, "seconds_of_part": round(time.perf_counter() - begin, 2)}
    path.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if found["ok"] else 1


def _all(folder: Path, rehearse: bool) -> int:
    failed = False
    for name in PARTS:
        path = folder / f"gpu_day_{name}.json"
        if not path.exists() or not json.loads(path.read_text())["ok"]:
            path.unlink(missing_ok=True)
            command = [sys.executable, __file__, "--part", name, "--output-dir", folder]
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(
                    [*command, *(["--rehearse"] if rehearse else [])],
                    timeout=LIMIT,
                    env=os.environ | {"PYTHONPATH": str(ROOT)} | ({"TRITON_INTERPRET": "0"} if rehearse else {}),
                )
        found = json.loads(path.read_text()) if path.exists() else {"ok": False, "error": "it left no result"}
        failed |= not found["ok"]
        print(f"{name:12} {'ok' if found['ok'] else 'FAILED':7} {found.get('error', '')}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
