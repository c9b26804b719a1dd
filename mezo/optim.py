"""MeZO as a torch optimizer: zeroth-order steps for any module and any closure, theta kept exactly in float32."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from mezo.method.estimator import deviation, projected_grad
from mezo_kernels import (
    ParamLayout,
    ParamSlot,
    Rule,
    RuleUpdate,
    canonical_name,
    perturb_,
    perturbation_seed,
    rule_step_,
    step_,
)
from mezo_kernels.philox import STREAMS, check_seed


class MeZO(torch.optim.Optimizer):
    """theta <- theta (1 - lr weight_decay) - lr/n sum_k projected_grad_k z_k, from 2n forward passes and no autograd.

    projected_grad_k = (loss(theta + eps z_k) - loss(theta - eps z_k)) / (2 eps): SPSA with z regenerated from a seed,
    as in MeZO (Malladi et al. 2023, arXiv 2305.17333, algorithms 1 and 2). Momentum, Adam, AdamW and sign act once a
    step on the whole estimate 1/n sum_k projected_grad_k z_k, as `mezo_kernels.Rule` says, in one fused pass.

    The rule fzoo (Dang et al. 2025, arXiv 2506.09034) takes n + 1 forward passes: projected_grad_k = (loss(theta + eps
    z_k) - loss(theta)) / eps with z of +1 and -1, and lr over the sample standard deviation of the n perturbed losses.
    Where they are all equal theta stays as it is.

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
        momentum: mu in [0, 1), of the rule sgd. Per group.
        rule: "sgd", "adam", "adamw" or "sign", per group; or "fzoo", of all groups.
        betas: of Adam's first and second moment, in [0, 1). Per group.
        adam_eps: added to the root of Adam's second moment, > 0. Per group.
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
    >>> accuracy_after_training(lr=0.05) > 0.95, accuracy_after_training(lr=0.005, momentum=0.9) > 0.95
    (True, True)
    >>> accuracy_after_training(lr=1e-4, rule="fzoo", num_perturbations=4) > 0.95
    True
    """

    def __init__(
        self,
        params,
        lr: float,
        eps: float = 1e-3,
        num_perturbations: int = 1,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        seed: int = 0,
        distribution: str | None = None,
        backend: str | None = None,
        rule: str = "sgd",
        betas: tuple[float, float] = (0.9, 0.999),
        adam_eps: float = 1e-8,
    ):
        if not isinstance(num_perturbations, int) or num_perturbations < 1:
            raise ValueError(f"num_perturbations must be an integer >= 1, got {num_perturbations!r}")
        if distribution is not None and distribution not in STREAMS:
            raise ValueError(f"distribution must be one of {', '.join(STREAMS)}; got {distribution!r}")
        self.seed, self.num_perturbations = check_seed(seed), num_perturbations
        self.backend = backend
        self.steps, self.skipped_steps = 0, 0
        self.projected_grads: list[float] = []
        self._groups, self._seen = [], None
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "momentum": momentum}
        # updates: those applied to the group so far, which Adam counts
        super().__init__(params, defaults | {"rule": rule, "betas": betas, "adam_eps": adam_eps, "updates": 0})
        self._eps()
        self.distribution = distribution or ("rademacher" if self._one_sided() else "normal")
        self._follow()

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; its options are checked and its parameters join at the next step."""
        super().add_param_group(param_group)
        _check_options(self.param_groups[-1])

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor | float] | None = None) -> torch.Tensor:
        """One MeZO step; calls `closure` twice for each perturbation, n + 1 times for fzoo, without autograd.

        Args:
            closure: computes and returns the loss, a scalar tensor or a number, from the current parameters.
        Returns:
            Mean of the losses at theta + eps z and theta - eps z (theta, for fzoo) of all perturbations: float64, on
            the CPU.
        """
        if closure is None:
            raise ValueError("MeZO measures the loss: call optimizer.step(closure), closure() returning a scalar loss")
        self._follow()
        eps, one_sided = self._eps(), self._one_sided()
        seeds = [perturbation_seed(self.seed, self.steps, k) for k in range(self.num_perturbations)]
        try:
            losses = self._losses(closure, seeds, eps, one_sided)
            self.projected_grads = [projected_grad(*pair, eps / 2 if one_sided else eps) for pair in losses]
            if all(map(math.isfinite, self.projected_grads)):
                spread = deviation([plus for plus, _ in losses]) if one_sided else 1.0
                for group in self._groups if spread else ():
                    self._update(group, seeds, spread)
            else:
                self.skipped_steps += 1
            self.steps += 1
        finally:
            for group in self._groups:
                group.current.copy_(group.theta)
            self._seen = self._storage()
        return torch.tensor(losses, dtype=torch.float64).mean()

    def _losses(self, closure, seeds: list[int], eps: float, one_sided: bool) -> list[tuple[float, float]]:
        """(loss_plus, loss_minus or one-sided loss) of each perturbation, all from the same generator states."""
        losses, calls = [], len(seeds) + 1 if one_sided else 2 * len(seeds)
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        for _ in self._copies(seeds, eps, one_sided):
            with torch.random.fork_rng(devices, enabled=len(losses) < calls - 1):
                losses.append(_scalar(closure()))
        if one_sided:
            return [(loss, losses[0]) for loss in losses[1:]]
        return list(zip(losses[::2], losses[1::2], strict=True))

    def _copies(self, seeds: list[int], eps: float, one_sided: bool) -> Iterator[None]:
        """Set the parameters to both signs of each seed in turn, or one-sided to theta and to each theta + eps z."""
        if one_sided:
            yield
        for seed in seeds:
            for signed in (eps,) if one_sided else (eps, -eps):
                self._perturb(seed, signed)
                yield

    def _perturb(self, seed: int, eps: float) -> None:
        """Set the parameters to theta + eps z; with eps < 0 just after the same with -eps."""
        options = {"distribution": self.distribution, "backend": self.backend}
        for group in self._groups:
            if not group.minus:
                perturb_(group.current.copy_(group.theta), eps, seed, **options)
            elif eps > 0:
                step_(group.theta, [], 1.0, seed, eps, group.current, group.minus, **options)
            else:
                group.current.copy_(group.minus)

    def _update(self, group: "_Group", seeds: list[int], spread: float) -> None:
        """Apply the step to the master of one group, lr over `spread` where the rule has no state: one fused pass."""
        options = {"distribution": self.distribution, "backend": self.backend}
        lr, n = float(group.options["lr"]), self.num_perturbations
        decay = 1 - lr * group.options["weight_decay"]
        group.options["updates"] += 1
        rule = _rule(group.options)
        if rule is None:
            updates = [(seed, lr / spread * g / n) for seed, g in zip(seeds, self.projected_grads, strict=True)]
            step_(group.theta, updates, decay, **options)
            return
        weights = [g / n for g in self.projected_grads]
        update = RuleUpdate(seeds, weights, lr, group.options["updates"], 1.0 if rule.kind == "adam" else decay)
        rule_step_(group.theta, rule, group.moments(self.state, rule), [update], **options)

    def _eps(self) -> float:
        values = sorted({float(group["eps"]) for group in self.param_groups})
        if len(values) > 1:
            raise ValueError(f"projected_grad has one eps: give all param groups the same, got {values}")
        return values[0]

    def _one_sided(self) -> bool:
        rules = {group["rule"] for group in self.param_groups}
        if "fzoo" not in rules:
            return False
        if len(rules) > 1:
            raise ValueError(f"fzoo divides lr by one number: give all param groups the same rule, got {sorted(rules)}")
        if self.num_perturbations < 2:
            raise ValueError(
                f"fzoo takes the deviation of losses: num_perturbations must be >= 2, got {self.num_perturbations}"
            )
        return True

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

    def state_dict(self) -> dict:
        """Everything a bitwise equal resumption needs: masters, momentum buffers, options, seed and step count."""
        return super().state_dict() | {"mezo": {name: getattr(self, name) for name in _SAVED}}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Resume: restores what `state_dict` holds and sets the parameters to the masters."""
        super().load_state_dict(state_dict)
        for name in _SAVED:
            setattr(self, name, state_dict["mezo"][name])
        params = [p for group in self.param_groups for p in group["params"]]
        ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(ids, params, strict=True):
            if i in state_dict["state"]:
                # torch casts state to the dtype of the parameter, which would round a master to 16 bits
                saved = state_dict["state"][i].items()
                self.state[p] = {name: t.to(p.device, torch.float32, copy=True) for name, t in saved}
                p.copy_(self.state[p]["master"])
        self._follow()


RULES = ("sgd", "adam", "adamw", "sign", "fzoo")
# as torch.optim's SGD and Adam call them
_STATE = {"momentum": ("momentum_buffer",), "sign": ()} | dict.fromkeys(("adam", "adamw"), ("exp_avg", "exp_avg_sq"))
_SAVED = ("seed", "num_perturbations", "distribution", "steps", "skipped_steps", "projected_grads")


@dataclass
class _Group:
    """One param group: its options, its parameters, and the layouts the ops see them through."""

    options: dict
    params: list[torch.Tensor]
    current: ParamLayout
    theta: ParamLayout
    minus: ParamLayout | None
    buffers: dict[str, ParamLayout] = field(default_factory=dict)

    def moments(self, state, rule: Rule) -> list[ParamLayout]:
        for name in _STATE[rule.kind]:
            if name not in self.buffers:
                for p, theta in zip(self.params, self.theta.tensors, strict=True):
                    state[p].setdefault(name, torch.zeros_like(theta))
                self.buffers[name] = self.theta.like([state[p][name] for p in self.params])
        return [self.buffers[name] for name in _STATE[rule.kind]]


def _rule(options: dict) -> Rule | None:
    """The fused rule of a group, or None for plain SGD."""
    name, (beta1, beta2) = options["rule"], options["betas"]
    if name in ("sgd", "fzoo"):
        return Rule("momentum", options["momentum"]) if options["momentum"] else None
    return Rule(name, beta1, beta2, options["adam_eps"], options["weight_decay"] if name == "adam" else 0.0)


def _check_options(group: dict) -> None:
    for name, inside, text in (
        ("lr", lambda v: v >= 0, ">= 0"),
        ("eps", lambda v: v > 0, "> 0"),
        ("weight_decay", lambda v: v >= 0, ">= 0"),
        ("momentum", lambda v: 0 <= v < 1, "in [0, 1)"),
    ):
        if not (math.isfinite(group[name]) and inside(group[name])):
            raise ValueError(f"{name} must be a finite number {text}, got {group[name]}")
    if group["rule"] not in RULES:
        raise ValueError(f"rule must be one of {', '.join(RULES)}; got {group['rule']!r}")
    if group["momentum"] and group["rule"] != "sgd":
        raise ValueError(f"momentum is of the rule sgd, not of {group['rule']}: leave it out")
    _rule(group)


def _scalar(loss: torch.Tensor | float) -> float:
    if isinstance(loss, torch.Tensor) and loss.numel() != 1:
        raise ValueError(f"closure must return a scalar loss, got shape {tuple(loss.shape)}; take its mean or sum")
    if loss is None:
        raise ValueError("closure must return the loss, got None")
    return float(loss)
