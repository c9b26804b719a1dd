"""The machine that runs PTX, on programs of a few lines: results of instructions, and what it refuses to run."""

import numpy as np
import pytest
import torch

from mezo_kernels.ptx.machine import Machine, UnknownOpcodeError
from mezo_kernels.ptx.memory import AccessError, Global
from mezo_kernels.ptx.program import parse

THREADS = 32
PTX = """
.visible .entry kernel(.param .u64 kernel_param_0)
.reqntid 32
{
	.reg .pred 	%p<9>;
	.reg .b16 	%rs<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%rd<9>;
	ld.param.b64 	%rd1, [kernel_param_0];
	mov.u32 	%r1, %tid.x;
	.loc	1 7 0                          // line.py:7:0
	mad.wide.u32 	%rd2, %r1, 4, %rd1;
	BODY
	ret;
}
"""


def run(body: str, tensor: torch.Tensor, others=(), grid: int = 1) -> torch.Tensor:
    """The tensor after a program, in which %r1 is the thread, %rd1 the tensor and %rd2 the thread's 4 bytes of it."""
    lines = ";\n".join(line.strip() for line in body.split(";") if line.strip())
    memory = Global([tensor, *others])
    parameters = [np.array([tensor.data_ptr()], np.uint64)]
    Machine(parse(PTX.replace("BODY", lines + ";"), 256), grid, parameters, memory).run()
    memory.write_back()
    return tensor


def unary(opcode: str, x: torch.Tensor) -> torch.Tensor:
    """An instruction on float32 or int32, in the bits of the result."""
    out = torch.cat([run(f"ld.global.b32 %r2, [%rd2]; {opcode}; st.global.b32 [%rd2], %r3", part.view(torch.float32))
                     for part in x.split(THREADS)])  # fmt: skip
    return out.view(torch.int32)


def test_instructions_of_integers():
    x = torch.tensor([0, 1, -1, 2**31 - 1, -(2**31), 12345, -98765, 7] * 4, dtype=torch.int32)
    for opcode, expected in {
        "mul.hi.u32 %r3, %r2, 3528531795": [(v % 2**32) * 3528531795 >> 32 for v in x.tolist()],
        "mul.lo.s32 %r3, %r2, %r2": [v * v for v in x.tolist()],
        "shr.s32 %r3, %r2, 33": [v >> 31 for v in x.tolist()],
        "shr.u32 %r3, %r2, 32": [0] * 32,
        "shl.b32 %r3, %r2, 32": [0] * 32,
        "bfe.s32 %r3, %r2, 4, 3": [((v >> 4 & 7) ^ 4) - 4 for v in x.tolist()],
        "bfe.u32 %r3, %r2, 4, 3": [v >> 4 & 7 for v in x.tolist()],
        "div.u32 %r3, %r2, 7": [v % 2**32 // 7 for v in x.tolist()],
        "setp.lt.s32 %p1, %r2, 0; selp.b32 %r3, 1, 2, %p1": [1 if v < 0 else 2 for v in x.tolist()],
        "setp.lt.u32 %p1, %r2, 7; selp.b32 %r3, 1, 2, %p1": [1 if v % 2**32 < 7 else 2 for v in x.tolist()],
        "cvt.s64.s32 %rd3, %r2; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r3, %rd3": [v >> 32 for v in x.tolist()],
        "cvt.u64.u32 %rd3, %r2; shr.u64 %rd3, %rd3, 32; cvt.u32.u64 %r3, %rd3": [0] * 32,
        "mov.b32 {%rs1, %rs2}, %r2; mov.b32 %r3, {%rs2, %rs1}": [
            (v & 0xFFFF) << 16 | v >> 16 & 0xFFFF for v in x.tolist()
        ],
        "neg.s32 %r3, %r2": [-v for v in x.tolist()],
    }.items():
        assert [v % 2**32 for v in unary(opcode, x.clone()).tolist()] == [v % 2**32 for v in expected], opcode


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_round_to_nearest_even(kind, dtype):
    edges = [
        0x3F808000,
        0x3F818000,
        0x3F801000,
        0x3F803000,
        0x7F7FFFFF,
        0x477FEFFF,
        0x477FF000,
        0x33000000,
        0x33000001,
        1,
    ]
    x = torch.tensor([v for e in edges for v in (e, e - 1, e + 1)] + [0, 0], dtype=torch.int32).view(torch.float32)
    expected = x.to(dtype).view(torch.int16).int() & 0xFFFF
    assert torch.equal(unary(f"cvt.rn.{kind}.f32 %rs1, %r2; cvt.u32.u16 %r3, %rs1", x.clone()), expected)
    assert torch.equal(unary(f"cvt.rn.{kind}x2.f32 %r3, 0f00000000, %r2", x.clone()), expected)
    widened = unary(f"cvt.rn.{kind}.f32 %rs1, %r2; cvt.f32.{kind} %r3, %rs1", x.clone())
    assert torch.equal(widened.view(torch.float32), x.to(dtype).float())


def test_threads_that_part_meet_again():
    body = """setp.lt.u32 %p1, %r1, 10; @%p1 bra $A; mov.b32 %r2, 5; bra.uni $B; $A:; mov.b32 %r2, 3; $B:;
        add.s32 %r2, %r2, %r1; st.global.b32 [%rd2], %r2"""
    out = run(body, torch.zeros(THREADS)).view(torch.int32)
    assert out.tolist() == [3 + i if i < 10 else 5 + i for i in range(THREADS)]


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("ld.global.b32 %r2, [%rd2+4]", "in no tensor|not inside"),
        ("ld.global.b32 %r2, [%rd2+2]", "not aligned to 4"),
        ("st.global.b32 [%rd1], %r1", "stored to twice"),
        ("st.global.b32 [%rd2], %r1; st.global.b32 [%rd2], %r1", "stored to twice"),
        ("st.global.b32 [%rd2], %r1; ld.global.b32 %r2, [%rd2]", "stored to by the same launch"),
        ("shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r1; xor.b32 %r3, %r3, 4; ld.shared.b32 %r2, [%r3]", "barrier"),
        ("mov.b32 %r3, 0; st.shared.b32 [%r3], %r1", "different values"),
        ("mov.b32 %r3, 0; st.shared.b32 [%r3], %r3; ld.shared.b32 %r2, [%r3]", "without a barrier"),
        ("st.shared.b32 [%r1+300], %r1", "beyond its end"),
    ],
)
def test_what_a_kernel_must_not_touch(body, why):
    with pytest.raises(AccessError, match=why):
        run(body, torch.zeros(THREADS))


def test_a_barrier_orders_shared_memory():
    body = """shl.b32 %r3, %r1, 2; st.shared.b32 [%r3], %r1; bar.sync 0; xor.b32 %r3, %r3, 4; ld.shared.b32 %r2, [%r3];
        st.global.b32 [%rd2], %r2"""
    assert run(body, torch.zeros(THREADS)).view(torch.int32).tolist() == [i ^ 1 for i in range(THREADS)]


def test_a_barrier_that_some_pass_by():
    with pytest.raises(ValueError, match="barrier"):
        run("setp.lt.u32 %p1, %r1, 10; @%p1 bar.sync 0", torch.zeros(THREADS))


def test_bytes_between_elements_are_guards():
    """Also inside one storage: a view's gaps belong to nobody."""
    every_other = torch.zeros(2 * THREADS)[::2]
    with pytest.raises(AccessError, match="not inside one tensor"):
        run("ld.global.b32 %r2, [%rd2]", every_other)


def test_tables_are_read_only():
    with pytest.raises(AccessError, match="may write"):
        run("st.global.b32 [%rd2], %r1", torch.zeros(THREADS, dtype=torch.int32))


REFUSED = (
    "fma.rn.f32 mul.f32 add.f32 add.rn.ftz.f32 sqrt.approx.f32 div.full.f32 sin.approx.f32 cvt.rz.f16.f32 min.f32"
    " atom.global.add.f32"
)


@pytest.mark.parametrize("opcode", REFUSED.split())
def test_opcodes_that_are_refused(opcode):
    """Before anything runs, even where no thread comes by."""
    with pytest.raises(UnknownOpcodeError, match=rf"line\.py:7: .*{opcode}"):
        run(f"ret; {opcode} %r2, %r1, %r1", torch.zeros(THREADS))


def test_a_register_that_nobody_wrote():
    with pytest.raises(ValueError, match="%r5 is read before it is written"):
        run("add.s32 %r2, %r5, 1", torch.zeros(THREADS))
