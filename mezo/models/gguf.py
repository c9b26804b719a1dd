"""A GGUF file as a model, its weights packed as they are; and to a transformers directory of float32 safetensors."""

import contextlib
import copy
import io
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, dequantize
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mezo.errors import UserError
from mezo.models.blocks import NOT_PACKED, BlockLinear, decode

METHOD = "GGUF"
"""What a configuration calls a model so held, as its `quant_method`; transformers has one in small letters."""


@dataclass(frozen=True)
class Read:
    """A GGUF file as tensors of a model of transformers.

    Args:
        path: of the file.
        config: of the model.
    """

    path: str
    config: PretrainedConfig

    @property
    def reader(self) -> GGUFReader:
        """What maps the file."""
        return _reader(self.path, Path(self.path).stat().st_mtime_ns)

    @property
    def packed(self) -> bool:
        """Whether any of the file's tensors is held in blocks."""
        return any(tensor.tensor_type not in NOT_PACKED for tensor in self.reader.tensors)

    def tensors(self, model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, GGMLQuantizationType]]:
        """The weights of a model: blocks of its linear layers but the head, floats of all else.

        Blocks are taken where transformers changes no more than the order of rows, which is found by giving it numbered
        rows; and only if they mean the very floats that it makes of them.

        Args:
            model: on torch's meta device.
        Returns:
            Tensors by name, and by the name of a layer the kind of its blocks.
        """
        architecture = str(self.reader.get_field("general.architecture").contents())
        processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=self.config.to_dict())
        names = get_gguf_hf_weights_map(model, processor)
        packable = {name for name, m in model.named_modules() if type(m) is nn.Linear}
        packable -= {name for name, m in model.named_modules() if m is model.get_output_embeddings()}
        found, kinds = {}, {}
        for tensor in self.reader.tensors:
            made = {"tensors": found}  # where experts of a mixture are put together
            floats = dequantize(tensor.data, tensor.tensor_type)
            result = processor.process(floats, tensor.name, tensor_key_mapping=names, parsed_parameters=made)
            if result.name not in names:
                continue
            name = names[result.name]
            module, _, leaf = name.rpartition(".")
            rows = None
            if leaf == "weight" and module in packable and tensor.tensor_type not in NOT_PACKED:
                rows = _same_rows(tensor, processor, names, result.weights)
            if rows is None:
                found[name] = torch.from_numpy(np.array(result.weights))
            else:
                found[f"{module}.blocks"], kinds[module] = rows, tensor.tensor_type
        return found, kinds


@lru_cache(maxsize=1)
def _reader(path: str, changed: int) -> GGUFReader:
    """Kept until the model is loaded, since a vocabulary takes it seconds; `changed` is when the file was."""
    return GGUFReader(path)


def _same_rows(tensor, processor: TensorProcessor, names: dict, floats: np.ndarray) -> torch.Tensor | None:
    """The rows of blocks of a tensor in the order in which a model has them; None if it has no such rows.

    Args:
        tensor: of a `GGUFReader`.
        processor: what transformers does with its floats.
        names: of the model's tensors, by those of the file's.
        floats: what it made of them.
    """
    numbered = np.arange(len(tensor.data), dtype=np.float64)[:, None]
    try:
        ordered = processor.process(numbered, tensor.name, tensor_key_mapping=names, parsed_parameters={"tensors": {}})
    except (ValueError, IndexError, KeyError):  # it looks at more than rows
        return None
    if ordered.weights.shape != numbered.shape or not np.array_equal(np.sort(ordered.weights, axis=0), numbered):
        return None
    rows = torch.from_numpy(tensor.data[ordered.weights[:, 0].astype(np.int64)])
    return rows if torch.equal(decode(rows, tensor.tensor_type), torch.from_numpy(np.array(floats))) else None


@register_quantization_config(METHOD)
class BlocksConfig(QuantizationConfigMixin):
    """What a model of a GGUF file says of itself, for transformers.

    Args:
        kinds: of the blocks, by the name of a layer.
    """

    def __init__(self, kinds: dict[str, int] | None = None, **others):
        self.quant_method = METHOD
        self.kinds = dict(kinds or {})


@register_quantizer(METHOD)
class BlocksQuantizer(HfQuantizer):
    """Has transformers load blocks into `BlockLinear`."""

    requires_calibration = False
    is_trainable = False

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs) -> bool:
        """No weight is quantised here."""
        return False

    def is_serializable(self, *args, **kwargs) -> bool:
        """No checkpoint of transformers has such weights."""
        return False

    def _process_model_before_weight_loading(self, model: nn.Module, dtype: torch.dtype | None = None, **kwargs):
        for name, kind in self.quantization_config.kinds.items():
            layer = BlockLinear(model.get_submodule(name), GGMLQuantizationType(kind), dtype or model.dtype)
            model.set_submodule(name, layer)
        return model


def config_of_file(path: str) -> PretrainedConfig:
    """The configuration of a GGUF file, marked as that of packed weights if it has such.

    Raises:
        UserError: it is no GGUF file, or of an architecture that transformers does not read.
    """
    config = _read(AutoConfig, path)
    config.architectures = config.architectures or [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    if Read(path, config).packed:
        config.quantization_config = {"quant_method": METHOD}
    return config


def tokenizer_of_file(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a GGUF file. Raises UserError if transformers does not read it."""
    return _read(AutoTokenizer, path)


def _read(auto: type, path: str) -> PretrainedConfig | PreTrainedTokenizerBase:
    """What a class of transformers reads of a file, whose bytes may be anything."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return auto.from_pretrained(**_source(path))
    except (OSError, ValueError, LookupError, OverflowError, struct.error) as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"--model {path}: it is no GGUF file that transformers reads ({why})") from error


def load_file(auto: type, path: str, config: PretrainedConfig, **options) -> tuple[nn.Module, dict]:
    """A model of a GGUF file, and what transformers says of its loading.

    Args:
        auto: class of transformers that loads it with its head.
        path: of the file.
        config: `config_of_file`.
        options: of `from_pretrained`.
    """
    model = auto._model_mapping[type(config)]
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"):
        empty = model(copy.deepcopy(plain))
    tensors, kinds = Read(path, plain).tensors(empty)
    _reader.cache_clear()  # its fields are many small arrays
    if kinds:
        options["quantization_config"] = BlocksConfig(kinds)
    loaded, seen = model.from_pretrained(None, config=plain, state_dict=tensors, output_loading_info=True, **options)
    loaded.name_or_path = loaded.config.name_or_path = path
    return loaded, seen


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
    source, output_dir = _source(gguf_path), Path(output_dir)
    # The readers' own progress bars cannot be switched off, and would mix with the caller's.
    with contextlib.redirect_stderr(io.StringIO()):
        model = _unquantised(AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32))
        model.save_pretrained(output_dir)
        AutoTokenizer.from_pretrained(**source).save_pretrained(output_dir)
    return output_dir


def _source(path: str | Path) -> dict[str, str]:
    """Arguments with which transformers reads a GGUF file."""
    return {"pretrained_model_name_or_path": str(Path(path).parent), "gguf_file": Path(path).name}


def _unquantised(loaded: torch.nn.Module) -> torch.nn.Module:
    # A model loaded from GGUF stays marked as quantised and cannot be saved: its weights go into a fresh, plain one.
    config = copy.deepcopy(loaded.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model
