"""A model that brings code of its own: refused, and run where a command says that it is trusted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, dynamic_module_utils

from mezo.api import evaluate_target, resume, train
from mezo.cli.main import main
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.load import Checkpoint, load_tokenizer
from mezo.run.directory import RunDirectory
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
EXACT = 1e-5  # of float32 log-probabilities: sums are ordered differently


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A directory with a model of half the logits that its weights give in a Llama."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = Path(save("llama", tmp_path / "own"))
    config = json.loads((path / "config.json").read_text())
    names = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config |= {"model_type": "own", "architectures": ["OwnForCausalLM"], "auto_map": names}
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_own.py").write_text(CONFIGURATION)
    (path / "modeling_own.py").write_text(MODELING)
    return str(path)


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
    (run / "result.json").unlink()
    with pytest.raises(UserError, match="give --trust-remote-code if you trust that"):
        resume(str(run), machine={"steps": 6})
    assert resume(str(run), machine={"steps": 6, "trust_remote_code": True})["test"]["after"]
