"""Run directories: one process at a time, adapters in PEFT format, theta rebuilt from the log alone."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load, load_file, save, save_file

from mezo.config import Config
from mezo.errors import UserError
from mezo.rewards import reward_hash
from mezo.runtimes.base import LINEAR_HEAD, Example, Runtime, TrainedSpec, update_of
from mezo.runtimes.rule import UpdateRule
from mezo.runtimes.theta import PerturbedTheta
from mezo.trajectory import StepRecord, drop_torn_line, header, read_lines, read_trajectory
from mezo_kernels import ParamLayout, canonical_name, lora_init

WEIGHTS, PEFT_CONFIG, INITIAL = "adapter_model.safetensors", "adapter_config.json", "initial_adapter.safetensors"
RECORDS_PER_PASS = 256


class RunDirectory:
    """Paths of a run, and the OS lock that keeps a second process out; the lock dies with its process.

    Use `create` for a new run and `open` for one to resume.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config, self.trajectory = path / "config.json", path / "trajectory.jsonl"
        self.metrics, self.result = path / "metrics.jsonl", path / "result.json"
        self.adapter, self.model = path / "adapter", path / "model"
        self.plots, self.tensorboard = path / "plots", path / "tensorboard"
        self.launch = path / ".launch"
        self._lock = None

    @classmethod
    def create(cls, path: str, config: Config, first_line: dict, initial: Path | bytes | None = None) -> "RunDirectory":
        """Make the directory with its config, log header and `starting_file`, whole or not at all, and lock it.

        Raises:
            UserError: it exists, or cannot be made.
        """
        refuse_existing(path)
        part = cls(Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part"))
        try:
            part.path.mkdir(parents=True)
            part._acquire()
            if initial is not None:
                replace_file(part.path / INITIAL, _content(initial))
            replace_file(part.launch, launch_id().encode())
            replace_file(part.config, config.to_json().encode())
            replace_file(part.trajectory, (json.dumps(first_line) + "\n").encode())
            part.metrics.touch()
            part.path.rename(path)
        except OSError as error:
            shutil.rmtree(part.path, ignore_errors=True)
            raise UserError(f"--output-dir {path} cannot be created: {error.strerror}; choose another") from error
        run = cls(Path(path))
        run._lock = part._lock
        return run

    @classmethod
    def open(cls, path: str) -> "RunDirectory":
        """Lock an existing run. Raises UserError if it is none, or in use."""
        run = cls(Path(path))
        if not run.config.is_file() or not run.trajectory.is_file():
            raise UserError(f"--resume {path}: not a run directory (no config.json or no trajectory.jsonl there)")
        run._acquire()
        run.metrics.touch()
        drop_torn_line(run.trajectory)
        drop_torn_line(run.metrics)
        return run

    def read_config(self) -> Config:
        """The configuration the run was started with."""
        try:
            return Config.from_dict(json.loads(self.config.read_text()))
        except (OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a run directory with a readable config.json ({error})") from error

    def read_metrics(self) -> list[dict]:
        """Evaluations so far, oldest first."""
        return [row for _, row in read_lines(self.metrics)] if self.metrics.is_file() else []

    def write_metrics(self, rows: list[dict]) -> None:
        """Replace the evaluations."""
        replace_file(self.metrics, "".join(json.dumps(row) + "\n" for row in rows).encode())

    def read_result(self) -> dict:
        """result.json of a finished run."""
        return json.loads(self.result.read_text())

    def _acquire(self) -> None:
        self._lock = open(self.path / ".lock", "w")  # noqa: SIM115  held until the process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{self.path}: another process is training in this run directory; wait or stop it"
            ) from error

    def release(self) -> None:
        """Let another process in."""
        self._lock.close()


def launch_id() -> str:
    """Names the torchrun launch this process belongs to, across its restarts; empty where nothing does."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    return "" if name == "none" else name  # torchrun's --rdzv-id where it draws none


def refuse_existing(path: str) -> None:
    """Raise UserError if a run directory (or anything else) is there already."""
    if Path(path).exists():
        raise UserError(f"--output-dir {path} exists and is never overwritten: choose another, or use --resume {path}")


def best_step(metrics: list[dict]) -> int | None:
    """Updates applied at the best dev evaluation (the earliest of equals), or None without a dev set."""
    best = [row["step"] for row in metrics if row.get("is_best")]
    return best[-1] if best else None


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def save_adapter(directory: Path, peft: dict, theta: dict[str, torch.Tensor]) -> None:
    """Write theta as a PEFT adapter: adapter_config.json and fp32 adapter_model.safetensors.

    Args:
        directory: created if needed; files are replaced one by one, each atomically.
        peft: fields of adapter_config.json.
        theta: float32 tensors by canonical name.
    """
    directory.mkdir(parents=True, exist_ok=True)
    replace_file(directory / PEFT_CONFIG, json.dumps(peft, indent=2).encode())
    part = directory / (WEIGHTS + ".part")
    save_file({name: tensor.contiguous() for name, tensor in theta.items()}, part, metadata={"format": "pt"})
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, directory / WEIGHTS)


def read_adapter(directory: Path) -> dict[str, torch.Tensor]:
    """Tensors of an adapter directory or file as float32, by canonical name."""
    path = directory / WEIGHTS if directory.is_dir() else directory
    try:
        return {canonical_name(name): tensor.float() for name, tensor in load_file(path).items()}
    except (OSError, SafetensorError) as error:
        raise UserError(f"adapter {directory}: {WEIGHTS} cannot be read there ({error})") from error


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
    try:
        return json.loads((Path(directory) / PEFT_CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{directory} is neither a run nor an adapter: no readable {PEFT_CONFIG} there") from error


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


def data_hash(splits: dict[str, Sequence[Example]]) -> str:
    """SHA-256 of the tokenised examples of all splits, and of the answers and fields that text is judged by."""
    digest = hashlib.sha256()
    for split, examples in splits.items():
        digest.update(split.encode())
        for e in examples:
            pooled = ["pooled"] if e.pooled else []  # logs from before there was such a head keep their hashes
            digest.update(json.dumps([e.prompt, e.options, e.label, e.mask, *pooled]).encode())
            judged = [e.references, e.names, e.fields]
            if any(judged):
                digest.update(json.dumps(judged, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def starting_file(config: Config, runtime: Runtime) -> Path | bytes | None:
    """The file of the adapter that a new run starts from, or what is to be in it; None if there is none.

    It is that of --adapter, or holds a prefix of real tokens.
    """
    if config.adapter:
        return Path(config.adapter) / WEIGHTS
    return save(runtime.initial_theta(config.seed)) if config.tuning == "prefix" else None


def _content(initial: Path | bytes) -> bytes:
    return initial if isinstance(initial, bytes) else initial.read_bytes()


def make_header(
    config: Config, spec: TrainedSpec, splits: dict[str, Sequence[Example]], initial: Path | bytes | None = None
) -> dict:
    """Header of a new run's log; `initial` is its `starting_file`."""
    init = {"kind": "stream" if spec.peft else "base"}
    if initial is not None:
        init = {"kind": "file", "file": INITIAL, "sha256": hashlib.sha256(_content(initial)).hexdigest()}
    extra = {"reward_hash": reward_hash(config.reward)} if config.reward else {}
    rule = UpdateRule.of(config, spec.shapes).header()
    extra |= {"rule": rule} if rule else {}
    return header(config.seed, data_hash(splits), init, {**extra, **asdict(spec)})


def initial_theta(first_line: dict, initial: Path | bytes | None = None) -> dict[str, torch.Tensor]:
    """theta_0 of a run, on the CPU.

    lora_A from the z stream and lora_B zero; or the adapter of `initial`, a file or its content; or, where the base
    itself is trained, its own parameters in its dtype, loaded from where the run found them. The first two are float32.
    """
    shapes, kind = {name: tuple(shape) for name, shape in first_line["shapes"].items()}, first_line["init"]["kind"]
    if kind == "base":
        from mezo.runtimes.full_model import read_parameters

        return read_parameters(first_line["model"], first_line["dtype"], first_line["model_hash"])
    if kind == "file":
        if isinstance(initial, bytes):
            return load(initial)
        if not initial.is_file() or hashlib.sha256(initial.read_bytes()).hexdigest() != first_line["init"]["sha256"]:
            raise UserError(f"{initial}: the adapter this run started from is missing or differs (SHA-256); restore it")
        return load_adapter(initial, shapes)
    if kind != "stream":
        raise UserError(f"the log starts from {kind!r}, which this program does not know; use the one that wrote it")
    seed = first_line["run_seed"]
    return {n: lora_init(seed, n, s) if n.endswith("lora_A.weight") else torch.zeros(s) for n, s in shapes.items()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> str | None:
    """None if two sets of float32 tensors agree in every bit, else the first name that differs."""
    different = (n for n in a if n not in b or not torch.equal(a[n].view(torch.int32), b[n].view(torch.int32)))
    return next(different, None)


def replay_records(step: Callable, records: Sequence[StepRecord]) -> None:
    """Apply records to the initial theta, many to a pass; the same bits as step after step, and the rule's state.

    Args:
        step: `Runtime.step` or `PerturbedTheta.step`, of a new run's theta.
    """
    starts = range(0, len(records), RECORDS_PER_PASS)
    for start in track(starts, "replay", transient=True, disable=len(starts) < 4 or not sys.stderr.isatty()):
        step([update_of(record) for record in records[start : start + RECORDS_PER_PASS]], [], 1.0)


def replay(
    path: str | Path, until: str = "best", backend: str | None = None, model: str = ""
) -> tuple[dict, dict, int]:
    """Rebuild theta of a run from its log.

    Args:
        path: run directory; only its logs are read, and the adapter or model that it started from, if there was one.
        until: "best" (what the run kept), "last", or a number of steps.
        backend: of the fused ops.
        model: where the base of a run that trained all of it is now; empty is where the log says.
    Returns:
        (theta, header, steps applied); the header with `model`, if given.
    """
    directory = Path(path)
    first_line, records = read_trajectory(directory / "trajectory.jsonl")
    if model and first_line["peft"] is not None:
        raise UserError(f"--model {model}: {path} trained an adapter, which the log rebuilds alone: leave it out")
    first_line |= {"model": model} if model else {}
    run = RunDirectory(directory)
    if until == "best" and not run.metrics.is_file():
        raise UserError(f"{run.metrics} is missing, which says which step was best; give --until last or a number")
    best = best_step(run.read_metrics()) if until == "best" else None
    if until not in ("best", "last") and not (until.isdecimal() and int(until) <= len(records)):
        raise UserError(f"--until must be best, last or a number of steps from 0 to {len(records)}, got {until}")
    steps = len(records) if until == "last" else best if until == "best" else int(until)
    steps = len(records) if steps is None else steps
    theta = {name: tensor.float() for name, tensor in initial_theta(first_line, directory / INITIAL).items()}
    rebuilt = PerturbedTheta(ParamLayout(theta), [], backend, UpdateRule.of_header(first_line))
    replay_records(rebuilt.step, records[:steps])
    return theta, first_line, steps
