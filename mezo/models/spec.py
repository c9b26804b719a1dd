"""What is trained, as the log holds it; it needs no model library."""

from dataclasses import dataclass

LINEAR_HEAD = "score"
"""Name of the linear head of --head linear, which PEFT saves whole beside the adapter (modules_to_save)."""


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
