"""Model families: everything that is known of one architecture and not of all, in one table by `model_type`.

A family without an entry in `FAMILIES` is `GENERIC`. What an entry says wrongly, or should say and does not, the proof
at the start of a run finds: it compares scores with the model's own forward pass, which then gives them itself.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PretrainedConfig

from mezo.models.spec import LINEAR_HEAD

HEAD = "lm_head"
"""Name of a decoder's head, in transformers and in SGLang."""
HEADS = {HEAD, "embed_out", LINEAR_HEAD}

NUMBERED = re.compile(r"(?:^|\.)(?:layers?|h|blocks)\.(\d+)\.")
"""Where the number of a layer stands in the name of a parameter, whatever the family calls its layers."""


def no_offset(config: PretrainedConfig) -> int:
    """The first position of a text is 0."""
    return 0


def after_padding(config: PretrainedConfig) -> int:
    """RoBERTa counts positions from its padding id + 1 on."""
    return config.pad_token_id + 1


def sliding_window(config: PretrainedConfig, layer: int) -> int | None:
    """`sliding_window` of a configuration, unless its `layer_types` say that the layer attends to everything."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds and kinds[layer] == "full_attention" else getattr(config, "sliding_window", None)


def unchanged(logits: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """The logits are what the head gives."""
    return logits


def divided(logits: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Granite divides its logits."""
    return logits / config.logits_scaling


def multiplied(logits: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Cohere multiplies its logits."""
    return logits * config.logit_scale


def soft_capped(logits: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Gemma 2 and 3 keep their logits between -cap and cap: cap * tanh(logits / cap)."""
    cap = config.final_logit_softcapping
    return logits if cap is None else cap * torch.tanh(logits / cap)


KV_FREE = frozenset(
    "q_proj query o_proj out_proj dense gate_proj up_proj gate_up_proj down_proj fc1 fc2 dense_h_to_4h dense_4h_to_h"
    " c_proj c_fc q_lin out_lin lin1 lin2 Wo Wi".split()
)
STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ATTENTIONS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


@dataclass(frozen=True)
class Family:
    """What is known of the models of one architecture; the defaults are right for most.

    Args:
        layers: path, in the transformer without its head, of the list of its layers; "" is the first list that has as
            many modules as the configuration has layers.
        kv_free: names of linear modules of a layer whose adapters change neither keys nor values of that layer.
        stacked: projections that engines keep as one, by the name of the whole: its members, in order.
        targets: names of the modules that LoRA adapts by default; () is what PEFT says of the family, else every linear
            layer but the head.
        uncalled: names of linear layers whose weights fused kernels read: adapters beside them would do nothing.
        first_position: of a configuration: the number of a text's first position: places below it are not used.
        window: of a configuration and the number of a layer: how many tokens back the layer attends, None for all.
        logits: from the head's logits, float32 of any shape, and the configuration: what the model makes of them, each
            by itself.
        attentions: the `layer_types` of layers that keep keys and values of every token; a model with others takes no
            prefix.
    """

    layers: str = ""
    kv_free: frozenset[str] = KV_FREE
    stacked: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: STACKS)
    targets: tuple[str, ...] = ()
    uncalled: frozenset[str] = frozenset()
    first_position: Callable[[PretrainedConfig], int] = no_offset
    window: Callable[[PretrainedConfig, int], int | None] = sliding_window
    logits: Callable[[torch.Tensor, PretrainedConfig], torch.Tensor] = unchanged
    attentions: frozenset[str] = ATTENTIONS

    def layers_of(self, body: nn.Module, n_layers: int) -> nn.ModuleList | None:
        """The list of a transformer's layers, None if there is none: layers may share their weights."""
        if self.layers:
            return body.get_submodule(self.layers)
        return next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)

    def layer_of(self, name: str) -> int | None:
        """Number of the layer that a parameter is in, by the name of the parameter; None outside the layers.

        >>> GENERIC.layer_of("base_model.model.model.layers.29.mlp.up_proj.lora_B.weight")
        29
        """
        pattern = rf"(?:^|\.){re.escape(self.layers)}\.(\d+)\." if self.layers else NUMBERED
        number = re.search(pattern, name)
        return int(number.group(1)) if number else None

    def stack_of(self, leaf: str) -> tuple[str, int]:
        """Name of the stack that a projection is in, and its position there; its own name and 0 if it is in none.

        >>> GENERIC.stack_of("v_proj"), GENERIC.stack_of("o_proj")
        (('qkv_proj', 2), ('o_proj', 0))
        """
        places = ((stack, members.index(leaf)) for stack, members in self.stacked.items() if leaf in members)
        return next(places, (leaf, 0))


GENERIC = Family()
LLAMA = Family(layers="layers")
BERT = Family(layers="encoder.layer", kv_free=frozenset({"query", "dense"}), stacked={}, targets=("query", "value"))
ROBERTA = replace(BERT, first_position=after_padding)
QV = ("q_proj", "v_proj")

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma"), LLAMA),
    **dict.fromkeys(("gemma2", "gemma3_text"), replace(LLAMA, logits=soft_capped)),
    "granite": replace(LLAMA, logits=divided, targets=QV),
    "cohere": replace(LLAMA, logits=multiplied, targets=QV),
    "cohere2": replace(LLAMA, logits=multiplied, targets=QV),
    "opt": Family(layers="decoder.layers"),
    "gpt_neox": Family(layers="layers", kv_free=frozenset({"dense", "dense_h_to_4h", "dense_4h_to_h"}), stacked={}),
    "bert": BERT,
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), Family(uncalled=frozenset({"out_proj", "dt_proj"}))),
    **dict.fromkeys(("roberta", "camembert", "data2vec-text", "roberta-prelayernorm"), ROBERTA),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), ROBERTA),
    **dict.fromkeys(("esm", "longformer", "luke", "mpnet", "xmod"), Family(first_position=after_padding)),
}
"""Families by `model_type` of their configuration. A quirk is one line here, and one function above if it is new."""


def family_of(config: PretrainedConfig) -> Family:
    """The family of a model by its configuration, or by that of its text where it reads images too."""
    kinds = (config.model_type, config.get_text_config().model_type)
    return next((FAMILIES[kind] for kind in kinds if kind in FAMILIES), GENERIC)


def why_kv_depends(names: Iterable[str], n_layers: int, family: Family = GENERIC) -> str | None:
    """The first trained parameter that changes a key or value, with the reason; None if there is none.

    Keys and values of layer l follow from the layers below and from l's own key and value projections: they are the
    same under every theta only if no layer but the last is adapted, and its keys and values are not.

    Args:
        names: of the trained parameters.
        n_layers: layers of the model.
        family: of the model.

    >>> why_kv_depends(["model.layers.1.self_attn.q_proj.lora_A.weight"], 2) is None
    True
    >>> why_kv_depends(["model.layers.0.mlp.up_proj.lora_A.weight"], 2)
    'model.layers.0.mlp.up_proj.lora_A.weight lies below the last layer, 1'
    """
    for name in names:
        layer, leaf = family.layer_of(name), leaf_of(name)
        if layer is None and leaf in HEADS:
            continue  # it comes after every key and value
        if layer != n_layers - 1:
            return f"{name} lies below the last layer, {n_layers - 1}"
        if leaf not in family.kv_free:
            return f"{name} may change keys or values of its layer"
    return None


def module_of(name: str) -> str:
    """Path of the module that a parameter of an adapter belongs to, as the base model names it.

    >>> module_of("base_model.model.model.layers.29.mlp.up_proj.lora_B.weight")
    'model.layers.29.mlp.up_proj'
    """
    return name.removeprefix("base_model.model.").split(".lora_")[0].removesuffix(".weight")


def leaf_of(name: str) -> str:
    """Last part of `module_of`: the name that --target-modules knows a module by.

    >>> leaf_of("base_model.model.model.layers.29.mlp.up_proj.lora_B.weight")
    'up_proj'
    """
    return module_of(name).rsplit(".", 1)[-1]


def complete_stacks(config: PretrainedConfig, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an adapter, and zeros for members of a stack that it lacks: the same adapter to every user of it.

    SGLang 0.5.23 reads the value projection of every adapted query projection, whether or not the file has one.

    Args:
        config: of the base model; it gives the sizes of the missing members.
        tensors: by canonical name: lora_A (r, inputs) and lora_B (outputs, r).
    """
    complete, family = dict(tensors), family_of(config)
    for name, tensor in tensors.items():
        parent, _, leaf = module_of(name).rpartition(".")
        for member in family.stacked.get(family.stack_of(leaf)[0], ()):
            twin = name.replace(f"{parent}.{leaf}.", f"{parent}.{member}.")
            if twin not in complete:
                outputs = tensor.shape[0]
                if not name.endswith("lora_A.weight") and member in HEADS_MADE:
                    outputs = _outputs(config, member)
                complete[twin] = torch.zeros(outputs, tensor.shape[1])
    return complete


def complete_fields(peft: dict, tensors: dict[str, torch.Tensor]) -> dict:
    """adapter_config.json for completed tensors, with the scale of rsLoRA, which SGLang does not know, in lora_alpha.

    >>> complete_fields({"r": 4, "lora_alpha": 8, "use_rslora": True}, {})
    {'r': 4, 'lora_alpha': 16.0, 'target_modules': []}
    """
    fields = {**peft, "target_modules": sorted(set(map(leaf_of, tensors)))}
    if fields.pop("use_rslora", False):
        fields["lora_alpha"] = peft["lora_alpha"] * math.sqrt(peft["r"])
    return fields


HEADS_MADE = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads", "v_proj": "num_key_value_heads"}
"""Which heads a projection makes: under grouped-query attention there are fewer of keys and values."""


def _outputs(config: PretrainedConfig, leaf: str) -> int:
    """Output size of a query, key or value projection."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return head_dim * (getattr(config, HEADS_MADE[leaf], None) or heads)
