"""What is known of model families: which modules leave keys and values alone, and which projections engines stack."""

import re
from collections.abc import Iterable

import torch
from torch import nn
from transformers import (
    AutoConfig,
)

from mezo.errors import UserError

# adapted modules of a layer that leave its keys and values alone
KV_FREE = {"q_proj", "query", "o_proj", "out_proj", "dense", "gate_proj", "up_proj", "down_proj",
           "fc1", "fc2", "dense_h_to_4h", "dense_4h_to_h"}  # fmt: skip


HEAD = "lm_head"


def why_kv_depends(names: Iterable[str], n_layers: int) -> str | None:
    """The first trained parameter that changes a key or value, with the reason; None if there is none.

    Keys and values of layer l follow from the layers below and from l's own key and value projections: they are the
    same under every theta only if no layer but the last is adapted, and its keys and values are not.

    >>> why_kv_depends(["model.layers.1.self_attn.q_proj.lora_A.weight"], 2) is None
    True
    >>> why_kv_depends(["model.layers.0.mlp.up_proj.lora_A.weight"], 2)
    'model.layers.0.mlp.up_proj.lora_A.weight lies below the last layer, 1'
    """
    for name in names:
        layer, leaf = layer_of(name), module_of(name).rsplit(".", 1)[-1]
        if layer is None and leaf == HEAD:
            continue  # it comes after every key and value
        if layer != n_layers - 1:
            return f"{name} lies below the last layer, {n_layers - 1}"
        if leaf not in KV_FREE:
            return f"{name} may change keys or values of its layer"
    return None


def layer_of(name: str) -> int | None:
    """Index of the layer that a parameter is in.

    >>> layer_of("base_model.model.model.layers.29.mlp.up_proj.lora_B.weight")
    29
    """
    found = re.search(r"\.(?:layers?|h|blocks)\.(\d+)\.", name)
    return int(found.group(1)) if found else None


def module_of(name: str) -> str:
    """Path of the module that a LoRA parameter adapts, as the base model names it.

    >>> module_of("base_model.model.model.layers.29.mlp.up_proj.lora_B.weight")
    'model.layers.29.mlp.up_proj'
    """
    return name.removeprefix("base_model.model.").split(".lora_")[0]


# (stacked module, position in it)
STACKED = {"q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
           "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1)}  # fmt: skip


def complete_stacks(model: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, and zeros for members of a stack that it lacks: the same adapter to every user of it.

    SGLang 0.5.23 reads the value projection of every adapted query projection, whether or not the file has one.

    Args:
        model: path or hub id of the base model; its configuration gives the sizes of the missing members.
        tensors: by canonical name.
    """
    made = dict(tensors)
    for name, tensor in tensors.items():
        parent, _, leaf = module_of(name).rpartition(".")
        stack = STACKED.get(leaf, (None,))[0]
        for other in (member for member, (own, _) in STACKED.items() if own == stack and member != leaf):
            twin = name.replace(f"{parent}.{leaf}.", f"{parent}.{other}.")
            if twin not in made:
                rows = tensor.shape[0] if name.endswith("lora_A.weight") else _rows(model, other, tensor.shape[0])
                made[twin] = torch.zeros(rows, tensor.shape[1])
    return made


def complete_fields(peft: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """adapter_config.json for completed tensors."""
    return {**peft, "target_modules": sorted({module_of(name).rsplit(".", 1)[-1] for name in tensors})}


def _rows(model: str, leaf: str, same: int) -> int:
    """Output size of a projection: query, key and value differ under grouped-query attention, gate and up do not."""
    if STACKED[leaf][0] != "qkv_proj":
        return same
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: its configuration could not be loaded ({error})") from error
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_attention_heads
    return head_dim * (heads if leaf == "q_proj" else getattr(config, "num_key_value_heads", None) or heads)


def attention_window(config) -> int | None:
    kinds = getattr(config, "layer_types", None)
    return None if kinds and kinds[-1] == "full_attention" else getattr(config, "sliding_window", None)


def layers_of(body: nn.Module, n_layers: int) -> nn.ModuleList | None:
    return next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)


def adapted_leaves(layer: nn.Module) -> set[str]:
    return {
        name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in layer.named_modules() if name.endswith(".lora_A")
    }
