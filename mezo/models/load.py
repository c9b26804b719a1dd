"""Base models and tokenizers from transformers."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from mezo.errors import UserError
from mezo.models.attention import ATTENTION
from mezo.models.families import Family, family_of
from mezo.models.quantization import config_of, is_quantised, quantised_by, settle, tensors_of
from mezo.models.spec import NONE

ADAPTER = "adapter_config.json"
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Checkpoint:
    """A model that is not loaded yet: what its configuration says of it, read once and passed on.

    Args:
        name: path or hub id.
        config: its config.json.
    """

    name: str
    config: PretrainedConfig

    @classmethod
    def of(cls, model: str) -> "Checkpoint":
        """Read the configuration of a model directory or hub id. Raises UserError if it cannot be read."""
        if Path(model, ADAPTER).is_file():
            raise _two_in_one(model)
        try:
            return cls(model, AutoConfig.from_pretrained(model, trust_remote_code=False))
        except (OSError, ValueError) as error:
            raise _unloadable(model, error) from error

    @property
    def family(self) -> Family:
        """What is known of its architecture."""
        return family_of(self.config)

    @property
    def masked(self) -> bool:
        """True if it fills masks, False if it continues text."""
        return (self.config.architectures or [""])[0].endswith("ForMaskedLM")

    @property
    def encoder_decoder(self) -> bool:
        """True if one transformer reads the prompt and another writes the answer, as in T5."""
        return bool(self.config.is_encoder_decoder) and not self.masked

    @property
    def quantised(self) -> str | None:
        """How its weights are quantised, such as "awq"; None if they are not."""
        return quantised_by(self.config)

    @property
    def auto(self) -> type:
        """Class of transformers that loads it with its head."""
        if self.encoder_decoder:
            return AutoModelForSeq2SeqLM
        return AutoModelForMaskedLM if self.masked else AutoModelForCausalLM

    def one_token(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Arguments of the shortest forward pass of the model."""
        names = ("input_ids", "decoder_input_ids") if self.encoder_decoder else ("input_ids",)
        zero, one = (torch.full((1, 1), n, dtype=torch.int64, device=device) for n in (0, 1))
        return {**dict.fromkeys(names, zero), "attention_mask": one}


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub id. Raises UserError if there is none."""
    if model.startswith((".", "/", "~")) and not Path(model).is_dir():  # no hub id begins so
        raise UserError(f"--model {model}: no such directory; give one with a model in it, or a hub id like org/name")
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except (OSError, ValueError) as error:
        why = f"no tokenizer could be loaded ({_first_line(error)})"
        raise UserError(f"--model {model}: {why}; give a directory with a model in it, or a hub id") from error


def load_base(
    checkpoint: Checkpoint,
    dtype: torch.dtype | str,
    bare: bool = False,
    quantization: str = NONE,
    device: torch.device = CPU,
) -> nn.Module:
    """A model with its head, in eval mode.

    Args:
        checkpoint: which.
        dtype: of its parameters; "auto" is that of the checkpoint.
        bare: leave the head out.
        quantization: what its linear layers are quantised to as they are loaded, as --quantization names it.
        device: where it is put.
    Raises:
        UserError: it cannot be loaded.
    """
    packing = config_of(quantization, dtype, device, checkpoint.config)
    auto = AutoModel if bare else checkpoint.auto
    try:
        attention = _attention(auto._model_mapping[type(checkpoint.config)], checkpoint.config)
    except KeyError as error:
        raise UserError(
            f"--model {checkpoint.name}: transformers has no head for text of {checkpoint.config.model_type}"
            f" ({auto.__name__}): use a model that continues text, fills masks or answers by a decoder"
        ) from error
    try:
        options = {"dtype": dtype, "attn_implementation": attention, "trust_remote_code": False}
        if packing or checkpoint.quantised:  # packed weights are not moved afterwards
            options |= {"device_map": {"": device}} | ({"quantization_config": packing} if packing else {})
        base = auto.from_pretrained(checkpoint.name, **options).eval()
    except (OSError, ValueError, ImportError) as error:  # ImportError: a quantised checkpoint without its library
        raise _unloadable(checkpoint.name, error) from error
    if base._hf_peft_config_loaded:  # of a hub id, whose files are not looked at before
        raise _two_in_one(checkpoint.name)
    if not is_quantised(base):
        return base.to(device)
    settle(base, quantization, dtype)
    return base


def _attention(model: type, config: PretrainedConfig) -> str | None:
    """Ours where a class of transformers takes any attention that does what sdpa does, else its own (None).

    Soft-capped attention is computed by `eager` alone: sdpa leaves the cap out and says nothing.
    """
    if getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return "eager"
    return ATTENTION if model._supports_attention_backend and model._supports_sdpa else None


def checkpoint_hash(model: str, dtype: str, bare: bool = False, quantization: str = NONE) -> str:
    """`weights_hash` of a path or hub id loaded in a dtype; `bare`: without its head; see `load_base`."""
    base = load_base(Checkpoint.of(model), getattr(torch, dtype), bare, quantization, quantising_device(quantization))
    if bare:
        base.pooler = None  # as a run with a linear head has it
    return weights_hash(base)


def quantising_device(quantization: str) -> torch.device:
    """Where a model is quantised that no run has put anywhere: a GPU, where there is one, as a run would."""
    return torch.device("cuda") if quantization != NONE and torch.cuda.is_available() else CPU


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


def _unloadable(model: str, error: Exception) -> UserError:
    if "custom code" in str(error):
        return UserError(
            f"--model {model}: it comes with code of its own, which is never run here: use a model of a family that"
            " transformers has (mezo models lists some)"
        )
    return UserError(f"--model {model}: it could not be loaded ({_first_line(error)})")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
