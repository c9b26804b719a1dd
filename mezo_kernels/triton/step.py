"""One pass over the master: apply updates in registers, write theta once, write theta +- eps z for each next pair."""

import torch
import triton
import triton.language as tl

from mezo_kernels.philox import STREAMS
from mezo_kernels.triton.philox import INTERPRETED, draw
from mezo_kernels.triton.table import Table, capturing, keep_if_capturing, step_values, tables, values_on
from mezo_kernels.triton.tile import BY_ROW, FLAT, GENERAL, load, locate, parts, storage, store, tensor_id, tile_of

PRODUCT = tl.constexpr("mul.rn.f32 $0, $1, $2;")


@triton.jit
def draw_of(value_ptr, quad, tag, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    """`draw` under the seed at an address, for the parameter whose tensor_id is `tag`."""
    seed = tl.load(value_ptr)
    return draw(quad, tag, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), STREAM, WIDTH)


@triton.jit
def decayed(theta, decay):
    """theta * decay, for a branch that is taken where decay is not 1.

    The compiler computes what has no effect in any case, and chooses afterwards. It must take this for an effect.
    """
    if not INTERPRETED and tl.target_info.is_cuda():
        theta = tl.inline_asm_elementwise(PRODUCT, "=f,f,f", [theta, decay], dtype=tl.float32, is_pure=False, pack=1)
    else:
        theta = theta * decay
    return theta


@triton.jit
def _step_tile(
    slot_ptr, row, unit, part, values_ptr, n_updates, n_pairs,
    STREAM: tl.constexpr, THETA: tl.constexpr, TARGET: tl.constexpr,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    quad, at = locate(slot_ptr, row, unit, part, MODE, WIDTH, BLOCK_SIZE)

    tag = tensor_id(slot_ptr)
    theta_at = storage(slot_ptr, 0)
    theta = load(theta_at, at, THETA, MODE, WIDTH)

    for k in range(n_updates):
        # theta <- theta * decay, then theta - (c * z); a decay of 1 and a coefficient of 0 change no bit
        numbers = tl.load(values_ptr + 2 * k + 1)
        coefficient = numbers.to(tl.int32).to(tl.float32, bitcast=True)
        decay = (numbers >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        if decay != 1.0:
            theta = decayed(theta, decay)
        if coefficient != 0.0:
            theta = theta - coefficient * draw_of(values_ptr + 2 * k, quad, tag, STREAM, WIDTH)
    if n_updates > 0:
        store(theta_at, theta, at, THETA, MODE, WIDTH)

    for k in range(n_pairs):
        # plus, minus <- theta +- (eps * z)
        pair_ptr = values_ptr + 2 * (n_updates + k)
        eps = tl.load(pair_ptr + 1).to(tl.int32).to(tl.float32, bitcast=True)
        move = eps * draw_of(pair_ptr, quad, tag, STREAM, WIDTH)
        plus_at, minus_at = storage(slot_ptr, 1 + 2 * k), storage(slot_ptr, 2 + 2 * k)
        store(plus_at, theta + move, at, TARGET, MODE, WIDTH)
        store(minus_at, theta - move, at, TARGET, MODE, WIDTH)


@triton.jit(do_not_specialize=["columns", "n_updates", "n_pairs"])
def _step_kernel(
    slots_ptr, tiles_ptr, columns, values_ptr, n_updates, n_pairs,
    STREAM: tl.constexpr, THETA: tl.constexpr, TARGET: tl.constexpr,
    MODE: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0).to(tl.int64)
    slot_ptr, mode, row, unit = tile_of(slots_ptr, tiles_ptr, columns, pid)
    work = values_ptr, n_updates, n_pairs
    if MODE == FLAT or mode == FLAT:
        _step_tile(slot_ptr, row, unit, 0, *work, STREAM, THETA, TARGET, FLAT, WIDTH, BLOCK_SIZE)
    elif mode == BY_ROW:
        _step_tile(slot_ptr, row, unit, 0, *work, STREAM, THETA, TARGET, BY_ROW, WIDTH, BLOCK_SIZE)
    else:
        for part in range(parts(slot_ptr, row, unit, PART, BLOCK_SIZE)):
            _step_tile(slot_ptr, row, unit, part, *work, STREAM, THETA, TARGET, GENERAL, 4, PART)


def step_(
    theta: list[torch.Tensor],
    plus: list[torch.Tensor],
    minus: list[torch.Tensor],
    geometry: list[torch.Tensor],
    updates: list[tuple[int, float, float]],
    next_seeds: list[int],
    eps: float,
    distribution: str,
) -> None:
    """Apply updates in order, then write theta +- eps z(next_seed) for each pair; arguments as in `reference`."""
    prepare_step(theta, plus, minus, geometry)(updates, next_seeds, eps, distribution)


def prepare_step(
    theta: list[torch.Tensor], plus: list[torch.Tensor], minus: list[torch.Tensor], geometry: list[torch.Tensor]
) -> "Prepared":
    """`step_` of these tensors, which must stay where they are: a function of its other arguments."""
    return Prepared(tables(theta, plus, minus, geometry))


class Prepared:
    """`step_` of the tensors of a table."""

    def __init__(self, table: Table):
        self.table = table

    def __call__(self, updates, next_seeds, eps, distribution) -> None:
        """Arguments as in `reference`."""
        values = values_on(step_values(updates, next_seeds, eps), self.table.slots.device)
        self.launch(values, len(updates), len(next_seeds), distribution)

    def launch(self, values: torch.Tensor, n_updates: int, n_pairs: int, distribution: str) -> None:
        """Run the kernel on values that are on the device."""
        constants = {"STREAM": STREAMS[distribution], "THETA": self.table.theta, "TARGET": self.table.target}
        self.table.launch(_step_kernel, values, n_updates, n_pairs, **constants)

    def buffered(self, n_updates: int, n_pairs: int, distribution: str) -> "Buffered":
        """The same, of as many updates and pairs every time, for a graph."""
        return Buffered(self, n_updates, n_pairs, distribution)


class Buffered:
    """A step that reads its values where they lie when the device comes to it."""

    def __init__(self, prepared: Prepared, n_updates: int, n_pairs: int, distribution: str):
        self.prepared, self.rest = prepared, (n_updates, n_pairs, distribution)
        shape, device = (max(1, n_updates + n_pairs), 2), prepared.table.slots.device
        if capturing(device):
            raise ValueError("a step is made for a graph before its capture: the zeros it begins with would be in it")
        self.values = torch.zeros(shape, dtype=torch.int64, device=device)

    def write(self, updates: list[tuple[int, float, float]], next_seeds: list[int], eps: float) -> None:
        """Put new values there, after the work that the current stream already has."""
        device = self.values.device
        if capturing(device):
            raise ValueError("numbers are set outside of a capture: a graph would keep the ones of now")
        self.values.copy_(values_on(step_values(updates, next_seeds, eps), device))

    def launch(self) -> None:
        """Run the kernel."""
        keep_if_capturing(self, self.values.device)
        self.prepared.launch(self.values, *self.rest)
