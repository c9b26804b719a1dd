"""--directions: groups of a batch with directions of their own, from losses to log, resume and replay."""

import functools
import json
from pathlib import Path

import pytest
import torch

from mezo.api import replay, resume, train
from mezo.config import Config
from mezo.data.example import Example
from mezo.errors import UserError
from mezo.method.directions import fewest
from mezo.method.objectives import lm_cross_entropy
from mezo.run.adapter import read_adapter, same_bits
from mezo.run.trajectory import read_trajectory
from mezo.training.measurement import Measurement
from mezo.training.ranks import Ranks
from mezo_kernels import perturbation_seed, standard_normal
from tests.log_by_formula import follows
from tests.method.test_theory import assert_mean

D, EXAMPLES, BATCH, EPS, STEPS = 12, 32, 8, 1e-3, 1500


class Quadratics:
    """A runtime whose example i has the loss 1/2 (theta - c_i) . A_i (theta - c_i); its score is minus that."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
        self.theta, self.centres = draw(D), 0.7 * draw(D) + draw(EXAMPLES, D)
        a = draw(EXAMPLES, D, D) / D**0.5
        self.curvature = a @ a.mT
        self.pairs, self.device, self.held = BATCH, torch.device("cpu"), None
        self.gradients = torch.einsum("nij,nj->ni", self.curvature, self.theta - self.centres)

    def perturb(self, step, watch=False):
        self.held = [(eps, self.z(seed)) for seed, eps in zip(step.seeds, step.eps, strict=True)]

    def z(self, seed):
        return standard_normal(seed, "theta", 0, D).double()

    def score_pairs(self, split, indices, shares=None):
        shares = shares or [range(len(indices))] * len(self.held)
        return [
            tuple(self._scores([indices[i] for i in share], self.theta + sign * eps * z) for sign in (1, -1))
            for share, (eps, z) in zip(shares, self.held, strict=True)
        ]

    def _scores(self, examples, theta):
        off = theta - self.centres[examples]
        return -0.5 * torch.einsum("ni,nij,nj->n", off, self.curvature[examples], off)[:, None]


def config(**options):
    chosen = {"objective": "lm_cross_entropy", "batch_size": BATCH, "eps": EPS, **options}
    return Config.of(model="m", output_dir="o", task="sst2", **chosen)


@pytest.fixture(scope="module")
def quadratics():
    return Quadratics()


@functools.cache
def estimates(runtime, directions=1, num_perturbations=1):
    """(STEPS, D): the estimates of the gradient that a run would step along, theta left where it is."""
    examples = [Example((1,), ((0,),), 0)] * EXAMPLES
    options = {"directions": directions, "num_perturbations": num_perturbations}
    chosen = config(lr=1.0, steps=STEPS, **options)
    measurement = Measurement(chosen.method, chosen.machine, runtime, examples, {}, Ranks())
    rows = []
    for number in range(STEPS):
        step = measurement.step(number)
        runtime.perturb(measurement.first(step))
        update = measurement.record(step).update
        rows.append(sum(c * runtime.z(seed) for seed, c in zip(update.seeds, update.coefficients, strict=True)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    "options", [{}, {"directions": 2}, {"directions": 8}, {"directions": 4, "num_perturbations": 2}], ids=str
)
def test_the_estimate_is_unbiased_and_has_the_variance_of_theory(quadratics, options):
    """E|estimate|^2 = |g|^2 + (d + 1) / n E|g_k|^2 + what batches add, g_k the gradient of a group of the batch.

    n perturbations; perturbations of one group share its gradient. On a quadratic the central difference is exact.
    """
    found, g = estimates(quadratics, **options), quadratics.gradients
    mean, spread = g.mean(0), g.sub(g.mean(0)).square().sum(1).mean()
    for i in range(D):
        assert_mean(found[:, i], mean[i].item())
    groups, each = options.get("directions", 1), options.get("num_perturbations", 1)
    left = (EXAMPLES - BATCH) / (EXAMPLES - 1)  # drawn without replacement
    of_batch = spread / BATCH * left
    of_group = spread / (BATCH / groups) * (EXAMPLES - BATCH / groups) / (EXAMPLES - 1)
    expected = mean @ mean + of_batch + (D + 1) / (groups * each) * (mean @ mean + of_group)
    assert_mean(found.square().sum(1), expected.item())


def test_more_directions_never_have_more_variance(quadratics):
    variances = [estimates(quadratics, directions=m).var(0).sum().item() for m in (1, 2, 4, 8)]
    assert variances == sorted(variances, reverse=True)
    assert variances[-1] < variances[0] / 2


def test_coherence_foretells_what_a_direction_for_each_example_gains(quadratics):
    """1 + (B - 1) rho, rho over pairs of examples of one batch, against the variance that the estimates have."""
    g = quadratics.gradients
    pairs = (g.sum(0).square().sum() - g.square().sum()) / (EXAMPLES * (EXAMPLES - 1))
    rho = (pairs / g.square().sum(1).mean()).item()
    one, each = (estimates(quadratics, directions=m).square().sum(1).mean() for m in (1, BATCH))
    batch = (g.mean(0).square().sum() + 0).item()
    gain = (one - batch) / (each - batch)
    assert gain.item() == pytest.approx(1 + (BATCH - 1) * rho, rel=0.15)


@pytest.mark.parametrize("options", [{"directions": 8}, {"directions": 4, "num_perturbations": 2}], ids=str)
def test_losses_are_those_of_the_group_at_its_own_copies(quadratics, options):
    examples = [Example((1,), ((0,),), 0)] * EXAMPLES
    chosen = config(**options)
    measurement = Measurement(chosen.method, chosen.machine, quadratics, examples, {}, Ranks())
    step, batch = measurement.step(5), measurement.batches(5)
    assert step.seeds == tuple(perturbation_seed(0, 5, k) for k in range(8))
    quadratics.perturb(step)
    losses = measurement.losses(step, batch)
    size, each = BATCH // options["directions"], options.get("num_perturbations", 1)
    for k, seed in enumerate(step.seeds):
        group = batch[k // each * size : (k // each + 1) * size]
        for sign, got in ((1, losses.plus[k]), (-1, losses.minus[k])):
            scores = quadratics._scores(group, quadratics.theta + sign * EPS * quadratics.z(seed))
            assert got == pytest.approx(lm_cross_entropy(scores, torch.zeros(size, dtype=torch.long)).item(), rel=1e-12)


@pytest.fixture
def directed(tiny_config):
    return tiny_config.replace(directions=4, batch_size=8, steps=12, eval_every=6, verify_every=3)


def log(config):
    return read_trajectory(Path(config.machine.output_dir, "trajectory.jsonl"))[1]


@pytest.mark.parametrize(
    "options",
    [{"directions": 8}, {"update_rule": "adamw", "lr": 1e-3}, {"num_perturbations": 2, "normalise_z": True}],
    ids=str,
)
def test_a_run_follows_the_formulas_and_replays(directed, options):
    config = directed.replace(**options)
    train(config)
    assert follows(config.machine.output_dir) == 12
    directory = Path(config.machine.output_dir)
    replay(str(directory), str(directory / "again"), until="last")
    replay(str(directory), str(directory / "best"))
    assert same_bits(read_adapter(directory / "best"), read_adapter(directory / "adapter")) is None


def test_a_run_stopped_and_resumed_ends_the_same(directed, tmp_path):
    train(directed)
    parted = directed.replace(output_dir=str(tmp_path / "parted"))
    assert train(parted, until=5) is None
    resume(parted.machine.output_dir)
    logs = [Path(c.machine.output_dir, "trajectory.jsonl").read_bytes() for c in (directed, parted)]
    assert logs[0] == logs[1]


@pytest.fixture
def following(directed):
    """A run that chooses among 1, 2, 4 and 8 directions after every third step."""
    return directed.replace(directions=8, follow_coherence=True, eval_every=3, lr=0.05)


def test_a_run_that_follows_the_coherence_says_how_and_replays(following):
    train(following)
    directory = Path(following.machine.output_dir)
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    spread = {row["step"]: row for row in rows if row["split"] == "spread"}
    assert list(spread) == [3, 6, 9, 12]
    lengths = [len(record.update.seeds) for record in log(following)]
    told = [spread[step]["directions"] for step in (3, 6, 9)]
    assert lengths == [8] * 4 + [told[0]] * 3 + [told[1]] * 3 + [told[2]] * 2
    assert len(set(lengths)) > 1
    for row in spread.values():
        assert row["directions"] == fewest(row["coherence"], 8, 8)
    assert follows(directory) == 12
    replay(str(directory), str(directory / "best"))
    assert same_bits(read_adapter(directory / "best"), read_adapter(directory / "adapter")) is None


@pytest.mark.parametrize("until", [3, 5, 6])
def test_a_run_that_follows_the_coherence_goes_on_as_one_that_was_not_stopped(following, tmp_path, until):
    train(following)
    parted = following.replace(output_dir=str(tmp_path / "parted"))
    assert train(parted, until=until) is None
    resume(parted.machine.output_dir)
    logs = [Path(c.machine.output_dir, "trajectory.jsonl").read_bytes() for c in (following, parted)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("rho", [0.0, 0.01, 0.1, 0.5, 1.0])
def test_the_fewest_directions_have_at_most_a_tenth_more_variance(rho):
    """Of gradients g_i = shared + own: a group's mean has the mean square rho + (1 - rho) m / B, over m directions."""
    variance = {m: (rho + (1 - rho) * m / BATCH) / m for m in (1, 2, 4, 8)}
    chosen = fewest(rho, BATCH, 8)
    assert variance[chosen] <= 1.1 * variance[8]
    assert all(variance[m] > 1.1 * variance[8] for m in variance if m < chosen)


@pytest.mark.parametrize("options", [{"copies_bytes": 1}, {"micro_batch_size": 3}, {"micro_batch_size": 1}], ids=str)
def test_waves_and_micro_batches_change_no_loss(directed, tmp_path, options):
    parts = directed.replace(**options, output_dir=str(tmp_path / "parts"), steps=3, eval_every=3)
    train(directed.replace(steps=3, eval_every=3))
    train(parts)
    for a, b in zip(log(directed), log(parts), strict=True):
        assert a.update.seeds == b.update.seeds
        assert b.losses.plus == pytest.approx(a.losses.plus, abs=2e-6)
        assert b.losses.minus == pytest.approx(a.losses.minus, abs=2e-6)


def test_instruments_see_groups(directed):
    """No two examples share a z where each has its own, so the coherence is measured apart, and the log is the same."""
    config = directed.replace(directions=8, true_gradient=True, batch_size=8, eps=1e-3)
    train(config)
    rows = [json.loads(line) for line in Path(config.machine.output_dir, "metrics.jsonl").read_text().splitlines()]
    spread = [row for row in rows if row["split"] == "spread"]
    assert len(spread) == 2
    assert all("coherence" in row and row["directions_gain"] >= 1 for row in spread)
    gradient = [row for row in rows if row["split"] == "gradient"]
    assert all(row["projected_grad_error"] < 0.05 for row in gradient), "each direction against its group's gradient"
    quiet = config.replace(output_dir=config.machine.output_dir + "-quiet", noise=False, true_gradient=False)
    train(quiet)
    logs = [Path(c.machine.output_dir, "trajectory.jsonl").read_bytes() for c in (config, quiet)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 3}, "--directions must divide --batch-size, 8, into groups of equal size; got 3"),
        ({"directions": 16}, "--directions must divide --batch-size, 8, into groups of equal size; got 16"),
        ({"directions": 0}, "--directions must be at least 1, got 0"),
        (
            {"directions": 2, "update_rule": "fzoo", "num_perturbations": 2},
            "--directions must be 1, got 2: --update-rule fzoo compares several thetas on the same examples",
        ),
        (
            {"directions": 2, "update_rule": "conservative"},
            "--directions must be 1, got 2: --update-rule conservative compares several thetas on the same examples",
        ),
        (
            {"directions": 2, "update_rule": "guided", "num_perturbations": 3},
            "--directions must be 1, got 2: --update-rule guided compares several thetas on the same examples",
        ),
        ({"follow_coherence": True}, "--follow-coherence chooses among up to --directions: give it, 2 or more"),
        ({"directions": 2, "follow_coherence": True, "noise": False}, "--follow-coherence needs --noise"),
        (
            {"directions": 2, "follow_coherence": True, "objective": "f1"},
            "--follow-coherence: --objective f1 reads no scores",
        ),
    ],
)
def test_what_no_run_can_have_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        config(**options)
