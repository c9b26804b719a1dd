"""The sets of parameters that are timed."""

from dataclasses import dataclass

import torch

from mezo_kernels import ParamLayout, ParamSlot

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _lora(r: int, hidden: int, intermediate: int, layers: int, only: tuple[str, ...] = ()) -> dict[str, tuple]:
    """Shapes of the LoRA matrices of a Llama, of all seven projections or `only` some."""
    modules = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (hidden, hidden))
    modules |= dict.fromkeys(("gate_proj", "up_proj"), (intermediate, hidden)) | {"down_proj": (hidden, intermediate)}
    shapes = {}
    for layer in range(layers):
        for module in only or modules:
            rows, cols = modules[module]
            shapes[f"layers.{layer}.{module}.lora_A.weight"] = (r, cols)
            shapes[f"layers.{layer}.{module}.lora_B.weight"] = (rows, r)
    return shapes


LLAMA_7B, SMALL = (4096, 11008), (576, 1536)
SHAPES = {
    "lora-r8-qv": _lora(8, *LLAMA_7B, 32, ("q_proj", "v_proj")),
    "lora-r16-all": _lora(16, *LLAMA_7B, 32),
    "lora-r8-shard": _lora(8, *LLAMA_7B, 32, ("o_proj", "down_proj")),
    "lora-448-small": _lora(2, *SMALL, 32),
    "lora-1344-small": _lora(2, *SMALL, 96),
    "flat-16M": {"w": (1 << 24,)},
    "tiny-448x64": {f"w{i}": (64,) for i in range(448)},
}
REPLAYED = {"lora-r8-all": _lora(8, *LLAMA_7B, 32)}
COLUMN_SHARDED = {"lora-r8-shard"}  # the second of two ranks: they split the columns of lora_A and hold all of lora_B


@dataclass(frozen=True)
class Case:
    """One set of parameters: `params` in the order of `layout`, the same storage."""

    shape: str
    params: list[torch.Tensor]
    layout: ParamLayout

    @property
    def elements(self) -> int:
        return self.layout.n_elements


def make(shape: str, dtype: torch.dtype = torch.float32, device: str = "cpu", std: float = 0.02) -> Case:
    """Parameters, normal with the standard deviation of a weight; of a sharded shape, the rank's blocks."""
    return case_of(shape, (SHAPES | REPLAYED)[shape], dtype, device, std, shape in COLUMN_SHARDED)


def case_of(name: str, sizes: dict[str, tuple], dtype: torch.dtype, device: str, std=0.02, sharded=False) -> Case:
    """A case of tensors of these sizes."""
    generator, slots = torch.Generator(device).manual_seed(0), []
    for parameter, full in sizes.items():
        split = sharded and "lora_A" in parameter
        size = (full[0], full[1] // 2) if split else full
        value = (torch.randn(size, generator=generator, device=device) * std).to(dtype)
        slots.append(ParamSlot(parameter, value, full, 0, full[1] // 2 if split else 0))
    return Case(name, [slot.tensor for slot in slots], ParamLayout(slots))
