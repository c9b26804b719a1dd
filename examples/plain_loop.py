"""MeZO in a plain loop: the closure returns the loss, and leaves `backward()` out.

python examples/plain_loop.py
"""

import torch

from mezo import MeZO


def main(steps: int = 300) -> float:
    """Train a small network on two classes; return its accuracy."""
    torch.manual_seed(0)
    x = torch.randn(512, 10)
    y = (x.sum(1) > 0).long()
    model = torch.nn.Linear(10, 2)
    optimizer = MeZO(model.named_parameters(), lr=0.05, eps=1e-3)
    for step in range(steps):
        rows = slice(step % 8 * 64, step % 8 * 64 + 64)
        optimizer.step(lambda rows=rows: torch.nn.functional.cross_entropy(model(x[rows]), y[rows]))
    return (model(x).argmax(1) == y).float().mean().item()


if __name__ == "__main__":
    print("accuracy", main())
