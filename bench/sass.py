"""What the kernels' machine code for sm_90 can reach at most, by counting: a model, no measurement.

An SM issues four instructions of 32 threads in a clock, and memory moves so many bytes a second. Neither limit is ever
reached whole: waiting for memory, for a result or for a busy unit is not in the model. No GPU is needed.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).parents[1]
GPUS = {  # NVIDIA's data sheets of the SXM boards: multiprocessors, boost clock in Hz, bytes of memory a second
    "H100": (132, 1.755e9, 3.35e12),
    "H200": (132, 1.755e9, 4.8e12),
}
ELEMENTS = (1024, 4096)  # of a program, beside those of runs
LANES, WARPS, REGISTERS = 128, 64, 16384  # threads' instructions a clock, warps of an SM, registers of a fourth of it


def occupancy(registers: int) -> float:
    """Share of an SM's warps that find room, four to a program.

    >>> occupancy(54), occupancy(32)
    (0.5625, 1.0)
    """
    of_a_warp = 32 * -(-registers // 8) * 8
    return min(4 * (REGISTERS // of_a_warp), WARPS) / WARPS


def limits(slots: float, nbytes: int) -> dict[str, dict[str, float]]:
    """Elements a second, in billions, that issue and memory allow on each GPU.

    Args:
        slots: instructions of a thread for each element.
        nbytes: read and written for each element.
    """
    return {
        gpu: {"issue": round(sms * clock * LANES / slots / 1e9, 1), "memory": round(memory / nbytes / 1e9, 1)}
        for gpu, (sms, clock, memory) in GPUS.items()
    }


def counted(*options: str) -> list[dict]:
    """What tests/kernels/aot.py reports of the kernels for sm_90."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, ROOT / "tests" / "kernels" / "aot.py", "sm_90", *options]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env | {"PYTHONPATH": str(ROOT)}, check=True)
    return json.loads(run.stdout)["reports"]


def _figures(kernel: dict) -> dict:
    spilled = {"spills": kernel["spills"]} if kernel["spills"] else {}
    row = {"slots": round(kernel["slots"], 1), "registers": kernel["registers"]}
    return row | {"occupancy": occupancy(kernel["registers"])} | spilled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    output = parser.parse_args().output
    others = {n: {kernel["variant"]: kernel for kernel in counted("--elements", str(n))} for n in ELEMENTS}
    rows = []
    for kernel in counted():
        name = kernel["variant"]
        row = {"kernel": name} | _figures(kernel)
        row |= {f"programs_of_{n}": _figures(others[n][name]) for n in ELEMENTS if name in others[n]}
        if kernel["read"] is not None:
            row["limits"] = limits(kernel["slots"], kernel["read"] + kernel["written"])
        rows.append(row)
        print(f"{row['kernel']:24} {row['slots']:6.1f} slots {row['registers']:4} registers {row['occupancy']:5.0%}")
    about = "counted in machine code, a model: nothing was run"
    found = {"about": about, "triton": triton.__version__, "target": "sm_90", "rows": rows}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
