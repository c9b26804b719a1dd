"""LoRA: which linear layers are adapted, and the adapter as PEFT describes it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn

from mezo.config.model import Adapted
from mezo.errors import UserError
from mezo.models.spec import LINEAR_HEAD
from mezo.models.tuning import Attached, Base
from mezo_kernels import canonical_name, lora_init

READ = "read"
"""Name under which an adapter is loaded beside the one that is trained."""


def attach(tuning: Adapted, base: Base) -> Attached:
    """The base with a fresh LoRA adapter of PEFT's, and the linear head trained beside it, if there is one.

    Raises:
        UserError: there are no such layers or linear modules.
    """
    linear_head, model_type = tuning.head == "linear", base.model.config.model_type
    targets = tuning.target_modules or base.checkpoint.family.targets or DEFAULT_TARGETS.get(model_type)
    if not targets:
        raise UserError(f"--target-modules: no default for model type {model_type}; name the modules")
    layers = sorted(tuning.layers_to_transform)
    targets, layers = _chosen(base, list(targets), layers, adaptable_head=not linear_head)
    lora = LoraConfig(
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,
        use_rslora=tuning.use_rslora,
        target_modules=sorted(targets),
        layers_to_transform=layers or None,
        lora_dropout=0.0,
        bias="none",
        modules_to_save=[LINEAR_HEAD] if linear_head else None,
        task_type=None if linear_head or base.checkpoint.masked else "CAUSAL_LM",
        base_model_name_or_path=base.checkpoint.name,
    )
    model = get_peft_model(base.model, lora, autocast_adapter_dtype=False).eval()
    params = {canonical_name(name): p for name, p in model.named_parameters() if ".lora_" in name}
    bad = [name for name in params if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if bad:
        raise UserError(f"--target-modules: only linear layers can be adapted, got {bad[0]}")
    if linear_head:
        head = getattr(base.model, LINEAR_HEAD).modules_to_save["default"]
        params[f"base_model.model.{LINEAR_HEAD}.weight"] = head.weight  # as PEFT's state dict calls it
    return Attached(model, params, _peft_fields(lora, base.checkpoint.name), "LoRA parameters", _noise)


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


def peft_defaults(kind: str) -> dict[str, object]:
    """PEFT's defaults of the fields of adapter_config.json; `kind` is "LORA" or "PREFIX_TUNING"."""
    return {"LORA": LoraConfig, "PREFIX_TUNING": PrefixTuningConfig}[kind]().to_dict()


def _noise(theta: Mapping[str, torch.Tensor], seed: int) -> Iterator[torch.Tensor]:
    return (lora_init(seed, name, tuple(tensor.shape)) for name, tensor in theta.items())


def _chosen(base: Base, targets: list[str], layers: list[int], adaptable_head: bool) -> tuple[list[str], list[int]]:
    """Targets and layers as PEFT takes them, checked against the linear modules there are.

    Args:
        base: the model.
        targets: names of modules, or ends of their paths.
        layers: numbers of the layers to adapt, sorted; [] is all.
        adaptable_head: the head is one of the modules.
    """
    for number in layers:
        if not 0 <= number < len(base.layers):
            last = len(base.layers) - 1
            raise UserError(f"--layers-to-transform: layer {number} does not exist; the model has layers 0 to {last}")
    path = {module: name for name, module in base.model.named_modules()}
    linear = [[path[m] for m in layer.modules() if isinstance(m, nn.Linear)] for layer in base.layers]
    head = [path[base.head]] if adaptable_head and isinstance(base.head, nn.Linear) else []
    matches = lambda name, target: name == target or name.endswith(f".{target}")  # noqa: E731
    names = [*(name for layer in linear for name in layer), *head]
    for target in targets:
        if not any(matches(name, target) for name in names):
            known = sorted({name.rsplit(".", 1)[-1] for name in names})
            raise UserError(f"--target-modules: no linear layer named {target}; the model has {', '.join(known)}")
    if not layers or not any(target in head for target in targets):
        return targets, layers
    # PEFT takes no module outside the layers once layers are chosen: name each module instead
    allowed = [*(name for number in layers for name in linear[number]), *head]
    return [name for name in allowed if any(matches(name, target) for target in targets)], []


def _peft_fields(lora: LoraConfig, model: str) -> dict:
    saved = {"modules_to_save": list(lora.modules_to_save)} if lora.modules_to_save else {}
    saved |= {"use_rslora": True} if lora.use_rslora else {}
    return saved | {
        "peft_type": "LORA",
        "task_type": lora.task_type,
        "base_model_name_or_path": model,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "target_modules": sorted(lora.target_modules),
        "layers_to_transform": lora.layers_to_transform,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
