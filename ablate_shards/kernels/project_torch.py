"""The sums and the update of an ablation in PyTorch, chunk by chunk, on any device."""

import math
from collections.abc import Callable, Container, Sequence
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["HIGH", "LOW", "TorchForm", "in_range"]

LOW, HIGH = 1e-30, 1e30
"""Squared norms between which float32 sums of squares neither underflow nor overflow."""

SEGMENT = 8192
"""Columns that one float32 reduction along a row covers; the segments of a row are added in float64."""


GROUP_ROWS = 128
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
        device: Where to compute; blocks are brought here a few chunks at a time.
        state: Where float64 sums are kept.
        chunks_at_once: Chunks that the scratch memory holds; the result does not depend on it.
    """

    def __init__(
        self,
        precision: torch.dtype,
        chunk_rows: int,
        cols: int,
        device: torch.device,
        state: torch.device,
        chunks_at_once: int = 1,
    ) -> None:
        self.precision = precision
        self.chunk_rows = chunk_rows
        self.cols = cols
        self._device = device
        self._state = state
        self._group_rows = min(chunk_rows, GROUP_ROWS)
        self._tile_rows = chunk_rows * chunks_at_once

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
            parts = torch.split(sums[entry], self.chunk_rows, dim=-1)
            for chunk, part in zip(torch.split(matrix, self.chunk_rows), parts, strict=True):
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
        count = 0 if weights is None else weights.shape[1]
        size, group = self.chunk_rows, self._group_rows
        at_once, groups = self._tile_rows // group, size // group
        for entry, (matrix, total) in enumerate(zip(block.unbind(), into.unbind(), strict=True)):
            chunks = math.ceil(len(matrix) / size)
            sums = self._empty(count + squares, chunks * groups, 1, self.cols)
            outs = [torch.split(line, at_once) for line in sums.unbind()]
            lines: list[tuple[Tensor, ...]] = []
            if weights is not None:
                laid = self._by_group(weights[min(entry, len(weights) - 1)], chunks * groups)
                lines = [torch.split(line, at_once) for line in laid.unbind()]
            for place, part in enumerate(torch.split(matrix, self._tile_rows)):
                self._load(part)
                tile = self._tile
                if len(part) < self._tile_rows:
                    tile = tile[: len(outs[0][place]) * group]
                    tile[len(part) :] = 0
                grouped = tile.view(-1, group, self.cols)
                # One thin product per direction is faster than one product for all of them.
                for line, out in zip(lines, outs, strict=False):
                    torch.bmm(line[place], grouped, out=out[place])
                if squares:
                    torch.mul(tile, tile, out=tile)
                    torch.bmm(self._ones[: len(grouped)], grouped, out=outs[count][place])
            exact = sums[:, :, 0].to(self._state).double()
            if groups > 1:
                exact = exact.view(-1, chunks, groups, self.cols).sum(dim=2)
            failed: Container[tuple[int, int]] = unsafe or ()
            if unsafe is None and not in_range(exact[count]):
                failed = {(entry, chunk) for chunk, found in enumerate(exact[count]) if not in_range(found)}
            for chunk, part in enumerate(exact.unbind(1)):
                total.add_(repair(entry, chunk) if (entry, chunk) in failed else part)

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
        size, limit = self._tile_rows, torch.finfo(block.dtype).max
        for entry, (target, matrix) in enumerate(zip(block.unbind(), source.unbind(), strict=True)):
            columns = column_factor[min(entry, len(column_factor) - 1)].unbind()
            rows = [torch.split(line[:, None], size) for line in row_factor[min(entry, len(row_factor) - 1)].unbind()]
            sources, targets = torch.split(matrix, size), torch.split(target, size)
            scales: Sequence[Tensor | None] = [None] * len(sources)
            if scale is not None:
                by_column = scale.shape[1] == 1 and len(matrix) != 1
                scales = [scale[entry]] * len(sources) if by_column else torch.split(scale[entry], size)
            for place, (given, wanted, factor) in enumerate(zip(sources, targets, scales, strict=True)):
                tile = self._load(given)
                if factor is not None:
                    tile.mul_(factor)
                for row, column in zip(rows, columns, strict=True):
                    tile.addcmul_(row[place], column, value=-1)
                if self.precision == torch.float64:
                    tile.clamp_(-limit, limit)
                wanted.copy_(tile if self._device == block.device else tile.to(wanted.dtype))

    @cached_property
    def _tile(self) -> Tensor:
        return self._empty(self._tile_rows, self.cols)

    @cached_property
    def _ones(self) -> Tensor:
        group = self._group_rows
        return torch.ones(self._tile_rows // group, 1, group, dtype=self.precision, device=self._device)

    def _load(self, part: Tensor) -> Tensor:
        """Bring rows to the scratch memory."""
        tile = self._tile if len(part) == self._tile_rows else self._tile[: len(part)]
        tile.copy_(part if part.device == self._device else part.to(self._device))
        return tile

    def _by_group(self, lines: Tensor, groups: int) -> Tensor:
        """Lay out ``[k, rows]`` as ``[k, groups, 1, rows of a group]``, aligned, with zeros beyond."""
        (count, rows), group = lines.shape, self._group_rows
        if count == 1 and rows == groups * group and lines.data_ptr() % (4 * ALIGNED) == 0:
            return lines.reshape(1, groups, 1, group)
        laid = self._empty(count, groups, 1, math.ceil(group / ALIGNED) * ALIGNED).zero_()
        whole = rows // group
        laid[:, :whole, 0, :group] = lines[:, : whole * group].reshape(count, whole, group)
        if rows % group:
            laid[:, whole, 0, : rows % group] = lines[:, whole * group :]
        return laid[..., :group]

    def _empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.precision, device=self._device)


def in_range(squares: Tensor) -> bool:
    """Whether float32 sums of squares can be trusted: no overflow, underflow, zero or NaN among them."""
    if squares.numel() == 0:
        return True
    least, most = torch.aminmax(squares)
    return least.item() > LOW and most.item() < HIGH
