"""A base model from transformers with what is trained of it: a PEFT adapter, LoRA or prefix, or its own parameters."""

import hashlib
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
)

from mezo.config import Config
from mezo.errors import UserError
from mezo.runtimes.base import LINEAR_HEAD, TrainedSpec
from mezo.runtimes.prefix import PROMPT, Prefix, attach_prefix
from mezo.runtimes.reuse import KV_FREE
from mezo.runtimes.rows import RowBatch
from mezo.runtimes.trunk import ATTENTION, scored
from mezo_kernels import canonical_name

REFERENCE_ROWS = 8  # of a full forward pass: the logits of every token of them are held at once


@dataclass
class ModelParts:
    """The parts of a model that scoring needs.

    Args:
        model: the PEFT model, or the base where that is trained; in eval mode, no parameter requiring grad.
        body: the transformer without its head.
        layers: its layers.
        head: hidden states -> logits; it may be adapted as well.
        params: trained parameters by canonical name.
        causal: True for a decoder, False for an encoder.
        first: index of the lowest layer that must be run: the lowest trained one, or the last.
        kv_free: no key or value depends on what is trained.
        window: how far back the last layer attends, or None.
        prefix: what every layer's own keys and values follow, or None.
    """

    model: nn.Module
    body: nn.Module
    layers: nn.ModuleList
    head: nn.Module
    params: dict[str, nn.Parameter]
    causal: bool
    first: int
    kv_free: bool
    window: int | None
    prefix: Prefix | None = None


def load_tokenizer(model: str):
    """The tokenizer of a model directory or hub id."""
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: no tokenizer could be loaded ({_first_line(error)})") from error


def is_masked(model: str) -> bool:
    """True if a model fills masks, False if it continues text; read from its config."""
    try:
        architectures = AutoConfig.from_pretrained(model).architectures
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: it could not be loaded ({_first_line(error)})") from error
    return (architectures or [""])[0].endswith("ForMaskedLM")


def load_base(model: str, dtype: torch.dtype | str, bare: bool = False) -> nn.Module:
    """A model with its head, or `bare`, on the CPU in eval mode. Raises UserError if it cannot be loaded."""
    auto = AutoModel if bare else AutoModelForMaskedLM if is_masked(model) else AutoModelForCausalLM
    try:
        return auto.from_pretrained(model, dtype=dtype, attn_implementation=ATTENTION).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"--model {model}: it could not be loaded ({_first_line(error)})") from error


def load_parts(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[ModelParts, TrainedSpec]:
    """Load the base model, attach a fresh adapter unless its own parameters are trained, and describe what is.

    Under `head` "linear" the base is the bare encoder with a linear layer of that name beside its layers.

    Raises:
        UserError: the model cannot be loaded, or has no such layers or modules, or cannot be trained so.
    """
    linear = config.head == "linear"
    causal = not linear and not is_masked(config.model)
    base = load_base(config.model, dtype, bare=linear).to(device)
    if linear:
        _check_encoder(base, config)
        base.pooler = None  # not read, and drawn anew at each load where the checkpoint has none
    weights, body = weights_hash(base), base.base_model
    if linear:
        _add_linear_head(base, len(config.label_words))
    heads = [getattr(base, LINEAR_HEAD)] if linear else [child for child in base.children() if child is not body]
    layers = _layers(body, base.config.num_hidden_layers)
    if len(heads) != 1 or layers is None:
        raise UserError(f"--model {config.model}: {type(base).__name__} is not one body of layers and one head")
    attach = {"lora": _with_lora, "full": _with_own_parameters, "prefix": _with_prefix}[config.tuning]
    model, params, peft = attach(config, base, layers, heads[0])
    model.requires_grad_(False)
    if linear:
        head = getattr(base, LINEAR_HEAD).modules_to_save["default"]
    else:
        head = next(child for child in base.children() if child is not body)  # an adapted one is another module
    trained = set(map(id, params.values()))
    touched = [i for i, layer in enumerate(layers) if not trained.isdisjoint(map(id, layer.parameters()))]
    last = len(layers) - 1
    prefix = Prefix(params[PROMPT], len(layers), peft["num_attention_heads"]) if PROMPT in params else None
    every = peft is None or prefix is not None
    kv_free = not every and set(touched) <= {last} and _adapted_leaves(layers[-1]) <= KV_FREE
    first = 0 if prefix else min(touched, default=last)
    shapes = {name: tuple(p.shape) for name, p in params.items()}
    spec = TrainedSpec(peft, shapes, config.model, weights, str(dtype).split(".")[1])
    window = _window(base.config)
    return ModelParts(model, body, layers, head, params, causal, first, kv_free, window, prefix), spec


Attached = tuple[nn.Module, dict[str, nn.Parameter], dict | None]
"""The model to run, what is trained of it by canonical name, and the fields of adapter_config.json."""


def _with_lora(config: Config, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Attached:
    lora = _lora_config(config, base, layers, head)
    model = get_peft_model(base, lora, autocast_adapter_dtype=False).eval()
    params = {canonical_name(name): p for name, p in model.named_parameters() if ".lora_" in name}
    bad = [name for name in params if not name.endswith(("lora_A.weight", "lora_B.weight"))]
    if bad:
        raise UserError(f"--target-modules: only linear layers can be adapted, got {bad[0]}")
    if config.head == "linear":
        head = getattr(base, LINEAR_HEAD).modules_to_save["default"]
        params[f"base_model.model.{LINEAR_HEAD}.weight"] = head.weight  # as PEFT's state dict calls it
    return model, params, _peft_fields(lora, config.model)


def _with_prefix(config: Config, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Attached:
    tokens, causal = config.num_prefix_tokens, not is_masked(config.model)
    model, weight, fields = attach_prefix(base, base.base_model, len(layers), tokens, config.model, causal)
    return model, {PROMPT: weight}, fields


def _with_own_parameters(config: Config, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> Attached:
    """Every parameter of the base under its own name; a tied one is one parameter, under the first of its names."""
    params = dict(base.named_parameters())
    for name, p in params.items():
        if p.dtype != base.dtype or not p.is_floating_point():
            raise UserError(
                f"--tuning full: {config.model} holds {name} in {p.dtype}, the rest in {base.dtype}; use a model of"
                " one plain dtype, or --dtype float32"
            )
    return base, params, None


def _check_encoder(base: nn.Module, config: Config) -> None:
    if type(base.config) not in MODEL_FOR_MASKED_LM_MAPPING or getattr(base.config, "is_decoder", False):
        raise UserError(
            f"--head linear: {config.model} is a {type(base).__name__}, not an encoder; use one, or --head model"
        )


def _add_linear_head(base: nn.Module, classes: int) -> None:
    """A linear layer without bias, for the mean of an encoder's last hidden states."""
    head = nn.Linear(base.config.hidden_size, classes, bias=False, dtype=base.dtype)
    setattr(base, LINEAR_HEAD, head.to(base.device))


def head_logits(head: nn.Module, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor | None:
    """Logits of some tokens alone, float32 (..., tokens), of a linear head, adapted or not; None of another head.

    In float32 whatever the model's dtype: 16-bit logits near 20 come in steps of an eighth.
    """
    adapted = isinstance(head, LoraLayer)
    base = head.get_base_layer() if adapted else head
    if type(base) is not nn.Linear:
        return None
    hidden, bias = hidden.float(), None if base.bias is None else base.bias[tokens].float()
    logits = nn.functional.linear(hidden, base.weight[tokens].float(), bias)
    if adapted:
        a, b = (weights["default"].weight for weights in (head.lora_A, head.lora_B))
        low = nn.functional.linear(hidden, a.float())
        logits += head.scaling["default"] * nn.functional.linear(low, b[tokens].float())
    return logits


def reference_log_probs(model: nn.Module, batch: RowBatch) -> torch.Tensor:
    """log p of a batch's targets by the model's own forward pass, float64 on the CPU, (rows, scored, candidates)."""
    parts = zip(
        *(t.split(REFERENCE_ROWS) for t in (batch.ids, batch.mask, batch.positions, batch.targets)), strict=True
    )
    found = []
    for ids, mask, positions, targets in parts:
        out = model(input_ids=ids, attention_mask=mask)
        if hasattr(out, "logits"):
            logits = scored(out.logits, positions)
        else:
            logits = getattr(model.get_base_model(), LINEAR_HEAD)(scored(out.last_hidden_state, positions))
        found.append(logits.double().log_softmax(-1).gather(-1, targets).cpu())
    return torch.cat(found)


def position_limit(parts: ModelParts) -> int | None:
    """Tokens that a row may have, None for any number: RoBERTa counts positions from its padding id on."""
    limit = getattr(parts.body.config, "max_position_embeddings", None)
    if limit is None:
        return None
    table = getattr(getattr(parts.body, "embeddings", None), "position_embeddings", None)
    first = 0 if getattr(table, "padding_idx", None) is None else table.padding_idx + 1
    return limit - first - (parts.prefix.tokens if parts.prefix else 0)


def _window(config) -> int | None:
    kinds = getattr(config, "layer_types", None)
    return None if kinds and kinds[-1] == "full_attention" else getattr(config, "sliding_window", None)


def _layers(body: nn.Module, n_layers: int) -> nn.ModuleList | None:
    return next((m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers), None)


def _adapted_leaves(layer: nn.Module) -> set[str]:
    return {
        name.split(".lora_A")[0].rsplit(".", 1)[-1] for name, _ in layer.named_modules() if name.endswith(".lora_A")
    }


def _lora_config(config: Config, base: nn.Module, layers: nn.ModuleList, head: nn.Module) -> LoraConfig:
    targets = list(config.target_modules) or DEFAULT_TARGETS.get(base.config.model_type)
    if not targets:
        raise UserError(f"--target-modules: no default for model type {base.config.model_type}; name the modules")
    chosen, n_layers = sorted(config.layers_to_transform), len(layers)
    for index in chosen:
        if not 0 <= index < n_layers:
            raise UserError(
                f"--layers-to-transform: layer {index} does not exist; the model has layers 0 to {n_layers - 1}"
            )
    path = {module: name for name, module in base.named_modules()}
    linear = {i: [path[m] for m in layer.modules() if isinstance(m, nn.Linear)] for i, layer in enumerate(layers)}
    head_name = [path[head]] if isinstance(head, nn.Linear) and config.head == "model" else []
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
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=sorted(targets),
        layers_to_transform=chosen or None,
        lora_dropout=0.0,
        bias="none",
        modules_to_save=[LINEAR_HEAD] if config.head == "linear" else None,
        task_type=None if config.head == "linear" or is_masked(config.model) else "CAUSAL_LM",
        base_model_name_or_path=config.model,
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


def weights_hash(base: nn.Module) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of the base weights, tied ones once."""
    digest = hashlib.sha256()
    for name, p in base.named_parameters():
        digest.update(f"{name} {p.dtype} {tuple(p.shape)}\n".encode())
        digest.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
