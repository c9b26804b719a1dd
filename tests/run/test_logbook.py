"""Showing, checking and cutting a log; exporting and importing adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaForCausalLM

from mezo.api import evaluate_target, replay, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models import full
from mezo.models.load import Checkpoint, load_base
from mezo.run import adapter, logbook
from mezo.run.adapter import BASE, PEFT_CONFIG, THETA, WEIGHTS, adapter_options
from mezo.run.directory import RunDirectory
from mezo.run.export import export
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from tests.log_by_formula import follows
from tests.tiny_models import build

IDS = torch.tensor([[3, 11, 12, 16, 4]])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_model, tiny_data):
    run = tmp_path_factory.mktemp("runs") / "run"
    config = Config.of(
        model=tiny_model, **tiny_data, output_dir=str(run), prompt="{text} It was", label_words=(" terrible", " great"),
        target_modules=("q_proj", "o_proj"), layers_to_transform=(2,), steps=30, batch_size=8, lr=3e-2, eval_every=10,
    )  # fmt: skip
    train(config)
    return run


def copy_of(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def test_show(finished, capsys):
    assert main(["trajectory", "show", str(finished)]) == 0
    shown = capsys.readouterr().out
    assert "30 (0 skipped)" in shown
    assert "1,024 in 4 tensors" in shown
    size = (finished / "trajectory.jsonl").stat().st_size
    assert f"{size:,} bytes" in shown
    assert "the adapter is 4,096" in shown


def test_report(finished, capsys):
    assert main(["report", str(finished)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    result = json.loads((finished / "result.json").read_text())
    assert f"{result['tokens_scored']:,} scored" in shown
    assert all(part in shown for part in ("kernels", "forward", "bookkeeping", "noise of projected_grad"))
    before, after = (result["test"][when]["accuracy"] for when in ("before", "after"))
    assert f"test accuracy │ {before:.4f} │ {after:.4f}" in shown
    assert main(["report", str(finished / "adapter")]) == 2
    assert "no result.json there" in capsys.readouterr().err


def test_verify_recomputes_every_line(finished, tmp_path):
    assert logbook.verify(str(finished)) == follows(finished) == 30
    copy = copy_of(finished, tmp_path)
    lines = (copy / "trajectory.jsonl").read_text().splitlines(keepends=True)
    for key, message in (("seeds", "seeds .* are not those of step 7"), ("coefficients", "do not follow")):
        record = json.loads(lines[8])
        record[key] = [record[key][0] + 1]
        (copy / "trajectory.jsonl").write_text("".join([*lines[:8], json.dumps(record) + "\n", *lines[9:]]))
        with pytest.raises(UserError, match=f"line 9: .*{message}"):
            logbook.verify(str(copy))


@pytest.mark.parametrize("step", [0, 13, 20])
def test_truncated_runs_resume_to_the_same_end(finished, tmp_path, step):
    copy = copy_of(finished, tmp_path)
    assert main(["trajectory", "truncate", str(copy), "--step", str(step)]) == 0
    kept = copy / "before-truncate-1"
    assert (kept / "trajectory.jsonl").read_bytes() == (finished / "trajectory.jsonl").read_bytes()
    assert (kept / "adapter" / WEIGHTS).is_file()
    assert follows(copy) == step
    whole, rows = (RunDirectory(run).read_metrics() for run in (finished, copy))
    during = [row for row in whole if row["split"] != "test" or row["step"] == 0]
    assert rows == [row for row in during if row["step"] <= step]
    assert step == 0 or "noise" in {row["split"] for row in rows}
    resume(str(copy))
    assert (copy / "trajectory.jsonl").read_bytes() == (finished / "trajectory.jsonl").read_bytes()
    for name in ("adapter/" + WEIGHTS,):
        assert (copy / name).read_bytes() == (finished / name).read_bytes()


def test_truncate_beyond_the_log_is_refused(finished, capsys):
    assert main(["trajectory", "truncate", str(finished), "--step", "31"]) == 2
    assert "--step must be from 0 to 30, got 31" in capsys.readouterr().err


def test_exported_adapter_and_merged_model_give_equal_logits(finished, tmp_path):
    adapter, merged = str(tmp_path / "adapter"), str(tmp_path / "merged")
    assert main(["export", str(finished), "--output-dir", adapter]) == 0
    assert main(["export", str(finished), "--output-dir", merged, "--format", "merged"]) == 0
    peft = PeftModel.from_pretrained(build("llama"), adapter).eval()
    plain = LlamaForCausalLM.from_pretrained(merged).eval()
    with torch.no_grad():
        # float32; the merged weight is one rounding of base + scale B A
        assert torch.allclose(peft(IDS).logits, plain(IDS).logits, atol=1e-5)
        assert not torch.allclose(build("llama")(IDS).logits, plain(IDS).logits, atol=1e-3)
    assert (Path(merged) / "tokenizer.json").is_file()
    assert main(["export", str(finished), "--output-dir", adapter]) == 2


def test_merged_weights_are_cast_once(finished, tmp_path):
    for dtype in ("float32", "bfloat16"):
        export(str(finished), str(tmp_path / dtype), "merged", dtype)
    whole, cast = (load_file(tmp_path / dtype / "model.safetensors") for dtype in ("float32", "bfloat16"))
    assert all(torch.equal(whole[name].bfloat16(), cast[name]) for name in whole)


def test_an_adapter_made_elsewhere_is_a_start(finished, tmp_path, tiny_options):
    """A half-precision adapter saved by PEFT itself is trained on in float32."""
    foreign = tmp_path / "foreign"
    model = PeftModel.from_pretrained(build("llama"), str(finished / "adapter"))
    model.save_pretrained(str(foreign))
    halves = {name: tensor.half() for name, tensor in load_file(foreign / WEIGHTS).items()}
    save_file(halves, foreign / WEIGHTS, metadata={"format": "pt"})
    options = {**tiny_options, "target_modules": ("q_proj", "o_proj"), "adapter": str(foreign), "steps": 3}
    train(Config.of(**options))
    shutil.rmtree(foreign)
    theta, _, _ = rebuild(options["output_dir"], until="0")
    assert {tensor.dtype for tensor in theta.values()} == {torch.float32}
    assert all(torch.equal(theta[name], halves[name].float()) for name in halves | theta)


PATTERNS = {"rank_pattern": {"k_proj": 2, r"layers\.2\.self_attn\.q_proj": 6}, "alpha_pattern": {"k_proj": 1.5}}


def test_ranks_and_scales_of_single_modules_are_a_start(tmp_path, tiny_options):
    """PEFT's patterns: the run begins with the scores that PEFT gives, replays, and leaves them in its adapter."""
    targets = {"target_modules": ["q_proj", "k_proj"], "r": 4, "lora_alpha": 8}
    torch.manual_seed(0)
    start = PeftModel(build("llama"), LoraConfig(**targets, **PATTERNS, init_lora_weights=False)).eval()
    start.save_pretrained(tmp_path / "start")
    options = {
        name: tiny_options[name] for name in tiny_options if name not in ("target_modules", "layers_to_transform")
    }
    train(Config.of(**{**options, "adapter": str(tmp_path / "start"), "steps": 2, "lr": 1e-6}))
    run = Path(options["output_dir"])
    fields = json.loads((run / "adapter" / PEFT_CONFIG).read_text())
    assert {name: fields[name] for name in PATTERNS} == PATTERNS
    first, _ = read_trajectory(run / "trajectory.jsonl")
    ranks = {tuple(shape)[0] for name, shape in first["shapes"].items() if name.endswith("lora_A.weight")}
    assert ranks == {2, 4, 6}
    replay(str(run), str(tmp_path / "again"))
    with torch.no_grad():
        own, again = (
            PeftModel.from_pretrained(build("llama"), str(path)).eval()(IDS).logits
            for path in (run / "adapter", tmp_path / "again")
        )
        assert torch.equal(own, again)
        assert (own - start(IDS).logits).abs().max() < 1e-2  # two small steps away
        assert (own - build("llama")(IDS).logits).abs().max() > 1e-2
    resume(str(run), machine={"steps": 4})
    with pytest.raises(UserError, match="--format sglang: the adapter has ranks or scales of single modules"):
        export(str(run), str(tmp_path / "sglang"), "sglang")


@pytest.mark.parametrize("text", ["k_proj", "=4", "k_proj=0", "k_proj=2.5"])
def test_a_pattern_is_a_name_and_a_number(tiny_options, text):
    with pytest.raises(UserError, match=f"--rank-pattern takes NAME=NUMBER, a whole number above 0; got '{text}'"):
        Config.of(**tiny_options, rank_pattern=(text,))


def test_the_engine_has_one_rank(tiny_options):
    with pytest.raises(UserError, match="--rank-pattern, --alpha-pattern: the engine's slots have one rank"):
        Config.of(**{**tiny_options, "runtime": "sglang", "alpha_pattern": ("k_proj=2",)})


def foreign_adapter(finished, tmp_path, **change):
    """A copy of an adapter without what says it is ours."""
    foreign = shutil.copytree(finished / "adapter", tmp_path / "foreign")
    (foreign / BASE).unlink()
    config = json.loads((foreign / PEFT_CONFIG).read_text())
    (foreign / PEFT_CONFIG).write_text(json.dumps({**config, **change}))
    return foreign


def test_rslora_of_any_rank_and_a_pattern_of_targets_are_a_start(tmp_path, tiny_options):
    """r 6 has no whole root; the run scores as PEFT does at its start, leaves rsLoRA, and is exported for SGLang."""
    targets = r"model\.layers\.2\.self_attn\.(q|o)_proj"
    start = PeftModel(
        build("llama"),
        LoraConfig(r=6, lora_alpha=3, use_rslora=True, target_modules=targets, init_lora_weights=False),
    )
    start.save_pretrained(tmp_path / "rs")
    found = adapter_options(tmp_path / "rs")
    assert (found["r"], found["lora_alpha"], found["use_rslora"]) == (6, 3, True)
    assert tuple(sorted(found["target_modules"])) == (
        "model.layers.2.self_attn.o_proj",
        "model.layers.2.self_attn.q_proj",
    )
    options = {
        name: value for name, value in tiny_options.items() if name not in ("target_modules", "layers_to_transform")
    }
    train(Config.of(**{**options, "adapter": str(tmp_path / "rs"), "steps": 2}))
    run = Path(options["output_dir"])
    export(str(run), str(tmp_path / "sglang"), "sglang")
    peft, engine = (
        PeftModel.from_pretrained(build("llama"), str(path)).eval() for path in (run / "adapter", tmp_path / "sglang")
    )
    assert "use_rslora" not in json.loads((tmp_path / "sglang" / PEFT_CONFIG).read_text())
    with torch.no_grad():
        assert torch.allclose(peft(IDS).logits, engine(IDS).logits, atol=1e-6)
        assert not torch.allclose(peft(IDS).logits, build("llama")(IDS).logits, atol=1e-3)


def test_an_adapter_that_peft_reads_otherwise_is_refused(tmp_path, tiny_options, monkeypatch):
    """What neither list nor schema knows of an adapter changes its scores, which are compared once."""
    start = PeftModel(
        build("llama"),
        LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=["q_proj"], init_lora_weights=False),
    )
    start.save_pretrained(tmp_path / "foreign")
    as_plain = {**adapter_options(tmp_path / "foreign"), "use_rslora": False}
    monkeypatch.setattr("mezo.api.adapter_options", lambda path: as_plain)
    options = {
        name: value for name, value in tiny_options.items() if name not in ("target_modules", "layers_to_transform")
    }
    foreign = str(tmp_path / "foreign")
    with pytest.raises(UserError, match="it is another function where PEFT loads it"):
        train(Config.of(**{**options, "adapter": foreign}))
    assert not Path(options["output_dir"]).exists()
    with pytest.raises(UserError, match="it is another function where PEFT loads it"):
        evaluate_target({name: options[name] for name in ("dev_file", "prompt", "label_words", "model")}, Path(foreign))


def test_weights_of_an_adapter_that_changed_are_refused(finished, tmp_path, capsys):
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    data = bytearray((adapter / WEIGHTS).read_bytes())
    data[-5] ^= 1  # one bit of one number
    (adapter / WEIGHTS).write_bytes(data)
    for form in ("peft", "merged"):
        out = tmp_path / form
        assert main(["export", str(adapter), "--output-dir", str(out), "--format", form]) == 2
        assert "is not what was written (SHA-256)" in capsys.readouterr().err
        assert not out.exists()


def test_what_was_trained_beside_an_adapter_is_hashed_too(tiny_options, capsys):
    """--tuning lora-xs: the adapter is B R, and R is a file of its own, which a resumed run and replay compare with."""
    train(Config.of(**{**tiny_options, "tuning": "lora-xs", "r": 4, "steps": 2, "eval_every": 2}))
    adapter = Path(tiny_options["output_dir"], "adapter")
    said = json.loads((adapter / BASE).read_text())
    assert len(said["theta"]) == len(said["weights"]) == 1
    data = bytearray((adapter / THETA).read_bytes())
    data[-5] ^= 1
    (adapter / THETA).write_bytes(data)
    assert main(["train", "--resume", tiny_options["output_dir"]]) == 2
    assert f"{THETA} is not what was written (SHA-256)" in capsys.readouterr().err
    (adapter / BASE).write_text(json.dumps({name: value for name, value in said.items() if name != "theta"}))
    assert main(["train", "--resume", tiny_options["output_dir"]]) == 2, "as of an older program: by replay"
    assert "is not what the log gives" in capsys.readouterr().err


def test_a_model_directory_with_an_adapter_in_it_is_refused(finished, tmp_path, tiny_options, capsys):
    both = shutil.copytree(tiny_options["model"], tmp_path / "both")
    for name in (PEFT_CONFIG, WEIGHTS):
        shutil.copy(finished / "adapter" / name, both)
    with pytest.raises(UserError, match="it holds an adapter"):
        load_base(Checkpoint(str(both), AutoConfig.from_pretrained(both)), torch.float32)  # as a hub id is looked at
    with pytest.raises(UserError, match="it holds an adapter"):
        train(Config.of(**{**tiny_options, "model": str(both)}))
    assert not Path(tiny_options["output_dir"]).exists()


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_what_a_run_would_leave_is_saved_and_loaded_before_its_first_step(tuning, tiny_options, monkeypatch):
    """A model that loads otherwise than it was saved: the last bit of one number."""

    def damaged(tensors, path, **others):
        first = next(iter(tensors))
        tensors = {**tensors, first: tensors[first].clone()}
        tensors[first].view(torch.int32).view(-1)[0] ^= 1
        save_file(tensors, path, **others)

    def save_model(model, source, directory, save=full.save_model):
        next(model.parameters()).data.view(torch.int32).view(-1)[0] ^= 1
        save(model, source, directory)

    monkeypatch.setattr(adapter, "save_file", damaged)
    monkeypatch.setattr("mezo.runtimes.hf.runtime.save_model", save_model)
    options = {**tiny_options, "tuning": tuning}
    if tuning == "full":
        del options["target_modules"], options["layers_to_transform"]
    with pytest.raises(UserError, match="what this run would leave is not what transformers loads of it"):
        train(Config.of(**options))
    output = Path(options["output_dir"])
    assert not output.exists()
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".mezo")]


def test_fields_at_their_default_or_off_are_no_reason_to_refuse(finished, tmp_path):
    off = {"layer_replication": None, "loftq_config": {}, "use_of_next_year": False, "init_lora_weights": True}
    assert adapter_options(foreign_adapter(finished, tmp_path, **off))["r"] == 8


def test_an_adapter_says_what_its_base_is(finished, tmp_path, tiny_options, capsys):
    """Wherever a base is loaded beside an adapter of ours it must be the one; the file that says so may be left out."""
    other = str(tmp_path / "other")
    model = build("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    shutil.copytree(tiny_options["model"], other)
    model.save_pretrained(other)
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / PEFT_CONFIG).read_text())
    (adapter / PEFT_CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": other}))
    out = str(tmp_path / "out")
    base = ["--steps", "1", "--output-dir", out, "--train-file", tiny_options["train_file"]]
    words = ["--prompt", "{text} It was", "--label-words", " terrible", " great"]
    commands = (
        ["eval", str(finished), "--model", other],
        ["export", str(adapter), "--output-dir", out, "--format", "merged"],
        ["train", "--adapter", str(adapter), *base, *words],  # the model is the one that the adapter names
    )
    for command in commands:
        assert main(command) == 2
        assert "other weights than" in capsys.readouterr().err
        assert not Path(out).exists()
    (adapter / BASE).unlink()
    assert main(commands[2]) == 0


@pytest.mark.parametrize(
    "change",
    [
        {"peft_type": "IA3"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2]]},
        {"alora_invocation_tokens": [3]},
        {"of_next_year": "on"},
        {"bias": "all"},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_adapters_are_refused(finished, tmp_path, tiny_options, change):
    foreign = foreign_adapter(finished, tmp_path, **change)
    with pytest.raises(UserError, match=next(iter(change))):
        train(Config.of(**{**tiny_options, "adapter": str(foreign)}))
    assert not Path(tiny_options["output_dir"]).exists()
