"""MeZO: fine-tuning of language models with forward passes only, on fused parameter ops."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mezo.config import Config
    from mezo.optim import MeZO
    from mezo.scripting import Run, evaluate, replay, resume, train
    from mezo.trainer import MeZOMixin, MeZOTrainer

__all__ = ["Config", "MeZO", "MeZOMixin", "MeZOTrainer", "Run", "evaluate", "replay", "resume", "train"]
_PLACES = {"Config": "mezo.config", "MeZO": "mezo.optim"}
_PLACES |= dict.fromkeys(("MeZOMixin", "MeZOTrainer"), "mezo.trainer")
_PLACES |= dict.fromkeys(("Run", "evaluate", "replay", "resume", "train"), "mezo.scripting")


def __getattr__(name: str):
    """Import only what is asked for: torch and transformers take seconds, and `mezo --help` needs neither."""
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'mezo' has no attribute {name!r}")
