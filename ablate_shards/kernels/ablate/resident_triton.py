"""An ablation of matrices in place, as Triton kernels that read and write device memory as little as possible.

A program holds a tile of a matrix in registers, publishes what the tile adds to the sums of its rows or columns, waits
until all tiles that share them have done so, and updates the tile it still holds. So columns are read and written once.
Rows need ``Q`` of the whole matrix before the first of them can change, so they are read twice:

    columns   columns_kernel
    rows      mix_kernel (norms, and Q by groups of rows), mixed_kernel (Q), probe_kernel (what float32 cannot carry),
              turn_kernel (Q of each row, then the update)

Programs that wait take numbered tickets in the order in which they start. So the programs that they wait for are
running or done, and no wait can lock up as long as the programs of one sum fit on the device together. Where that is
not known, a kernel is launched twice, for its sums and for its update. Sums are float32, added up in an order that
depends on the shape.

Elements are handled in pairs, as the int32 that two of them make, so that a tile takes half as many registers. Values
of columns come in two halves, first those of the even columns, then those of the odd ones.
"""

# Triton types its kernels itself, from the arguments of a launch.
# ruff: noqa: ANN001, ANN202, RUF005, SIM108, SIM300
# mypy: disable-error-code="assignment, no-untyped-def, no-untyped-call, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ablate_shards.kernels.ablate.options import AMPLIFICATION, ProjectOptions
from ablate_shards.kernels.codecs.plain import GREATEST
from ablate_shards.kernels.form import HIGH

__all__ = ["Resident", "fits"]

INTERPRETED = bool(knobs.runtime.interpret)

# Elements of the tiles count pairs along the columns. Sizes measured on an H200 (benchmarks/results), and constants,
# because they decide in which order sums are added: chosen by the clock they would change bits from run to run.
# An interpreted program costs milliseconds whatever its size: there, take few and large ones.
COLUMNS_TILE, COLUMNS_STEP = ((256, 512), 256) if INTERPRETED else ((256, 32), 32)
ROWS_WIDTH = 1024
#: Rows of a tile where a row is one tile, and where it is several.
ROWS_ALONE, ROWS_SHARED = 2, 8
#: Rows whose share of Q one program adds up.
CHUNK = 64
WARPS = 4
#: The most registers that a thread of columns_kernel takes on a device of NVIDIA's.
COLUMNS_REGISTERS = 128
MIXED_WIDTH, PROBE_TILE = 128, (64, 64)


@triton.jit
def take_ticket(count_ptr, STAGE: tl.constexpr, ALONE: tl.constexpr):
    """The number of this program's work."""
    if STAGE == "both" and not ALONE:
        return tl.atomic_add(count_ptr, 1, sem="relaxed")
    return tl.program_id(0)


@triton.jit
def arrive(count_ptr):
    """Signal that this program has stored its part."""
    tl.debug_barrier()
    tl.atomic_add(count_ptr, 1, sem="release")


@triton.jit
def wait(count_ptr, wanted):
    """Wait until a number of programs have arrived."""
    while tl.atomic_add(count_ptr, 0, sem="acquire") < wanted:
        pass
    tl.debug_barrier()


@triton.jit
def pairs_of(table_ptr, number):
    """The start of a matrix, which is aligned to 16 bytes."""
    return tl.multiple_of(tl.load(table_ptr + number).to(tl.pointer_type(tl.int32)), 16)


@triton.jit
def unpack(b_x, DTYPE: tl.constexpr):
    """The even and the odd elements of pairs, in float32."""
    if DTYPE == tl.bfloat16:
        return (b_x << 16).to(tl.float32, bitcast=True), (b_x & -65536).to(tl.float32, bitcast=True)
    b_even = (b_x & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    b_odd = ((b_x >> 16) & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return b_even.to(tl.float32), b_odd.to(tl.float32)


@triton.jit
def rounded_bits(b_x, DTYPE: tl.constexpr):
    """The bits of a float32 rounded to what is stored, as uint32."""
    if DTYPE == tl.bfloat16:
        # The interpreter truncates to bfloat16 where hardware rounds to nearest even.
        b_bits = b_x.to(tl.uint32, bitcast=True)
        return (b_bits + (0x7FFF + ((b_bits >> 16) & 1))) >> 16
    return b_x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.uint32)


@triton.jit
def pack(b_even, b_odd, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """The pairs of even and odd elements, each rounded once, to nearest."""
    if PTX:
        form: tl.constexpr = "cvt.rn.bf16x2.f32" if DTYPE == tl.bfloat16 else "cvt.rn.f16x2.f32"
        asm: tl.constexpr = form + " $0, $1, $2;"
        return tl.inline_asm_elementwise(asm, "=r,f,f", [b_odd, b_even], dtype=tl.int32, is_pure=True, pack=1)
    b_pairs = (rounded_bits(b_odd, DTYPE) << 16) | rounded_bits(b_even, DTYPE)
    return b_pairs.to(tl.int32, bitcast=True)


@triton.jit
def held(b_x, PTX: tl.constexpr):
    """The same pairs as values that are new to the compiler, so that after a wait it unpacks them again."""
    if PTX:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [b_x], dtype=tl.int32, is_pure=False, pack=1)
    return b_x


@triton.jit
def total(part_ptr, parts, stride, o_n, m_n, PARTS: tl.constexpr):
    """out[j] = part[0, j] + part[1, j] + ..., which other programs have stored."""
    o_p = tl.arange(0, PARTS)
    b_sum = tl.zeros(o_n.shape, dtype=tl.float32)
    for first in range(0, parts, PARTS):
        mask = (first + o_p < parts)[:, None] & m_n[None, :]
        part = part_ptr + (first + o_p)[:, None] * stride + o_n[None, :]
        b_sum += tl.sum(tl.load(part, mask=mask, other=0.0, cache_modifier=".cg"), axis=0)
    return b_sum


@triton.jit
def add_4(a, b, c, d, e, f, g, h):
    """Add four pairs of numbers."""
    return a + e, b + f, c + g, d + h


@triton.jit
def column_factors(b_dot, b_square, alpha, decline, largest, amplification, RESCALE: tl.constexpr):
    """Whether float32 carries a column, its scale, and what the direction is multiplied by."""
    b_share = b_dot * b_dot / tl.where(b_square > 0, b_square, 1.0)
    b_ratio = 1.0 - decline * b_share
    b_moved = 1.0 + tl.abs(alpha) * tl.sqrt(b_share)
    fine = (b_square > 1e-30) & (b_square < largest) & (b_ratio >= 1e-6)
    fine = fine & (b_moved * b_moved <= amplification * amplification * b_ratio)
    if RESCALE:
        b_scale = 1.0 / tl.sqrt(tl.maximum(b_ratio, 1e-6))
    else:
        b_scale = tl.full(b_ratio.shape, 1.0, tl.float32)
    return fine, b_scale, alpha * b_dot * b_scale


@triton.jit
def columns_kernel(
    table_ptr,
    basis_ptr,
    part_ptr,
    count_ptr,
    odd_ptr,
    rows,
    half,
    row_tiles,
    col_tiles,
    alpha,
    decline,
    largest,
    amplification,
    STAGE: tl.constexpr,
    ALONE: tl.constexpr,
    EVEN: tl.constexpr,
    RESCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """w_j <- s_j (w_j - a r (r w_j)); a part holds what a tile adds to r w_j and |w_j|²; odd[b, j] if left alone."""
    pid = take_ticket(count_ptr, STAGE, ALONE)
    t_m = pid % row_tiles
    t_n = (pid // row_tiles) % col_tiles
    b = pid // (row_tiles * col_tiles)
    o_k = tl.arange(0, BLOCK_N)
    o_n = t_n * BLOCK_N + o_k
    m_n = (o_n < half) | EVEN
    x_columns = pairs_of(table_ptr, b) + o_n[None, :]
    o_s = tl.arange(0, STEP)
    tile = ()
    for i in tl.static_range(0, BLOCK_M // STEP):
        o_m = t_m * BLOCK_M + i * STEP + o_s
        mask = ((o_m < rows) | EVEN)[:, None] & m_n[None, :]
        tile = tile + (tl.load(x_columns + (o_m * half)[:, None], mask=mask, other=0),)
    # Without it the compiler loads, waits and adds piece by piece.
    tl.debug_barrier()
    parts = part_ptr + (b * col_tiles + t_n).to(tl.int64) * row_tiles * 4 * BLOCK_N
    if STAGE != "update":
        b_dot_e = tl.zeros((STEP, BLOCK_N), dtype=tl.float32)
        b_dot_o = tl.zeros((STEP, BLOCK_N), dtype=tl.float32)
        b_square_e = tl.zeros((STEP, BLOCK_N), dtype=tl.float32)
        b_square_o = tl.zeros((STEP, BLOCK_N), dtype=tl.float32)
        for i in tl.static_range(0, BLOCK_M // STEP):
            o_m = t_m * BLOCK_M + i * STEP + o_s
            b_r = tl.load(basis_ptr + o_m, mask=(o_m < rows) | EVEN, other=0.0)
            b_e, b_o = unpack(tile[i], DTYPE)
            b_dot_e += b_e * b_r[:, None]
            b_dot_o += b_o * b_r[:, None]
            b_square_e += b_e * b_e
            b_square_o += b_o * b_o
        if PTX:
            dot_e, dot_o, square_e, square_o = tl.reduce((b_dot_e, b_dot_o, b_square_e, b_square_o), 0, add_4)
        else:
            dot_e, dot_o = tl.sum(b_dot_e, axis=0), tl.sum(b_dot_o, axis=0)
            square_e, square_o = tl.sum(b_square_e, axis=0), tl.sum(b_square_o, axis=0)
        if not ALONE:
            own = parts + t_m * 4 * BLOCK_N + o_k
            tl.store(own, dot_e)
            tl.store(own + BLOCK_N, dot_o)
            tl.store(own + 2 * BLOCK_N, square_e)
            tl.store(own + 3 * BLOCK_N, square_o)
    if STAGE == "both" and not ALONE:
        count = count_ptr + 1 + b * col_tiles + t_n
        arrive(count)
        wait(count, row_tiles)
    if STAGE != "sums":
        if not ALONE:
            o_all = tl.arange(0, 4 * BLOCK_N)
            b_all = total(parts, row_tiles, 4 * BLOCK_N, o_all, o_all >= 0, PARTS)
            b_even, b_odd = tl.split(tl.permute(tl.reshape(b_all, (2, 2, BLOCK_N)), (2, 0, 1)))
            dot_e, square_e = tl.split(b_even)
            dot_o, square_o = tl.split(b_odd)
        fine_e, scale_e, factor_e = column_factors(dot_e, square_e, alpha, decline, largest, amplification, RESCALE)
        fine_o, scale_o, factor_o = column_factors(dot_o, square_o, alpha, decline, largest, amplification, RESCALE)
        if t_m == 0:
            odd = odd_ptr + b.to(tl.int64) * 2 * half + o_n
            tl.store(odd, 1 - fine_e.to(tl.int8), mask=m_n)
            tl.store(odd + half, 1 - fine_o.to(tl.int8), mask=m_n)
        b_keep = tl.where(fine_e & (dot_e != 0.0), 0, 0xFFFF) | tl.where(fine_o & (dot_o != 0.0), 0, -65536)
        for i in tl.static_range(0, BLOCK_M // STEP):
            o_u = t_m * BLOCK_M + i * STEP + o_s
            b_u = tl.load(basis_ptr + o_u, mask=(o_u < rows) | EVEN, other=0.0)
            b_old = held(tile[i], PTX)
            b_new_e, b_new_o = unpack(b_old, DTYPE)
            b_new_e = b_new_e * scale_e[None, :] - b_u[:, None] * factor_e[None, :]
            b_new_o = b_new_o * scale_o[None, :] - b_u[:, None] * factor_o[None, :]
            b_new = (pack(b_new_e, b_new_o, DTYPE, PTX) & ~b_keep[None, :]) | (b_old & b_keep[None, :])
            m_tile = ((o_u < rows) | EVEN)[:, None] & m_n[None, :]
            tl.store(x_columns + (o_u * half)[:, None], b_new, mask=m_tile)


@triton.jit
def mix_kernel(
    table_ptr,
    basis_ptr,
    part_ptr,
    square_ptr,
    mixed_ptr,
    count_ptr,
    rows,
    half,
    row_tiles,
    col_tiles,
    STAGE: tl.constexpr,
    ALONE: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """square[b, i] = |w_i|², and mixed[b, t, j] = sum over the rows i of chunk t of r_i w_ij / |w_i|."""
    pid = take_ticket(count_ptr, STAGE, ALONE)
    t_n = pid % col_tiles
    t_m = (pid // col_tiles) % row_tiles
    b = (pid // (row_tiles * col_tiles)).to(tl.int64)
    o_n = t_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = (o_n < half) | EVEN
    x_columns = pairs_of(table_ptr, b) + o_n[None, :]
    parts = part_ptr + b * col_tiles * rows
    b_mixed_e = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_mixed_o = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, CHUNK, BLOCK_M):
        o_m = t_m * CHUNK + first + tl.arange(0, BLOCK_M)
        m_m = (o_m < rows) | EVEN
        b_x = tl.load(x_columns + (o_m * half)[:, None], mask=m_m[:, None] & m_n[None, :], other=0)
        tl.debug_barrier()
        b_square = tl.zeros((BLOCK_M,), dtype=tl.float32)
        if STAGE != "update":
            b_e, b_o = unpack(b_x, DTYPE)
            b_square = tl.sum(b_e * b_e + b_o * b_o, axis=1)
            if not ALONE:
                tl.store(parts + t_n * rows + o_m, b_square, mask=m_m)
        if STAGE == "both" and not ALONE:
            count = count_ptr + 1 + (b * row_tiles + t_m) * (CHUNK // BLOCK_M) + first // BLOCK_M
            arrive(count)
            wait(count, col_tiles)
        if STAGE != "sums":
            if not ALONE:
                b_square = total(parts, col_tiles, rows, o_m, m_m, PARTS)
            if t_n == 0:
                tl.store(square_ptr + b * rows + o_m, b_square, mask=m_m)
            b_r = tl.load(basis_ptr + o_m, mask=m_m, other=0.0)
            b_unit = b_r / tl.sqrt(tl.where(b_square > 0, b_square, 1.0))
            b_mix_e, b_mix_o = unpack(held(b_x, PTX), DTYPE)
            b_mixed_e += tl.sum(b_mix_e * b_unit[:, None], axis=0)
            b_mixed_o += tl.sum(b_mix_o * b_unit[:, None], axis=0)
    if STAGE != "sums":
        mixed = mixed_ptr + (b * row_tiles + t_m) * 2 * half + o_n
        tl.store(mixed, b_mixed_e, mask=m_n)
        tl.store(mixed + half, b_mixed_o, mask=m_n)


@triton.jit
def mixed_kernel(
    mixed_ptr, q_ptr, norm_ptr, cols, row_tiles, col_tiles, PARTS: tl.constexpr, BLOCK_N: tl.constexpr
) -> None:
    """q[b, j] = sum over chunks t of mixed[b, t, j], and norm[b, t'] = |q|² of the columns of a program."""
    pid = tl.program_id(0)
    b = (pid // col_tiles).to(tl.int64)
    o_n = (pid % col_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < cols
    b_q = total(mixed_ptr + b * row_tiles * cols, row_tiles, cols, o_n, m_n, PARTS)
    tl.store(q_ptr + b * cols + o_n, b_q, mask=m_n)
    tl.store(norm_ptr + pid, tl.sum(b_q * b_q, axis=0))


@triton.jit
def norm_of(norm_ptr, b, tiles, TILES: tl.constexpr):
    """|q|² of a matrix."""
    norm = 0.0
    for first in range(0, tiles, TILES):
        o_t = first + tl.arange(0, TILES)
        norm += tl.sum(tl.load(norm_ptr + b * tiles + o_t, mask=o_t < tiles, other=0.0), axis=0)
    return norm


@triton.jit
def probe_kernel(
    table_ptr,
    basis_ptr,
    square_ptr,
    q_ptr,
    norm_ptr,
    odd_ptr,
    rows,
    half,
    row_tiles,
    norm_tiles,
    alpha,
    largest,
    amplification,
    DTYPE: tl.constexpr,
    NORM_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """odd[b, t] = whether tile t has a row that needs more than float32; rows are read only if no bound decides."""
    pid = tl.program_id(0)
    b = (pid // row_tiles).to(tl.int64)
    o_m = (pid % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    norm = norm_of(norm_ptr, b, norm_tiles, NORM_TILES)
    b_square = tl.load(square_ptr + b * rows + o_m, mask=m_m, other=1.0)
    b_r = tl.load(basis_ptr + o_m, mask=m_m, other=0.0)
    b_moved = tl.abs(alpha * b_r) * tl.sqrt(norm)
    fine = (b_square > 1e-30) & (b_square < largest) & (b_moved < 1e15)
    near = fine & (1.0 + b_moved > amplification * tl.abs(1.0 - b_moved))
    if tl.max(near.to(tl.int32), axis=0) > 0:
        x_rows = pairs_of(table_ptr, b) + (o_m * half)[:, None]
        b_dots = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for first in range(0, half, BLOCK_N):
            o_n = first + tl.arange(0, BLOCK_N)
            m_n = o_n < half
            b_e, b_o = unpack(tl.load(x_rows + o_n[None, :], mask=near[:, None] & m_n[None, :], other=0), DTYPE)
            q = q_ptr + b * 2 * half + o_n
            b_dots += b_e * tl.load(q, mask=m_n, other=0.0)[None, :]
            b_dots += b_o * tl.load(q + half, mask=m_n, other=0.0)[None, :]
        b_cross = b_r * tl.sum(b_dots, axis=1) / tl.sqrt(tl.where(b_square > 0, b_square, 1.0))
        b_ratio = 1.0 - 2.0 * alpha * b_cross + b_moved * b_moved
        b_grown = 1.0 + b_moved
        doubtful = (b_ratio < 1e-6) | (b_grown * b_grown > amplification * amplification * b_ratio)
        fine = fine & ~(near & doubtful)
    tl.store(odd_ptr + pid, 1 - tl.min(fine.to(tl.int32), axis=0))


@triton.jit
def turn_kernel(
    table_ptr,
    basis_ptr,
    part_ptr,
    square_ptr,
    q_ptr,
    norm_ptr,
    count_ptr,
    odd_ptr,
    rows,
    half,
    row_tiles,
    col_tiles,
    odd_tiles,
    norm_tiles,
    programs,
    alpha,
    STAGE: tl.constexpr,
    ALONE: tl.constexpr,
    EVEN: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    PARTS: tl.constexpr,
    ODD_TILES: tl.constexpr,
    NORM_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """w_i <- s_i (w_i - a |w_i| r_i q), unless the matrix has an odd row; from the end, which may be in the cache."""
    pid = programs - 1 - take_ticket(count_ptr, STAGE, ALONE)
    t_n = pid % col_tiles
    t_m = (pid // col_tiles) % row_tiles
    b = (pid // (row_tiles * col_tiles)).to(tl.int64)
    o_n = t_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = (o_n < half) | EVEN
    o_m = t_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = (o_m < rows) | EVEN
    x_tile = pairs_of(table_ptr, b) + (o_m * half)[:, None] + o_n[None, :]
    b_x = tl.load(x_tile, mask=m_m[:, None] & m_n[None, :], other=0, cache_modifier=".cg")
    tl.debug_barrier()
    q = q_ptr + b * 2 * half + o_n
    b_q_e = tl.load(q, mask=m_n, other=0.0)
    b_q_o = tl.load(q + half, mask=m_n, other=0.0)
    parts = part_ptr + b * col_tiles * rows
    count = count_ptr + 1 + pid // col_tiles
    b_dot = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if STAGE != "update":
        b_e, b_o = unpack(b_x, DTYPE)
        b_dot = tl.sum(b_e * b_q_e[None, :] + b_o * b_q_o[None, :], axis=1)
        if not ALONE:
            tl.store(parts + t_n * rows + o_m, b_dot, mask=m_m)
    if STAGE == "both" and not ALONE:
        arrive(count)
    if STAGE != "sums":
        odd = 0
        for first in range(0, odd_tiles, ODD_TILES):
            o_t = first + tl.arange(0, ODD_TILES)
            b_odd = tl.load(odd_ptr + b * odd_tiles + o_t, mask=o_t < odd_tiles, other=0)
            odd = tl.maximum(odd, tl.max(b_odd.to(tl.int32), axis=0))
        norm = norm_of(norm_ptr, b, norm_tiles, NORM_TILES)
        b_square = tl.load(square_ptr + b * rows + o_m, mask=m_m, other=1.0)
        b_r = tl.load(basis_ptr + o_m, mask=m_m, other=0.0)
        b_size = tl.sqrt(tl.where(b_square > 0, b_square, 1.0))
        b_along = alpha * alpha * b_r * b_r * norm
        if not ALONE:
            if STAGE == "both":
                wait(count, col_tiles)
            b_dot = total(parts, col_tiles, rows, o_m, m_m, PARTS)
        b_cross = b_r * b_dot / b_size
        b_scale = 1.0 / tl.sqrt(tl.maximum(1.0 - 2.0 * alpha * b_cross + b_along, 1e-6))
        b_factor = alpha * b_r * b_size * b_scale
        b_keep = tl.where(b_along != 0.0, 0, -1)
        if odd == 0:
            b_old = held(b_x, PTX)
            b_new_e, b_new_o = unpack(b_old, DTYPE)
            b_new_e = b_new_e * b_scale[:, None] - b_factor[:, None] * b_q_e[None, :]
            b_new_o = b_new_o * b_scale[:, None] - b_factor[:, None] * b_q_o[None, :]
            b_new = (pack(b_new_e, b_new_o, DTYPE, PTX) & ~b_keep[:, None]) | (b_old & b_keep[:, None])
            tl.store(x_tile, b_new, mask=m_m[:, None] & m_n[None, :])


def fits(weight: Tensor) -> bool:
    """Whether the kernels take a weight ``[..., rows, cols]``: 16 bits, contiguous, aligned, of whole vectors."""
    rows, cols = weight.shape[-2:]
    if INTERPRETED and weight.device.type != "cpu":
        return False
    return (
        weight.dtype in (torch.bfloat16, torch.float16)
        and weight.is_contiguous()
        and weight.numel() > 0
        and cols % 8 == 0
        and weight.data_ptr() % 16 == 0
        and rows * cols < 2**32
    )


class Resident:
    """Matrices of one shape and dtype, ablated where they lie along one direction.

    Vectors for which float32 is not accurate enough keep every bit; :meth:`odd` returns them.

    Args:
        weights: ``[..., rows, cols]`` each, residual axis first, on one device; they :func:`fits`.
        direction: ``[rows]`` float32, on the device.
        options: The coefficient, not 0, and the norms to preserve.
    """

    def __init__(self, weights: Sequence[Tensor], direction: Tensor, options: ProjectOptions) -> None:
        device, dtype = weights[0].device, weights[0].dtype
        self._rows, cols = weights[0].shape[-2:]
        self._half = cols // 2
        self.matrices = [matrix for weight in weights for matrix in weight.view(-1, self._rows, cols)]
        self._by_rows = options.preserve == "rows"
        self._options = options
        self._table = torch.tensor([matrix.data_ptr() for matrix in self.matrices], device=device)
        self._direction = direction
        on_nvidia = device.type == "cuda" and torch.version.hip is None
        self._ptx = on_nvidia and torch.cuda.get_device_capability(device) >= (8, 0)
        # A program takes one multiprocessor at most. Some launches may share the device, of which each needs its own.
        self._at_once = torch.cuda.get_device_properties(device).multi_processor_count // 4 if self._ptx else 1
        stored = "BF16" if dtype == torch.bfloat16 else "F16"
        greatest = GREATEST[stored] / (2 * (1 + abs(options.coefficient)))
        self._limits = (min(HIGH, greatest**2), AMPLIFICATION[stored])
        self._dtype = tl.bfloat16 if stored == "BF16" else tl.float16
        if self._by_rows:
            self._plan_rows(device)
        else:
            self._plan_columns(device)

    def launch(self) -> None:
        """Ablate, without waiting for the device; may be captured in a CUDA graph."""
        # Triton launches on the current device, whichever holds the tensors.
        with torch.cuda.device_of(self._table):
            if self._by_rows:
                self._launch_rows()
            else:
                self._launch_columns()

    def odd(self) -> list[tuple[Tensor, Tensor | None]]:
        """Return the matrices in which something was left as it is; with the columns, or None for a whole matrix."""
        found = self._odd != 0
        which = found.any(1).nonzero().flatten().tolist()
        if self._by_rows:
            return [(self.matrices[number], None) for number in which]
        # The even columns come first.
        return [(self.matrices[number], found[number].view(2, -1).mT.flatten().nonzero().flatten()) for number in which]

    def _plan_columns(self, device: torch.device) -> None:
        block_m, block_n = COLUMNS_TILE
        count, tiles = len(self.matrices), (triton.cdiv(self._rows, block_m), triton.cdiv(self._half, block_n))
        self._tiles = tiles
        self._parts = _floats(device, count, tiles[1], tiles[0], 4 * block_n)
        self._counts = torch.empty(1 + count * tiles[1], dtype=torch.int32, device=device)
        self._odd = torch.zeros(count, 2 * self._half, dtype=torch.int8, device=device)

    def _launch_columns(self) -> None:
        (block_m, block_n), (row_tiles, col_tiles) = COLUMNS_TILE, self._tiles
        alpha = self._options.coefficient
        for stage in self._stages(row_tiles):
            columns_kernel[(len(self.matrices) * row_tiles * col_tiles,)](
                self._table, self._direction, self._parts, self._counts, self._odd,
                self._rows, self._half, row_tiles, col_tiles, alpha, 2 * alpha - alpha**2, *self._limits,
                STAGE=stage, RESCALE=self._options.preserve == "columns",
                EVEN=self._rows % block_m == 0 and self._half % block_n == 0, STEP=COLUMNS_STEP,
                **self._common(row_tiles, block_m, block_n), **({"maxnreg": COLUMNS_REGISTERS} if self._ptx else {}),
            )  # fmt: skip

    def _plan_rows(self, device: torch.device) -> None:
        count, rows, half = len(self.matrices), self._rows, self._half
        block_n = min(ROWS_WIDTH, triton.next_power_of_2(half))
        col_tiles = triton.cdiv(half, block_n)
        block_m = (ROWS_ALONE if col_tiles == 1 else ROWS_SHARED) * (ROWS_WIDTH // block_n)
        block_m = min(block_m, CHUNK)
        self._tile, self._tiles = (block_m, block_n), (triton.cdiv(rows, block_m), col_tiles)
        self._chunks = triton.cdiv(rows, CHUNK)
        self._norm_tiles, self._odd_tiles = triton.cdiv(2 * half, MIXED_WIDTH), triton.cdiv(rows, PROBE_TILE[0])
        self._parts = _floats(device, count, col_tiles, rows)
        self._squares = _floats(device, count, rows)
        self._mixed = _floats(device, count, self._chunks, 2 * half)
        self._q = _floats(device, count, 2 * half)
        self._norms = _floats(device, count, self._norm_tiles)
        # For each of the two kernels that wait: a ticket, and the tiles that share their rows.
        groups = (count * self._chunks * (CHUNK // block_m), count * self._tiles[0])
        self._counts = torch.empty(2, 1 + max(groups), dtype=torch.int32, device=device)
        self._odd = torch.zeros(count, self._odd_tiles, dtype=torch.int8, device=device)

    def _launch_rows(self) -> None:
        count, rows, half, alpha = len(self.matrices), self._rows, self._half, self._options.coefficient
        (block_m, block_n), (row_tiles, col_tiles) = self._tile, self._tiles
        norm_tiles = {"NORM_TILES": min(256, triton.next_power_of_2(self._norm_tiles))}
        common = self._common(col_tiles, block_m, block_n)
        # What takes the norms of the rows in one launch may not take them in another before all have them.
        for stage in self._stages(col_tiles):
            mix_kernel[(count * self._chunks * col_tiles,)](
                self._table, self._direction, self._parts, self._squares, self._mixed, self._counts[0],
                rows, half, self._chunks, col_tiles,
                STAGE=stage, EVEN=rows % CHUNK == 0 and half % block_n == 0, CHUNK=CHUNK, **common,
            )  # fmt: skip
        mixed_kernel[(count * self._norm_tiles,)](
            self._mixed, self._q, self._norms, 2 * half, self._chunks, self._norm_tiles,
            PARTS=min(64, triton.next_power_of_2(self._chunks)), BLOCK_N=MIXED_WIDTH, enable_fp_fusion=True,
        )  # fmt: skip
        probe_kernel[(count * self._odd_tiles,)](
            self._table, self._direction, self._squares, self._q, self._norms, self._odd,
            rows, half, self._odd_tiles, self._norm_tiles, alpha, *self._limits,
            DTYPE=self._dtype, BLOCK_M=PROBE_TILE[0], BLOCK_N=PROBE_TILE[1], enable_fp_fusion=True, **norm_tiles,
        )  # fmt: skip
        for stage in self._stages(col_tiles, reset=False):
            turn_kernel[(count * row_tiles * col_tiles,)](
                self._table, self._direction, self._parts, self._squares, self._q, self._norms, self._counts[1],
                self._odd, rows, half, row_tiles, col_tiles, self._odd_tiles, self._norm_tiles,
                count * row_tiles * col_tiles, alpha,
                STAGE=stage, EVEN=rows % block_m == 0 and half % block_n == 0,
                ODD_TILES=min(128, triton.next_power_of_2(self._odd_tiles)), **norm_tiles, **common,
            )  # fmt: skip

    def _stages(self, tiles: int, *, reset: bool = True) -> tuple[str, ...]:
        """How to launch a kernel, by the number of programs that share a sum."""
        if tiles == 1:
            return ("both",)
        if tiles > self._at_once:
            return ("sums", "update")
        if reset:
            self._counts.zero_()
        return ("both",)

    def _common(self, tiles: int, block_m: int, block_n: int) -> dict[str, object]:
        """The constants that are the same in all kernels, by the number of tiles that share a sum."""
        parts = min(16, triton.next_power_of_2(tiles))
        return {
            "ALONE": tiles == 1,
            "DTYPE": self._dtype,
            "PTX": self._ptx,
            "PARTS": parts,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "num_warps": WARPS,
            "enable_fp_fusion": True,
        }


def _floats(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)
