"""The z stream against its frozen vectors, against float64, and as a distribution."""

import math

import numpy as np
import pytest
import torch

from mezo_kernels import available_backends, lora_init, perturbation_seed, rademacher, standard_normal, tensor_id
from mezo_kernels.philox import box_muller, check_seed, philox_4x32, z_at
from mezo_kernels.reference import TOGETHER, _draws

# stated by the definition of the stream; reached where u -> 1, that is r near 0
MAX_ERROR = 1.1e-5
LARGEST_Z = 6.76371  # 6.7637 to four decimals
# five standard errors of a moment of a million draws: one false alarm in 1.7 million runs, and the seed is fixed
N, FIVE_SIGMA = 1_000_000, 5

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
NORMALS = [
    (42, Q_PROJ, 0, ["bf84df8e", "bf39a04d", "bf191576", "bfdb5957"]),
    (9223372036854775813, "w", 6, ["bf468888", "3f2508c5", "bc206dec", "bfb90498"]),
    (7, "w", 17179869187, ["3f5d4d2d", "bfac7daa", "3f694c1f", "3ceaf4d8"]),
    (0, "w", 0, ["be94eb10", "3ea2c2e5", "bf5fa60f", "3fc4f48d"]),
    # a word that becomes u = 1 has the radius -0, not 0
    (0, "w", 19962192, ["3fc50493", "40029c30", "80000000", "00000000"]),
]
BACKENDS = available_backends("cpu")


def hexadecimal(tensor):
    return [f"{word & 0xFFFFFFFF:08x}" for word in tensor.view(torch.int32).tolist()]


def test_philox_known_answer():
    """Salmon et al. 2011, the Random123 known-answer test of counter 0, key 0."""
    assert philox_4x32(0, 0, 0, 0, 0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def test_philox_of_tensors_is_philox_of_integers():
    words = torch.randint(0, 2**32, (4, 100), generator=torch.Generator().manual_seed(0))
    key = 0xFFFFFFFF, 0x80000001
    expected = [philox_4x32(*counter, *key) for counter in words.T.tolist()]
    assert torch.stack(philox_4x32(*words, *key), -1).tolist() == [list(block) for block in expected]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("seed", "name", "start", "expected"), NORMALS, ids=["q_proj", "seed>2^63", "i>2^34", "zero", "u=1"]
)
def test_normal_vectors(seed, name, start, expected, backend):
    assert hexadecimal(standard_normal(seed, name, start, 4, backend=backend)) == expected


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_z_of_several_seeds_is_that_of_each(distribution):
    seeds, index = [0, 7, 2**32 + 7, 2**63, 2**64 - 1], torch.arange(2**34, 2**34 + 300).view(20, 15)
    each = [z_at([seed], 5, index, distribution)[0] for seed in seeds]
    assert torch.equal(z_at(seeds, 5, index, distribution), torch.stack(each))
    assert len({tuple(z.flatten().tolist()) for z in each}) == len(seeds)


@pytest.mark.parametrize("size", [TOGETHER // 3, TOGETHER, TOGETHER + 1])
def test_the_reference_draws_seeds_in_order(size):
    seeds, index = [3, 1, 4, 1, 5, 9, 2], torch.arange(size)
    drawn = list(_draws(seeds, 5, index, "normal"))
    assert torch.equal(torch.stack(drawn), torch.stack([z_at([seed], 5, index, "normal")[0] for seed in seeds]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rademacher_vector(backend):
    assert rademacher(42, "w", 0, 8, backend=backend).tolist() == [1, -1, -1, 1, -1, 1, 1, -1]


@pytest.mark.parametrize(
    ("run_seed", "step", "k", "expected"),
    [
        (0, 0, 0, 14765902928641365142),
        (0, 1, 0, 1253590578697012336),
        (0, 1, 1, 11884268794979519706),
        (2**64 - 1, 2**32 + 1, 3, 4169657304733001621),
    ],
)
def test_seeds_of_a_run(run_seed, step, k, expected):
    assert perturbation_seed(run_seed, step, k) == expected


def test_lora_init_vector_and_range():
    a = lora_init(0, Q_PROJ, (8, 576))
    assert hexadecimal(a[0, :4]) == ["3c67e5e0", "3cd057bb", "3be1dc00", "3cdbdeb3"]
    bound = np.float32(math.sqrt(1 / 576))
    assert -bound <= a.min().item() < -0.99 * bound
    assert 0.99 * bound < a.max().item() < bound


def test_lora_init_of_a_block_is_a_slice_of_the_whole():
    whole = lora_init(5, "a", (6, 37))
    block = lora_init(5, "a", (6, 37), row_start=2, rows=3, col_start=5, cols=30)
    assert torch.equal(block, whole[2:5, 5:35])


def test_tensor_id_is_crc32():
    assert tensor_id("w") == 0x1C630B12


@pytest.mark.parametrize("seed", [-1, 2**64, 1.0, True, None], ids=str)
def test_bad_seeds_are_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        check_seed(seed)


def test_moments_of_z():
    z = standard_normal(1, "w", 0, N).double()
    for moment, expected, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        error = z.pow(moment).mean().item() - expected
        assert abs(error) < FIVE_SIGMA * math.sqrt(variance / N), f"moment {moment}"


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 1024])
def test_z_is_uncorrelated_between_elements(lag):
    z = standard_normal(2, "w", 0, N).double()
    assert abs((z[lag:] * z[:-lag]).mean().item()) < FIVE_SIGMA / math.sqrt(N - lag)


@pytest.mark.parametrize("other", [(1, "v"), (2, "w"), (1 + 2**32, "w")], ids=["name", "seed", "high half"])
def test_z_is_uncorrelated_between_names_and_seeds(other):
    z, unlike = standard_normal(1, "w", 0, N).double(), standard_normal(*other, 0, N).double()
    assert abs((z * unlike).mean().item()) < FIVE_SIGMA / math.sqrt(N)


def test_rademacher_is_balanced():
    z = rademacher(3, "w", 0, N)
    assert torch.equal(z.abs(), torch.ones(N))
    assert abs(z.mean().item()) < FIVE_SIGMA / math.sqrt(N)


def test_normals_against_float64():
    """Random words, and the corners of both: the largest and smallest u, every quadrant boundary."""
    x = torch.randint(0, 2**32, (N,), generator=torch.Generator().manual_seed(0))
    y = torch.randint(0, 2**32, (N,), generator=torch.Generator().manual_seed(1))
    corners = torch.tensor([k * 2**29 + d for k in range(9) for d in (-1, 0, 1)]).clamp(0, 2**32 - 1)
    grid = torch.cartesian_prod(torch.cat([corners, torch.arange(64), 2**32 - 1 - torch.arange(64)]), corners)
    x, y = torch.cat([x, grid[:, 0]]), torch.cat([y, grid[:, 1]])
    even, odd = box_muller(x, y)
    # u and f are the float32 numbers of the definition; everything after them in float64
    u = (x.to(torch.float32) * 2.0**-32 + 2.0**-33).double()
    r = torch.sqrt(-2 * torch.log(u))
    low = (y << 2) & 0xFFFFFFFF
    angle = (y >> 30) * (math.pi / 2) + (low - ((low >> 31) << 32)).double() * (math.pi / 4 / 2**31)
    assert (even.double() - r * torch.cos(angle)).abs().max().item() <= MAX_ERROR
    assert (odd.double() - r * torch.sin(angle)).abs().max().item() <= MAX_ERROR
    assert max(even.abs().max().item(), odd.abs().max().item()) <= LARGEST_Z
