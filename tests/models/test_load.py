"""Checkpoints that cannot be loaded are refused in one line."""

import json
import os
import re
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, ViTConfig

from mezo.cli.main import main
from mezo.errors import UserError
from mezo.models.load import Checkpoint, load_base
from tests.tiny_data import flags_of
from tests.tiny_models import save, tokenizer


def test_a_quantised_checkpoint_without_its_library_is_one_line(tmp_path):
    path = Path(save("llama", tmp_path)) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    wanted = r"its weights are quantised .*: install what that names, or use the model"
    with pytest.raises(UserError, match=wanted) as caught:
        load_base(Checkpoint.of(str(path.parent)), torch.float32)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_without_a_head_for_text_is_one_line(tmp_path):
    ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"transformers has no head for text of vit \(AutoModelForCausalLM\): use a"):
        load_base(Checkpoint.of(str(tmp_path)), torch.float32)


@pytest.fixture
def refused(tmp_path, tiny_data, capsys, monkeypatch):
    """From a model and options, the one line in which `mezo train` refuses them; it must write nothing."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))

    def line(model, **others):
        before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
        options = {"model": str(model), "train_file": tiny_data["train_file"], "output_dir": str(tmp_path / "run")}
        options |= {"prompt": "{text} It was", "label_words": (" terrible", " great")} | others
        assert main(["train", *flags_of(options)]) == 2
        assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
        error = [text for text in capsys.readouterr().err.splitlines() if text.startswith("mezo: error: ")]
        assert len(error) == 1
        return error[0]

    return line


def test_a_model_that_makes_no_text_is_refused(tmp_path, refused):
    ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    assert refused(tmp_path / "model").endswith("use a model that continues text, fills masks or answers by a decoder")


def test_weights_of_other_shapes_than_the_configuration_are_refused(tmp_path, refused):
    path = Path(save("llama", tmp_path / "model")) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "intermediate_size": 128}))
    assert refused(path.parent).endswith(
        "other shapes than its config.json says: give a model whose files belong together"
    )


def test_a_file_of_weights_that_was_cut_off_is_refused(tmp_path, refused):
    path = Path(save("llama", tmp_path / "model")) / "model.safetensors"
    os.truncate(path, 20000)
    assert re.search(r"a file of its weights is damaged \(.*\): fetch it again", refused(path.parent))


@pytest.mark.parametrize(("family", "auto"), [("llama", AutoModel), ("bert", AutoModel)])
def test_a_checkpoint_without_its_head_is_refused(family, auto, tmp_path, refused):
    """transformers would draw the head at random, another one at each load."""
    path = save(family, tmp_path / "whole")
    auto.from_pretrained(path).save_pretrained(tmp_path / "model")
    tokenizer(masked=family == "bert").save_pretrained(tmp_path / "model")
    error = refused(tmp_path / "model")
    assert re.search(r"its checkpoint lacks \d+ weights of \w+, such as \S+, which would be random numbers: use", error)
    assert error.endswith("--head classification or linear, which train one")


def test_a_classifier_as_another_model_is_refused(tmp_path, refused):
    AutoModelForSequenceClassification.from_pretrained(save("llama", tmp_path / "whole")).save_pretrained(
        tmp_path / "model"
    )
    tokenizer().save_pretrained(tmp_path / "model")
    assert refused(tmp_path / "model").endswith("is a LlamaForSequenceClassification: give --head classification")


def test_a_model_with_code_of_its_own_is_not_run(tmp_path, refused):
    """Nor is anybody asked whether it may be."""
    code = tmp_path / "model" / "own.py"
    code.parent.mkdir()
    code.write_text("raise SystemExit('the code was run')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}, "architectures": ["OwnForCausalLM"]}
    (code.parent / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(code.parent)
    assert refused(code.parent).endswith(
        "give --trust-remote-code if you trust that, or use a model of a family that transformers has (mezo models"
        " lists some)"
    )
