"""LoRA: which linear layers are adapted, and the adapter as PEFT describes it."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn
from transformers.pytorch_utils import Conv1D

from mezo.config.model import Adapted, pattern_of
from mezo.errors import UserError
from mezo.models.head import module_named
from mezo.models.quantization import is_foreign, is_quantised, quantised_by
from mezo.models.tuning import Attached, Base
from mezo.progress import say
from mezo_kernels import canonical_name, lora_init

PREFIX, SAVED = "base_model.model.", ".modules_to_save.default."
"""Begins a canonical name; and stands in that of a parameter of PEFT's copy of a module that is trained whole."""
READ = "read"
"""Name under which an adapter is loaded beside the one that is trained."""
ALL_LINEAR = "all-linear"
"""What `--target-modules` takes, as PEFT does, for every linear layer but the head."""


def attach(tuning: Adapted, base: Base) -> Attached:
    """The base with a fresh LoRA adapter of PEFT's, and the head for classes trained beside it, if there is one.

    Raises:
        UserError: there are no such layers or linear modules.
    """
    targets, layers = _targets(tuning, base, adaptable_head=not base.whole)
    lora = LoraConfig(
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,
        use_rslora=tuning.use_rslora,
        rank_pattern=pattern_of(tuning.rank_pattern, "--rank-pattern", int),
        alpha_pattern=pattern_of(tuning.alpha_pattern, "--alpha-pattern"),
        target_modules=sorted(targets),
        layers_to_transform=layers or None,
        lora_dropout=0.0,
        bias="none",
        modules_to_save=list(base.whole) or None,
        fan_in_fan_out=any(isinstance(m, Conv1D) for m in base.model.modules()),
        task_type=_task_type(base),
        base_model_name_or_path=base.checkpoint.name,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # each module has what is right for it
            model = get_peft_model(base.model, lora, autocast_adapter_dtype=False).eval()
    except ValueError as error:
        _refuse_foreign(base, targets, error)
        why = " ".join(str(error).split())  # of modules that PEFT knows to be read without being called
        raise UserError(f"--target-modules: {why} Leave it out, or use {ALL_LINEAR}") from error
    params = {canonical_name(name): p for name, p in model.named_parameters() if ".lora_" in name}
    whole = {n.replace(SAVED, "."): p for n, p in model.named_parameters() if SAVED in n}  # as PEFT's state dict has it
    _say_experts(base, params)
    bad = [name for name in params if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if bad:
        raise UserError(f"--target-modules: only linear layers can be adapted, got {bad[0]}")
    return Attached(
        model,
        params | whole,
        _peft_fields(lora, base),
        "LoRA parameters",
        _noise,
        _beginning(params, whole, base) if base.checkpoint.head == "classification" else None,
        above=frozenset(whole),
    )


def _refuse_foreign(base: Base, targets: Iterable[str], error: ValueError) -> None:
    """Raise UserError if some of the targets are layers of a library that PEFT has no LoRA for."""
    named = [m for n, m in base.model.named_modules() if any(_matches(n, target) for target in targets)]
    foreign = sorted({type(module).__name__ for module in named if is_foreign(module)})
    if foreign and is_quantised(base.model):
        held = quantised_by(base.model.config)
        raise UserError(
            f"--model {base.checkpoint.name}: its weights are quantised ({held}), in layers of {', '.join(foreign)},"
            " beside which PEFT has no LoRA: use the model in floats with --quantization int8, or as a GGUF file"
        ) from error


def _beginning(
    params: Mapping[str, nn.Parameter], whole: Mapping[str, nn.Parameter], base: Base
) -> Callable[[int], dict[str, torch.Tensor]]:
    """theta_0 of an adapter and a classification head, from the seed of a run.

    The head is the checkpoint's. Of a new one the matrix of the outputs is zero, so that no class is preferred; others
    are drawn.

    Args:
        params: of the adapter.
        whole: of the head.
        base: the model.
    """
    new = {f"{PREFIX}{name}" for name in base.new}
    start = {n: p.detach().float().cpu() for n, p in whole.items() if n not in new or p.dim() < 2}
    shapes = {name: tuple(p.shape) for name, p in (params | whole).items()}
    zero = {n for n, p in whole.items() if len(p) == base.model.config.num_labels} | {
        name for name in params if not name.endswith("lora_A.weight")
    }

    def initial(seed: int) -> dict[str, torch.Tensor]:
        begins = lambda name, shape: torch.zeros(shape) if name in zero else drawn(seed, name, shape)  # noqa: E731
        return {name: start[name] if name in start else begins(name, shape) for name, shape in shapes.items()}

    return initial


def _task_type(base: Base) -> str | None:
    """What PEFT calls the kind of a model; it has no name for one that fills masks."""
    if base.checkpoint.head == "classification":
        return "SEQ_CLS"
    if base.checkpoint.head == "linear" or base.checkpoint.masked:
        return None
    return "SEQ_2_SEQ_LM" if base.checkpoint.encoder_decoder else "CAUSAL_LM"


@contextmanager
def as_peft_loads(model: PeftModel, directory: str) -> Iterator[None]:
    """Within the block a model runs the adapter of a directory, which PEFT reads by itself, in place of its own.

    Args:
        model: of PEFT.
        directory: of the adapter.
    Raises:
        UserError: PEFT cannot load it.
    """
    try:
        model.load_adapter(directory, READ, autocast_adapter_dtype=False)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"adapter {directory}: PEFT cannot load it ({' '.join(str(error).split())})") from error
    try:
        model.set_adapter(READ)
        yield
    finally:
        model.set_adapter("default")
        model.delete_adapter(READ)
        model.requires_grad_(False).eval()


def _say_experts(base: Base, params: Iterable[str]) -> None:
    """Say what of the experts of a mixture stays as it is: transformers keeps most as no linear layers."""
    named = lambda names: ", ".join(sorted({_leaf(name) for name in names if "expert" in name}))  # noqa: E731
    fused = named(name for name, p in base.model.named_parameters() if p.dim() == 3)
    adapted = named(name.split(".lora_")[0] for name in params)
    if fused or adapted:
        parts = [f"{fused} stay as they are, which are no linear layers"] if fused else []
        say("experts: " + "; ".join([*parts, *([f"LoRA is beside {adapted} of the others"] if adapted else [])]))


def peft_defaults(kind: str) -> dict[str, object]:
    """PEFT's defaults of the fields of adapter_config.json; `kind` is "LORA" or "PREFIX_TUNING"."""
    return {"LORA": LoraConfig, "PREFIX_TUNING": PrefixTuningConfig}[kind]().to_dict()


def _noise(theta: Mapping[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    return (drawn(seed, name, tuple(tensor.shape)) for name, tensor in theta.items())


def drawn(seed: int, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """`lora_init` of any shape; the last dimension counts as the inputs."""
    return lora_init(seed, name, (math.prod(shape[:-1]), shape[-1])).view(shape)


def _targets(tuning: Adapted, base: Base, adaptable_head: bool) -> tuple[list[str], list[int]]:
    """Targets and layers as PEFT takes them, checked against the linear modules there are.

    Args:
        tuning: the options.
        base: the model.
        adaptable_head: the head is one of the modules.
    """
    if "auto" in tuning.layers_to_transform:
        raise UserError("--layers-to-transform auto: a run that begins chooses; here name layers, or leave it out")
    layers = sorted(tuning.layers_to_transform)
    for number in layers:
        if not 0 <= number < len(base.layers):
            there = f"layers 0 to {len(base.layers) - 1}" if base.layers else "no list of its layers: leave it out"
            raise UserError(f"--layers-to-transform: layer {number} does not exist; the model has {there}")
    modules = _linear_modules(base, layers, adaptable_head)
    if tuning.target_modules in ((), (ALL_LINEAR,)):
        usual = base.checkpoint.family.targets or DEFAULT_TARGETS.get(base.body.config.model_type, ())
        known = not isinstance(usual, str) and any(_matches(name, target) for name in modules for target in usual)
        if not known or tuning.target_modules:
            return _all_linear(base, layers)
        return _within(base, modules, list(usual), layers)
    targets, head = list(tuning.target_modules), _head_name(base)
    for target in targets:
        if not any(_matches(name, target) for name in modules):
            known = sorted(set(map(_leaf, modules)))
            raise UserError(f"--target-modules: no linear layer named {target}; the model has {', '.join(known)}")
    if not layers or head not in modules or not any(_matches(head, target) for target in targets):
        return _within(base, modules, targets, layers)
    # PEFT takes no module outside the layers once layers are chosen: name each module instead
    return _each(modules, targets), []


def _within(base: Base, modules: list[str], targets: list[str], layers: list[int]) -> tuple[list[str], list[int]]:
    """Targets and layers as they are, or each module by its name where PEFT would take some for images too."""
    if base.checkpoint.reads_images:
        return _each(modules, targets), []
    return targets, layers


def _each(modules: list[str], targets: list[str]) -> list[str]:
    """The modules that some targets name."""
    return [name for name in modules if any(_matches(name, target) for target in targets)]


def _matches(name: str, target: str) -> bool:
    """Whether PEFT takes a module for one of those that a target names."""
    return name == target or name.endswith(f".{target}")


def _head_name(base: Base) -> str | None:
    """Path of the layer that gives the logits, if it is a linear one."""
    outputs = base.model.get_output_embeddings()
    if not isinstance(outputs, nn.Linear):
        return None
    return next((name for name, module in base.model.named_modules() if module is outputs), None)


def _linear_modules(base: Base, layers: list[int], adaptable_head: bool) -> list[str]:
    """Paths of the linear modules of some layers, or of the whole model where none are named, and of the head.

    Heads that are more than a linear layer are left out: what lies in them is no layer of the body.
    """
    within = [base.layers[number] for number in layers] or [base.body]
    inside = {id(module) for part in within for module in part.modules()}
    inside -= {id(module) for name in base.whole for module in module_named(base.model, name).modules()}
    head = _head_name(base)
    others = is_foreign if is_quantised(base.model) else lambda module: False
    adaptable = lambda name, module: (  # noqa: E731
        (isinstance(module, (nn.Linear, Conv1D)) or others(module)) and id(module) in inside and name != head
    )
    names = [name for name, module in base.model.named_modules() if adaptable(name, module)]
    return names + ([head] if adaptable_head and head and base.model.get_submodule(head) is base.head else [])


def _all_linear(base: Base, layers: list[int]) -> tuple[list[str], list[int]]:
    """What adapts every linear module of the body in some layers, or in all: names where these mean no other module."""
    uncalled = _uncalled(base)
    names = [name for name in _linear_modules(base, [], False) if _leaf(name) not in uncalled]
    leaves = sorted(set(map(_leaf, names)))
    meant = {name for name, _ in base.model.named_modules() if any(_matches(name, leaf) for leaf in leaves)}
    if meant <= set(names):
        return leaves, layers
    return [name for name in _linear_modules(base, layers, False) if name in names], []


def _leaf(name: str) -> str:
    return name.rsplit(".", 1)[-1]


@torch.no_grad()
def _uncalled(base: Base) -> set[str]:
    """Last parts of the paths of linear modules whose weights the model reads without ever calling them.

    An adapter beside such a module would do nothing. One token goes through the model to see.
    """
    called, hooks, names = set(), [], _linear_modules(base, [], False)
    for name in names:
        see = lambda module, args, name=name: called.add(_leaf(name))  # noqa: E731
        hooks.append(base.model.get_submodule(name).register_forward_pre_hook(see))
    try:
        base.model(**base.checkpoint.one_token(base.model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return base.checkpoint.family.uncalled | set(map(_leaf, names)) - called


def _peft_fields(lora: LoraConfig, base: Base) -> dict:
    saved = {"modules_to_save": list(base.whole)} if base.whole else {}
    saved |= {"use_rslora": True} if lora.use_rslora else {}
    saved |= {"fan_in_fan_out": True} if lora.fan_in_fan_out else {}
    saved |= {name: found for name in ("rank_pattern", "alpha_pattern") if (found := getattr(lora, name))}
    return saved | {
        "peft_type": "LORA",
        "task_type": lora.task_type,
        "base_model_name_or_path": base.checkpoint.name,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(lora.target_modules),
        "layers_to_transform": lora.layers_to_transform,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
