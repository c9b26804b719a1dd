"""A model that brings code of its own: refused, and run where a command says that it is trusted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, dynamic_module_utils

from mezo.api import evaluate_target, replay, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.load import Checkpoint, code_hash, load_base, load_tokenizer
from mezo.run.directory import RunDirectory
from mezo.run.trajectory import read_header
from mezo.runtimes.hf.runtime import HFRuntime
from tests.models.test_families import difference, log_odds
from tests.runtimes.hf.test_runtime import examples
from tests.tiny_models import save

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out
"""
LORA = ("target_modules", "layers_to_transform")
EXACT = 1e-5  # of float32 log-probabilities: sums are ordered differently


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with a model of half the logits that its weights give in a Llama."""
    return save_own(tmp_path, monkeypatch, "OwnForCausalLM", MODELING)


def save_own(tmp_path, monkeypatch, architecture, modeling):
    """Write a tiny Llama that says it is of a class of its own, and the code of that; transformers copies it there."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))  # of an engine's processes
    monkeypatch.setattr(sys, "path", [*sys.path])
    as_in_a_new_process()
    path = Path(save("llama", tmp_path / "own"))
    config = json.loads((path / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": [architecture], "auto_map": names}
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_own.py").write_text(CONFIGURATION)
    (path / "modeling_own.py").write_text(modeling)
    return str(path)


def as_in_a_new_process():
    """transformers keeps the code that it imported first, whatever the files say afterwards."""
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        del sys.modules[name]
    AutoModelForCausalLM._model_mapping._extra_content.clear()


def test_it_is_refused_unless_it_is_trusted(own, tiny_options, as_flags, tmp_path, capsys):
    refused = r"--model .*own: it comes with code of its own: give --trust-remote-code if you trust that, or use a mod"
    with pytest.raises(UserError, match=refused):
        Checkpoint.of(own)
    assert not (tmp_path / "modules").exists()
    assert main(["train", *as_flags({**tiny_options, "model": own})]) == 2
    assert "give --trust-remote-code" in capsys.readouterr().err
    assert not Path(tiny_options["output_dir"]).exists()
    assert load_tokenizer(str(own), trusted=True).vocab_size == 64


def test_its_scores_are_its_own(own):
    data = examples(4)
    config = Config.of(
        model=own, trust_remote_code=True, task="sst2", output_dir="unused", target_modules=("q_proj", "up_proj")
    )
    built = HFRuntime(*config.for_runtime)
    built.prepare({"train": data})
    got = difference(built.score("train", range(4)))
    assert torch.allclose(got, log_odds(built.parts.model, data), atol=EXACT, rtol=0)
    stock = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)
    assert torch.allclose(got, log_odds(stock, data), atol=EXACT, rtol=0)
    assert type(stock).__name__ == "OwnForCausalLM"


def test_a_run_says_so_anew_at_each_command(own, tiny_options, tmp_path):
    """Whoever gets a run from somebody else runs none of its model's code by resuming or scoring it."""
    options = {**tiny_options, "model": own, "steps": 4, "eval_every": 2, "layers_to_transform": ()}
    result = train(Config.of(**options, trust_remote_code=True))
    run = tmp_path / "run"
    assert json.loads((run / "config.json").read_text())["trust_remote_code"] is True
    assert RunDirectory(run).read_config().model.trust_remote_code is False
    with pytest.raises(UserError, match="give --trust-remote-code if you trust that"):
        evaluate_target({}, run)
    again = evaluate_target({"trust_remote_code": True}, run)
    assert again["test"]["loss"] == pytest.approx(result["test"]["after"]["loss"], abs=EXACT)
    assert len(read_header(run / "trajectory.jsonl")["code_hash"]) == 64
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="give --trust-remote-code if you trust that"):
        resume(str(run), machine={"steps": 6})
    assert resume(str(run), machine={"steps": 6, "trust_remote_code": True})["test"]["after"]


def test_a_run_goes_on_with_the_code_that_it_began_with(own, tiny_options, tmp_path):
    """The weights are the same, and so are all names and shapes: nothing else would show that losses are others."""
    options = {**tiny_options, "model": own, "steps": 4, "eval_every": 2, "trust_remote_code": True}
    train(Config.of(**options))
    before, log = code_hash_of(own), tmp_path / "run/trajectory.jsonl"
    assert read_header(log)["code_hash"] == before
    assert json.loads((tmp_path / "run/adapter/mezo_base.json").read_text())["code_hash"] == before
    modeling, configuration = Path(own, "modeling_own.py"), Path(own, "configuration_own.py")
    for path in (modeling, configuration):
        text = path.read_text()
        path.write_text(text + "\n")
        assert code_hash_of(own) != before
        path.write_text(text)
    assert code_hash_of(own) == before
    modeling.write_text(MODELING.replace("0.5", "0.25"))
    (tmp_path / "run/result.json").unlink()
    as_in_a_new_process()
    with pytest.raises(UserError, match="code_hash of the log and of the model at hand differ"):
        resume(str(tmp_path / "run"), machine={"steps": 6, "trust_remote_code": True})
    first, *steps = log.read_text().splitlines(keepends=True)
    older = {name: value for name, value in json.loads(first).items() if name != "code_hash"}
    log.write_text(json.dumps(older) + "\n" + "".join(steps))  # as programs wrote it that hashed no code
    assert resume(str(tmp_path / "run"), machine={"steps": 6, "trust_remote_code": True})["steps"] == 6
    replay(str(tmp_path / "run"), str(tmp_path / "replayed"))  # which needs no code


def code_hash_of(path):
    as_in_a_new_process()
    return code_hash(load_base(Checkpoint.of(path, trusted=True), torch.float32))


def test_a_model_of_transformers_has_no_code_of_its_own(tmp_path):
    assert code_hash(load_base(Checkpoint.of(save("llama", tmp_path)), torch.float32)) == ""


def test_what_it_leaves(own, tiny_options, tmp_path):
    """The merged model brings the code too; all weights are not trained, since a run loads what it leaves."""
    options = {**tiny_options, "model": own, "steps": 4, "eval_every": 2, "trust_remote_code": True}
    with pytest.raises(UserError, match=r"--tuning full: .* comes with code of its own, without which what a"):
        train(Config.of(**{n: v for n, v in options.items() if n not in LORA}, tuning="full"))
    assert not (tmp_path / "run").exists()
    train(Config.of(**options))
    run, merged = tmp_path / "run", tmp_path / "merged"
    flags = ["export", str(run), "--output-dir", str(merged), "--format", "merged"]
    assert main(flags) == 2
    assert not merged.exists()
    assert main([*flags, "--trust-remote-code"]) == 0
    base = AutoModelForCausalLM.from_pretrained(own, trust_remote_code=True)
    ids = torch.arange(3, 20)[None]
    want = PeftModel.from_pretrained(base, str(run / "adapter"))(ids).logits
    got = AutoModelForCausalLM.from_pretrained(merged, trust_remote_code=True)(ids).logits
    assert torch.allclose(got, want, atol=EXACT, rtol=0)
