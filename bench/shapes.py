"""The sets of parameters that are timed."""

import torch

HIDDEN, INTERMEDIATE, LAYERS = 4096, 11008, 32  # a 7B Llama
ATTENTION = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), (HIDDEN, HIDDEN))
MLP = {"gate_proj": (INTERMEDIATE, HIDDEN), "up_proj": (INTERMEDIATE, HIDDEN), "down_proj": (HIDDEN, INTERMEDIATE)}


def _lora(r: int, modules: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for layer in range(LAYERS):
        for module, (rows, cols) in modules.items():
            shapes[f"layers.{layer}.{module}.lora_A.weight"] = (r, cols)
            shapes[f"layers.{layer}.{module}.lora_B.weight"] = (rows, r)
    return shapes


SHAPES = {
    "lora-r8-qv": _lora(8, {name: ATTENTION[name] for name in ("q_proj", "v_proj")}),
    "lora-r16-all": _lora(16, ATTENTION | MLP),
    "flat-16M": {"w": (1 << 24,)},
    "tiny-448x64": {f"w{i}": (64,) for i in range(448)},
}
REPLAYED = {"lora-r8-all": _lora(8, ATTENTION | MLP)}


def make(shape: str, dtype: torch.dtype = torch.float32, std: float = 0.02) -> dict[str, torch.Tensor]:
    """Parameters by name, normal with the standard deviation of a weight."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(size, generator=generator) * std).to(dtype)
        for name, size in (SHAPES | REPLAYED)[shape].items()
    }
