"""Adapters in PEFT's format: written, read and checked."""

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from mezo.atomic import replacing
from mezo.errors import UserError
from mezo.models.load import checkpoint_hash
from mezo.models.lora import peft_defaults
from mezo.models.spec import CORE, ENGINE, LINEAR_HEAD, NONE
from mezo.run.files import RESTORE, read_object, replace_file
from mezo.run.schema import BaseHash, Peft, validated
from mezo.run.trajectory import read_header, read_trajectory
from mezo_kernels import canonical_name

WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
THETA = "mezo_theta.safetensors"
"""What was trained, beside an adapter that it does not show in (--tuning lora-xs)."""
BASE = "mezo_base.json"
"""What base an adapter was trained on: `TrainedSpec.base`, as in the header of its log; and `weights`, the
SHA-256 of its own weights, and `theta`, of what was trained where that is a file of its own; two of each where a
process died between writing these files."""
HASHED = {WEIGHTS: "weights", THETA: "theta"}
"""By file, the field of mezo_base.json that says what it held."""

CLASSIFIER = "SEQ_CLS"
"""PEFT's name for a model with a head for classes, which is saved beside the adapter."""
HARMLESS = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "base_model_name_or_path",
    "inference_mode",
    "peft_version",
    "modules_to_save",
)
LORA = (
    "r lora_alpha target_modules layers_to_transform lora_dropout use_rslora fan_in_fan_out megatron_core"
    " rank_pattern alpha_pattern"
).split()
PREFIX = "num_virtual_tokens num_layers num_attention_heads token_dim encoder_hidden_size num_transformer_submodules"
KNOWN = {"LORA": (*HARMLESS, *LORA), "PREFIX_TUNING": (*HARMLESS, *PREFIX.split(), "prefix_projection")}
"""Fields of adapter_config.json that are read here, or change nothing of an adapter's function."""


def save_adapter(
    directory: Path,
    peft: dict,
    theta: dict[str, torch.Tensor],
    base: dict | None = None,
    frozen: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write theta as a PEFT adapter: adapter_config.json and fp32 adapter_model.safetensors, and what base it is for.

    Args:
        directory: created if needed; files are replaced one by one, each atomically.
        peft: fields of adapter_config.json.
        theta: float32 tensors by canonical name.
        base: `TrainedSpec.base` of it, where that is known.
        frozen: see `as_lora`.
    """
    directory.mkdir(parents=True, exist_ok=True)
    files = {WEIGHTS: as_lora(theta, frozen or {})}
    if any(name.endswith(CORE) for name in theta):
        files[THETA] = theta
    before = {HASHED[name]: [_sha256(directory / name)] for name in files if base and (directory / name).exists()}
    replace_file(directory / PEFT_CONFIG, json.dumps(peft, indent=2).encode())
    with ExitStack() as stack:
        hashes = {}
        for name, tensors in files.items():
            part = stack.enter_context(replacing(directory / name))
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, part, metadata={"format": "pt"})
            hashes[HASHED[name]] = [_sha256(part)]
        if base:
            said = base_in(base)
            both = {field: [*now, *before.get(field, [])] for field, now in hashes.items()}
            replace_file(directory / BASE, json.dumps(said | both).encode())
    if before:
        replace_file(directory / BASE, json.dumps(said | hashes).encode())


def as_lora(theta: dict[str, torch.Tensor], frozen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The LoRA adapter that theta makes with what stays as it is: lora_B is B R where R is trained.

    The sums go in order, one rounding each, in float64, so that the float32 outcome is the same bits on every machine.

    Args:
        theta: float32 by canonical name.
        frozen: the other tensors of the adapter; {} where theta is all of it.

    >>> theta, frozen = {"q.lora_R.weight": torch.eye(2)}, {"q.lora_B.weight": torch.ones(3, 2)}
    >>> as_lora(theta, frozen)["q.lora_B.weight"].shape
    torch.Size([3, 2])
    """
    tensors = dict(frozen)
    for name, tensor in theta.items():
        if name.endswith(CORE):
            name = f"{name.removesuffix(CORE)}lora_B.weight"
            b, tensor = frozen[name].double(), tensor.double()
            total = torch.zeros_like(b)
            for k in range(len(tensor)):
                total += b[:, k, None] * tensor[k]
            tensor = total.float()
        tensors[name] = tensor
    return tensors


def read_adapter(directory: Path, file: str = WEIGHTS) -> dict[str, torch.Tensor]:
    """Tensors of an adapter directory or file as float32, by canonical name."""
    path = directory / file if directory.is_dir() else directory
    check_weights(path)
    try:
        return {canonical_name(name): tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {directory}: {file} cannot be read there ({error})") from error


def read_theta(directory: Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """What was trained of an adapter that a run left, float32 by canonical name, checked against the shapes.

    Raises:
        UserError: it is not there, or of other shapes.
    """
    trained = {n: t for n, t in read_adapter(directory).items() if n in shapes}
    if any(name.endswith(CORE) for name in shapes):
        trained |= read_adapter(directory, THETA)
    return _fitting(trained, directory, shapes)


def check_weights(path: Path) -> None:
    """Raise UserError if weights are not those that were written, where the file beside them says which."""
    if path.name not in HASHED or not (path.parent / BASE).exists() or not path.is_file():
        return
    known = validated(BaseHash, read_object(path.parent / BASE), str(path.parent / BASE)).get(HASHED[path.name])
    if known and _sha256(path) not in known:
        raise UserError(
            f"{path} is not what was written (SHA-256): {RESTORE}, or rebuild it from its run's log by mezo replay"
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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


def base_of(adapter: Path) -> dict | None:
    """`TrainedSpec.base` of an adapter, by itself or by the run it lies in; None where nothing says it."""
    if (adapter / BASE).exists():
        return validated(BaseHash, read_object(adapter / BASE), str(adapter / BASE))
    log = adapter.absolute().parent / "trajectory.jsonl"
    if adapter.name != "adapter" or not log.is_file():
        return None
    return base_in(read_header(log))


def quantised_here(base: dict) -> str:
    """What a `TrainedSpec.base` was quantised to as transformers loaded it: what an engine does is not in its hash."""
    name = base.get("quantization", NONE)
    return NONE if name.startswith(ENGINE) else name


def base_in(first_line: dict) -> dict:
    """`TrainedSpec.base` of a header, or of a file with more beside it."""
    return {key: first_line[key] for key in ("model_hash", "dtype", "quantization", "code_hash") if key in first_line}


def check_base(
    adapter: Path, model: str, head: str = "model", loaded: dict | None = None, trusted: bool = False
) -> None:
    """Raise UserError if an adapter was trained on other weights than those of a model; one made elsewhere passes.

    Args:
        adapter: its directory.
        model: path or hub id of the base at hand.
        head: which it has, as `--head` names it.
        loaded: `TrainedSpec.base` of the model as it is loaded, if it is.
        trusted: code that it brings is run.
    """
    known = base_of(adapter)
    if known is None:
        return
    packed = quantised_here(known)
    if loaded is None or (loaded["dtype"], quantised_here(loaded)) != (known["dtype"], packed):
        sha256 = checkpoint_hash(model, known["dtype"], head, packed, trusted)
    else:
        sha256 = loaded["model_hash"]
    if sha256 != known["model_hash"]:
        raise UserError(
            f"--model {model}: other weights than {adapter} was trained on (SHA-256 in {known['dtype']}): give those;"
            f" to use the adapter here all the same, copy its {WEIGHTS} and {PEFT_CONFIG} alone to a directory"
        )


def check_trainable(peft: dict, directory: str) -> None:
    """Raise UserError by name for what makes an adapter another function than a prefix or plain LoRA is.

    A field is known here, or at PEFT's default, or off: newer versions of PEFT write fields that this one has not.
    """
    kind = peft.get("peft_type")
    if kind not in KNOWN:
        raise UserError(f"adapter {directory}: peft_type must be LORA or PREFIX_TUNING, got {kind}")
    defaults = peft_defaults(kind)
    for key, value in peft.items():
        gaussian = (key, value) == ("init_lora_weights", "gaussian")  # a start of lora_A, which the weights replace
        if key not in KNOWN[kind] and value and value != defaults.get(key) and not gaussian:
            raise UserError(
                f"adapter {directory}: {key} is {value!r:.60}, only plain LoRA or a prefix can be used here"
            )
    saved = peft.get("modules_to_save") or []
    if saved not in ([], [LINEAR_HEAD]) and peft.get("task_type") != CLASSIFIER:
        raise UserError(f"adapter {directory}: modules_to_save is {saved}, only plain LoRA can be trained on")
    if not float(peft.get("lora_alpha") or 1).is_integer():
        raise UserError(f"adapter {directory}: lora_alpha must be a whole number, got {peft['lora_alpha']}")


def _targets(peft: dict, directory: Path) -> tuple[str, ...]:
    """Names of the adapted modules; a pattern of PEFT's is written out by the modules that have weights."""
    targets = peft["target_modules"]
    if isinstance(targets, list):
        return tuple(targets)
    names = (name.removeprefix("base_model.model.") for name in shapes_in(directory / WEIGHTS))
    return tuple(name.removesuffix(".lora_A.weight") for name in names if name.endswith(".lora_A.weight"))


def load_adapter(directory: str | Path, shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Read an adapter as float32 tensors by canonical name, checked against the shapes to be trained."""
    return _fitting(read_adapter(Path(directory)), directory, shapes)


def _fitting(
    theta: dict[str, torch.Tensor], directory: str | Path, shapes: dict[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """Tensors in the order of the shapes. Raises UserError if they are others."""
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
    layers = peft.get("layers_to_transform") if isinstance(peft["target_modules"], list) else None
    return {
        "model": model,
        "tuning": "lora",
        "r": peft["r"],
        "lora_alpha": int(peft["lora_alpha"]),
        "use_rslora": bool(peft.get("use_rslora")),
        "target_modules": _targets(peft, Path(directory)),
        "layers_to_transform": tuple([layers] if isinstance(layers, int) else layers or ()),
        "head": head_of(peft),
        **{name: _as_options(peft.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")},
    }


def _as_options(pattern: dict[str, float]) -> tuple[str, ...]:
    """A pattern of PEFT's as --rank-pattern and --alpha-pattern take it."""
    return tuple(f"{name}={number}" for name, number in pattern.items())


def head_of(peft: dict) -> str:
    """What scores the options of an adapter, as `--head` names it."""
    if peft.get("task_type") == CLASSIFIER:
        return "classification"
    return "linear" if peft.get("modules_to_save") else "model"


def with_base(values: dict) -> dict:
    """Flat options with the model that their --adapter names, where they name none."""
    if not values.get("adapter") or "model" in values:
        return values
    return {**values, "model": adapter_options(values["adapter"])["model"]}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str | None:
    """None if two sets of float32 tensors agree in every bit, else the first name that differs."""
    different = (n for n in a if n not in b or not torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)))
    return next(different, None)
