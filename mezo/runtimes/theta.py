"""Theta and its perturbed copies: the float32 master, stepped in one fused pass, and the proof of what was written."""

from collections.abc import Sequence

import torch

from mezo.runtimes.base import StepUpdate, passes
from mezo_kernels import ParamLayout, step_


class PerturbedTheta:
    """The float32 master theta and the places that theta + eps z_k and theta - eps z_k are written to.

    Nothing is ever restored by arithmetic: every copy is a single rounding of a sum formed from the master.

    Args:
        master: float32.
        pairs: (plus, minus) of each perturbation that is held at once; the same elements, any dtype and strides.
        backend: of the fused ops; None chooses by device.
    """

    def __init__(self, master: ParamLayout, pairs: Sequence[tuple[ParamLayout, ParamLayout]], backend=None):
        self.master, self.pairs, self.backend = master, list(pairs), backend
        self._watched = None
        self._perturbation: tuple[list[int], float] | None = None

    def step(self, updates: Sequence[StepUpdate], seeds: Sequence[int], eps: float, *, watch: bool = False) -> None:
        """Apply the updates, then write theta +- eps z(seeds[k]) to pair k, in one pass.

        With `watch`, keep what `verify` needs.
        """
        if watch:
            before = [t.clone() for t in self.master.tensors]
            self._watched = before, list(updates), list(seeds), eps
        self._perturbation = list(seeds), eps
        self._write(self.master, passes(updates), seeds, eps, self.pairs[: len(seeds)], self.backend)

    def restore(self) -> None:
        """Write the perturbed copies of the last step anew: the same bits, whatever is there now."""
        self.step([], *self._perturbation)

    def show(self, copies: Sequence[ParamLayout]) -> None:
        """Write theta itself, rounded once, where perturbed copies are; `restore` undoes it."""
        for copy in copies:
            copy.copy_(self.master)

    def verify(self, used: Sequence[Sequence[torch.Tensor]] | None = None) -> str | None:
        """Rebuild with the reference what the watched step wrote; name the first element that differs, or None.

        Args:
            used: tensors that the model reads, two lists for each pair; by default those that were written to.
        """
        before, updates, seeds, eps = self._watched
        master = self.master.like([t.clone() for t in before])
        copies = [copy for pair in self.pairs[: len(seeds)] for copy in pair]
        fresh = [copy.like([torch.empty_like(t) for t in copy.tensors]) for copy in copies]
        self._write(master, passes(updates), seeds, eps, list(zip(fresh[::2], fresh[1::2], strict=True)), "reference")
        seen = [self.master.tensors, *(used if used is not None else [copy.tensors for copy in copies])]
        kinds = ["theta", *(f"{sign}{_of(k, len(seeds))}" for k in range(len(seeds)) for sign in ("plus", "minus"))]
        for kind, expected, got in zip(kinds, (master, *fresh), seen, strict=True):
            for name, a, b in zip(expected.names, expected.tensors, got, strict=True):
                bits = torch.int32 if a.dtype == torch.float32 else torch.int16
                different = (a.contiguous().view(bits) != b.contiguous().view(bits)).flatten().nonzero()
                if len(different):
                    i = int(different[0])
                    return f"{kind} of {name} at index {i}: expected {a.flatten()[i]:.9g}, got {b.flatten()[i]:.9g}"
        return None

    @staticmethod
    def _write(master, updates, seeds, eps, pairs, backend) -> None:
        plus, minus = ([pair[sign] for pair in pairs] for sign in (0, 1))
        step_(master, updates, 1.0, list(seeds), eps, plus, minus, backend=backend)


def _of(k: int, n: int) -> str:
    return f" of perturbation {k}" if n > 1 else ""
