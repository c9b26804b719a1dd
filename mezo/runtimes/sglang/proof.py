"""The proof at every start that the engine scores as transformers and PEFT do."""

from collections.abc import Sequence

import torch

from mezo.errors import UserError
from mezo.models.parts import ModelParts
from mezo.models.spec import TrainedSpec
from mezo.runtimes.reference import reference_log_probs
from mezo.runtimes.rows import Row, RowBatch
from mezo_kernels import lora_init

EXAMPLES = 3  # besides the longest
TOLERANCE = 1e-4  # on log-probabilities in float32
SHARE = 0.2  # in 16 bits or quantised: of what the adapters of the proof change


class StartProof:
    """Log-probabilities of a few rows under two noisy adapters, to compare with the engine's.

    The cache is filled under one adapter and used under the other, as in training: so a namespace that is shared
    although keys or values depend on theta is found here, too.

    Args:
        parts: the model with its adapter, on the CPU; its adapter is overwritten.
        rows: all rows of the run; the longest is among those that are compared.
        pad: token id for padding.
    """

    SEEDS = (0, 1)

    def __init__(self, parts: ModelParts, spec: TrainedSpec, rows: Sequence[Row], pad: int):
        self.spec = spec
        self.rows = list(dict.fromkeys([max(rows, key=lambda row: len(row.ids)), *rows[:EXAMPLES]]))
        batch = RowBatch.of(self.rows, pad, "cpu")
        self._hidden = ~batch.valid[:, :, None]
        self._expected = [self._by_model(parts, batch, seed) for seed in self.SEEDS]

    def adapter(self, seed: int) -> dict[str, torch.Tensor]:
        """The noisy adapter of one of SEEDS, by canonical name."""
        return {name: lora_init(seed, name, shape) for name, shape in self.spec.shapes.items()}

    @torch.no_grad()
    def _by_model(self, parts: ModelParts, batch: RowBatch, seed: int) -> torch.Tensor:
        for name, tensor in self.adapter(seed).items():
            parts.params[name].data.copy_(tensor)
        return reference_log_probs(parts.model, batch)

    def check(self, seed: int, tables: Sequence[list[dict]]) -> None:
        """Compare the engine's log-probabilities under `adapter(seed)`: for each row, by position and token id.

        Raises:
            UserError: they are not the model's.
        """
        spread = float((self._expected[0] - self._expected[1]).abs().masked_fill(self._hidden, 0).max())
        allowed = TOLERANCE if self.spec.dtype == "float32" else max(TOLERANCE, SHARE * spread)
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
