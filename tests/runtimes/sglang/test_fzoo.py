"""Update rules inside the engine: state on the shards of two ranks, fzoo's one batch of n + 1, normalised z."""

import pytest
import torch

from mezo.api import resume, train
from mezo.config import Config
from mezo.method.step import Step, Update
from mezo.run import logbook
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_trajectory
from mezo_kernels import root_mean_square
from tests.log_by_formula import follows
from tests.runtimes.sglang.conftest import ALL, LAST, engine, examples, noisy, reference, torch_equal, worst
from tests.tiny_data import write_jsonl

two_ranks = pytest.mark.engine("two ranks")
TWO_RANKS = (*ALL, "lm_head")
ROUNDING, EPS, N = 5e-5, 1e-2, 3
UPDATES = [Update([3 * t, 3 * t + 1], [0.5, -0.2 * t], 0.99, lr=1e-3) for t in range(6)]


@pytest.fixture(scope="module")
def data():
    return examples(12)


@pytest.fixture(scope="module")
def llama(model):
    return model("llama")


@two_ranks
def test_adam_on_two_ranks_is_adam_of_one_process(llama, data):
    """Fed the same estimates, theta and both moments: step after step, as many at once, and over skipped steps."""
    rule = {"target_modules": TWO_RANKS, "update_rule": "adamw", "weight_decay": 0.5, "no_decay": ("*lora_B*",)}
    plain = reference(llama, data, **rule)
    plain.load(noisy(plain))
    plain.update(UPDATES, Step([7], EPS))
    with engine(llama, data, tp=2, **rule) as runtime:
        runtime.load(noisy(runtime))
        runtime.perturb(Step([0], EPS))
        for i, update in enumerate(UPDATES):
            runtime.update([update, Update([1], [0.0], skipped=True)], Step([7], EPS), watch=i == 3)
            if i == 3:
                assert runtime.verify() is None
        assert torch_equal(runtime.theta(), plain.theta())
        for got, want in zip(*(one.score_pairs("train", range(8))[0] for one in (runtime, plain)), strict=True):
            assert worst(got, want) < ROUNDING
        runtime.update(UPDATES[:1], Step([8], EPS))  # the seventh update: the moments were equal too
        plain.update(UPDATES[:1], Step([8], EPS))
        assert torch_equal(runtime.theta(), plain.theta())


@pytest.mark.engine("all")
def test_fzoo_scores_n_copies_and_theta_in_one_batch(model, data, monkeypatch):
    rule = {"target_modules": ALL, "update_rule": "fzoo", "num_perturbations": N}
    qwen = model("qwen2")
    plain = reference(qwen, data, **rule)
    plain.load(noisy(plain))
    with engine(qwen, data, **rule) as runtime:
        runtime.load(noisy(runtime))
        runtime.perturb(Step([7, 8, 9], EPS), watch=True)
        asked, generate = [], runtime.engine.generate

        def listen(**request):
            asked.extend([request["lora_path"]] if request.get("return_logprob") else [])
            return generate(**request)

        monkeypatch.setattr(runtime.engine, "generate", listen)
        pairs = runtime.score_pairs("train", range(4))
        assert [sorted(set(names)) for names in asked] == [["minus0", "plus0", "plus1", "plus2"]]
        assert runtime.verify() is None
        for seed, (plus, here) in zip((7, 8, 9), pairs, strict=True):
            plain.perturb(Step([seed], EPS))
            want, theta = plain.score_pairs("train", range(4))[0]
            assert worst(plus, want) < ROUNDING
            assert worst(here, theta) < ROUNDING
            assert worst(plus, here) > 10 * ROUNDING
        assert worst(runtime.score("train", range(4)), pairs[0][1]) < ROUNDING
        again = runtime.score_pairs("train", range(4))  # evaluation leaves the copies, theta is known
        assert sorted(set(asked[-1])) == ["plus0", "plus1", "plus2"]
        for before, after in zip(pairs, again, strict=True):
            assert worst(before[0], after[0]) < ROUNDING
            assert torch.equal(before[1], after[1])


@pytest.fixture
def config(tmp_path, model):
    sizes = {"train": 48, "dev": 20}
    files = {f"{s}_file": write_jsonl(tmp_path / f"{s}.jsonl", n, i) for i, (s, n) in enumerate(sizes.items())}
    words = {"prompt": "{text} It was", "label_words": (" terrible", " great")}
    shape = {"target_modules": LAST, "layers_to_transform": (2,)}
    steps = {"steps": 12, "batch_size": 8, "eps": EPS, "eval_every": 6, "num_perturbations": N, "verify_every": 1}
    return Config.of(model=model("llama"), **files, **words, **shape, **steps, output_dir=str(tmp_path / "hf"))


@pytest.mark.engine("last")
@pytest.mark.parametrize(
    "rule", [{"update_rule": "fzoo", "lr": 1e-5}, {"update_rule": "adam", "normalise_z": True, "lr": 1e-5}]
)
def test_a_run_is_the_hf_runtimes(rule, config, tmp_path, monkeypatch):
    """Header, losses and log; replay gives the bits of its adapter, and the other runtime carries it on."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    hf = config.replace(**rule)
    ours = hf.replace(runtime="sglang", output_dir=str(tmp_path / "sglang"))
    train(hf)
    result = train(ours)
    (first, theirs), (header, records) = (read_trajectory(tmp_path / n / "trajectory.jsonl") for n in ("hf", "sglang"))
    assert header == first
    for a, b in zip(theirs, records, strict=True):
        assert b.losses.plus + b.losses.minus == pytest.approx(a.losses.plus + a.losses.minus, abs=1e-5)
    assert follows(ours.machine.output_dir) == 12
    kept = read_adapter(tmp_path / "sglang" / "adapter")
    assert same_bits(rebuild(ours.machine.output_dir)[0], kept) is None
    forwards = N + 1 if rule["update_rule"] == "fzoo" else 2 * N
    asked = 12 * 8 * forwards
    assert asked <= result["tokens_computed"] < asked + 48 * 8  # a token a request, and each prompt's first visit

    logbook.truncate(ours.machine.output_dir, 6)
    resume(ours.machine.output_dir, machine={"runtime": "hf"})
    again = read_trajectory(tmp_path / "sglang" / "trajectory.jsonl")[1]
    assert again[:6] == records[:6]
    assert again[6].losses.plus == pytest.approx(records[6].losses.plus, abs=1e-5)


@two_ranks
def test_normalised_pairs_that_are_held_together_differ_in_eps(llama, data):
    rule = {"target_modules": TWO_RANKS, "normalise_z": True, "num_perturbations": 2}
    plain = reference(llama, data, **rule)
    plain.load(noisy(plain))
    with engine(llama, data, tp=2, **rule) as runtime:
        runtime.load(noisy(runtime))
        eps = [EPS / root_mean_square(runtime.spec.shapes, seed) for seed in (7, 8)]
        runtime.update([Update([1], [1e-3])], Step([7, 8], eps), watch=True)
        plain.update([Update([1], [1e-3])])
        pairs = runtime.score_pairs("train", range(4))
        assert runtime.verify() is None
        for seed, own, pair in zip((7, 8), eps, pairs, strict=True):
            plain.perturb(Step([seed], own))
            for got, want in zip(pair, plain.score_pairs("train", range(4))[0], strict=True):
                assert worst(got, want) < ROUNDING
        assert torch_equal(runtime.theta(), plain.theta())
