"""MeZO: fine-tuning of language models with forward passes only, on fused parameter ops."""

from mezo.optim import MeZO

__all__ = ["MeZO"]
