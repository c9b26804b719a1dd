"""What a pass frees is there for the next one."""

import os
import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from mezo.runtimes.allocator import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [torch.empty(30 << 18).fill_(0) for _ in range(5)]  # 30 MiB each
    del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
faults(), print(faults())
keep_freed_memory()
[faults() for _ in range(4)], print(faults())  # until no block lies astride of another's place
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")


def pages(**environment):
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=mine | environment, capture_output=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_pages_that_were_freed_are_not_cleared_again():
    runs = [pages() for _ in range(3)]
    # of up to 38,400; what lies above freed blocks, or between them, differs from process to process
    assert max(by_default for by_default, _ in runs) > 1000
    assert min(kept for _, kept in runs) < 400


def test_a_users_own_setting_wins():
    """Here that each block comes from the system, and goes back."""
    by_default, after = pages(MALLOC_MMAP_THRESHOLD_="65536")
    assert min(by_default, after) > 1000
