"""Tiny models of every supported family, with random weights, and a tokenizer: what tests run on."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

WORDS = "good fine great nice bad awful poor terrible the a film story plot acting was is It very and but".split()
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
LAST_LAYER = {  # modules whose adapters leave keys and values alone
    "llama": ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "qwen2": ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    "opt": ("q_proj", "out_proj", "fc1", "fc2"),
    "gpt_neox": ("dense", "dense_h_to_4h", "dense_4h_to_h"),
    "bert": ("query", "dense"),
    "roberta": ("query", "dense"),
}
ENCODERS = ("bert", "roberta")
OPT_SIZES = {"ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.2}


def build(family: str, **others) -> torch.nn.Module:
    """A model of the family with the same random weights each time; `others` are of its configuration."""
    torch.manual_seed(0)
    sizes, kv = {**SIZES, **others}, {"num_key_value_heads": 2}
    opt = {k: v for k, v in sizes.items() if k not in ("intermediate_size", "initializer_range")}
    makers = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, **kv)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes, **kv)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**opt, **OPT_SIZES)),
        "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**sizes)),
        "bert": lambda: BertForMaskedLM(BertConfig(**SIZES)),
        "roberta": lambda: RobertaForMaskedLM(RobertaConfig(**SIZES)),
    }
    return makers[family]().eval()


def tokenizer(masked: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer in which ' great' is one token and any other word is unknown."""
    words = ["<pad>", "<unk>", "<mask>", *WORDS]
    words += [f"w{i}" for i in range(len(words), SIZES["vocab_size"])]  # every token of a model is a word
    vocabulary = {word: i for i, word in enumerate(words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"mask_token": "<mask>"} if masked else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", **special)


def save(family: str, directory: Path, **others) -> str:
    """Write model and tokenizer to a directory and return its path."""
    build(family, **others).save_pretrained(directory)
    tokenizer(family in ENCODERS).save_pretrained(directory)
    return str(directory)
