"""What a result was measured on. Run: python bench/machine.py prints the folder that results of this machine go to."""

import os
import platform
import re
from pathlib import Path

import numba
import torch


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def describe() -> dict:
    """CPU, cores, threads, versions, and the load average: what a time depends on."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "load": os.getloadavg()[0],
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def results_folder() -> Path:
    """bench/results/<machine>."""
    slug = re.sub(r"[^a-z0-9]+", "-", _cpu_model().lower()).strip("-")
    return Path(__file__).parent / "results" / f"cpu-{os.cpu_count()}core-{slug}"


if __name__ == "__main__":
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(folder)
