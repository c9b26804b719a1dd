"""What a step makes of its losses, against the libraries whose words it uses."""

import pytest
import torch
from transformers import get_scheduler

from mezo.config import Config
from mezo.errors import UserError
from mezo.method.schedule import learning_rate


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize(
    ("schedule", "theirs"), [("constant", "constant_with_warmup"), ("linear",) * 2, ("cosine",) * 2]
)
def test_schedules_are_those_of_transformers(schedule, theirs, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler = get_scheduler(theirs, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for step in range(20):
        assert learning_rate(step, 20, 0.3, schedule, warmup) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup_steps": 11}, "--warmup-steps must be at most --steps, got 11"),
        ({"warmup_steps": -1}, "--warmup-steps must be at least 0, got -1"),
        ({"clip": -1.0}, "--clip must be at least 0, got -1.0"),
        ({"clip": float("nan")}, "--clip must be at least 0, got nan"),
    ],
)
def test_values_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        Config.of(model="m", output_dir="o", task="sst2", steps=10, **options)
