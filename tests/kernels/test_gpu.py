"""What only a real GPU can show. The parity of every op with the reference on the GPU is in test_triton.py."""

import importlib
import pkgutil

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device"),
]


def kernels() -> dict:
    """Every Triton kernel by name, wherever it stands in the backend."""
    package = importlib.import_module("mezo_kernels.triton")
    modules = [importlib.import_module(m.name) for m in pkgutil.iter_modules(package.__path__, f"{package.__name__}.")]
    return {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}


def compiled() -> dict[str, int]:
    """Compiled variants of each kernel on the current device."""
    return {name: len(kernel.device_caches[torch.cuda.current_device()][0]) for name, kernel in kernels().items()}


def master(n: int = 5000) -> mk.ParamLayout:
    generator = torch.Generator().manual_seed(0)
    tensors = {f"w{i}": torch.randn(n + 8 * i, generator=generator).cuda() for i in range(4)}
    return mk.ParamLayout(tensors)


def targets(theta: mk.ParamLayout, dtype=torch.bfloat16) -> tuple[mk.ParamLayout, mk.ParamLayout]:
    return tuple(theta.like([torch.full_like(t, torch.nan, dtype=dtype) for t in theta.tensors]) for _ in range(2))


def moments_of(theta: mk.ParamLayout) -> list[mk.ParamLayout]:
    """State of Adam, zeros."""
    return [theta.like([torch.zeros_like(t) for t in theta.tensors]) for _ in "mv"]


@pytest.mark.parametrize("op", dispatch.OPS)
def test_every_case_of_every_op_is_the_reference(op):
    """The cases that `mezo verify` runs, on the device and on the CPU."""
    for (label, ours), (_, theirs) in zip(dispatch.OPS[op].cases("cuda"), dispatch.OPS[op].cases("cpu"), strict=True):
        results = [dispatch.OPS[op](*ours, "triton"), dispatch.OPS[op](*theirs, "reference")]
        for a, b in zip(flat((*ours, results[0])), flat((*theirs, results[1])), strict=True):
            views = {4: torch.int32, 2: torch.int16, 8: torch.int64}
            a, b = (t.cpu().contiguous().view(views[t.element_size()]) for t in (a, b))
            assert torch.equal(a, b), label
        assert not any(t.isnan().any() for t in flat((*ours, results[0])) if t.is_floating_point()), label


def flat(arguments) -> list[torch.Tensor]:
    """The tensors among an op's arguments, in order."""
    lists = (value if isinstance(value, list) else [value] for value in arguments)
    return [value for own in lists for value in own if isinstance(value, torch.Tensor)]


def test_the_default_backend_is_triton():
    theta, expected = master(), master()
    mk.perturb_(theta, 0.1, 3)
    mk.perturb_(expected, 0.1, 3, backend="triton")
    assert all(map(torch.equal, theta.tensors, expected.tensors))
    assert "triton" in mk.available_backends("cuda")


def test_no_per_step_value_compiles_a_second_variant():
    theta = master()
    plus, minus = targets(theta)
    moments = moments_of(theta)

    def step(seed, updates):
        mk.perturb_(theta, 1e-3 * (seed % 7), seed)
        mk.step_(theta, updates, next_seed=seed, eps=1e-3 + seed % 3, plus=plus, minus=minus)
        mk.standard_normal(seed, "w", seed % 2**60, 4096 + 4 * (seed % 5), device="cuda")
        rule = mk.Rule("adam", *((0.5, 0.25) if seed % 2 else (0.9, 0.0)), l2=float(seed % 3))
        estimate = mk.RuleUpdate([u[0] for u in updates], [u[1] for u in updates], 1e-3, 1 + seed % 9)
        mk.rule_step_(theta, rule, moments, [estimate], next_seed=seed, eps=1e-3, plus=plus, minus=minus)

    step(0, [(0, 0.0)])
    before = compiled()
    for seed in (1, 2, 16, 2**31, 2**32 + 1, 2**63, 2**64 - 1):
        step(seed, [(seed, 0.5 * (k % 2), 1.0 - 0.1 * k) for k in range(1 + seed % 17)])
    assert compiled() == before


def test_steps_replay_in_a_cuda_graph():
    """A captured step is the step: same bits, and nothing in it waits for the device or reads the host."""
    expected, theta = master(), master()
    results = targets(expected), targets(theta)

    def step(layout, plus, minus):
        mk.perturb_(layout, 1e-3, 5)
        mk.step_(layout, [(2**64 - 1, 0.1), (7, 0.2, 0.9)], next_seed=2**63, eps=1e-3, plus=plus, minus=minus)
        update = mk.RuleUpdate([9, 10], [0.1, -0.2], 1e-3, 1)
        mk.rule_step_(layout, mk.Rule("sign"), [], [update], next_seed=11, eps=1e-3, plus=plus, minus=minus)

    for _ in range(3):
        step(expected, *results[0])
    # compiles the kernels and builds the tables, which capture cannot; the values are put back
    start = [t.clone() for t in theta.tensors]
    step(theta, *results[1])
    for tensor, value in zip(theta.tensors, start, strict=True):
        tensor.copy_(value)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(theta, *results[1])
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    for ours, theirs in zip((theta, *results[1]), (expected, *results[0]), strict=True):
        assert all(map(torch.equal, ours.tensors, theirs.tensors))


def test_ops_do_not_synchronise():
    theta = master()
    plus, minus = targets(theta)

    moments = moments_of(theta)

    def step():
        mk.perturb_(theta, 1e-3, 5)
        mk.step_(theta, [(6, 0.1)], next_seed=7, eps=1e-3, plus=plus, minus=minus)
        update = mk.RuleUpdate([8, 9], [0.1, 0.2], 1e-3, 1)
        mk.rule_step_(theta, mk.Rule("adam"), moments, [update], next_seed=7, eps=1e-3, plus=plus, minus=minus)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_storage_beyond_int32():
    """A tensor of more than 2**31 elements: offsets, not only indices, are 64 bits wide."""
    n = 2**31 + 4099
    if torch.cuda.mem_get_info()[0] < 3 * n:
        pytest.skip(f"needs {3 * n / 2**30:.0f} GiB of free GPU memory")
    tensor = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    mk.perturb_(mk.ParamLayout({"w": tensor}), 1.0, 3)
    for start in (0, 2**30 - 7, 2**31 - 2000, n - 3000):
        expected = mk.standard_normal(3, "w", start, 3000, backend="reference").bfloat16()
        assert torch.equal(tensor[start : start + 3000].cpu(), expected)


def test_many_parameters_in_one_launch():
    """Several hundred tensors, ragged and not, agree with the reference."""
    tensors = {f"w{i}": torch.full((i % 37 + 1, i % 13 + 1), 0.5, device="cuda") for i in range(500)}
    theta, expected = mk.ParamLayout(tensors), mk.ParamLayout({name: t.cpu() for name, t in tensors.items()})
    mk.perturb_(theta, 0.1, 11)
    mk.perturb_(expected, 0.1, 11, backend="reference")
    for ours, theirs in zip(theta.tensors, expected.tensors, strict=True):
        assert torch.equal(ours.cpu(), theirs)
