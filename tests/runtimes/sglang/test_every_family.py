"""Every family of the table on the engine: it trains as in process, or SGLang's reason is said before it starts."""

import os

import pytest

from mezo.errors import UserError
from mezo.method.step import Step, Update
from mezo.models.proved import proved, record
from tests import tiny_families
from tests.runtimes.sglang.conftest import engine, examples, noisy, reference, worst
from tests.tiny_families import FAMILIES

RECORD = os.environ.get("MEZO_RECORD_FAMILIES")  # make families
CLOSE = 5e-5  # of log-odds in float32, two implementations
SIZES = {
    "mistral": {"sliding_window": None},  # SGLang's class has none
    **{name: {"intermediate_size": 64} for name in ("olmo2", "phi3")},  # on a CPU SGLang pads to multiples of 32
    "phi": {"num_key_value_heads": 4},  # SGLang's class has no grouped heads
}
UNCAPPED = {"gemma2": {"attn_logit_softcapping": None}}  # of a model without what is refused
OTHERS = {"phi": ("q_proj", "v_proj"), "phi3": ("o_proj", "down_proj")}  # what SGLang has LoRA on, beside the default


def outcome(name, path, **options):
    """What becomes of a few steps on the engine, in words."""
    data = examples(6)
    try:
        with engine(path, data, max_length=64, **options) as runtime:
            runtime.load(noisy(runtime))
            runtime.update([Update([5], [1e-3])], Step([7], 1e-2))
            got = runtime.score_pairs("train", range(6))[0]
    except UserError as error:
        return str(error).split(": ", 1)[1].split(": use --runtime hf")[0].split("; see ")[0]
    expected = reference(path, data, **options)
    expected.load(noisy(expected))
    expected.update([Update([5], [1e-3])], Step([7], 1e-2))
    for a, b in zip(got, expected.score_pairs("train", range(6))[0], strict=True):
        assert worst(a, b) < CLOSE
    return "trains"


@pytest.mark.slow  # test_support.py: what is refused, by SGLang's own classes; test_runs.py: runs of Llama and Qwen2
@pytest.mark.parametrize("name", list(FAMILIES))
def test_family(name, own_engine, tmp_path):
    path = tiny_families.save(name, tmp_path, **SIZES.get(name, {}))
    seen = outcome(name, path)
    if name in OTHERS:
        seen += f"; {', '.join(OTHERS[name])}: {outcome(name, path, target_modules=OTHERS[name])}"
    if name in UNCAPPED:
        seen += f"; without it: {outcome(name, tiny_families.save(name, tmp_path / 'other', **UNCAPPED[name]))}"
    if RECORD:
        record(name, sglang=seen)
    assert proved()[name]["sglang"] == seen
