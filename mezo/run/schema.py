"""What the files of a run directory may hold: fields, types and bounds, checked before anything acts on them.

A run may come from somebody else, or from a disk that lost some of it. Fields that are not named here are left alone.
"""

from typing import Annotated, Any, Literal, NotRequired

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool, StrictInt, TypeAdapter, ValidationError
from pydantic import model_validator as validates
from typing_extensions import TypedDict

from mezo.errors import UserError
from mezo.models.spec import CORE, NONE

Count = Annotated[StrictInt, Ge(0), Lt(2**53)]
"""Of steps or tokens."""
Seed = Annotated[StrictInt, Ge(0), Lt(2**64)]
Dimension = Annotated[StrictInt, Ge(1), Le(2**31)]
Rank = Annotated[StrictInt, Ge(1), Le(2**16)]
Amount = Annotated[float, Ge(0)]
Text = Annotated[str, MaxLen(4096)]
Hash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Tokens = Annotated[tuple[Annotated[StrictInt, Ge(0), Lt(2**31)], ...], MinLen(1), MaxLen(2**24)]


class _Fields(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Record(TypedDict):
    """A step of the log; its lists have one item a perturbation."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    step: Count
    seeds: Annotated[tuple[Seed, ...], MinLen(1)]
    projected_grads: tuple[float, ...]
    coefficients: tuple[FiniteFloat, ...]
    decay: FiniteFloat
    loss_plus: tuple[float, ...]
    loss_minus: tuple[float, ...]
    skipped: StrictBool
    lr: NotRequired[FiniteFloat]
    tried: NotRequired[tuple[float, ...]]
    shortened: NotRequired[Annotated[float, Gt(0), Lt(1)]]
    fed: NotRequired[tuple[Annotated[StrictInt, Ge(1), Lt(2**53)], Hash]]
    text_seed: NotRequired[Seed]


class Peft(_Fields):
    """adapter_config.json, as far as it is read here."""

    peft_type: Text | None = None
    base_model_name_or_path: Text | None = None
    r: Rank | None = None
    lora_alpha: Annotated[StrictInt, Ge(1), Lt(2**31)] | Annotated[FiniteFloat, Ge(2.0**-31), Lt(2**31)] | None = None
    use_rslora: StrictBool | None = None
    target_modules: list[Text] | Text | None = None
    layers_to_transform: list[Count] | Count | None = None
    modules_to_save: list[Text] | None = None
    rank_pattern: dict[Text, Rank] | None = None
    alpha_pattern: dict[Text, Annotated[FiniteFloat, Gt(0), Lt(2**31)]] | None = None
    num_virtual_tokens: Annotated[StrictInt, Ge(1), Le(2**20)] | None = None

    @validates(mode="after")
    def _is_whole(self) -> "Peft":
        needed = {"LORA": ("r", "lora_alpha", "target_modules"), "PREFIX_TUNING": ("num_virtual_tokens",)}
        for name in needed.get(self.peft_type, ()):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is missing")
        return self


class BaseHash(_Fields):
    """What base an adapter was trained on, and what its weights are."""

    model_hash: Text
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")]
    quantization: Text = NONE
    weights: Annotated[list[Text], MaxLen(2)] = []
    theta: Annotated[list[Text], MaxLen(2)] = []


class Stream(_Fields):
    """theta_0 from the z stream."""

    kind: Literal["stream"]


class Base(_Fields):
    """theta_0 is the base."""

    kind: Literal["base"]


class File(_Fields):
    """theta_0 in a file of the run directory, always of one name."""

    kind: Literal["file"]
    file: Literal["initial_adapter.safetensors"]
    sha256: Text


class Rule(_Fields):
    """An update rule that is not plain descent; `LoggedRule.of_header` knows which there are."""

    name: Text
    beta1: FiniteFloat = 0.9
    beta2: FiniteFloat = 0.999
    eps: FiniteFloat = 1e-8
    l2: Annotated[FiniteFloat, Ge(0)] = 0.0
    no_decay: list[Text] = []
    distribution: Text = "normal"
    normalised: StrictBool = False
    anchored: StrictBool = False
    refresh_every: Annotated[Count, Ge(1)] = 1


class Lengthening(_Fields):
    """That a run was given more steps: when, and how many it had and has."""

    at: Count
    before: Annotated[Count, Field(alias="from")]
    to: Count


class Header(_Fields):
    """The first line of a log."""

    run_seed: Seed
    data_hash: Text
    reward_hash: Text | None = None
    init: Annotated[Stream | Base | File, Field(discriminator="kind")]
    rule: Rule | None = None
    linear: Literal["torch", "onednn", "packed"] = "torch"
    lengthened: list[Lengthening] = []
    peft: Peft | None
    shapes: Annotated[dict[Text, Annotated[list[Dimension], MaxLen(8)]], MinLen(1)]
    frozen: dict[Text, Annotated[list[Dimension], MaxLen(8)]] = {}
    model: Text
    model_hash: Text
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16|float16)$")]
    quantization: Text = NONE
    code_hash: Hash | None = None

    @validates(mode="after")
    def _has_one_rank(self) -> "Header":
        if (self.peft is None) != (self.init.kind == "base"):
            raise ValueError("a run starts from the base where it trains the base, and only there")
        rank = self.peft and self.peft.r
        for name in self.shapes:
            stem = name.removesuffix(CORE)
            if stem != name and not {f"{stem}lora_A.weight", f"{stem}lora_B.weight"} <= self.frozen.keys():
                raise ValueError(f"{name} stands between factors that are not there")
        if self.frozen and (not rank or self.init.kind != "file" or self.shapes.keys() & self.frozen.keys()):
            raise ValueError("what is frozen is of a LoRA adapter, in the file that the run started from, not trained")
        ranks = {rank, *((self.peft and self.peft.rank_pattern) or {}).values()}
        for name, shape in (*self.shapes.items(), *self.frozen.items()) if rank else ():
            twin = self.shapes.get(name.replace("lora_B.weight", "lora_A.weight")) if len(ranks) > 1 else None
            rank = twin[0] if twin and twin[0] in ranks else self.peft.r
            sizes = {"lora_A.weight": shape[:1], "lora_B.weight": shape[1:], CORE: shape[:1] and shape[1:]}
            if any(name.endswith(end) and (len(shape) != 2 or size != [rank]) for end, size in sizes.items()):
                raise ValueError(f"{name} of shape {shape} has not the adapter's rank, {rank}")
        return self


class FedExample(BaseModel):
    """An example that was fed to a run while it was served."""

    model_config = ConfigDict(extra="forbid")

    prompt: Tokens
    options: tuple[Tokens, ...]
    label: Count
    references: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    fields: dict[str, Any] = {}

    @validates(mode="after")
    def _has_its_label(self) -> "FedExample":
        if self.label >= max(len(self.options), 1):
            raise ValueError(f"label {self.label} is none of its {len(self.options)} options")
        return self


class FedLine(_Fields):
    """A line of feedback.jsonl."""

    at: Count
    kind: Literal["feedback", "example"]
    given: dict[str, Any]
    examples: list[FedExample]
    sha256: Hash


class Clock(_Fields):
    """Totals of time and work at an evaluation."""

    steps: Count
    training: float
    evaluation: float
    compilation: float
    loading: float
    filling: float
    proving: float = 0.0
    tokens_filled: Amount = 0
    parts: dict[Text, float] = {}
    tokens: tuple[Amount, Amount]
    eval_tokens: tuple[Amount, Amount]


class Sample(_Fields):
    """A text that was written for an example, and what judges say of it."""

    prompt: Text
    text: Text
    references: list[Text]
    judged: dict[Text, FiniteFloat]


class Mistake(_Fields):
    """A wrong answer, by numbers of classes."""

    prompt: Text
    where: Text
    right: Count
    chosen: Count
    probability: FiniteFloat


class Metrics(_Fields):
    """A line of metrics.jsonl: an evaluation, or what an instrument measured."""

    __pydantic_extra__: dict[str, float | None]

    step: Count
    split: Literal["dev", "test", "train", "noise", "spread", "gradient", "stop"]
    is_best: StrictBool | None = None
    samples: Annotated[list[Sample], MaxLen(16)] = []
    classes: Annotated[list[Text], MaxLen(64)] = []
    confusion: Annotated[list[Annotated[list[Count], MaxLen(64)]], MaxLen(64)] = []
    mistakes: Annotated[list[Mistake], MaxLen(16)] = []
    clock: Clock

    @validates(mode="after")
    def _is_whole(self) -> "Metrics":
        scores = ("accuracy", "loss")
        needed = {"dev": scores, "test": scores, "train": scores, "noise": ("noise", "projected_grad_rms")}
        if missing := [name for name in needed.get(self.split, ()) if name not in self.model_extra]:
            raise ValueError(f"{missing[0]} is missing")
        if (self.split == "dev") != (self.is_best is not None):
            raise ValueError("is_best must be on the lines of dev, and on no other")
        return self


Scores = dict[str, float | None]


class Change(_Fields):
    """Figures of a split before and after a run."""

    before: Scores
    after: Scores

    @validates(mode="after")
    def _are_of_one_kind(self) -> "Change":
        if self.before.keys() != self.after.keys():
            raise ValueError("before and after hold different figures")
        return self


class Result(_Fields):
    """result.json."""

    __pydantic_extra__: dict[str, float]

    test: Change | None = None
    train: Change | None = None
    dev: list[Scores]
    best_step: Count
    steps: Count
    stopped_early: StrictBool = False
    skipped_steps: Count
    shortened_steps: Count = 0
    runtime: Text
    seconds_training: Amount
    seconds_of_training: dict[Text, float] = {}
    steps_per_second: float
    tokens_scored: Count
    tokens_computed: Count
    tokens_reused: StrictInt
    eval_tokens_scored: Count
    eval_tokens_computed: Count
    eval_tokens_reused: StrictInt
    zero_gradient_share: float
    clipped_share: float
    examples: dict[Text, Count] = {}

    @validates(mode="after")
    def _has_the_step_of_each_evaluation(self) -> "Result":
        if any(row.get("step") is None for row in self.dev):
            raise ValueError("a step of dev is missing")
        return self

    @validates(mode="after")
    def _has_both_of_a_pair(self) -> "Result":
        pairs = {
            "projected_grad_noise": "projected_grad_rms",
            "perturbation_error": "perturbation_cosine",
            "gradient_cosine": "gradient_expected_cosine",
        }
        if missing := [
            other for one, other in pairs.items() if one in self.model_extra and other not in self.model_extra
        ]:
            raise ValueError(f"{missing[0]} is missing")
        return self


RECORD = TypeAdapter(Record)


def validated(kind: type[BaseModel], values: Any, where: str) -> dict:
    """Values that were read from a file, unchanged.

    Args:
        kind: what they must be, such as `Header`.
        values: as JSON gave them.
        where: the file, for the error.
    Raises:
        UserError: a field is missing, or is of another type or outside its bounds.
    """
    try:
        kind.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where} {why(error)}; restore the file from a copy") from error
    return values


def why(error: ValidationError) -> str:
    """The first thing that is wrong, in a line that goes on from the name of the file."""
    first = error.errors(include_url=False, include_context=False)[0]
    place = ".".join(map(str, first["loc"]))[:100]
    if first["type"] == "missing":
        return f"lacks {place}"
    text = first["msg"].removeprefix("Value error, ").replace("Input should be", "it must be")
    return (
        f"is not what it must be ({place}: {text}, got {first['input']!r:.60})" if place else f"is not whole ({text})"
    )
