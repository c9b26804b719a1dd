"""What a model computes on a calibration batch: the largest singular vectors of activations."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from mezo.errors import UserError

BESIDE = 16  # directions kept beside the r wanted, so that what a part of the rows drops is small
TOGETHER = 256  # rows that are held before the sketch is made of them


@dataclass(frozen=True)
class Pass:
    """A forward pass of one sequence.

    Args:
        run: runs the model on it, without padding.
        tokens: of it.
        read: positions whose activations count; None counts all.
    """

    run: Callable[[], object]
    tokens: int
    read: tuple[int, ...] | None = None

    def counted(self, x: torch.Tensor) -> torch.Tensor:
        """The rows that count of what a layer is given or gives, (..., tokens, n); all, where it has other tokens."""
        rows = x.reshape(-1, x.shape[-1])
        return rows if self.read is None or len(rows) != self.tokens else rows[list(self.read)]


class Sketch:
    """The largest right-singular vectors of a matrix X whose rows come in parts: incremental singular value
    decomposition (Ross et al. 2008, "Incremental learning for robust visual tracking").

    After each part S V of the largest singular values stands for all rows so far, since X'X is nearly V'S^2 V. It is
    exact where X has no more than `kept` rows or as many directions.

    Args:
        r: vectors that are wanted.

    >>> sketch = Sketch(1)
    >>> sketch.add(torch.tensor([[0.0, 3.0, 0.0], [1.0, 0.0, 0.0]]))
    >>> sketch.vectors().abs()
    tensor([[0., 1., 0.]])
    """

    def __init__(self, r: int):
        self.r, self.kept = r, r + BESIDE
        self.held: list[torch.Tensor] = []
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Take further rows of X, (rows, n)."""
        for part in x.detach().float().split(TOGETHER):
            self.held.append(part)
            self.rows += len(part)
            if sum(map(len, self.held)) >= self.kept + TOGETHER:
                s, v = self._decomposed()
                self.held = [s[: self.kept, None] * v[: self.kept]]

    def vectors(self) -> torch.Tensor | None:
        """The r largest right-singular vectors, (r, n) float32, largest first; None where X has fewer directions."""
        s, v = self._decomposed()
        directions = int((s > s[:1] * torch.finfo(torch.float32).eps * max(v.shape)).sum())
        return v[: self.r].contiguous() if directions >= self.r else None

    def _decomposed(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Singular values and right-singular vectors of what is held; the sign of a vector is that of its largest
        element."""
        _, s, v = torch.linalg.svd(torch.cat(self.held), full_matrices=False)
        largest = v.gather(1, v.abs().argmax(1, keepdim=True))
        return s, v * torch.where(largest < 0, -1.0, 1.0)


def vectors_of(
    layers: Mapping[str, nn.Module], r: int, passes: Iterable[Pass], option: str, outputs: bool = False
) -> dict[str, torch.Tensor]:
    """The largest right-singular vectors of what each linear layer is given, or gives, while a model runs.

    Args:
        layers: linear layers by name, of which the outputs are taken without their bias.
        r: vectors of each.
        passes: through the model, of the calibration batch.
        option: for the error.
        outputs: of what they give.
    Returns:
        (r, inputs) or (r, outputs) float32, on the layer's device, by name.
    Raises:
        UserError: a layer saw fewer than r directions.
    """
    sketches = {name: Sketch(r) for name in layers}

    def see(name: str) -> Callable:
        def given(module: nn.Module, args: tuple) -> None:
            sketches[name].add(now.counted(args[0]))

        def gives(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            bias = getattr(module, "bias", None)
            sketches[name].add(now.counted(out if bias is None else out - bias))

        return gives if outputs else given

    hooks = []
    for name, layer in layers.items():
        hook = layer.register_forward_hook if outputs else layer.register_forward_pre_hook
        hooks.append(hook(see(name)))
    try:
        with torch.no_grad():
            for now in passes:
                now.run()
    finally:
        for hook in hooks:
            hook.remove()
    found = {name: sketch.vectors() if sketch.rows else None for name, sketch in sketches.items()}
    for name, vectors in found.items():
        if vectors is None:
            rows = sketches[name].rows
            raise UserError(f"{option}: {name} saw {rows} tokens, which have no {r} directions; lower --r")
    return found
