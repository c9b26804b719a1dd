"""Memory that a process frees and needs again in the next layer: kept, not given back to the system in between.

A forward pass on a CPU allocates tens of megabytes a layer and frees them. The allocator of glibc gives free memory
back above a limit that follows from what was freed before, 64 MiB at most, and the system then clears and maps
every page again: a fifth of the time of a pass of 2,000 tokens.
"""

import ctypes
import os
import sys

LARGEST = 32 << 20
"""Bytes of a block from which on it comes from the system and goes back there: the largest limit of glibc's own."""
KEPT = 512 << 20
"""Bytes of free memory that a process keeps."""
VARIABLES = {"MALLOC_MMAP_THRESHOLD_": str(LARGEST), "MALLOC_TRIM_THRESHOLD_": str(KEPT)}
"""What says the same to a process that is started."""
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt


def keep_freed_memory() -> None:
    """Have this process keep what it frees, where its allocator is glibc's and the user set nothing of it."""
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None and not chosen:
        mallopt(_MMAP_THRESHOLD, LARGEST)
        mallopt(_TRIM_THRESHOLD, KEPT)
