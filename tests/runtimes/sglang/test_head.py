"""An adapted lm_head of an engine in 16 bits: its logits are float32, as those of a plain head are."""

import pytest

from mezo.method.step import Step
from tests.runtimes.sglang.conftest import engine, examples, noisy

HEAD = {"layers_to_transform": (2,), "target_modules": ("q_proj", "lm_head"), "dtype": "bfloat16"}


@pytest.mark.slow  # an engine of its own; StartProof.check_fine has a doctest, the rows of the head test_shared
@pytest.mark.parametrize("tied", [False, True])
def test_logits_of_an_adapted_16_bit_head_are_float32(model, tied):
    """Without `head.in_float32` the start is refused. A perturbation of a thousandth shows in every score."""
    with engine(model("llama", tie_word_embeddings=tied), examples(12), **HEAD) as runtime:
        runtime.load(noisy(runtime))
        runtime.perturb(Step([7], 1e-3))
        plus, minus = runtime.score_pairs("train", range(12))[0]
        differences = (plus - minus).abs()
        assert (differences > 0).all()
        assert differences.max() < 0.1
