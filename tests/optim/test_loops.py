"""The optimizer in other people's loops: all end where the plain loop does, and what goes wrong is said."""

import copy

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from mezo import MeZO
from mezo.optim.closure import EQUAL_STEPS

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
Y = (X.sum(1) > 0).long()


def make():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 2)


def loss(model):
    return torch.nn.functional.cross_entropy(model(X).float(), Y)


def optimizer_of(model):
    return MeZO(model.named_parameters(), lr=0.05, eps=1e-2, seed=3)


def steps(optimizer, count, closure):
    for _ in range(count):
        optimizer.step(closure)


def plain(model):
    steps(optimizer_of(model), 20, lambda: loss(model))


def amp(model):
    optimizer = optimizer_of(model)
    for _ in range(20):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            optimizer.step(lambda: loss(model))


def compiled(model):
    wrapped = torch.compile(model, backend="aot_eager")
    steps(optimizer_of(wrapped), 20, lambda: loss(wrapped))


def accelerated(model):
    """The recipe of the README: the model and the data are prepared, the optimizer is not."""
    accelerate = pytest.importorskip("accelerate")
    wrapped = accelerate.Accelerator(cpu=True).prepare(model)
    steps(optimizer_of(wrapped), 20, lambda: loss(wrapped))


def lightning(model):
    """Manual optimization, as in the README."""
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.automatic_optimization = model, False

        def training_step(self, batch, _):
            self.optimizers().step(lambda: loss(self.model))

        def configure_optimizers(self):
            return optimizer_of(self.model)

    options = {"max_steps": 20, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    options |= {"enable_progress_bar": False, "enable_model_summary": False}
    lightning.Trainer(**options).fit(Module(), torch.utils.data.DataLoader(range(20)))


def ddp(model):
    """A wrapper of one rank; `test_optimizer_ranks.py` has several."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        steps(optimizer_of(wrapped), 20, lambda: loss(wrapped))
    finally:
        torch.distributed.destroy_process_group()


def checkpointed(model):
    """Half of it, then another model and optimizer that torch's distributed checkpoints bring there."""
    optimizer = optimizer_of(model)
    steps(optimizer, 10, lambda: loss(model))
    saved = copy.deepcopy(get_state_dict(model, optimizer))
    again = make()
    other = optimizer_of(again)
    set_state_dict(again, other, model_state_dict=saved[0], optim_state_dict=saved[1])
    steps(other, 10, lambda: loss(again))
    model.load_state_dict(again.state_dict())


@pytest.mark.parametrize(
    "loop", [amp, compiled, accelerated, lightning, ddp, checkpointed], ids=lambda loop: loop.__name__
)
def test_a_loop_ends_where_the_plain_one_does(loop):
    expected, model = make(), make()
    before = loss(expected).item()
    plain(expected)
    loop(model)
    assert loss(model).item() < 0.9 * before
    tolerance = 0.05 if loop is amp else 1e-5  # bfloat16 forward passes
    for p, q in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


@pytest.mark.parametrize("returned", [(torch.ones(()), 1), {"loss": 1.0}, "1.0", None, torch.ones(2)], ids=str)
def test_what_is_no_loss_is_refused_by_what_it_is(returned):
    with pytest.raises(ValueError, match=r"must return the loss as one number, .* got"):
        MeZO([torch.ones(2)], lr=0.1).step(lambda: returned)


def test_backward_in_a_closure_is_refused():
    model = make()
    with pytest.raises(ValueError, match=r"leave out backward\(\)"):
        optimizer_of(model).step(lambda: loss(model).backward())


def test_it_warns_once_of_what_would_go_wrong_in_silence():
    theta, answers = torch.ones(3), iter([1.0, 1.1] + [1e6, 2e6] * 2 + [float("nan")] * 4)
    optimizer = MeZO([("theta", theta)], lr=0.0)
    optimizer.step(lambda: next(answers))
    with pytest.warns(UserWarning, match="more than 10 times the best") as caught:
        steps(optimizer, 2, lambda: next(answers))
    assert len(caught) == 1
    with pytest.warns(UserWarning, match="skipped a step") as caught:
        steps(optimizer, 2, lambda: next(answers))
    assert len(caught) == 1
    assert "skipped_steps: 2" in repr(optimizer)


def test_it_warns_where_the_loss_does_not_depend_on_the_parameters():
    optimizer = MeZO([("theta", torch.ones(3))], lr=0.1)
    with pytest.warns(UserWarning, match="does not depend on these parameters: theta"):
        steps(optimizer, EQUAL_STEPS, lambda: 1.0)


@pytest.mark.parametrize("rule", ["sgd", "fzoo", "conservative", "guided"])
def test_buffers_are_as_after_one_call_at_theta(rule):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    n = {"fzoo": 2, "guided": 3}.get(rule, 1)
    optimizer = MeZO(model.named_parameters(), lr=1e-3, rule=rule, num_perturbations=n, module=model)
    twin = torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    twin.load_state_dict(model.state_dict())
    twin(X)
    optimizer.step(lambda: loss(model))
    assert all(map(torch.equal, model.buffers(), twin.buffers()))
    before = [buffer.clone() for buffer in model.buffers()]
    optimizer.step(lambda: loss(model) * float("nan"))
    assert all(map(torch.equal, model.buffers(), before))


def test_channels_last_steps_to_the_same_theta():
    torch.manual_seed(0)
    one, x = torch.nn.Conv2d(2, 3, 3), torch.randn(2, 2, 5, 5)
    two = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    two.load_state_dict(one.state_dict())
    for model in (one, two):
        optimizer = MeZO(model.named_parameters(), lr=0.1)
        optimizer.step(lambda model=model: model.weight.square().sum() + model(x).mean() * 0)
    torch.testing.assert_close(one.weight, two.weight, rtol=0, atol=1e-4)
    assert not two.weight.is_contiguous()


def test_parameters_that_cannot_be_written_are_refused():
    with pytest.raises(ValueError, match="weight is on the meta device"):
        MeZO(torch.nn.Linear(2, 2, device="meta").named_parameters(), lr=0.1)
    with torch.inference_mode():
        theta = torch.ones(3)
    with pytest.raises(ValueError, match=r"made under torch\.inference_mode"):
        MeZO([("theta", theta)], lr=0.1)


def test_one_cycle_cycles_the_momentum_of_the_rule():
    optimizer = MeZO([torch.ones(3)], lr=0.1, rule="momentum")
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    assert optimizer.param_groups[0]["momentum"] == 0.95
    assert "betas" not in optimizer.param_groups[0]
    optimizer.step(lambda: 0.0)
