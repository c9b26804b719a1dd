"""Runs of --tuning full on tiny models: the model they leave, resume and replay to the bit, what is refused."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from mezo.api import replay, resume, run_to_score, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.full import save_model
from mezo.models.load import load_tokenizer
from mezo.run import logbook
from mezo.run.adapter import adapter_options
from mezo.run.export import export
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from mezo.studies.protocols import PROTOCOLS
from mezo.studies.reproduce import configs
from mezo.tasks import load_splits
from tests.killed import killed_in_step
from tests.log_by_formula import follows
from tests.tiny_models import build, save

FULL = {"tuning": "full", "lr": 1e-4, "eps": 1e-3}


@pytest.fixture
def full_options(tiny_options):
    return {k: v for k, v in tiny_options.items() if k not in ("target_modules", "layers_to_transform")} | FULL


@pytest.fixture(scope="module", params=["float32", "bfloat16", "roberta"])
def finished(request, tmp_path_factory, tiny_model, tiny_data):
    """A finished run; tests must copy it before they change it."""
    run, masked = tmp_path_factory.mktemp("runs") / "run", request.param == "roberta"
    config = Config.of(
        model=save("roberta", tmp_path_factory.mktemp("roberta")) if masked else tiny_model,
        **tiny_data, output_dir=str(run), prompt="{text} It was<mask>" if masked else "{text} It was",
        label_words=(" terrible", " great"), steps=20, batch_size=8, eval_every=2, weight_decay=0.1,
        no_decay=("*[nN]orm*",), num_perturbations=2, dtype="float32" if masked else request.param, tuning="full",
        lr=1e-3, eps=1e-3, verify_every=1,
    )  # fmt: skip
    result = train(config)
    assert result["best_step"] > 0
    return run, config, result


def weights(directory):
    return load_file(Path(directory) / "model.safetensors")


def same_bits(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k].view(torch.uint8), b[k].view(torch.uint8)) for k in a)


def test_the_run_leaves_a_model_that_scores_as_the_run_did(finished):
    run, config, result = finished
    first, _ = read_trajectory(run / "trajectory.jsonl")
    assert (first["version"], first["init"], first["peft"]) == (2, {"kind": "base"}, None)
    assert not (run / "adapter").exists()
    assert "mezo" not in (run / "model" / "config.json").read_text()
    masked = "mask" in config.data.prompt
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    model = auto.from_pretrained(run / "model").eval()
    assert str(model.dtype) == f"torch.{config.model.dtype}"
    assert AutoTokenizer.from_pretrained(run / "model").get_vocab() == load_tokenizer(config.model.base).get_vocab()
    test, right = load_splits(config, load_tokenizer(config.model.base), masked=masked)["test"], 0
    for example in test:
        at = len(example.prompt) - 1 if example.mask is None else example.mask
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example.prompt])).logits[0, at]
        right += int(logits[[option for (option,) in example.options]].argmax()) == example.label
    assert right / len(test) == result["test"]["after"]["accuracy"]
    base = dict(auto.from_pretrained(config.model.base).named_parameters())
    moved = [name for name, p in model.named_parameters() if not torch.equal(p.float(), base[name].float())]
    assert len(moved) == len(base)


def test_the_log_gives_the_model(finished, tmp_path):
    run, config, result = finished
    assert resume(str(run))["checked_steps"] == result["best_step"]
    for backend in (None, "reference"):
        out = tmp_path / str(backend)
        assert replay(str(run), str(out), backend=backend) == result["best_step"]
        assert same_bits(weights(out), weights(run / "model"))
    replay(str(run), str(tmp_path / "start"), until="0")
    start = {name: tensor.to(getattr(torch, config.model.dtype)) for name, tensor in weights(config.model.base).items()}
    assert same_bits(weights(tmp_path / "start"), start)
    shown = logbook.summary(str(run))
    assert shown["start"] == "from the base model"
    assert logbook.verify(str(run)) == follows(run) == 20


def test_a_log_cut_anywhere_resumes_to_the_same_bytes(finished, tmp_path):
    run, _, result = finished
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    whole = (run / "trajectory.jsonl").read_bytes()
    killed_in_step(8, copy)
    if result["best_step"] > 8:
        shutil.rmtree(copy / "model")
    assert resume(str(copy))["test"] == result["test"]
    assert (copy / "trajectory.jsonl").read_bytes() == whole
    assert same_bits(weights(copy / "model"), weights(run / "model"))
    logbook.truncate(str(copy), 7)
    theta, first, steps = rebuild(copy)
    kept = weights(copy / "model")
    assert steps <= 6
    assert all(torch.equal(kept[name], theta[name].to(getattr(torch, first["dtype"]))) for name in kept)


def test_eval_and_export_take_the_run(finished, tmp_path, capsys):
    run, config, result = finished
    assert main(["eval", str(run)]) == 0
    assert f"{result['test']['after']['loss']:.4f}" in capsys.readouterr().out
    assert main(["eval", "--model", str(run / "model"), *flags(config)]) == 0
    assert main(["export", str(run), "--output-dir", str(tmp_path / "m"), "--format", "merged"]) == 0
    exported, own = weights(tmp_path / "m"), weights(run / "model")
    assert same_bits(exported, {name: tensor.float() for name, tensor in own.items()}), "the base checkpoint's dtype"
    export(str(run), str(tmp_path / "half"), "merged", "float16")
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.float16}
    for form in ("peft", "sglang"):
        with pytest.raises(UserError, match=f"--format {form}: .* there is no adapter; use merged"):
            export(str(run), str(tmp_path / form), form)
    with pytest.raises(UserError, match=r"trained a whole model: give --model .*/model"):
        adapter_options(run)
    assert main(["report", str(run)]) == 0
    assert "adapter" not in capsys.readouterr().out


def flags(config):
    return [
        "--test-file",
        config.data.test_file,
        "--prompt",
        config.data.prompt,
        "--label-words",
        *config.data.label_words,
    ]


def test_a_model_that_is_not_what_the_log_gives_is_named(finished, tmp_path):
    run, _, _ = finished
    shutil.copytree(run, tmp_path / "copy")
    path = tmp_path / "copy" / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model/ is not what the log gives"):
        resume(str(tmp_path / "copy"))
    shutil.rmtree(tmp_path / "copy" / "model")
    with pytest.raises(UserError, match=r"model/ is missing; rebuild it with: mezo replay"):
        resume(str(tmp_path / "copy"))
    with pytest.raises(UserError, match=r"has no model/ yet"):
        run_to_score(tmp_path / "copy")


def test_another_base_is_refused(full_options, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(full_options["model"], base)
    config = Config.of(**{**full_options, "model": str(base), "steps": 3})
    train(config)
    changed = build("llama")
    with torch.no_grad():
        changed.get_input_embeddings().weight[0, 0] += 1
    changed.save_pretrained(base)
    with pytest.raises(UserError, match="other weights than the run started from"):
        replay(config.machine.output_dir, str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()
    Path(config.machine.output_dir, "result.json").unlink()
    logbook_path = Path(config.machine.output_dir, "trajectory.jsonl")
    logbook_path.write_bytes(b"".join(logbook_path.read_bytes().splitlines(keepends=True)[:2]))
    with pytest.raises(UserError, match="model_hash of the log and of the model at hand differ"):
        resume(config.machine.output_dir)


def test_a_base_that_moved_is_named(full_options, tmp_path, capsys):
    base, moved = tmp_path / "base", tmp_path / "moved"
    shutil.copytree(full_options["model"], base)
    config = Config.of(**{**full_options, "model": str(base), "steps": 3})
    train(config)
    base.rename(moved)
    run = config.machine.output_dir
    assert main(["replay", run, "--output-dir", str(tmp_path / "again")]) == 2
    assert main(["replay", run, "--output-dir", str(tmp_path / "again"), "--model", str(moved)]) == 0
    assert same_bits(weights(tmp_path / "again"), weights(Path(run, "model")))
    with torch.no_grad():
        (other := build("llama")).get_input_embeddings().weight[0, 0] += 1
    other.save_pretrained(moved)
    capsys.readouterr()
    assert main(["replay", run, "--output-dir", str(tmp_path / "other"), "--model", str(moved)]) == 2
    assert "other weights than the run started from" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_an_adapter_is_rebuilt_from_its_log_alone(tiny_options, tmp_path):
    config = Config.of(**{**tiny_options, "steps": 2})
    train(config)
    with pytest.raises(UserError, match="trained an adapter, which the log rebuilds alone: leave it out"):
        replay(config.machine.output_dir, str(tmp_path / "again"), model=config.model.base)
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("rule", ["momentum", "adam", "conservative"])
def test_rules_with_state_resume_to_the_bit(rule, full_options, tmp_path):
    config = Config.of(**{**full_options, "update_rule": rule, "lr": 1e-4, "steps": 12, "verify_every": 1})
    train(config)
    whole = Path(config.machine.output_dir, "trajectory.jsonl").read_bytes()
    kept = weights(Path(config.machine.output_dir, "model"))
    logbook.truncate(config.machine.output_dir, 5)
    resume(config.machine.output_dir)
    assert Path(config.machine.output_dir, "trajectory.jsonl").read_bytes() == whole
    assert same_bits(weights(Path(config.machine.output_dir, "model")), kept)


def test_the_loss_falls_and_what_is_better_replaces_the_model_whole(full_options):
    changes = {"steps": 150, "batch_size": 16, "lr": 3e-4, "eval_every": 150, "true_gradient": True}
    config = Config.of(**{**full_options, **changes})
    result = train(config)
    assert result["test"]["after"]["loss"] < 0.7 * result["test"]["before"]["loss"]
    rows = map(json.loads, Path(config.machine.output_dir, "metrics.jsonl").read_text().splitlines())
    assert sum(row.get("is_best", False) for row in rows) > 1
    assert not [path.name for path in Path(config.machine.output_dir).iterdir() if path.name.startswith("model.")]
    assert result["projected_grad_error"] < 0.05
    assert result["gradient_expected_cosine"] < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 4}, "--r 4 belongs to --tuning lora, lora-b or lora-xs, and this run has --tuning full: leave it out"),
        ({"lora_alpha": 8}, "--lora-alpha 8 belongs to --tuning lora"),
        ({"target_modules": ("q_proj",)}, "--target-modules .* belongs to --tuning lora"),
        ({"layers_to_transform": (1,)}, "--layers-to-transform .* belongs to --tuning lora"),
        ({"adapter": "somewhere"}, "--adapter somewhere belongs to --tuning lora"),
        ({"runtime": "sglang"}, "the engine's slots hold LoRA adapters; use --runtime hf"),
        ({"trunk_cache": "cpu"}, "--tuning full trains every layer; use auto or off"),
        ({"head": "linear"}, "--head linear belongs to --tuning lora"),
    ],
)
def test_what_has_no_meaning_is_refused(changes, message, full_options):
    with pytest.raises(UserError, match=message):
        Config.of(**{**full_options, **changes})


def test_published_runs_of_every_parameter():
    (first, second), *_ = configs(PROTOCOLS["opt13b-rte-full"], "unused", {})
    assert (first.model.tuning.name, first.method.lr, second.method.lr, first.method.eps) == ("full", 1e-6, 1e-7, 1e-3)
    own = [config for grid in configs(PROTOCOLS["roberta-sst2-k16-full"], "unused", {}) for config in grid]
    assert {(config.method.lr, config.method.weight_decay) for config in own} == {(1e-7, 0.0), (1e-6, 0.0), (1e-5, 0.0)}
    assert dataclasses.asdict(PROTOCOLS["roberta-trec-k512-full"])["mean"] == 94.3


def test_a_model_is_written_whatever_lies_beside_it(tmp_path):
    """Neighbours with names like ours, a tokenizer with a folder of templates, sampling settings of no sampling."""
    source = Path(save("llama", tmp_path / "source"))
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool": "{{ tools }}"}
    tokenizer.save_pretrained(source)
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": false}')
    for end in ("old", "part"):
        (tmp_path / f"m.{end}").mkdir()
        (tmp_path / f"m.{end}" / "precious").touch()
    model = AutoModelForCausalLM.from_pretrained(source)
    for _ in range(2):
        save_model(model, str(source), tmp_path / "m")
    assert same_bits(weights(tmp_path / "m"), weights(source))
    assert (tmp_path / "m" / "additional_chat_templates" / "tool.jinja").is_file()
    assert model.generation_config.do_sample is False
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "m").generation_config.temperature == 0.6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m", "m.old", "m.part", "source"]
    assert (tmp_path / "m.old" / "precious").exists()
    assert (tmp_path / "m.part" / "precious").exists()


def test_truncate_moves_nothing_before_it_can_rebuild(full_options, tmp_path):
    base = shutil.copytree(full_options["model"], tmp_path / "base")
    config = Config.of(**full_options | {"model": str(base), "output_dir": str(tmp_path / "run"), "steps": 4})
    train(config)
    base.rename(tmp_path / "moved")
    before = sorted(p.name for p in (tmp_path / "run").iterdir())
    with pytest.raises(UserError, match="could not be loaded"):
        logbook.truncate(config.machine.output_dir, 2)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == before


def test_a_model_directory_is_no_run(finished, capsys):
    assert main(["eval", str(finished[0] / "model")]) == 2
    assert f"use mezo eval --model {finished[0] / 'model'}" in " ".join(capsys.readouterr().err.split())
