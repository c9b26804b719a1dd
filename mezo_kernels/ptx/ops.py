"""The ops of the backend `triton` on an emulated device, which learns from their arguments what they may touch."""

import functools
from typing import Any

import torch
from triton.runtime.driver import driver

from mezo_kernels import triton as backend


def _run(op: str, *arguments: Any) -> Any:
    lists = (argument if isinstance(argument, list) else [argument] for argument in arguments)
    tensors = (one for own in lists for one in own if isinstance(one, torch.Tensor))
    # not the geometry, which stays on the host
    driver.active.tensors = [tensor for tensor in tensors if tensor.is_floating_point()]
    return getattr(backend, op)(*arguments)


def __getattr__(op: str) -> Any:
    return functools.partial(_run, op)
