"""Without a GPU, Triton kernels run in its interpreter, which must be chosen before a kernel module is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# tiny work on two threads is slower than on one, and many times slower when the other core is busy
torch.set_num_threads(1)
