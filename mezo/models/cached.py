"""Whether a model of the hub is on this machine already."""

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError


def in_cache(model: str) -> bool:
    """Whether a hub id's configuration is in the cache, so that nobody is asked for it."""
    try:
        return isinstance(try_to_load_from_cache(model, "config.json"), str)
    except HFValidationError:
        return False
