"""Everything that a GPU can tell, in one command that needs no network: `make gpu-day`, or `--rehearse` without a GPU.

Each part is a process of its own of at most ten minutes, so one that fails or hangs stops no other. It writes each row
to its JSON as it is measured. A later start leaves alone what went well, and goes on with the rest. A rehearsal runs
the same parts on the CPU, with compiled kernels by `mezo_kernels.ptx` and sizes of nothing: its times mean nothing, and
say so.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import machine
import torch
from gpu_steps import adapter, every_weight
from gpu_steps import engine as engine_steps
from gpu_times import drawing, ops_beside_peers, tiles
from kept import Kept

import mezo_kernels as mk
from mezo_kernels import dispatch

ROOT = Path(__file__).parents[1]
LIMIT = 600  # seconds of a part


def environment(kept: Kept, rehearse: bool) -> dict:
    """What the numbers depend on, and what Triton needs at its first launch."""
    header = Path(sysconfig.get_path("include")) / "Python.h"
    smi = shutil.which("nvidia-smi")
    facts = machine.describe("cpu" if rehearse else "cuda")
    facts |= {"compiler": shutil.which("gcc") or shutil.which("cc"), "Python.h": header.is_file()}
    facts["packages"] = {name: machine._version(name) for name in ("numpy", "transformers", "peft", "sglang")}
    facts["nvidia-smi"] = subprocess.run([smi], capture_output=True, text=True).stdout if smi else None
    return {"ok": rehearse or bool(facts["compiler"] and facts["Python.h"]), **facts}


def verify(kept: Kept, rehearse: bool) -> dict:
    """Every case of every op against the reference, and the seconds that it took to compile and run them."""
    begin = time.perf_counter()
    found = mk.verify(compiled="sm_90") if rehearse else mk.verify("cuda")
    return {
        "ok": all(row.ok for row in found),
        "seconds": time.perf_counter() - begin,
        "checks": {f"{row.backend} {row.check}": row.detail for row in found},
    }


def tests(kept: Kept, rehearse: bool) -> dict:
    """The tests of the kernels that need a GPU; a rehearsal collects them."""
    return _pytest(rehearse, "tests/kernels")


def times(kept: Kept, rehearse: bool) -> dict:
    """Ops beside their peers: seconds of a call by wall clock, and of a replay of a captured graph by device events."""
    with _emulated(rehearse):
        ops_beside_peers(kept, rehearse)
        drawing(kept, rehearse)
        tiles(kept, rehearse)
    return {}


def step(kept: Kept, rehearse: bool) -> dict:
    """Steps on a random Llama of 1.1B parameters in bfloat16 beside forward passes and AdamW: seconds and memory."""
    with _emulated(rehearse):
        every_weight(kept, rehearse)
    return {}


def directions(kept: Kept, rehearse: bool) -> dict:
    """Steps on an adapter of that model with one direction for a batch, and with more."""
    if missing := _missing("peft", "pydantic", "rich"):
        return missing
    with _emulated(rehearse):
        adapter(kept, rehearse)
    return {}


def engine(kept: Kept, rehearse: bool) -> dict:
    """The SGLang runtime: its tests that need a GPU, then steps."""
    if missing := _missing("sglang", "peft", "pydantic", "rich"):
        return missing
    kept.once("tests", lambda: _passed(_pytest(rehearse, "tests/runtimes/sglang/test_gpu.py")))
    engine_steps(kept, rehearse)
    return {}


def _missing(*packages: str) -> dict:
    """Why a part is left out; nothing where all of these are installed."""
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return {"skipped": f"{', '.join(absent)} not installed"} if absent else {}


def _pytest(rehearse: bool, *places: str) -> dict:
    options = ["-m", "gpu", "-p", "no:cacheprovider", *(["--collect-only"] if rehearse else [])]
    command = [sys.executable, "-m", "pytest", *options, *places]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"ok": run.returncode == 0, "output": run.stdout[-8000:] + run.stderr[-2000:]}


def _passed(found: dict) -> dict:
    if not found["ok"]:
        raise RuntimeError(found["output"])
    return found


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


PARTS = {part.__name__: part for part in (environment, verify, tests, times, step, directions, engine)}


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
    kept = Kept(path, {"rehearsal": rehearse})
    try:
        found = part(kept, rehearse)
    except Exception as error:
        found = {"ok": False, "error": f"{type(error).__name__}: {error}"}
    found = kept.end(**found, seconds_of_part=round(time.perf_counter() - begin, 2))
    return 0 if found["ok"] else 1


def _all(folder: Path, rehearse: bool) -> int:
    failed = False
    for name in PARTS:
        path = folder / f"gpu_day_{name}.json"
        if not path.exists() or not json.loads(path.read_text())["ok"]:
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
