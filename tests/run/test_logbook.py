"""Showing, checking and cutting a log; exporting and importing adapters."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from mezo.api import resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.run import logbook
from mezo.run.adapter import PEFT_CONFIG, WEIGHTS
from mezo.run.directory import RunDirectory
from mezo.run.export import export
from mezo.run.replay import rebuild
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


@pytest.mark.parametrize("change", [{"peft_type": "IA3"}, {"use_dora": True}, {"modules_to_save": ["lm_head"]}])
def test_other_adapters_are_refused(finished, tmp_path, tiny_options, change):
    foreign = tmp_path / "foreign"
    shutil.copytree(finished / "adapter", foreign)
    config = json.loads((foreign / PEFT_CONFIG).read_text())
    (foreign / PEFT_CONFIG).write_text(json.dumps({**config, **change}))
    with pytest.raises(UserError, match=next(iter(change))):
        train(Config.of(**{**tiny_options, "adapter": str(foreign)}))
    assert not Path(tiny_options["output_dir"]).exists()
