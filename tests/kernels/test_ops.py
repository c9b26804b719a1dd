"""The compiled ops against the reference, bit for bit, and the properties every backend must have."""

import math

import pytest
import torch

from mezo_kernels import (
    ParamLayout,
    ParamSlot,
    Rule,
    available_backends,
    inner_products,
    lora_init,
    perturb_,
    rademacher,
    root_mean_square,
    rule_step_,
    standard_normal,
    step_,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 3, 1024, 1027, 5000]
DISTRIBUTIONS = ["normal", "rademacher"]
UPDATES = [(2**64 - 1, 0.02, 0.999), (5, -0.5), (0, 1e-5), (8, 0.0)]
BLOCKS = {
    "whole": lambda t: ParamSlot("w", t.clone()),
    "rows": lambda t: ParamSlot("w", t[3:12].clone(), tuple(t.shape), 3, 0),
    "columns": lambda t: ParamSlot("w", t[:, 30:81].clone(), tuple(t.shape), 0, 30),
    "strided columns": lambda t: ParamSlot("w", t.clone()[:, 1:90], tuple(t.shape), 0, 1),
    "every third": lambda t: ParamSlot("w", t.clone()[:, ::3]),
    "transposed": lambda t: ParamSlot("w", t.clone().t()),
}


def bits(tensor):
    return tensor.detach().contiguous().view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


def equal(left, right):
    """The same bits, and no NaN: what must be written is NaN at first."""
    pairs = zip(left.tensors, right.tensors, strict=True)
    return all(torch.equal(bits(a), bits(b)) and not a.isnan().any() for a, b in pairs)


def values(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pairs(layout, dtypes):
    """Plus and minus layouts for each dtype."""
    unwritten = lambda d: layout.like([torch.full_like(t, torch.nan, dtype=d) for t in layout.tensors])  # noqa: E731
    made = [[unwritten(d) for d in dtypes] for _ in range(2)]
    return {"plus": made[0], "minus": made[1], "next_seed": list(range(7, 7 + len(dtypes))), "eps": 1e-2}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_perturb_is_the_reference(dtype, size, distribution):
    got, expected = (ParamLayout({"w": values(size, dtype=dtype)}) for _ in range(2))
    perturb_(got, 0.3, 2**63 + 5, distribution=distribution, backend="numba")
    perturb_(expected, 0.3, 2**63 + 5, distribution=distribution, backend="reference")
    assert equal(got, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_updates_are_the_reference(dtype, size, distribution):
    got, expected = (ParamLayout({"w": values(size, dtype=dtype)}) for _ in range(2))
    step_(got, UPDATES, 0.99, distribution=distribution, backend="numba")
    step_(expected, UPDATES, 0.99, distribution=distribution, backend="reference")
    assert equal(got, expected)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("size", SIZES)
def test_plus_and_minus_are_the_reference(size, distribution):
    for backend in ("numba", "reference"):
        layout = ParamLayout({"w": values(size), "v": values(3, size)})
        targets = pairs(layout, FLOATS)
        step_(layout, UPDATES, 0.99, **targets, distribution=distribution, backend=backend)
        written = [layout, *targets["plus"], *targets["minus"]]
        if backend == "numba":
            got = written
    assert all(equal(a, b) for a, b in zip(got, written, strict=True))


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_blocks_and_strides_are_the_reference(dtype, block):
    for backend in ("numba", "reference"):
        slot = block(values(13, 101))
        # targets with strides of their own: every second element of a wider buffer
        shape = len(slot.tensor), 2 * slot.tensor.shape[1]
        wide = [torch.full(shape, torch.nan, dtype=dtype) for _ in range(2)]
        layout = ParamLayout([slot])
        plus, minus = (layout.like([buffer[:, ::2]]) for buffer in wide)
        step_(layout, UPDATES, 0.99, 9, 1e-2, plus, minus, backend=backend)
        assert not any(buffer[:, ::2].isnan().any() for buffer in wide)
        written = [slot.tensor, *wide]
        if backend == "numba":
            got = written
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, written, strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("start", [0, 1, 3])
def test_narrow_rows_between_wide_ones_are_the_reference(start, distribution):
    """Rows of up to 64 elements are drawn together: more of them than the scratch holds, and beginning anywhere."""
    widths = (1, 2, 3, 4, 7, 64, 5, 2100, 60, 61, 8)
    for backend in ("numba", "reference"):
        full = {f"w{cols}": values(90 if cols < 2000 else 2, start + cols + 2) for cols in widths}
        layout = ParamLayout(
            ParamSlot(name, w[:, start : start + cols], tuple(w.shape), 0, start)
            for (name, w), cols in zip(full.items(), widths, strict=True)
        )
        targets = pairs(layout, FLOATS)
        step_(layout, UPDATES, 0.99, **targets, distribution=distribution, backend=backend)
        # the columns around a shard belong to somebody else
        written = [*full.values(), *(t for one in (*targets["plus"], *targets["minus"]) for t in one.tensors)]
        assert not any(tensor.isnan().any() for tensor in written)
        if backend == "numba":
            got = written
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(got, written, strict=True))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("block", ["rows", "columns", "strided columns"])
def test_a_shard_gets_its_slice_of_the_full_result(block, distribution):
    theta = values(13, 101)
    slot = BLOCKS[block](theta)
    whole, shard = ParamLayout({"w": theta.clone()}), ParamLayout([slot])
    for layout in (whole, shard):
        step_(layout, UPDATES, 0.99, distribution=distribution)
    rows, cols = slot.tensor.shape
    inside = whole.tensors[0][slot.row_start : slot.row_start + rows, slot.col_start : slot.col_start + cols]
    assert torch.equal(bits(shard.tensors[0]), bits(inside))


@pytest.mark.parametrize("backend", ["numba", "reference"])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_elements_from_any_start_are_a_slice(backend, distribution):
    draw = standard_normal if distribution == "normal" else rademacher
    whole = draw(4, "w", 0, 9000)
    for start, n in [(0, 1), (1, 5000), (3, 4), (127, 130), (4095, 4098), (8999, 1), (5, 0)]:
        assert torch.equal(draw(4, "w", start, n, backend=backend), whole[start : start + n])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_rounding_at_every_edge(dtype, sign):
    """All finite values, the midpoint above each, and the float32 neighbours of that midpoint."""
    exact = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()]
    gap = torch.nextafter(exact.to(dtype), torch.tensor(math.inf, dtype=dtype)).float() - exact
    middle = exact + gap / 2
    middle = torch.cat([exact, middle, *(torch.nextafter(middle, torch.tensor(s * math.inf)) for s in (1, -1))])
    extreme = torch.tensor([3.4e38, 65519.9, 65520.0, 1e-8, 2.0**-25, 1e-40, 0.0, -0.0])
    theta = torch.cat([middle[middle.isfinite()], extreme, -extreme])
    layout = ParamLayout({"w": theta})
    targets = pairs(layout, [dtype])
    # eps z is below half an ulp of every normal value, so plus and minus are roundings of theta itself there
    step_(layout, [], **targets | {"eps": 1e-38}, backend="numba")
    z = 1e-38 * standard_normal(7, "w", 0, len(theta), backend="reference")
    expected = (theta + z if sign > 0 else theta - z).to(dtype)
    assert torch.equal(bits((targets["plus"] if sign > 0 else targets["minus"])[0].tensors[0]), bits(expected))


def test_16_bit_loads_are_exact():
    """A decay of 1 and no update store what was loaded; NaNs aside, all 65536 patterns survive."""
    for dtype in (torch.bfloat16, torch.float16):
        patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        patterns = patterns[~patterns.isnan()]
        theta = patterns.clone()
        step_(ParamLayout({"w": theta}), [(0, 0.0)], backend="numba")
        assert torch.equal(bits(theta), bits(patterns))


@pytest.mark.parametrize("backend", ["numba", "reference"])
def test_nan_and_infinity_pass_through(backend):
    theta = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    layout = ParamLayout({"w": theta})
    targets = pairs(layout, FLOATS)
    step_(layout, [(1, 0.1)], **targets, backend=backend)
    for written in (theta, *(t.tensors[0] for t in targets["plus"])):
        assert written[0].isnan()
        assert written[1:3].tolist() == [math.inf, -math.inf]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_zero_drift(dtype):
    """10,000 steps of coefficient 0 change no bit, -0.0 and subnormals included: the theorem of the design."""
    theta = torch.cat([values(500), torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38])]).to(dtype)
    before, layout = bits(theta).clone(), ParamLayout({"w": theta})
    for seed in range(100):
        step_(layout, [(seed, 0.0)] * 100, backend="numba")
    assert torch.equal(bits(theta), before)


def test_perturbing_leaves_the_master_alone():
    theta = torch.tensor([0.0, -0.0, 1e-40, 1.0])
    before, layout = bits(theta).clone(), ParamLayout({"w": theta})
    for seed in range(1000):
        step_(layout, [], **pairs(layout, [torch.bfloat16]) | {"next_seed": seed})
    assert torch.equal(bits(theta), before)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_call_of_many_updates_is_many_calls(distribution):
    """Replay: the state between updates is float32 in memory or in registers, the same bits."""
    updates = [(seed, 0.01 * (seed % 5 - 2), 1 - 1e-4 * seed) for seed in range(40)]
    once, apart = (ParamLayout({"w": values(3000), "v": values(7, 5)}) for _ in range(2))
    step_(once, updates, distribution=distribution)
    for update in updates:
        step_(apart, [update], distribution=distribution)
    assert equal(once, apart)


def test_parameters_in_one_layout_or_in_many():
    named = {name: values(500 + 40 * i) for i, name in enumerate("abcdef")}
    together = ParamLayout({name: tensor.clone() for name, tensor in reversed(named.items())})
    perturb_(together, 0.1, 6)
    for name, tensor in named.items():
        perturb_(ParamLayout({name: tensor}), 0.1, 6)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(together.tensors, reversed(named.values()), strict=True))


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    step = pytest.importorskip("mezo_kernels.numba.step", exc_type=ImportError)
    monkeypatch.setattr(step, "PARALLEL_FROM", 1)
    one, two = (ParamLayout({"w": values(30_001), "v": values(11, 5000)}) for _ in range(2))
    threads = torch.get_num_threads()
    try:
        for layout, n in ((one, 1), (two, 2)):
            torch.set_num_threads(n)
            step_(layout, UPDATES, 0.99)
    finally:
        torch.set_num_threads(threads)
    assert equal(one, two)


def test_perturb_is_a_multiply_and_an_add():
    """Neither contracted to a fused multiply-add nor formed in float64."""
    theta, scale = values(5000), torch.tensor(0.1)
    expected = theta + scale * standard_normal(1, "w", 0, 5000)
    perturb_(ParamLayout({"w": theta}), 0.1, 1)
    assert torch.equal(bits(theta), bits(expected))


LAYOUT = ParamLayout({"w": torch.zeros(4)})
OTHER, FARTHER = LAYOUT.like([torch.zeros(4)]), LAYOUT.like([torch.zeros(4)])
HALF = ParamLayout({"w": torch.zeros(4, dtype=torch.bfloat16)})
META = ParamLayout({"w": torch.zeros(4, device="meta")})
PAIR = {"next_seed": 1, "eps": 0.1, "plus": OTHER, "minus": FARTHER}
REFUSED = {
    "seed -1": (lambda: perturb_(LAYOUT, 1.0, -1), "seed"),
    "seed 2^64": (lambda: step_(LAYOUT, [(2**64, 0.1)]), "seed"),
    "seed 0.5": (lambda: standard_normal(0.5, "w", 0, 1), "seed"),
    "scale nan": (lambda: perturb_(LAYOUT, math.nan, 1), "scale"),
    "coefficient inf": (lambda: step_(LAYOUT, [(1, math.inf)]), "coefficient"),
    "coefficient 1e39": (lambda: step_(LAYOUT, [(1, 1e39)]), "coefficient"),
    "decay nan": (lambda: step_(LAYOUT, [], math.nan), "decay"),
    "eps 0": (lambda: step_(LAYOUT, [], **PAIR | {"eps": 0.0}), "eps"),
    "eps missing": (lambda: step_(LAYOUT, [], **PAIR | {"eps": None}), "eps"),
    "no minus": (lambda: step_(LAYOUT, [], **PAIR | {"minus": None}), "come together"),
    "unequal lists": (lambda: step_(LAYOUT, [], **PAIR | {"next_seed": [1, 2]}), "equal numbers"),
    "plus is theta": (lambda: step_(LAYOUT, [], **PAIR | {"plus": LAYOUT}), "shares storage"),
    "plus is minus": (lambda: step_(LAYOUT, [], **PAIR | {"plus": FARTHER}), "shares storage"),
    "16-bit master": (lambda: step_(HALF, [], **PAIR), "float32 master"),
    "other elements": (lambda: step_(LAYOUT, [], **PAIR | {"plus": ParamLayout({"v": torch.zeros(4)})}), "same elem"),
    "other device": (lambda: step_(LAYOUT, [], **PAIR | {"plus": META}), "w: plus and minus must be on cpu"),
    "distribution": (lambda: perturb_(LAYOUT, 1.0, 1, distribution="cauchy"), "normal, rademacher"),
    "backend": (lambda: perturb_(LAYOUT, 1.0, 1, backend="cuda"), "reference, numba, triton"),
    "meta": (lambda: perturb_(META, 1.0, 1), "w: a meta tensor holds no numbers"),
    "meta in a step": (lambda: step_(META, [(1, 1.0)]), "w: a meta tensor holds no numbers"),
    "meta by a rule": (lambda: rule_step_(META, Rule("sign"), [], []), "w: a meta tensor holds no numbers"),
    "z on meta": (lambda: standard_normal(0, "v", 0, 4, device="meta"), "v: a meta tensor holds no numbers"),
    "meta by the reference": (lambda: perturb_(META, 1.0, 1, backend="reference"), "w: a meta tensor"),
    "numba off the CPU": (lambda: perturb_(META, 1.0, 1, backend="numba"), "not available on meta"),
    "negative start": (lambda: standard_normal(1, "w", -1, 4), "start"),
    "past 2^63": (lambda: standard_normal(1, "w", 2**63 - 2, 4), "start"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_bad_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("backend", available_backends("cpu"))
def test_the_default_device_of_a_script_is_not_that_of_parameters(backend):
    """It is a GPU in many a notebook; "meta", whose tensors hold no numbers, stands for it here."""
    theta, minus = torch.ones(2, 3, 7)
    buffer = torch.zeros(3, 14)
    with torch.device("meta"):
        layout = ParamLayout({"w": theta})
        step_(layout, [(0, 0.5)], 1.0, 1, 0.1, layout.like([buffer[:, ::2]]), layout.like([minus]), backend=backend)
        ParamLayout({"even": buffer[:, ::2], "odd": buffer[:, 1::2]})  # which are compared byte by byte
        z = standard_normal(0, "w", 0, 21, backend=backend)
        gram, root = inner_products({"w": (3, 7)}, [0], backend=backend), root_mean_square({"w": (3, 7)}, 0)
        init = lora_init(0, "w", (2, 4))
    assert torch.equal(z, standard_normal(0, "w", 0, 21))
    assert torch.equal(theta, 1 - 0.5 * z.view(3, 7))
    assert torch.equal(buffer[:, ::2], theta + torch.tensor(0.1) * standard_normal(1, "w", 0, 21).view(3, 7))
    assert gram.item() == pytest.approx(21 * root**2, rel=1e-4)
    assert torch.equal(init, lora_init(0, "w", (2, 4)))


def test_the_reference_wants_a_seed_for_each_pair():
    """Or none at all, as in a step of a plan with pairs: they keep what they hold then."""
    from mezo_kernels import reference

    theta = ParamLayout({"w": torch.ones(4)})
    copies = [torch.full((4,), torch.nan) for _ in range(4)]
    arguments = theta.tensors, copies[:2], copies[2:], [theta.geometry] * 5, []
    reference.step_(*arguments, [], 0.0, "normal")
    assert all(t.isnan().all() for t in copies)
    with pytest.raises(ValueError, match="zip"):
        reference.step_(*arguments, [1], 0.1, "normal")
