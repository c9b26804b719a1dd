"""Registration with torch.library, tracing, and what must not happen again on every step."""

import shutil
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import mezo_kernels
from mezo_kernels import (
    ParamLayout,
    Rule,
    RuleUpdate,
    cases,
    dispatch,
    perturb_,
    reference,
    rule_step_,
    standard_normal,
    step_,
)

cpu = pytest.importorskip("mezo_kernels.numba.step")
OPS = torch.ops.mezo_kernels


def make_layout(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return ParamLayout({"w": torch.randn(30, 20, generator=generator).to(dtype), "b": torch.zeros(7, dtype=dtype)})


def targets_of(layout):
    return [
        layout.like([torch.full_like(t, torch.nan, dtype=torch.bfloat16) for t in layout.tensors]) for _ in range(2)
    ]


def opcheck(name, backend=None):
    """torch.library's own checks, of the schema, the fake and tracing, on the first case of an op."""
    _, arguments = next(iter(dispatch.OPS[name].cases("cpu")))
    torch.library.opcheck(getattr(OPS, name).default, (*arguments, backend))


@pytest.mark.parametrize("name", dispatch.OPS)
def test_opcheck(name):
    """An op without a case fails here: nothing would check it."""
    opcheck(name)


def flip_(theta):
    for tensor in theta:
        tensor.neg_()


@pytest.fixture
def toy_op(monkeypatch):
    """An op of its own, theta <- -theta, in the table for the length of a test, with a backend of its own beside it."""
    module = types.ModuleType("toy_backend")
    vars(module).update({name: getattr(reference, name) for name in dispatch.OPS}, flip_=flip_)
    monkeypatch.setitem(sys.modules, "toy_backend", module)
    monkeypatch.setitem(dispatch.BACKENDS, "toy", dispatch.Backend("toy_backend", lambda device: None))
    monkeypatch.setattr(dispatch, "OPS", dict(dispatch.OPS))
    monkeypatch.setattr(reference, "flip_", flip_, raising=False)
    # the other backends take seconds, and have no such function
    monkeypatch.setattr(dispatch, "available_backends", lambda device: ["reference", "toy"])

    def of_flip(device):
        yield "of float32", (cases.layout(device, torch.float32).tensors,)

    op = dispatch.Op(
        "flip_(Tensor(a!)[] theta, str? backend) -> ()",
        run=lambda function, theta: function(theta),
        device=lambda theta: theta[0].device,
        cases=of_flip,
    )
    with torch.library._scoped_library("mezo_kernels", "FRAGMENT") as library:
        dispatch.register(op, library)
        yield module


def test_a_new_op_and_a_new_backend_are_checked_as_soon_as_the_table_has_them(toy_op):
    opcheck("flip_", "toy")
    opcheck("step_", "toy")
    rows = {row.check: row.ok for row in mezo_kernels.verify("cpu") if row.backend == "toy"}
    assert rows["flip_ of float32"]
    assert all(rows.values())
    toy_op.flip_ = lambda theta: None
    rows = [row.check for row in mezo_kernels.verify("cpu") if not row.ok]
    assert rows == ["flip_ of float32"]


def test_an_op_that_does_not_say_what_it_writes_fails_its_check(toy_op):
    """The first check is of the schema: here it promises to leave theta alone."""
    op = replace(dispatch.OPS["flip_"], schema="quiet_(Tensor[] theta, str? backend) -> ()")
    toy_op.quiet_ = flip_
    with torch.library._scoped_library("mezo_kernels", "FRAGMENT") as library:
        dispatch.register(op, library)
        with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError):
            opcheck("quiet_", "toy")


@pytest.mark.filterwarnings("error:.*lru_cache")
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiled_functions_give_the_same_bits(compiler):
    def train(layout, plus, minus, x):
        perturb_(layout, 0.5, 2**63 + 1)
        step_(layout, [(3, 0.25), (4, 0.5, 0.9)], 0.99, 5, 1e-2, plus, minus)
        return layout.tensors[0] * 2 + plus.tensors[0].float() + x

    x, plain, traced = torch.ones(30, 20), make_layout(), make_layout()
    expected = train(plain, *targets_of(plain), x)
    got = torch.compile(train, backend=compiler, fullgraph=True)(traced, *targets_of(traced), x)
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(plain.tensors, traced.tensors, strict=True))


def test_fake_tensors_have_the_shapes():
    with torch._subclasses.FakeTensorMode():
        assert OPS.standard_normal(1, 2, 3, 0, 100, "normal", torch.device("cpu"), None).shape == (100,)
    assert OPS.standard_normal(1, 2, 3, 0, 0, "normal", torch.device("cpu"), None).shape == (0,)


THERE = torch.device("cuda:1")


def on_cuda(mode, value):
    """An argument of an op, its tensors of numbers as fake ones of a GPU, which need not be there."""
    if isinstance(value, list):
        return [on_cuda(mode, one) for one in value]
    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value).to(THERE) if value.is_floating_point() else value
    return THERE if isinstance(value, torch.device) else value


@pytest.mark.parametrize("name", dispatch.OPS)
def test_a_tracer_sees_every_op_on_cuda(name):
    """In-place ops return nothing, z has its shape and place."""
    _, arguments = next(iter(dispatch.OPS[name].cases("cpu")))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        result = getattr(OPS, name)(*on_cuda(mode, list(arguments)), None)
    assert (result is None) == name.endswith("_")
    if result is not None:
        assert (result.shape, result.device) == ((3001,), THERE)


def opcheck_on_cuda(name):
    _, arguments = next(iter(dispatch.OPS[name].cases("cpu")))
    # the last of torch's checks compares results, and fake ones hold no numbers
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks += ("test_aot_dispatch_dynamic",) if name.endswith("_") else ()
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        torch.library.opcheck(
            getattr(OPS, name).default, (*on_cuda(mode, list(arguments)), None), test_utils=checks
        )  # fmt: skip


@pytest.mark.parametrize("name", dispatch.OPS)
def test_opcheck_on_cuda(name):
    opcheck_on_cuda(name)


def test_a_function_on_cuda_compiles_to_one_graph_of_ops():
    """The contracts, the validation and the choice of a backend break no graph and need no device."""
    graphs = []

    def keep(graph, inputs):
        graphs.append([node.target for node in graph.graph.nodes if "mezo_kernels" in str(node.target)])
        return graph.forward

    def train(theta, plus, minus, state, x):
        perturb_(theta, 0.5, 2**63 + 1)
        step_(theta, [(3, 0.25), (4, 0.5, 0.9)], 0.99, 5, 1e-2, plus, minus)
        rule_step_(theta, Rule("adam"), state, [RuleUpdate([9, 10], [0.1, -0.2], 1e-3, 1)], 6, 1e-2, plus, minus)
        z = OPS.standard_normal(1, 0, 7, 0, 600, "normal", x.device, None)
        return theta.tensors[0] * 2 + plus.tensors[0].float() + x + z.view(30, 20)

    theta = make_layout()
    plus, minus = targets_of(theta)
    state = [theta.like([torch.zeros_like(t) for t in theta.tensors]) for _ in range(2)]
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        for layout in (theta, plus, minus, *state):
            layout.tensors[:] = on_cuda(mode, layout.tensors)
        x = torch.ones(30, 20, device=THERE)
        result = torch.compile(train, backend=keep, fullgraph=True)(theta, plus, minus, state, x)
    assert (result.shape, result.device) == ((30, 20), THERE)
    (graph,) = graphs
    assert [str(target).split(".")[1] for target in graph] == ["perturb_", "step_", "rule_step_", "standard_normal"]
    assert {str(target).split(".")[1] for target in graph} == set(dispatch.OPS)


def test_a_backend_whose_package_is_missing_is_named(monkeypatch):
    """Some builds of torch for GPUs come without Triton."""
    missing = dispatch.Backend("mezo_no_such_package.ops", lambda device: None, default_on="cpu")
    monkeypatch.setattr(dispatch, "BACKENDS", {"toy": missing})
    with pytest.raises(ValueError, match="'toy' is not available on cpu: the package mezo_no_such_package is not"):
        perturb_(make_layout(), 0.1, 0)


def test_per_step_values_compile_nothing():
    layout = make_layout()
    plus, minus = targets_of(layout)
    step_(layout, [(1, 0.1)], 1.0, 2, 1e-3, plus, minus)
    before = len(cpu._step_items.signatures)
    for seed in (0, 2**64 - 1):
        perturb_(layout, 0.5 * seed, seed)
        step_(layout, [(seed, 1e-9 * k) for k in range(5)], 0.5, [seed], 1.0, plus, minus, distribution="rademacher")
        standard_normal(seed, "w", seed % 1000, 300 + seed % 3)
    assert len(cpu._step_items.signatures) == before


def test_the_address_table_is_built_once_and_again_where_an_address_changes(monkeypatch):
    built = []

    def build(*arguments):
        built.append(arguments)
        return cpu._build_items(*arguments)

    monkeypatch.setattr(cpu._items, "build", build)
    layout = make_layout()
    for seed in range(5):
        perturb_(layout, 0.1, seed)
    assert len(built) == 1
    layout.tensors[0] = layout.tensors[0].clone()
    perturb_(layout, 0.1, 0)
    assert len(built) == 2
    plus, minus = targets_of(layout)
    for seed in range(3):
        step_(layout, [], 1.0, seed, 1e-3, plus, minus)
    assert len(built) == 3


def test_a_freed_address_given_to_another_layout_is_another_table():
    """The allocator hands the same address out again; shapes and names differ, so must the result."""
    for n in range(1, 40):
        w = torch.zeros(4 * n)
        perturb_(ParamLayout({f"w{n}": w}), 1.0, 0)
        assert torch.equal(w, standard_normal(0, f"w{n}", 0, 4 * n))
        del w


def test_compiled_code_on_disk_is_that_of_every_module(tmp_path):
    """numba looks at a function's own file alone: code of step.py would outlive the draw.py inside it."""
    shutil.copytree(Path(mezo_kernels.__file__).parent, tmp_path / "mezo_kernels")
    code = "from mezo_kernels import standard_normal; print(standard_normal(0, 'w', 0, 8)[0].item())"
    drawing, found = tmp_path / "mezo_kernels" / "numba" / "draw.py", []
    for change in ("F(1), F(-2)", "F(1), F(-8)"):  # the second draws z of twice the size
        drawing.write_text(drawing.read_text().replace("F(1), F(-2)", change))
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
        found.append(float(run.stdout))
    assert found[1] == pytest.approx(2 * found[0])
