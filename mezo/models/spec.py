"""What is trained, fixed for a run."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class TrainedSpec:
    """What is trained, fixed for a run: enough to rebuild theta, of an adapter with no model at hand.

    Args:
        peft: fields of PEFT's adapter_config.json; None where the base model's own parameters are trained.
        shapes: full shape of each trained parameter by canonical name, in order.
        model: id or path of the base model.
        model_hash: SHA-256 of the base weights in `dtype`.
        dtype: of the base model, e.g. "float32".
    """

    peft: dict | None
    shapes: dict[str, tuple[int, ...]]
    model: str
    model_hash: str
    dtype: str


Attached = tuple[nn.Module, dict[str, nn.Parameter], dict | None]
"""The model to run, what is trained of it by canonical name, and the fields of adapter_config.json."""
