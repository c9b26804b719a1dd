"""What each rank of `test_optimizer_ranks.py` does: 20 steps on its own data, in every way; rank 0 writes them."""

import gc
import sys

import torch
import torch.distributed as dist

from mezo import MeZO


def trained(wrap=lambda model: model, seed=0, **options):
    """Weight after 20 steps, on every rank."""
    torch.manual_seed(seed)
    model = wrap(torch.nn.Linear(6, 2))
    data = torch.Generator().manual_seed(dist.get_rank())
    x, y = torch.randn(32, 6, generator=data), torch.arange(32) % 2
    optimizer = MeZO(model.named_parameters(), lr=0.05, seed=3, **options)
    for _ in range(20):
        optimizer.step(lambda: torch.nn.functional.cross_entropy(model(x), y))
    weights = [torch.empty(2, 6) for _ in range(dist.get_world_size())]
    dist.all_gather(weights, next(model.parameters()).detach())
    return weights


def refusal(**options):
    """What the first step says."""
    try:
        trained(**options)
    except ValueError as error:
        return str(error)


def main():
    dist.init_process_group("gloo")
    found = {
        "plain": trained(),
        "conservative": trained(rule="conservative"),
        "guided": trained(rule="guided", num_perturbations=4),
        "wrapped": trained(torch.nn.parallel.DistributedDataParallel),
        "apart": trained(average_losses=False),
        "other parameters": refusal(seed=dist.get_rank()),
        "other eps": refusal(eps=1e-3 * (1 + dist.get_rank())),
    }
    if dist.get_rank() == 0:
        torch.save(found, sys.argv[1])
    gc.collect()  # a wrapped model in a cycle would hold the group, whose threads must not outlive the interpreter
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
