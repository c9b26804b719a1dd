"""Without a GPU, Triton kernels run in its interpreter, which must be chosen before a kernel module is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tiny work on two threads is slower than on one, and many times slower when the other core is busy
torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """With pytest-xdist a file's tests share a process, for its fixtures' sake, and all engines are in one."""
    for item in items:
        file = item.nodeid.partition("::")[0]
        item.add_marker(pytest.mark.xdist_group("engine" if "runtimes/engine" in file else file))
