"""The linear part of `make reproduce-small`: 20 parameters, 10 inputs to 2 classes."""

import torch
from reproduce_decoder import SEEDS, mean_std

from mezo import MeZO

OPTIONS = {"lr": 1e-2, "eps": 1e-3, "rule": "momentum"}
STEPS, TRAIN, TEST, SHIFT = 300, 1000, 1000, 0.7


def linear() -> dict:
    """Part (c): two Gaussian classes, SHIFT from the origin in each input; test accuracy and loss over the seeds."""
    runs = [_run(seed) for seed in SEEDS]
    found = {key: mean_std([run[key] for run in runs]) for key in runs[0]}
    return {"steps": STEPS, "train": TRAIN, "test": TEST, "shift": SHIFT, **OPTIONS, **found}


def _run(seed: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(TRAIN + TEST) % 2
    x = torch.randn(TRAIN + TEST, 10, generator=generator) + (y[:, None] * 2 - 1) * SHIFT
    model = torch.nn.Linear(10, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.empty(p.shape).uniform_(-(10**-0.5), 10**-0.5, generator=generator))
    optimizer = MeZO(model.named_parameters(), seed=seed, **OPTIONS)
    loss = lambda part: torch.nn.functional.cross_entropy(model(x[part]), y[part])  # noqa: E731
    train, test = slice(0, TRAIN), slice(TRAIN, None)

    @torch.no_grad()
    def measured(when: str) -> dict[str, float]:
        accuracy = (model(x[test]).argmax(1) == y[test]).double().mean().item()
        return {f"loss {when}": loss(train).item(), f"accuracy {when}": accuracy}

    before = measured("before")
    for _ in range(STEPS):
        optimizer.step(lambda: loss(train))
    return before | measured("after")
