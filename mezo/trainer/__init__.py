"""MeZO inside the Trainer of transformers, and inside trainers that are made from it."""

from mezo.trainer.trainer import MeZOMixin, MeZOTrainer

__all__ = ["MeZOMixin", "MeZOTrainer"]
