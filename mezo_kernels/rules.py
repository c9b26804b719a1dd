"""Update rules fused into the step: momentum, Adam, AdamW and sign, with their state, in one pass over all parameters.

A step has one estimate of the gradient, g = sum_k w_k z(seed_k) with w_k = projected_grad_k / n, formed in float32 in
order from zero; then its rule is applied once. Momentum is linear in g, Adam and sign are not: to apply them once for
each perturbation would be another method.
"""

import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mezo_kernels import ops
from mezo_kernels.layout import ParamLayout, check_no_alias
from mezo_kernels.philox import check_seed

KINDS = {"momentum": 0, "adam": 1, "adamw": 1, "sign": 2}
"""Code of each rule in the compiled kernels; Adam and AdamW differ by `l2` alone."""
STATES = {"momentum": 1, "adam": 2, "adamw": 2, "sign": 0}
"""float32 tensors of state that a rule keeps for each parameter: 4 bytes an element each."""
_MODULES = {**ops._MODULES, "numba": "mezo_kernels.cpu_rules"}

ops._LIBRARY.define(
    "rule_step_(Tensor(a!)[] theta, Tensor(b!)[] state, Tensor(c!)[] plus, Tensor(d!)[] minus, Tensor[] geometry,"
    " int kind, float[] constants, SymInt[] update_seeds, float[] numbers, SymInt[] next_seeds, float eps,"
    " str distribution, str? backend) -> ()"
)


@dataclass(frozen=True)
class Rule:
    """How an estimate g of the gradient moves theta; all in float32, every operation rounded on its own.

    momentum: m <- beta1 m + g; theta <- theta decay - lr m (the heavy ball, as torch.optim.SGD has it).
    adam, adamw: g <- g + l2 theta; m <- beta1 m + (1 - beta1) g; v <- beta2 v + (1 - beta2) g**2;
    theta <- theta decay - lr / (1 - beta1**t) * (m / (sqrt(v) / sqrt(1 - beta2**t) + eps)), t counting from 1 (Kingma
    and Ba 2015, arXiv 1412.6980; Loshchilov and Hutter 2019, arXiv 1711.05101).
    sign: theta <- theta decay - lr sign(g), sign(0) = 0 (signSGD, arXiv 1802.04434; ZO-signSGD, Liu et al. 2019).

    Args:
        kind: "momentum", "adam", "adamw" or "sign".
        beta1: of momentum and of Adam's first moment, in [0, 1).
        beta2: of Adam's second moment, in [0, 1).
        eps: Adam's, > 0.
        l2: Adam's weight decay, added to the gradient; >= 0. AdamW has the decay of a step instead.
    Raises:
        ValueError: an unknown kind, a number outside its range.

    >>> Rule("adam").states, Rule("momentum").states
    (2, 1)
    """

    kind: str
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    l2: float = 0.0

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind of rule must be one of {', '.join(KINDS)}; got {self.kind!r}")
        for name, inside, text in (
            ("beta1", 0 <= self.beta1 < 1, "in [0, 1)"),
            ("beta2", 0 <= self.beta2 < 1, "in [0, 1)"),
            ("eps", 2.0**-126 <= self.eps < math.inf, "a finite float32 number > 0"),
            ("l2", 0 <= self.l2 < math.inf, "a finite number >= 0"),
        ):
            if not inside:
                raise ValueError(f"{name} of rule must be {text}, got {getattr(self, name)}")
        if self.l2 and self.kind != "adam":
            raise ValueError(f"l2 is of the rule adam; {self.kind} has the decay of a step")

    @property
    def states(self) -> int:
        """float32 numbers that it keeps for each element."""
        return STATES[self.kind]

    @property
    def constants(self) -> list[float]:
        """beta1, 1 - beta1, beta2, 1 - beta2, eps, l2: rounded to float32 once, by the backends' caller."""
        return [self.beta1, 1 - self.beta1, self.beta2, 1 - self.beta2, self.eps, self.l2]

    def rate(self, lr: float, t: int) -> tuple[float, float]:
        """(what multiplies the step, what multiplies sqrt(v)) of update t, from 1: Adam's bias corrections, float64.

        >>> Rule("adam", beta1=0.5, beta2=0.75).rate(0.5, 1)
        (1.0, 2.0)
        """
        if KINDS[self.kind] != KINDS["adam"]:
            return lr, 1.0
        return lr / (1 - self.beta1**t), 1 / math.sqrt(1 - self.beta2**t)


@dataclass(frozen=True)
class RuleUpdate:
    """One step of a rule.

    Args:
        seeds: of the step's perturbations, at least one.
        weights: projected_grad_k / n of each, finite float32.
        lr: learning rate, finite.
        t: number of the update, from 1; skipped steps do not count.
        decay: theta is multiplied by it first, 1 - lr * weight_decay; 1 is skipped.
    """

    seeds: Sequence[int]
    weights: Sequence[float]
    lr: float
    t: int
    decay: float = 1.0


def rule_step_(
    layout: ParamLayout,
    rule: Rule,
    state: Sequence[ParamLayout],
    updates: Sequence[RuleUpdate],
    next_seed: int | Sequence[int] | None = None,
    eps: float | None = None,
    plus: ParamLayout | Sequence[ParamLayout] | None = None,
    minus: ParamLayout | Sequence[ParamLayout] | None = None,
    *,
    distribution: str = "normal",
    backend: str | None = None,
) -> ParamLayout:
    """`step_` by a rule with state: read master and state once, apply the updates, write all and the next plus, minus.

    Args:
        layout: the master theta, float32.
        rule: what an update does.
        state: `rule.states` layouts like the master, float32 (m; m and v), zeros at first.
        updates: in order; with many this replays a run.
        next_seed, eps, plus, minus, distribution, backend: as in `step_`.
    Returns:
        `layout`.
    Raises:
        ValueError: as `step_`; state that is not float32, or not of the same elements, or in the wrong number.

    >>> w, m = torch.ones(2), torch.zeros(2)
    >>> theta = ParamLayout({"w": w})
    >>> _ = rule_step_(theta, Rule("sign"), [], [RuleUpdate([0], [0.5], lr=0.25, t=1)])
    >>> w  # z(0) is (-0.2909, 0.3179, ...)
    tensor([1.2500, 0.7500])
    >>> _ = rule_step_(theta, Rule("momentum"), [theta.like([m])], [RuleUpdate([0], [2.0], lr=0.0, t=1)])
    >>> m
    tensor([-0.5817,  0.6358])
    """
    ops._check(distribution, backend, layout.device)
    _check_state(layout, rule, state)
    numbers, all_seeds = [], []
    for update in updates:
        _check_update(update)
        rate, root = rule.rate(update.lr, update.t)
        ops._finite("learning rate", rate)
        last = len(update.seeds) - 1
        for k, (seed, weight) in enumerate(zip(update.seeds, update.weights, strict=True)):
            all_seeds.append(check_seed(seed))
            numbers += [float(weight), float(k == last), rate, float(update.decay), root]
    seeds, plus, minus = ops._pairs(layout, next_seed, eps, plus, minus)
    arguments = (
        layout.tensors,
        [tensor for one in state for tensor in one.tensors],
        [tensor for target in plus for tensor in target.tensors],
        [tensor for target in minus for tensor in target.tensors],
        [layout.geometry, *(one.geometry for one in (*state, *plus, *minus))],
        KINDS[rule.kind],
        rule.constants,
        ops._halves(all_seeds),
        numbers,
        ops._halves(seeds),
        float(eps or 0.0),
        distribution,
        backend,
    )
    ops._call("rule_step_", *arguments)
    return layout


def _check_update(update: RuleUpdate) -> None:
    if not len(update.seeds) == len(update.weights) >= 1:
        raise ValueError(f"an update needs a weight for each seed, got {len(update.seeds)} and {len(update.weights)}")
    if update.t < 1:
        raise ValueError(f"t counts updates from 1, got {update.t}")
    for weight in update.weights:
        ops._finite("weight", weight)
    ops._finite("decay", update.decay)


def _check_state(layout: ParamLayout, rule: Rule, state: Sequence[ParamLayout]) -> None:
    if len(state) != rule.states:
        raise ValueError(f"the rule {rule.kind} keeps {rule.states} layouts of state, got {len(state)}")
    key = ("state", *(one.serial for one in state))
    if key in layout.checked_targets:
        return
    for slot in (slot for one in (layout, *state) for slot in one.slots):
        if slot.tensor.dtype != torch.float32:
            raise ValueError(f"{slot.name}: a rule needs a float32 master and state, got {slot.tensor.dtype}")
    ops._check_targets(layout, state)
    if not torch.compiler.is_compiling():
        check_no_alias([slot for one in (layout, *state) for slot in one.slots])
        layout.checked_targets.add(key)


def _rule_step(
    theta, state, plus, minus, geometry, kind, constants, update_seeds, numbers, next_seeds, eps, distribution, backend
):  # fmt: skip
    name = backend or ops._BY_DEVICE[theta[0].device.type]
    rows = [tuple(map(ops._float32, numbers[i : i + 5])) for i in range(0, len(numbers), 5)]
    updates = [(seed, *row) for seed, row in zip(ops._seeds(update_seeds), rows, strict=True)]
    constants = [ops._float32(value) for value in constants]
    run, next_seeds = importlib.import_module(_MODULES[name]).rule_step_, ops._seeds(next_seeds)
    run(theta, state, plus, minus, geometry, kind, constants, updates, next_seeds, ops._float32(eps), distribution)


ops._IMPLEMENTATIONS["rule_step_"] = _rule_step
ops._LIBRARY.impl("rule_step_", _rule_step, "CompositeExplicitAutograd")
torch.library.register_fake("mezo_kernels::rule_step_")(ops._fake_in_place)
