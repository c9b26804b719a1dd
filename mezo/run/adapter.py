"""Adapters in PEFT's format: written, read and checked."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mezo.atomic import replacing
from mezo.errors import UserError
from mezo.models.spec import LINEAR_HEAD
from mezo.run.files import RESTORE, read_object, replace_file
from mezo.run.schema import Peft, validated
from mezo.run.trajectory import read_trajectory
from mezo_kernels import canonical_name

WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(directory: Path, peft: dict, theta: dict[str, torch.Tensor]) -> None:
    """Write theta as a PEFT adapter: adapter_config.json and fp32 adapter_model.safetensors.

    Args:
        directory: created if needed; files are replaced one by one, each atomically.
        peft: fields of adapter_config.json.
        theta: float32 tensors by canonical name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / PEFT_CONFIG, json.dumps(peft, indent=2).encode())
    with replacing(directory / WEIGHTS) as part:
        save_file({name: tensor.contiguous() for name, tensor in theta.items()}, part, metadata={"format": "pt"})


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of an adapter directory or file as float32, by canonical name."""
    path = directory / WEIGHTS if directory.is_dir() else directory
    try:
        return {canonical_name(name): tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {directory}: {WEIGHTS} cannot be read there ({error})") from error


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a file of weights by canonical name; what they hold is not read."""
    try:
        with safe_open(path, "pt") as file:
            return {canonical_name(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); {RESTORE}") from error


def is_prefix(peft: dict) -> bool:
    """Whether an adapter is keys and values of a prefix."""
    return peft.get("peft_type") == "PREFIX_TUNING"


def check_trainable(peft: dict, directory: str) -> None:
    """Raise UserError if an adapter is neither a prefix nor LoRA on linear layers of one rank and no more."""
    if is_prefix(peft):
        return  # PEFT saves what the network of a projection gives, not the network
    if peft.get("peft_type") != "LORA":
        raise UserError(f"adapter {directory}: peft_type must be LORA or PREFIX_TUNING, got {peft.get('peft_type')}")
    for key in (
        "use_dora",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "trainable_token_indices",
    ):
        if peft.get(key):
            raise UserError(f"adapter {directory}: {key} is {peft[key]}, only plain LoRA can be trained on")
    saved = peft.get("modules_to_save") or []
    if saved not in ([], [LINEAR_HEAD]):
        raise UserError(f"adapter {directory}: modules_to_save is {saved}, only plain LoRA can be trained on")
    if peft.get("bias", "none") != "none" or not isinstance(peft["target_modules"], list):
        raise UserError(f"adapter {directory}: expected bias none and a list of target_modules")


def load_adapter(directory: str | Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Read an adapter as float32 tensors by canonical name, checked against the shapes to be trained."""
    theta = read_adapter(Path(directory))
    if set(theta) != set(shapes):
        odd = sorted(set(theta) ^ set(shapes))[0]
        raise UserError(
            f"adapter {directory} has other parameters than this run trains (first difference: {odd});"
            " give the --tuning, --r, --target-modules and --layers-to-transform it was trained with"
        )
    for name, shape in shapes.items():
        if tuple(theta[name].shape) != tuple(shape):
            raise UserError(
                f"adapter {directory}: {name} has shape {tuple(theta[name].shape)}, expected {tuple(shape)}"
            )
    return {name: theta[name] for name in shapes}


def read_peft_config(directory: str | Path) -> dict:
    """adapter_config.json of an adapter directory."""
    path = Path(directory) / PEFT_CONFIG
    if not path.is_file():
        raise UserError(f"{directory} is neither a run nor an adapter: no readable {PEFT_CONFIG} there")
    return validated(Peft, read_object(path), str(path))


def adapter_options(directory: str | Path) -> dict:
    """The options of `mezo train` that adapter_config.json fixes. Raises UserError if it is no adapter to train on."""
    if (Path(directory) / "trajectory.jsonl").is_file():
        if read_trajectory(Path(directory) / "trajectory.jsonl")[0]["peft"] is None:
            raise UserError(f"--adapter {directory} trained a whole model: give --model {Path(directory) / 'model'}")
        raise UserError(f"--adapter {directory} is a run directory: give {Path(directory) / 'adapter'}")
    peft = read_peft_config(directory)
    check_trainable(peft, str(directory))
    model = peft.get("base_model_name_or_path") or ""
    if is_prefix(peft):
        return {"model": model, "tuning": "prefix", "num_prefix_tokens": peft["num_virtual_tokens"]}
    layers = peft.get("layers_to_transform")
    return {
        "model": model,
        "tuning": "lora",
        "r": peft["r"],
        "lora_alpha": peft["lora_alpha"],
        "target_modules": tuple(peft["target_modules"]),
        "layers_to_transform": tuple([layers] if isinstance(layers, int) else layers or ()),
        "head": "linear" if peft.get("modules_to_save") else "model",
    }


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str | None:
    """None if two sets of float32 tensors agree in every bit, else the first name that differs."""
    different = (n for n in a if n not in b or not torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)))
    return next(different, None)
