"""What a closure returns, what it changes besides the loss, and what its losses say about a run."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import torch

EQUAL_STEPS = 10  # in a row, before a warning
DIVERGED = 10.0  # ratio of a loss to the best so far


def call(closure: Callable) -> float:
    """The loss of one call of the closure, which sees no copy of weights that autocast made before."""
    torch.clear_autocast_cache()
    try:
        return loss_of(closure())
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise ValueError(
            "the closure must return the loss and leave out backward(): MeZO calls it without autograd"
        ) from error
    finally:
        torch.clear_autocast_cache()


def loss_of(returned) -> float:
    """What a closure returned, as a number; ValueError that says what came instead.

    >>> loss_of(torch.tensor([[0.5]]))
    0.5
    """
    one = not isinstance(returned, torch.Tensor) or (returned.numel() == 1 and not returned.is_complex())
    if one and hasattr(returned, "__float__"):
        return float(returned)
    raise ValueError(
        f"the closure must return the loss as one number, a scalar tensor or a float, got {_described(returned)}; "
        "return for example output.loss, or the mean of a vector of losses"
    )


def _described(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)} and {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with the keys {', '.join(map(str, value))}"
    return "None" if value is None else f"a {type(value).__name__}"


class Buffers:
    """Buffers of a module over the calls of one step, such as the running statistics of a batch norm.

    Every call starts from the same ones, as from the same generator states.

    Args:
        module: None has no buffers.

    Attributes:
        moved: whether a call has changed one.
    """

    def __init__(self, module: torch.nn.Module | None):
        self.tensors = [] if module is None else list(module.buffers())
        self.before = [tensor.clone() for tensor in self.tensors]
        self.moved = False
        self.after = self.before

    def rewind(self, keep: bool) -> None:
        """After a call: back to where it started.

        Args:
            keep: the call was one at theta, so that what it left is what the step is to leave.
        """
        if self.tensors:
            self.moved |= not all(map(torch.equal, self.tensors, self.before))
            if keep:
                self.after = [tensor.clone() for tensor in self.tensors]
            self.set(self.before)

    def set(self, values: Sequence[torch.Tensor]) -> None:
        """Write them."""
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor.copy_(value)


class Watch:
    """Looks at the losses of every step, and warns once of each thing that goes wrong in silence otherwise."""

    def __init__(self):
        self.first, self.best, self.equal_steps = None, math.inf, 0
        self.warned = set()

    def see(self, losses: Sequence[float], skipped: bool, names: Sequence[str]) -> None:
        """Look at one step.

        Args:
            losses: of all calls that measured.
            skipped: the step changed nothing, since a loss or a coefficient is no finite float32.
            names: of the parameters.
        """
        remedy = "a smaller lr helps where it diverges; `skipped_steps` counts on"
        if skipped:
            self._warn(
                "skipped",
                f"MeZO skipped a step, a loss or its coefficient is not finite (losses {losses[:4]}): {remedy}",
            )
            return
        mean = sum(losses) / len(losses)
        self.first = mean if self.first is None else self.first
        if mean > max(self.first, DIVERGED * abs(self.best)):
            self._warn(
                "diverged",
                f"the loss is {mean:.4g}, more than {DIVERGED:g} times the best so far, {self.best:.4g}, "
                "and above the first: MeZO diverges where it stays there; a smaller lr helps",
            )
        self.best = min(self.best, mean)
        self.equal_steps = self.equal_steps + 1 if len(set(losses)) == 1 else 0
        if self.equal_steps == EQUAL_STEPS:
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            self._warn(
                "equal",
                f"all losses of a step were equal to the last bit, {EQUAL_STEPS} steps in a row: the loss does not "
                f"depend on these parameters: {shown}; or eps is below what the loss can tell (16 bits, an accuracy)",
            )

    def _warn(self, kind: str, message: str) -> None:
        """Warn once of each kind."""
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(message, stacklevel=3)
