"""The Triton kernels against the reference, bit for bit: interpreted on the CPU, compiled where there is a GPU."""

import importlib
from dataclasses import replace

import pytest
import torch

import mezo_kernels as mk
from mezo_kernels.triton import table

HAS_GPU = torch.cuda.is_available()
INTERPRETED = pytest.mark.skipif(
    "triton" not in mk.available_backends("cpu"), reason="a GPU is there, or an interpreter that does not run"
)
COMPILED = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA or ROCm device")]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SIZES = (1, 3, 1024, 1027, 5000)
# bits of z, from the definition of the stream
VECTORS = [
    (42, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", 0, "bf84df8e bf39a04d bf191576 bfdb5957"),
    (9223372036854775813, "w", 6, "bf468888 3f2508c5 bc206dec bfb90498"),
    (7, "w", 17179869187, "3f5d4d2d bfac7daa 3f694c1f 3ceaf4d8"),
    (0, "w", 0, "be94eb10 3ea2c2e5 bf5fa60f 3fc4f48d"),
]


@pytest.fixture(params=[pytest.param("cpu", marks=INTERPRETED), pytest.param("cuda", marks=COMPILED)])
def device(request) -> str:
    return request.param


def shapes(n: int) -> list[mk.ParamSlot]:
    """About n elements each, in every kind of storage and shard; float32, on the CPU."""
    generator = torch.Generator().manual_seed(n)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    rows, wide = -(-n // 24), -(-n // 8) * 8
    padded = torch.zeros(rows, 40)
    padded[:, :24] = randn(rows, 24)
    return [
        mk.ParamSlot("contiguous", randn(n)),
        mk.ParamSlot("unaligned_address", randn(n + 1)[1:]),
        mk.ParamSlot("three_dimensions", randn(2, 3, -(-n // 6))),
        mk.ParamSlot("row_shard", randn(rows, 24), (3 * rows, 24), rows),
        mk.ParamSlot("row_shard_inside_a_block", randn(rows, 7), (3 * rows, 7), rows),
        mk.ParamSlot("one_dimensional_shard", randn(n), (n + 9,), 3),
        mk.ParamSlot("column_shard_in_units", randn(rows, 24), (rows, 72), 0, 24),
        mk.ParamSlot("column_shard_in_quads", randn(rows, 12), (rows, 36), 0, 4),
        mk.ParamSlot("column_shard_across_blocks", randn(rows, 5), (rows, 31), 0, 13),
        mk.ParamSlot("padded_rows", padded[:, :24]),
        mk.ParamSlot("transposed", randn(rows, 24).t()),
        mk.ParamSlot("every_other", randn(2 * n)[::2]),
        mk.ParamSlot("beyond_int32", randn(4, wide), (2**20, 2**34), 2**19, 2**33 + 16),
        mk.ParamSlot("beyond_int32_unaligned", randn(2, 9), (2**20, 2**33 + 1), 2**19 + 1, 2**32 + 3),
    ]


def names() -> list[str]:
    return [slot.name for slot in shapes(1)]


def pick(n: int, only: str) -> list[mk.ParamSlot]:
    return [slot for slot in shapes(n) if slot.name == only or only == "all"]


def storage(tensor: torch.Tensor, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A copy in memory of its own with the same strides and offset."""
    buffer = torch.zeros(tensor.storage_offset() + tensor.untyped_storage().nbytes() // 4, dtype=dtype, device=device)
    return buffer.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)


def layout(slots: list[mk.ParamSlot], dtypes, device: str) -> mk.ParamLayout:
    """The slots in storage of `dtypes` in turn."""
    dtypes = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    moved = [storage(slot.tensor, dtypes[i % len(dtypes)], device) for i, slot in enumerate(slots)]
    return mk.ParamLayout(replace(slot, tensor=tensor) for slot, tensor in zip(slots, moved, strict=True))


def unwritten(slots: list[mk.ParamSlot], dtypes, device: str) -> mk.ParamLayout:
    """The slots in storage of NaN: an element that an op leaves out is seen."""
    made = layout(slots, dtypes, device)
    for tensor in made.tensors:
        tensor.fill_(torch.nan)
    return made


def bits(layouts) -> list[torch.Tensor]:
    views = {4: torch.int32, 2: torch.int16}
    return [t.cpu().contiguous().view(views[t.element_size()]) for one in layouts for t in one.tensors]


def assert_same_bits(actual, expected) -> None:
    """The same bits, and no NaN: what must be written is NaN at first."""
    labels = [name for one in actual for name in one.names]
    for name, a, e in zip(labels, bits(actual), bits(expected), strict=True):
        assert torch.equal(a, e), f"{name}: {int((a != e).sum())} of {a.numel()} elements differ"
    unwritten = [name for one in actual for name, t in zip(one.names, one.tensors, strict=True) if t.isnan().any()]
    assert not unwritten


def compare_perturb(slots, dtypes, device, scale=0.013, seed=2**63 + 11, distribution="normal") -> None:
    ours, theirs = layout(slots, dtypes, device), layout(slots, dtypes, "cpu")
    mk.perturb_(ours, scale, seed, distribution=distribution, backend="triton")
    mk.perturb_(theirs, scale, seed, distribution=distribution, backend="reference")
    assert_same_bits([ours], [theirs])


def compare_step(slots, dtypes, device, updates, next_seeds=(), theta=torch.float32, distribution="normal", **options):
    results = []
    for where, backend in ((device, "triton"), ("cpu", "reference")):
        master = layout(slots, theta, where)
        # storage of plus and minus has strides and dtypes of its own
        targets = [
            unwritten(slots, list(dtypes)[k % 2 :] + list(dtypes)[: k % 2], where) for k in range(2 * len(next_seeds))
        ]
        pair = (
            {"next_seed": next_seeds, "eps": 1e-3, "plus": targets[::2], "minus": targets[1::2]} if next_seeds else {}
        )
        mk.step_(master, updates, **pair, distribution=distribution, backend=backend, **options)
        results.append([master, *targets])
    assert_same_bits(*results)


@pytest.mark.parametrize(("seed", "name", "start", "expected"), VECTORS)
def test_z_is_the_frozen_one(device, seed, name, start, expected):
    z = mk.standard_normal(seed, name, start, 4, device=device, backend="triton")
    assert [f"{b & 0xFFFFFFFF:08x}" for b in z.view(torch.int32).tolist()] == expected.split()


def test_rademacher_is_the_frozen_one(device):
    assert mk.rademacher(42, "w", 0, 8, device=device, backend="triton").tolist() == [1, -1, -1, 1, -1, 1, 1, -1]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("start", [0, 1, 126, 2**31 - 2, 2**34 + 3, 2**62])
@pytest.mark.parametrize("draw", [mk.standard_normal, mk.rademacher])
def test_z_of_a_run_of_elements(device, draw, start, n):
    z = draw(2**64 - 1, "w", start, n, device=device, backend="triton")
    assert torch.equal(z.cpu().view(torch.int32), draw(2**64 - 1, "w", start, n, backend="reference").view(torch.int32))


def test_no_elements(device):
    assert mk.standard_normal(0, "w", 0, 0, device=device, backend="triton").shape == (0,)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_of_every_shape(device, dtype, n):
    compare_perturb(shapes(n), DTYPES[dtype], device)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_of_one_shape(device, dtype, name):
    """Alone in its layout, a parameter chooses the kernel: width, fast path or not."""
    compare_perturb(pick(1027, name), DTYPES[dtype], device)
    compare_perturb(pick(1024, name), DTYPES[dtype], device, distribution="rademacher")


def test_perturb_of_mixed_dtypes(device):
    compare_perturb(shapes(1027), DTYPES.values(), device)


@pytest.mark.parametrize("n", [3, 5000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_perturb_by_signs(device, dtype, n):
    compare_perturb(shapes(n), DTYPES[dtype], device, distribution="rademacher")


@pytest.mark.parametrize("scale", [0.0, -1.0, 1e-40, 3e38])
def test_perturb_at_extreme_scales(device, scale):
    """A scale of 0 still adds: -0.0 becomes 0.0 or stays, as in the definition; nothing subnormal is flushed."""
    slot = mk.ParamSlot("w", torch.tensor([0.0, -0.0, 1e-40, -1e-40, 1.0] * 7))
    for dtype in DTYPES.values():
        compare_perturb([slot], dtype, device, scale)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_of_every_shape(device, dtype, n):
    compare_step(shapes(n), [DTYPES[dtype]], device, [(2**64 - 1, -0.2, 0.99)], [2**63])


def test_step_of_several_updates_and_pairs(device):
    """Decays and skips in order, then two pairs of mixed dtypes."""
    updates = [(3, 0.1), (2**64 - 1, -0.2, 0.99), (4, 0.0), (5, 0.0, 0.5), (6, 1e-30)]
    compare_step(shapes(1027), [*DTYPES.values()], device, updates, [7, 2**63], decay=0.9)


@pytest.mark.parametrize("name", names())
def test_step_of_one_shape(device, name):
    compare_step(pick(1027, name), [torch.bfloat16], device, [(3, 0.1)], [7])


def test_step_by_signs(device):
    compare_step(shapes(1027), [torch.bfloat16], device, [(3, 0.1, 0.5)], [7], distribution="rademacher")


@pytest.mark.parametrize("theta", DTYPES)
def test_update_alone(device, theta):
    """Without pairs the master may be of any dtype, and is rounded once."""
    compare_step(shapes(1027), [], device, [(3, 0.1), (4, 0.2)], theta=DTYPES[theta])


def test_pair_alone_leaves_theta(device):
    compare_step(shapes(1027), [torch.bfloat16], device, [], [7])


def test_targets_of_other_strides(device):
    """plus is transposed storage, minus is padded: as an engine may keep its buffers."""
    results = []
    for where, backend in ((device, "triton"), ("cpu", "reference")):
        master = layout([mk.ParamSlot("w", torch.arange(40.0 * 24).view(40, 24))], torch.float32, where)
        plus = master.like([torch.full((24, 40), torch.nan, dtype=torch.bfloat16, device=where).t()])
        minus = master.like([torch.full((40, 32), torch.nan, dtype=torch.float16, device=where)[:, :24]])
        mk.step_(master, [(1, 0.5)], next_seed=2, eps=0.1, plus=plus, minus=minus, backend=backend)
        results.append([master, plus, minus])
    assert_same_bits(*results)


def test_replay_of_many_updates(device):
    """One pass of many updates is as many steps of one."""
    updates = [(seed, 0.01 * seed, 1 - 1e-4) for seed in range(40)]
    slots = pick(1027, "contiguous") + pick(64, "column_shard_across_blocks")
    compare_step(slots, [], device, updates)
    once, apart = layout(slots, torch.float32, device), layout(slots, torch.float32, device)
    mk.step_(once, updates[:8], backend="triton")
    for update in updates[:8]:
        mk.step_(apart, [update], backend="triton")
    assert_same_bits([once], [apart])


def test_a_step_of_coefficient_zero_changes_no_bit(device):
    theta = layout([mk.ParamSlot("w", torch.tensor([-0.0, 0.0, 1e-40, float("inf"), 1.5]))], torch.float32, device)
    before = bits([theta])
    for _ in range(5):
        mk.step_(theta, [(1, 0.0), (2, 1e-50)], backend="triton")
    assert torch.equal(before[0], bits([theta])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_targets_are_the_single_rounding_of_the_float32_values(device, dtype):
    slots = shapes(5000)
    wide, narrow = ([unwritten(slots, d, device) for _ in range(2)] for d in (torch.float32, dtype))
    for plus, minus in (wide, narrow):
        master = layout(slots, torch.float32, device)
        mk.step_(master, [(1, 0.1)], next_seed=2, eps=1e-3, plus=plus, minus=minus, backend="triton")
    for exact, rounded in zip(wide, narrow, strict=True):
        assert_same_bits([rounded], [exact.like([t.to(dtype) for t in exact.tensors])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_ties_and_extremes(device, dtype):
    """Ties go to even, overflow to infinity, NaN stays NaN."""
    values = torch.arange(0x3F7F0000, 0x3F820000, 0x800, dtype=torch.int32).view(torch.float32)
    extremes = torch.tensor([3.4e38, 65519.0, 65520.0, 1e-45, 5.9e-8, 2.98e-8, float("inf"), float("nan")])
    theta = mk.ParamLayout({"w": torch.cat([values, -values, extremes]).to(device)})
    plus, minus = (theta.like([torch.full_like(theta.tensors[0], torch.nan, dtype=dtype)]) for _ in range(2))
    mk.step_(theta, [], next_seed=1, eps=1e-45, plus=plus, minus=minus, backend="triton")
    expected = (theta.tensors[0] + 1e-45 * mk.standard_normal(1, "w", 0, len(theta.tensors[0]), device)).to(dtype)
    torch.testing.assert_close(plus.tensors[0], expected, rtol=0, atol=0, equal_nan=True)


def test_the_comparison_fails_where_nobody_wrote():
    slots = [mk.ParamSlot("w", torch.zeros(3))]
    with pytest.raises(AssertionError):
        assert_same_bits(*([unwritten(slots, torch.float32, "cpu")] for _ in range(2)))


@pytest.mark.parametrize("block_size", [512, 4096])
def test_block_size_changes_no_bit(device, block_size, monkeypatch):
    monkeypatch.setattr(table, "BLOCK_SIZE", block_size)
    monkeypatch.setattr(table, "PART", 128)
    monkeypatch.setattr(importlib.import_module("mezo_kernels.triton.standard_normal"), "BLOCK_SIZE", block_size)
    # small blocks mean many programs, which the interpreter runs one after the other
    slots = shapes(700)[::2] + shapes(300)[1::2]
    compare_perturb(slots, torch.bfloat16, device)
    compare_step(slots, [torch.bfloat16], device, [(1, 0.1)], [2])
    assert torch.equal(
        mk.standard_normal(3, "w", 5, 3000, device=device, backend="triton").cpu(),
        mk.standard_normal(3, "w", 5, 3000, backend="reference"),
    )


def test_shards_make_up_the_whole(device):
    """Rows and columns cut anywhere hold the z of the full parameter."""
    whole = mk.ParamLayout({"w": torch.zeros(12, 30, device=device)})
    mk.perturb_(whole, 1.0, 9, backend="triton")
    for row, col, rows, cols in [(0, 0, 5, 30), (5, 0, 7, 30), (0, 8, 12, 16), (3, 7, 4, 9), (11, 29, 1, 1)]:
        part = mk.ParamLayout([mk.ParamSlot("w", torch.zeros(rows, cols, device=device), (12, 30), row, col)])
        mk.perturb_(part, 1.0, 9, backend="triton")
        assert torch.equal(part.tensors[0], whole.tensors[0][row : row + rows, col : col + cols])


def test_table_is_built_once_for_a_layout(device, monkeypatch):
    theta, builds = layout(shapes(3), torch.float32, device), []
    monkeypatch.setattr(table.tables, "build", lambda *a, build=table.build: builds.append(a) or build(*a))
    for seed in range(3):
        mk.perturb_(theta, 0.1, seed, backend="triton")
    assert len(builds) == 1
    theta.tensors[0] = theta.tensors[0].clone()
    mk.perturb_(theta, 0.1, 3, backend="triton")
    assert len(builds) == 2


@pytest.mark.parametrize(
    ("slot", "dtype", "mode", "width"),
    [
        (mk.ParamSlot("w", torch.zeros(4096)), torch.float32, table.FLAT, 4),
        (mk.ParamSlot("w", torch.zeros(4096)), torch.bfloat16, table.FLAT, 8),
        (mk.ParamSlot("w", torch.zeros(4096), (9000,), 4), torch.bfloat16, table.FLAT, 8),
        (mk.ParamSlot("w", torch.zeros(8, 16), (8, 64), 0, 4), torch.bfloat16, table.BY_ROW, 8),
        (mk.ParamSlot("w", torch.zeros(8, 12), (8, 64), 0, 4), torch.bfloat16, table.BY_ROW, 4),
        (mk.ParamSlot("w", torch.zeros(8, 16), (8, 62), 0, 4), torch.float32, table.GENERAL, 4),
        (mk.ParamSlot("w", torch.zeros(4096), (9000,), 2), torch.float32, table.GENERAL, 4),
        (mk.ParamSlot("w", torch.zeros(16, 16).t()), torch.float32, table.GENERAL, 4),
    ],
)
def test_fast_paths_are_taken_where_alignment_allows(slot, dtype, mode, width):
    one = layout([slot], dtype, "cpu")
    made = table.build(one.tensors, [], [], one.geometry)
    (one,) = made.launches
    assert ((one.tiles[:, 0] & 3).tolist(), one.width) == ([mode] * len(one.tiles), width)
