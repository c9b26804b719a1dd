"""Pages of a mapped checkpoint go back to the system once their weights are packed or quantised."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mezo.models.linear import PackedLinear, pack
from mezo.models.load import Checkpoint, load_base
from mezo.models.mapped import MAPS, give_back
from tests.tiny_models import save

pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="maps of a process are Linux's")
LINEAR_BYTES = 4 * 3 * (2 * 512**2 + 2 * 512 * 256 + 3 * 512 * 2048)  # of the layers below
OTHERS = 12e6  # bytes of libraries that are read meanwhile


def mapped_bytes():
    """Resident bytes of mapped files."""
    return 1024 * int(re.search(r"RssFile:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    sizes = {"hidden_size": 512, "intermediate_size": 2048}
    return save("llama", tmp_path_factory.mktemp("model"), **sizes)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_packed_weights_are_held_once(model):
    base, plain = (load_base(Checkpoint.of(model), torch.float32) for _ in range(2))
    weights = {name: weight.clone() for name, weight in base.model.named_parameters()}  # all of the file is read
    held = mapped_bytes()
    assert pack(base.model, set()) == LINEAR_BYTES
    assert held - mapped_bytes() > LINEAR_BYTES - OTHERS
    for name, module in base.model.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(module.weight, weights[f"{name}.weight"])
    for name, weight in plain.model.named_parameters():  # of another mapping of the file
        assert torch.equal(weight, weights[name])


@pytest.mark.skipif(not find_spec("torchao"), reason="torchao is not installed")
def test_weights_as_they_were_are_not_held_beside_quantised_ones(model):
    load_base(Checkpoint.of(model, quantization="int8"), torch.float32)  # imports what it needs
    held = mapped_bytes()
    base = load_base(Checkpoint.of(model, quantization="int8"), torch.float32)
    assert mapped_bytes() - held < OTHERS
    assert torch.equal(
        base.model.embed_tokens.weight, load_base(Checkpoint.of(model), torch.float32).model.embed_tokens.weight
    )


def test_what_lies_in_no_file_is_left_alone():
    weight = torch.arange(1 << 20, dtype=torch.float32)
    assert give_back([weight]) == 0
    assert torch.equal(weight, torch.arange(1 << 20, dtype=torch.float32))
