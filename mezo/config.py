"""Configuration of a run: one flat frozen dataclass that refuses bad values before anything is loaded or written."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

PATHS = ("model", "train_file", "dev_file", "test_file", "adapter")
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
ENGINE = ("tp", "radix", "deterministic", "engine_arg")
"""Options of the sglang runtime alone."""
MACHINE = ("runtime", *ENGINE, "device", "backend", "trunk_cache", "trunk_cache_bytes",
           "eval_batch_size", "noise", "true_gradient", "verify_every", "early_stopping", "max_loss_ratio")  # fmt: skip
"""Options that say where, how and how far a run is computed, not what: a resumed run may have others."""
SCORED = ("cross_entropy", "lm_cross_entropy", "accuracy")
"""Objectives that option scores decide."""
GENERATED = ("f1", "reward")
"""Objectives that generated text decides."""
STATEFUL = ("momentum", "adam", "adamw", "sign")
"""Update rules that act once on a step's whole estimate; the first three keep state."""
FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)  # smallest normal and largest number


class UserError(ValueError):
    """A mistake of the caller's: the message names the value, what was expected and the remedy."""


class RunError(RuntimeError):
    """A run cannot go on; its log is whole."""


@dataclass(frozen=True)
class Config:
    """Fine-tune a language model with forward passes only (MeZO, arXiv 2305.17333)."""

    model: str = ""
    """Path or hub id of the base model."""
    output_dir: str = ""
    """Run directory to create; an existing one is never overwritten."""
    runtime: Literal["hf", "sglang"] = "hf"
    """What computes the losses: hf is transformers + PEFT in this process, sglang the SGLang engine."""

    task: str = ""
    """A task that `mezo tasks` lists; leave empty to train on --train-file alone."""
    train_file: str = ""
    """JSON lines with text and label (an index into --label-words), or with prompt, options and answer. Beside --task,
    files take the place of the hub's splits: lines with the fields that the data set has there."""
    dev_file: str = ""
    """Chooses the best checkpoint; without it the last step is kept."""
    test_file: str = ""
    """Scored before and after training."""
    prompt: str = ""
    """Template around the record's fields, e.g. '{text} It was'; by default the task's own."""
    label_words: tuple[str, ...] = ()
    """One per class, in the order of the labels, with its leading space; by default the task's own."""
    k_shot: int = 0
    """Training examples per class (as many for dev); 0 takes all."""
    num_train: int = 0
    """Training examples in all, classes balanced; 0 takes all."""
    num_dev: int = 0
    """Dev examples in all, classes balanced; 0 takes all."""
    num_test: int = 0
    """Test examples in all, classes balanced; 0 takes all."""
    data_seed: int = 0
    """Chooses the examples that k_shot, num_train, num_dev and num_test keep, and the demonstrations."""
    num_demonstrations: int = 0
    """For `mezo eval`: training examples with their answers in front of each prompt, classes balanced (in-context
    learning); those that do not fit into max_length are left out."""
    max_length: int = 512
    """Token budget of a prompt with its longest option; longer texts are cut, the template and the options never."""

    head: Literal["model", "linear"] = "model"
    """What scores the options: the model's own head, as words; or a linear layer over the mean of an encoder's last
    hidden states, trained with the adapter from zero: an output a class, which --label-words names."""
    r: int = 8
    """LoRA rank."""
    lora_alpha: int = 16
    """LoRA scale: the adapter's output is multiplied by lora_alpha / r."""
    target_modules: tuple[str, ...] = ()
    """Modules to adapt; by default query and value, as in the paper."""
    layers_to_transform: tuple[int, ...] = ()
    """Indices of the layers to adapt; by default all."""
    adapter: str = ""
    """Start from this PEFT adapter instead of a fresh one."""

    steps: int = 1000
    """Optimisation steps, two forward passes each for every perturbation."""
    batch_size: int = 16
    """Training examples per step."""
    micro_batch_size: int = 0
    """Examples per forward pass, to save memory; 0 is the whole batch."""
    lr: float = 1e-4
    """Learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How lr goes to the end of the run; the paper's is constant."""
    warmup_steps: int = 0
    """Steps over which lr rises from 0 first."""
    clip: float = 0.0
    """Bring projected_grad into [-clip, clip]; 0 leaves it as it is."""
    eps: float = 1e-2
    """Perturbation scale."""
    weight_decay: float = 0.0
    """Decoupled: theta <- theta (1 - lr weight_decay) each step; the rule adam adds weight_decay theta to the gradient
    instead."""
    no_decay: tuple[str, ...] = ()
    """Parameters that weight decay leaves alone: patterns of their names, such as '*lora_B*'."""
    update_rule: Literal["sgd", "momentum", "adam", "adamw", "sign", "conservative"] = "sgd"
    """What moves theta: sgd is the paper's; momentum keeps a buffer (4 bytes a parameter), adam and adamw two moments
    (8 bytes); sign takes the sign of each element; conservative keeps the best of theta and a step of sgd either way,
    by the losses of the same batch, for four more forward passes."""
    momentum: float = 0.9
    """Of the rule momentum."""
    beta1: float = 0.9
    """Of Adam's first moment."""
    beta2: float = 0.999
    """Of Adam's second moment."""
    adam_eps: float = 1e-8
    """Added to the root of Adam's second moment."""
    num_perturbations: int = 1
    """Directions averaged per step (n-SPSA)."""
    parallel: Literal["data", "perturbations"] = "data"
    """What the processes that torchrun started share: the examples of a batch, or the perturbations of a step."""
    objective: str = "auto"
    """What is minimised: cross_entropy over the options, lm_cross_entropy of the right option's tokens, minus the
    accuracy, minus f1 or minus reward of generated text; cross_entropy:1,reward:0.5 is a sum with weights; auto is the
    task's own, cross_entropy for files."""
    reward: str = ""
    """file.py:function or module:function. It gets an example (a dict of the task's own fields) and the text that was
    generated for it, and returns a number, always the same one for the same arguments."""
    z_score_rewards: bool = False
    """Standardise rewards and F1s over the texts of a step: of its examples, its perturbations and both signs."""
    generate: Literal["auto", "on", "off"] = "auto"
    """Evaluate generated text too, by F1 and exact match; auto does so for tasks whose answer is text."""
    max_new_tokens: int = 50
    """Most tokens of a generated text; the most likely one follows each time (greedy)."""
    stop: tuple[str, ...] = ("\\n",)
    """A generated text ends before any of these; \\n is a line break."""
    seed: int = 0
    """Seed of the run: initial adapter, batches and perturbations are functions of it."""
    eval_every: int = 0
    """Steps between evaluations; 0 is a tenth of the run."""
    eval_batch_size: int = 0
    """Examples per evaluation forward; 0 is the training batch size."""
    early_stopping: int = 0
    """Evaluations without an improvement of dev after which the run ends; 0 never does."""
    max_loss_ratio: float = 0.0
    """Give up where the mean loss of 100 steps is this many times that of the first 100; 0 only warns, from 2 on."""

    eval_test: bool = True
    """Load the test set, and score it before and after the run."""
    eval_train: bool = False
    """Score the training set too, before and after the run."""
    noise: bool = True
    """At every evaluation score a batch four times at theta itself, and report what that puts on projected_grad; also
    how projected_grad spreads over batch and perturbations, and what rounding leaves of a perturbation."""
    true_gradient: bool = False
    """hf: at every evaluation compare the estimate with autograd's gradient; for models small enough for that."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the base model; auto is float32 on a CPU and bfloat16 on a GPU. The trained master is float32 always."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto takes a GPU where there is one."""
    backend: Literal["auto", "reference", "numba", "triton"] = "auto"
    """Backend of the fused ops; auto goes by device."""
    trunk_cache: Literal["auto", "off", "cpu", "device"] = "auto"
    """Where to keep what does not depend on the adapter; auto is on (cpu on a CPU, device on a GPU) wherever exact."""
    trunk_cache_bytes: int = 4 << 30
    """Limit of the trunk cache; the least recently used entries go first."""
    tp: int = 1
    """sglang: tensor-parallel ranks of the engine."""
    radix: Literal["auto", "off"] = "auto"
    """sglang: reuse keys and values wherever exact (auto), or never."""
    deterministic: bool = False
    """sglang: the engine's deterministic mode, where its attention backend has one."""
    engine_arg: tuple[str, ...] = ()
    """sglang: further arguments of the engine, key=value each: attention_backend=triton mem_fraction_static=0.8."""
    verify_every: int = 0
    """Steps between comparisons of the kernels with the reference, bit for bit; 0 is a tenth of the run, -1 never."""

    def __post_init__(self):
        check(self)

    @property
    def objectives(self) -> dict[str, float]:
        """Weights by name of the objective, e.g. {"cross_entropy": 1.0, "reward": 0.5}."""
        weights = {}
        for term in self.objective.split(","):
            name, colon, weight = term.strip().partition(":")
            _require(name not in weights, f"--objective {self.objective}: {name} is there twice: drop one")
            weights[name] = _typed(f"--objective {self.objective}: a weight", weight, float) if colon else 1.0
        return weights

    @property
    def scores(self) -> bool:
        """Whether a step needs option scores."""
        return any(name not in GENERATED for name in self.objectives)

    @property
    def generates(self) -> bool:
        """Whether steps or evaluations need generated text."""
        return self.generate == "on" or any(name in GENERATED for name in self.objectives)

    @property
    def stops(self) -> tuple[str, ...]:
        """What ends a generated text."""
        return tuple(stop.replace("\\n", "\n") for stop in self.stop)

    def to_json(self) -> str:
        """The configuration as it is written to config.json."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        """Build from a mapping such as a parsed config.json or YAML file.

        Raises:
            UserError: an unknown key, or a value of the wrong type.
        """
        kinds = get_type_hints(cls)
        unknown = [key for key in values if key not in kinds]
        if unknown:
            raise UserError(f"unknown configuration key {unknown[0]!r}; known keys: {', '.join(kinds)}")
        return cls(**{key: _typed(key, value, kinds[key]) for key, value in values.items()})

    def refuse_missing_files(self) -> None:
        """Raise UserError for a data file that is not there."""
        for name in ("train_file", "dev_file", "test_file"):
            path = getattr(self, name)
            _require(not path or Path(path).is_file(), f"--{name.replace('_', '-')}: no such file: {path}")

    @property
    def follows(self) -> bool:
        """True on the second and later machines of an engine: they serve a trainer that runs on the first."""
        ranks = [arg.partition("=")[2].strip() for arg in self.engine_arg if arg.strip().startswith("node_rank=")]
        return self.runtime == "sglang" and bool(ranks) and ranks[-1] != "0"

    def absolute(self) -> "Config":
        """The same configuration, valid from any working directory."""
        paths = {n: str(Path(v).absolute()) for n in PATHS if (v := getattr(self, n)) and Path(v).exists()}
        file, colon, function = self.reward.rpartition(":")
        if file.endswith(".py"):
            paths["reward"] = f"{Path(file).absolute()}{colon}{function}"
        return dataclasses.replace(self, **paths)


def _typed(key: str, value, kind):
    """`value` as `kind`, an annotation of Config's: YAML reads 1e-3 as text, and one item of a list as itself."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        _require(value in options, f"{key} must be one of {', '.join(options)}; got {value!r}")
        return value
    if get_origin(kind) is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_typed(key, item, options[0]) for item in items)
    if kind is float and (isinstance(value, int | str) and not isinstance(value, bool)):
        try:
            return float(value)
        except ValueError:
            pass
    fits = type(value) is kind
    _require(fits, f"{key} must be {KINDS[kind]}, got {value!r}")
    return value


def check(config: Config) -> None:
    """Raise UserError on a value that no run can have; what depends on model or data is checked when that is read."""
    _check_objective(config)
    _require(bool(config.model), "--model is missing: give a path or a hub id")
    _require(bool(config.output_dir), "--output-dir is missing: give the run directory to create")
    files = config.train_file or config.dev_file or config.test_file
    _require(bool(config.task or files), "--task and --train-file are missing: give one, or both")
    words = config.label_words
    _require(len(words) != 1, f"--label-words needs at least two words, got {words}")
    _require(len(set(words)) == len(words), f"--label-words must differ, got {words}: drop the repeated one")
    _require(not (config.k_shot and config.num_train), "--k-shot and --num-train exclude each other: drop one")
    for name in (
        "steps",
        "batch_size",
        "num_perturbations",
        "r",
        "lora_alpha",
        "max_length",
        "trunk_cache_bytes",
        "tp",
        "max_new_tokens",
    ):
        value = getattr(config, name)
        _require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in (
        "k_shot",
        "num_train",
        "num_dev",
        "num_test",
        "eval_every",
        "eval_batch_size",
        "micro_batch_size",
        "data_seed",
        "warmup_steps",
        "num_demonstrations",
        "early_stopping",
    ):
        value = getattr(config, name)
        _require(value >= 0, f"--{name.replace('_', '-')} must be at least 0, got {value}")
    for name in ("lr", "eps"):
        value = getattr(config, name)
        _require(math.isfinite(value) and value > 0, f"--{name} must be a finite number > 0, got {value}")
        _require(FLOAT32[0] <= value <= FLOAT32[1], f"--{name} must be within float32, {FLOAT32}; got {value}")
    size, micro = config.batch_size, config.micro_batch_size
    _require(micro <= size, f"--micro-batch-size must be at most --batch-size, {size}; got {micro}")
    _require(config.warmup_steps <= config.steps, f"--warmup-steps must be at most --steps, got {config.warmup_steps}")
    clip = config.clip
    _require(math.isfinite(clip) and clip >= 0, f"--clip must be a finite number >= 0, got {clip}")
    decay = config.weight_decay
    _require(0 <= decay * config.lr < 1, f"--weight-decay must be at least 0 and below 1 / lr, got {decay}")
    _require(0 <= config.seed < 2**64, f"--seed must be in [0, 2**64), got {config.seed}")
    for name in ENGINE:
        given = config.runtime == "sglang" or getattr(config, name) == getattr(Config, name)
        _require(given, f"--{name.replace('_', '-')} is of the engine: use --runtime sglang with it")
    ratio = config.max_loss_ratio
    _require(ratio == 0 or 1 < ratio < math.inf, f"--max-loss-ratio must be 0 or a finite number > 1, got {ratio}")
    if config.true_gradient:
        _require(config.runtime == "hf", "--true-gradient needs autograd in this process: use it with --runtime hf")
        flat = [name for name in config.objectives if name in ("accuracy", *GENERATED)]
        _require(not flat, f"--true-gradient: {' and '.join(flat)} has no gradient; leave it out")
    _check_rule(config)
    if config.head == "linear":
        _check_linear_head(config)
    _require(config.verify_every >= -1, f"--verify-every must be at least -1, got {config.verify_every}")


def _check_rule(config: Config) -> None:
    rule = config.update_rule
    for name, rules in (
        ("momentum", ("momentum",)),
        ("beta1", ("adam", "adamw")),
        ("beta2", ("adam", "adamw")),
        ("adam_eps", ("adam", "adamw")),
    ):
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        used = rule in rules or value == getattr(Config, name)
        _require(used, f"{flag} {value} is not of --update-rule {rule}: leave it out, or use {' or '.join(rules)}")
        if name == "adam_eps":
            _require(FLOAT32[0] <= value <= FLOAT32[1], f"{flag} must be a finite float32 number > 0, got {value}")
        else:
            _require(0 <= value < 1, f"{flag} must be at least 0 and below 1, got {value}")
    _require(
        bool(config.weight_decay) or not config.no_decay, "--no-decay needs --weight-decay: give it, or leave both"
    )
    if rule == "conservative":
        n = config.num_perturbations
        _require(n == 1, f"--update-rule conservative tries one direction: --num-perturbations must be 1, got {n}")
        _require(
            not config.z_score_rewards,
            "--z-score-rewards: standardised rewards of two scorings do not compare; leave it out of conservative runs",
        )


def _check_objective(config: Config) -> None:
    objectives, known = config.objectives, (*SCORED, *GENERATED)
    for name, weight in objectives.items():
        alone = name == "auto" and len(objectives) == 1
        text = f"one of auto, {', '.join(known)}, or a mixture like cross_entropy:1,reward:0.5"
        _require(alone or name in known, f"--objective must be {text}; got {name!r}")
        _require(0 < weight < math.inf, f"--objective: the weight of {name} must be a finite number > 0, got {weight}")
    asked = "reward" in objectives
    _require(bool(config.reward) or not asked, "--objective reward needs --reward file.py:function")
    _require(asked or not config.reward, f"--reward {config.reward} is not in --objective: add it there, reward:0.5")
    text = any(name in GENERATED for name in objectives)
    _require(text or not config.z_score_rewards, "--z-score-rewards needs f1 or reward in --objective: leave it out")
    _require(all(config.stop), "--stop must not be empty text: leave it out")


def _check_linear_head(config: Config) -> None:
    words = "--head linear needs --label-words, one name a class: ' negative' ' positive'"
    _require(bool(config.label_words), words)
    _require(config.runtime == "hf", "--head linear: the engine has no such head; use --runtime hf")
    _require(not config.num_demonstrations, "--head linear reads no demonstrations: leave --num-demonstrations out")
    allowed = ("auto", "cross_entropy", "accuracy")
    _require(
        set(config.objectives) <= set(allowed),
        f"--head linear has classes, not words: --objective must be {', '.join(allowed)}; got {config.objective}",
    )
    _require(
        bool(config.prompt or not config.task),
        f"--head linear: the prompt of task {config.task} asks for words; give --prompt, such as '{{text}}'",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)
