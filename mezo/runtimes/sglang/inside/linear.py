"""The frozen linear layers of an engine on a CPU: weights packed for oneDNN, as `models/linear.py` has it."""

from collections.abc import Callable

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.utils import use_intel_amx_backend
from torch import nn

from mezo.models.linear import lay_out, onednn, packed_product, why_not_by

_head_by_onednn = False


class PackedLinearMethod(UnquantizedLinearMethod):
    """What a linear layer of the engine computes its output by.

    Args:
        weight: (outputs, inputs); it may be freed.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.packed = lay_out(weight)

    def apply(self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x times the weight, plus the bias."""
        return packed_product(x, self.packed, bias)


def pack(model: nn.Module, wanted: bool) -> int:
    """Pack the linear layers of a model of the engine, or put their plain weights back; layers that are so stay so.

    A layer that the engine itself has laid out for Intel's matrix unit is left alone, and so is a quantised one.

    Args:
        model: of the engine.
        wanted: pack them.
    Returns:
        Bytes of packed weights.
    """
    global _head_by_onednn
    nbytes, dtypes = 0, set()
    for layer in model.modules():
        method = layer.__dict__.get("quant_method")
        if type(method) is PackedLinearMethod and not wanted:
            layer.weight.data, layer.quant_method = method.packed.to_dense(), UnquantizedLinearMethod()
        elif type(method) is UnquantizedLinearMethod and wanted and not use_intel_amx_backend(layer):
            layer.quant_method = PackedLinearMethod(layer.weight.data)
            layer.weight.data = layer.weight.data.new_empty(0)
        if type(layer.__dict__.get("quant_method")) is PackedLinearMethod:
            packed = layer.quant_method.packed
            nbytes += packed.numel() * packed.dtype.itemsize
            dtypes.add(packed.dtype)
    _head_by_onednn = dtypes == {torch.float32} and why_not_by("onednn", torch.float32, torch.device("cpu")) is None
    return nbytes


def head(original: Callable, *args, **kwargs) -> torch.Tensor:
    """Around `LogitsProcessor._compute_lm_head`: its weight, often that of the embedding, is taken as it lies."""
    if not _head_by_onednn:
        return original(*args, **kwargs)
    with onednn():
        return original(*args, **kwargs)
