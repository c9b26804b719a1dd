"""The z stream, version 1, inside Triton kernels: Philox words, Box and Muller's normals, Rademacher signs.

Kernels that call these functions must be launched with `enable_fp_fusion=False`: each float32 operation of the z
stream is rounded on its own.

For NVIDIA's GPUs a few operations are written in their assembly language (PTX), for fewer instructions and registers.
They give the bits of the plain ones, which run everywhere else: a multiplication is fused with an addition only where
the product is exact, so that it rounds once either way.
"""

import triton
import triton.language as tl

from mezo_kernels import philox
from mezo_kernels.triton.table import INTERPRETED

NORMAL = tl.constexpr(philox.NORMAL)
RADEMACHER = tl.constexpr(philox.RADEMACHER)
INTERPRETED = tl.constexpr(INTERPRETED)
_ROUND = """
mul.wide.u32 %p, $0, 0xD2511F53;
mul.wide.u32 %q, $2, 0xCD9E8D57;
mov.b64 {%c0, %c1}, %q;
mov.b64 {%c2, %c3}, %p;
xor.b32 %c1, %c1, $1;
xor.b32 $0, %c1, %k0;
xor.b32 %c3, %c3, $3;
xor.b32 $2, %c3, %k1;
mov.b32 $1, %c0;
mov.b32 $3, %c2;
add.u32 %k0, %k0, 0x9E3779B9;
add.u32 %k1, %k1, 0xBB67AE85;
"""
# `philox_4x32` of the words $4 to $7 under the key ($8, $9); as one piece it also compiles in two thirds of the time
PHILOX = tl.constexpr(
    """{
.reg .b64 %p, %q;
.reg .b32 %c0, %c1, %c2, %c3, %k0, %k1;
mov.b32 $0, $4;
mov.b32 $1, $5;
mov.b32 $2, $6;
mov.b32 $3, $7;
mov.b32 %k0, $8;
mov.b32 %k1, $9;
"""
    + 10 * _ROUND
    + "}"
)
# x 2**-32 + 2**-33, and 1 - w / 2
UNIFORM = tl.constexpr("fma.rn.f32 $0, $1, 0f2F800000, 0f2F000000;")
ONE_MINUS_HALF = tl.constexpr("fma.rn.f32 $0, $1, 0fBF000000, 0f3F800000;")
# v = -2 log u, of log_u ($1), t ($2), m ($3) and e ($4): sums are scaled by -2 before they are rounded and not after,
# and e * 355 / 256 is exact. Then the root of v, right for any approximation of 1 / sqrt(v) within 4 units in the last
# place: s and h, of sqrt(v) and 1 / (2 sqrt(v)), are refined once, and s is corrected by what v - s * s leaves, which
# fma gives exactly. u = 1 has v = 0 and the root -0, as -2 log_u = -0 has. What ptxas makes of sqrt.rn has a branch for
# subnormals, and so a call and registers for it.
RADIUS = tl.constexpr("""{
.reg .f32 %v, %y, %s, %h, %n, %d;
.reg .pred %zero;
fma.rn.f32 %v, $1, 0fC0000000, $2;
fma.rn.f32 %v, $3, 0fC0000000, %v;
fma.rn.f32 %v, $4, 0fBFB18000, %v;
rsqrt.approx.ftz.f32 %y, %v;
mul.rn.f32 %s, %v, %y;
mul.rn.f32 %h, %y, 0f3F000000;
neg.f32 %n, %s;
fma.rn.f32 %d, %n, %h, 0f3F000000;
fma.rn.f32 %s, %s, %d, %s;
fma.rn.f32 %h, %h, %d, %h;
neg.f32 %n, %s;
fma.rn.f32 %d, %n, %s, %v;
fma.rn.f32 %s, %d, %h, %s;
setp.eq.f32 %zero, %v, 0f00000000;
selp.f32 $0, 0f80000000, %s, %zero;
}""")


@triton.jit
def philox_4x32(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 on uint32 tensors (Salmon et al. 2011).

    One wide multiply gives both halves of a product; tl.philox spends a second multiply on the high one.
    """
    if not INTERPRETED and tl.target_info.is_cuda():
        c0, c1, c2, c3 = tl.inline_asm_elementwise(
            PHILOX,
            "=&r,=&r,=&r,=&r,r,r,r,r,r,r",
            [c0, c1, c2, c3, k0, k1],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )
    else:
        for _ in tl.static_range(10):
            p0 = c0.to(tl.uint64) * 0xD2511F53
            p1 = c2.to(tl.uint64) * 0xCD9E8D57
            c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
            c1 = p1.to(tl.uint32)
            c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
            c3 = p0.to(tl.uint32)
            k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
            k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def words(block, tensor_id, k0, k1, STREAM: tl.constexpr):
    """The four words of Philox blocks `block` (int64) of one parameter, under the key (k0, k1)."""
    low = block.to(tl.uint32)
    tag = tl.zeros_like(low) + tensor_id
    return philox_4x32(low, (block >> 32).to(tl.uint32), tag, tl.full(low.shape, STREAM, tl.uint32), k0, k1)


@triton.jit
def _uniform(x):
    if not INTERPRETED and tl.target_info.is_cuda():
        u = tl.inline_asm_elementwise(UNIFORM, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        u = x * 2.3283064365386963e-10 + 1.1641532182693481e-10
    return u


@triton.jit
def _one_minus_half(w):
    if not INTERPRETED and tl.target_info.is_cuda():
        c = tl.inline_asm_elementwise(ONE_MINUS_HALF, "=f,f", [w], dtype=tl.float32, is_pure=True, pack=1)
    else:
        c = 1.0 - 0.5 * w
    return c


@triton.jit
def _radius(log_u, t, m, e):
    """sqrt(-2 log u), where log u is the sum (m + (log_u - t / 2)) + e * 0.693359375."""
    if not INTERPRETED and tl.target_info.is_cuda():
        r = tl.inline_asm_elementwise(RADIUS, "=f,f,f,f,f", [log_u, t, m, e], dtype=tl.float32, is_pure=True, pack=1)
    else:
        log_u = log_u - 0.5 * t
        log_u = (m + log_u) + e * 0.693359375
        r = tl.sqrt_rn(-2.0 * log_u)
    return r


@triton.jit
def box_muller(x, y):
    """Two standard normals, float32, from two 32-bit words (Box and Muller 1958; Cephes polynomials)."""
    # u in (0, 1]
    u = _uniform(x.to(tl.float32))
    # log u = log(m + 1) + e log 2
    b = u.to(tl.int32, bitcast=True)
    e = (b - 0x3F3504F3) >> 23
    m = (b - (e << 23)).to(tl.float32, bitcast=True) - 1.0
    p = m * 7.0376836292e-2 + -1.1514610310e-1
    p = p * m + 1.1676998740e-1
    p = p * m + -1.2420140846e-1
    p = p * m + 1.4249322787e-1
    p = p * m + -1.6668057665e-1
    p = p * m + 2.0000714765e-1
    p = p * m + -2.4999993993e-1
    p = p * m + 3.3333331174e-1
    t = m * m
    e = e.to(tl.float32)
    log_u = (p * m) * t
    log_u = log_u + e * -2.12194440e-4
    # log_u - t / 2 + m + e * 0.693359375
    r = _radius(log_u, t, m, e)
    # angle = pi/2 q + f, with q = y >> 30; no tl.sin or tl.cos, whose bits differ between libraries
    f = (y << 2).to(tl.int32, bitcast=True).to(tl.float32) * 3.657295198167899e-10
    w = f * f
    s = ((-1.9515295891e-4 * w + 8.3321608736e-3) * w + -1.6666654611e-1) * (w * f) + f
    c = ((2.443315711809948e-5 * w + -1.388731625493765e-3) * w + 4.166664568298827e-2) * (w * w) + _one_minus_half(w)
    odd = (y & 0x40000000) != 0
    cosine = tl.where(odd, s, c).to(tl.uint32, bitcast=True)
    sine = tl.where(odd, c, s).to(tl.uint32, bitcast=True)
    # the cosine is negative in quadrants 1 and 2, the sine in 2 and 3: bits 31 ^ 30 and 31 of y, moved to the sign
    cosine = (cosine ^ ((y ^ (y << 1)) & 0x80000000)).to(tl.float32, bitcast=True)
    sine = (sine ^ (y & 0x80000000)).to(tl.float32, bitcast=True)
    return r * cosine, r * sine


@triton.jit
def normal_quad(quad, tensor_id, k0, k1):
    """z ~ N(0, 1) of elements 4 quad .. 4 quad + 3, one tensor an element."""
    w0, w1, w2, w3 = words(quad, tensor_id, k0, k1, NORMAL)
    z0, z1 = box_muller(w0, w1)
    z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def _sign(bits, j: tl.constexpr):
    """1 - 2 * (bit j): the bit moved to the sign of 1.0."""
    return (((bits << (31 - j)) & 0x80000000) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def rademacher_quad(quad, tensor_id, k0, k1):
    """z of elements 4 quad .. 4 quad + 3, each -1 where its bit of the 128-bit block is set, else +1."""
    w0, w1, w2, w3 = words(quad >> 5, tensor_id, k0, k1, RADEMACHER)
    at = quad.to(tl.uint32)
    word = tl.where((at & 16) != 0, tl.where((at & 8) != 0, w3, w2), tl.where((at & 8) != 0, w1, w0))
    bits = word >> ((at & 7) * 4)
    return _sign(bits, 0), _sign(bits, 1), _sign(bits, 2), _sign(bits, 3)


@triton.jit
def _quad(quad, tensor_id, k0, k1, STREAM: tl.constexpr):
    if STREAM == NORMAL:
        z0, z1, z2, z3 = normal_quad(quad, tensor_id, k0, k1)
    else:
        z0, z1, z2, z3 = rademacher_quad(quad, tensor_id, k0, k1)
    # join interleaves: ((0, 2), (1, 3)) lists 0, 1, 2, 3
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [quad.shape[0], 4])


@triton.jit
def key(half):
    """One half of a seed, an int32 kernel argument, as uint32."""
    return half.to(tl.uint32, bitcast=True)


@triton.jit
def draw(quad, tensor_id, k0, k1, STREAM: tl.constexpr, WIDTH: tl.constexpr):
    """z of the units that start at element 4 quad[i] and are WIDTH (4 or 8) elements long: float32 [units, WIDTH]."""
    z = _quad(quad, tensor_id, k0, k1, STREAM)
    if WIDTH == 8:
        # two adjacent Philox blocks a lane, so that its 16-bit elements make 128 bits
        z = concat(z, _quad(quad + 1, tensor_id, k0, k1, STREAM))
    return z


@triton.jit
def concat(left, right):
    """[n, 4] and [n, 4] side by side: [n, 8]. A lane that holds row i of both holds row i of the result."""
    return tl.reshape(tl.permute(tl.join(left, right), (0, 2, 1)), [left.shape[0], 8])


@triton.jit
def halves(both):
    """[n, 8] as two [n, 4], the inverse of `concat`."""
    return tl.split(tl.permute(tl.reshape(both, [both.shape[0], 2, 4]), (0, 2, 1)))
