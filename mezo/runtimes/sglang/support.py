"""What SGLang's own classes can do with a model, asked before an engine starts: a start takes a minute and more."""

import importlib
import logging
import typing
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache

import msgspec
import yaml
from transformers import PretrainedConfig

from mezo.errors import UserError
from mezo.models.families import leaf_of
from mezo.models.load import Checkpoint
from mezo.runtimes.sglang.engine import accelerated, engine_environment

PLAIN = {str, int, float, bool, type(None)}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
INEXACT = {
    "GemmaForCausalLM": "computes the exact GELU, where the model has its tanh approximation",
}
"""Classes of SGLang's that are another function than the model is, and why: seen by comparing log-probabilities."""
LOADED_PACKED = ("bitsandbytes", "gguf")  # what --engine-arg load_format quantises to, or reads quantised
SHARED_MEMORY = 32 << 20  # bytes of /dev/shm that an engine of several ranks needs, 25 MB of them for one queue


def model_class(checkpoint: Checkpoint) -> type:
    """The class with which SGLang serves a model.

    Raises:
        UserError: it has none of its own (its adapters do not work on models that it takes from transformers), or one
            that does not run on this machine.
    """
    name = (checkpoint.config.architectures or ["no architecture"])[0]
    if checkpoint.is_file:
        raise UserError(f"--model {checkpoint.name}: a GGUF file has not been tried on SGLang: use --runtime hf")
    if checkpoint.reads_images:
        raise UserError(
            f"--model {checkpoint.name}: it reads images too, which SGLang serves otherwise: use --runtime hf"
        )
    served = _registered().get(name)
    if served is None:
        raise UserError(f"--model {checkpoint.name}: SGLang has no {name} of its own: use --runtime hf")
    if not accelerated() and any(getattr(checkpoint.config, field, None) for field in EXPERTS):
        raise UserError(
            f"--model {checkpoint.name}: SGLang computes the experts of {name} on a GPU only: use --runtime hf"
        )
    return served


def refuse_inexact(checkpoint: Checkpoint, served: type) -> None:
    """Raise UserError if SGLang's class is another function than the model.

    Args:
        checkpoint: of the model.
        served: its `model_class`.
    """
    if served.__name__ in INEXACT:
        raise UserError(
            f"--model {checkpoint.name}: SGLang's {served.__name__} {INEXACT[served.__name__]}, so that its scores are"
            " not the model's: use --runtime hf"
        )
    if not accelerated() and getattr(checkpoint.config, "attn_logit_softcapping", None) is not None:
        raise UserError(
            f"--model {checkpoint.name}: SGLang's attention on a CPU leaves out the soft-capping of"
            f" {served.__name__}: use --runtime hf"
        )


def refuse_packed(checkpoint: Checkpoint, options: dict) -> None:
    """Raise UserError if SGLang has no such format of quantised weights, or cannot multiply by them on this machine.

    On a CPU its products of these are kernels for AMX in its kernel package, which has no build for CPUs in the index.

    Args:
        checkpoint: of the model.
        options: `engine_options`.
    """
    key = "load_format" if options.get("load_format") in LOADED_PACKED else "quantization"
    asked = None if options.get(key) == "unquant" else options.get(key)
    form = (asked or checkpoint.quantised or "").lower()
    if not form:
        return
    known, on_cpu = _formats()
    remedy = "--runtime hf" if checkpoint.quantised else "--runtime hf with --quantization int8"
    if asked and form not in known:
        remedy = f"one of {', '.join(sorted(known))}" if accelerated() else remedy
        why = "SGLang has no format of that name"
    elif accelerated():
        return
    elif form not in on_cpu:
        why = f"SGLang has no products by {form} weights for a CPU"
    elif lacking := _lacking_for_amx():
        why = f"SGLang multiplies by {form} weights on a CPU with kernels for AMX alone, and {lacking}"
    else:
        return
    which = f"--engine-arg {key}={asked}" if asked else f"--model {checkpoint.name}: it is quantised"
    raise UserError(f"{which}: {why}: use {remedy}")


def refuse_without_lora(checkpoint: Checkpoint, served: type, names: Iterable[str]) -> None:
    """Raise UserError if SGLang cannot hold a trained parameter as LoRA.

    Args:
        checkpoint: of the model.
        served: its `model_class`.
        names: of the trained parameters.
    """
    family = checkpoint.family
    leaves = sorted({leaf_of(name) for name in names})
    fused = [leaf for leaf in leaves if leaf in family.stacked]  # one layer here, several there
    has_sizes = hasattr(served, "get_hidden_dim")
    without = [leaf for leaf in leaves if not has_sizes and not _has_sizes(family.stack_of(leaf)[0], checkpoint.config)]
    if fused or without:
        others = "" if without == leaves else ", or other --target-modules"
        raise UserError(
            f"--model {checkpoint.name}: SGLang has no LoRA on {', '.join(fused or without)} for {served.__name__}:"
            f" use --runtime hf{others}"
        )


def refuse_window(checkpoint: Checkpoint, served: type, longest: int) -> None:
    """Raise UserError if a layer attends to a window that SGLang's class does not have and a row is longer than it.

    Args:
        checkpoint: of the model.
        served: its `model_class`.
        longest: tokens of the longest row.
    """
    config, family = checkpoint.config, checkpoint.family
    windows = [family.window(config, layer) for layer in range(config.num_hidden_layers)]
    window = min((w for w in windows if w), default=None)
    if window is not None and window < longest and not hasattr(served, "get_attention_sliding_window_size"):
        raise UserError(
            f"--model {checkpoint.name}: a layer attends to the last {window} tokens, which SGLang's {served.__name__}"
            f" does not do, and the longest row has {longest}: use --max-length {window}, or --runtime hf"
        )


def refuse_small_shared_memory(tp: int, free: int) -> None:
    """Raise UserError if the ranks of an engine would find no room in /dev/shm; they would die of a bus error.

    Args:
        tp: ranks.
        free: bytes free there.
    """
    if tp > 1 and free < SHARED_MEMORY:
        raise UserError(
            f"--tp {tp}: /dev/shm has {free:,} bytes free, {SHARED_MEMORY:,} are needed: start the container with"
            " --shm-size=1g, or use --tp 1"
        )


def value_of(key: str, text: str) -> object:
    """The value of one --engine-arg, read as the type of that field of SGLang's arguments asks.

    Args:
        key: a field of `ServerArgs`.
        text: as the user wrote it.
    Raises:
        UserError: it is of another type.

    >>> value_of("served_model_name", "@x"), value_of("max_total_tokens", "4096"), value_of("max_total_tokens", "null")
    ('@x', 4096, None)
    """
    hint = field_types()[key]
    if not text:
        raise UserError(f"--engine-arg {key}= has no value: give one, or leave it out")
    if text == "null" and type(None) in typing.get_args(hint):
        return None
    plain = set(typing.get_args(hint) or (hint,)) <= PLAIN
    try:
        return msgspec.convert(text if plain else yaml.safe_load(text), hint, strict=False)
    except TypeError:  # a type that msgspec cannot check: SGLang will
        return yaml.safe_load(text)
    except (msgspec.ValidationError, yaml.YAMLError) as error:
        wanted = getattr(hint, "__name__", "") if plain and not typing.get_args(hint) else str(hint)
        why = f"; {str(error).splitlines()[0]}" if not plain else ""
        wanted = wanted.replace("typing.", "")
        raise UserError(
            f"--engine-arg {key} must be {wanted}, got {text!r}{why}: correct it, or leave it out"
        ) from error


@cache
def field_types() -> dict[str, object]:
    """The type of every argument of SGLang's engine, by name."""
    from sglang.srt.server_args import ServerArgs

    hints = typing.get_type_hints(ServerArgs)
    return {name: hints[name] for name in ServerArgs.__struct_fields__ if not name.startswith("_")}


@cache
def _registered() -> dict[str, type]:
    with engine_environment(), _quiet():
        registry = importlib.import_module("sglang.srt.models.registry").ModelRegistry
        registry.get_supported_archs()
        return registry.models


@cache
def _formats() -> tuple[frozenset[str], frozenset[str]]:
    """Formats of quantised weights that SGLang knows by name, and those that it has kernels for a CPU for."""
    with engine_environment(), _quiet():
        module = importlib.import_module("sglang.srt.layers.quantization")
        asked = importlib.import_module("sglang.srt.arg_groups.choices").QUANTIZATION_CHOICES
        return frozenset({*module.QUANTIZATION_METHODS, *asked}), frozenset(module.CPU_QUANTIZATION_METHODS)


def _lacking_for_amx() -> str:
    """What SGLang does not find of what its products on a CPU need; "" if it finds all."""
    with engine_environment(), _quiet():
        utils = importlib.import_module("sglang.srt.utils.common")
        if not utils.is_amx_tile_supported:
            return "this CPU has no AMX"
        return "" if utils.cpu_has_amx_support() else "no build of its kernel package has them here"


def _has_sizes(stack: str, config: PretrainedConfig) -> bool:
    """Whether SGLang's adapters find the sizes of a module, of which a model's class says nothing, in its config."""
    from sglang.srt.lora.utils import get_default_hidden_dim

    try:
        return bool(get_default_hidden_dim(stack, config, 0))
    except (AttributeError, NotImplementedError):
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of model classes that are of no use here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
