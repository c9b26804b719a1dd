"""A Trainer whose training step is two forward passes: losses are measured, no gradient is computed."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from mezo.errors import UserError
from mezo.optim.state import MOMENTS
from mezo.progress import say
from mezo.trainer import log as seeds
from mezo.trainer.log import Logged


class MeZOMixin:
    """What makes a trainer of transformers a MeZO trainer: put it before the trainer's class.

    `training_step` measures the loss at theta + eps z and theta - eps z and moves theta, in one call of the fused
    optimizer (`mezo.MeZO`). No autograd graph is built, and the model is in eval mode, as in the MeZO paper (Malladi et
    al. 2023, arXiv 2305.17333). All else is the Trainer's: data, callbacks, schedulers, evaluation, checkpoints,
    reports. What differs:

    - Gradient accumulation measures all micro-batches of a step along the same z. The step is made at the last of them,
      before `on_pre_optimizer_step`.
    - `max_grad_norm` clips nothing; logs have `projected_grad` in place of `grad_norm`.
    - `mezo-log/` in the output directory is the log of seeds and scalars, as `mezo train` writes it: `mezo replay`
      rebuilds an adapter from it, bit for bit. A checkpoint holds the log so far, and its optimizer.pt no tensors. A
      resumed run goes on to the same bits. Where weights are float32 and the rule has no moments, the checkpoint's
      weights are theta; else the log is applied again to what the run began with: the adapter in the checkpoint, or the
      model that the trainer is given or that the log names.
    - Several processes exchange losses alone.

    Args:
        mezo_options: arguments of `mezo.MeZO` beside lr and weight_decay, which are the Trainer's: eps, rule,
            num_perturbations, ... The seed is the Trainer's unless it is given.

    >>> class MeZOSFTTrainer(MeZOMixin, SFTTrainer): ...  # doctest: +SKIP
    """

    def __init__(self, *args: Any, mezo_options: Mapping[str, Any] | None = None, **kwargs: Any):
        self.mezo_options = dict(mezo_options or {})
        for value in (*args, *kwargs.values()):
            if isinstance(value, transformers.TrainingArguments):
                _check(value)
        super().__init__(*args, **kwargs)
        self._parts: list[tuple[dict, Any]] = []
        self._before: dict[str, torch.Tensor] = {}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """The fused optimizer on all parameters that require a gradient; what the Trainer does not decay is spared."""
        if self.optimizer is None:
            model = self.model if model is None else model
            trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            decayed = set(self.get_decay_parameter_names(model))
            groups = [
                {"params": [pair for pair in trained if pair[0] in decayed], "weight_decay": self.args.weight_decay},
                {"params": [pair for pair in trained if pair[0] not in decayed], "weight_decay": 0.0},
            ]
            options = {"seed": self.args.seed, **self.mezo_options}
            self.optimizer = Logged([g for g in groups if g["params"]], lr=self.args.learning_rate, **options)
        if not isinstance(self._mezo, Logged):
            raise UserError(
                f"a MeZO trainer makes its optimizer itself, got {type(self.optimizer).__name__}: leave optimizers out,"
                " and give lr in the arguments and eps in mezo_options"
            )
        return self.optimizer

    @property
    def _mezo(self) -> Logged:
        """The optimizer without accelerate's wrapper, which returns no loss."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, with a log of seeds."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._before = {}
            if isinstance(self._mezo, Logged):
                self._mezo.close_log()

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Measure and move, at the last micro-batch of a step; the others wait for it.

        Args:
            model: the model, wrapped as it may be.
            inputs: of a micro-batch.
            num_items_in_batch: tokens of all micro-batches of the step, where the model's loss is divided by these.
        Returns:
            Mean of the two losses of the step; 0 for micro-batches before the last.
        """
        self._parts.append((self._prepare_inputs(inputs), num_items_in_batch))
        if len(self._parts) < self.current_gradient_accumulation_steps:
            return torch.zeros((), device=self.args.device)
        parts, self._parts = self._parts, []
        model.eval()
        optimizer = self._mezo
        if not optimizer.steps:
            self._begin_log(optimizer)
        loss = optimizer.step(lambda: sum(self._loss(model, *part, len(parts)) for part in parts))
        return loss.to(self.args.device, torch.float32)

    def _loss(self, model: torch.nn.Module, inputs: dict[str, Any], items: Any, parts: int) -> torch.Tensor:
        """A micro-batch's share of the loss of the step. A model may take labels out of its inputs: it has a copy."""
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs), num_items_in_batch=items)
        scaled = getattr(self, "loss_is_scaled_for_ga", None)  # transformers 5.17 has no such attribute
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        return loss.mean().double() / (1 if scaled else parts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the last step's projected_grad beside its loss."""
        optimizer = self._mezo
        if "loss" in logs and isinstance(optimizer, Logged) and optimizer.projected_grads:
            grads = optimizer.projected_grads
            logs = {**logs, "projected_grad": sum(map(abs, grads)) / len(grads)}
        super().log(logs, *args, **kwargs)

    def _begin_log(self, optimizer: Logged) -> None:
        """Begin the log of seeds, where what is trained has a place in it."""
        model = self.accelerator.unwrap_model(self.model)
        try:
            first = seeds.first_line(model, optimizer, self.train_dataset)
        except ValueError as error:
            say(f"no log of seeds is kept: {error}; checkpoints hold the optimizer's tensors")
            return
        seeds.begin(self.args.output_dir, optimizer, first, self.is_world_process_zero())

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Options and counts, the scheduler, and the log of seeds in place of tensors."""
        super()._save_optimizer_and_scheduler(output_dir)
        seeds.keep(output_dir, self.args.output_dir, self._mezo, self.is_world_process_zero())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """The weights of a checkpoint; what they were before is kept until its log has been applied."""
        logged = (Path(resume_from_checkpoint) / seeds.FOLDER).is_dir()
        halves = any(p.requires_grad and p.dtype != torch.float32 for p in self.model.parameters())
        replayed = logged and (halves or self.mezo_options.get("rule") in MOMENTS)
        if replayed and not hasattr(self.model, "peft_config"):
            self._before = {name: p.detach().cpu().clone() for name, p in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Options and counts of a checkpoint; then master and moments, by its log."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None or not (Path(checkpoint) / seeds.FOLDER).is_dir():
            return
        place = (checkpoint, self.args.output_dir, self.accelerator.unwrap_model(self.model))
        seeds.go_on(*place, self._mezo, self._before, self.is_world_process_zero())
        self._before = {}

    def _clip_grad_norm(self, model: torch.nn.Module) -> None:
        """Nothing: there are no gradients."""

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: float | None = None) -> None:
        """None: there are no gradients."""


class MeZOTrainer(MeZOMixin, transformers.Trainer):
    """`transformers.Trainer` with forward passes only; see `MeZOMixin`.

    >>> trainer = MeZOTrainer(model, args, train_dataset=data, mezo_options={"eps": 1e-3})  # doctest: +SKIP
    """


def _check(args: transformers.TrainingArguments) -> None:
    """Raise UserError for what a trainer without gradients cannot be asked."""
    if args.fp16:
        raise UserError("fp16=True scales gradients, and there are none: use bf16=True, or load the model in float16")
    sharded = next((name for name in ("deepspeed", "fsdp") if getattr(args, name, None)), "")
    if sharded:
        raise UserError(
            f"{sharded}: parameters in shards are not supported: leave it out; a step needs the memory of inference"
        )
