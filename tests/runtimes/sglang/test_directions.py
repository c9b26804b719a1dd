"""--directions through the engine: each request goes to the slots of its group, in one batch, as in transformers."""

import pytest

from mezo.api import train
from mezo.config import Config
from mezo.method.step import Step
from mezo.run.replay import rebuild
from mezo.runtimes.base import TokenCount
from tests.log_by_formula import follows
from tests.runtimes.sglang.conftest import ALL, LAST, engine, examples, noisy, reference, worst
from tests.runtimes.sglang.test_runs import NOISE, common, losses

__all__ = ["common"]  # a fixture
ROUNDING = 5e-5
STEP, SHARES, BATCH = Step([7, 8, 9], 1e-2), [[0, 3], [1], [4, 2, 5]], [0, 5, 13, 20, 2, 9]
ADAPTED = {
    "all": {"target_modules": ALL},
    "last": {"target_modules": LAST, "layers_to_transform": (2,)},
}
each = pytest.mark.parametrize(
    "kind", [pytest.param(name, marks=pytest.mark.engine(name)) for name in ADAPTED], ids=str
)


@pytest.fixture
def both(kind, model):
    """The engine and transformers at one theta, the perturbations written."""
    data = [*examples(12, prefix=tuple(range(3, 43)), low=3, high=9), *examples(12, several=True)]
    options = {**ADAPTED[kind], "directions": 3, "batch_size": 6}
    served = model({"all": "qwen2", "last": "llama"}[kind])  # as other tests have it, whose engine is taken
    with engine(served, data, **options) as running:
        plain = reference(served, data, **options)
        for runtime in (running, plain):
            runtime.load(noisy(runtime))
            runtime.perturb(STEP)
        yield running, plain


@each
def test_scores_of_each_group_are_those_of_transformers_in_one_batch(both, kind, monkeypatch):
    running, plain = both
    calls, generate = [], running.engine.generate
    monkeypatch.setattr(running.engine, "generate", lambda **request: calls.append(request) or generate(**request))
    running.tokens = TokenCount()
    got, want = running.score_pairs("train", BATCH, SHARES), plain.score_pairs("train", BATCH, SHARES)
    for pair, expected in zip(got, want, strict=True):
        for a, b in zip(pair, expected, strict=True):
            assert worst(a, b[:, : a.shape[1]]) < ROUNDING
    assert worst(*got[0]) > 10 * ROUNDING, "the signs differ"
    scoring = [call for call in calls if call.get("return_logprob")]
    assert len(scoring) == 1
    rows = [sum(len(running.rows["train"][BATCH[i]]) for i in share) for share in SHARES]
    slots = [f"{sign}{k}" for k in range(3) for sign in ("plus", "minus")]
    assert [scoring[0]["lora_path"].count(slot) for slot in slots] == [n for n in rows for _ in "+-"]
    assert running.tokens.reused > 0
    first, *_ = places = running.ranks[0]["places"]
    assert places == list(range(first, first + len(slots))), "as their requests come: one product without copies"


@each
def test_evaluation_and_noise_leave_the_groups_alone(both, kind):
    running, _ = both
    before = running.score_pairs("train", BATCH, SHARES)
    running.score("train", BATCH)
    after = running.score_pairs("train", BATCH, SHARES)
    assert max(worst(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True)) < ROUNDING


@pytest.mark.engine("last")
def test_a_run_is_the_hf_runtimes_and_its_log_gives_the_adapter(common, tmp_path):
    options = {**common, "batch_size": 6, "directions": 3, "num_perturbations": 1, "steps": 8, "eval_every": 4}
    for runtime in ("hf", "sglang"):
        train(Config.of(**options, runtime=runtime, output_dir=str(tmp_path / runtime), verify_every=1))
    assert losses(tmp_path / "sglang") == pytest.approx(losses(tmp_path / "hf"), abs=NOISE)
    assert follows(tmp_path / "sglang") == 8
    assert rebuild(str(tmp_path / "sglang"), until="last")[2] == 8
