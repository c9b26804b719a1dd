"""Checkpoints that cannot be loaded are refused in one line."""

import json
from pathlib import Path

import pytest
import torch
from transformers import ViTConfig

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
    with pytest.raises(UserError, match=r"--model .*: it could not be loaded") as caught:
        load_base(Checkpoint.of(str(path.parent)), torch.float32)
    assert len(str(caught.value).splitlines()) == 1


def test_a_model_without_a_head_for_text_is_one_line(tmp_path):
    ViTConfig(architectures=["ViTModel"]).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"transformers has no head for text of vit \(AutoModelForCausalLM\): use a"):
        load_base(Checkpoint.of(str(tmp_path)), torch.float32)


def test_a_model_with_code_of_its_own_is_not_run(tmp_path, capsys, tiny_data):
    """Nor is anybody asked whether it may be, and nothing is written."""
    code = tmp_path / "model" / "own.py"
    code.parent.mkdir()
    code.write_text("raise SystemExit('the code was run')\n")
    config = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}, "architectures": ["OwnForCausalLM"]}
    (code.parent / "config.json").write_text(json.dumps(config))
    tokenizer().save_pretrained(code.parent)
    options = {"model": str(code.parent), "train_file": tiny_data["train_file"], "output_dir": str(tmp_path / "run")}
    options |= {"prompt": "{text} It was", "label_words": (" terrible", " great")}
    assert main(["train", *flags_of(options)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(
        "which is never run here: use a model of a family that transformers has (mezo models lists some)"
    )
    assert not (tmp_path / "run").exists()
