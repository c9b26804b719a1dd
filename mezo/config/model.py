"""The model of a run, and what is trained of it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from mezo.config.options import PATH, REQUIRED, RESUMABLE, Choice, Named
from mezo.errors import require
from mezo.ranges import AtLeastOne


class Tuning:
    """What is trained. A kind of tuning is a subclass: a dataclass with its own options.

    Class attributes:
        name: what `--tuning` takes.
        summary: one line for `--help`.
        is_lora: what it leaves is an ordinary LoRA adapter, which an engine holds and others load.
        from_model: theta_0, or what stays as it is beside theta, is made of the model; a run keeps it as a file.
        adapter: where the adapter lies that a run starts from, "" for a fresh one; an option of those that have one.
        head: what scores the options; an option of those that can have another than the model's own.
        rank_pattern, alpha_pattern: ranks and scales of single modules, options of those that can have such.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    is_lora: ClassVar[bool] = False
    from_model: ClassVar[bool] = False
    adapter: ClassVar[str] = ""
    head: ClassVar[str] = "model"
    rank_pattern: ClassVar[tuple[str, ...]] = ()
    alpha_pattern: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class Adapted(Tuning):
    """Which layers a LoRA adapter adapts, and how."""

    is_lora: ClassVar[bool] = True

    r: AtLeastOne = 8
    """Rank of the adapter's matrices."""
    lora_alpha: AtLeastOne = 16
    """Scale of the adapter: its output is multiplied by lora_alpha / r."""
    use_rslora: bool = False
    """Multiply by lora_alpha / sqrt(r) instead (rsLoRA: Kalajdzievski 2023, arXiv 2312.03732)."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get an adapter, such as q_proj v_proj; by default query and value, as in the MeZO
    paper."""
    layers_to_transform: tuple[int | Literal["auto"], ...] = ()
    """Indices of the transformer layers that get an adapter, from 0; by default all. auto: the one layer of the first
    activation outlier, found by one forward pass before the run (arXiv 2606.05516)."""


@dataclass(frozen=True)
class Lora(Adapted):
    """A LoRA adapter: W + lora_alpha / r B A beside the weights W of some layers (Hu et al. 2021, arXiv 2106.09685)."""

    name: ClassVar[str] = "lora"
    summary: ClassVar[str] = "a LoRA adapter: small matrices beside some of the weights"

    head: Literal["model", "linear", "classification"] = "model"
    """What scores the options. model: the model's own head, as words. classification: the head for classes that
    transformers gives the model (AutoModelForSequenceClassification), the checkpoint's own or a new one, trained
    together with the adapter. linear: a linear layer over the mean of an encoder's last hidden states, one output a
    class, trained from zero together with the adapter."""
    rank_pattern: tuple[str, ...] = ()
    """Modules of another rank than --r, each as NAME=R, such as k_proj=4 v_proj=16; PEFT's rank_pattern."""
    alpha_pattern: tuple[str, ...] = ()
    """Modules of another scale than --lora-alpha, each as NAME=ALPHA; PEFT's alpha_pattern."""
    adapter: Annotated[str, PATH] = ""
    """Directory of a PEFT adapter to start from, made here or elsewhere, instead of a fresh one; what kind it is, rank,
    scale, modules and layers are then the adapter's own."""


def pattern_of(texts: Sequence[str], flag: str, kind: type = float) -> dict[str, float]:
    """Numbers by the name of a module, as PEFT's patterns have them.

    Args:
        texts: each NAME=NUMBER; a name may be a pattern of PEFT's.
        flag: of the option.
        kind: of the numbers: int for ranks.
    Raises:
        UserError: no name, or no number above 0.

    >>> pattern_of(("k_proj=4", "v_proj=16"), "--rank-pattern", int)
    {'k_proj': 4, 'v_proj': 16}
    """
    pattern = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        try:
            value = kind(number)
        except ValueError:
            value = 0
        wanted = "a whole number" if kind is int else "a number"
        require(bool(name) and 0 < value < math.inf, f"{flag} takes NAME=NUMBER, {wanted} above 0; got {text!r}")
        pattern[name] = int(value) if value == int(value) else value
    return pattern


@dataclass(frozen=True)
class WithFrozenA(Adapted):
    """A LoRA adapter whose A is not trained."""

    from_model: ClassVar[bool] = True

    lora_a: Literal["plain", "calibrated"] = "plain"
    """What stays as lora_A. plain: drawn from --seed (lora-b), or the largest singular vectors of each weight
    (lora-xs). calibrated: made of what each adapted layer is given on some training prompts, without labels, by a
    forward pass of each before the run. Prompts share most of what a layer is given; there that gets one direction of
    r, and the others are those in which prompts differ most, all of one size (after EVA: Paischer et al. 2024, arXiv
    2410.07170). Then eps and lr are in units of what a layer gives: begin with --lr 0.25."""
    calibration_examples: AtLeastOne = 256
    """Training examples, at most, that lora_A is calibrated on."""


@dataclass(frozen=True)
class LoraB(WithFrozenA):
    """A LoRA adapter whose A is not trained; B is (LoRA-FA, Zhang et al. 2023, arXiv 2308.03303)."""

    name: ClassVar[str] = "lora-b"
    summary: ClassVar[str] = "a LoRA adapter of which lora_B alone is trained"


@dataclass(frozen=True)
class LoraXS(WithFrozenA):
    """W + lora_alpha / r B R A; A and B stay, by default the largest singular vectors of W (Balazy et al. 2024, arXiv
    2405.17604).

    R, r by r, is trained from zero. What a run leaves is the LoRA adapter with lora_B = B R and lora_A = A.
    """

    name: ClassVar[str] = "lora-xs"
    summary: ClassVar[str] = (
        "an r by r matrix between factors of each weight that stay, r * r parameters a module: few, which a direction"
        " finds its way in sooner; try --r 16 --lora-alpha 16 --lora-a calibrated"
    )


@dataclass(frozen=True)
class Full(Tuning):
    """Every parameter of the model."""

    name: ClassVar[str] = "full"
    summary: ClassVar[str] = (
        "every parameter of the model, with --runtime hf; 12 bytes each in float32, 8 in 16 bits; in the MeZO paper"
        " eps 1e-3 and lr 1e-7 to 1e-5"
    )


@dataclass(frozen=True)
class Prefix(Tuning):
    """Keys and values of a few tokens in front of every layer's own."""

    name: ClassVar[str] = "prefix"
    from_model: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "keys and values of a few tokens before the text, in every layer, with --runtime hf; in the MeZO paper eps 1e-1"
        " and lr 1e-3 to 1e-2"
    )

    num_prefix_tokens: AtLeastOne = 5
    """Tokens of the prefix; they start as random tokens of the vocabulary."""
    adapter: Annotated[str, PATH] = ""
    """As under --tuning lora."""


TUNINGS: dict[str, type[Tuning]] = {kind.name: kind for kind in (Lora, LoraB, LoraXS, Full, Prefix)}
"""By the name that `--tuning` takes."""


@dataclass(frozen=True)
class Model:
    """Model: where it comes from, and what is trained of it."""

    base: Annotated[str, Named("model"), REQUIRED, PATH] = ""
    """Path or hub id of the model to start from, such as facebook/opt-125m; or path of a GGUF file."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of the model's numbers; auto is float32 on a CPU and bfloat16 on a GPU. What is trained is kept in float32
    always."""
    quantization: Literal["none", "int8", "int4", "float8", "nf4", "fp4", "llm-int8"] = "none"
    """With --runtime hf: what the weights of the frozen linear layers are quantised to as they are loaded, to save
    memory. int8, int4, float8: weights alone, by torchao; int4 needs a GPU. nf4, fp4, llm-int8: by bitsandbytes;
    llm-int8 rounds what they are multiplied by, too. A checkpoint that is quantised already, such as a GGUF file, needs
    no option."""
    trust_remote_code: Annotated[bool, RESUMABLE] = False
    """Run the code that a model's repository brings, with your rights: only what you trust. Each command asks for it
    anew, --resume too, since a run's config.json may be somebody else's."""
    tuning: Annotated[Lora | LoraB | LoraXS | Full | Prefix, Choice("tuning", TUNINGS)] = Lora()
    """What is trained."""
