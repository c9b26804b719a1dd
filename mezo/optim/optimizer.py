"""The optimizer: steps, masters, and what it sees of parameters that others change."""

import dataclasses
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from mezo.method.estimator import Losses
from mezo.method.rules import Rule
from mezo.method.step import Step, Update
from mezo.optim.closure import Buffers, Watch, call
from mezo.optim.options import COUNTS, OF_ALL, check_alike, check_options, defaults_of, fill_in, rule_of, rule_of_all
from mezo.optim.ranks import averaged, checksum_of, world_size
from mezo.optim.state import MOMENTS, matched, of_today, with_z_names
from mezo_kernels import (
    ParamLayout,
    ParamSlot,
    RuleUpdate,
    anchored_decay_,
    canonical_name,
    inner_products,
    perturb_,
    root_mean_square,
    rule_step_,
    step_,
)
from mezo_kernels import Rule as Kernel


def _in_groups(name: str) -> property:
    """An attribute of the optimizer that is kept in its param groups, the same in all."""

    def write(self, value):
        for group in self.param_groups:
            group[name] = value

    return property(lambda self: self.param_groups[0][name], write)


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
    - guided takes n + 2: it measures the slope along the contrast of the directions of low and of high loss.
    - subspace-adam keeps its directions for refresh_every steps and does Adam on the slopes along them.

    Theta lives in a float32 master copy, one for each parameter. A parameter is set to the single rounding of
    theta + eps z, theta - eps z or theta, and is never restored by arithmetic: a float32 parameter equals its master
    exactly after a step. `memory_bytes` is what that costs beside the parameters: 4 bytes an element, plus 4 with
    momentum or 8 with Adam, plus one copy in the parameters' own dtypes where a group has a 16-bit parameter.

    All closure calls of a step start from the same CPU and CUDA generator states (the same dropout masks), and with
    `module` from the same buffers (a batch norm's running statistics); after the step both are as after one call at
    theta. A loss that is NaN or infinite skips the step: parameters are restored, `skipped_steps` counts it. A
    parameter changed in place between steps (`load_state_dict` of the model, clamping under `torch.no_grad`) is read
    again; writes by way of `.data` or `perturb_` are not seen and lost.

    How to choose lr and eps. A step moves theta by about lr |projected_grad| sqrt(number of elements), so lr is far
    below that of a gradient: begin with 1e-6 where all of a language model is trained, 1e-4 with LoRA, 1e-2 for a
    few thousand parameters; go down by 3 while a warning says that it diverges, up by 3 while the loss falls
    steadily. eps: the two losses of a step must differ by more than their rounding, and by little of the loss itself:
    1e-3 in float32, 1e-2 with LoRA or in 16 bits; the loss itself is best computed in float32. A warning comes once
    at the first skipped step, at a loss ten times its best, and when ten steps in a row measured no difference.

    Several processes. Where `torch.distributed` has a default group of more than one rank, losses are averaged over
    it (2n numbers a step), so that all ranks take the same step, and ranks are compared: parameters at the first
    step, seed and options at each. DDP around the model is not needed, though its broadcast at the start is handy.

    Args:
        params: parameters, (name, parameter) pairs, or param groups of either. Unnamed ones are called "0", "1", ...;
            the name decides z, without what wrappers add (`mezo_kernels.canonical_name`). `nn.Parameter`s with
            `requires_grad=False` are left alone.
        lr: learning rate, >= 0; a float or a tensor. Per group, read at each step.
        eps: perturbation scale, > 0; the same in all groups.
        num_perturbations: n >= 1, how many estimates a step averages (n-SPSA); >= 2 for fzoo, >= 3 for guided.
        weight_decay: >= 0; decoupled, but for adam, which adds weight_decay theta to the gradient. Per group.
        anchored_decay: weight decay goes towards the parameters as they are given, theta - lr weight_decay (theta -
            theta_0), not towards zero; 4 bytes more an element. Not with adam. Per group.
        momentum: of the rule momentum, in [0, 1), 0.9 by default. Per group.
        rule: "sgd", "momentum", "adam", "adamw" or "sign", per group; or "fzoo", "conservative" or "guided", of all
            groups.
        betas: of the first and second moment of adam and adamw, in [0, 1), (0.9, 0.999) by default. Per group.
        adam_eps: added to the root of the second moment of adam and adamw, > 0, 1e-8 by default. Per group.
        normalise_z: divide each z by its root mean square over all parameters, so that perturbations have one length.
        seed: seed of the run, 0 <= seed < 2**64; perturbation k of step t has `perturbation_seed(seed, t, k)`.
        distribution: "normal" or "rademacher"; None is rademacher for fzoo and normal for the others.
        backend: of the fused ops; None chooses by device.
        module: whose buffers are kept from moving with every call; None leaves buffers alone. Where a call moves one,
            a step costs one more call, at theta (none more with fzoo and conservative, which make it anyway).
        average_losses: over the ranks of the default process group, if there are several.
        refresh_every: of subspace-adam, >= 1, 50 by default: steps that share their directions.
        elite_share: of guided, in [0, 1), 0.5 by default: the share of directions that count as those of low loss.
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
        module: torch.nn.Module | None = None,
        average_losses: bool = True,
        elite_share: float | None = None,
        anchored_decay: bool = False,
        refresh_every: int | None = None,
    ):
        self.backend, self.module, self.average_losses = backend, module, average_losses
        self._start_anew()
        defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "rule": rule, "updates": 0}
        defaults |= {"anchored_decay": anchored_decay}
        # updates: those applied to the group so far, which Adam counts
        defaults |= {"seed": seed, "num_perturbations": num_perturbations, "normalise_z": normalise_z}
        defaults |= {"distribution": distribution, "steps": 0, "skipped_steps": 0, "projected_grads": [],
                     "moments": []}  # fmt: skip
        # schedulers look here for what they may cycle
        of_rule = {"momentum": momentum, "betas": betas, "adam_eps": adam_eps}
        of_rule |= {"elite_share": elite_share, "refresh_every": refresh_every}
        defaults |= {name: value for name, value in of_rule.items() if value is not None or name in defaults_of(rule)}
        super().__init__(params, defaults)
        rule = self._rule()
        self.distribution = self.defaults["distribution"] = distribution or rule.distribution
        self._follow()

    def _start_anew(self) -> None:
        self._groups, self._seen, self._watch = [], None, Watch()
        self._changed = True  # by others than steps, since ranks were last compared

    seed = _in_groups("seed")
    num_perturbations = _in_groups("num_perturbations")
    distribution = _in_groups("distribution")
    normalise_z = _in_groups("normalise_z")
    steps = _in_groups("steps")
    skipped_steps = _in_groups("skipped_steps")
    projected_grads = _in_groups("projected_grads")

    def add_param_group(self, param_group: dict) -> None:
        """Add a group; its options are checked and its parameters join at the next step."""
        for name in (*OF_ALL, *COUNTS) if self.param_groups else ():
            param_group.setdefault(name, self.param_groups[0][name])
        super().add_param_group(param_group)
        *before, group = self.param_groups
        fill_in(group)
        check_options(group)
        check_alike(self.param_groups)
        position = sum(len(other["params"]) for other in before)
        names = group.get("param_names") or [str(position + i) for i in range(len(group["params"]))]
        group["z_names"] = [canonical_name(name) for name in names]

    @torch.inference_mode(False)
    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor | float] | None = None) -> torch.Tensor:
        """One MeZO step; calls `closure` as often as the rule needs losses, without autograd.

        Args:
            closure: computes and returns the loss, a scalar tensor or a number, from the current parameters.
        Returns:
            Mean of the losses at theta + eps z and theta - eps z (theta, for fzoo) of all perturbations: float64, on
            the CPU.
        Raises:
            ValueError: the closure returned no number or called backward(); ranks that differ.
        """
        if closure is None:
            raise ValueError("MeZO measures the loss: call optimizer.step(closure), closure() returning a scalar loss")
        self._follow()
        rule, eps = self._rule(), float(self.param_groups[0]["eps"])
        norm = functools.cache(self._root_mean_square) if self.normalise_z else None
        step = Step.of_run(self.seed, self.steps, self.num_perturbations, eps, norm, rule.period)
        norms = tuple(map(norm, step.seeds)) if norm else ()
        buffers = Buffers(self.module)
        kept = buffers.before
        try:
            losses = self._losses(closure, step, rule, buffers)
            self.projected_grads = list(losses.projected_grads(rule.half_distance(eps)))
            products = self._inner_products(step.seeds) if rule.projects else []
            tried = self._tried_along(closure, step, losses, rule, buffers) if rule.guides else []
            slopes = rule.slopes(self.projected_grads, tried, eps)
            remembered = [self._remember(group, slopes) for group in self._groups]
            updates = [
                self._plan(group, step, slopes, losses, norms, products)
                for group, (_, slopes) in zip(self._groups, remembered, strict=True)
            ]
            skipped = any(update.skipped for update in updates)
            if skipped:
                self.skipped_steps += 1
            else:
                if rule.compares:
                    updates, tried = self._chosen(closure, rule, updates, buffers)
                for group, update, (moments, _) in zip(self._groups, updates, remembered, strict=True):
                    self._apply(group, update)
                    group.options["moments"] = moments
                kept = buffers.after
            self.steps += 1
        finally:
            for group in self._groups:
                group.write(group.theta)
            buffers.set(kept)
            self._seen = self._storage()
        self._made(losses, updates, tried)
        self._watch.see(losses.plus + losses.minus, skipped, [name for _, name, _ in self._trainable()])
        return torch.tensor(losses.plus + losses.minus, dtype=torch.float64).mean()

    def _made(self, losses: Losses, updates: Sequence[Update], tried: Sequence[float]) -> None:
        """Nothing: where a subclass keeps a log. Losses of a step, what it did to each group, and what it tried."""

    def _losses(self, closure: Callable, step: Step, rule: Rule, buffers: Buffers) -> Losses:
        """Losses of a step, all from the same generator states and buffers."""
        calls = len(step) + 1 if rule.one_sided else 2 * len(step)
        losses = []
        for n, _ in enumerate(self._copies(step, rule)):
            # further calls, from the same states
            more = rule.compares or rule.guides or (buffers.moved and not rule.one_sided)
            last = n == calls - 1 and not more
            losses.append(self._call(closure, buffers, advance=last, at_theta=rule.one_sided and n == 0))
        if buffers.moved and not (rule.one_sided or rule.compares or rule.guides):
            self._call_at_theta(closure, buffers)
        losses = self._averaged(losses)
        if rule.guides:
            return Losses(tuple(losses), tuple(losses)).against_mean()
        if rule.one_sided:
            return Losses(tuple(losses[1:]), (losses[0],) * len(step))
        return Losses(tuple(losses[::2]), tuple(losses[1::2]))

    def _tried_along(self, closure: Callable, step: Step, losses: Losses, rule: Rule, buffers: Buffers) -> list[float]:
        """Losses at theta + eps v and theta - eps v, v the contrast of a step; [] if one before is not finite."""
        tried: list[float] = []
        if not all(map(math.isfinite, losses.plus)):
            return tried
        along = dataclasses.replace(step, weights=rule.contrast(losses)).along()
        for sign in (1.0, -1.0):
            for group in self._groups:
                self._displace(group, [(seed, sign * c) for seed, c in along])
            tried.append(self._call(closure, buffers, advance=bool(tried) and not buffers.moved))
        if buffers.moved:
            self._call_at_theta(closure, buffers)
        return self._averaged(tried)

    def _call_at_theta(self, closure: Callable, buffers: Buffers) -> None:
        """The last call of a step, for what it leaves in buffers."""
        for group in self._groups:
            group.write(group.theta)
        self._call(closure, buffers, advance=True, at_theta=True)

    def _call(self, closure: Callable, buffers: Buffers, advance: bool, at_theta: bool = False) -> float:
        """The loss; the generators stay as they were unless this is the last call of a step, and buffers do."""
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices, enabled=not advance):
            loss = call(closure)
        buffers.rewind(keep=at_theta)
        return loss

    def _averaged(self, losses: list[float]) -> list[float]:
        """Losses of the step that all ranks take."""
        if not self.average_losses or world_size() == 1:
            return losses
        settings = {name: self.param_groups[0][name] for name in ("steps", *OF_ALL)}
        checksum = checksum_of(self._masters()) if self._changed else None
        self._changed = False
        return averaged(losses, settings, checksum)

    def _masters(self) -> list[torch.Tensor]:
        return [theta for group in self._groups for theta in group.theta.tensors]

    def _remember(self, group: "_Group", slopes: Sequence[float]) -> tuple[list[float], Sequence[float]]:
        """What the rule of a group remembers after this step, and what it plans by."""
        return rule_of(group.options).remember(group.options["moments"], self.steps, slopes)

    def _plan(
        self, group: "_Group", step: Step, slopes: Sequence, losses: Losses, norms: Sequence, products: Sequence
    ) -> Update:
        """The update of one param group."""
        lr, decay = float(group.options["lr"]), group.options["weight_decay"]
        given = {"norms": norms, "products": products}
        return rule_of(group.options).plan(step.seeds, slopes, losses, lr, decay, **given)

    def _chosen(
        self, closure: Callable, rule: Rule, updates: Sequence[Update], buffers: Buffers
    ) -> tuple[Sequence[Update], list[float]]:
        """Of a rule that compares thetas, the updates that the losses at these say, and those losses."""
        tried: list[float] = []
        for sign in (0.0, -1.0, 1.0):  # theta, theta - c z, theta + c z
            for group, update in zip(self._groups, updates, strict=True):
                (seed,), (c,) = update.seeds, update.coefficients
                if sign * c:
                    self._perturb(group, seed, sign * c)
                else:
                    group.write(group.theta)
            tried.append(self._call(closure, buffers, advance=len(tried) == 2, at_theta=not tried))
        tried = self._averaged(tried)
        return [rule.choose(update, tried) for update in updates], tried

    def _copies(self, step: Step, rule: Rule) -> Iterator[None]:
        """Set the parameters to the copies that a step scores, in turn.

        Both signs of each perturbation; one-sided theta and each theta + eps z; where the rule guides these alone.
        """
        if rule.one_sided:
            yield
        for seed, eps in zip(step.seeds, step.eps, strict=True):
            for group in self._groups:
                self._perturb(group, seed, eps)
            yield
            if rule.one_sided or rule.guides:
                continue
            for group in self._groups:
                if group.minus:
                    group.write(group.minus)
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
        group.show()

    def _displace(self, group: "_Group", directions: Sequence[tuple[int, float]]) -> None:
        """Set the parameters of a group to theta + sum_k c_k z(seed_k), rounded once."""
        moved = group.theta.like([theta.clone() for theta in group.theta.tensors])
        options = {"distribution": self.distribution, "backend": self.backend}
        step_(moved, [(seed, -c) for seed, c in directions], **options)
        group.write(moved)

    def _apply(self, group: "_Group", update: Update) -> None:
        """Apply an update to the master of one group: one fused pass."""
        options = {"distribution": self.distribution, "backend": self.backend}
        rule = rule_of(group.options)
        kernel = rule.kernel(rule.l2(group.options["weight_decay"]))
        group.options["updates"] += 1
        if group.options["anchored_decay"]:
            anchored_decay_(group.theta.tensors, [self.state[p]["start"] for p in group.params], update.decay)
            update = dataclasses.replace(update, decay=1.0)
        if kernel is None:
            step_(group.theta, update.directions(), **options)
            return
        step = RuleUpdate(update.seeds, update.coefficients, update.lr, group.options["updates"], update.decay)
        rule_step_(group.theta, kernel, group.moments(self.state, kernel), [step], **options)

    def _root_mean_square(self, seed: int) -> float:
        return root_mean_square(seed=seed, **self._drawing())

    def _inner_products(self, seeds: Sequence[int]) -> list[list[float]]:
        return inner_products(seeds=seeds, **self._drawing()).tolist()

    def _drawing(self) -> dict:
        """How z of all parameters is drawn."""
        shapes = {name: tuple(p.shape) for _, name, p in self._trainable()}
        device = next(p.device for _, _, p in self._trainable())
        return {"shapes": shapes, "device": device, "backend": self.backend}

    def _rule(self) -> Rule:
        """The rule that says what a step measures."""
        return rule_of_all(self.param_groups)

    def _trainable(self) -> Iterator[tuple[dict, str, torch.Tensor]]:
        """(group, name that z is drawn under, parameter) of every parameter that is perturbed."""
        for group in self.param_groups:
            for name, p in zip(group["z_names"], group["params"], strict=True):
                if p.requires_grad or not isinstance(p, torch.nn.Parameter):
                    yield group, name, p

    def _storage(self) -> list[tuple[int, int]]:
        return [(p.data_ptr(), p._version) for _, _, p in self._trainable()]

    @torch.inference_mode(False)
    @torch.no_grad()
    def _follow(self) -> None:
        """Bring masters and layouts up to date with parameters that were added, moved or changed from outside."""
        _check_writable(self._trainable())
        seen = self._storage()
        if seen == self._seen:
            return
        for group, _, p in self._trainable():
            state = self.state[p]
            for name, tensor in state.items():
                state[name] = tensor.to(p.device)
            if "master" not in state:
                state["master"] = p.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            elif not torch.equal(state["master"].to(p.dtype), p):
                state["master"].copy_(p)
            if group["anchored_decay"] and "start" not in state:
                state["start"] = state["master"].clone()
        if self._seen is None or [address for address, _ in seen] != [address for address, _ in self._seen]:
            self._build()
        self._seen, self._changed = seen, True

    def _build(self) -> None:
        slots = [(options, ParamSlot(name, _in_order(p)), p) for options, name, p in self._trainable()]
        ParamLayout(slot for _, slot, _ in slots)  # no collision across groups either
        self._groups = []
        for options in self.param_groups:
            mine = [(slot, p) for group, slot, p in slots if group is options]
            if mine:
                self._groups.append(self._layouts(options, [slot for slot, _ in mine], [p for _, p in mine]))

    def _layouts(self, options: dict, slots: list[ParamSlot], params: list[torch.Tensor]) -> "_Group":
        current = ParamLayout(slots)
        theta = current.like([self.state[p]["master"] for p in params])
        halves = any(p.dtype != torch.float32 for p in params)
        minus = current.like([torch.empty_like(p) for p in current.tensors]) if halves else None
        rule, group = rule_of(options), _Group(options, params, current, theta, minus)
        if rule.kernel():
            group.moments(self.state, rule.kernel())  # now: a checkpoint is loaded into what is there
        return group

    @property
    def memory_bytes(self) -> int:
        """Bytes held beside the parameters: masters, moments, minus copies of 16-bit groups, and rows in order."""
        held = [t for state in self.state.values() for t in state.values()]
        held += [t for group in self._groups if group.minus for t in group.minus.tensors]
        held += [ordered for group in self._groups for _, ordered in group.copies()]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def __repr__(self):
        not_shown = ("params", "param_names", "z_names", *OF_ALL, *COUNTS)
        groups = [
            {name: value for name, value in group.items() if name not in not_shown} for group in self.param_groups
        ]
        counts = f"steps: {self.steps}, skipped_steps: {self.skipped_steps}, memory_bytes: {self.memory_bytes}"
        options = ", ".join(f"{name}: {self.param_groups[0][name]}" for name in OF_ALL)
        lines = [*(f"Parameter Group {i}: {group}" for i, group in enumerate(groups)), options, counts]
        return "\n    ".join(["MeZO (", *lines]) + "\n)"

    def __getstate__(self):
        beside = ("backend", "module", "average_losses")
        return super().__getstate__() | {name: getattr(self, name) for name in beside}

    def __setstate__(self, state):
        """Take over what was pickled, by an older version too, whose counts stood beside the groups."""
        counts = {name: state[name] for name in (*OF_ALL, *COUNTS) if name in state}
        state = {name: value for name, value in state.items() if name not in counts}
        super().__setstate__({"module": None, "average_losses": True} | state)
        self.param_groups = with_z_names(of_today(group, self.defaults, counts) for group in self.param_groups)
        self._start_anew()

    def state_dict(self) -> dict:
        """As of any optimizer. Parameters changed since the last step, as by a broadcast, are read first."""
        self._follow()
        return super().state_dict()

    @torch.inference_mode(False)
    @torch.no_grad()
    def load_state_dict(self, state_dict: dict) -> None:
        """Resume: restores what `state_dict` holds and sets the parameters to the masters.

        Parameters that have names in the state and here are matched by these, others by position. z goes on under
        the names of the state. Everything is checked before anything is written.

        Args:
            state_dict: of `state_dict`, of this version or an older one, or of torch's distributed checkpoints.
        Raises:
            ValueError: groups, names, shapes, dtypes or options that do not fit; optimizer and model are as before.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        groups, state = matched(state_dict, self.param_groups, self.defaults)
        self.param_groups, self.state = groups, defaultdict(dict, state)
        self._start_anew()
        for p, tensors in state.items():
            p.copy_(tensors["master"])
        self._follow()
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)


@dataclass
class _Group:
    """One param group: its options, its parameters, and the layouts the ops see them through."""

    options: dict
    params: list[torch.Tensor]
    current: ParamLayout
    theta: ParamLayout
    minus: ParamLayout | None
    buffers: dict[str, ParamLayout] = field(default_factory=dict)

    def write(self, layout: ParamLayout) -> None:
        """Set the parameters to the values of a layout."""
        self.current.copy_(layout)
        self.show()

    def show(self) -> None:
        """Bring what ops wrote to parameters that they do not write themselves."""
        for p, ordered in self.copies():
            p.copy_(ordered)

    def copies(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(parameter, the copy of it that ops write) where its elements are in another order, as in channels_last."""
        pairs = zip(self.params, self.current.tensors, strict=True)
        return ((p, tensor) for p, tensor in pairs if tensor.data_ptr() != p.data_ptr())

    def moments(self, state: dict, kernel: Kernel) -> list[ParamLayout]:
        """State of the fused rule, one layout a moment; zeros at first."""
        for name in MOMENTS[kernel.kind]:
            if name not in self.buffers:
                for p, theta in zip(self.params, self.theta.tensors, strict=True):
                    state[p].setdefault(name, torch.zeros_like(theta))
                self.buffers[name] = self.theta.like([state[p][name] for p in self.params])
        return [self.buffers[name] for name in MOMENTS[kernel.kind]]


def _in_order(p: torch.Tensor) -> torch.Tensor:
    """The parameter as ops write it: itself, or a row-major copy of three or more dimensions in another order."""
    p = p.detach()
    return p if p.dim() <= 2 else p.contiguous()


def _check_writable(trainable: Iterable[tuple[dict, str, torch.Tensor]]) -> None:
    for _, name, p in trainable:
        if p.is_meta:
            raise ValueError(
                f"{name} is on the meta device, without values: load the model before the optimizer is made"
            )
        if p.is_inference():
            raise ValueError(f"{name} was made under torch.inference_mode, which forbids to change it: make it outside")
