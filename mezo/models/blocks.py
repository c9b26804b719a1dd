"""Linear layers whose weights stay in the blocks of a GGUF file, as it has them.

A block is some weights that lie beside each other in a row, as small whole numbers, and the scales that make floats of
these. A product makes the floats of its whole weight, multiplies, and forgets them: it saves memory, not time. The
formats are llama.cpp's; what their floats are is defined by `gguf.dequantize`, which is equal to this to the bit.
"""

from collections.abc import Callable

import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
from torch import nn

NOT_PACKED = frozenset({GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16})
"""Kinds of a file's tensors that are floats already."""


def _halves(blocks: torch.Tensor, first: int, number: int) -> torch.Tensor:
    """`number` float16 numbers of each block, from byte `first` on, as float32 (blocks, number)."""
    return blocks[:, first : first + 2 * number].contiguous().view(torch.float16).float()


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """The low halves of some bytes (blocks, bytes), then the high ones, as float32 (blocks, 2, bytes)."""
    out = torch.empty(len(codes), 2, codes.shape[1])
    out[:, 0] = codes & 15
    out[:, 1] = codes >> 4
    return out


def _q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return _nibbles(blocks[:, 2:]).flatten(1).sub_(8).mul_(_halves(blocks, 0, 1))


def _q4_1(blocks: torch.Tensor) -> torch.Tensor:
    scales = _halves(blocks, 0, 2)
    return _nibbles(blocks[:, 4:]).flatten(1).mul_(scales[:, :1]).add_(scales[:, 1:])


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halves(blocks, 0, 1))


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 weights in eighths, each with a scale and a least value of six bits."""
    scales, least, both = blocks[:, 4:16].unflatten(1, (3, 4)).unbind(1)
    six = [torch.cat([low & 63, rest | (low >> 2 & 48)], 1) for low, rest in ((scales, both & 15), (least, both >> 4))]
    scale, offset = (halves * bits for halves, bits in zip(_halves(blocks, 0, 2).split(1, 1), six, strict=True))
    values = _nibbles(blocks[:, 16:].reshape(-1, 32)).view(-1, 8, 32)
    return values.mul_(scale[..., None]).sub_(offset[..., None]).flatten(1)


def _q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 weights in sixteenths, each with a scale of eight bits; four bits of a weight lie here, two there."""
    scale = _halves(blocks, 208, 1) * blocks[:, 192:208].view(torch.int8)
    low = blocks[:, :128].view(-1, 2, 1, 64)
    low = torch.cat([low & 15, low >> 4], 2).view(-1, 8, 32)
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    high = torch.cat([high >> shift & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 8, 32)
    values = (low | high << 4).view(-1, 16, 16).float().sub_(32)
    return values.mul_(scale[..., None]).flatten(1)


DECODERS: dict[GGMLQuantizationType, Callable[[torch.Tensor], torch.Tensor]] = {
    GGMLQuantizationType.Q4_0: _q4_0,
    GGMLQuantizationType.Q4_1: _q4_1,
    GGMLQuantizationType.Q8_0: _q8_0,
    GGMLQuantizationType.Q4_K: _q4_k,
    GGMLQuantizationType.Q6_K: _q6_k,
}
"""From blocks, uint8 (blocks, bytes), to their float32 values (blocks, weights). Other kinds go by way of numpy."""


def decode(rows: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """The floats that rows of blocks mean.

    Args:
        rows: uint8, (rows, bytes).
        kind: of the blocks.
    Returns:
        float32, (rows, weights).

    >>> rows = torch.tensor([[0, 60, *range(16)]], dtype=torch.uint8)  # a scale of 1 and 32 halves of bytes
    >>> decode(rows, GGMLQuantizationType.Q4_0)[0, :4].tolist()
    [-8.0, -7.0, -6.0, -5.0]
    """
    decoder = DECODERS.get(kind)
    if decoder is None:
        values = torch.from_numpy(dequantize(rows.cpu().numpy(), kind)).to(rows.device)
    else:
        values = decoder(rows.reshape(-1, GGML_QUANT_SIZES[kind][1]))
    return values.view(len(rows), -1)


class BlockLinear(nn.Linear):
    """A linear layer whose weight is held in blocks; `weight` makes floats of them, a copy.

    Args:
        like: the layer that it stands for; its weight is not read.
        kind: of the blocks.
        dtype: of the floats.
    """

    def __init__(self, like: nn.Linear, kind: GGMLQuantizationType, dtype: torch.dtype):
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.kind, self.dtype = kind, dtype
        weights, nbytes = GGML_QUANT_SIZES[kind]
        blocks = torch.empty(self.out_features, self.in_features // weights * nbytes, dtype=torch.uint8)
        self.register_buffer("blocks", blocks)
        self.register_parameter("bias", like.bias)

    @property
    def weight(self) -> torch.Tensor:
        """(outputs, inputs), of the layer's dtype."""
        return decode(self.blocks, self.kind).to(self.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See `nn.Linear`."""
        return nn.functional.linear(x, self.weight, self.bias)
