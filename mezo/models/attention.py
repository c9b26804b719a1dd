"""Scaled dot-product attention that may be given the keys and values of a row."""

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "mezo_sdpa"


def _attention(module, query, key, value, attention_mask, **kwargs):
    """Scaled dot-product attention; over the kept keys and values of the row where the module has been given some."""
    kept = module.__dict__.get("mezo_kept")
    if kept is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    if callable(kept):
        kept(key, value)
    key, value, attention_mask = kept
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=kwargs.get("scaling"), enable_gqa=True
    )
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, _attention)


AttentionMaskInterface.register(ATTENTION, sdpa_mask)
