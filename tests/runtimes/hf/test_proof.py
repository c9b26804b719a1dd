"""The proof at the start in 16 bits: what it compares with, and what it allows."""

import pytest
import torch

from mezo.config import Config
from mezo.data.example import Example
from mezo.runtimes.hf.proof import StartProof
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.reference import in_float32, largest_difference, reference_log_probs
from mezo.runtimes.rows import rows_of
from mezo_kernels import lora_init
from tests.tiny_models import save

DATA = [Example(tuple(range(3, 9 + 2 * n)), ((5,), (9,)), n % 2) for n in range(4)]
PROOF_ROWS = {"train": [rows_of(example) for example in DATA]}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save("llama", tmp_path_factory.mktemp("llama"))


def runtime(model, dtype, **options):
    built = HFRuntime(*Config.of(model=model, output_dir="unused", task="sst2", dtype=dtype, **options).for_runtime)
    if built.parts.prefix is None:
        for copy, shape in zip(built.plus.tensors, built.spec.shapes.values(), strict=True):
            copy.copy_(lora_init(3, "noise", shape))
        built._use(built.plus)
    return built


@torch.no_grad()
def test_a_16_bit_model_widened_is_the_float32_model_of_its_weights(llama):
    narrow, wide = (runtime(llama, dtype, linear="torch") for dtype in ("bfloat16", "float32"))
    proof = StartProof(PROOF_ROWS, 0, narrow.device, narrow.dtype)
    before = {name: p.clone() for name, p in narrow.parts.model.named_parameters()}
    for (name, p), of in zip(wide.parts.model.named_parameters(), before.values(), strict=True):
        assert p.shape == of.shape, name
        p.data = of.float()
    with in_float32(narrow.parts.model):
        widened = reference_log_probs(narrow.parts.model, proof.batch)
    expected = reference_log_probs(wide.parts.model, proof.batch)
    assert largest_difference(widened, expected, proof.batch.valid) < 1e-5
    own = reference_log_probs(narrow.parts.model, proof.batch)
    assert largest_difference(own, expected, proof.batch.valid) > 1e-4
    assert all(torch.equal(p, before[name]) for name, p in narrow.parts.model.named_parameters())


@torch.no_grad()
def test_an_error_of_the_models_own_size_is_allowed_and_a_larger_one_is_not(llama):
    built = runtime(llama, "bfloat16")
    proof = StartProof(PROOF_ROWS, 0, built.device, built.dtype)
    own = reference_log_probs(built.parts.model, proof.batch)
    with in_float32(built.parts.model):
        exact = reference_log_probs(built.parts.model, proof.batch)
    why_wrong = lambda log_probs: proof.why_wrong(built.parts.model, log_probs)  # noqa: E731
    assert why_wrong(own) is None
    assert why_wrong(exact + 1.5 * (own - exact)) is None
    assert "differ by 0.5 from its full forward pass in float32" in why_wrong(exact + 0.5)
    assert "are NaN in torch.bfloat16, the model's own are not" in why_wrong(exact * torch.nan)


@torch.no_grad()
def test_what_is_right_is_computed_once_for_weights_of_a_name(llama):
    built = runtime(llama, "float32", linear="torch")
    proof = StartProof(PROOF_ROWS, 0, built.device, built.dtype)
    right = reference_log_probs(built.parts.model, proof.batch)
    model = built.parts.model
    assert proof.why_wrong(model, right, weights="plus") is None
    built._use(built.minus)  # other weights, whose name says so
    assert proof.why_wrong(model, right, weights="plus") is None
    assert "differ by" in proof.why_wrong(model, right, weights="minus")
    assert "differ by" in proof.why_wrong(model, right)


@pytest.mark.parametrize("options", [{}, {"tuning": "prefix"}, {"layers_to_transform": (2,)}, {"directions": 2}])
def test_every_way_of_scoring_is_proved_in_bfloat16(llama, options):
    built = runtime(llama, "bfloat16", batch_size=4, **options)
    built.prepare({"train": DATA})
    assert built.scorer.rowwise or "directions" not in options
