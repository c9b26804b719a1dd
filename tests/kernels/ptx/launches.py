"""The way from an op to the driver, on CPU tensors that say they are on the second of several GPUs.

Run by `test_launch_path` with the plugin beside this file: the driver is the emulated one, which runs the kernels.
"""

import contextlib
import functools
import gc
import weakref

import pytest
import torch
from triton.runtime.driver import driver

import mezo_kernels as mk
from mezo_kernels.triton import rules, step, table

DEVICE = torch.device("cuda", 1)


class OnCuda(torch.Tensor):
    """A CPU tensor that calls itself a CUDA tensor, and cannot be read by the host without waiting."""

    device = property(lambda self: DEVICE)

    def _wait(self, *arguments, **options):
        raise AssertionError("the host waits for the device")

    item = tolist = cpu = numpy = __bool__ = __float__ = __int__ = _wait


class Cuda:
    """What happened: ("launch", grid, current device, stream) and ("copy", pinned, non_blocking).

    While `capturing` a launch joins the `graph` and does not run.
    """

    def __init__(self):
        self.graph = []
        self.events, self.current, self.stream, self.capturing = [], 0, 7, False

    def replay(self) -> None:
        """Run what was captured, with the arguments of then."""
        for launch in self.graph:
            launch()

    def launches(self) -> list[tuple]:
        return [event for event in self.events if event[0] == "launch"]

    def copies(self) -> list[tuple]:
        return [event for event in self.events if event[0] == "copy"]


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    state, device, to = Cuda(), driver.active, torch.Tensor.to
    launcher = device.launcher_cls

    @contextlib.contextmanager
    def guard(wanted):
        before, state.current = state.current, torch.device(wanted).index
        yield
        state.current = before

    def recording(source, metadata):
        launch = launcher(source, metadata)

        def run(grid, y, z, stream, *arguments):
            state.events.append(("launch", grid, state.current, stream))
            if state.capturing:
                state.graph.append(functools.partial(launch, grid, y, z, stream, *arguments))
            else:
                launch(grid, y, z, stream, *arguments)

        return run

    def move(tensor, *arguments, non_blocking=False, **options):
        if arguments and isinstance(arguments[0], torch.device) and arguments[0].type == "cuda":
            state.events.append(("copy", getattr(tensor, "pinned", None), non_blocking))
            return tensor.clone().as_subclass(OnCuda)
        return to(tensor, *arguments, non_blocking=non_blocking, **options)

    def pin(tensor):
        pinned = tensor.clone()
        pinned.pinned = pinned.data_ptr()
        state.keep = [*getattr(state, "keep", []), pinned]
        return pinned

    def on_cuda(make):
        def made(*shape, device=None, **options):
            if device != DEVICE:
                return make(*shape, device=device, **options)
            return make(*shape, **options).as_subclass(OnCuda)

        return made

    for name, value in {
        "torch.cuda.device": guard,
        "torch.cuda.is_current_stream_capturing": lambda: state.capturing,
        "torch.cuda.get_device_capability": lambda device: (9, 0),
        "torch.Tensor.to": move,
        "torch.Tensor.pin_memory": pin,
        "torch.empty": on_cuda(torch.empty),
        "torch.zeros": on_cuda(torch.zeros),
    }.items():
        monkeypatch.setattr(name, value)
    monkeypatch.setattr(device, "launcher_cls", recording)
    monkeypatch.setattr(device, "get_current_stream", lambda index: (state.current, state.stream))
    # kernels that others loaded have launchers of their own
    monkeypatch.setattr(device, "get_current_device", lambda: ("cuda", id(state), state.current))
    return state


def master(count: int = 5, n: int = 2056) -> mk.ParamLayout:
    return mk.ParamLayout({f"w{i}": torch.ones(n + 8 * i).as_subclass(OnCuda) for i in range(count)})


def copies(theta: mk.ParamLayout) -> tuple[mk.ParamLayout, mk.ParamLayout]:
    return tuple(theta.like([torch.zeros(t.shape).as_subclass(OnCuda) for t in theta.tensors]) for _ in "+-")


def calls(theta: mk.ParamLayout) -> list:
    """Each op once, on tables of its own."""
    plus, minus = copies(theta)
    state = list(copies(theta))
    update, pair = (
        mk.RuleUpdate([9, 10], [0.1, -0.2], 1e-3, 1),
        {"next_seed": 11, "eps": 1e-3, "plus": plus, "minus": minus},
    )
    plan = functools.cache(lambda: mk.Plan(theta, plus, minus))  # made at the first call
    return [
        lambda: mk.perturb_(theta, 1e-3, 5),
        lambda: mk.step_(theta, [(6, 0.1), (7, 0.2)], **pair),
        lambda: mk.rule_step_(theta, mk.Rule("adam"), state, [update], **pair),
        lambda: mk.standard_normal(3, "w", 5, 3000, device=DEVICE),
        lambda: plan().step_([(6, 0.1), (7, 0.2)], next_seed=11, eps=1e-3),
    ]


@pytest.mark.parametrize("i", range(5))
def test_one_launch_a_call_on_the_tensors_own_device_and_stream(cuda, i):
    """The process's current device is 0, the tensors are on 1: the launch and the stream are those of 1."""
    call = calls(master())[i]
    for stream in (7, 8):
        cuda.stream, cuda.events = stream, []
        call()
        ((_, grid, current, launched_on),) = cuda.launches()
        assert (current, launched_on) == (1, (1, stream))
        assert cuda.current == 0
        assert grid >= 2


@pytest.mark.parametrize("i", range(5))
def test_a_call_waits_for_nothing(cuda, i):
    """No tensor of the device is read; what is copied comes from pinned memory and is not waited for."""
    call = calls(master())[i]
    call()
    cuda.events = []
    call()
    assert all(pinned and not_waited for _, pinned, not_waited in cuda.copies())
    assert len(cuda.copies()) == (i in (1, 2, 4))  # of the values alone


def test_values_of_calls_under_way_have_memory_of_their_own(cuda):
    """torch keeps a pinned buffer until its copy has run; a buffer of ours that served again would be overwritten."""
    call = calls(master())[1]
    for _ in range(4):
        call()
    pinned = [pinned for _, pinned, _ in cuda.copies() if pinned]
    assert len(pinned) == len(set(pinned)) == 4


@pytest.mark.parametrize("i", [0, 1, 2, 4])
def test_a_captured_call_copies_nothing_from_the_host(cuda, i):
    """A replay would read host memory again; its values are written by the device, and are right."""
    theta, expected = master(), master()
    call, plain = calls(theta)[i], calls(expected)[i]
    call(), plain(), plain()
    cuda.capturing, cuda.events = True, []
    call()
    assert len(cuda.launches()) == 1
    assert not cuda.copies()
    cuda.replay()
    for ours, theirs in zip(theta.tensors, expected.tensors, strict=True):
        assert torch.equal(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


def test_a_graph_takes_the_numbers_that_were_set_last(cuda):
    """One captured launch, replayed with other contents of its buffer: the bits of `step_` with these numbers."""
    ours = master()
    ours_plus, ours_minus = copies(ours)
    theirs, plus, minus = (
        mk.ParamLayout(
            {name: t.as_subclass(torch.Tensor).clone() for name, t in zip(ours.names, one.tensors, strict=True)}
        )
        for one in (ours, ours_plus, ours_minus)
    )
    step = mk.Plan(ours, ours_plus, ours_minus).recorded(2)
    step.set([(1, 0.5)], next_seed=2, eps=0.1)
    cuda.capturing = True
    step.launch()
    with pytest.raises(ValueError, match="outside of a capture"):
        step.set([(1, 0.5)], next_seed=2, eps=0.1)
    cuda.capturing = False
    for numbers in (([(6, 0.1), (7, 0.2)], 1.0, 2**63, 1e-3), ([(2**64 - 1, -0.5)], 0.5, 5, 1e-2)):
        cuda.events = []
        step.set(*numbers)
        assert [waited for _, _, waited in cuda.copies()] == [True]
        cuda.replay()
        mk.step_(theirs, *numbers, plus, minus, backend="numba")
        for a, b in ((ours, theirs), (ours_plus, plus), (ours_minus, minus)):
            for one, other in zip(a.tensors, b.tensors, strict=True):
                assert torch.equal(one.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor))


def test_a_capture_without_a_table_is_refused(cuda):
    cuda.capturing = True
    with pytest.raises(ValueError, match="call the op once with these tensors"):
        mk.perturb_(master(), 1e-3, 5)


def test_a_grid_that_is_too_large_becomes_several(cuda, monkeypatch):
    theta, expected = master(), master()
    mk.perturb_(expected, 0.1, 5)
    (whole,) = [grid for _, grid, *_ in cuda.launches()]
    monkeypatch.setattr(table, "MAX_PROGRAMS", 4)
    cuda.events = []
    mk.perturb_(theta, 0.1, 5)
    grids = [grid for _, grid, *_ in cuda.launches()]
    assert max(grids) == 4
    assert len(grids) > 1
    assert sum(grids) == whole
    for ours, theirs in zip(theta.tensors, expected.tensors, strict=True):
        assert torch.equal(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_parameter_of_odd_size_does_not_cost_the_others_their_kernel(cuda, monkeypatch, dtype):
    """From some size on flat tiles have a launch of their own, in 128 bits; the bits are those of one launch."""

    def layout() -> mk.ParamLayout:
        sizes = {"a": 2048 * 3, "odd": 2051, "b": 2048 * 2 + 8, "c": 2050}
        return mk.ParamLayout({name: torch.ones(n, dtype=dtype).as_subclass(OnCuda) for name, n in sizes.items()}
                              | {"transposed": torch.ones(40, 9, dtype=dtype).t().as_subclass(OnCuda)})  # fmt: skip

    small, large = layout(), layout()
    mk.perturb_(small, 0.1, 5)
    assert len(cuda.launches()) == 1
    monkeypatch.setattr(table, "MANY", 4)
    made, cuda.events = builds(monkeypatch, table.tables), []
    mk.perturb_(large, 0.1, 5)
    assert len(cuda.launches()) == 2
    flat, rest = made[0].launches
    assert (flat.mode, flat.width, len(flat.tiles)) == (table.FLAT, 4 if dtype == torch.float32 else 8, 8)
    assert rest.mode == table.ANY
    assert len(rest.tiles) == 3  # what is left of two, and the transposed one
    for ours, theirs in zip(large.tensors, small.tensors, strict=True):
        assert torch.equal(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


def builds(monkeypatch, cache) -> list:
    made, build = [], cache.build
    monkeypatch.setattr(cache, "build", lambda *arguments: made.append(build(*arguments)) or made[-1])
    return made


@pytest.mark.parametrize(("cache", "i"), [(table.tables, 0), (table.tables, 1), (rules._tables_with_state, 2)])
def test_tables_are_built_where_an_address_changes(cuda, monkeypatch, cache, i):
    made, theta = builds(monkeypatch, cache), master()
    call = calls(theta)[i]
    for _ in range(3):
        call()
    assert len(made) == 1
    theta.tensors[2] = theta.tensors[2].clone().as_subclass(OnCuda)
    call(), call()
    assert len(made) == 2


def test_another_dtype_at_the_same_address_is_another_table(cuda, monkeypatch):
    made = builds(monkeypatch, table.tables)
    theta = mk.ParamLayout({"w": torch.ones(64, dtype=torch.bfloat16).as_subclass(OnCuda)})
    mk.perturb_(theta, 0.1, 5)
    theta.tensors[0] = theta.tensors[0].view(torch.float16)
    mk.perturb_(theta, 0.1, 5)
    assert [one.theta for one in made] == [table.DTYPES[torch.bfloat16], table.DTYPES[torch.float16]]


def test_a_table_lives_as_long_as_its_layout(cuda, monkeypatch):
    """A graph that was captured reads it for as long; 70 other layouts do not push it out. Then it goes."""
    theta = master(1)
    mk.perturb_(theta, 0.1, 5)
    before = len(table.tables.layouts)
    others = [master(1) for _ in range(70)]
    for other in others:
        mk.perturb_(other, 0.1, 5)
    made = builds(monkeypatch, table.tables)
    mk.perturb_(theta, 0.1, 5)
    assert not made
    del others, other
    gc.collect()
    assert len(table.tables.layouts) == before


@pytest.mark.parametrize("i", [0, 1, 2, 4])
def test_what_a_graph_reads_outlives_the_layout(cuda, i):
    """Only the graph and the tensors are kept: a table whose memory served again would lead a replay anywhere."""
    theta, expected = master(), master()
    call, plain, tensors = calls(theta)[i], calls(expected)[i], theta.tensors
    call(), plain(), plain()
    cuda.capturing = True
    call()
    cuda.capturing = False
    # a launch's arguments of then, of which a real graph knows addresses alone
    (launch,), cuda.graph = cuda.graph, []
    slots, tiles = [weakref.ref(one) for one in launch.args if isinstance(one, torch.Tensor)][:2]
    launch()
    del launch, call, theta
    gc.collect()
    assert slots() is not None
    assert tiles() is not None
    for ours, theirs in zip(tensors, expected.tensors, strict=True):
        assert torch.equal(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


def test_the_numbers_of_a_recorded_step_outlive_it(cuda):
    step = mk.Plan(master()).recorded()
    other = mk.Plan(master())
    cuda.capturing = True
    step.launch()
    with pytest.raises(ValueError, match="before its capture"):
        other.recorded()
    (launch,), cuda.graph, cuda.capturing = cuda.graph, [], False
    *_, values = [weakref.ref(one) for one in launch.args if isinstance(one, torch.Tensor)]
    del launch, step
    gc.collect()
    assert values() is not None


def test_the_step_is_the_one_of_this_module():
    """`step.tables` and `table.tables` are one cache: what is asked of one above holds for both ops."""
    assert step.tables is table.tables
