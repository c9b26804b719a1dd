"""--tuning lora-xs and lora-b through the engine, which sees an ordinary LoRA adapter."""

import pytest

from mezo.api import resume, train
from mezo.config import Config
from mezo.errors import UserError
from mezo.method.step import Step, Update
from mezo.models.spec import CORE
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_header
from tests.log_by_formula import follows
from tests.runtimes.sglang.conftest import ALL, LAST, engine, examples, noisy, reference, torch_equal, worst
from tests.runtimes.sglang.test_runs import NOISE, common, losses

__all__ = ["common"]  # a fixture
ROUNDING = 5e-5
STEP, SHARES, BATCH = Step([7, 8, 9], 1e-1), [[0, 3], [1], [4, 2, 5]], [0, 5, 13, 20, 2, 9]
tunings = pytest.mark.parametrize("tuning", ["lora-xs", "lora-b"])


def check_scores(served, tp=1, **options):
    """The engine and transformers at one theta: perturbed, stepped once, and theta itself."""
    data = [*examples(12, prefix=tuple(range(3, 43)), low=3, high=9), *examples(12, several=True)]
    options = {"directions": 3, "batch_size": 6, **options}
    with engine(served, data, tp=tp, **options) as running:
        plain = reference(served, data, **options)
        start = running.initial_theta(5)
        for runtime in (running, plain):
            runtime.load(start | noisy(runtime))
            runtime.update([Update([3], [1e-2])], STEP, watch=True)
            assert runtime.verify() is None
        got, want = running.score_pairs("train", BATCH, SHARES), plain.score_pairs("train", BATCH, SHARES)
        for pair, expected in zip(got, want, strict=True):
            for a, b in zip(pair, expected, strict=True):
                assert worst(a, b[:, : a.shape[1]]) < ROUNDING
        assert worst(*got[0]) > 10 * ROUNDING, "the signs differ"
        assert worst(running.score("train", BATCH), plain.score("train", BATCH)) < ROUNDING
        again = running.score_pairs("train", BATCH, SHARES)
        assert worst(again[2][0], got[2][0]) < ROUNDING, "the copies are there again"
        assert torch_equal(running.theta(), plain.theta())
        other = {n: 2 * t for n, t in start.items() if n not in running.spec.shapes}  # factors of another machine
        for runtime in (running, plain):
            runtime.load(other | noisy(runtime))
            runtime.perturb(STEP)
        moved, wanted = running.score_pairs("train", BATCH, SHARES), plain.score_pairs("train", BATCH, SHARES)
        assert worst(moved[0][0], wanted[0][0][:, : moved[0][0].shape[1]]) < ROUNDING
        assert worst(moved[0][0], got[0][0]) > 10 * ROUNDING


@pytest.mark.engine("last")
@tunings
def test_scores_are_those_of_transformers(model, tuning):
    check_scores(model("llama"), tuning=tuning, target_modules=LAST, layers_to_transform=(2,))


@pytest.mark.slow
@pytest.mark.engine("small adapters on two ranks")
@tunings
def test_two_ranks_score_as_transformers_do(model, tuning):
    check_scores(model("qwen2"), tuning=tuning, target_modules=ALL, tp=2)


@pytest.mark.engine("last")
@pytest.mark.parametrize(
    "tuning",
    [
        {"tuning": "lora-xs"},
        {"tuning": "lora-b", "lora_a": "calibrated"},
        pytest.param({"tuning": "lora-xs", "lora_a": "calibrated"}, marks=pytest.mark.slow),
        pytest.param({"tuning": "lora-b"}, marks=pytest.mark.slow),
    ],
    ids=lambda options: "-".join(options.values()),
)
def test_a_run_is_the_hf_runtimes_and_its_log_gives_the_adapter(common, tmp_path, tuning):
    options = {**common, **tuning, "batch_size": 6, "directions": 3, "num_perturbations": 1, "steps": 8}
    options |= {"eval_every": 4, "verify_every": 1}
    for runtime in ("hf", "sglang"):
        config = Config.of(**options, runtime=runtime, output_dir=str(tmp_path / runtime))
        assert train(config, until=5) is None
        resume(config.machine.output_dir)
    hf, sglang = (read_header(tmp_path / runtime / "trajectory.jsonl") for runtime in ("hf", "sglang"))
    assert sglang["init"] == hf["init"], "the same factors, made once"
    assert losses(tmp_path / "sglang") == pytest.approx(losses(tmp_path / "hf"), abs=NOISE)
    assert follows(tmp_path / "sglang") == 8
    assert "checked_steps" in resume(str(tmp_path / "sglang"))
    assert rebuild(str(tmp_path / "sglang"), until="last")[2] == 8


@pytest.mark.slow  # that workers decay to what was loaded last: test_loading_theta_draws_to_that_theta
@pytest.mark.engine("last")
def test_decay_goes_towards_the_start_on_an_engine_too(common, tmp_path):
    options = {**common, "weight_decay": 50.0, "anchored_decay": True, "steps": 8, "eval_every": 4, "verify_every": 1}
    for runtime in ("hf", "sglang"):
        config = Config.of(**options, runtime=runtime, output_dir=str(tmp_path / runtime))
        assert train(config, until=5) is None
        resume(config.machine.output_dir)
    assert losses(tmp_path / "sglang") == pytest.approx(losses(tmp_path / "hf"), abs=NOISE)
    assert "checked_steps" in resume(str(tmp_path / "sglang"))


@pytest.mark.engine("last")
def test_a_product_that_is_not_what_was_trained_is_found(model):
    data = examples(4)
    with engine(model("llama"), data, tuning="lora-xs", target_modules=LAST, layers_to_transform=(2,)) as runtime:
        name = next(iter(runtime.spec.shapes))
        runtime.load(runtime.initial_theta(0) | noisy(runtime))
        runtime.update([], Step([7], 1e-2), watch=True)
        assert runtime.verify() is None
        runtime._call("test_flip", rank=0, what="plus", name=name, index=3)
        assert f"{name.removesuffix(CORE)}lora_B.weight of plus0 is not B R" in runtime.verify()


def test_what_is_not_lora_is_refused_before_an_engine_starts(tmp_path):
    with pytest.raises(UserError, match="--tuning prefix: the engine's slots hold LoRA adapters"):
        Config.of(model="m", output_dir=str(tmp_path / "run"), task="sst2", tuning="prefix", runtime="sglang")
