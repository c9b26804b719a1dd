"""Tiny models with random weights of the families that people have, each with what sets its family apart."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from tests.tiny_models import tokenizer

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1}
CAUSAL, MASKED, READER = AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
SEER = AutoModelForImageTextToText
CLIP = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, "projection_dim": 32}
LLAVA = {
    "text_config": {"model_type": "llama"} | GROUPED,
    "vision_config": CLIP
    | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
    "image_token_index": 63,
}
ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
QWEN2_VL = {
    "text_config": GROUPED | {"rope_parameters": ROPE},
    "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4},
    **{f"{name}_token_id": 60 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))},
}
T5_SIZES = {"num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}
BART_SIZES = {
    f"{part}_{name}": size
    for part in ("encoder", "decoder")
    for name, size in {"layers": 2, "attention_heads": 4, "ffn_dim": 48}.items()
}
CAPPED = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 2.0, "hidden_act": "gelu_pytorch_tanh"}
POSITIONS = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}


@dataclass(frozen=True)
class Tiny:
    """How to make a model.

    Args:
        auto: class of transformers that makes it.
        sizes: of its configuration.
        scale: what its matrices are multiplied by: logits as they come from random weights are nearly equal.
    """

    auto: type
    sizes: dict
    scale: float = 6


FAMILIES = {
    "albert": Tiny(MASKED, SIZES | {"embedding_size": 16}),
    "bart": Tiny(READER, {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 2} | BART_SIZES),
    "bloom": Tiny(CAUSAL, {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "deberta": Tiny(MASKED, SIZES | POSITIONS | {"type_vocab_size": 0}),
    "deberta-v2": Tiny(MASKED, SIZES | POSITIONS | {"type_vocab_size": 0}),
    "distilbert": Tiny(MASKED, {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}),
    "electra": Tiny(MASKED, SIZES | {"embedding_size": 16}),
    "falcon": Tiny(CAUSAL, {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "gemma": Tiny(CAUSAL, HEADS),
    "gemma2": Tiny(CAUSAL, HEADS | CAPPED),
    "gemma3_text": Tiny(CAUSAL, HEADS),
    "gpt2": Tiny(CAUSAL, {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "gpt_oss": Tiny(CAUSAL, HEADS | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4}),
    "granite": Tiny(CAUSAL, GROUPED | {"logits_scaling": 8.0}),
    "lfm2": Tiny(CAUSAL, GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}),
    "llava": Tiny(SEER, LLAVA),
    "mamba": Tiny(CAUSAL, {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, scale=3),
    "mistral": Tiny(CAUSAL, GROUPED | {"sliding_window": 4}),
    "mixtral": Tiny(CAUSAL, GROUPED | {"num_local_experts": 4}),
    "modernbert": Tiny(MASKED, SIZES),
    "olmo2": Tiny(CAUSAL, GROUPED),
    "phi": Tiny(CAUSAL, GROUPED),
    "phi3": Tiny(CAUSAL, GROUPED),
    "qwen2_vl": Tiny(SEER, QWEN2_VL),
    "qwen3": Tiny(CAUSAL, HEADS),
    "qwen3_moe": Tiny(CAUSAL, HEADS | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "t5": Tiny(READER, {"vocab_size": 64, "d_model": 32, "decoder_start_token_id": 0} | T5_SIZES, scale=2),
    "xlm-roberta": Tiny(MASKED, SIZES),
}
"""By `model_type`."""


def build(name: str, **others) -> PreTrainedModel:
    """A model of a family, the same each time; `others` are of its configuration."""
    torch.manual_seed(0)
    tiny = FAMILIES[name]
    model = tiny.auto.from_config(AutoConfig.for_model(name, **IDS | tiny.sizes | others)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(tiny.scale)
    return model


def save(name: str, directory: Path, **others) -> str:
    """Write model and tokenizer to a directory and return its path."""
    build(name, **others).save_pretrained(directory)
    tokenizer(masked=FAMILIES[name].auto is MASKED).save_pretrained(directory)
    return str(directory)
