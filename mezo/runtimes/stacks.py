"""Projections that SGLang stacks into one: an adapter file must hold all members of a stack, trained or not."""

import torch
from transformers import AutoConfig

from mezo.errors import UserError
from mezo.runtimes.reuse import module_of

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
