"""How logits are read off a forward pass: by the model itself, which is always right, or by its body and head apart.

Each of the two gives *outputs* at scored positions, and logits of outputs. Outputs of rows that were run apart can be
put together; logits of the whole vocabulary are then taken once, or not at all where a few tokens are enough.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn

from mezo.models.parts import ModelParts
from mezo.runtimes.rows import scored


class Reading(Protocol):
    """A way to logits."""

    def outputs(self, ids: torch.Tensor, positions: torch.Tensor | None, **inputs) -> torch.Tensor:
        """Run the model.

        Args:
            ids: (rows, length) token ids.
            positions: (rows, scored) that are read, of the decoder's tokens where `inputs` have such; None reads all.
            inputs: other arguments of the forward pass.
        Returns:
            (rows, scored, ...), float32 if these are logits, else of the model's dtype.
        """

    def some_logits(self, outputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        """Float32 logits of some tokens, ids (tokens,); None where all have to be taken."""

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Float32 logits of all tokens."""


class ByParts:
    """The body gives hidden states, the head logits of them, of a few tokens where these are all that is asked for.

    Args:
        parts: with a head.
    """

    def __init__(self, parts: ModelParts):
        self.parts = parts

    def outputs(self, ids: torch.Tensor, positions: torch.Tensor | None, **inputs) -> torch.Tensor:
        """See `Reading.outputs`: hidden states."""
        hidden = self.parts.body(input_ids=ids, **inputs).last_hidden_state
        return hidden if positions is None else scored(hidden, positions)

    def some_logits(self, outputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
        """See `Reading.some_logits`."""
        return self.parts.some_logits(outputs, tokens)

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Reading.logits`."""
        return self.parts.logits(outputs)


class ByModel:
    """The model's own forward pass, head, soft-capping and scaling included.

    Its last linear layer is given the scored positions alone: logits of every token of a batch are large.

    Args:
        parts: the model.
    """

    def __init__(self, parts: ModelParts):
        self.model = parts.base

    def outputs(self, ids: torch.Tensor, positions: torch.Tensor | None, **inputs) -> torch.Tensor:
        """See `Reading.outputs`: logits."""
        if positions is None:
            return self.model(input_ids=ids, **inputs).logits.float()
        shape = inputs.get("decoder_input_ids", ids).shape
        with _read_at(self.model, positions, shape) as done:
            logits = self.model(input_ids=ids, **inputs).logits
        return (logits if done else scored(logits, positions)).float()

    def some_logits(self, outputs: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Reading.some_logits`."""
        return outputs[..., tokens]

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """See `Reading.logits`."""
        return outputs


class ByClassifier(ByModel):
    """The model's own forward pass where it gives one number a class for each row, which counts as one position."""

    def outputs(self, ids: torch.Tensor, positions: torch.Tensor | None, **inputs) -> torch.Tensor:
        """See `Reading.outputs`: logits of the classes; `positions` are the model's own business."""
        return self.model(input_ids=ids, **inputs).logits.float()[:, None]


@contextmanager
def _read_at(model: nn.Module, positions: torch.Tensor, shape: torch.Size) -> Iterator[list]:
    """Meanwhile the layer that a model says gives its logits sees some positions alone.

    Args:
        model: of transformers.
        positions: (rows, scored).
        shape: (rows, length) of the tokens that have logits.
    Yields:
        A list, which holds something once the layer has been given them. Models that have no such layer, or do not
        call it with every token, leave it empty.
    """
    done, layer = [], model.get_output_embeddings()
    if layer is None:
        yield done
        return

    def chosen(module: nn.Module, args: tuple) -> tuple | None:
        if args[0].shape[:-1] != shape:
            return None
        done.append(True)
        return (scored(args[0], positions), *args[1:])

    hook = layer.register_forward_pre_hook(chosen)
    try:
        yield done
    finally:
        hook.remove()
