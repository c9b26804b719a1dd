"""What no run can have: rules that need several options at once. Ranges stand on their fields."""

import math

from mezo.config.data import Data
from mezo.config.machine import DASHBOARDS, HF, dashboards_of
from mezo.config.method import GENERATED, SCORED, Method
from mezo.config.model import Model, pattern_of
from mezo.config.options import flag_of, shown
from mezo.errors import UserError, require


def check(config) -> None:
    """Raise UserError on what no run can have; what depends on model or data is checked when that is read.

    Args:
        config: a `Config` whose numbers are in their ranges.
    """
    _check_objective(config.method)
    require(bool(config.model.base), "--model is missing: give a path or a hub id")
    require(bool(config.machine.output_dir), "--output-dir is missing: give the run directory to create")
    for name, kind in (("rank_pattern", int), ("alpha_pattern", float)):
        pattern_of(getattr(config.model.tuning, name), flag_of(name), kind)
    layers = getattr(config.model.tuning, "layers_to_transform", ())
    alone = f"--layers-to-transform {shown(layers)}: give auto alone, or numbers"
    require("auto" not in layers or len(layers) == 1, alone)
    _check_data(config.data)
    _check_method(config.method)
    size, micro = config.method.batch_size, config.machine.micro_batch_size
    require(micro <= size, f"--micro-batch-size must be at most --batch-size, {size}; got {micro}")
    if config.model.tuning.head != "model":
        _check_head(config)
    to, known = config.machine.report_to, ", ".join(DASHBOARDS)
    wrong = f"--report-to must be some of {known} with commas between, or none; got {to}"
    require(set(dashboards_of(to)) <= set(DASHBOARDS), wrong)
    _check_runtime(config)


def _check_data(data: Data) -> None:
    files = data.train_file or data.dev_file or data.test_file
    require(bool(data.task or files), "--task and --train-file are missing: give one, or both")
    words = data.label_words
    require(len(words) != 1, f"--label-words needs at least two words, got {words}")
    require(len(set(words)) == len(words), f"--label-words must differ, got {words}: drop the repeated one")
    require(not (data.k_shot and data.num_train), "--k-shot and --num-train exclude each other: drop one")


def _check_method(method: Method) -> None:
    warmup, decay, ratio = method.warmup_steps, method.weight_decay, method.max_loss_ratio
    require(warmup <= method.steps, f"--warmup-steps must be at most --steps, got {warmup}")
    require(decay * method.lr < 1, f"--weight-decay must be at least 0 and below 1 / lr, got {decay}")
    size, directions, name = method.batch_size, method.directions, method.rule.name
    fits = f"--directions must divide --batch-size, {size}, into groups of equal size; got {directions}"
    require(size % directions == 0, fits)
    why = "compares several thetas on the same examples; use another rule"
    shared = directions == 1 or not (method.rule.one_sided or method.rule.compares or method.rule.guides)
    require(shared, f"--directions must be 1, got {directions}: --update-rule {name} {why}")
    why = f"--update-rule {name} measures one slope a step, which is not along a z; leave it out"
    require(not (method.true_gradient and method.rule.guides), f"--true-gradient: {why}")
    follows = method.follow_coherence
    fixed = f"--follow-coherence: --update-rule {name} remembers each of its directions; leave it out"
    require(not (follows and method.rule.remembers), fixed)
    require(not follows or directions > 1, "--follow-coherence chooses among up to --directions: give it, 2 or more")
    require(not follows or method.noise, "--follow-coherence needs --noise, which measures the coherence: leave it on")
    require(
        not follows or not set(method.objectives) & set(GENERATED),
        f"--follow-coherence: --objective {method.objective} reads no scores",
    )
    require(bool(decay) or not method.no_decay, "--no-decay needs --weight-decay: give it, or leave both")
    anchored = method.anchored_decay
    require(bool(decay) or not anchored, "--anchored-decay needs --weight-decay: give it, or leave both")
    in_gradient = "has decay in the gradient, towards zero; use --update-rule adamw"
    require(not anchored or not method.rule.l2(decay), f"--anchored-decay: --update-rule {name} {in_gradient}")
    require(ratio == 0 or ratio > 1, f"--max-loss-ratio must be 0 or a finite number > 1, got {ratio}")
    longest = method.max_step_ratio
    require(longest == 0 or longest > 1, f"--max-step-ratio must be 0 or a finite number > 1, got {longest}")
    read = method.scores or method.best_metric != "loss"
    require(read, f"--best-metric loss: --objective {method.objective} reads no loss of options; leave it out")
    refused = method.rule.refusals(
        num_perturbations=method.num_perturbations,
        weight_decay=decay,
        normalise_z=method.normalise_z,
        z_score=method.z_score_rewards,
    )
    for name, why in refused:
        raise UserError(f"{flag_of(name)} {why}")


def _check_objective(method: Method) -> None:
    objectives, known = method.objectives, (*SCORED, *GENERATED)
    for name, weight in objectives.items():
        alone = name == "auto" and len(objectives) == 1
        text = f"one of auto, {', '.join(known)}, or a mixture like cross_entropy:1,reward:0.5"
        require(alone or name in known, f"--objective must be {text}; got {name!r}")
        require(0 < weight < math.inf, f"--objective: the weight of {name} must be a finite number > 0, got {weight}")
    asked = "reward" in objectives
    require(bool(method.reward) or not asked, "--objective reward needs --reward file.py:function")
    require(asked or not method.reward, f"--reward {method.reward} is not in --objective: add it there, reward:0.5")
    text = any(name in GENERATED for name in objectives)
    require(text or not method.z_score_rewards, "--z-score-rewards needs f1 or reward in --objective: leave it out")
    centred = not method.center_rewards or method.z_score_rewards
    require(centred, "--center-rewards changes what --z-score-rewards divides by, else nothing: give both, or none")
    require(text or not method.temperature, "--temperature needs f1 or reward in --objective: leave it out")
    require(all(method.stop), "--stop must not be empty text: leave it out")


def _check_head(config) -> None:
    data, method, head = config.data, config.method, f"--head {config.model.tuning.head}"
    require(method.generate != "on", f"{head} writes no text: leave --generate out")
    require(not data.num_demonstrations, f"{head} reads no demonstrations: leave --num-demonstrations out")
    allowed = ("auto", "cross_entropy", "accuracy")
    require(
        set(method.objectives) <= set(allowed),
        f"{head} has classes, not words: --objective must be {', '.join(allowed)}; got {method.objective}",
    )
    require(
        bool(data.prompt or not data.task),
        f"{head}: the prompt of task {data.task} asks for words; give --prompt, such as '{{text}}'",
    )


def _check_runtime(config) -> None:
    tuning, runtime, method = config.model.tuning, config.machine.runtime, config.method
    _check_quantization(config.model, engine=not isinstance(runtime, HF))
    if isinstance(runtime, HF):
        cache = runtime.trunk_cache
        fits = tuning.is_lora or cache in ("auto", "off")
        require(fits, f"--trunk-cache {cache}: --tuning {tuning.name} trains every layer; use auto or off")
        flat = [name for name in method.objectives if name in ("accuracy", *GENERATED)]
        require(
            not (flat and method.true_gradient), f"--true-gradient: {shown(tuple(flat))} has no gradient; leave it out"
        )
        return
    require(tuning.head == "model", f"--head {tuning.head}: the engine has no such head; use --runtime hf")
    require(tuning.is_lora, f"--tuning {tuning.name}: the engine's slots hold LoRA adapters; use --runtime hf")
    patterns = tuning.rank_pattern or tuning.alpha_pattern
    require(not patterns, "--rank-pattern, --alpha-pattern: the engine's slots have one rank; use --runtime hf")
    require(not method.true_gradient, "--true-gradient needs autograd in this process: use it with --runtime hf")


def _check_quantization(model: Model, engine: bool) -> None:
    name, tuning = model.quantization, model.tuning
    if name == "none":
        return
    own = "the engine quantises by itself: use --engine-arg quantization=... where there is a GPU, or --runtime hf"
    require(not engine, f"--quantization {name}: {own}")
    floats = "--tuning full trains the weights themselves, by less than they are rounded to; use --tuning lora"
    require(tuning.name != "full", f"--quantization {name}: {floats}")
    tried = f"--head {tuning.head} has not been tried so; use --head model"
    require(tuning.head == "model", f"--quantization {name}: {tried}")
