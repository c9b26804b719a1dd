"""--tuning lora-xs and lora-b: theta is a part of an adapter that PEFT and engines see as an ordinary one."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from mezo.api import evaluate_target, replay, resume, train
from mezo.config import Config
from mezo.errors import UserError
from mezo.models.calibration import seen_by
from mezo.models.load import load_tokenizer
from mezo.report.leaderboard import leaderboard, rows_scored
from mezo.run import outcome
from mezo.run.adapter import THETA, WEIGHTS, as_lora, read_adapter, same_bits
from mezo.run.directory import RunDirectory
from mezo.run.export import export
from mezo.run.header import INITIAL, frozen_part
from mezo.run.logbook import truncate
from mezo.run.replay import rebuild
from mezo.run.trajectory import read_header
from mezo.runtimes.calibration import _groups, _pass_of
from mezo.runtimes.hf.runtime import HFRuntime
from mezo.runtimes.reference import model_log_probs
from mezo.runtimes.rows import rows_of
from mezo.tasks import load_splits
from mezo_kernels import lora_init
from tests.log_by_formula import follows

TUNINGS = ("lora-xs", "lora-b")
CALIBRATED = {"lora_a": "calibrated"}
R = {"lora-xs": 8, "lora-b": 4}


def small(name, tiny_options, **more):
    """12 steps, 4 directions each."""
    options = {"tuning": name, "r": R[name], "directions": 4, "steps": 12, "eval_every": 6, "verify_every": 3}
    return Config.of(**tiny_options | options | more)


@pytest.fixture(params=TUNINGS)
def config(request, tiny_options):
    return small(request.param, tiny_options)


@pytest.fixture(params=TUNINGS)
def calibrated(request, tiny_options):
    """As `config`, with what stays made from a calibration batch."""
    return small(request.param, tiny_options, **CALIBRATED)


def run_of(config):
    return RunDirectory(Path(config.machine.output_dir))


def test_what_is_trained_is_small_and_the_rest_stays(config):
    train(config)
    run = run_of(config)
    first, start = read_header(run.trajectory), read_adapter(run.path / INITIAL)
    name, r = config.model.tuning.name, config.model.tuning.r
    ends = {"lora-xs": "lora_R.weight", "lora-b": "lora_B.weight"}
    assert all(each.endswith(ends[name]) for each in first["shapes"])
    assert len(first["shapes"]) == 3
    if name == "lora-xs":
        assert all(shape == [r, r] for shape in first["shapes"].values())
    assert first["version"] == 2
    adapter = read_adapter(run.adapter)
    for each, tensor in adapter.items():
        assert torch.equal(tensor, start[each]) == each.endswith("lora_A.weight")
    assert (run.adapter / THETA).exists() == (name == "lora-xs")


def test_lora_b_draws_the_lora_a_that_lora_has(tiny_options):
    config = Config.of(**tiny_options | {"tuning": "lora-b", "steps": 1, "seed": 7})
    train(config)
    for name, tensor in read_adapter(run_of(config).adapter).items():
        if name.endswith("lora_A.weight"):
            assert torch.equal(tensor, lora_init(7, name, tuple(tensor.shape)))


def test_the_factors_are_the_largest_singular_vectors(tiny_options):
    config = Config.of(**tiny_options | {"tuning": "lora-xs", "r": 8, "steps": 1, "lr": 1e-9})
    train(config)
    start = read_adapter(run_of(config).path / INITIAL)
    base = AutoModelForCausalLM.from_pretrained(config.model.base).model.layers[2].self_attn.q_proj.weight.detach()
    stem = "base_model.model.model.layers.2.self_attn.q_proj"
    product = start[f"{stem}.lora_B.weight"] @ start[f"{stem}.lora_A.weight"]
    u, s, v = torch.linalg.svd(base)
    best = u[:, :8] @ torch.diag(s[:8]) @ v[:8]
    assert torch.allclose(product, best, atol=1e-5)
    assert not start[f"{stem}.lora_R.weight"].any()


def seen_by_q_proj(config):
    """What q_proj of the last layer is given at the scored token of each training example, and its weight."""
    model = AutoModelForCausalLM.from_pretrained(config.model.base).eval()
    layer, seen = model.model.layers[2].self_attn.q_proj, []
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0][0, -1:]))
    examples = load_splits(config, load_tokenizer(config.model.base))["train"]
    assert len(examples) == 48, "fewer than a calibration batch has at most: all of them"
    with torch.no_grad():
        for example in examples:
            model(input_ids=torch.tensor([example.prompt]))
    return torch.cat(seen), layer.weight.detach()


@pytest.mark.parametrize("targets", [("q_proj", "o_proj", "up_proj"), ("q_proj", "v_proj")], ids="-".join)
def test_calibrated_factors_are_even_directions_of_what_a_layer_is_given(calibrated, targets):
    config = calibrated.replace(steps=1, lr=1e-9, target_modules=targets)
    train(config)
    start, r = read_adapter(run_of(config).path / INITIAL), config.model.tuning.r
    x, weight = seen_by_q_proj(config)
    stem = "base_model.model.model.layers.2.self_attn.q_proj"
    a, y = start[f"{stem}.lora_A.weight"], x @ weight.T
    seen = x @ a.T
    sizes = seen.square().mean(0)
    assert torch.allclose(sizes, sizes.mean().expand(r), rtol=1e-3)
    mean = x.mean(0)
    assert torch.allclose(a[0], mean * (a[0].norm() / mean.norm()), atol=1e-4 * a[0].abs().max().item())
    given = r * sizes.mean() * (r if config.model.tuning.name == "lora-xs" else len(weight))
    assert given.item() == pytest.approx(y.square().sum(1).mean().item(), rel=1e-3), "as large as the layer's own"
    if config.model.tuning.name == "lora-xs":
        u = torch.linalg.svd(weight)[0][:, :r]
        b = start[f"{stem}.lora_B.weight"]
        assert torch.allclose((u.T @ b).abs(), torch.eye(r), atol=1e-3)
        assert not start[f"{stem}.lora_R.weight"].any()


@torch.no_grad()
def test_calibration_sees_what_layers_are_given_in_the_whole_model(tiny_options):
    """To the bit, although logits of the scored positions alone are computed."""
    config = Config.of(**tiny_options)
    runtime = HFRuntime(*config.for_runtime)
    data = load_splits(config, load_tokenizer(config.model.base))["train"][:20]
    layers = {
        n: m for n, m in runtime.parts.body.named_modules() if n.endswith(("2.self_attn.q_proj", "2.mlp.up_proj"))
    }
    passes = [_pass_of(group, runtime.parts, 0) for group in _groups([row for e in data for row in rows_of(e)])]
    assert all(each.run.func is not model_log_probs for each in passes)
    whole = [
        dataclasses.replace(each, run=functools.partial(runtime.parts.model, ids, attention_mask=mask))
        for each in passes
        for ids, mask, *_ in [(each.run.args[0], each.run.keywords["attention_mask"])]
    ]
    for got, expected in zip(*(seen_by(layers, 4, some).values() for some in (passes, whole)), strict=True):
        assert torch.equal(got.directions, expected.directions)
        assert got.output == expected.output


def test_what_is_calibrated_follows_from_data_and_model_alone(calibrated, tmp_path):
    train(calibrated.replace(steps=1))
    other = calibrated.replace(steps=1, seed=5, batch_size=4, output_dir=str(tmp_path / "other"))
    train(other)
    a, b = (run_of(each).path / INITIAL for each in (calibrated, other))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.parametrize("more", [{}, CALIBRATED], ids=["plain", "calibrated"])
@pytest.mark.parametrize("name", TUNINGS)
def test_a_run_follows_the_formulas_resumes_and_replays_to_the_bit(name, more, tiny_options, tmp_path):
    config = small(name, tiny_options, **more)
    train(config)
    assert follows(config.machine.output_dir) == 12
    parted = config.replace(output_dir=str(tmp_path / "parted"))
    assert train(parted, until=5) is None
    resume(parted.machine.output_dir)
    a, b = run_of(config), run_of(parted)
    assert a.trajectory.read_bytes() == b.trajectory.read_bytes()
    assert same_bits(read_adapter(a.adapter), read_adapter(b.adapter)) is None
    replay(str(a.path), str(tmp_path / "again"))
    assert same_bits(read_adapter(tmp_path / "again"), read_adapter(a.adapter)) is None
    assert "checked_steps" in resume(str(a.path))
    truncate(str(b.path), 6)
    resume(str(b.path))
    assert a.trajectory.read_bytes() == b.trajectory.read_bytes()


def test_a_resumed_run_does_not_calibrate_again(calibrated, monkeypatch):
    assert train(calibrated, until=5) is None
    monkeypatch.setattr("mezo.models.calibration.Sketch.add", lambda sketch, x: pytest.fail("calibrated again"))
    assert "test" in resume(calibrated.machine.output_dir)


def test_a_calibrated_adapter_is_peft_s(calibrated):
    result = train(calibrated.replace(lr=0.3, steps=30))
    assert result["test"]["after"]["loss"] != pytest.approx(result["test"]["before"]["loss"], abs=1e-3)
    scored = evaluate_target({}, Path(calibrated.machine.output_dir))
    assert scored["test"]["loss"] == pytest.approx(result["test"]["after"]["loss"], abs=1e-5)


def test_a_leaderboard_counts_what_a_run_calibrated_with(calibrated):
    train(calibrated)
    (row,) = leaderboard([calibrated.machine.output_dir])
    assert row["rows"] == 48 + 12 * 2 * calibrated.method.batch_size, "48 examples, fewer than the 256 at most"
    fewer = calibrated.replace(calibration_examples=10)
    assert rows_scored(fewer, 48) == rows_scored(fewer) == 10 + 12 * 2 * calibrated.method.batch_size


def test_replay_needs_no_model(config, tmp_path):
    moved = str(tmp_path / "model")
    shutil.copytree(config.model.base, moved)
    train(config.replace(model=moved))
    shutil.rmtree(moved)
    theta, first, _ = rebuild(config.machine.output_dir)
    assert outcome.difference(run_of(config), first, theta) is None
    theta[next(iter(theta))][0, 0] += 1
    assert outcome.difference(run_of(config), first, theta) == next(iter(theta))


def test_peft_scores_what_the_run_left_as_the_run_did(config, tmp_path):
    result = train(config.replace(lr=3.0 if config.model.tuning.name == "lora-xs" else 0.3, steps=30))
    assert result["test"]["after"]["loss"] != pytest.approx(result["test"]["before"]["loss"], abs=1e-3)
    assert not (run_of(config).adapter / WEIGHTS).is_symlink()
    export(config.machine.output_dir, str(tmp_path / "peft"))
    for adapter in (run_of(config).adapter, tmp_path / "peft"):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(config.model.base), adapter).eval()
        losses = []
        for example in load_splits(config, load_tokenizer(config.model.base))["test"]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([example.prompt])).logits[0, -1].double()
            scores = logits[[option[0] for option in example.options]]
            losses.append(-scores.log_softmax(0)[example.label].item())
        assert sum(losses) / len(losses) == pytest.approx(result["test"]["after"]["loss"], abs=1e-5)
    scored = evaluate_target({}, Path(config.machine.output_dir))
    assert scored["test"]["loss"] == pytest.approx(result["test"]["after"]["loss"], abs=1e-5)
    export(config.machine.output_dir, str(tmp_path / "merged"), "merged")


def test_the_product_is_summed_in_one_order():
    generator = torch.Generator().manual_seed(0)
    b, r = torch.randn(5, 3, generator=generator), torch.randn(3, 3, generator=generator)
    frozen = {"q.lora_A.weight": torch.ones(3, 4), "q.lora_B.weight": b}
    whole = as_lora({"q.lora_R.weight": r}, frozen)
    assert list(whole) == ["q.lora_A.weight", "q.lora_B.weight"]
    by_hand = [[sum(b[i, k].item() * r[k, j].item() for k in range(3)) for j in range(3)] for i in range(5)]
    assert torch.equal(whole["q.lora_B.weight"], torch.tensor(by_hand, dtype=torch.float64).float())


def test_another_file_of_factors_is_refused(config):
    train(config.replace(steps=2))
    path = run_of(config).path / INITIAL
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="is missing or differs"):
        frozen_part(read_header(run_of(config).trajectory), path)
    with pytest.raises(UserError, match="is missing or differs"):
        rebuild(config.machine.output_dir)


def test_a_header_without_its_factors_is_refused(tiny_options):
    config = Config.of(**tiny_options | {"tuning": "lora-xs", "steps": 1})
    train(config)
    path = run_of(config).trajectory
    first, rest = path.read_text().split("\n", 1)
    path.write_text(
        json.dumps({key: value for key, value in json.loads(first).items() if key != "frozen"}) + "\n" + rest
    )
    with pytest.raises(UserError, match="stands between factors that are not there"):
        rebuild(str(run_of(config).path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 64}, r"--tuning lora-xs: .* is \(\d+, \d+\), it has no 64 singular vectors; lower --r"),
        ({"adapter": "x"}, "--adapter x belongs to --tuning lora or prefix, and this run has --tuning lora-xs"),
        ({"num_prefix_tokens": 3}, "--num-prefix-tokens 3 belongs to --tuning prefix"),
    ],
)
def test_what_lora_xs_cannot_be_is_refused(tiny_options, changes, message):
    with pytest.raises(UserError, match=message):
        train(Config.of(**tiny_options | {"tuning": "lora-xs"} | changes))
    assert not Path(tiny_options["output_dir"]).exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"tuning": "lora-b", "lora_a": "calibrated", "r": 49},
            r"--lora-a calibrated: .*q_proj saw [0-9]+ tokens, which have no 49 directions; lower --r, or raise",
        ),
        ({"tuning": "lora-b", "lora_a": "svd"}, "lora_a must be one of plain, calibrated; got 'svd'"),
        ({"tuning": "lora", "lora_a": "calibrated"}, "--lora-a calibrated belongs to --tuning lora-(b|xs)"),
        ({"tuning": "lora-b", "calibration_examples": 0}, "--calibration-examples must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_calibrated_is_refused(tiny_options, changes, message):
    with pytest.raises(UserError, match=message):
        train(Config.of(**tiny_options | changes))
    assert not Path(tiny_options["output_dir"]).exists()
