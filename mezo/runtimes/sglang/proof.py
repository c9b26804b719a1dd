"""The proof at every start that the engine scores as transformers and PEFT do."""

from collections.abc import Sequence

import torch

from mezo.errors import UserError
from mezo.models.parts import ModelParts
from mezo.runtimes.reference import EXAMPLES, TOLERANCE, largest_difference, reference_log_probs
from mezo.runtimes.rows import Row, RowBatch

SHARE = 0.2  # in 16 bits or quantised: of what the adapters of the proof change


class StartProof:
    """Log-probabilities of a few rows under two noisy adapters, to compare with the engine's.

    The cache is filled under one adapter and used under the other, as in training: so a namespace that is shared
    although keys or values depend on theta is found here, too.

    Args:
        parts: the model with its adapter, on the CPU; its adapter is overwritten.
        exact: the engine's base is in float32 and not quantised.
        rows: all rows of the run; the longest is among those that are compared.
        pad: token id for padding.
    """

    SEEDS = (0, 1)

    def __init__(self, parts: ModelParts, exact: bool, rows: Sequence[Row], pad: int):
        self.exact = exact
        self.rows = list(dict.fromkeys([max(rows, key=lambda row: len(row.ids)), *rows[:EXAMPLES]]))
        batch, noise = RowBatch.of(self.rows, pad, "cpu"), parts.attached.noise
        self._valid = batch.valid
        self._adapters = [dict(zip(parts.params, noise(parts.params, seed), strict=True)) for seed in self.SEEDS]
        self._expected = [_by_model(parts, batch, adapter) for adapter in self._adapters]

    def adapter(self, seed: int) -> dict[str, torch.Tensor]:
        """The noisy adapter of one of SEEDS, by canonical name."""
        return self._adapters[seed]

    def check(self, seed: int, tables: Sequence[list[dict[int, float]]]) -> None:
        """Compare the engine's log-probabilities under `adapter(seed)`.

        Args:
            seed: one of SEEDS.
            tables: of each row, for each scored position, log-probability by token id.
        Raises:
            UserError: they are not the model's.
        """
        spread = largest_difference(*self._expected, self._valid)
        allowed = TOLERANCE if self.exact else max(TOLERANCE, SHARE * spread)
        got = self._expected[seed].clone()  # a row without a candidate or position agrees there
        for i, (row, table) in enumerate(zip(self.rows, tables, strict=True)):
            for p, target in enumerate(row.targets):
                got[i, p, : len(target)] = torch.tensor([table[p][t] for t in target])
        worst = float((got - self._expected[seed]).abs().max())
        if not worst <= allowed:
            raise UserError(
                f"--runtime sglang: log-probabilities differ by {worst:.2g} from transformers with PEFT (allowed"
                f" {allowed:.2g}, the adapters themselves change {spread:.2g}); try --radix off, --engine-arg"
                " attention_backend=..., or --runtime hf"
            )


@torch.no_grad()
def _by_model(parts: ModelParts, batch: RowBatch, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """`reference_log_probs` of the model with these tensors as its adapter."""
    for name, tensor in adapter.items():
        parts.params[name].data.copy_(tensor)
    return reference_log_probs(parts.model, batch)
