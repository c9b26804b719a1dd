"""Other ways to do the same work, written as their users write them."""

import torch

from mezo_kernels.philox import box_muller, philox_4x32


def perturb(params: list[torch.Tensor], scale: float, seed: int) -> None:
    """One pass of the original MeZO loop: one seed, z drawn tensor by tensor, a new tensor for each sum."""
    torch.manual_seed(seed)
    for p in params:
        z = torch.normal(mean=0, std=1, size=p.shape, device=p.device, dtype=p.dtype)
        p.data = p.data + scale * z


def step(params: list[torch.Tensor], coefficient: float, eps: float, seed: int) -> None:
    """The four passes of a step: +eps, -2 eps, +eps, update."""
    for scale in (eps, -2 * eps, eps, -coefficient):
        perturb(params, scale, seed)


def foreach_perturb(params: list[torch.Tensor], z: list[torch.Tensor], scale: float) -> None:
    """In place with a z that is stored: as much memory again, and no draw at all."""
    torch._foreach_add_(params, z, alpha=scale)


def foreach_step(params: list[torch.Tensor], z: list[torch.Tensor], coefficient: float, eps: float) -> None:
    """Four passes over a stored z."""
    for scale in (eps, -2 * eps, eps, -coefficient):
        foreach_perturb(params, z, scale)


@torch.compile(dynamic=True)
def _compiled(theta, scale, key, tag):
    group = torch.arange((theta.numel() + 3) // 4, dtype=torch.int64)
    zero = torch.zeros_like(group)
    w0, w1, w2, w3 = philox_4x32(group, zero, zero + tag, zero, key[0], key[1])
    z = torch.stack([*box_muller(w0, w1), *box_muller(w2, w3)], -1)
    theta.add_(scale * z.flatten()[: theta.numel()].view(theta.shape))


def compiled_perturb(params: list[torch.Tensor], tags: list[torch.Tensor], scale: float, seed: int) -> None:
    """The reference through torch.compile, one call a tensor; values that change are tensors, so nothing recompiles."""
    key, scale = torch.tensor([seed & 0xFFFFFFFF, seed >> 32]), torch.tensor(scale)
    for p, tag in zip(params, tags, strict=True):
        _compiled(p, scale, key, tag)


def compiled_step(params: list[torch.Tensor], tags: list[torch.Tensor], coefficient: float, eps: float, seed: int):
    """Four passes through torch.compile."""
    for scale in (eps, -2 * eps, eps, -coefficient):
        compiled_perturb(params, tags, scale, seed)
