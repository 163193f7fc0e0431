"""The sums and the update of an ablation as Triton kernels, over whole blocks of a batch of matrices.

Every program adds in a fixed order and owns what it writes, so there are no atomics, and no sum depends on chance.
The sizes of the reductions are constants; only the update is autotuned, whose sizes cannot change a bit. Triton
launches on the current device, hence each launch makes that of its block the current one. Each says that a product may
be fused with a sum, because what Triton does otherwise depends on its version.
"""

# Triton types its kernels itself, from the arguments of a launch.
# ruff: noqa: ANN001, SIM102
# mypy: disable-error-code="no-untyped-call, no-untyped-def, untyped-decorator"

from collections.abc import Callable, Container

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.cuda import device_of
from triton import knobs

from ablate_shards.kernels.ablate.project_torch import TorchArrays
from ablate_shards.kernels.ablate.stepwise import Stepwise
from ablate_shards.kernels.form import HIGH, LOW, Arithmetic, in_range

__all__ = ["TritonArrays", "TritonForm"]

INTERPRETED = bool(knobs.runtime.interpret)

# An interpreted program costs milliseconds whatever its size: there, take few and large ones.
ROWS_BLOCK_M, ROWS_BLOCK_N = (32, 256) if INTERPRETED else (4, 512)
COLUMNS_BLOCK_M, COLUMNS_BLOCK_N = (32, 256) if INTERPRETED else (8, 256)
COMBINE_BLOCK = 1024
UPDATE_CONFIGS = (
    [triton.Config({"BLOCK_M": 64, "BLOCK_N": 256})]
    if INTERPRETED
    else [
        triton.Config({"BLOCK_M": rows, "BLOCK_N": cols}, num_warps=warps)
        for rows, cols, warps in ((4, 512, 4), (8, 512, 8), (2, 1024, 4), (16, 256, 8))
    ]
)


@triton.jit
def row_sums_kernel(
    x_ptr,
    weights_ptr,
    out_ptr,
    rows,
    cols,
    x_stride_b,
    x_stride_m,
    x_stride_n,
    weights_stride_b,
    row_blocks,
    K: tl.constexpr,
    LINES: tl.constexpr,
    SQUARES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """out[b, k, i] = sum_j x[b, i, j] * weights[b, k, j], and out[b, K, i] = sum_j x[b, i, j]²."""
    pid = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    b = pid // row_blocks
    o_m = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < rows
    x_rows = x_ptr + b * x_stride_b + o_m[:, None] * x_stride_m
    b_dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_square = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, cols, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < cols
        b_x = tl.load(x_rows + o_n[None, :] * x_stride_n, mask=m_m[:, None] & m_n[None, :], other=0.0)
        b_x = b_x.to(tl.float32)
        if K > 0:
            b_w = tl.load(weights_ptr + b * weights_stride_b + k * cols + o_n, mask=m_n, other=0.0)
            b_dot += b_x * b_w[None, :]
        if SQUARES:
            b_square += b_x * b_x
    out_rows = out_ptr + b * LINES * rows + o_m
    if K > 0:
        tl.store(out_rows + k * rows, tl.sum(b_dot, axis=1), mask=m_m)
    if SQUARES:
        # One program per direction reads the same rows; the first of them stores the squares.
        if k == 0:
            tl.store(out_rows + K * rows, tl.sum(b_square, axis=1), mask=m_m)


@triton.jit
def column_sums_kernel(
    x_ptr,
    weights_ptr,
    out_ptr,
    rows,
    cols,
    x_stride_b,
    x_stride_m,
    x_stride_n,
    weights_stride_b,
    weights_stride_k,
    chunks,
    col_blocks,
    K: tl.constexpr,
    LINES: tl.constexpr,
    SQUARES: tl.constexpr,
    CHUNK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """out[b, c, k, j] = sum over rows i of chunk c of weights[b, k, i] * x[b, i, j]; squares as line K."""
    pid = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64)
    o_n = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < cols
    chunk = (pid // col_blocks) % chunks
    b = pid // (col_blocks * chunks)
    b_dot = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    b_square = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, CHUNK_ROWS, BLOCK_M):
        o_in_chunk = start + tl.arange(0, BLOCK_M)
        o_m = chunk * CHUNK_ROWS + o_in_chunk
        m_m = (o_in_chunk < CHUNK_ROWS) & (o_m < rows)
        x_tile = x_ptr + b * x_stride_b + o_m[:, None] * x_stride_m + o_n[None, :] * x_stride_n
        b_x = tl.load(x_tile, mask=m_m[:, None] & m_n[None, :], other=0.0).to(tl.float32)
        if K > 0:
            w_rows = weights_ptr + b * weights_stride_b + k * weights_stride_k + o_m
            b_dot += b_x * tl.load(w_rows, mask=m_m, other=0.0)[:, None]
        if SQUARES:
            b_square += b_x * b_x
    out_cols = out_ptr + (b * chunks + chunk) * LINES * cols + o_n
    if K > 0:
        tl.store(out_cols + k * cols, tl.sum(b_dot, axis=0), mask=m_n)
    if SQUARES:
        if k == 0:
            tl.store(out_cols + K * cols, tl.sum(b_square, axis=0), mask=m_n)


@triton.jit
def combine_kernel(partial_ptr, into_ptr, chunks, length, into_stride_b, blocks, BLOCK: tl.constexpr) -> None:
    """into[b, l] += partial[b, 0, l] + partial[b, 1, l] + ..., in float64 and in this order."""
    pid = tl.program_id(0).to(tl.int64)
    b = pid // blocks
    o_l = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    m_l = o_l < length
    into = into_ptr + b * into_stride_b + o_l
    b_sum = tl.load(into, mask=m_l, other=0.0)
    for chunk in range(chunks):
        b_part = tl.load(partial_ptr + (b * chunks + chunk) * length + o_l, mask=m_l, other=0.0)
        b_sum += b_part.to(tl.float64)
    tl.store(into, b_sum, mask=m_l)


@triton.autotune(configs=UPDATE_CONFIGS, key=["cols", "K", "SCALE"], restore_value=["out_ptr"], cache_results=True)
@triton.jit
def update_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    row_ptr,
    col_ptr,
    rows,
    cols,
    x_stride_b,
    x_stride_m,
    x_stride_n,
    out_stride_b,
    out_stride_m,
    out_stride_n,
    scale_stride_b,
    row_stride_b,
    row_stride_k,
    col_stride_b,
    K: tl.constexpr,
    SCALE: tl.constexpr,
    ROUND_BF16: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """out[b, i, j] = s * x[b, i, j] - sum_k row[b, k, i] * col[b, k, j]; scaled by row, column or not."""
    pid = tl.program_id(0).to(tl.int64)
    col_blocks = tl.cdiv(cols, BLOCK_N)
    row_blocks = tl.cdiv(rows, BLOCK_M)
    o_n = (pid % col_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = ((pid // col_blocks) % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = pid // (col_blocks * row_blocks)
    m_m = o_m < rows
    m_n = o_n < cols
    m_tile = m_m[:, None] & m_n[None, :]
    x_tile = x_ptr + b * x_stride_b + o_m[:, None] * x_stride_m + o_n[None, :] * x_stride_n
    b_x = tl.load(x_tile, mask=m_tile, other=0.0).to(tl.float32)
    if SCALE == "rows":
        b_x *= tl.load(scale_ptr + b * scale_stride_b + o_m, mask=m_m, other=0.0)[:, None]
    if SCALE == "columns":
        b_x *= tl.load(scale_ptr + b * scale_stride_b + o_n, mask=m_n, other=0.0)[None, :]
    for k in tl.static_range(K):
        b_row = tl.load(row_ptr + b * row_stride_b + k * row_stride_k + o_m, mask=m_m, other=0.0)
        b_col = tl.load(col_ptr + b * col_stride_b + k * cols + o_n, mask=m_n, other=0.0)
        b_x -= b_row[:, None] * b_col[None, :]
    if ROUND_BF16:
        # The interpreter truncates to bfloat16 where hardware rounds to nearest even.
        b_bits = b_x.to(tl.uint32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        b_x = (b_bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    out_tile = out_ptr + b * out_stride_b + o_m[:, None] * out_stride_m + o_n[None, :] * out_stride_n
    tl.store(out_tile, b_x.to(out_ptr.dtype.element_ty), mask=m_tile)


class TritonForm(Stepwise):
    """The same sums and update as :class:`TorchForm` in float32, for many matrices and chunks at a time."""

    is_double = False

    def __init__(self, chunk_rows: int, state: torch.device) -> None:
        self._chunk_rows = chunk_rows
        self._state = state

    def rows(self, block: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor:
        """Reduce along each row: ``[matrices, k (+ 1), rows]`` float64, summed in float32."""
        batch, rows, cols = block.shape
        weights, count, stride = _dense(weights, block)
        lines = count + squares
        out = torch.empty(batch, lines, rows, dtype=torch.float32, device=block.device)
        blocks = triton.cdiv(rows, ROWS_BLOCK_M)
        with device_of(block):
            row_sums_kernel[(batch * blocks, max(1, count))](
                block, weights, out, rows, cols, *block.stride(), stride, blocks,
                K=count, LINES=lines, SQUARES=squares, BLOCK_M=ROWS_BLOCK_M, BLOCK_N=ROWS_BLOCK_N,
                enable_fp_fusion=True,
            )  # fmt: skip
        return out.to(self._state).double()

    def add_columns(
        self,
        block: Tensor,
        weights: Tensor | None,
        into: Tensor,
        *,
        squares: bool,
        unsafe: Container[tuple[int, int]] | None,
        repair: Callable[[int, int], Tensor],
    ) -> None:
        """Reduce along each column of each chunk in float32, and add the chunks in order in float64."""
        batch, rows, cols = block.shape
        weights, count, stride = _dense(weights, block)
        lines, chunks = count + squares, triton.cdiv(rows, self._chunk_rows)
        partial = torch.empty(batch, chunks, lines, cols, dtype=torch.float32, device=block.device)
        blocks = triton.cdiv(cols, COLUMNS_BLOCK_N)
        with device_of(block):
            column_sums_kernel[(batch * chunks * blocks, max(1, count))](
                block, weights, partial, rows, cols, *block.stride(), stride, weights.stride(-2), chunks, blocks,
                K=count, LINES=lines, SQUARES=squares, CHUNK_ROWS=self._chunk_rows,
                BLOCK_M=COLUMNS_BLOCK_M, BLOCK_N=COLUMNS_BLOCK_N, enable_fp_fusion=True,
            )  # fmt: skip
        if unsafe is None:
            sums = partial[:, :, -1]
            failed = [] if in_range(sums) else (~((sums > LOW) & (sums < HIGH))).any(dim=2).nonzero().tolist()
            unsafe = {(entry, chunk) for entry, chunk in failed}
        if not unsafe and into.device == block.device:
            length = lines * cols
            blocks = triton.cdiv(length, COMBINE_BLOCK)
            with device_of(block):
                combine_kernel[(batch * blocks,)](
                    partial, into, chunks, length, into.stride(0), blocks, BLOCK=COMBINE_BLOCK, enable_fp_fusion=True
                )
            return
        for entry in range(batch):
            for chunk in range(chunks):
                bad = (entry, chunk) in unsafe
                into[entry].add_(repair(entry, chunk) if bad else partial[entry, chunk].to(self._state))

    def update(
        self,
        block: Tensor,
        source: Tensor,
        scale: Tensor | None,
        row_factor: Tensor,
        column_factor: Tensor,
    ) -> None:
        """Write ``scale * source - sum_k row_factor[k] ⊗ column_factor[k]`` into the block, rounded once."""
        batch, rows, cols = block.shape
        row_factor, count, row_stride = _dense(row_factor, block)
        column_factor, _, column_stride = _dense(column_factor, block)
        kind = "none" if scale is None else "rows" if scale.shape[1:] == (rows, 1) else "columns"
        scale = row_factor if scale is None else scale.contiguous()

        def grid(meta: dict[str, int]) -> tuple[int]:
            return (batch * triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(cols, meta["BLOCK_N"]),)

        with device_of(block):
            update_kernel[grid](
                source, block, scale, row_factor, column_factor, rows, cols, *source.stride(), *block.stride(),
                scale.stride(0) if len(scale) > 1 else 0,
                row_stride, row_factor.stride(-2), column_stride,
                K=count, SCALE=kind, ROUND_BF16=INTERPRETED and block.dtype == torch.bfloat16, enable_fp_fusion=True,
            )  # fmt: skip


def _dense(weights: Tensor | None, block: Tensor) -> tuple[Tensor, int, int]:
    """Return the weights with a dense last dimension, how many lines there are, and their batch stride."""
    if weights is None:
        return block, 0, 0
    weights = weights.contiguous()
    return weights, weights.shape[1], weights.stride(0) if len(weights) > 1 else 0


class TritonArrays(TorchArrays):
    """Blocks and sums in torch tensors, with the arithmetic in float32 done by the kernels above."""

    def forms(self, chunk_rows: int, cols: int) -> tuple[Arithmetic, Arithmetic]:
        """Return the arithmetic in float32 and in float64."""
        return TritonForm(chunk_rows, self.state_device), super().forms(chunk_rows, cols)[1]
