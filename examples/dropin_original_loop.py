"""`perturb_` and `step_` in place of the two functions of a plain MeZO loop: five lines, and the drift is gone.

Run: python examples/dropin_original_loop.py
"""

import copy

import torch

from mezo_kernels import ParamLayout, perturb_, step_


def perturb(params, scale, seed):
    """theta + scale z, z drawn again from the seed; 16-bit parameters are rounded at each call."""
    torch.manual_seed(seed)
    for p in params:
        z = torch.normal(mean=0, std=1, size=p.shape, dtype=p.dtype, device=p.device)
        p.data = p.data + scale * z


@torch.no_grad()
def plain(model, loss_of, steps, lr, eps):
    theta = list(model.parameters())
    for seed in range(steps):
        perturb(theta, +eps, seed)
        loss_plus = loss_of(model)
        perturb(theta, -2 * eps, seed)
        loss_minus = loss_of(model)
        perturb(theta, +eps, seed)
        perturb(theta, -lr * (loss_plus - loss_minus) / (2 * eps), seed)


@torch.no_grad()
def fused(model, loss_of, steps, lr, eps):
    theta, master = ParamLayout.from_module(model), ParamLayout.from_module(copy.deepcopy(model).float())
    for seed in range(steps):
        perturb_(theta, +eps, seed)
        loss_plus = loss_of(model)
        perturb_(theta.copy_(master), -eps, seed)
        loss_minus = loss_of(model)
        step_(master, [(seed, lr * (loss_plus - loss_minus) / (2 * eps))])
        theta.copy_(master)


def make_model(dtype):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 2)).to(dtype)


def loss_of(model):
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(1))
    logits = model(x.to(model[0].weight.dtype)).float()
    return torch.nn.functional.cross_entropy(logits, (x[:, 0] > 0).long()).item()


def drift(train, dtype, steps=200):
    """Root mean square change of the parameters over steps of lr 0, which should change nothing."""
    model = make_model(dtype)
    before = torch.nn.utils.parameters_to_vector(model.parameters()).double()
    train(model, lambda _: 0.0, steps, lr=0.0, eps=1e-3)
    after = torch.nn.utils.parameters_to_vector(model.parameters()).double()
    return (after - before).square().mean().sqrt().item()


def main():
    torch.set_num_threads(1)  # the model is tiny
    for train in (plain, fused):
        model = make_model(torch.float32)
        before = loss_of(model)
        train(model, loss_of, steps=300, lr=2e-2, eps=1e-3)
        rms = ", ".join(f"{dtype} {drift(train, dtype):.1e}" for dtype in (torch.float32, torch.bfloat16))
        print(f"{train.__name__}: loss {before:.3f} -> {loss_of(model):.3f}; drift of 200 steps of lr 0: {rms}")


if __name__ == "__main__":
    main()
