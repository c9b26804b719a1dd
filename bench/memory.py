"""Most memory a call takes beside what was there before it."""

import ctypes
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status(field: str) -> int:
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", _STATUS.read_text()).group(1))


def peak(run: Callable, device: str) -> int | None:
    """Bytes, by the allocator's account on a GPU and the kernel's on a CPU (pages); None where neither keeps one."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        # memory that earlier calls freed and malloc kept would hide what this one takes
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")  # sets the high-water mark to what is resident now
        before = _status("VmRSS")
        run()
        return max(0, _status("VmHWM") - before)
    except (OSError, AttributeError):
        return None
