"""Adapters on every layer: each version of theta has a namespace of its own."""

import pytest
import torch

from mezo.errors import RunError, UserError
from mezo.method.step import Step, Update
from mezo.runtimes.base import TokenCount
from mezo.runtimes.hf.runtime import HFRuntime
from tests.runtimes.sglang.conftest import ALL, engine, examples, noisy, options, reference, torch_equal, worst

pytestmark = pytest.mark.engine("all")  # layers
ROUNDING = 5e-5  # float32 log-probabilities of order 10 by another implementation of the same model
INSTRUCTION = tuple(range(3, 43))
A = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def data():
    return [*examples(12, prefix=INSTRUCTION, low=3, high=9), *examples(12, several=True)]


@pytest.fixture(scope="module")
def qwen(model):
    return model("qwen2")


@pytest.fixture
def running(qwen, data):
    with engine(qwen, data, target_modules=ALL, num_perturbations=2) as runtime:
        yield runtime


@pytest.fixture
def runtime(running):
    """The engine at a theta that has an effect, both perturbations written."""
    running.load(noisy(running))
    running.perturb(Step([7, 8], 1e-2))
    return running


@pytest.fixture(scope="module")
def plain(qwen, data):
    return reference(qwen, data, target_modules=ALL)


def test_scores_are_those_of_transformers(runtime, plain):
    """Both signs of both perturbations, one batch; options of one token and of several; and theta itself."""
    plain.load(noisy(plain))
    pairs = runtime.score_pairs("train", [0, 5, 13, 20])
    assert len(pairs) == 2
    for seed, pair in zip((7, 8), pairs, strict=True):
        plain.perturb(Step([seed], 1e-2))
        expected = plain.score_pairs("train", [0, 5, 13, 20])[0]
        for got, want in zip(pair, expected, strict=True):
            assert worst(got, want) < ROUNDING
    assert worst(*pairs[0]) > 10 * ROUNDING, "the signs differ"
    assert worst(runtime.score("train", range(9)), plain.score("train", range(9))) < ROUNDING


def test_both_signs_are_one_batch(runtime, monkeypatch):
    """One call, the same rows for every slot, and the same number of tokens from the cache for each."""
    calls = []
    generate = runtime.engine.generate

    def listen(**request):
        calls.append((request, generate(**request)))
        return calls[-1][1]

    monkeypatch.setattr(runtime.engine, "generate", listen)
    runtime.score_pairs("train", range(12, 15))
    scored = [(request, answers) for request, answers in calls if request.get("return_logprob")]
    assert len(scored) == 1
    names = scored[0][0]["lora_path"]
    cached = [answer["meta_info"]["cached_tokens"] for answer in scored[0][1]]
    assert cached[:6] == cached[6:12] == cached[12:18] == cached[18:]
    assert sum(cached) > 0
    assert {name: names.count(name) for name in names} == dict.fromkeys(("plus0", "minus0", "plus1", "minus1"), 6)
    rows = [tuple(ids) for ids in scored[0][0]["input_ids"]]
    assert rows[:6] == rows[6:12] == rows[12:18] == rows[18:]


def test_equal_requests_in_one_step_share_their_prefix(runtime):
    runtime.tokens = TokenCount()
    runtime.score_pairs("train", range(8))
    tails = sum(len(e.prompt) - len(INSTRUCTION) for e in runtime.examples["train"][:8])
    assert runtime.tokens.computed == 4 * (len(INSTRUCTION) + tails), "the prefix once for each slot, then the tails"
    assert runtime.tokens.reused == 4 * 8 * len(INSTRUCTION)


def test_options_of_an_example_share_its_prompt(runtime):
    runtime.tokens = TokenCount()
    runtime.score_pairs("train", [12])
    prompt = len(runtime.examples["train"][12].prompt)
    ahead, rest = prompt - 1, 2 + 3  # of each option's row all but the last token, and the prompt's last one
    assert runtime.tokens.computed == 4 * (ahead + rest)


def test_steps_and_theta_are_the_hf_runtimes_bit_for_bit(runtime, plain):
    plain.load(noisy(plain))
    updates = [Update([5, 6], [1e-3, -2e-3], 0.999)]
    runtime.update(updates, Step([9], 1e-2))
    plain.update(updates, Step([9], 1e-2))
    assert torch_equal(runtime.theta(), plain.theta())


def test_evaluation_leaves_both_slots_as_they_were(runtime):
    before = runtime.score_pairs("train", range(4))
    runtime.score("train", range(4))
    for a, b in zip(before, runtime.score_pairs("train", range(4)), strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


def test_equal_weights_in_both_slots_score_equally(runtime):
    runtime.equalise()
    for plus, minus in runtime.score_pairs("train", range(8)):
        assert float((plus - minus).abs().max()) < 2e-6


def test_a_namespace_kept_after_an_update_is_caught(runtime, plain, monkeypatch):
    """The mutation that must not survive: stale keys and values give other losses than no reuse."""
    step = [Update([5], [0.3])]
    runtime.score_pairs("train", range(4))
    runtime.update(step, Step([7, 8], 1e-2))
    right = runtime.score_pairs("train", range(4))[0][0]
    runtime.load(noisy(runtime))
    runtime.perturb(Step([7, 8], 1e-2))
    runtime.score_pairs("train", range(4))
    salt = runtime.cache.namespace
    runtime.update(step, Step([7, 8], 1e-2))
    runtime.cache.namespace = salt
    stale = runtime.score_pairs("train", range(4))[0][0]
    plain.load(noisy(plain))
    plain.update(step, Step([7], 1e-2))
    expected = plain.score_pairs("train", range(4))[0][0]
    assert worst(right, expected) < ROUNDING
    assert worst(stale, expected) > 100 * ROUNDING


@pytest.mark.parametrize("what", ["theta", "plus", "minus"])
def test_verify_names_rank_tensor_and_index(runtime, what):
    runtime.update([Update([5], [1e-3])], Step([7, 8], 1e-2), watch=True)
    assert runtime.verify() is None
    runtime._call("test_flip", rank=0, what=what, name=A, index=5)
    label = what if what == "theta" else f"{what} of perturbation 0"
    assert runtime.verify().startswith(f"rank 0: {label} of {A} at index 5: expected ")


def test_a_failing_rank_is_named(runtime):
    with pytest.raises(RunError, match="failed in test_fail: rank 0: ValueError: told to fail"):
        runtime._call("test_fail", rank=0)


def test_requests_that_the_base_model_scored_are_caught(runtime, monkeypatch):
    generate = runtime.engine.generate

    def forget_the_first(**request):
        request["lora_path"][0] = None
        return generate(**request)

    monkeypatch.setattr(runtime.engine, "generate", forget_the_first)
    for score in (runtime.score_pairs, runtime.score):
        with pytest.raises(RunError, match=r"saw the requests .*'other': .* some were not scored by the adapter"):
            score("train", range(3))
        runtime._sent.clear()


def test_an_evicted_slot_is_caught(qwen, running):
    """What the slot held is gone."""
    running._call("test_evict", name="minus1")
    with pytest.raises(RunError, match="adapter slot minus1 was evicted by the engine"):
        running.perturb(Step([7, 8], 1e-2))


def test_bad_requests_are_errors_and_not_hangs(running):
    with pytest.raises(RunError, match="the SGLang engine refused a request"):
        running.engine.generate(input_ids=[[5, 6]], lora_path=["nobody"], sampling_params={"max_new_tokens": 0})


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"engine_arg": ("dp_size=2",)}, "dp_size=2: every replica .* use --tp"),
        ({"engine_arg": ("nnodes=2",)}, "--tp 1 cannot be divided among nnodes=2"),
        ({"engine_arg": ("nnodes=2",), "tp": 2}, "nnodes: give dist_init_addr=HOST:PORT"),
        ({"engine_arg": ("nnodes=2", "node_rank=2"), "tp": 2}, "node_rank must be from 0 to nnodes - 1"),
        ({"engine_arg": ("tp_size=2",)}, "--engine-arg tp_size is decided by --tp"),
        ({"engine_arg": ("atention_backend=triton",)}, "no such argument; did you mean .*attention_backend"),
        ({"engine_arg": ("quantization",)}, "--engine-arg must be key=value, got 'quantization'"),
        ({"engine_arg": ("max_loras_per_batch=2",)}, "must be at least 3"),
        ({"tp": 3}, "--tp 3: .* has 4 attention heads, which 3 ranks cannot share"),
        ({"trunk_cache": "cpu"}, "--trunk-cache cpu belongs to --runtime hf"),
        ({"backend": "triton"}, "--backend triton does not run here"),
    ],
)
def test_arguments_that_cannot_be_are_refused_before_anything_starts(qwen, others, message, monkeypatch):
    from mezo.runtimes.sglang.runtime import SGLangRuntime

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=message):
        SGLangRuntime(*options(qwen, runtime="sglang", **others).for_runtime)


def test_masked_models_are_refused(model):
    from mezo.runtimes.sglang.runtime import SGLangRuntime

    with pytest.raises(UserError, match="fills masks, which SGLang does not score: use --runtime hf"):
        SGLangRuntime(*options(model("bert"), runtime="sglang").for_runtime)


def test_engine_options_need_the_engine(qwen):
    with pytest.raises(UserError, match="--tp 2 belongs to --runtime sglang, and this run has --runtime hf"):
        options(qwen, tp=2)


def test_the_two_runtimes_describe_the_same_adapter(running, qwen, data):
    assert running.spec == HFRuntime(*options(qwen, target_modules=ALL).for_runtime).spec
    assert "a radix namespace for each version of theta" in running.describe()


def test_slots_are_perturbed_by_the_engines_dtype(running):
    assert running.ranks[0]["dtype"] == str(torch.float32)
