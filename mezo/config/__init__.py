"""Configuration of a run: one flat frozen dataclass that refuses bad values before anything is loaded or written."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

from mezo.config.checks import ENGINE, GENERATED, check, engine_argument
from mezo.errors import UserError, require
from mezo.method.rules import RULES, Rule
from mezo.method.rules.logged import LoggedRule

PATHS = ("model", "train_file", "dev_file", "test_file", "adapter")
KINDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
MACHINE = ("runtime", *ENGINE, "device", "backend", "trunk_cache", "trunk_cache_bytes",
           "eval_batch_size", "noise", "true_gradient", "verify_every", "early_stopping", "max_loss_ratio")  # fmt: skip
"""Options that say where, how and how far a run is computed, not what: a resumed run may have others."""


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
    """Training examples in all; 0 takes all."""
    num_dev: int = 0
    """Dev examples in all; 0 takes all."""
    num_test: int = 0
    """Test examples in all; 0 takes all."""
    balance: Literal["on", "off"] = "on"
    """on: num_train, num_dev and num_test keep equally many of each class, as far as there are, and k_shot refuses a
    class with fewer; off: random samples, and all of such a class, as in the paper."""
    data_seed: int = 0
    """Chooses the examples that k_shot, num_train, num_dev and num_test keep, and the demonstrations."""
    num_demonstrations: int = 0
    """For `mezo eval`: training examples with their answers in front of each prompt, classes balanced (in-context
    learning); those that do not fit into max_length are left out."""
    max_length: int = 512
    """Token budget of a prompt with its longest option; longer texts are cut, the template and the options never."""

    tuning: Literal["lora", "full", "prefix"] = "lora"
    """What is trained: a LoRA adapter, or every parameter of the model (hf; 12 bytes each in float32, 8 in 16 bits, and
    in the paper eps 1e-3 and lr 1e-7 to 1e-5), which leaves a model/ of its own instead of adapter/; or keys and values
    of a prefix in every layer (hf; in the paper eps 1e-1 and lr 1e-3 to 1e-2)."""
    num_prefix_tokens: int = 5
    """Tokens of the prefix of --tuning prefix; they start as random tokens of the vocabulary."""
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
    """Start from this PEFT adapter, LoRA or prefix, instead of a fresh one."""

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
    update_rule: Literal["sgd", "momentum", "adam", "adamw", "sign", "conservative", "fzoo"] = "sgd"
    """What moves theta: sgd is the paper's; momentum keeps a buffer (4 bytes a parameter), adam and adamw two moments
    (8 bytes); sign takes the sign of each element; conservative keeps the best of theta and a step of sgd either way,
    by the losses of the same batch, for four more forward passes; fzoo (arXiv 2506.09034) takes n + 1 forward passes
    for n perturbations, one-sided and of z = +1 or -1, and divides the estimate by the standard deviation of their
    losses: a step moves a weight by about lr / (eps sqrt(n))."""
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
    normalise_z: bool = False
    """Divide each z by its root mean square over all trained parameters, so that every perturbation has one length."""
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
    best_metric: Literal["auto", "loss"] = "auto"
    """Which figure of dev chooses the best step: the loss, or what the run is for: the reward if one is trained, F1 of
    generated text, the loss of lm_cross_entropy, else the accuracy."""
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
            require(name not in weights, f"--objective {self.objective}: {name} is there twice: drop one")
            weights[name] = _typed(f"--objective {self.objective}: a weight", weight, float) if colon else 1.0
        return weights

    @property
    def half_distance(self) -> float:
        """Half the way, along z, between the two thetas of a projected_grad: eps, or eps / 2 where one is theta."""
        return self.rule.half_distance(self.eps)

    @property
    def rule(self) -> Rule:
        """The update rule with its options."""
        kind = RULES[self.update_rule]
        return kind(**{field.name: getattr(self, field.name) for field in dataclasses.fields(kind)})

    @property
    def logged_rule(self) -> LoggedRule:
        """The update rule as the header of the log holds it."""
        return LoggedRule(self.rule, self.rule.l2(self.weight_decay), self.no_decay, self.normalise_z)

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
            require(not path or Path(path).is_file(), f"--{name.replace('_', '-')}: no such file: {path}")

    @property
    def follows(self) -> bool:
        """True on the second and later machines of an engine: they serve a trainer that runs on the first."""
        arguments = dict(map(engine_argument, self.engine_arg))
        return self.runtime == "sglang" and arguments.get("node_rank", "0") != "0"

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
        require(value in options, f"{key} must be one of {', '.join(options)}; got {value!r}")
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
    require(fits, f"{key} must be {KINDS[kind]}, got {value!r}")
    return value
