"""The sums and the update of an ablation in PyTorch, chunk by chunk, on any device."""

import math
from collections.abc import Callable, Container, Sequence

import torch
from torch import Tensor

__all__ = ["HIGH", "LOW", "TorchForm", "in_range"]

LOW, HIGH = 1e-30, 1e30
"""Squared norms between which float32 sums of squares neither underflow nor overflow."""

SEGMENT = 8192
"""Columns that one float32 reduction along a row covers; the segments of a row are added in float64."""


GROUP_ROWS = 64
"""Rows that one float32 reduction down a column covers at most."""

ALIGNED = 16
"""Elements in a cache line; what a product reads starts on one, wherever its block starts."""


class TorchForm:
    """Chunk arithmetic in one precision, over scratch memory that is allocated once.

    Blocks are ``[matrices, rows, cols]`` in the storage dtype and start at a chunk.

    Args:
        precision: float32 or float64.
        chunk_rows: Rows that are loaded at once; a multiple of 64, or fewer than that.
        cols: Columns of the stored matrices.
        device: Where to compute; blocks are brought here chunk by chunk.
        state: Where float64 sums are kept.
    """

    def __init__(
        self, precision: torch.dtype, chunk_rows: int, cols: int, device: torch.device, state: torch.device
    ) -> None:
        self.precision = precision
        self._device = device
        self._state = state
        self._chunk_rows = chunk_rows
        self._cols = cols
        self._group_rows = min(chunk_rows, GROUP_ROWS)
        self._scratch: Tensor | None = None

    def rows(self, block: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor:
        """Reduce along each row.

        Args:
            block: ``[matrices, rows, cols]``.
            weights: ``[1 or matrices, k, cols]`` in this form's precision.
            squares: Whether the squared norms of the rows are wanted.

        Returns:
            ``[matrices, k (+ 1), rows]`` float64: products with the weights, then the squares.
        """
        count = 0 if weights is None else weights.shape[1]
        batch, rows, cols = block.shape
        segments = [slice(low, low + SEGMENT) for low in range(0, cols, SEGMENT)]
        sums = self._empty(batch, len(segments), count + squares, rows)
        for entry, matrix in enumerate(block):
            lines = () if weights is None else weights[min(entry, len(weights) - 1)]
            parts = torch.split(sums[entry], self._chunk_rows, dim=-1)
            for chunk, part in zip(torch.split(matrix, self._chunk_rows), parts, strict=True):
                tile = self._load(chunk)
                for segment, outs in zip(segments, part, strict=True):
                    for line, out in zip(lines, outs, strict=False):
                        torch.mv(tile[:, segment], line[segment], out=out)
                    if squares:
                        torch.linalg.vector_norm(tile[:, segment], dim=1, out=outs[count])
        double = sums.to(self._state).double()
        if squares:
            double[:, :, count].square_()
        return double.sum(dim=1) if len(segments) > 1 else double[:, 0]

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
        """Reduce along each column of each chunk, and add the chunks in order.

        Args:
            block: ``[matrices, rows, cols]``.
            weights: ``[1 or matrices, k, rows]`` in this form's precision.
            into: ``[matrices, k (+ 1), cols]`` float64, what to add to, laid out as :meth:`rows` does.
            squares: Whether the squared norms of the columns are wanted.
            unsafe: Matrix and chunk where this precision fails; None to judge by the squares.
            repair: Returns the sums of such a chunk, ``[k (+ 1), cols]`` float64.
        """
        size, group = self._chunk_rows, self._group_rows
        count = 0 if weights is None else weights.shape[1]
        sums = self._empty(count + squares, size // group, 1, self._cols)
        ones = torch.ones(size // group, 1, group, dtype=self.precision, device=self._device)
        for entry, (matrix, total) in enumerate(zip(block, into, strict=True)):
            chunks = torch.split(matrix, size)
            lines = None if weights is None else weights[min(entry, len(weights) - 1)]
            factors = self._factors_by_chunk(lines, len(chunks), len(matrix))
            for chunk, (part, factor) in enumerate(zip(chunks, factors, strict=True)):
                if chunk == 0 or chunk == len(chunks) - 1:
                    groups = math.ceil(len(part) / group)
                    outs = sums[:, :groups]
                    each = outs.unbind()
                tile = self._load(part, groups * group)
                grouped = tile.view(groups, group, self._cols)
                # One thin product per direction is faster than one product for all of them.
                for line, out in zip(factor, each, strict=False):
                    torch.bmm(line[:groups], grouped, out=out)
                if squares:
                    torch.mul(tile, tile, out=tile)
                    torch.bmm(ones[:groups], grouped, out=each[count])
                failed = not in_range(each[count]) if unsafe is None else (entry, chunk) in unsafe
                if failed:
                    total += repair(entry, chunk)
                elif groups == 1:
                    total += outs.view(total.shape).to(self._state)
                else:
                    total += outs.to(self._state).sum(dim=(1, 2), dtype=torch.float64)

    def update(
        self,
        block: Tensor,
        source: Tensor,
        scale: Tensor | None,
        row_factor: Tensor,
        column_factor: Tensor,
    ) -> None:
        """Write ``scale * source - sum_k row_factor[k] ⊗ column_factor[k]``, rounded once.

        Args:
            block: Where to write, ``[matrices, rows, cols]``.
            source: What to read, of the same shape; may be the block.
            scale: ``[matrices, rows, 1]`` or ``[matrices, 1, cols]``, or None for 1.
            row_factor: ``[1 or matrices, k, rows]``.
            column_factor: ``[1 or matrices, k, cols]``.
        """
        size, limit = self._chunk_rows, torch.finfo(block.dtype).max
        for entry, (target, matrix) in enumerate(zip(block, source, strict=True)):
            columns = column_factor[min(entry, len(column_factor) - 1)].unbind()
            rows = torch.split(row_factor[min(entry, len(row_factor) - 1), :, :, None], size, dim=1)
            sources, targets = torch.split(matrix, size), torch.split(target, size)
            scales: Sequence[Tensor | None] = [None] * len(sources)
            if scale is not None:
                by_column = scale.shape[1] == 1 and len(matrix) != 1
                scales = [scale[entry]] * len(sources) if by_column else torch.split(scale[entry], size)
            for given, wanted, factor, row in zip(sources, targets, scales, rows, strict=True):
                tile = self._load(given)
                if factor is not None:
                    tile.mul_(factor)
                for k, column in enumerate(columns):
                    tile.addcmul_(row[k], column, value=-1)
                if self.precision == torch.float64:
                    tile.clamp_(-limit, limit)
                wanted.copy_(tile if self._device == block.device else tile.to(wanted.dtype))

    def _load(self, part: Tensor, padded_rows: int = 0) -> Tensor:
        """Bring rows to the scratch memory, and zeros below them up to ``padded_rows``."""
        if self._scratch is None:
            self._scratch = self._empty(self._chunk_rows, self._cols)
        rows = len(part)
        length = max(rows, padded_rows)
        tile = self._scratch if length == self._chunk_rows else self._scratch[:length]
        (tile if rows == length else tile[:rows]).copy_(part.to(self._device))
        if rows < length:
            tile[rows:].zero_()
        return tile

    def _factors_by_chunk(self, lines: Tensor | None, chunks: int, rows: int) -> Sequence[Tensor]:
        """Lay out ``[k, rows]`` as ``[k, groups, 1, rows of a group]`` per chunk, aligned, zeros beyond."""
        group, groups = self._group_rows, self._chunk_rows // self._group_rows
        count = 0 if lines is None else len(lines)
        length = math.ceil(group / ALIGNED) * ALIGNED
        laid = self._empty(count, chunks, groups, 1, length).zero_()
        if lines is not None:
            flat, whole = laid.view(count, chunks * groups, length), rows // group
            flat[:, :whole, :group] = lines[:, : whole * group].reshape(count, whole, group)
            if rows % group:
                flat[:, whole, : rows % group] = lines[:, whole * group :]
        return laid[..., :group].unbind(1)

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.precision, device=self._device)


def in_range(squares: Tensor) -> bool:
    """Whether float32 sums of squares can be trusted: no overflow, underflow, zero or NaN among them."""
    if squares.numel() == 0:
        return True
    least, most = torch.aminmax(squares)
    return least.item() > LOW and most.item() < HIGH
