"""The proof at every start that the hf runtime scores as the model's own forward pass does."""

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import nn

from mezo.errors import UserError
from mezo.runtimes.reference import EXAMPLES, TOLERANCE, in_float32, largest_difference, reference_log_probs
from mezo.runtimes.rows import Row, RowBatch, measured

MARGIN = 2  # times the error of the model's own 16-bit forward pass, which is the largest of a few numbers


class StartProof:
    """The rows that a proof scores: those of the longest example, and of the first few of its split.

    The caller fills its caches for `batch` under one theta and scores under another, as in training: keys, values or
    hidden states that are reused although they depend on theta are found so.

    Args:
        rows: of each example by split.
        pad: token id for padding.
        device: of the model.
        dtype: of the model.
        quantised: products may round what they multiply, in some formats to 8 bits.
    """

    def __init__(
        self,
        rows: Mapping[str, Sequence[Sequence[Row]]],
        pad: int,
        device: torch.device,
        dtype: torch.dtype,
        quantised: bool = False,
    ):
        self.split, self.indices = _hardest(rows)
        self.rows = [row for i in self.indices for row in rows[self.split][i]]
        self.pad, self.device, self.dtype, self.quantised = pad, device, dtype, quantised
        self.batch = RowBatch.of(self.rows, pad, device)
        self.known: dict[Hashable, tuple[torch.Tensor, float, str]] = {}

    @torch.no_grad()
    def why_wrong(
        self, model: nn.Module, log_probs: torch.Tensor, by_itself: bool = False, weights: Hashable = None
    ) -> str | None:
        """What differs from the model's own forward pass, under the weights that are in use; None if nothing does.

        In 16 bits no difference is small by itself. What is right is known all the same, float32 of the same weights:
        the error may be twice that of the model's own 16-bit forward pass, in batches of several sizes. Of quantised
        weights what is right is the model's own forward pass; scores may differ by twice as much as it does from itself
        in batches of several sizes. In float32 that is more than nothing only where the format rounds inputs.

        Args:
            model: with its head.
            log_probs: what the runtime says of `batch`, float64 (rows, scored, candidates), normalised.
            by_itself: it is the model's own forward pass that says so, of all rows at once: allow what batches of other
                sizes differ by in float32, too.
            weights: names those in use; what is right under them is computed once. None: each time.
        Raises:
            UserError: the model's own log-probabilities are NaN.
        """
        if weights is None or weights not in self.known:
            self.known[weights] = self._what_is_right(model)
        expected, allowed, own = self.known[weights]
        if self.dtype != torch.float32:
            if log_probs[self.batch.valid.cpu()].isnan().any():
                return f"option log-probabilities are NaN in {self.dtype}, the model's own are not"
        elif by_itself and not self.quantised:
            allowed = max(allowed, 2 * self._error(model, expected, 1))
        worst = largest_difference(log_probs, expected, self.batch.valid)
        if worst <= allowed:
            return None
        return (
            f"option log-probabilities are not exact on this model, they differ by {worst:.2g} from its full forward"
            f" pass{own} (allowed {allowed:.2g})"
        )

    def _what_is_right(self, model: nn.Module) -> tuple[torch.Tensor, float, str]:
        """Log-probabilities under the weights in use, how far from them scores may be, and what they are beside the
        model's own forward pass, for people."""
        expected = reference_log_probs(model, self.batch)
        if expected[self.batch.valid.cpu()].isnan().any():
            remedy = "use --dtype bfloat16" if self.dtype == torch.float16 else "its weights may be damaged"
            raise UserError(f"--model: its own log-probabilities are NaN in {self.dtype}: {remedy}")
        if self.dtype != torch.float32:
            right, allowed = self._in_16_bits(model, expected)
            return right, allowed, "" if right is expected else " in float32"
        error = MARGIN * self._largest_error(model, expected) if self.quantised else 0.0
        return expected, max(TOLERANCE, error), ""

    def _in_16_bits(self, model: nn.Module, expected: torch.Tensor) -> tuple[torch.Tensor, float]:
        """What is right of a 16-bit model, and how far from it scores may be.

        Args:
            model: with its head.
            expected: log-probabilities by its own forward pass of all rows at once.
        """
        right = expected
        if not self.quantised:
            try:
                with in_float32(model):
                    right = reference_log_probs(model, self.batch)
            except RuntimeError:  # code that asks for one dtype: what batches of other sizes differ by is an estimate
                right = expected
        error = max(largest_difference(expected, right, self.batch.valid), self._largest_error(model, right))
        return right, max(MARGIN * error, torch.finfo(self.dtype).eps * float(right.abs().max()))

    def _largest_error(self, model: nn.Module, expected: torch.Tensor) -> float:
        """The largest `_error` of batches of some small sizes."""
        return max((self._error(model, expected, n) for n in {1, 2, 3} & set(range(len(self.rows)))), default=0.0)

    def _error(self, model: nn.Module, expected: torch.Tensor, size: int) -> float:
        """How far the model's own log-probabilities are from others when the rows are run `size` at a time."""
        worst = 0.0
        for start in range(0, len(self.rows), size):
            part = RowBatch.of(self.rows[start : start + size], self.pad, self.device)
            again = reference_log_probs(model, part)
            right = expected[start : start + size, : again.shape[1], : again.shape[2]]
            worst = max(worst, largest_difference(again, right, part.valid))
        return worst


def _hardest(rows: Mapping[str, Sequence[Sequence[Row]]]) -> tuple[str, list[int]]:
    """The split with the longest row, and the numbers of its longest and first examples."""
    length = lambda split, i: max(len(row.ids) for row in rows[split][i])  # noqa: E731
    longest = {split: max(measured(nested), key=lambda i: length(split, i)) for split, nested in rows.items()}
    split = max(longest, key=lambda split: length(split, longest[split]))
    return split, sorted({longest[split], *range(min(EXAMPLES, len(rows[split])))})
