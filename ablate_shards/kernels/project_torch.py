"""The sums and the update of an ablation in PyTorch, one chunk of one matrix at a time, on any device."""

import torch
from torch import Tensor

__all__ = ["TorchForm"]

SEGMENT = 8192
"""Columns that one reduction along a row covers; the segments of a row are added in float64."""


class TorchForm:
    """Chunk arithmetic in one precision, over scratch memory that is allocated once.

    Every method takes tensors with a leading batch dimension of one. A tile is the chunk in the precision of
    this form, and lives in the scratch memory until the next :meth:`load`.
    """

    whole_blocks = False

    def __init__(self, chunk_rows: int, cols: int, precision: torch.dtype, device: torch.device) -> None:
        self.precision = precision
        self.device = device
        self._chunk_rows = chunk_rows
        self._cols = cols
        self._scratch: Tensor | None = None
        self._ones = torch.ones(1, chunk_rows, dtype=precision, device=device)

    def load(self, block: Tensor) -> Tensor:
        """Convert a chunk ``[1, rows, cols]`` into a tile."""
        if self._scratch is None:
            self._scratch = torch.empty(self._chunk_rows, self._cols, dtype=self.precision, device=self.device)
        tile = self._scratch[: block.shape[1]]
        tile.copy_(block[0].to(self.device))
        return tile

    def rows(self, tile: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor:
        """Reduce along each row: ``[1, k (+ 1), rows]`` float64, products with the weights, then squares.

        Args:
            tile: From :meth:`load`.
            weights: ``[1, k, cols]`` in this form's precision.
            squares: Whether the last line holds the squared norms.
        """
        rows, cols = tile.shape
        count = 0 if weights is None else weights.shape[1]
        total: Tensor | None = None
        for start in range(0, cols, SEGMENT):
            part = tile[:, start : start + SEGMENT]
            sums = torch.empty(count + squares, rows, dtype=self.precision, device=self.device)
            for k in range(count):
                torch.mv(part, weights[0, k, start : start + SEGMENT], out=sums[k])  # type: ignore[index]
            if squares:
                torch.linalg.vector_norm(part, dim=1, out=sums[count])
                sums[count].square_()
            total = self._double(sums) if total is None else total.add_(self._double(sums))
        if total is None:
            total = torch.zeros(count + squares, rows, dtype=torch.float64)
        return total[None]

    def columns(self, tile: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor:
        """Reduce along each column: ``[1, 1, k (+ 1), cols]``, laid out as :meth:`rows` does.

        Args:
            tile: From :meth:`load`; squares use it up.
            weights: ``[1, k, rows]`` in this form's precision.
            squares: Whether the last line holds the squared norms.
        """
        rows, cols = tile.shape
        count = 0 if weights is None else weights.shape[1]
        sums = torch.empty(count + squares, cols, dtype=self.precision, device=self.device)
        for k in range(count):
            # One product per direction: a thin matrix product is slower than its rows one by one.
            torch.mm(weights[0, k : k + 1], tile, out=sums[k : k + 1])  # type: ignore[index]
        if squares:
            torch.mul(tile, tile, out=tile)
            torch.mm(self._ones[:, :rows], tile, out=sums[count:])
        return sums[None, None]

    def accumulate(self, partial: Tensor, into: Tensor) -> None:
        """Add what :meth:`columns` returned to ``into``, ``[1, k (+ 1), cols]`` float64, chunk after chunk."""
        for chunk in range(partial.shape[1]):
            into.add_(partial[:, chunk].to(into.device))

    def update(
        self, tile: Tensor, block: Tensor, scale: Tensor | None, row_factor: Tensor, column_factor: Tensor
    ) -> None:
        """Write ``scale * tile - sum_k row_factor[k] ⊗ column_factor[k]`` into the chunk, rounded once.

        Args:
            tile: From :meth:`load`; used up.
            block: The chunk ``[1, rows, cols]`` in the storage dtype.
            scale: ``[1, rows, 1]`` or ``[1, 1, cols]``, or None for 1.
            row_factor: ``[1, k, rows]``.
            column_factor: ``[1, k, cols]``.
        """
        if scale is not None:
            tile.mul_(scale[0])
        for k in range(row_factor.shape[1]):
            tile.addcmul_(row_factor[0, k, :, None], column_factor[0, k], value=-1)
        if self.precision == torch.float64:
            limit = torch.finfo(block.dtype).max
            tile.clamp_(-limit, limit)
        block[0].copy_(tile if self.device == block.device else tile.to(block.dtype))

    def _double(self, sums: Tensor) -> Tensor:
        # MPS has no float64.
        return (sums.cpu() if sums.device.type == "mps" else sums).double()
