"""Runs a program on a grid: a register is an array over all threads, and threads that part are told apart by masks.

Every opcode that is run is in `OPCODES` by its full name. What is not there is refused before anything runs: operations
on floats that are contracted (`fma.rn.f32`) or that ptxas may contract (`mul.f32`, without its own rounding), flushes
of subnormals, approximations, instructions that nobody wrote down here. Inline assembly may have what is in `INLINE`
too: somebody wrote it, and showed what it gives.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np

from mezo_kernels.ptx.memory import UNSIGNED, Global, Shared
from mezo_kernels.ptx.program import Instruction, Program

SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT = {16: np.float16, 32: np.float32, 64: np.float64}
UNSET = 0xFFC0DEADFFC0DEAD  # of a register that nobody wrote, a NaN; half of a packed one may stay so


@functools.cache
def dtype(kind: str) -> np.dtype:
    """numpy's of a PTX type such as "u32" or "pred"; bits without a meaning (b32) are unsigned."""
    if kind == "pred":
        return np.dtype(bool)
    return np.dtype({"s": SIGNED, "f": FLOAT}.get(kind[0], UNSIGNED)[int(kind[1:])])


class UnknownOpcodeError(Exception):
    """A kernel has an instruction whose effect is not known here, or depends on ptxas."""


class Machine:
    """One launch.

    Args:
        program: what every thread runs.
        grid: programs, in one dimension.
        parameters: of the kernel in order, as arrays of one unsigned number.
        memory: what the kernel's addresses lead to.
    Raises:
        UnknownOpcodeError: the program has an opcode that is not in `OPCODES`.
    """

    def __init__(self, program: Program, grid: int, parameters: list[np.ndarray], memory: Global):
        self.program, self.parameters, self.memory = program, parameters, memory
        self.n = grid * program.threads
        self.program_of = np.repeat(np.arange(grid, dtype=np.uint32), program.threads)
        self.thread_of = np.tile(np.arange(program.threads, dtype=np.uint32), grid)
        self.registers = {"%ctaid.x": self.program_of, "%tid.x": self.thread_of}
        self.shared = Shared(grid, program.shared)
        for instruction in itertools.chain(*program.blocks):
            if instruction.opcode not in OPCODES and not (instruction.inline and instruction.opcode in INLINE):
                raise UnknownOpcodeError(f"{instruction.line}: {_refusal(instruction.opcode)}")

    def run(self) -> None:
        """Run all threads to their ends. The first block that a thread waits at runs next, for all that wait there."""
        at = np.zeros(self.n, np.int32)
        with np.errstate(all="ignore"):
            while (block := int(at.min())) < len(self.program.blocks):
                here = at == block
                at[here] = block + 1
                chosen = None if here.all() else here
                for instruction in self.program.blocks[block]:
                    mask = self._mask(instruction, chosen)
                    try:
                        run = OPCODES.get(instruction.opcode) or INLINE[instruction.opcode]
                        target = run(self, instruction, mask)
                    except Exception as error:
                        error.add_note(f"in {instruction.opcode} of {instruction.line}")
                        raise
                    if target is not None:
                        at[slice(None) if mask is None else mask] = target

    def _mask(self, instruction: Instruction, here: np.ndarray | None) -> np.ndarray | None:
        """The threads that an instruction is for; None is all of them."""
        if not instruction.guard:
            return here
        wanted = self.all(self.read(instruction.guard, dtype("pred")) == instruction.wanted)
        return wanted if here is None else here & wanted

    def read(self, operand: str, kind: np.dtype) -> np.ndarray:
        """A register or a number as an array of one element, where all threads have the same, or of all threads."""
        if operand[0] != "%":
            return _number(operand, kind)
        if operand not in self.registers:
            raise ValueError(f"{operand} is read before it is written")
        value = self.registers[operand]
        if value.itemsize > kind.itemsize:  # a wider register: its low part
            value = value.astype(UNSIGNED[8 * kind.itemsize])
        return value.view(kind)

    def write(self, register: str, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Set a register of the threads in `mask`; a wider one is extended by the value's sign, if it has one."""
        bits = self.program.bits[register.rstrip("0123456789")]
        if bits == 1:
            value = np.asarray(value, bool)
        else:
            signed, width = value.dtype.kind == "i", 8 * value.itemsize
            if width > bits:
                raise ValueError(f"{register} has {bits} bits, the value {width}")
            value = value if signed else value.view(UNSIGNED[width])
            if width < bits:
                value = value.astype(SIGNED[bits] if signed else UNSIGNED[bits])
            value = value.view(UNSIGNED[bits])
        if mask is not None:
            value = np.where(mask, value, self.registers.get(register, unset(value.dtype)))
        self.registers[register] = value

    def address(self, operand: tuple[str, int], kind: str) -> np.ndarray:
        """Where [base + offset] leads, for every thread."""
        base, offset = operand
        return self.all(self.read(base, dtype(kind)) + dtype(kind).type(offset))

    def all(self, value: np.ndarray) -> np.ndarray:
        """One element a thread."""
        return np.broadcast_to(value, self.n)


@functools.cache
def unset(kind: np.dtype) -> np.ndarray:
    """What a register holds that nobody wrote."""
    return np.array([UNSET], np.uint64).astype(kind)


@functools.cache
def _number(text: str, kind: np.dtype) -> np.ndarray:
    if text == "global_smem":  # shared memory begins at 0
        return np.zeros(1, kind)
    if text[:2] in ("0f", "0d"):
        return np.array([int(text[2:], 16)], UNSIGNED[32 if text[1] == "f" else 64]).view(kind)
    if kind.kind == "b":
        return np.array([bool(int(text))])
    bits = 8 * kind.itemsize
    return np.array([int(text, 0) % 2**bits], UNSIGNED[bits]).view(kind)


def _refusal(opcode: str) -> str:
    name, *rest = opcode.split(".")
    if name == "fma" or ("rn" not in rest and name in ("add", "sub", "mul", "div", "sqrt")):
        return (
            f"{opcode} is contracted, approximate, or may be contracted by ptxas; z needs every operation rounded alone"
        )
    return f"the opcode {opcode} is not known to mezo_kernels.ptx"


Mask = np.ndarray | None
OPCODES: dict[str, Callable[[Machine, Instruction, Mask], int | None]] = {}
"""Full name -> (machine, instruction, mask of the threads that it is for, None of all) -> the block that they go on
with, if not the next one."""
INLINE: dict[str, Callable[[Machine, Instruction, Mask], int | None]] = {}
"""As `OPCODES`, of what inline assembly alone may have."""


def _elementwise(function: Callable, to: str, *kinds: str) -> Callable:
    """An instruction that makes one register of others, each element by itself."""
    sources, result = [dtype(kind) for kind in kinds], dtype(to)

    def run(machine: Machine, instruction: Instruction, mask: Mask) -> None:
        first, *rest = instruction.operands
        values = [machine.read(operand, kind) for operand, kind in zip(rest, sources, strict=True)]
        machine.write(first, np.asarray(function(*values)).astype(result, copy=False), mask)

    return run


def _shift(function: Callable, x: np.ndarray, by: np.ndarray) -> np.ndarray:
    """A shift by the width or more leaves zeros, or the sign."""
    width = 8 * x.itemsize
    shifted = function(x, np.minimum(by, width - 1).astype(x.dtype))
    rest = x >> x.dtype.type(width - 1) if function is np.right_shift and x.dtype.kind == "i" else x.dtype.type(0)
    return np.where(by >= width, rest, shifted)


def _product(high: bool, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All bits of a product, or its upper half."""
    wide = dtype(f"{'s' if a.dtype.kind == 'i' else 'u'}{16 * a.itemsize}").type
    product = a.astype(wide) * b.astype(wide)
    return product >> wide(8 * a.itemsize) if high else product


def _field(x: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Bits start .. start + length, extended by their sign if x has one."""
    width = 8 * x.itemsize
    up, down = (width - start - length).astype(x.dtype), (width - length).astype(x.dtype)
    return (x << up) >> down


def _bfloat(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of bfloat16, rounded to nearest even."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def _half(x: np.ndarray) -> np.ndarray:
    """float32 -> the bits of float16, rounded to nearest even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(np.float16).view(np.uint16))


def _from_bfloat(x: np.ndarray) -> np.ndarray:
    return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _from_half(x: np.ndarray) -> np.ndarray:
    return x.view(np.float16).astype(np.float32)


def _pair(narrow: Callable, high: np.ndarray, low: np.ndarray) -> np.ndarray:
    return narrow(high).astype(np.uint32) << np.uint32(16) | narrow(low)


def _packed(function: Callable, *pairs: np.ndarray) -> np.ndarray:
    """An operation on both float32 halves of 64 bits."""
    low, high = (
        function(*((pair >> np.uint64(shift)).astype(np.uint32).view(np.float32) for pair in pairs)).view(np.uint32)
        for shift in (0, 32)
    )
    return low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c of float32, rounded once.

    The product is exact in float64. Where the sum is not, its last bit is set, so that the second rounding, to float32,
    sees on which side of a tie it was (rounding to odd; Boldo and Melquiond 2008).

    >>> one = np.float32(1)
    >>> bool(fused(one + 2**-23, one - 2**-23, -one) == -np.float32(2.0**-46))
    True
    """
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = np.asarray(product + c)
    # what the addition lost (Knuth's TwoSum)
    part = total - product
    lost = (product - (total - part)) + (c - part)
    bits = total.view(np.int64)
    towards_zero = (lost < 0) == (total > 0)
    odd = np.where(bits & 1, bits, bits + np.where(towards_zero, -1, 1))
    return np.where((lost != 0) & np.isfinite(total), odd, bits).view(np.float64).astype(np.float32)


def reciprocal_root(x: np.ndarray) -> np.ndarray:
    """1 / sqrt(x) of float32, rounded; a device's is a few units in the last place off. Subnormals count as zero."""
    x = np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)
    return (1 / np.sqrt(x.astype(np.float64))).astype(np.float32)


def _select(a: np.ndarray, b: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    return np.where(chosen, a, b)


def _move(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    """A register, or one to several narrower ones, or several to a wider one, the low part first."""
    bits = int(instruction.opcode[-2:])
    to, source = instruction.operands
    if isinstance(to, list):
        whole, part = machine.read(source, dtype(f"b{bits}")), bits // len(to)
        for i, name in enumerate(to):
            if name != "_":
                machine.write(name, (whole >> UNSIGNED[bits](i * part)).astype(UNSIGNED[part]), mask)
    elif isinstance(source, list):
        part = UNSIGNED[bits // len(source)]
        parts = [machine.read(n, np.dtype(part)) if n in machine.registers else unset(part) for n in source]
        shifted = (p.astype(UNSIGNED[bits]) << UNSIGNED[bits](i * bits // len(source)) for i, p in enumerate(parts))
        machine.write(to, functools.reduce(np.bitwise_or, shifted), mask)
    else:
        machine.write(to, machine.read(source, dtype(f"b{bits}")), mask)


def _names(opcode: str, operand: str | list[str]) -> list[str]:
    names = operand if isinstance(operand, list) else [operand]
    count = 4 if ".v4." in opcode else 2 if ".v2." in opcode else 1
    if len(names) != count:
        raise ValueError(f"{opcode} has {len(names)} registers, expected {count}")
    return names


def _load_parameter(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    to, (name, _) = instruction.operands
    value = machine.parameters[int(name.rpartition("_")[2])]
    machine.write(to, value.view(dtype(instruction.opcode.rpartition(".")[2])), mask)


def _load(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    names, place = _names(instruction.opcode, instruction.operands[0]), instruction.operands[1]
    bits, shared = int(instruction.opcode[-2:]), ".shared" in instruction.opcode
    if mask is not None and not mask.any():
        return
    chosen = slice(None) if mask is None else mask
    address = machine.address(place, "u32" if shared else "u64")[chosen]
    if shared:
        found = machine.shared.load(machine.program_of[chosen], machine.thread_of[chosen], address, len(names), bits)
    else:
        found = machine.memory.load(address, len(names), bits)
    for name, column in zip(names, found.T, strict=True):
        value = np.zeros(machine.n, found.dtype)
        value[chosen] = column
        machine.write(name, value, mask)


def _store(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    place, names = instruction.operands[0], _names(instruction.opcode, instruction.operands[1])
    kind, shared = dtype(f"b{instruction.opcode[-2:]}"), ".shared" in instruction.opcode
    if mask is not None and not mask.any():
        return
    chosen = slice(None) if mask is None else mask
    values = np.stack([machine.all(machine.read(name, kind))[chosen] for name in names], 1)
    address = machine.address(place, "u32" if shared else "u64")[chosen]
    if shared:
        machine.shared.store(machine.program_of[chosen], machine.thread_of[chosen], address, values)
    else:
        machine.memory.store(address, values)


def _barrier(machine: Machine, instruction: Instruction, mask: Mask) -> None:
    waiting = machine.all(np.ones(1, bool) if mask is None else mask).reshape(-1, machine.program.threads)
    if (waiting.any(1) != waiting.all(1)).any():
        raise ValueError("some threads of a program wait at a barrier that others have passed by")
    machine.shared.barrier(waiting.any(1))


def _branch(machine: Machine, instruction: Instruction, mask: Mask) -> int:
    return machine.program.labels[instruction.operands[0]]


def _return(machine: Machine, instruction: Instruction, mask: Mask) -> int:
    return len(machine.program.blocks)


def _fill_integers() -> None:
    for bits in (16, 32, 64):
        for kind in (f"u{bits}", f"s{bits}"):
            for name, function in (("add", np.add), ("sub", np.subtract), ("min", np.minimum), ("max", np.maximum)):
                OPCODES[f"{name}.{kind}"] = _elementwise(function, kind, kind, kind)
            OPCODES[f"mul.lo.{kind}"] = _elementwise(np.multiply, kind, kind, kind)
            OPCODES[f"mad.lo.{kind}"] = _elementwise(lambda a, b, c: a * b + c, kind, kind, kind, kind)
            OPCODES[f"shr.{kind}"] = _elementwise(functools.partial(_shift, np.right_shift), kind, kind, "u32")
            for comparison in ("eq", "ne", "lt", "le", "gt", "ge"):
                OPCODES[f"setp.{comparison}.{kind}"] = _elementwise(COMPARISONS[comparison], "pred", kind, kind)
        for kind in (f"u{bits}", f"s{bits}") if bits < 64 else ():
            wide = f"{kind[0]}{2 * bits}"
            OPCODES[f"mul.wide.{kind}"] = _elementwise(functools.partial(_product, False), wide, kind, kind)
            OPCODES[f"mul.hi.{kind}"] = _elementwise(functools.partial(_product, True), kind, kind, kind)
            OPCODES[f"mad.wide.{kind}"] = _elementwise(
                lambda a, b, c: _product(False, a, b) + c, wide, kind, kind, wide
            )
        OPCODES[f"div.u{bits}"] = _elementwise(np.floor_divide, f"u{bits}", f"u{bits}", f"u{bits}")
        OPCODES[f"rem.u{bits}"] = _elementwise(np.remainder, f"u{bits}", f"u{bits}", f"u{bits}")
        OPCODES[f"neg.s{bits}"] = _elementwise(np.negative, f"s{bits}", f"s{bits}")
    for kind in ("u32", "s32", "u64", "s64"):
        OPCODES[f"bfe.{kind}"] = _elementwise(_field, kind, kind, "u32", "u32")


def _fill_bits() -> None:
    for kind in ("pred", "b16", "b32", "b64"):
        for name, function in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            OPCODES[f"{name}.{kind}"] = _elementwise(function, kind, kind, kind)
        OPCODES[f"not.{kind}"] = _elementwise(np.bitwise_not, kind, kind)
    OPCODES["mov.pred"] = _elementwise(np.positive, "pred", "pred")
    for bits in (16, 32, 64):
        OPCODES[f"shl.b{bits}"] = _elementwise(functools.partial(_shift, np.left_shift), *2 * (f"b{bits}",), "u32")
        OPCODES[f"shr.b{bits}"] = OPCODES[f"shr.u{bits}"]
        for comparison in ("eq", "ne"):
            OPCODES[f"setp.{comparison}.b{bits}"] = OPCODES[f"setp.{comparison}.u{bits}"]
        for kind in "busf":
            OPCODES[f"selp.{kind}{bits}"] = _elementwise(_select, *3 * (f"b{bits}",), "pred")
            OPCODES[f"mov.{kind}{bits}"] = _move
    for to, source in itertools.permutations((16, 32, 64), 2):
        for kind in "us":
            extended = f"{kind}{source}"  # the sign of the source decides where it becomes wider
            OPCODES[f"cvt.{kind}{to}.{kind}{source}"] = _elementwise(np.positive, f"{kind}{to}", extended)


def _fill_floats() -> None:
    for name, function in (("add", np.add), ("sub", np.subtract), ("mul", np.multiply)):
        OPCODES[f"{name}.rn.f32"] = _elementwise(function, "f32", "f32", "f32")
        OPCODES[f"{name}.rn.f32x2"] = _elementwise(functools.partial(_packed, function), "b64", "b64", "b64")
    OPCODES["div.rn.f32"] = _elementwise(np.divide, "f32", "f32", "f32")
    OPCODES["sqrt.rn.f32"] = _elementwise(np.sqrt, "f32", "f32")
    INLINE["fma.rn.f32"] = _elementwise(fused, "f32", "f32", "f32", "f32")
    INLINE["rsqrt.approx.ftz.f32"] = _elementwise(reciprocal_root, "f32", "f32")
    OPCODES["neg.f32"] = _elementwise(np.negative, "f32", "f32")
    for comparison, function in COMPARISONS.items():
        if comparison != "ne":  # of a NaN false, unlike numpy's
            OPCODES[f"setp.{comparison}.f32"] = _elementwise(function, "pred", "f32", "f32")
    for kind in ("s32", "u32"):
        OPCODES[f"cvt.rn.f32.{kind}"] = _elementwise(lambda x: x.astype(np.float32), "f32", kind)
    for kind, wide in (("bf16", _from_bfloat), ("f16", _from_half)):
        OPCODES[f"cvt.f32.{kind}"] = _elementwise(wide, "f32", "b16")
        for name, function in (("add", np.add), ("sub", np.subtract)):  # of sm_100; the first operand is widened
            OPCODES[f"{name}.rn.f32.{kind}"] = _elementwise(
                lambda a, b, function=function, wide=wide: function(wide(a), b), "f32", "b16", "f32"
            )
    for kind, narrow in (("bf16", _bfloat), ("f16", _half)):
        OPCODES[f"cvt.rn.{kind}.f32"] = _elementwise(narrow, "b16", "f32")
        OPCODES[f"cvt.rn.{kind}x2.f32"] = _elementwise(functools.partial(_pair, narrow), "b32", "f32", "f32")


def _fill_memory_and_control() -> None:
    for kind in ("b32", "s32", "u32", "f32", "b64", "u64", "s64"):
        OPCODES[f"ld.param.{kind}"] = _load_parameter
    for space, vector, bits in itertools.product(("global", "shared", "shared::cta"), ("", "v2.", "v4."), (16, 32, 64)):
        OPCODES[f"ld.{space}.{vector}b{bits}"], OPCODES[f"st.{space}.{vector}b{bits}"] = _load, _store
    OPCODES.update({"bar.sync": _barrier, "bra": _branch, "bra.uni": _branch, "ret": _return})


COMPARISONS = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "neu": np.not_equal,  # of floats: true of a NaN
}  # fmt: skip
for _fill in (_fill_integers, _fill_bits, _fill_floats, _fill_memory_and_control):
    _fill()
