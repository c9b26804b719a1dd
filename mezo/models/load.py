"""Base models and tokenizers from transformers."""

import hashlib
import sys
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import TRANSFORMERS_DYNAMIC_MODULE_NAME

from mezo.errors import UserError
from mezo.models.attention import ATTENTION
from mezo.models.families import Family, family_of
from mezo.models.head import module_named, trained_whole
from mezo.models.mapped import give_back
from mezo.models.quantization import config_of, is_quantised, quantised_by, restoring, settle, tensors_of
from mezo.models.spec import NONE

ADAPTER = "adapter_config.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Checkpoint:
    """A model that is not loaded yet: what its configuration says of it, read once and passed on.

    Args:
        name: path or hub id.
        config: its config.json.
        head: with which it is loaded, as `--head` says.
        quantization: what its linear layers are quantised to as it is loaded, as `--quantization` says.
        trusted: code that it brings is run, as `--trust-remote-code` says.
    """

    name: str
    config: PretrainedConfig
    head: str = "model"
    quantization: str = NONE
    trusted: bool = False

    @classmethod
    def of(cls, model: str, head: str = "model", quantization: str = NONE, trusted: bool = False) -> "Checkpoint":
        """Read the configuration of a model directory or hub id. Raises UserError if it cannot be read."""
        if Path(model, ADAPTER).is_file():
            raise _two_in_one(model)
        try:
            return cls(model, _config_of(model, trusted), head, quantization, trusted)
        except (OSError, ValueError) as error:
            raise _unloadable(model, error) from error

    @property
    def family(self) -> Family:
        """What is known of its architecture."""
        return family_of(self.config)

    @property
    def masked(self) -> bool:
        """True if it fills masks, False if it continues text."""
        return self.head == "model" and (self.config.architectures or [""])[0].endswith("ForMaskedLM")

    @property
    def encoder_decoder(self) -> bool:
        """True if one transformer reads the prompt and another writes the answer, as in T5."""
        return bool(self.config.is_encoder_decoder) and not self.masked

    @property
    def quantised(self) -> str | None:
        """How its weights are quantised already, such as "awq"; None if they are not."""
        return quantised_by(self.config)

    @property
    def is_file(self) -> bool:
        """True if it is a GGUF file."""
        return is_gguf(self.name)

    @property
    def reads_images(self) -> bool:
        """True if it is a model of images and text, which text alone is given here."""
        return type(self.config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    @property
    def auto(self) -> type:
        """Class of transformers that loads it with its head."""
        if self.head != "model":
            return AutoModelForSequenceClassification if self.head == "classification" else AutoModel
        if self.encoder_decoder:
            return AutoModelForSeq2SeqLM
        if self.reads_images:
            return AutoModelForImageTextToText
        return AutoModelForMaskedLM if self.masked else AutoModelForCausalLM

    def one_token(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Arguments of the shortest forward pass of the model."""
        names = ("input_ids", "decoder_input_ids") if self.encoder_decoder else ("input_ids",)
        zero, one = (torch.full((1, 1), n, dtype=torch.int64, device=device) for n in (0, 1))
        return {**dict.fromkeys(names, zero), "attention_mask": one}


def load_tokenizer(model: str, trusted: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id. Raises UserError if there is none.

    Args:
        model: path or hub id.
        trusted: code that it brings is run.
    """
    if model.startswith((".", "/", "~")) and not (Path(model).is_dir() or is_gguf(model)):  # no hub id begins so
        raise UserError(f"--model {model}: no such directory; give one with a model in it, or a hub id like org/name")
    try:
        if is_gguf(model):
            from mezo.models.gguf import tokenizer_of_file  # it takes a while to import

            return tokenizer_of_file(model)
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trusted)
    except (OSError, ValueError) as error:
        if "custom code" in str(error):
            raise _unloadable(model, error) from error
        why = f"no tokenizer could be loaded ({_first_line(error)})"
        raise UserError(f"--model {model}: {why}; give a directory with a model in it, or a hub id") from error


def is_gguf(model: str) -> bool:
    """Whether a path is that of a GGUF file."""
    return model.endswith(".gguf") and Path(model).is_file()


def _config_of(model: str, trusted: bool) -> PretrainedConfig:
    if not is_gguf(model):
        return AutoConfig.from_pretrained(model, trust_remote_code=trusted)
    from mezo.models.gguf import config_of_file  # it takes a while to import

    return config_of_file(model)


def load_base(
    checkpoint: Checkpoint, dtype: torch.dtype | str, classes: int = 0, device: torch.device = CPU
) -> nn.Module:
    """A model with its head, in eval mode.

    Args:
        checkpoint: which.
        dtype: of its parameters; "auto" is that of the checkpoint.
        classes: outputs of its classification head, if that is what it has; 0 are those of the checkpoint.
        device: where it is put.
    Raises:
        UserError: it cannot be loaded, or lacks weights.
    """
    return load_with_new(checkpoint, dtype, classes, device)[0]


def load_with_new(
    checkpoint: Checkpoint, dtype: torch.dtype | str, classes: int = 0, device: torch.device = CPU
) -> tuple[nn.Module, frozenset[str]]:
    """`load_base`, and the names of the parameters that a new classification head has where the checkpoint has none."""
    _refuse_another_head(checkpoint)
    packing = config_of(checkpoint.quantization, dtype, device, checkpoint.config)
    auto = checkpoint.auto
    own_code = checkpoint.trusted and auto.__name__ in (getattr(checkpoint.config, "auto_map", None) or {})
    try:
        attention = None if own_code else _attention(auto._model_mapping[type(checkpoint.config)], checkpoint.config)
    except KeyError as error:
        kind = checkpoint.config.model_type
        if checkpoint.head == "classification":
            why = f"--head classification: transformers has no such head for {kind} ({checkpoint.name})"
            raise UserError(f"{why}: use --head model, or another model") from error
        raise UserError(
            f"--model {checkpoint.name}: transformers has no head for text of {kind} ({auto.__name__}): use a model"
            " that continues text, fills masks or answers by a decoder"
        ) from error
    options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": checkpoint.trusted}
    if checkpoint.head == "classification":  # a head of other classes is made anew
        options |= {"num_labels": classes or checkpoint.config.num_labels, "ignore_mismatched_sizes": True}
    if packing or checkpoint.quantised:  # packed weights are not moved afterwards
        options |= {"device_map": {"": device}}
    try:
        if config := packing or restoring(checkpoint.quantised):
            options |= {"quantization_config": config}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "You passed `quantization_config`")  # of a checkpoint that has one
            base, seen = _from_pretrained(checkpoint, auto, options)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        # ImportError: a quantised checkpoint without its library; RuntimeError: weights of other shapes
        raise _unloadable(checkpoint.name, error, checkpoint.quantised) from error
    if base._hf_peft_config_loaded:  # of a hub id, whose files are not looked at before
        raise _two_in_one(checkpoint.name)
    lacking = {*seen["missing_keys"], *(name for name, *_ in seen["mismatched_keys"])}
    new = _new_parameters(checkpoint, base, lacking)
    if not is_quantised(base):
        return base.eval().to(device), new
    settle(base, checkpoint.quantization, dtype)
    if packing:  # what was quantised lies in the mapped file still
        give_back((p for p in base.parameters() if p.device.type == "cpu" and type(p.data) is torch.Tensor), whole=True)
    return base.eval(), new


def _from_pretrained(checkpoint: Checkpoint, auto: type, options: dict) -> tuple[nn.Module, dict]:
    """What `from_pretrained` of a class of transformers loads, and what it says of that."""
    if not checkpoint.is_file:
        return auto.from_pretrained(checkpoint.name, output_loading_info=True, **options)
    from mezo.models.gguf import load_file  # it takes a while to import

    return load_file(auto, checkpoint.name, checkpoint.config, **options)


def _refuse_another_head(checkpoint: Checkpoint) -> None:
    """A classifier that is loaded as something else would be given a head of random numbers."""
    architecture = (checkpoint.config.architectures or [""])[0]
    if checkpoint.head == "classification" and checkpoint.config.is_encoder_decoder:
        why = "is an encoder with a decoder, which reads each text twice for such a head"
        raise UserError(f"--head classification: {checkpoint.name} {why}: use --head model, or another model")
    if checkpoint.head == "model" and architecture.endswith("ForSequenceClassification"):
        raise UserError(f"--model {checkpoint.name} is a {architecture}: give --head classification")


def _new_parameters(checkpoint: Checkpoint, base: nn.Module, lacking: set[str]) -> frozenset[str]:
    """Names of the parameters that a checkpoint lacks, which are trained or not read.

    Raises:
        UserError: it lacks others: transformers draws them at random, others at each load.
    """
    in_pooler = lambda name: "pooler" in name.split(".")  # noqa: E731
    in_head = lambda name: not name.startswith(f"{base.base_model_prefix}.")  # noqa: E731
    made_anew = {"model": (), "linear": (in_pooler,), "classification": (in_pooler, in_head)}[checkpoint.head]
    new = lacking & dict(base.named_parameters()).keys()
    odd = sorted(name for name in new if not any(fits(name) for fits in made_anew))
    if odd:
        remedy = "" if checkpoint.head != "model" else ", or --head classification or linear, which train one"
        raise UserError(
            f"--model {checkpoint.name}: its checkpoint lacks {len(odd)} weights of {type(base).__name__}, such as"
            f" {odd[0]}, which would be random numbers: use a model that has them{remedy}"
        )
    return frozenset(new)


def _attention(model: type, config: PretrainedConfig) -> str | None:
    """Ours where a class of transformers takes any attention that does what sdpa does, else its own (None).

    Soft-capped attention is computed by `eager` alone: sdpa leaves the cap out and says nothing.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "eager"
    return ATTENTION if model._supports_attention_backend and model._supports_sdpa else None


def code_hash(model: nn.Module) -> str:
    """SHA-256 over names and bytes of the Python files of a model that brings code of its own; "" of any other."""
    module = type(model).__module__
    if not module.startswith(f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."):
        return ""
    main = Path(sys.modules[module].__file__)
    files = {main, *map(Path, get_relative_import_files(main))}
    digest = hashlib.sha256()
    for name, file in sorted((file.relative_to(main.parent).as_posix(), file) for file in files):
        digest.update(f"{name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def checkpoint_hash(
    model: str, dtype: str, head: str = "model", quantization: str = NONE, trusted: bool = False
) -> str:
    """`base_hash` of a path or hub id loaded in a dtype with a head and in a format that options name."""
    checkpoint, device = Checkpoint.of(model, head, quantization, trusted), quantising_device(quantization)
    return base_hash(*load_with_new(checkpoint, getattr(torch, dtype), device=device), head)


def quantising_device(quantization: str) -> torch.device:
    """Where a model is quantised that no run has put anywhere: a GPU, where there is one, as a run would."""
    return torch.device("cuda") if quantization != NONE and torch.cuda.is_available() else CPU


def base_hash(base: nn.Module, new: Collection[str], head: str) -> str:
    """`weights_hash` of what stays as it is of a loaded model: without a head for classes, which is trained.

    Args:
        base: the model.
        new: names of its parameters that the checkpoint lacks.
        head: which it has, as `--head` names it.
    """
    if head == "linear":
        base.pooler = None  # not read, and drawn anew at each load where the checkpoint has none
    whole = trained_whole(base, new) if head == "classification" else ()
    if is_quantised(base):
        trained = tuple(f"{name}." for name in whole)
        return weights_hash((name, tensor) for name, tensor in tensors_of(base) if not name.startswith(trained))
    left_out = {id(p) for name in whole for p in module_named(base, name).parameters()}
    return weights_hash((name, p) for name, p in base.named_parameters() if id(p) not in left_out)


def weights_hash(base: nn.Module | Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the base weights, tied ones once; `base` may be the weights.

    Packed weights count as they are held. A forward pass may lay them out anew: ask before.
    """
    digest = hashlib.sha256()
    if isinstance(base, nn.Module):
        base = tensors_of(base) if is_quantised(base) else base.named_parameters()
    for name, p in base:
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _two_in_one(model: str) -> UserError:
    """transformers loads an adapter beside a model together with it, and says nothing."""
    return UserError(
        f"--model {model}: it holds an adapter ({ADAPTER}), which would be part of the model: give the base as --model"
        " and the adapter as --adapter, or leave that file out"
    )


def _unloadable(model: str, error: Exception, quantised: str | None = None) -> UserError:
    if "custom code" in str(error):
        return UserError(
            f"--model {model}: it comes with code of its own: give --trust-remote-code if you trust that, or use a"
            " model of a family that transformers has (mezo models lists some)"
        )
    if "ignore_mismatched_sizes" in str(error):
        return UserError(
            f"--model {model}: its weights have other shapes than its config.json says: give a model whose files belong"
            " together"
        )
    if isinstance(error, SafetensorError):
        return UserError(f"--model {model}: a file of its weights is damaged ({_first_line(error)}): fetch it again")
    if quantised and not isinstance(error, OSError):
        return UserError(
            f"--model {model}: its weights are quantised ({quantised}), and transformers does not load them here"
            f" ({_first_line(error)}): use the model in floats with --quantization int8, or as a GGUF file"
        )
    return UserError(f"--model {model}: it could not be loaded ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
