"""What a result was measured on. Run: python bench/machine.py [cpu or cuda] prints the folder that results go to."""

import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found.group(1) if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def describe(device: str = "cpu") -> dict:
    """CPU, cores, threads, GPU, versions, and the load average: what a time depends on."""
    facts = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": _version("numba"),
        "triton": _version("triton"),
        "load": os.getloadavg()[0],
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }
    if device != "cpu":
        facts |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda, "hip": torch.version.hip}
    return facts


def results_folder(device: str = "cpu") -> Path:
    """bench/results/<machine>; a GPU's name is the machine's."""
    name = _cpu_model() if device == "cpu" else torch.cuda.get_device_name()
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return Path(__file__).parent / "results" / (f"cpu-{os.cpu_count()}core-{slug}" if device == "cpu" else slug)


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else "cpu"
    if where == "cuda" and not torch.cuda.is_available():
        sys.exit("no GPU that torch sees: torch.cuda.is_available() is False; run `make bench` for the CPU")
    folder = results_folder(where)
    folder.mkdir(parents=True, exist_ok=True)
    print(folder)
