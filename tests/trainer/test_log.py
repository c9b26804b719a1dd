"""The checkpoint of a MeZO trainer is its log: exact resume without the optimizer's tensors, and replay."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, TrainerCallback

from mezo.cli.main import main
from mezo.errors import UserError
from mezo.models.load import checkpoint_hash
from mezo.run.adapter import read_adapter
from mezo.run.trajectory import read_trajectory
from tests.tiny_models import build, save
from tests.trainer.test_trainer import make, weights


def with_adapter(model, seed=0):
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "up_proj"], r=2, task_type="CAUSAL_LM"))


def log_of(run):
    return Path(run) / "mezo-log" / "trajectory.jsonl"


DECAY = {"weight_decay": 0.1, "learning_rate": 1e-3}
RESUMED = {  # model, whether another one is there when the run goes on, options
    "plain": (lambda i: build("llama", initializer_range=0.1 if i else 0.02), {}),
    "decay and three directions": (
        lambda i: build("llama"),
        {**DECAY, "gradient_accumulation_steps": 2, "mezo_options": {"num_perturbations": 3, "normalise_z": True}},
    ),
    "adam": (lambda i: build("llama"), {**DECAY, "mezo_options": {"rule": "adam"}}),
    "16 bits": (lambda i: build("llama").bfloat16(), {"learning_rate": 1e-3, "mezo_options": {"eps": 1e-2}}),
    "adapter": (lambda i: with_adapter(build("llama"), i), {"learning_rate": 1e-2}),
    "adapter, momentum": (
        lambda i: with_adapter(build("llama"), i),
        {"learning_rate": 1e-3, "mezo_options": {"rule": "momentum"}},
    ),
    "anchored decay": (
        lambda i: with_adapter(build("llama"), i),
        {"weight_decay": 5.0, "learning_rate": 1e-2, "mezo_options": {"anchored_decay": True}},
    ),
    "conservative": (lambda i: build("llama"), {"mezo_options": {"rule": "conservative"}}),
    "subspace": (
        lambda i: build("llama"),
        {**DECAY, "mezo_options": {"rule": "subspace-adam", "refresh_every": 3, "betas": (0.9, 0.95)}},
    ),
    "guided": (lambda i: build("llama"), {**DECAY, "mezo_options": {"rule": "guided", "num_perturbations": 3}}),
    "fzoo": (lambda i: build("llama"), {**DECAY, "mezo_options": {"rule": "fzoo", "num_perturbations": 2}}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resume_is_exact_from_the_log(tmp_path, name):
    model, options = RESUMED[name]
    whole = make(tmp_path / "whole", model=model(0), **options)
    whole.train()
    make(tmp_path / "part", model=model(0), save_steps=2, **options).train()
    checkpoint = tmp_path / "part" / "checkpoint-4"
    assert torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"] == {}
    assert len(read_trajectory(log_of(checkpoint))[1]) == 4
    again = make(tmp_path / "again", model=model(1), **options)
    again.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())
    assert log_of(tmp_path / "again").read_bytes() == log_of(tmp_path / "whole").read_bytes()
    masters = [[state["master"] for state in run.optimizer.optimizer.state.values()] for run in (whole, again)]
    assert all(map(torch.equal, *masters))


def test_replay_rebuilds_the_adapter(tmp_path, capsys):
    path = save("llama", tmp_path / "model")
    model = with_adapter(AutoModelForCausalLM.from_pretrained(path))
    trainer = make(tmp_path / "run", model=model, learning_rate=1e-2, max_steps=4, save_steps=2, weight_decay=0.1)
    trainer.train()
    folder = str(log_of(tmp_path / "run").parent)
    assert read_trajectory(log_of(tmp_path / "run"))[0]["model_hash"] == checkpoint_hash(path, "float32")
    for until, step in (("last", 4), ("2", 2)):
        assert main(["replay", folder, "--until", until, "--output-dir", str(tmp_path / until)]) == 0
        saved, rebuilt = read_adapter(tmp_path / "run" / f"checkpoint-{step}"), read_adapter(tmp_path / until)
        assert saved.keys() == rebuilt.keys()
        assert all(rebuilt[name].equal(tensor) for name, tensor in saved.items())
    assert main(["trajectory", "show", folder]) == 0
    assert "4 (0 skipped)" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_replay_rebuilds_a_model(tmp_path, dtype):
    path = save("llama", tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model.model.embed_tokens.requires_grad_(False)
    trainer = make(tmp_path / "run", model=model, learning_rate=1e-3, max_steps=3, mezo_options={"eps": 1e-2})
    trainer.train()
    folder = str(log_of(tmp_path / "run").parent)
    assert main(["replay", folder, "--until", "last", "--output-dir", str(tmp_path / "rebuilt")]) == 0
    rebuilt = AutoModelForCausalLM.from_pretrained(tmp_path / "rebuilt", dtype=dtype)
    pairs = zip(model.named_parameters(), rebuilt.parameters(), strict=True)
    assert all(torch.equal(mine, other) for (_, mine), other in pairs)


def test_a_model_is_resumed_from_what_it_began_with(tmp_path):
    path, options = save("llama", tmp_path / "model"), {"mezo_options": {"rule": "adam"}, "max_steps": 4}
    begin = lambda: AutoModelForCausalLM.from_pretrained(path)  # noqa: E731
    whole = make(tmp_path / "run", model=begin(), save_steps=2, **options)
    whole.train()
    checkpoint = str(tmp_path / "run" / "checkpoint-2")
    again = make(tmp_path / "again", model=AutoModelForCausalLM.from_pretrained(checkpoint), **options)
    again.train(resume_from_checkpoint=checkpoint)  # the log names the model's path
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())
    make(tmp_path / "made", save_steps=2, **options).train()
    other = make(tmp_path / "other", model=build("llama", initializer_range=0.1), **options)
    with pytest.raises(UserError, match="is resumed from what the run began with"):
        other.train(resume_from_checkpoint=str(tmp_path / "made" / "checkpoint-2"))


def test_a_log_of_another_checkpoint_is_refused(tmp_path):
    make(tmp_path / "run", max_steps=2, save_steps=2).train()
    make(tmp_path / "adam", max_steps=2, mezo_options={"rule": "adam"}).train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    lines = log_of(checkpoint).read_text().splitlines(keepends=True)
    log_of(checkpoint).write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match="steps of the log are not those of the checkpoint"):
        make(tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    log_of(checkpoint).write_bytes(log_of(tmp_path / "adam").read_bytes())
    with pytest.raises(UserError, match="rule of the log are not those"):
        make(tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))


def test_a_log_that_is_there_is_kept(tmp_path):
    for seed in (1, 2):
        make(tmp_path, max_steps=2, mezo_options={"seed": seed}).train()
    kept = tmp_path / "mezo-log-before-1" / "trajectory.jsonl"
    assert [read_trajectory(path)[0]["run_seed"] for path in (kept, log_of(tmp_path))] == [1, 2]


def test_training_on_in_one_process_keeps_the_tensors(tmp_path):
    """The log ends with `train()`: what a second call does does not follow from it."""
    trainer = make(tmp_path, max_steps=2, save_steps=2)
    trainer.train()
    trainer.train()
    assert len(read_trajectory(log_of(tmp_path))[1]) == 2
    assert not log_of(tmp_path / "checkpoint-2").exists()
    assert torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["state"]


class Clamp(TrainerCallback):
    """Changes weights after the second step, as a callback of a user's may."""

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step == 2:
            with torch.no_grad():
                model.lm_head.weight.clamp_(-0.01, 0.01)


def test_weights_that_others_change_end_the_log_and_the_resume_stays_exact(tmp_path, caplog):
    with caplog.at_level("INFO", "mezo"):
        whole = make(tmp_path, callbacks=[Clamp()], save_steps=4)
        whole.train()
    assert "the log of seeds ends at step 2: parameters were changed between steps" in caplog.text
    assert len(read_trajectory(log_of(tmp_path))[1]) == 2
    assert not log_of(tmp_path / "checkpoint-4").exists()
    assert torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    again = make(tmp_path / "again", callbacks=[Clamp()], model=build("llama", initializer_range=0.1))
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(tensor, weights(again)[name]) for name, tensor in weights(whole).items())


def test_what_a_log_has_no_place_for_is_said(tmp_path, caplog):
    torch.manual_seed(0)
    saved = LoraConfig(target_modules=["q_proj"], r=2, modules_to_save=["lm_head"])
    with caplog.at_level("INFO", "mezo"):
        make(tmp_path / "a", max_steps=1, model=get_peft_model(build("llama"), saved)).train()
        make(tmp_path / "b", max_steps=1, mezo_options={"distribution": "rademacher"}).train()
    assert "no log of seeds is kept: the adapter is more than LoRA" in caplog.text
    assert "no log of seeds is kept: sgd along z of distribution rademacher" in caplog.text
    assert not list(tmp_path.rglob("mezo-log"))
    assert json.loads((tmp_path / "a" / "checkpoint-1" / "trainer_state.json").read_text())["global_step"] == 1
