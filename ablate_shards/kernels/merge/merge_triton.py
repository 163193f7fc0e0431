"""The low-rank update as a Triton kernel, in float64: one read and one write of the stored matrix.

Every program owns a tile and adds in the order of the rank, so that no block size changes a bit of the result.
"""

# Triton types its kernels itself, from the arguments of a launch.
# ruff: noqa: ANN001
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of
from triton import knobs

__all__ = ["add_product"]

INTERPRETED = bool(knobs.runtime.interpret)

# An interpreted program costs milliseconds whatever its size: there, take few and large ones.
BLOCK_M, BLOCK_N = (64, 256) if INTERPRETED else (16, 128)


@triton.jit
def add_product_kernel(
    x_ptr,
    left_ptr,
    right_ptr,
    squares_ptr,
    largest_ptr,
    rows,
    cols,
    rank,
    x_stride_m,
    x_stride_n,
    ROUND_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """x[i, j] += sum_k left[i, k] * right[k, j]; and of each tile, the sum of x² before and the largest |x| after."""
    pid = tl.program_id(0).to(tl.int64)
    col_blocks = tl.cdiv(cols, BLOCK_N)
    o_m = (pid // col_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = o_m < rows
    m_n = o_n < cols
    m_tile = m_m[:, None] & m_n[None, :]
    x_tile = x_ptr + o_m[:, None] * x_stride_m + o_n[None, :] * x_stride_n
    b_x = tl.load(x_tile, mask=m_tile, other=0.0).to(tl.float64)
    tl.store(squares_ptr + pid, tl.sum(b_x * b_x))
    left_column = left_ptr + o_m * rank
    right_row = right_ptr + o_n
    for _ in range(rank):
        b_left = tl.load(left_column, mask=m_m, other=0.0)
        b_right = tl.load(right_row, mask=m_n, other=0.0)
        b_x += b_left[:, None] * b_right[None, :]
        left_column += 1
        right_row += cols
    b_size = tl.abs(b_x)
    # A maximum may pass over a NaN; one that is infinite does not.
    tl.store(largest_ptr + pid, tl.max(tl.where(b_size == b_size, b_size, float("inf"))))
    b_single = b_x.to(tl.float32)
    if ROUND_BF16:
        # The interpreter truncates to bfloat16 where hardware rounds to nearest even.
        b_bits = b_single.to(tl.uint32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        b_single = (b_bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(x_tile, b_single.to(x_ptr.dtype.element_ty), mask=m_tile)


def add_product(block: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Adds a product of two thin matrices to a block in place.

    Args:
        block: ``[rows, cols]``, bfloat16, float16 or float32, any strides.
        left: ``[rows, r]`` float64, contiguous.
        right: ``[r, cols]`` float64, contiguous.

    Returns:
        The sum of the squares before and the largest magnitude after, both float64 scalars on the device.
    """
    rows, cols = block.shape
    tiles = triton.cdiv(rows, BLOCK_M) * triton.cdiv(cols, BLOCK_N)
    squares, largest = torch.empty(2, tiles, dtype=torch.float64, device=block.device)
    # Triton launches on the current device.
    with device_of(block):
        add_product_kernel[(tiles,)](
            block, left, right, squares, largest, rows, cols, left.shape[1], *block.stride(),
            ROUND_BF16=INTERPRETED and block.dtype == torch.bfloat16, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N,
            enable_fp_fusion=True,
        )  # fmt: skip
    return squares.sum(), largest.max()
