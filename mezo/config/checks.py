"""Kinds of options, and the check that refuses values no run can have."""

import math

from mezo.errors import UserError, require

ENGINE = ("tp", "radix", "deterministic", "engine_arg")
"""Options of the sglang runtime alone."""
SCORED = ("cross_entropy", "lm_cross_entropy", "accuracy")
"""Objectives that option scores decide."""
GENERATED = ("f1", "reward")
"""Objectives that generated text decides."""
LORA = ("r", "lora_alpha", "target_modules", "layers_to_transform")
"""Options of LoRA adapters alone."""
FLOAT32 = (1.1754943508222875e-38, 3.4028234663852886e38)  # smallest normal and largest number


def check(config) -> None:
    """Raise UserError on a value that no run can have; what depends on model or data is checked when that is read."""
    _check_objective(config)
    require(bool(config.model), "--model is missing: give a path or a hub id")
    require(bool(config.output_dir), "--output-dir is missing: give the run directory to create")
    files = config.train_file or config.dev_file or config.test_file
    require(bool(config.task or files), "--task and --train-file are missing: give one, or both")
    words = config.label_words
    require(len(words) != 1, f"--label-words needs at least two words, got {words}")
    require(len(set(words)) == len(words), f"--label-words must differ, got {words}: drop the repeated one")
    require(not (config.k_shot and config.num_train), "--k-shot and --num-train exclude each other: drop one")
    for name in (
        "steps",
        "batch_size",
        "num_perturbations",
        "r",
        "lora_alpha",
        "num_prefix_tokens",
        "max_length",
        "trunk_cache_bytes",
        "tp",
        "max_new_tokens",
    ):
        value = getattr(config, name)
        require(value >= 1, f"--{name.replace('_', '-')} must be at least 1, got {value}")
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
        require(value >= 0, f"--{name.replace('_', '-')} must be at least 0, got {value}")
    for name in ("lr", "eps"):
        value = getattr(config, name)
        require(math.isfinite(value) and value > 0, f"--{name} must be a finite number > 0, got {value}")
        require(FLOAT32[0] <= value <= FLOAT32[1], f"--{name} must be within float32, {FLOAT32}; got {value}")
    size, micro = config.batch_size, config.micro_batch_size
    require(micro <= size, f"--micro-batch-size must be at most --batch-size, {size}; got {micro}")
    require(config.warmup_steps <= config.steps, f"--warmup-steps must be at most --steps, got {config.warmup_steps}")
    clip = config.clip
    require(math.isfinite(clip) and clip >= 0, f"--clip must be a finite number >= 0, got {clip}")
    decay = config.weight_decay
    require(0 <= decay * config.lr < 1, f"--weight-decay must be at least 0 and below 1 / lr, got {decay}")
    require(0 <= config.seed < 2**64, f"--seed must be in [0, 2**64), got {config.seed}")
    for name in ENGINE:
        given = config.runtime == "sglang" or getattr(config, name) == getattr(type(config), name)
        require(given, f"--{name.replace('_', '-')} is of the engine: use --runtime sglang with it")
    read = config.scores or config.best_metric == "auto"
    require(read, f"--best-metric loss: --objective {config.objective} reads no loss of options; leave it out")
    ratio = config.max_loss_ratio
    require(ratio == 0 or 1 < ratio < math.inf, f"--max-loss-ratio must be 0 or a finite number > 1, got {ratio}")
    if config.true_gradient:
        require(config.runtime == "hf", "--true-gradient needs autograd in this process: use it with --runtime hf")
        flat = [name for name in config.objectives if name in ("accuracy", *GENERATED)]
        require(not flat, f"--true-gradient: {' and '.join(flat)} has no gradient; leave it out")
    if config.head == "linear":
        _check_linear_head(config)
    _check_tuning(config)
    _check_rule(config)
    require(config.verify_every >= -1, f"--verify-every must be at least -1, got {config.verify_every}")


def _check_rule(config) -> None:
    rule = config.update_rule
    for name, rules in (
        ("momentum", ("momentum",)),
        ("beta1", ("adam", "adamw")),
        ("beta2", ("adam", "adamw")),
        ("adam_eps", ("adam", "adamw")),
    ):
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        used = rule in rules or value == getattr(type(config), name)
        require(used, f"{flag} {value} is not of --update-rule {rule}: leave it out, or use {' or '.join(rules)}")
        if name == "adam_eps":
            require(FLOAT32[0] <= value <= FLOAT32[1], f"{flag} must be a finite float32 number > 0, got {value}")
        else:
            require(0 <= value < 1, f"{flag} must be at least 0 and below 1, got {value}")
    require(bool(config.weight_decay) or not config.no_decay, "--no-decay needs --weight-decay: give it, or leave both")
    refused = config.rule.refusals(
        num_perturbations=config.num_perturbations,
        weight_decay=config.weight_decay,
        normalise_z=config.normalise_z,
        z_score=config.z_score_rewards,
    )
    for name, why in refused:
        raise UserError(f"--{name.replace('_', '-')} {why}")


def _check_objective(config) -> None:
    objectives, known = config.objectives, (*SCORED, *GENERATED)
    for name, weight in objectives.items():
        alone = name == "auto" and len(objectives) == 1
        text = f"one of auto, {', '.join(known)}, or a mixture like cross_entropy:1,reward:0.5"
        require(alone or name in known, f"--objective must be {text}; got {name!r}")
        require(0 < weight < math.inf, f"--objective: the weight of {name} must be a finite number > 0, got {weight}")
    asked = "reward" in objectives
    require(bool(config.reward) or not asked, "--objective reward needs --reward file.py:function")
    require(asked or not config.reward, f"--reward {config.reward} is not in --objective: add it there, reward:0.5")
    text = any(name in GENERATED for name in objectives)
    require(text or not config.z_score_rewards, "--z-score-rewards needs f1 or reward in --objective: leave it out")
    require(all(config.stop), "--stop must not be empty text: leave it out")


def _check_linear_head(config) -> None:
    words = "--head linear needs --label-words, one name a class: ' negative' ' positive'"
    require(bool(config.label_words), words)
    require(config.runtime == "hf", "--head linear: the engine has no such head; use --runtime hf")
    require(config.generate != "on", "--head linear writes no text: leave --generate out")
    require(not config.num_demonstrations, "--head linear reads no demonstrations: leave --num-demonstrations out")
    allowed = ("auto", "cross_entropy", "accuracy")
    require(
        set(config.objectives) <= set(allowed),
        f"--head linear has classes, not words: --objective must be {', '.join(allowed)}; got {config.objective}",
    )
    require(
        bool(config.prompt or not config.task),
        f"--head linear: the prompt of task {config.task} asks for words; give --prompt, such as '{{text}}'",
    )


def _check_tuning(config) -> None:
    tuning, tokens = config.tuning, config.num_prefix_tokens
    own = tuning == "prefix" or tokens == type(config).num_prefix_tokens
    require(own, f"--num-prefix-tokens {tokens} is of prefixes: use --tuning prefix with it")
    if tuning == "lora":
        return
    trained = {"full": "every parameter", "prefix": "keys and values of every layer"}[tuning]
    require(config.runtime == "hf", f"--tuning {tuning}: the engine's slots hold LoRA adapters; use --runtime hf")
    for name in (*LORA, "adapter") if tuning == "full" else LORA:
        value, flag = getattr(config, name), "--" + name.replace("_", "-")
        own = value == getattr(type(config), name)
        require(own, f"{flag} {value} is of LoRA, --tuning {tuning} trains {trained}: leave it out")
    require(config.head == "model", "--head linear is trained beside an adapter: use --tuning lora with it")
    cache = config.trunk_cache
    require(cache in ("auto", "off"), f"--trunk-cache {cache}: --tuning {tuning} trains every layer; use auto or off")


def engine_argument(text: str) -> tuple[str, str]:
    """Name and value of one --engine-arg, the name as SGLang's Python interface has it.

    >>> engine_argument("--node-rank=1")
    ('node_rank', '1')
    """
    key, _, value = text.partition("=")
    return key.strip().removeprefix("--").replace("-", "_"), value.strip()
