"""A tiny Llama with random weights as a GGUF file, as llama.cpp writes one."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quantize
from gguf.constants import MODEL_ARCH
from transformers import PreTrainedModel

from tests.tiny_models import SIZES, build

LETTERS = [*"abcdefghijklmnopqrstuvwxyz.AIF", "Ġ"]  # the byte-level tokenizer writes a space so
MERGES = ["Ġ g", "r e", "Ġg re", "a t", "Ġgre at", "Ġ t", "Ġ a", "i l", "Ġ f"]


def save(directory: Path, kind: GGMLQuantizationType, **others) -> str:
    """Write a Llama whose matrices are quantised, all but the embedding; return the path.

    Args:
        directory: that gets the file.
        kind: of the blocks, or of floats.
        others: of the model's configuration.
    """
    model = build("llama", **others)
    path = directory / "model.gguf"
    writer = GGUFWriter(path, "llama")
    _describe(writer, model)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        value = tensor.numpy()
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(module.rsplit(".", 1)[-1])
        if heads:  # its two halves of each head alternate in the file
            value = value.reshape(getattr(model.config, heads), 2, -1, value.shape[1]).swapaxes(1, 2)
            value = value.reshape(tensor.shape)
        place = f"{names.get_name(module)}.{leaf}"
        if module.endswith("_proj"):
            writer.add_tensor(place, quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)
        else:
            writer.add_tensor(place, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _describe(writer: GGUFWriter, model: PreTrainedModel) -> None:
    """Configuration and tokenizer."""
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<pad>", "<unk>", "<end>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES)]
    tokens += [f"w{i}" for i in range(len(tokens), config.vocab_size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 2, 3, *[1] * (len(tokens) - 3)])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(1)
    writer.add_pad_token_id(0)
