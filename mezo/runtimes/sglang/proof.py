"""The proof at every start that the engine scores as transformers and PEFT do."""

from collections.abc import Sequence

import torch

from mezo.errors import UserError
from mezo.models.lora import as_peft_loads
from mezo.models.parts import ModelParts
from mezo.runtimes.reference import EXAMPLES, TOLERANCE, another_function, largest_difference, reference_log_probs
from mezo.runtimes.rows import Row, RowBatch

SHARE = 0.2  # in 16 bits or quantised: of what the adapters of the proof change
STEP = 2.0**-12  # bfloat16 from 2**-5 up has multiples of it alone, float16 from 2**-2 up
ROUNDING = 2.0**-23  # of a log-probability in float32
CHANCE = 1e-6  # that finer logits look like multiples of it


class StartProof:
    """Log-probabilities of a few rows under two noisy adapters, to compare with the engine's.

    The cache is filled under one adapter and used under the other, as in training: so a namespace that is shared
    although keys or values depend on theta is found here, too.

    Args:
        parts: the model with its adapter, on the CPU; its adapter is overwritten.
        exact: the engine's base is in float32 and not quantised.
        rows: all rows of the run; the longest is among those that are compared.
        pad: token id for padding.
        adapter: directory of an adapter, whose log-probabilities are found by PEFT's own reading of it; "" is none.
    """

    SEEDS = (0, 1)

    def __init__(self, parts: ModelParts, exact: bool, rows: Sequence[Row], pad: int, adapter: str = ""):
        self.exact, self.directory = exact, adapter
        self.rows = list(dict.fromkeys([max(rows, key=lambda row: len(row.ids)), *rows[:EXAMPLES]]))
        batch, noise = RowBatch.of(self.rows, pad, "cpu"), parts.attached.noise
        self._valid = batch.valid
        self._adapters = [dict(zip(parts.params, noise(parts.params, seed), strict=True)) for seed in self.SEEDS]
        self._expected = [_by_model(parts, batch, tensors) for tensors in self._adapters]
        if adapter:
            with torch.no_grad(), as_peft_loads(parts.model, adapter):
                self._by_peft = reference_log_probs(parts.model, batch)

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
        worst = self._difference(self._expected[seed], tables)
        if not worst <= self.allowed:
            raise UserError(
                f"--runtime sglang: log-probabilities differ by {worst:.2g} from transformers with PEFT (allowed"
                f" {self.allowed:.2g}, the adapters themselves change {self.spread:.2g}); try --radix off, --engine-arg"
                " attention_backend=..., or --runtime hf"
            )

    @staticmethod
    def check_fine(tables: Sequence[list[dict[int, float]]]) -> None:
        """Whether the engine's logits have more bits than its 16-bit weights.

        Where they have not, log-probabilities of one position differ by multiples of a step, and the two signs of a
        perturbation by nothing or by such a step. `check` cannot see that: the model's own logits are as coarse.

        Args:
            tables: see `check`.
        Raises:
            UserError: they have not.

        >>> StartProof.check_fine([[{5: -1.0, 7: -1.3, 9: -1.7, 11: -3.1, 13: -0.9}]])
        >>> StartProof.check_fine([[{5: -1.0, 7: -1.25, 9: -1.5, 11: -3.0, 13: -0.875}]])
        Traceback (most recent call last):
        mezo.errors.UserError: --runtime sglang: the engine's logits are rounded to 16 bits, which ...
        """
        chance = 1.0
        for table in (table for row in tables for table in row):
            first, *others = table.values()
            for p in others:
                error = ROUNDING * (abs(p) + abs(first))
                if abs(p - first - STEP * round((p - first) / STEP)) > error:
                    return
                chance *= min(1.0, 2 * error / STEP) if p != first else 1.0
        if chance < CHANCE:
            raise UserError(
                "--runtime sglang: the engine's logits are rounded to 16 bits, which hides what a perturbation changes:"
                " use --dtype float32, --target-modules without lm_head, or --runtime hf"
            )

    def check_adapter(self, tables: Sequence[list[dict[int, float]]]) -> None:
        """Compare the engine's log-probabilities under the adapter of the directory; see `check`."""
        worst = self._difference(self._by_peft, tables)
        if not worst <= self.allowed:
            why = f"log-probabilities differ by {worst:.2g} (allowed {self.allowed:.2g})"
            raise another_function(self.directory, why)

    @staticmethod
    def between(one: Sequence[list[dict[int, float]]], other: Sequence[list[dict[int, float]]]) -> float:
        """Largest difference between log-probabilities of equal requests: NaN where one of them is no number.

        >>> StartProof.between([[{5: -1.0}, {7: -2.0}]], [[{5: -1.5}, {7: -2.0}]])
        0.5
        """
        tables = [[p for row in tables for p in row] for tables in (one, other)]
        pairs = [(a[t], b[t]) for a, b in zip(*tables, strict=True) for t in a]
        return float((torch.tensor([a for a, _ in pairs]) - torch.tensor([b for _, b in pairs])).abs().max())

    @property
    def spread(self) -> float:
        """What another adapter changes."""
        return largest_difference(*self._expected, self._valid)

    @property
    def allowed(self) -> float:
        """By how much log-probabilities may differ."""
        return TOLERANCE if self.exact else max(TOLERANCE, SHARE * self.spread)

    def _difference(self, expected: torch.Tensor, tables: Sequence[list[dict[int, float]]]) -> float:
        got = expected.clone()  # a row without a candidate or position agrees there
        for i, (row, table) in enumerate(zip(self.rows, tables, strict=True)):
            for p, target in enumerate(row.targets):
                got[i, p, : len(target)] = torch.tensor([table[p][t] for t in target])
        return float((got - expected).abs().max())


@torch.no_grad()
def _by_model(parts: ModelParts, batch: RowBatch, adapter: dict[str, torch.Tensor]) -> torch.Tensor:
    """`reference_log_probs` of the model with these tensors as its adapter."""
    for name, tensor in adapter.items():
        parts.params[name].data.copy_(tensor)
    return reference_log_probs(parts.model, batch)
