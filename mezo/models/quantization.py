"""Frozen weights in 8 or 4 bits: the libraries that transformers loads them by, and what is read of such weights.

What is trained stays in float32 beside them. A weight that a library holds is either a tensor of its own class with
other tensors within (torchao), or a parameter of bytes with what they mean beside it (bitsandbytes).
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers import BitsAndBytesConfig, CompressedTensorsConfig, PretrainedConfig, TorchAoConfig
from transformers.pytorch_utils import Conv1D

from mezo.errors import UserError
from mezo.models.spec import NONE


@dataclass(frozen=True)
class Format:
    """What `--quantization` names.

    Args:
        library: that holds such weights and multiplies by them.
        config: what transformers is told, for a model whose other numbers are of a dtype.
        gpu: it has no kernels for a CPU.
    """

    library: str
    config: Callable[[torch.dtype], object]
    gpu: bool = False


def _torchao(name: str, **options) -> Callable[[torch.dtype], TorchAoConfig]:
    def config(dtype: torch.dtype) -> TorchAoConfig:
        import torchao.quantization

        return TorchAoConfig(getattr(torchao.quantization, name)(**options))

    return config


def _four_bits(kind: str) -> Callable[[torch.dtype], BitsAndBytesConfig]:
    return lambda dtype: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=dtype, bnb_4bit_use_double_quant=False
    )


FORMATS = {
    "int8": Format("torchao", _torchao("Int8WeightOnlyConfig")),
    "int4": Format("torchao", _torchao("Int4WeightOnlyConfig", group_size=32), gpu=True),
    "float8": Format("torchao", _torchao("Float8WeightOnlyConfig")),
    "nf4": Format("bitsandbytes", _four_bits("nf4")),
    "fp4": Format("bitsandbytes", _four_bits("fp4")),
    "llm-int8": Format("bitsandbytes", lambda dtype: BitsAndBytesConfig(load_in_8bit=True)),
}
"""By the name that `--quantization` takes."""


def config_of(quantization: str, dtype: torch.dtype, device: torch.device, model: PretrainedConfig) -> object | None:
    """What `from_pretrained` takes as `quantization_config`; None where the weights stay as the checkpoint has them.

    Args:
        quantization: what --quantization names.
        dtype: of all that is not quantised.
        device: where the model will be.
        model: its configuration.
    Raises:
        UserError: the model is quantised already, or the library is not there, or has nothing for the device.
    """
    if quantization == NONE:
        return None
    held = quantised_by(model)
    if held:
        raise UserError(f"--quantization {quantization}: the model is quantised already ({held}): leave it out")
    chosen = FORMATS[quantization]
    if importlib.util.find_spec(chosen.library) is None:
        raise UserError(
            f"--quantization {quantization} needs {chosen.library}, which is not installed:"
            " pip install 'mezo-kernels[quantization]'"
        )
    if chosen.gpu and device.type == "cpu":
        others = " or ".join(name for name, each in FORMATS.items() if not each.gpu)
        raise UserError(f"--quantization {quantization}: {chosen.library} has no kernel for a CPU; use {others}")
    return chosen.config(dtype)


def restoring(held: str | None) -> CompressedTensorsConfig | None:
    """What `from_pretrained` takes as `quantization_config` of a checkpoint that is loaded as floats; None of others.

    The library of compressed-tensors unpacks weights in the first pass of the whole model, which the parts of one do
    not make, and holds floats from then on: so they are unpacked as they are loaded.

    Args:
        held: how the checkpoint is quantised; see `quantised_by`.
    Raises:
        ImportError: the library is not installed.
    """
    return CompressedTensorsConfig(dequantize=True) if held == "compressed-tensors" else None


def quantised_by(model: PretrainedConfig) -> str | None:
    """How a checkpoint was quantised, as its config.json says, such as "awq"; None if it was not."""
    config = getattr(model, "quantization_config", None)
    if config is None:
        return None
    method = config.get("quant_method", "") if isinstance(config, dict) else config.quant_method
    return str(getattr(method, "value", method)) or "quantised"


def library_of(quantization: str, model: PretrainedConfig) -> str | None:
    """What holds the quantised weights of a model, None if they are plain; see `config_of`."""
    return FORMATS[quantization].library if quantization != NONE else quantised_by(model)


def is_quantised(model: nn.Module) -> bool:
    """Whether a loaded model of transformers holds quantised weights."""
    return getattr(model, "hf_quantizer", None) is not None


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors that a quantised model consists of, packed weights with all that belongs to them."""
    seen: set[int] = set()
    parameters = dict(model.named_parameters())  # a tied one has one name here, several in the state
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, torch.Tensor) or (isinstance(tensor, nn.Parameter) and name not in parameters):
            continue
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield from _within(name, tensor.detach())


def _within(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors of a tensor of torchao's, or a tensor itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for part in tensor.__tensor_flatten__()[0]:
        yield from _within(f"{name}.{part}", getattr(tensor, part))


def plain_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer as floats, dequantised if need be: what its product multiplies by.

    Raises:
        UserError: it is held in a form that cannot be read as floats.
    """
    weight = getattr(module, "weight", None)
    if isinstance(weight, torch.Tensor) or hasattr(module, "W_q"):
        weight = dequantize_module_weight(module).detach()
    if weight is None or not weight.is_floating_point():
        raise UserError(f"a weight of {type(module).__name__} cannot be read as floats: use a model that is not packed")
    return weight


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a linear layer that holds a quantised weight."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module) is not nn.Linear or type(module.weight.data) is not torch.Tensor


def is_foreign(module: nn.Module) -> bool:
    """Whether a module is what a library has in the place of a linear layer, of no class of torch's.

    Args:
        module: of a quantised model.
    """
    sizes = (getattr(module, name, None) for name in ("in_features", "out_features"))
    return not isinstance(module, nn.Linear) and all(isinstance(size, int) for size in sizes)


def settle(model: nn.Module, quantization: str, dtype: torch.dtype) -> None:
    """See to it that a model that was just loaded is quantised, and that float32 means float32.

    On a CPU with instructions for bfloat16 bitsandbytes would round what a float32 model computes to that.

    Raises:
        UserError: nothing of it is quantised.
    """
    packed = [module for module in model.modules() if is_packed(module)]
    if quantization != NONE and not packed:
        raise UserError(
            f"--quantization {quantization}: {FORMATS[quantization].library} quantises linear layers, and this model"
            " has none: leave it out"
        )
    for module in packed:
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu &= dtype != torch.float32


@torch.no_grad()
def dequantise(model: nn.Module) -> nn.Module:
    """Put plain float32 layers in the place of the quantised ones of a model, which no longer says it is one.

    Raises:
        UserError: see `plain_weight`.
    """
    for name, module in list(model.named_modules()):
        if is_foreign(module):
            raise UserError(f"layers of {type(module).__name__} cannot be written as floats: use --format peft")
        if not is_packed(module):
            continue
        weight = plain_weight(module).float()
        outputs, inputs = weight.shape
        if getattr(module, "source_cls", nn.Linear) is Conv1D:  # which keeps its weight transposed
            plain, weight = Conv1D(outputs, inputs), weight.T
        else:
            plain = nn.Linear(inputs, outputs, bias=module.bias is not None, device="meta")
        plain.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
        if module.bias is not None:
            plain.bias = nn.Parameter(module.bias.detach().float(), requires_grad=False)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.eval())
    del model.config.quantization_config
    for mark in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if mark in model.__dict__:
            delattr(model, mark)
    return model.float()
