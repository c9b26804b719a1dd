"""MeZO as a torch optimizer: zeroth-order steps for any module and any closure, theta kept exactly in float32."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mezo.method.estimator import Losses
from mezo.method.rules import RULES, Rule
from mezo.method.step import Step, Update
from mezo.ranges import outside
from mezo_kernels import (
    ParamLayout,
    ParamSlot,
    RuleUpdate,
    canonical_name,
    perturb_,
    root_mean_square,
    rule_step_,
    step_,
)
from mezo_kernels import Rule as Kernel
from mezo_kernels.philox import STREAMS, check_seed


class MeZO(torch.optim.Optimizer):
    """theta <- theta (1 - lr weight_decay) - lr/n sum_k projected_grad_k z_k, from 2n forward passes and no autograd.

    projected_grad_k = (loss(theta + eps z_k) - loss(theta - eps z_k)) / (2 eps): SPSA with z regenerated from a seed,
    as in MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithms 1 and 2). `rule` names another way to use the losses;
    the rules are those of `mezo train --update-rule`, one class each in `mezo.method.rules`:

    - momentum, adam, adamw and sign act once a step on the whole estimate 1/n sum_k projected_grad_k z_k, in one fused
      pass, as `mezo_kernels.Rule` says.
    - fzoo takes n + 1 forward passes: projected_grad_k = (loss(theta + eps z_k) - loss(theta)) / eps with z of +1 and
      -1, and divides lr by the sample standard deviation of the n perturbed losses.
    - conservative keeps the best of theta and a step either way, for three more calls of the closure.

    Theta lives in a float32 master copy, one for each parameter. A parameter is set to the single rounding of
    theta + eps z, theta - eps z or theta, and is never restored by arithmetic: a float32 parameter equals its master
    exactly after a step. `memory_bytes` is what that costs beside the parameters: 4 bytes an element, plus 4 with
    momentum or 8 with Adam, plus one copy in the parameters' own dtypes where a group has a 16-bit parameter.

    All closure calls of a step start from the same CPU and CUDA generator states (the same dropout masks),
    and after the step the generators are as after one call. A loss that is NaN or infinite skips the step: parameters
    are restored, `skipped_steps` counts it. A parameter changed in place between steps (`load_state_dict` of the
    model, clamping under `torch.no_grad`) is read again; writes by way of `.data` or `perturb_` are not seen and lost.

    Args:
        params: parameters, (name, parameter) pairs, or param groups of either. Unnamed ones are called "0", "1", ...;
            the name decides z. `nn.Parameter`s with `requires_grad=False` are left alone.
        lr: learning rate, >= 0; a float or a tensor. Per group, read at each step.
        eps: perturbation scale, > 0; the same in all groups.
        num_perturbations: n >= 1, how many estimates a step averages (n-SPSA); >= 2 for fzoo.
        weight_decay: >= 0; decoupled, but for adam, which adds weight_decay theta to the gradient. Per group.
        momentum: of the rule momentum, in [0, 1), 0.9 by default. Per group.
        rule: "sgd", "momentum", "adam", "adamw" or "sign", per group; or "fzoo" or "conservative", of all groups.
        betas: of the first and second moment of adam and adamw, in [0, 1), (0.9, 0.999) by default. Per group.
        adam_eps: added to the root of the second moment of adam and adamw, > 0, 1e-8 by default. Per group.
        normalise_z: divide each z by its root mean square over all parameters, so that perturbations have one length.
        seed: seed of the run, 0 <= seed < 2**64; perturbation k of step t has `perturbation_seed(seed, t, k)`.
        distribution: "normal" or "rademacher"; None is rademacher for fzoo and normal for the others.
        backend: of the fused ops; None chooses by device.
    Raises:
        ValueError: a value outside its range; parameters that no `ParamLayout` accepts.

    >>> _ = torch.manual_seed(0)
    >>> y = torch.arange(2000) % 2
    >>> x = torch.randn(2000, 10) + (y[:, None] * 2 - 1) * 0.7
    >>> def accuracy_after_training(**options):
    ...     model = torch.nn.Linear(10, 2)
    ...     _ = torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    ...     optimizer = MeZO(model.named_parameters(), **options)
    ...     for _ in range(300):
    ...         _ = optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x[:1000]), y[:1000]))
    ...     return (model(x[1000:]).argmax(1) == y[1000:]).float().mean().item()
    >>> accuracy_after_training(lr=0.0)
    0.5
    >>> accuracy_after_training(lr=0.02, rule="adam") > 0.95
    True
    >>> accuracy_after_training(lr=0.05) > 0.95, accuracy_after_training(lr=0.005, rule="momentum") > 0.95
    (True, True)
    >>> accuracy_after_training(lr=1e-4, rule="fzoo", num_perturbations=4) > 0.95
    True
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        weight_decay: float = 0.0,
        momentum: float | None = None,
        seed: int = 0,
        distribution: str | None = None,
        backend: str | None = None,
        rule: str = "sgd",
        betas: tuple[float, float] | None = None,
        adam_eps: float | None = None,
        normalise_z: bool = False,
    ):
        if not isinstance(num_perturbations, int) or num_perturbations < 1:
            raise ValueError(f"num_perturbations must be an integer >= 1, got {num_perturbations!r}")
        if distribution is not None and distribution not in STREAMS:
            raise ValueError(f"distribution must be one of {', '.join(STREAMS)}; got {distribution!r}")
        self.seed, self.num_perturbations = check_seed(seed), num_perturbations
        self.backend, self.normalise_z = backend, normalise_z
        self.steps, self.skipped_steps = 0, 0
        self.projected_grads: list[float] = []
        self._groups, self._seen = [], None
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rule": rule, "updates": 0}
        # updates: those applied to the group so far, which Adam counts
        super().__init__(params, defaults | {"momentum": momentum, "betas": betas, "adam_eps": adam_eps})
        self._eps()
        self.distribution = distribution or self._rule().distribution
        self._follow()

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; its options are checked and its parameters join at the next step."""
        super().add_param_group(param_group)
        _check_options(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor | float] | None = None) -> torch.Tensor:
        """One MeZO step; calls `closure` as often as the rule needs losses, without autograd.

        Args:
            closure: computes and returns the loss, a scalar tensor or a number, from the current parameters.
        Returns:
            Mean of the losses at theta + eps z and theta - eps z (theta, for fzoo) of all perturbations: float64, on
            the CPU.
        """
        if closure is None:
            raise ValueError("MeZO measures the loss: call optimizer.step(closure), closure() returning a scalar loss")
        self._follow()
        eps, rule = self._eps(), self._rule()
        norm = functools.cache(self._root_mean_square) if self.normalise_z else None
        step = Step.of_run(self.seed, self.steps, self.num_perturbations, eps, norm)
        norms = tuple(map(norm, step.seeds)) if norm else ()
        try:
            losses = self._losses(closure, step, rule)
            self.projected_grads = list(losses.projected_grads(rule.half_distance(eps)))
            updates = [self._plan(group, step, losses, norms) for group in self._groups]
            if any(update.skipped for update in updates):
                self.skipped_steps += 1
            else:
                for group, update in zip(self._groups, self._chosen(closure, rule, updates), strict=True):
                    self._apply(group, update)
            self.steps += 1
        finally:
            for group in self._groups:
                group.current.copy_(group.theta)
            self._seen = self._storage()
        return torch.tensor(losses.plus + losses.minus, dtype=torch.float64).mean()

    def _losses(self, closure: Callable, step: Step, rule: Rule) -> Losses:
        """Losses of a step, all from the same generator states."""
        last = 2 if rule.compares else 0  # further calls to come, from the same states
        calls = len(step) + 1 if rule.one_sided else 2 * len(step)
        losses = [
            self._call(closure, advance=not last and n == calls - 1)
            for n, _ in enumerate(self._copies(step, rule.one_sided))
        ]
        if rule.one_sided:
            return Losses(tuple(losses[1:]), (losses[0],) * len(step))
        return Losses(tuple(losses[::2]), tuple(losses[1::2]))

    def _call(self, closure: Callable, advance: bool) -> float:
        """The loss; the generators stay as they were unless this is the last call of a step."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices, enabled=not advance):
            return _scalar(closure())

    def _plan(self, group: "_Group", step: Step, losses: Losses, norms: Sequence[float]) -> Update:
        """The update of one param group."""
        lr, decay = float(group.options["lr"]), group.options["weight_decay"]
        return _rule_of(group.options).plan(step.seeds, self.projected_grads, losses, lr, decay, norms=norms)

    def _chosen(self, closure: Callable, rule: Rule, updates: Sequence[Update]) -> Sequence[Update]:
        """The updates to make: as planned, or of a rule that compares thetas what the losses at these say."""
        if not rule.compares:
            return updates
        tried = []
        for sign in (0.0, -1.0, 1.0):  # theta, theta - c z, theta + c z
            for group, update in zip(self._groups, updates, strict=True):
                group.current.copy_(group.theta)
                (seed,), (c,) = update.seeds, update.coefficients
                if sign * c:
                    self._perturb(group, seed, sign * c)
            tried.append(self._call(closure, advance=len(tried) == 2))
        return [rule.choose(update, tried) for update in updates]

    def _copies(self, step: Step, one_sided: bool) -> Iterator[None]:
        """Set the parameters to both signs of each perturbation in turn, or to theta and to each theta + eps z."""
        if one_sided:
            yield
        for seed, eps in zip(step.seeds, step.eps, strict=True):
            for group in self._groups:
                self._perturb(group, seed, eps)
            yield
            if one_sided:
                continue
            for group in self._groups:
                if group.minus:
                    group.current.copy_(group.minus)
                else:
                    self._perturb(group, seed, -eps)
            yield

    def _perturb(self, group: "_Group", seed: int, scale: float) -> None:
        """Set the parameters of a group to theta + scale z(seed), and the minus copy to theta - scale z(seed)."""
        options = {"distribution": self.distribution, "backend": self.backend}
        if group.minus:
            step_(group.theta, [], 1.0, seed, abs(scale), group.current, group.minus, **options)
            if scale < 0:
                group.current.copy_(group.minus)
        else:
            perturb_(group.current.copy_(group.theta), scale, seed, **options)

    def _apply(self, group: "_Group", update: Update) -> None:
        """Apply an update to the master of one group: one fused pass."""
        options = {"distribution": self.distribution, "backend": self.backend}
        rule = _rule_of(group.options)
        kernel = rule.kernel(rule.l2(group.options["weight_decay"]))
        group.options["updates"] += 1
        if kernel is None:
            step_(group.theta, update.directions(), **options)
            return
        step = RuleUpdate(update.seeds, update.coefficients, update.lr, group.options["updates"], update.decay)
        rule_step_(group.theta, kernel, group.moments(self.state, kernel), [step], **options)

    def _root_mean_square(self, seed: int) -> float:
        shapes = {name: tuple(p.shape) for _, name, p in self._trainable()}
        device = next(p.device for _, _, p in self._trainable())
        return root_mean_square(shapes, seed, device=device, backend=self.backend)

    def _eps(self) -> float:
        values = sorted({float(group["eps"]) for group in self.param_groups})
        if len(values) > 1:
            raise ValueError(f"projected_grad has one eps: give all param groups the same, got {values}")
        return values[0]

    def _rule(self) -> Rule:
        """The rule that says what a step measures; groups may differ in rules that measure both signs and no more."""
        rules = {group["rule"]: _rule_of(group) for group in self.param_groups}
        for rule in rules.values():
            if len(rules) > 1 and (rule.one_sided or rule.compares):
                names = sorted(rules)
                raise ValueError(
                    f"{rule.name} measures in its own way: give all param groups the same rule, got {names}"
                )
            refused = rule.refusals(
                num_perturbations=self.num_perturbations,
                weight_decay=max(group["weight_decay"] for group in self.param_groups),
                normalise_z=self.normalise_z,
            )
            for option, why in refused:
                raise ValueError(f"{option} {why}")
        return next(iter(rules.values()))

    def _trainable(self) -> Iterator[tuple[dict, str, torch.Tensor]]:
        """(group, name, parameter) of every parameter that is perturbed."""
        position = 0
        for group in self.param_groups:
            names = group.get("param_names") or [str(position + i) for i in range(len(group["params"]))]
            for name, p in zip(names, group["params"], strict=True):
                if p.requires_grad or not isinstance(p, torch.nn.Parameter):
                    yield group, canonical_name(name), p
            position += len(group["params"])

    def _storage(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for _, _, p in self._trainable()]

    def _follow(self) -> None:
        """Bring masters and layouts up to date with parameters that were added, moved or changed from outside."""
        seen = self._storage()
        if seen == self._seen:
            return
        for _, _, p in self._trainable():
            theta = self.state[p].get("master")
            if theta is None or theta.device != p.device:
                self.state[p]["master"] = p.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            elif not torch.equal(theta.to(p.dtype), p):
                theta.copy_(p)
        if self._seen is None or [address for address, _ in seen] != [address for address, _ in self._seen]:
            self._build()
        self._seen = seen

    def _build(self) -> None:
        trainable = list(self._trainable())
        ParamLayout(ParamSlot(name, p.detach()) for _, name, p in trainable)  # no collision across groups either
        self._groups = []
        for options in self.param_groups:
            params = [p for group, _, p in trainable if group is options]
            if params:
                current = ParamLayout(ParamSlot(name, p.detach()) for group, name, p in trainable if group is options)
                theta = current.like([self.state[p]["master"] for p in params])
                halves = any(p.dtype != torch.float32 for p in params)
                minus = current.like([torch.empty_like(p) for p in current.tensors]) if halves else None
                self._groups.append(_Group(options, params, current, theta, minus))

    @property
    def memory_bytes(self) -> int:
        """Bytes held beside the parameters: masters, momentum buffers and the minus copies of 16-bit groups."""
        held = [t for state in self.state.values() for t in state.values()]
        held += [t for group in self._groups if group.minus for t in group.minus.tensors]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def __repr__(self):
        return f"{super().__repr__()[:-1]}steps: {self.steps}, seed: {self.seed}, memory_bytes: {self.memory_bytes}\n)"

    def __getstate__(self):
        return super().__getstate__() | {name: getattr(self, name) for name in (*_SAVED, "backend")}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._groups, self._seen = [], None
        for group in self.param_groups:  # a state of an older version lacks what has come since
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            if group["rule"] == "sgd" and group["momentum"]:
                group["rule"] = "momentum"  # an option of sgd once
            defaults = _defaults_of(group["rule"])
            for name in _FIELD:  # every option stood there, of whatever rule
                given = group[name] if name in defaults else None
                group[name] = defaults.get(name) if given is None else given

    def state_dict(self) -> dict:
        """Everything a bitwise equal resumption needs: masters, momentum buffers, options, seed and step count."""
        return super().state_dict() | {"mezo": {name: getattr(self, name) for name in _SAVED}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Resume: restores what `state_dict` holds and sets the parameters to the masters."""
        super().load_state_dict(state_dict)
        for name in _SAVED:
            setattr(self, name, state_dict["mezo"].get(name, getattr(self, name)))
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i in state_dict["state"]:
                # torch casts state to the dtype of the parameter, which would round a master to 16 bits
                saved = state_dict["state"][i].items()
                self.state[p] = {name: t.to(p.device, torch.float32, copy=True) for name, t in saved}
                p.copy_(self.state[p]["master"])
        self._follow()


_FIELD = {"momentum": "momentum", "betas": "beta1", "adam_eps": "adam_eps"}
"""Options that some rules have, and the field by which these are known."""
# as torch.optim's SGD and Adam call them
_STATE = {"momentum": ("momentum_buffer",), "sign": ()} | dict.fromkeys(("adam", "adamw"), ("exp_avg", "exp_avg_sq"))
_SAVED = ("seed", "num_perturbations", "distribution", "normalise_z", "steps", "skipped_steps", "projected_grads")


@dataclass
class _Group:
    """One param group: its options, its parameters, and the layouts the ops see them through."""

    options: dict
    params: list[torch.Tensor]
    current: ParamLayout
    theta: ParamLayout
    minus: ParamLayout | None
    buffers: dict[str, ParamLayout] = field(default_factory=dict)

    def moments(self, state: dict, kernel: Kernel) -> list[ParamLayout]:
        """State of the fused rule, one layout a moment; zeros at first."""
        for name in _STATE[kernel.kind]:
            if name not in self.buffers:
                for p, theta in zip(self.params, self.theta.tensors, strict=True):
                    state[p].setdefault(name, torch.zeros_like(theta))
                self.buffers[name] = self.theta.like([state[p][name] for p in self.params])
        return [self.buffers[name] for name in _STATE[kernel.kind]]


def _rule_of(group: dict) -> Rule:
    """The rule of a param group, with the options it has there."""
    options = {name: group[name] for name in ("momentum", "adam_eps") if group[name] is not None}
    if group["betas"] is not None:
        options["beta1"], options["beta2"] = group["betas"]
    return RULES[group["rule"]](**options)


def _defaults_of(rule: str) -> dict:
    """What a rule has of the options `momentum`, `betas` and `adam_eps`, and their defaults."""
    fields = {field.name: field.default for field in dataclasses.fields(RULES[rule])}
    defaults = {name: fields[field] for name, field in _FIELD.items() if field in fields}
    return defaults | ({"betas": (fields["beta1"], fields["beta2"])} if "betas" in defaults else {})


def _check_options(group: dict) -> None:
    """Fill in what the group's rule has by default; raise ValueError for what it cannot have."""
    for name, inside, text in (
        ("lr", lambda v: v >= 0, ">= 0"),
        ("eps", lambda v: v > 0, "> 0"),
        ("weight_decay", lambda v: v >= 0, ">= 0"),
    ):
        if not (math.isfinite(group[name]) and inside(group[name])):
            raise ValueError(f"{name} must be a finite number {text}, got {group[name]}")
    if group["rule"] not in RULES:
        raise ValueError(f"rule must be one of {', '.join(sorted(RULES))}; got {group['rule']!r}")
    defaults = _defaults_of(group["rule"])
    for name, given in ((name, group[name]) for name in _FIELD):
        if given is not None and name not in defaults:
            rules = " or ".join(rule for rule in RULES if name in _defaults_of(rule))
            raise ValueError(f"{name} is of the rule {rules}, not of {group['rule']}: leave it out, or give rule=")
        group[name] = defaults.get(name) if given is None else given
    for option, why in outside(_rule_of(group)):
        raise ValueError(f"{option} {why}")


def _scalar(loss: torch.Tensor | float) -> float:
    if isinstance(loss, torch.Tensor) and loss.numel() != 1:
        raise ValueError(f"closure must return a scalar loss, got shape {tuple(loss.shape)}; take its mean or sum")
    if loss is None:
        raise ValueError("closure must return the loss, got None")
    return float(loss)
