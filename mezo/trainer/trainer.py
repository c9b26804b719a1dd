"""A Trainer whose training step is two forward passes: losses are measured, no gradient is computed."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

from mezo.errors import UserError
from mezo.optim import MeZO


class Stepped(MeZO):
    """`MeZO` in a loop that calls `step()` after the loss: the step was made where the loss was measured."""

    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        """A step of `MeZO`; nothing without a closure."""
        return None if closure is None else super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: there are no gradients."""


class MeZOMixin:
    """What makes a trainer of transformers a MeZO trainer: put it before the trainer's class.

    `training_step` measures the loss at theta + eps z and theta - eps z and moves theta, in one call of the fused
    optimizer (`mezo.MeZO`). No autograd graph is built, and the model is in eval mode, as in the MeZO paper (Malladi et
    al. 2023, arXiv 2305.17333). All else is the Trainer's: data, callbacks, schedulers, evaluation, checkpoints,
    reports. What differs:

    - Gradient accumulation measures all micro-batches of a step along the same z. The step is made at the last of them,
      before `on_pre_optimizer_step`.
    - `max_grad_norm` clips nothing; logs have `projected_grad` in place of `grad_norm`.
    - A checkpoint's optimizer.pt holds the float32 master of what is trained and the number of steps, from which z
      follows: a resumed run goes on to the same bits.
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
            self.optimizer = Stepped([g for g in groups if g["params"]], lr=self.args.learning_rate, **options)
        if not isinstance(getattr(self.optimizer, "optimizer", self.optimizer), Stepped):
            raise UserError(
                f"a MeZO trainer makes its optimizer itself, got {type(self.optimizer).__name__}: leave optimizers out,"
                " and give lr in the arguments and eps in mezo_options"
            )
        return self.optimizer

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
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate's wrapper returns no loss
        loss = optimizer.step(lambda: sum(self._loss(model, *part, len(parts)) for part in parts))
        return loss.to(self.args.device, torch.float32)

    def _loss(self, model: torch.nn.Module, inputs: dict[str, Any], items: Any, parts: int) -> torch.Tensor:
        """A micro-batch's share of the loss of the step. A model may take labels out of its inputs: it has a copy."""
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, dict(inputs), num_items_in_batch=items)
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = (self.model_accepts_loss_kwargs and items is not None) or self.compute_loss_func is not None
        return loss.mean().double() / (1 if scaled else parts)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, with the last step's projected_grad beside its loss."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        if "loss" in logs and isinstance(optimizer, Stepped) and optimizer.projected_grads:
            grads = optimizer.projected_grads
            logs = {**logs, "projected_grad": sum(map(abs, grads)) / len(grads)}
        super().log(logs, *args, **kwargs)

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
