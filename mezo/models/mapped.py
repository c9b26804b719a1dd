"""Memory of weights that lie in a mapped checkpoint, given back when nobody reads them any more."""

import ctypes
import mmap
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

MAPS = Path("/proc/self/maps")
DONTNEED = 4  # of madvise


Span = tuple[int, int]
"""Addresses: start and end."""


def give_back(tensors: Iterable[torch.Tensor], whole: bool = False, mappings: Sequence[Span] | None = None) -> int:
    """Have the system take back pages of mapped files that tensors lie in; return the bytes.

    transformers maps a checkpoint as one: pages that were read once stay with the process as long as any tensor of it
    lives, those of weights too that were packed or quantised since. A page that is read again comes from the file, so
    what it holds is lost only if it was changed in place.

    Args:
        tensors: on a CPU, as they were loaded; others than in a mapped file are left alone.
        whole: give back the whole mappings that they lie in.
        mappings: `mapped_files`, for who asks often: reading them takes milliseconds.
    """
    mappings = mapped_files() if mappings is None else mappings
    spans = set()
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        inside = next((m for m in mappings if m[0] <= start and end <= m[1]), None)
        if inside is not None:
            spans.add(inside if whole else (-(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end & -mmap.PAGESIZE))
    madvise = ctypes.CDLL(None).madvise
    given = [end - start for start, end in spans if end > start]
    for start, end in spans:
        if end > start:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), DONTNEED)
    return sum(given)


def mapped_files() -> list[Span]:
    """This process's private mappings of files; none where the system does not tell."""
    if not MAPS.exists():
        return []
    found = []
    for line in MAPS.read_text().splitlines():
        span, kind, _, _, inode, *_ = line.split()
        if kind[3] == "p" and inode != "0":
            start, end = span.split("-")
            found.append((int(start, 16), int(end, 16)))
    return found
