"""Two tensor-parallel ranks: shards of one z, one theta, and failures that the engine itself would hide."""

import signal
import time

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mezo.errors import RunError
from mezo.method.objectives import cross_entropy
from mezo.method.step import Step, Update
from mezo_kernels import standard_normal
from tests.runtimes.sglang.conftest import ALL, engine, examples, noisy, reference, torch_equal, worst

ROUNDING = 5e-5
STEPS, LR, EPS = 20, 1e-4, 1e-2
MODULES = (*ALL, "lm_head")
O_PROJ_A = "base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"


@pytest.fixture(scope="module")
def data():
    return examples(16)


@pytest.fixture(
    params=[pytest.param("llama", marks=pytest.mark.engine("two ranks")), pytest.param("qwen2", marks=pytest.mark.slow)]
)
def both(request, model, data):
    """(engine on two ranks, transformers) on a family with 4 heads and 2 key-value heads."""
    path = model(request.param)
    adapted = {"target_modules": MODULES, "generate": "on", "max_new_tokens": 8}
    with engine(path, data, tp=2, **adapted) as runtime:
        yield runtime, reference(path, data, **adapted)


def test_shards_of_z_make_up_the_full_z(both, tmp_path):
    """Column-parallel B by rows, row-parallel A by columns, and the factors that both ranks hold whole."""
    runtime, _ = both
    answers = runtime._call("test_draw", path=str(tmp_path / "z"), seed=2**63 + 5)
    parts = [load_file(tmp_path / f"z.{rank}") for rank in (0, 1)]
    kinds = set()
    for name, shape in runtime.spec.shapes.items():
        full = standard_normal(2**63 + 5, name, 0, shape[0] * shape[1]).view(shape)
        covered = torch.zeros(shape, dtype=torch.int32)
        for answer, part in zip(answers, parts, strict=True):
            row, column, *full_shape = answer["starts"][name]
            rows, columns = part[name].shape
            assert tuple(full_shape) == shape
            assert torch.equal(part[name], full[row : row + rows, column : column + columns])
            covered[row : row + rows, column : column + columns] += 1
        assert covered.min() == covered.max() in (1, 2)
        kinds.add((name.split(".lora_")[0].rsplit(".", 1)[-1], name[-8], int(covered.max())))
    columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
    column = {(m, f, n) for m in columns for f, n in (("A", 2), ("B", 1))}
    assert kinds == column | {(m, f, n) for m in ("o_proj", "down_proj") for f, n in (("A", 1), ("B", 2))}


def test_texts_are_those_of_transformers(both):
    for one in both:
        one.load(noisy(one))
        one.perturb(Step([7], 0.3))
    texts, wanted = (one.generate_pairs("train", range(8), 8, ()) for one in both)
    assert texts == wanted
    assert len({text for pair in texts[0] for text in pair}) > 4


def test_scores_are_those_of_transformers(both):
    for one in both:
        one.load(noisy(one))
        one.perturb(Step([7], EPS))
    got, want = (one.score_pairs("train", range(8))[0] for one in both)
    assert max(worst(a, b) for a, b in zip(got, want, strict=True)) < ROUNDING
    assert worst(both[0].score("train", range(16)), both[1].score("train", range(16))) < ROUNDING


def trajectory(runtime, labels):
    """Losses and updates of plain MeZO steps."""
    runtime.load(noisy(runtime))
    runtime.perturb(Step([0], EPS))
    losses, updates = [], []
    for step in range(STEPS):
        plus, minus = (cross_entropy(s, labels).item() for s in runtime.score_pairs("train", range(16))[0])
        losses.append((plus, minus))
        updates.append(Update([step], [LR * (plus - minus) / (2 * EPS)], 0.999))
        runtime.update(updates[-1:], Step([step + 1], EPS))
    return torch.tensor(losses), updates


def test_twenty_steps_are_those_of_one_process(both, data):
    runtime, plain = both
    labels = torch.tensor([example.label for example in data])
    (got, updates), (want, _) = (trajectory(one, labels) for one in both)
    assert torch.allclose(got, want, atol=ROUNDING, rtol=0)
    assert not torch.allclose(got[0], got[-1], atol=10 * ROUNDING, rtol=0), "theta has moved"
    plain.load(noisy(plain))
    plain.update(updates, Step([STEPS], EPS))
    assert torch_equal(runtime.theta(), plain.theta()), "fed the same projected_grads, all at once"


def test_a_mismatch_on_one_rank_is_named(both):
    runtime, _ = both
    runtime.update([Update([5], [1e-3])], Step([7], EPS), watch=True)
    assert runtime.verify() is None
    runtime._call("test_flip", rank=1, what="minus", name=O_PROJ_A, index=3)
    assert runtime.verify().startswith(f"rank 1: minus of {O_PROJ_A} at index 3: expected ")


def test_replicated_factors_must_agree(both):
    """lora_B of o_proj is held by both ranks; a difference between them ends a run when theta is read."""
    runtime, _ = both
    runtime._call("test_flip", rank=1, what="theta", name=O_PROJ_A.replace("lora_A", "lora_B"), index=0)
    with pytest.raises(RunError, match=r"o_proj.lora_B.weight of rank 1 differs from that of another rank"):
        runtime.theta()


def test_a_file_that_rank_0_cannot_read_is_an_error_on_both(both, tmp_path):
    runtime, _ = both
    with pytest.raises(RunError, match=r"failed in load: rank 0: ValueError: .*nowhere.*; rank 1: ValueError"):
        runtime._call("load", path=str(tmp_path / "nowhere.safetensors"))


def test_a_failure_of_the_rank_that_the_engine_hides_is_raised(both):
    runtime, _ = both
    with pytest.raises(RunError, match="failed in test_fail: rank 1: ValueError: told to fail"):
        runtime._call("test_fail", rank=1)
    runtime.perturb(Step([7], EPS))
    assert runtime.score_pairs("train", [0])


def test_a_dead_rank_is_noticed(both):
    """Rank 1 is killed while rank 0 waits for it."""
    runtime, _ = both
    ranks = [process for process in runtime.engine.processes if "scheduler" in " ".join(process.cmdline())]
    victim = (ranks or runtime.engine.processes)[1]
    victim.send_signal(signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(RunError, match=f"the SGLang engine died .process {victim.pid}"):
        runtime.perturb(Step([8], EPS))
    assert time.monotonic() - began < 30
    assert psutil.pid_exists(runtime.engine.processes[0].pid)
