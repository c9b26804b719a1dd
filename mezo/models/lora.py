"""LoRA: which linear layers are adapted, and the adapter as PEFT describes it."""

from peft import LoraConfig, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn

from mezo.config import Lora, Model
from mezo.errors import UserError
from mezo.models.head import LINEAR_HEAD
from mezo.models.load import is_masked
from mezo.models.spec import Attached
from mezo_kernels import canonical_name


def with_lora(model: Model, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Attached:
    lora = _lora_config(model, base, layers, head)
    adapted = get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
    params = {canonical_name(name): p for name, p in adapted.named_parameters() if ".lora_" in name}
    bad = [name for name in params if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if bad:
        raise UserError(f"--target-modules: only linear layers can be adapted, got {bad[0]}")
    if model.tuning.head == "linear":
        head = getattr(base, LINEAR_HEAD).modules_to_save["default"]
        params[f"base_model.model.{LINEAR_HEAD}.weight"] = head.weight  # as PEFT's state dict calls it
    return adapted, params, _peft_fields(lora, model.base)


def _lora_config(model: Model, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> LoraConfig:
    tuning: Lora = model.tuning
    targets = list(tuning.target_modules) or DEFAULT_TARGETS.get(base.config.model_type)
    if not targets:
        raise UserError(f"--target-modules: no default for model type {base.config.model_type}; name the modules")
    chosen, n_layers = sorted(tuning.layers_to_transform), len(layers)
    for index in chosen:
        if not 0 <= index < n_layers:
            raise UserError(
                f"--layers-to-transform: layer {index} does not exist; the model has layers 0 to {n_layers - 1}"
            )
    path = {module: name for name, module in base.named_modules()}
    linear = {i: [path[m] for m in layer.modules() if isinstance(m, nn.Linear)] for i, layer in enumerate(layers)}
    head_name = [path[head]] if isinstance(head, nn.Linear) and tuning.head == "model" else []
    matches = lambda name, target: name == target or name.endswith(f".{target}")  # noqa: E731
    inside = [name for names in linear.values() for name in names]
    for target in targets:
        if not any(matches(name, target) for name in [*inside, *head_name]):
            known = sorted({name.rsplit(".", 1)[-1] for name in [*inside, *head_name]})
            raise UserError(f"--target-modules: no linear layer named {target}; the model has {', '.join(known)}")
    if chosen and any(target in head_name for target in targets):
        # PEFT takes no module outside the layers once layers are chosen: name each module instead
        allowed = [*(name for i in chosen for name in linear[i]), *head_name]
        targets, chosen = [name for name in allowed if any(matches(name, target) for target in targets)], None
    return LoraConfig(
        r=tuning.r,
        lora_alpha=tuning.lora_alpha,
        target_modules=sorted(targets),
        layers_to_transform=chosen or None,
        lora_dropout=0.0,
        bias="none",
        modules_to_save=[LINEAR_HEAD] if tuning.head == "linear" else None,
        task_type=None if tuning.head == "linear" or is_masked(model.base) else "CAUSAL_LM",
        base_model_name_or_path=model.base,
    )


def _peft_fields(lora: LoraConfig, model: str) -> dict:
    saved = {"modules_to_save": list(lora.modules_to_save)} if lora.modules_to_save else {}
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
