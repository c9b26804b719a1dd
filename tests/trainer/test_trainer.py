"""MeZO inside the Trainer of transformers: same callbacks, no graph, exact resume."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from mezo import MeZO, MeZOTrainer
from mezo.errors import UserError
from tests.test_examples import load
from tests.tiny_models import WORDS, build, save, tokenizer

ROOT = Path(__file__).parents[2]


def data(rows=24):
    texts = [f"the {WORDS[11 + i % 4]} was {WORDS[i % 8]} and very {WORDS[(i + 3) % 8]}" for i in range(rows)]
    return Dataset.from_dict({"input_ids": tokenizer()(texts)["input_ids"]})


def make(out, kind=MeZOTrainer, callbacks=(), model=None, mezo_options=None, **options):
    """A trainer of the tiny model on sentences."""
    options = {
        "max_steps": 6,
        "learning_rate": 1e-4,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }
    args = TrainingArguments(str(out), per_device_train_batch_size=4, **options)
    more = {"mezo_options": {"eps": 1e-3, **(mezo_options or {})}} if kind is MeZOTrainer else {}
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm=False)
    sets = {"train_dataset": data(), "eval_dataset": data(8), "callbacks": list(callbacks)}
    return kind(model or build("llama"), args, collator, **sets, **more)


def recorded(trainer):
    """What the trainer's loss is asked for: a list that grows as it trains."""
    batches, loss_of = [], trainer.compute_loss

    def compute_loss(model, inputs, **kwargs):
        batches.append(dict(inputs))
        return loss_of(model, inputs, **kwargs)

    trainer.compute_loss = compute_loss
    return batches


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


class Seen(TrainerCallback):
    """Names of all callbacks in the order in which they fire."""

    def __init__(self):
        self.names = []

    def __getattribute__(self, name):
        if name.startswith("on_"):
            self.names.append(name)
        return super().__getattribute__(name)


def test_callbacks_fire_as_in_a_plain_trainer(tmp_path):
    seen = {}
    for kind in (Trainer, MeZOTrainer):
        seen[kind] = Seen()
        options = {"gradient_accumulation_steps": 2, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2}
        make(tmp_path / kind.__name__, kind, [seen[kind]], max_steps=4, save_steps=2, **options).train()
    assert seen[MeZOTrainer].names == seen[Trainer].names
    assert {"on_pre_optimizer_step", "on_substep_end", "on_save", "on_evaluate"} <= set(seen[Trainer].names)


def test_a_step_is_that_of_the_optimizer_and_leaves_no_graph(tmp_path):
    trainer, model = make(tmp_path, max_steps=3), build("llama")
    named = list(model.named_parameters())
    groups = [{"params": [pair for pair in named if ("norm" in pair[0]) == norm]} for norm in (False, True)]
    optimizer, batches = MeZO(groups, lr=1e-4, eps=1e-3, seed=42), recorded(trainer)
    trainer.train()
    assert len(batches) == 6
    for t, batch in enumerate(batches[::2]):
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * (3 - t) / 3
        optimizer.step(lambda batch=batch: model(**batch).loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trainer.model.parameters(), strict=True))
    assert all(p.grad is None for p in trainer.model.parameters())


def test_accumulated_micro_batches_share_one_z(tmp_path):
    """Two forward passes of each, and the losses of a batch that is not divided."""
    options, losses = {"max_steps": 2, "lr_scheduler_type": "constant", "logging_steps": 1}, []
    for size, parts in ((4, 2), (8, 1)):
        trainer = make(tmp_path / str(size), gradient_accumulation_steps=parts, **options)
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
        batches = recorded(trainer)
        trainer.train()
        assert len(batches) == 2 * 2 * parts
        assert trainer.optimizer.optimizer.steps == 2
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_it_learns_and_logs_projected_grad(tmp_path):
    trainer = make(tmp_path, max_steps=60, learning_rate=3e-4, logging_steps=10, lr_scheduler_type="constant")
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    row = trainer.state.log_history[1]
    assert row["projected_grad"] > 0
    assert "grad_norm" not in row


def test_best_model_early_stopping_schedulers_and_tensorboard(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "load_best_model_at_end": True}
    options |= {"lr_scheduler_type": "cosine", "warmup_steps": 2, "learning_rate": 0.5, "report_to": ["tensorboard"]}
    trainer = make(tmp_path, callbacks=[EarlyStoppingCallback(1)], max_steps=20, logging_steps=1, **options)
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) < 10, "it diverges, and stops"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-5)
    assert list(tmp_path.rglob("events.out.tfevents.*"))


KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from tests.trainer.test_trainer import make

class Kill(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

make(sys.argv[1], callbacks=[Kill()], save_steps=2).train()
"""


@pytest.mark.slow  # quick sibling: test_log.py, test_resume_is_exact
def test_resume_after_a_kill_equals_an_uninterrupted_run(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run")], env=environment, cwd=ROOT)
    assert run.returncode == -signal.SIGKILL
    again, whole = make(tmp_path / "run", save_steps=2), make(tmp_path / "whole")
    lines = (tmp_path / "run" / "mezo-log" / "trajectory.jsonl").read_text().count("\n")
    assert lines == 6, "the step after the checkpoint was logged"
    again.train(resume_from_checkpoint=True)
    whole.train()
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())
    history = json.loads((tmp_path / "run" / "checkpoint-6" / "trainer_state.json").read_text())
    assert history["global_step"] == 6
    logs = [(tmp_path / run / "mezo-log" / "trajectory.jsonl").read_bytes() for run in ("run", "whole")]
    assert logs[0] == logs[1]


def test_an_adapter_is_trained_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"], r=2))
    before = {name: p.clone() for name, p in model.named_parameters()}
    make(tmp_path, model=model, learning_rate=1e-2).train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved
    assert all("lora_" in name for name in moved)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"fp16": True}, "fp16=True scales gradients"), ({"fsdp": "full_shard"}, "fsdp: parameters in")],
)
def test_what_needs_gradients_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path, **options)


def test_another_optimizer_is_refused(tmp_path):
    trainer = make(tmp_path)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(UserError, match="makes its optimizer itself, got SGD"):
        trainer.train()


def test_the_example_runs(tmp_path):
    trainer = load("trainer").main(save("llama", tmp_path / "model"), steps=10, output_dir=str(tmp_path / "run"))
    assert trainer.state.global_step == 10


def test_the_example_of_trl_runs(tmp_path):
    """Where TRL is installed."""
    pytest.importorskip("trl")
    path = save("llama", tmp_path / "model")
    tokens = AutoTokenizer.from_pretrained(path)
    tokens.eos_token = "<pad>"
    tokens.save_pretrained(path)
    trainer = load("sft").main(path, steps=4, output_dir=str(tmp_path / "run"))
    assert trainer.state.global_step == 4
    assert all(p.grad is None for p in trainer.model.parameters())
