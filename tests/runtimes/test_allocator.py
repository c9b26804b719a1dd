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
faults(), print(faults())
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")


def pages(**environment):
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=mine | environment, capture_output=True, check=True)
    return [int(line) for line in done.stdout.split()]


def test_pages_that_were_freed_are_not_cleared_again():
    by_default, kept = pages()
    assert by_default > 1000  # of up to 38,400; fewer where the system has larger pages
    assert kept < by_default / 100


def test_a_users_own_setting_wins():
    by_default, after = pages(MALLOC_TRIM_THRESHOLD_=str(1 << 20), MALLOC_MMAP_THRESHOLD_=str(32 << 20))
    assert after > by_default / 2
