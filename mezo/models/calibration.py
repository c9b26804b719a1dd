"""What linear layers are given on a calibration batch: directions of which none drowns the others."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from mezo.errors import UserError

BESIDE = 16  # directions kept beside those wanted, so that what a part of the rows drops is small
LEAST = 1e-5  # of the length of all rows: a direction below it is what rounding left
TOGETHER = 256  # rows that are held before the sketch is made of them


@dataclass(frozen=True)
class Pass:
    """A forward pass of some sequences.

    Args:
        run: runs the model on them.
        tokens: of them, padding included.
        real: which of these are no padding.
        scored: which of these are scored.
    """

    run: Callable[[], object]
    tokens: int
    real: tuple[int, ...]
    scored: tuple[int, ...]

    def counted(self, x: torch.Tensor, scored: bool) -> torch.Tensor:
        """The real or the scored ones of what a layer is given, (tokens, n); all, where it has other tokens."""
        return x if len(x) != self.tokens else x[list(self.scored if scored else self.real)]


class Sketch:
    """Mean and largest principal directions of the rows of a matrix X that come in parts: incremental singular value
    decomposition (Ross et al. 2008, "Incremental learning for robust visual tracking").

    After each part S V of the largest singular values stands for all rows so far, since X'X is nearly V'S^2 V. It is
    exact where X has no more than `kept` rows or as many directions.

    Args:
        r: directions that are wanted.

    >>> sketch = Sketch(2)
    >>> sketch.add(torch.tensor([[10.0, 3.0, 0.0], [10.0, -3.0, 0.0]]))
    >>> sketch.even()
    tensor([[0.1000, 0.0000, 0.0000],
            [0.0000, 0.3333, 0.0000]])
    """

    def __init__(self, r: int):
        self.r, self.kept = r, r + BESIDE
        self.held: list[torch.Tensor] = []
        self.sum: torch.Tensor | float = 0.0
        self.rows = 0

    def add(self, x: torch.Tensor) -> None:
        """Take further rows of X, (rows, n)."""
        self.sum = self.sum + x.detach().double().sum(0)
        for part in x.detach().float().split(TOGETHER):
            self.held.append(part)
            self.rows += len(part)
            if sum(map(len, self.held)) >= self.kept + TOGETHER:
                s, v = _decomposed(torch.cat(self.held))
                self.held = [s[: self.kept, None] * v[: self.kept]]

    def even(self) -> torch.Tensor | None:
        """r directions at right angles, along each of which the rows of X have a mean square of 1.

        The first is that of the mean row; the others are the principal directions of what is left of X without it, the
        largest first. Rows share their mean, so a random direction moves all of them alike and by far more than it
        moves them apart; here it has one direction of r. Rows whose mean is zero have principal directions alone.

        Returns:
            (r, n) float32; None where X has fewer directions.
        """
        x = torch.cat(self.held)
        length = self.sum.norm()
        # |sum of the rows| <= sqrt(rows) |X|: what is far below it is what rounding left of a mean of zero
        mean = (self.sum / length).float()[None][: int(length > LEAST * self.rows**0.5 * x.norm())]
        s, v = _decomposed(x - (x @ mean.T) @ mean)
        others = self.r - len(mean)
        if int((s > LEAST * x.norm()).sum()) < others:
            return None
        vectors = torch.cat([mean, v[:others]])
        return (vectors / (x @ vectors.T).square().sum(0).div(self.rows).sqrt()[:, None]).contiguous()


def _decomposed(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular values and right-singular vectors; the sign of a vector is that of its largest element."""
    _, s, v = torch.linalg.svd(x, full_matrices=False)
    largest = v.gather(1, v.abs().argmax(1, keepdim=True))
    return s, v * torch.where(largest < 0, -1.0, 1.0)


@dataclass(frozen=True)
class Seen:
    """What a linear layer was given and gave.

    Args:
        directions: (r, inputs) float32, see `Sketch.even`.
        output: root of the mean squared length of W x.
    """

    directions: torch.Tensor
    output: float


def seen_by(layers: Mapping[str, nn.Module], r: int, passes: Sequence[Pass]) -> dict[str, Seen]:
    """What each linear layer is given and gives while a model runs, by name.

    At the scored positions; where all prompts have the same there, as the first layer has if they end in one word, a
    layer's directions are those of all positions.

    Args:
        layers: linear layers by name; outputs count without their bias.
        r: directions of each.
        passes: through the model, of the calibration batch.
    Raises:
        UserError: a layer saw fewer than r directions.
    """
    found, tokens = {}, 0
    for scored in (True, False):
        sketches, squares = _run({n: m for n, m in layers.items() if n not in found}, r, passes, scored)
        for name, sketch in sketches.items():
            if sketch.rows and (directions := sketch.even()) is not None:
                found[name] = Seen(directions, (squares[name] / sketch.rows) ** 0.5)
            tokens = sketch.rows
        if len(found) == len(layers):
            return {name: found[name] for name in layers}
    name = next(name for name in layers if name not in found)
    raise UserError(
        f"--lora-a calibrated: {name} saw {tokens} tokens, which have no {r} directions; lower --r, or raise"
        " --calibration-examples"
    )


def _run(
    layers: Mapping[str, nn.Module], r: int, passes: Sequence[Pass], scored: bool
) -> tuple[dict[str, Sketch], dict[str, float]]:
    """Sketches of what each layer is given, and sums of the squares of what it gives."""
    sketches, squares = {name: Sketch(r) for name in layers}, dict.fromkeys(layers, 0.0)

    def see(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: torch.Tensor) -> None:
            bias = getattr(module, "bias", None)
            y = out if bias is None else out - bias
            sketches[name].add(now.counted(args[0].reshape(-1, args[0].shape[-1]), scored))
            squares[name] += now.counted(y.reshape(-1, y.shape[-1]), scored).double().square().sum().item()

        return hook

    hooks = [layer.register_forward_hook(see(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            for now in passes:
                now.run()
    finally:
        for hook in hooks:
            hook.remove()
    return sketches, squares
