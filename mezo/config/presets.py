"""Options that go together, by a name: what a row of LEADERBOARD.md was run with."""

from collections.abc import Mapping
from typing import Any

from mezo.config import Config
from mezo.config.options import over

PRESETS: dict[str, dict[str, Any]] = {
    "few-steps": {
        "tuning": "lora-xs",
        "r": 16,
        "lora_alpha": 16,
        "lora_a": "calibrated",
        "batch_size": 128,
        "directions": 128,
        "lr": 0.5,
        "lr_schedule": "cosine",
        "steps": 77,
    }
}
"""Flat options by the name that `--preset` takes."""


def with_preset(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a preset, with those that are given over them.

    Args:
        name: a key of PRESETS.
        given: flat options; another tuning leaves the preset's options of its own tuning behind.

    >>> options = with_preset("few-steps", {"lr": 0.01, "tuning": "full"})
    >>> options["lr"], options["directions"], "r" in options
    (0.01, 128, False)
    """
    return over(Config.options(), PRESETS[name], given)
