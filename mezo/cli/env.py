"""`mezo env`: what a run meets on this machine, for bug reports."""

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from mezo.cli.parsing import parse

PACKAGE = "mezo-kernels"
INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm")
"""Flags of /proc/cpuinfo that decide how fast products and kernels are."""
SET = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "ONEDNN_DEFAULT_FPMATH_MODE")
"""Variables of the environment that change what is computed, or how fast."""


@dataclass(frozen=True)
class Options:
    """Print versions, devices, instruction sets and backends, and what is missing with the command that installs it."""


def main(argv: list[str]) -> int:
    """Run the command; return its exit code."""
    parse(argv, "mezo env", Options)
    sections = {"system": _system(), "libraries": _libraries(), "devices": _devices(), "backends": _backends()}
    for title, lines in sections.items():
        print(f"{title}:")
        for name, value in lines:
            print(f"  {name:<16} {value}")
    return 0


def _system() -> Iterator[tuple[str, str]]:
    yield "mezo", version(PACKAGE)
    yield "Python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", platform.platform()
    facts = _cpuinfo()
    flags = set(facts.get("flags", facts.get("Features", "")).split())
    yield "CPU", f"{facts.get('model name', platform.machine())}, {os.cpu_count()} cores"
    yield "instructions", ", ".join(name for name in INSTRUCTIONS if name in flags) or "none that are looked for"
    yield "memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"
    if Path("/dev/shm").is_dir():
        yield "/dev/shm", f"{shutil.disk_usage('/dev/shm').free / 2**30:.2f} GiB free"
    yield from ((name, os.environ[name]) for name in SET if name in os.environ)


def _cpuinfo() -> dict[str, str]:
    """Facts of the first CPU; {} where the system has no such file."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def _libraries() -> Iterator[tuple[str, str]]:
    """Each library that the package asks for, with its version, or the command that installs it."""
    from packaging.requirements import Requirement  # what huggingface_hub brings

    for text in requires(PACKAGE) or []:
        needed = Requirement(text)
        extra = next((name for name in ("sglang", "trainer", "quantization") if _is_of(needed, name)), "")
        if needed.marker and not extra and not needed.marker.evaluate({"extra": ""}):
            continue  # tools of developers, and what other systems need
        yield needed.name, _state(needed, extra)


def _is_of(needed, extra: str) -> bool:
    """Whether a requirement belongs to an extra alone."""
    return (
        bool(needed.marker) and needed.marker.evaluate({"extra": extra}) and not needed.marker.evaluate({"extra": ""})
    )


def _state(needed, extra: str) -> str:
    """A library's version, and what is wrong with it."""
    command = f"pip install '{PACKAGE}[{extra}]'" if extra else f"pip install '{needed.name}{needed.specifier}'"
    try:
        found = version(needed.name)
    except PackageNotFoundError:
        return f"missing{', which few need' if extra else ''}: {command}"
    if not needed.specifier.contains(found, prereleases=True):
        return f"{found}, needed is {needed.specifier}: {command}"
    return found


def _devices() -> Iterator[tuple[str, str]]:
    import torch

    built = torch.version.cuda or torch.version.hip
    yield "torch built for", f"{'CUDA' if torch.version.cuda else 'ROCm'} {built}" if built else "CPUs alone"
    yield "cpu", f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    for i in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(i)
        yield f"cuda:{i}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, sm_{facts.major}{facts.minor}"
    if built and not torch.cuda.is_available():
        yield "cuda", "torch sees no GPU: look at the driver with nvidia-smi, or use --device cpu"


def _backends() -> Iterator[tuple[str, str]]:
    import torch

    from mezo_kernels.dispatch import BACKENDS

    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for name, backend in BACKENDS.items():
            why = backend.unavailable(torch.device(device))
            used = ", used by default" if backend.default_on == device and not why else ""
            yield f"{name}, {device}", f"not available: {why}" if why else f"available{used}"
