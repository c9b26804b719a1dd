"""What attention sees: keys and values that are known already, a prefix in front of them, rows that lie end to end."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "mezo_sdpa"
"""Name under which transformers knows the attention of this module."""

Known = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Keys and values, (rows, heads, length, head_dim), and the mask of them, (rows, 1, scored, length) bool."""


@contextmanager
def attending(attention: nn.Module | None, known: Known | Callable | None) -> Iterator[None]:
    """Meanwhile a layer attends to known keys and values in place of those that it works out.

    Args:
        attention: the attention module of the layer; it is left alone where `known` is None.
        known: what it attends to, or a function that is told its own keys and values, and must raise.
    """
    if known is None:
        yield
        return
    attention.mezo_known = known
    try:
        yield
    finally:
        del attention.mezo_known


_groups: Sequence[tuple[int, int]] = ()


@contextmanager
def within_rows(groups: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Meanwhile the one row of a batch is many that lie end to end, and each token attends within its own.

    Args:
        groups: (rows, length) of rows of one length, as they follow one another.
    """
    global _groups
    before, _groups = _groups, groups
    try:
        yield
    finally:
        _groups = before


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scaled dot-product attention, to known keys and values where `attending` has given the module some."""
    known = module.__dict__.get("mezo_known")
    if known is None and _groups:
        if attention_mask is not None:
            raise ValueError("a mask of rows that lie end to end")
        return _attention_within_rows(module, query, key, value, **kwargs), None
    if known is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if callable(known):
        known(key, value)
    key, value, attention_mask = known
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


def _attention_within_rows(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **kwargs
) -> torch.Tensor:
    """(1, tokens, heads, head_dim), of rows that lie end to end in the only row of a batch."""
    outs, start = [], 0
    for rows, length in _groups:
        span = slice(start, start + rows * length)
        parts = [t[0, :, span].unflatten(1, (rows, length)).transpose(0, 1) for t in (query, key, value)]
        outs.append(sdpa_attention_forward(module, *parts, None, **kwargs)[0].flatten(0, 1))
        start = span.stop
    return torch.cat(outs)[None]


def _mask(*args, **kwargs) -> torch.Tensor | None:
    """The mask that a model makes for its attention; rows that lie end to end need none."""
    return None if _groups else sdpa_mask(*args, **kwargs)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)


def cache_argument(body: nn.Module) -> str | None:
    """What a forward pass calls keys and values that it is given, by transformers' version; None if it takes none."""
    taken = inspect.signature(body.forward).parameters
    return next((name for name in ("past_key_values", "cache") if name in taken), None)  # until 5.23, from 5.24 on


@dataclass(frozen=True)
class Prefix:
    """The trained keys and values.

    Args:
        weight: (tokens, layers * 2 * heads * head_dim): for each layer the keys of all heads, then the values.
        layers: of the model.
        heads: of keys and values.
        argument: what a forward pass calls them.
    """

    weight: nn.Parameter
    layers: int
    heads: int
    argument: str

    @property
    def tokens(self) -> int:
        """Tokens of the prefix."""
        return len(self.weight)

    def cache(self, rows: int, weights: torch.Tensor | None = None) -> DynamicCache:
        """A new key-value cache for a batch of so many rows that begins with the prefix; gradients flow to it.

        Args:
            rows: of the batch.
            weights: (rows, *weight.shape), a prefix for each row; None takes `weight` for all.
        """
        weights = self.weight.expand(rows, -1, -1) if weights is None else weights
        parts = weights.view(rows, self.tokens, 2 * self.layers, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return DynamicCache(zip(parts[::2], parts[1::2], strict=True))

    def inputs(self, rows: int, mask: torch.Tensor | None = None, weights: torch.Tensor | None = None) -> dict:
        """Arguments of a forward pass behind the prefix; `mask`, (rows, length), says where there are tokens."""
        if mask is not None:
            mask = nn.functional.pad(mask, (self.tokens, 0), value=1)
        return {self.argument: self.cache(rows, weights), "attention_mask": mask}
