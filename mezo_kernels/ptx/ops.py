"""The ops of the backend `triton` on an emulated device, which learns from their arguments what they may touch."""

import functools
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import torch
from triton.runtime.driver import driver

from mezo_kernels import dispatch
from mezo_kernels import triton as backend


def _floats(arguments: Iterable[Any]) -> list[torch.Tensor]:
    """What a call may touch: not the geometry, which stays on the host."""
    lists = (argument if isinstance(argument, list) else [argument] for argument in arguments)
    tensors = (one for own in lists for one in own if isinstance(one, torch.Tensor))
    return [tensor for tensor in tensors if tensor.is_floating_point()]


def _run(function: Callable, tensors: list[torch.Tensor] | None, *arguments: Any) -> Any:
    driver.active.tensors = _floats(arguments) if tensors is None else tensors
    return function(*arguments)


class _Prepared:
    """A prepared op of the backend."""

    def __init__(self, function: Callable, tensors: list[torch.Tensor]):
        self._function, self._tensors = function, tensors

    def __call__(self, *arguments: Any) -> None:
        _run(self._function, self._tensors, *arguments)

    def buffered(self, *arguments: Any) -> SimpleNamespace:
        made = self._function.buffered(*arguments)
        return SimpleNamespace(write=made.write, launch=functools.partial(_run, made.launch, self._tensors))


def prepare_step(*arguments: Any) -> _Prepared:
    """That of the backend."""
    return _Prepared(backend.prepare_step(*arguments), _floats(arguments))


def prepare_rule_step(*arguments: Any) -> _Prepared:
    """That of the backend."""
    return _Prepared(backend.prepare_rule_step(*arguments), _floats(arguments))


def __getattr__(op: str) -> Any:
    if op not in dispatch.OPS:
        raise AttributeError(op)
    return functools.partial(_run, getattr(backend, op), None)
