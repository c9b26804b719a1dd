"""The first line of a run's log: what theta_0 is, and what the run must find again to resume."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load, save

from mezo.config import Config
from mezo.data.example import Example
from mezo.data.large import LargeExamples
from mezo.data.rewards import reward_hash
from mezo.errors import UserError
from mezo.models.spec import TrainedSpec
from mezo.run.adapter import WEIGHTS, check_base, load_adapter
from mezo.run.trajectory import FORMAT, VERSIONS
from mezo.runtimes.base import InitialTheta, Runtime, require
from mezo_kernels import Z_STREAM_VERSION, lora_init

INITIAL = "initial_adapter.safetensors"


BY_ROWS = "rows:"
"""Begins the hash of data with a split that is too large to be tokenised ahead."""


def data_hash(splits: dict[str, Sequence[Example]], whole: bool = False) -> str:
    """SHA-256 of the tokenised examples of all splits, and of the answers and fields that text is judged by.

    Args:
        splits: examples by split. Of a large one the content of its columns is hashed, and what decides its tokens.
        whole: tokenise a large split all the same, as programs did that knew no other.
    """
    digest, prefix = hashlib.sha256(), ""
    for split, examples in splits.items():
        digest.update(split.encode())
        if isinstance(examples, LargeExamples) and not whole:
            prefix = BY_ROWS
            digest.update(examples.identity.encode())
            continue
        for e in examples:
            pooled = ["pooled"] if e.pooled else []  # logs from before there was such a head keep their hashes
            digest.update(json.dumps([e.prompt, e.options, e.label, e.mask, *pooled]).encode())
            judged = [e.references, e.names, e.fields]
            if any(judged):
                digest.update(json.dumps(judged, sort_keys=True, default=str).encode())
    return prefix + digest.hexdigest()


def starting_file(config: Config, runtime: Runtime) -> Path | bytes | None:
    """The file of the adapter that a new run starts from, or what is to be in it; None if there is none.

    It is that of --adapter, or holds what the model at hand decides: a prefix of real tokens, factors that stay, a
    classification head.
    """
    tuning = config.model.tuning
    if tuning.adapter:
        trusted = config.model.trust_remote_code
        check_base(Path(tuning.adapter), config.model.base, tuning.head, runtime.spec.base, trusted)
        return Path(tuning.adapter) / WEIGHTS
    if not tuning.from_model and tuning.head != "classification":
        return None
    return save(require(runtime, InitialTheta, f"--tuning {tuning.name}").initial_theta(config.method.seed))


def content_of(initial: Path | bytes) -> bytes:
    """What is in a starting file, given as its path or as its content."""
    return initial if isinstance(initial, bytes) else initial.read_bytes()


def make_header(
    config: Config,
    spec: TrainedSpec,
    splits: dict[str, Sequence[Example]],
    initial: Path | bytes | None = None,
    linear: str = "torch",
    logged: dict | None = None,
) -> dict:
    """Header of a new run's log.

    Args:
        config: the run's.
        spec: what is trained.
        splits: tokenised examples by split, as `load_splits` gives them: it says which rows were skipped.
        initial: the run's `starting_file`.
        linear: what multiplies by the frozen weights, `--linear`: a resumed run keeps it, since rounding depends on it.
        logged: header of the run that is resumed, whose data was hashed as its program did.
    """
    whole = logged is not None and not logged["data_hash"].startswith(BY_ROWS)
    init = {"kind": "stream" if spec.peft else "base"}
    if initial is not None:
        init = {"kind": "file", "file": INITIAL, "sha256": hashlib.sha256(content_of(initial)).hexdigest()}
    skipped = getattr(splits, "skipped", {})
    extra = {"skipped_rows": dict(skipped)} if skipped else {}
    extra |= {"reward_hash": reward_hash(config.method.reward)} if config.method.reward else {}
    rule = config.method.logged_rule.header()
    extra |= {"rule": rule} if rule else {}
    extra |= {"linear": linear} if linear != "torch" else {}
    return header(config.method.seed, data_hash(splits, whole), init, {**extra, **spec.logged()})


def initial_theta(first_line: dict, initial: Path | bytes | None = None) -> dict[str, torch.Tensor]:
    """theta_0 of a run, on the CPU.

    lora_A from the z stream and lora_B zero; or the adapter of `initial`, a file or its content; or, where the base
    itself is trained, its own parameters in its dtype, loaded from where the run found them. The first two are float32.
    What stays as it is in an adapter of which a part is trained is there too; see `frozen_part`.
    """
    shapes, kind = shapes_of(first_line, "shapes") | shapes_of(first_line, "frozen"), first_line["init"]["kind"]
    if kind == "base":
        from mezo.models.full import read_parameters

        return read_parameters(first_line["model"], first_line["dtype"], first_line["model_hash"])
    if kind == "file":
        if isinstance(initial, bytes):
            return load(initial)
        if not initial.is_file() or hashlib.sha256(initial.read_bytes()).hexdigest() != first_line["init"]["sha256"]:
            raise UserError(f"{initial}: the adapter this run started from is missing or differs (SHA-256); restore it")
        return load_adapter(initial, shapes)
    if kind != "stream":
        raise UserError(f"the log starts from {kind!r}, which this program does not know; use the one that wrote it")
    _refuse_too_large(shapes)
    seed = first_line["run_seed"]
    return {n: lora_init(seed, n, s) if n.endswith("lora_A.weight") else torch.zeros(s) for n, s in shapes.items()}


def shapes_of(first_line: dict, key: str) -> dict[str, tuple[int, ...]]:
    """Shapes by canonical name that a header has, of what is trained ("shapes") or "frozen"."""
    return {name: tuple(shape) for name, shape in first_line.get(key, {}).items()}


def frozen_part(first_line: dict, initial: Path) -> dict[str, torch.Tensor]:
    """What stays as it is of a run's adapter, float32 by canonical name; {} where all of it is trained.

    Args:
        first_line: header of its log.
        initial: the file that the run started from.
    """
    names = first_line.get("frozen", {})
    start = initial_theta(first_line, initial) if names else {}
    return {name: start[name] for name in names}


def _refuse_too_large(shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise UserError for a theta that this machine has no memory for, before any of it is allocated."""
    size = 4 * sum(map(math.prod, shapes.values()))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory:
        raise UserError(f"the log is of {size:,} bytes of parameters, this machine has {memory:,}: use a larger one")


def lengthened(first_line: dict, done: int, before: int, steps: int) -> dict:
    """The header of a run that is given more steps: `lengthened` lists each time, and what was planned before it.

    Args:
        first_line: header of its log.
        done: steps in the log.
        before: steps that were planned.
        steps: that are planned now.

    >>> lengthened({"version": 1}, 40, 40, 60)
    {'version': 1, 'lengthened': [{'at': 40, 'from': 40, 'to': 60}]}
    """
    chain = [each for each in first_line.get("lengthened", []) if each["to"] <= before]  # else it was cut short
    return {**first_line, "lengthened": [*chain, {"at": done, "from": before, "to": steps}]}


def planned_steps(first_line: dict, step: int, steps: int) -> int:
    """How long the run was to be when it did a step: what its learning rate follows.

    Args:
        first_line: header of its log.
        step: number of the step.
        steps: that are planned now.
    """
    return next((each["from"] for each in first_line.get("lengthened", []) if step < each["at"]), steps)


def shortened(first_line: dict, done: int) -> dict:
    """The header of a run that is cut back to fewer steps: what it does again, it does as it is planned now.

    Args:
        first_line: header of its log.
        done: steps that are left.
    """
    if "lengthened" not in first_line:
        return first_line
    chain = [{**each, "at": min(each["at"], done)} for each in first_line["lengthened"]]
    return {**first_line, "lengthened": chain}


def header(run_seed: int, data_hash: str, init: dict, spec: dict) -> dict:
    """First line of a log: with the records it is all that replay needs.

    Args:
        run_seed: seed of the run.
        data_hash: SHA-256 of the tokenised examples, so that a run is not resumed on others.
        init: {"kind": "stream"}: lora_A from the z stream, lora_B zero; {"kind": "file", "file", "sha256"};
            or {"kind": "base"}: the parameters of `model`, whose hash is `model_hash`.
        spec: fields of `TrainedSpec`; before them `reward_hash`, SHA-256 of the file of --reward, if there is one,
            `rule`, the update rule and what z is, if it is not plain SGD along normal z, and `linear`, if the frozen
            weights were packed.
    """
    version = VERSIONS["rule" in spec or "frozen" in spec or init["kind"] == "base"]
    fixed = {"format": FORMAT, "version": version, "z_stream": Z_STREAM_VERSION}
    return {**fixed, "run_seed": run_seed, "data_hash": data_hash, "init": init, **spec}
