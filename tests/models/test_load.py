"""Checkpoints that cannot be loaded are refused in one line."""

import json
from pathlib import Path

import pytest
import torch

from mezo.errors import UserError
from mezo.models.load import Checkpoint, load_base
from tests.tiny_models import save


def test_a_quantised_checkpoint_without_its_library_is_one_line(tmp_path):
    path = Path(save("llama", tmp_path)) / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}})
    )
    with pytest.raises(UserError, match=r"--model .*: it could not be loaded") as caught:
        load_base(Checkpoint.of(str(path.parent)), torch.float32)
    assert len(str(caught.value).splitlines()) == 1
