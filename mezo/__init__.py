"""MeZO: fine-tuning of language models with forward passes only, on fused parameter ops."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezo.optim import MeZO

__all__ = ["MeZO"]


def __getattr__(name: str):
    """Import torch only when `mezo.MeZO` is asked for, so that `mezo --help` is quick."""
    if name == "MeZO":
        from mezo.optim import MeZO

        return MeZO
    raise AttributeError(f"module 'mezo' has no attribute {name!r}")
