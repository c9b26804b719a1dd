"""The log of a trainer: seeds and scalars of every step, in the format of `mezo train`.

A checkpoint holds the log up to its step in place of the optimizer's tensors. The float32 master is the weights beside
it, where these are float32; else it, and the moments of a rule that has some, are the log applied to what the run began
with.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from mezo.atomic import replacing
from mezo.errors import UserError
from mezo.method.estimator import Losses
from mezo.method.rules.logged import LoggedRule
from mezo.method.step import Update
from mezo.models.load import weights_hash
from mezo.models.spec import TrainedSpec
from mezo.optim import MeZO
from mezo.optim.options import rule_of
from mezo.progress import say
from mezo.run.agreement import check_lines
from mezo.run.directory import RunDirectory
from mezo.run.header import INITIAL, header, initial_theta
from mezo.run.trajectory import StepRecord, TrajectoryWriter, read_trajectory

FOLDER = "mezo-log"
"""Folder of the log, in the trainer's output directory and in each checkpoint: `mezo replay` takes it for a run."""
DTYPES = ("float32", "bfloat16", "float16")


class Logged(MeZO):
    """`MeZO` in a loop that calls `step()` after the loss: the step was made where the loss was measured.

    With a `log` each step is a line of it, and a saved state holds no tensors: they follow from the log.
    """

    log: TrajectoryWriter | None = None
    logs = False
    """Whether the log, which one process writes, knows all steps so far."""

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """A step of `MeZO`; nothing without a closure."""
        if closure is None:
            return None
        if self.logs and self.steps and self._changed_by_others():
            self.leave_log("parameters were changed between steps")
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: there are no gradients."""

    def state_dict(self) -> dict:
        """Options and counts, and where no log is kept the tensors too."""
        state = super().state_dict()
        return {**state, "state": {}} if self.logs else state

    def leave_log(self, why: str) -> None:
        """Go on without a log: from here on a saved state holds its tensors."""
        say(f"the log of seeds ends at step {self.steps}: {why}; checkpoints hold the optimizer's tensors from here on")
        self.close_log()

    def close_log(self) -> None:
        """Bring the log to the disk; what comes after it is not in it."""
        if self.log:
            self.log.close()
        self.log, self.logs = None, False

    def _changed_by_others(self) -> bool:
        if self._seen == self._storage():
            return False
        return any(not torch.equal(self.state[p]["master"].to(p.dtype), p) for _, _, p in self._trainable())

    def _made(self, losses: Losses, updates: Sequence[Update], tried: Sequence[float]) -> None:
        """Write the line of a step."""
        if not self.logs:
            return
        if any((update.coefficients, update.lr) != (updates[0].coefficients, updates[0].lr) for update in updates):
            self.leave_log("param groups have learning rates of their own")
        if self.log:
            decays = [bool(group.options["weight_decay"]) for group in self._groups]
            update = updates[decays.index(True) if any(decays) else 0]
            self.log.append(StepRecord(self.steps - 1, update, losses, tuple(self.projected_grads), tuple(tried)))

    @property
    def follows_from_parameters(self) -> bool:
        """Whether theta and state are the parameters alone: float32 ones, under a rule without moments or theta_0."""
        groups = self.param_groups
        return not any(rule_of(group).kernel() or group["anchored_decay"] for group in groups) and all(
            p.dtype == torch.float32 for _, _, p in self._trainable()
        )

    @property
    def theta(self) -> dict[str, torch.Tensor]:
        """The trained parameters by canonical name."""
        return {name: p.detach() for _, name, p in self._trainable()}

    @property
    def rule(self) -> LoggedRule:
        """The rule as a header has it."""
        rule, decay = rule_of(self.param_groups[0]), max(group["weight_decay"] for group in self.param_groups)
        spared = (group["z_names"] for group in self.param_groups if decay and not group["weight_decay"])
        anchored = any(group["anchored_decay"] for group in self.param_groups if group["weight_decay"])
        return LoggedRule(rule, rule.l2(decay), tuple(itertools.chain(*spared)), self.normalise_z, anchored)

    @torch.no_grad()
    def replay(self, start: dict[str, torch.Tensor], records: Sequence[StepRecord]) -> None:
        """Set parameters, masters and moments to what a log makes of its start.

        Args:
            start: theta_0 by canonical name.
            records: of all steps.
        """
        for name, p in self.theta.items():
            p.copy_(start[name])
        self.state.clear()
        for group in self.param_groups:
            group["updates"] = 0
        self._start_anew()
        self._follow()
        for record in records:
            for group in self._groups if not record.update.skipped else ():
                decay = record.update.decay if group.options["weight_decay"] else 1.0
                made = Update(record.update.seeds, record.update.coefficients, decay, record.update.lr)
                self._apply(group, made)
        for group in self._groups:
            group.write(group.theta)
        self._seen = self._storage()


def first_line(model: transformers.PreTrainedModel, optimizer: Logged, data: object) -> dict:
    """The header of a new log.

    Args:
        model: as it is now, not wrapped.
        optimizer: at its start.
        data: training data; a `datasets.Dataset` has a fingerprint.
    Raises:
        ValueError: the format of logs has no place for what is trained.
    """
    names = list(optimizer.theta)
    rule, wanted = optimizer.rule, optimizer.distribution
    if wanted != rule.rule.distribution:
        raise ValueError(f"{rule.rule.name} along z of distribution {wanted}")
    if len({group["anchored_decay"] for group in optimizer.param_groups if group["weight_decay"]}) > 1:
        raise ValueError("decay to theta_0 of some parameters and to zero of others")
    shapes = {name: tuple(p.shape) for name, p in optimizer.theta.items()}
    adapter, trained = getattr(model, "peft_config", None), {id(p) for p in model.parameters() if p.requires_grad}
    if adapter:
        from peft import get_peft_model_state_dict

        if set(get_peft_model_state_dict(model, adapter_name=model.active_adapter)) != set(names):
            raise ValueError("the adapter is more than LoRA")
        peft = adapter[model.active_adapter].to_dict() | {"inference_mode": True}
        peft, base = json.loads(json.dumps(peft, default=sorted)), model.get_base_model()
        weights = (
            (name.replace(".base_layer.", "."), p) for name, p in base.named_parameters() if id(p) not in trained
        )
    else:
        peft, base, weights = None, model, model
    dtype = next((p.dtype for p in base.parameters() if p.is_floating_point() and id(p) not in trained), base.dtype)
    dtype = str(dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise ValueError(f"a model in {dtype}")
    path = getattr(base, "name_or_path", "")
    path = os.path.abspath(path) if os.path.isdir(path) else path
    spec = TrainedSpec(peft, shapes, path, weights_hash(weights), dtype)
    rules = {"rule": rule.header()} if rule.header() else {}
    init = {"kind": "base"} if peft is None else {"kind": "file", "file": INITIAL, "sha256": ""}
    fingerprint = f"fingerprint:{getattr(data, '_fingerprint', None) or 'unknown'}"
    return header(optimizer.seed, fingerprint, init, {**rules, **spec.logged()})


def begin(output_dir: str, optimizer: Logged, first: dict, leads: bool) -> None:
    """Start a log in the output directory; one that is there is kept beside it.

    Args:
        output_dir: of the trainer.
        optimizer: at its start.
        first: the header.
        leads: this process writes.
    """
    optimizer.logs = True
    if not leads:
        return
    folder = _fresh(output_dir)
    if first["peft"] is not None:
        start = {name: p.float().cpu().contiguous() for name, p in optimizer.theta.items()}
        with replacing(folder / INITIAL) as part:
            save_file(start, part)
        first["init"]["sha256"] = hashlib.sha256((folder / INITIAL).read_bytes()).hexdigest()
    (folder / "trajectory.jsonl").write_text(json.dumps(first) + "\n")
    optimizer.log = TrajectoryWriter(folder / "trajectory.jsonl")


def keep(checkpoint: str, output_dir: str, optimizer: Logged, leads: bool) -> None:
    """Put the log as it is now into a checkpoint, where there is one; that of an older checkpoint there gives way."""
    target = Path(checkpoint) / FOLDER
    if leads:
        shutil.rmtree(target, ignore_errors=True)
    if optimizer.log:
        optimizer.log.sync()
        shutil.copytree(Path(output_dir) / FOLDER, target)


def go_on(
    checkpoint: str, output_dir: str, model: transformers.PreTrainedModel, optimizer: Logged, before: dict, leads: bool
) -> None:
    """Bring an optimizer to the step of a checkpoint, by its log, and carry the log on in the output directory.

    Args:
        checkpoint: its directory.
        output_dir: of the trainer.
        model: with the checkpoint's weights, not wrapped.
        optimizer: with the checkpoint's options and counts.
        before: the parameters of the model as the trainer was given it, by name; {} where they are not needed.
        leads: this process writes.
    Raises:
        UserError: the log is not of this checkpoint or model.
    """
    folder = Path(checkpoint) / FOLDER
    first, records = read_trajectory(folder / "trajectory.jsonl")
    check_lines(RunDirectory(folder), first, records)
    said = {
        "steps": (len(records), optimizer.steps),
        "names": (set(first["shapes"]), set(optimizer.theta)),
        "rule": (first.get("rule"), optimizer.rule.header()),
    }
    for name, (logged, now) in said.items():
        if logged != now:
            raise UserError(
                f"{folder}: {name} of the log are not those of the checkpoint beside it; restore the folder"
            )
    if not optimizer.follows_from_parameters:
        optimizer.replay(_start(first, folder, before), records)
    optimizer.logs = True
    if leads:
        target = Path(output_dir) / FOLDER
        old = target / "trajectory.jsonl"
        lines = (folder / "trajectory.jsonl").read_bytes()
        if old.is_file() and old.read_bytes().startswith(lines):
            os.truncate(old, len(lines))
        else:
            shutil.copytree(folder, _fresh(output_dir), dirs_exist_ok=True)
        optimizer.log = TrajectoryWriter(old)


def _start(first: dict, folder: Path, before: dict) -> dict[str, torch.Tensor]:
    """theta_0 of a log: of an adapter its file, of a model the one that the trainer was given, or the one it names."""
    if first["peft"] is None and before and weights_hash(before.items()) == first["model_hash"]:
        return before
    if first["peft"] is None and not first["model"]:
        raise UserError(
            f"{folder}: a model in 16 bits, or a rule with moments, is resumed from what the run began with: give the"
            " trainer that model, not the checkpoint's"
        )
    return initial_theta(first, folder / INITIAL)


def _fresh(output_dir: str) -> Path:
    """The folder of the log, empty; what was there is moved beside it."""
    folder = Path(output_dir) / FOLDER
    if folder.exists():
        aside = (Path(output_dir) / f"{FOLDER}-before-{n}" for n in itertools.count(1))
        folder.rename(next(path for path in aside if not path.exists()))
    folder.mkdir(parents=True)
    return folder
