"""Adapters that change no key or value: both signs and all steps share one namespace."""

import pytest

from mezo.errors import RunError, UserError
from mezo.method.step import Step, Update
from mezo.runtimes.base import TokenCount
from tests.runtimes.sglang.conftest import LAST, engine, examples, noisy, reference, worst

ROUNDING = 5e-5
last = pytest.mark.engine("last")  # layer alone
keys = pytest.mark.engine("keys")
ADAPTED = {"layers_to_transform": (2,), "target_modules": LAST}
WITH_KEYS = {"layers_to_transform": (2,), "target_modules": ("q_proj", "k_proj", "v_proj")}


@pytest.fixture(scope="module")
def data():
    return examples(24)


@pytest.fixture(scope="module")
def llama(model):
    return model("llama")


@pytest.fixture
def running(llama, data):
    with engine(llama, data, **ADAPTED) as runtime:
        runtime.load(noisy(runtime))
        runtime.perturb(Step([99], 1e-2))
        yield runtime


@last
def test_every_request_after_a_prompts_first_visit_computes_one_token(running, llama, data):
    plain = reference(llama, data, **ADAPTED)
    plain.load(noisy(plain))
    batch, tokens = [0, 3, 7, 11], []
    for step in range(5):
        update = [Update([step], [0.02])]
        for runtime in (running, plain):
            runtime.update(update, Step([100 + step], 1e-2))
        running.tokens = TokenCount()
        got, want = running.score_pairs("train", batch)[0], plain.score_pairs("train", batch)[0]
        assert max(worst(a, b) for a, b in zip(got, want, strict=True)) < ROUNDING
        tokens.append((running.tokens.scored, running.tokens.computed))
    prompts = sum(len(data[i].prompt) for i in batch)
    first_visit = prompts - len(batch)
    assert tokens[0] == (2 * prompts + first_visit, first_visit + 2 * len(batch))
    assert tokens[1:] == [(2 * prompts, 2 * len(batch))] * 4


@last
def test_a_batch_of_requests_is_one_forward_pass(running, monkeypatch, caplog):
    """By the engine's own record of the batches it ran; where it is not, a line says so, once."""
    running.score_pairs("train", range(6))
    assert running.divided == 0
    generate = running.engine.generate

    def in_two(**request):
        parts = [{k: v[i::2] if isinstance(v, list) else v for k, v in request.items()} for i in range(2)]
        return [answer for pair in zip(*(generate(**part) for part in parts), strict=True) for answer in pair]

    monkeypatch.setattr(running.engine, "generate", in_two)
    with caplog.at_level("WARNING", "mezo"):
        for _ in range(2):
            running.score_pairs("train", range(6))
    assert running.divided == 2
    assert caplog.text.count("computed 1 batches of requests in 2 forward passes") == 1


@last
def test_flushing_changes_nothing(running):
    running.update([Update([77], [0.1])], Step([78], 1e-2))
    warm = running.score_pairs("train", range(8))[0]
    running._flush()
    cold = running.score_pairs("train", range(8))[0]
    assert max(float((a - b).abs().max()) for a, b in zip(warm, cold, strict=True)) < 1e-5


@last
def test_evaluation_shares_the_namespace(running):
    running.score_pairs("train", range(8))
    running.eval_tokens = TokenCount()
    running.score("train", range(8))
    assert running.eval_tokens.computed == 8


@last
def test_forgetting_the_adapter_is_caught_here_too(running, monkeypatch):
    generate = running.engine.generate

    def base(**request):
        request["lora_path"] = [None] * len(request["lora_path"])
        return generate(**request)

    monkeypatch.setattr(running.engine, "generate", base)
    with pytest.raises(RunError, match="some were not scored by the adapter they belong to"):
        running.score_pairs("train", range(3))


@last
def test_the_plan_says_what_it_is(running):
    assert "one radix namespace for all" in running.describe()


@pytest.mark.parametrize(
    "tied",
    [pytest.param(True, marks=pytest.mark.engine("head")), pytest.param(False, marks=pytest.mark.slow)],
)
def test_an_adapted_head_shares_the_namespace_too(model, data, tied):
    """Several requests a call, of unlike lengths and both signs: each row of the head gets its own adapter."""
    path = model("llama", tie_word_embeddings=tied)
    adapted = {"layers_to_transform": (2,), "target_modules": (*LAST, "lm_head")}
    plain = reference(path, data, **adapted)
    with engine(path, data, **adapted) as runtime:
        assert "one radix namespace for all" in runtime.describe()
        for one in (runtime, plain):
            one.load(noisy(one))
        for step in range(3):
            for one in (runtime, plain):
                one.update([Update([step], [0.02])], Step([100 + step], 1e-1))
            runtime.tokens = TokenCount()
            got, want = runtime.score_pairs("train", range(9))[0], plain.score_pairs("train", range(9))[0]
            assert max(worst(a, b) for a, b in zip(got, want, strict=True)) < ROUNDING
            assert (got[0] - got[1]).abs().max() > 100 * ROUNDING
        assert runtime.tokens.computed == 2 * 9


@pytest.fixture
def trusting(monkeypatch):
    """The trainer's plan is overruled: it takes keys and values for independent of theta."""
    monkeypatch.setattr("mezo.models.parts.why_kv_depends", lambda *arguments: None)


@keys
@last
def test_adapters_that_a_batch_mixes_up_are_found_at_the_start(llama, monkeypatch):
    """Requests of several adapters reach the engine with these in another order, as a batch that mixes them would."""
    from mezo.runtimes.sglang.runtime import SGLangRuntime

    generate = SGLangRuntime._generate

    def mixed(runtime, requests, *arguments, **wanted):
        slots, ids = zip(*requests, strict=True)
        return generate(runtime, list(zip(slots[::-1], ids, strict=True)), *arguments, **wanted)

    monkeypatch.setattr(SGLangRuntime, "_generate", mixed)
    mixes = pytest.raises(UserError, match=r"adapters in one batch change each other's log-probabilities by .*allowed")
    with mixes, engine(llama, examples(8), target_modules=LAST, layers_to_transform=(2,)):
        pass


@keys
def test_sharing_with_key_adapters_is_refused_by_the_workers(llama, data, trusting):
    """They look at what is trained themselves."""
    with (
        pytest.raises(UserError, match=r"may not share a cache: .*k_proj.* may change keys or values"),
        engine(llama, data, **WITH_KEYS),
    ):
        pass


@keys
def test_sharing_with_key_adapters_is_wrong(llama, data, trusting, unguarded):
    """Forced past both guards, the start-up proof refuses it."""
    with (
        pytest.raises(UserError, match=r"log-probabilities differ by .* from transformers with PEFT"),
        engine(llama, data, **WITH_KEYS),
    ):
        pass


@keys
def test_forced_sharing_gives_wrong_losses(llama, data, trusting, unguarded, monkeypatch):
    monkeypatch.setattr("mezo.runtimes.sglang.proof.StartProof.check", lambda *arguments: None)
    monkeypatch.setattr("mezo.runtimes.sglang.proof.StartProof.between", lambda *arguments: 0.0)
    with engine(llama, data, **WITH_KEYS) as runtime:
        plain = reference(llama, data, **WITH_KEYS)
        for one in (runtime, plain):
            one.load(noisy(one))
            one.perturb(Step([7], 1e-1))
        runtime.score_pairs("train", range(8))
        for one in (runtime, plain):
            one.update([Update([8], [1.0])], Step([9], 1e-1))
        got, want = runtime.score_pairs("train", range(8))[0], plain.score_pairs("train", range(8))[0]
        assert max(worst(a, b) for a, b in zip(got, want, strict=True)) > 100 * ROUNDING


@pytest.mark.slow  # engines of their own, kernels interpreted
@pytest.mark.parametrize("backend", ["triton", "csgmv"])
def test_the_lora_kernels_of_gpus_score_the_same(llama, monkeypatch, backend):
    """SGLang's Triton kernels for LoRA, interpreted, on weights of ours; each request is computed anew.

    csgmv is the default on a GPU. Under a scale that changes no bit all slots are equal, and so must both signs be.
    """
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    data = examples(2, low=5, high=6)
    plain = reference(llama, data, **ADAPTED)
    with engine(llama, data, radix="off", engine_arg=(f"lora_backend={backend}",), **ADAPTED) as runtime:
        assert "radix cache off" in runtime.describe()
        assert runtime.batch_noise < ROUNDING
        for one in (runtime, plain):
            one.load(noisy(one))
        runtime.perturb(Step([7], 1e-30))
        plus, minus = runtime.score_pairs("train", range(2))[0]
        assert worst(plus, minus) < ROUNDING
        for one in (runtime, plain):
            one.perturb(Step([7], 1e-2))
        want = plain.score_pairs("train", range(2))[0]
        for step in range(2):
            runtime.tokens = TokenCount()
            got = runtime.score_pairs("train", range(2))[0]
            assert runtime.tokens.reused == 0
            assert max(worst(a, b) for a, b in zip(got, want, strict=True)) < ROUNDING
            for one in (runtime, plain):
                one.update([Update([7], [0.02])], Step([100 + step], 1e-2))
            want = plain.score_pairs("train", range(2))[0]
