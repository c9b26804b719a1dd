"""What is trained, as the log holds it; it needs no model library."""

from dataclasses import dataclass, field

CORE = "lora_R.weight"
"""End of the name of a trained matrix R between two frozen factors: lora_B of the adapter is lora_B R."""
NONE = "none"
"""What `--quantization` is by default."""
ENGINE = "sglang:"
"""Begins the name of what an engine quantised a base to, whose hash is that of the weights before."""
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
        frozen: full shape of each tensor that belongs to the adapter and stays as it was at the start of the run.
        quantization: what the base's linear layers are quantised to, as --quantization names it, or `ENGINE` and what
            the engine calls it; "none" if the weights are those of the checkpoint.
        code_hash: SHA-256 of the code that the base brings, "" if it is of transformers' own.
    """

    peft: dict | None
    shapes: dict[str, tuple[int, ...]]
    model: str
    model_hash: str
    dtype: str
    frozen: dict[str, tuple[int, ...]] = field(default_factory=dict)
    quantization: str = NONE
    code_hash: str = ""

    def logged(self) -> dict[str, object]:
        """Its fields as the header of a log has them: the later ones where they say something."""
        fields = {key: getattr(self, key) for key in ("peft", "shapes", "model", "model_hash", "dtype")}
        return fields | ({"frozen": self.frozen} if self.frozen else {}) | self.base

    @property
    def base(self) -> dict[str, str]:
        """What tells the base from others: its hash, dtype, and what it is quantised to and its own code, if any."""
        packed = {} if self.quantization == NONE else {"quantization": self.quantization}
        code = {"code_hash": self.code_hash} if self.code_hash else {}
        return {"model_hash": self.model_hash, "dtype": self.dtype} | packed | code

    @property
    def adapter(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter as others see it; of a model that is trained whole those of theta."""
        return adapter_shapes(self.shapes, self.frozen)


Shapes = dict[str, tuple[int, ...]]


def adapter_shapes(shapes: Shapes, frozen: Shapes) -> Shapes:
    """Shapes of an adapter's tensors, in order, of which those in `shapes` are trained and those in `frozen` are not.

    >>> adapter_shapes({"q.lora_R.weight": (2, 2)}, {"q.lora_A.weight": (2, 8), "q.lora_B.weight": (4, 2)})
    {'q.lora_A.weight': (2, 8), 'q.lora_B.weight': (4, 2)}
    >>> adapter_shapes({"q.lora_B.weight": (4, 2)}, {"q.lora_A.weight": (2, 8)})
    {'q.lora_A.weight': (2, 8), 'q.lora_B.weight': (4, 2)}
    """
    return {**frozen, **{name: shape for name, shape in shapes.items() if not name.endswith(CORE)}}
