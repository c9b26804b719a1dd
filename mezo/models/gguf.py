"""A GGUF file to a transformers directory: configuration, tokenizer, float32 safetensors."""

import contextlib
import copy
import io
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert_gguf(gguf_path: str | Path, output_dir: str | Path) -> Path:
    """Write the dequantised weights, the configuration and the tokenizer of a GGUF file.

    Args:
        gguf_path: the file; its quantised weights become float32, so they are not the checkpoint they came from.
        output_dir: directory to fill; made if missing.

    Returns:
        `output_dir`, which `from_pretrained` takes.

    Raises:
        OSError: the file is no GGUF file of an architecture that transformers reads.
    """
    gguf_path, output_dir = Path(gguf_path), Path(output_dir)
    source = {"pretrained_model_name_or_path": str(gguf_path.parent), "gguf_file": gguf_path.name}
    # The readers' own progress bars cannot be switched off, and would mix with the caller's.
    with contextlib.redirect_stderr(io.StringIO()):
        model = _unquantised(AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32))
        model.save_pretrained(output_dir)
        AutoTokenizer.from_pretrained(**source).save_pretrained(output_dir)
    return output_dir


def _unquantised(loaded: torch.nn.Module) -> torch.nn.Module:
    # A model loaded from GGUF stays marked as quantised and cannot be saved: its weights go into a fresh, plain one.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model
