"""The model that bench/serve_learning.py divides between two ranks."""

import pytest
import serve_learning
import torch
from transformers import AutoModelForCausalLM

IDS = torch.arange(3, 23)[None]


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def test_key_heads_of_zeros_leave_a_model_the_same_function(tiny_model, tmp_path):
    before = load(tiny_model)
    heads = before.config.num_key_value_heads * 2
    after = load(serve_learning.with_key_heads(tiny_model, heads, tmp_path))
    assert after.config.num_key_value_heads == heads
    widths = [len(each.model.layers[0].self_attn.q_proj.weight) for each in (before, after)]
    assert widths[0] < widths[1]
    with torch.no_grad():
        assert torch.allclose(after(IDS).logits, before(IDS).logits, atol=1e-5)


def test_a_model_that_became_another_one_is_refused(tiny_model, tmp_path, monkeypatch):
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda tensor, by: pad(tensor, by, value=0.5))
    with pytest.raises(SystemExit, match="another one"):
        serve_learning.with_key_heads(tiny_model, 4, tmp_path)
