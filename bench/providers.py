"""The ways to do the same work that are timed beside each other: ours, and others as their users write them."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from shapes import Case

from mezo_kernels import Rule, RuleUpdate, perturb_, rule_step_, step_, tensor_id
from mezo_kernels.philox import box_muller, philox_4x32

SEED, EPS, COEFFICIENT = 1, 1e-3, 1e-8
# the passes over theta that an op takes without fusion; a step is +eps, -2 eps, +eps, update
PASSES = {"perturb": (1e-6,), "step": (EPS, -2 * EPS, EPS, -COEFFICIENT)}
RULES = {"momentum": Rule("momentum"), "adamw": Rule("adamw"), "sign": Rule("sign")}
PROJECTED_GRAD, LR = 1.0, 1e-8


@dataclass(frozen=True)
class Work:
    """One op of one provider, ready to be timed.

    Args:
        run: does the op once.
        launches: calls into compiled code that `run` makes, counted in its source.
        held: bytes it keeps between calls beside theta, plus and minus.
    """

    run: Callable[[], object]
    launches: int
    held: int = 0


def ours(op: str, case: Case, updates: int = 1) -> Work:
    """One pass; a step updates a float32 master and writes plus and minus in the case's dtype."""
    if op == "perturb":
        return Work(lambda: perturb_(case.layout, *PASSES[op], SEED), 1)
    theta = case.layout.like([p.float() if p.dtype != torch.float32 else p.clone() for p in case.params])
    plus, minus = case.layout, case.layout.like([p.clone() for p in case.params])
    log = [(SEED + k, COEFFICIENT) for k in range(updates)]
    return Work(lambda: step_(theta, log, 1.0, SEED + updates, EPS, plus, minus), 1)


def _in_passes(op: str, one_pass: Callable[[float], None], launches: int, held: int = 0) -> Work:
    def run():
        for scale in PASSES[op]:
            one_pass(scale)

    return Work(run, launches * len(PASSES[op]), held)


def original_pass(params: list[torch.Tensor], scale: float, seed: int = SEED) -> None:
    """One pass of the original MeZO loop: one seed, z drawn tensor by tensor, a new tensor for each sum."""
    torch.manual_seed(seed)
    for p in params:
        z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
        p.data = p.data + scale * z


def original(op: str, case: Case) -> Work:
    """The original loop; a draw, a product and a sum for each tensor."""
    params = [p.clone() for p in case.params]
    return _in_passes(op, lambda scale: original_pass(params, scale), 3 * len(params))


def foreach(op: str, case: Case) -> Work:
    """In place with a z that is stored: as much memory again, and no draw at all."""
    z = [torch.randn_like(p) for p in case.params]
    held = sum(p.nbytes for p in z)
    return _in_passes(op, lambda scale: torch._foreach_add_(case.params, z, alpha=scale), 1, held)


@torch.compile(dynamic=True)
def _compiled(theta, scale, key, tag):
    group = torch.arange((theta.numel() + 3) // 4, dtype=torch.int64, device=theta.device)
    zero = torch.zeros_like(group)
    w0, w1, w2, w3 = philox_4x32(group, zero, zero + tag, zero, key[0], key[1])
    z = torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], -1)
    theta.add_(scale * z.flatten()[: theta.numel()].view(theta.shape))


def compiled(op: str, case: Case) -> Work:
    """The reference through torch.compile, one call a tensor; values that change are tensors: nothing recompiles."""
    device = case.params[0].device
    tags = [torch.tensor(tensor_id(name), device=device) for name in case.layout.names]
    key = torch.tensor([SEED, 0], device=device)

    def one_pass(scale):
        scale = torch.tensor(scale, device=device)
        for p, tag in zip(case.params, tags, strict=True):
            _compiled(p, scale, key, tag)

    return _in_passes(op, one_pass, len(case.params))


def tutorial(op: str, case: Case) -> Work:
    """Triton as its tutorials draw numbers: `tl.randn`, one launch a tensor."""
    from tutorial import perturb  # Triton is imported where it is timed

    def one_pass(scale):
        for p in case.params:
            perturb(p, scale, SEED)

    return _in_passes(op, one_pass, len(case.params))


def by_rule(case: Case, rule: str) -> Work:
    """A float32 master and its state stepped, and plus and minus written, in one pass."""
    theta, plus, minus, *state = (case.layout.like([p.clone() for p in case.params]) for _ in range(5))
    for moment in state:
        torch._foreach_zero_(moment.tensors)
    state, steps = state[: RULES[rule].states], itertools.count(1)

    def run():
        update = RuleUpdate([SEED], [PROJECTED_GRAD], LR, next(steps))
        rule_step_(theta, RULES[rule], state, [update], SEED + 1, EPS, plus, minus)

    return Work(run, 1, sum(t.nbytes for moment in state for t in moment.tensors))


class _Sign(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self):
        params = self.param_groups[0]["params"]
        torch._foreach_add_(params, torch._foreach_sign([p.grad for p in params]), alpha=-LR)


def by_original_and_optim(case: Case, rule: str) -> Work:
    """Three passes of the original loop, then z drawn again into .grad and torch.optim's own fused or foreach step."""
    params = [p.clone().requires_grad_() for p in case.params]
    make = {
        "momentum": lambda: torch.optim.SGD(params, lr=LR, momentum=0.9, fused=True),
        "adamw": lambda: torch.optim.AdamW(params, lr=LR, weight_decay=0.0, fused=True),
        "sign": lambda: _Sign(params, {}),
    }
    optimizer = make[rule]()

    def run():
        for scale in (EPS, -2 * EPS, EPS):
            original_pass(params, scale)
        torch.manual_seed(SEED)
        for p in params:
            p.grad = PROJECTED_GRAD * torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
        optimizer.step()
        optimizer.zero_grad()

    run()
    held = sum(t.nbytes for state in optimizer.state.values() for t in state.values() if t.numel() > 1)
    return Work(run, 11 * len(params) + 1, held)


PROVIDERS = {
    "ours": ours,
    "original loop": original,
    "torch._foreach, stored z": foreach,
    "torch.compile of the reference": compiled,
    "Triton tutorial": tutorial,
}
COMPILED_SHAPES = ("lora-r8-qv", "flat-16M")  # compiling a shape takes seconds


def unsuitable(provider: str, shape: str, dtype: str, device: str) -> str | None:
    """Why a provider is not timed on a case, or None."""
    if provider == "Triton tutorial" and device == "cpu":
        return "Triton needs a GPU"
    if provider == "torch.compile of the reference" and (shape not in COMPILED_SHAPES or dtype != "float32"):
        return "torch.compile is timed on two shapes in float32"
    return None
