"""Adds a low-rank update to stored matrices, block of rows by block of rows: ``W' = W + s·L·R``.

``W`` is ``[rows, cols]`` as stored, ``L`` is ``[rows, r]`` and ``R`` is ``[r, cols]``. For LoRA on a Linear layer
``L = B`` and ``R = A``; where a layer stores its weight the other way about, ``L = Aᵀ`` and ``R = Bᵀ``.

Everything between the stored value and the stored result is float64: the rank is small, so that this costs
little, and no cancellation between ``W`` and the update can then reach the rounding to the storage dtype. The
tiles of the torch form follow from the shape alone and the Triton form adds in the order of the rank, hence the
result does not depend on block sizes or threads. On a CPU, ``merge_numpy`` does the same without torch.
"""

import math
from typing import Literal

import torch
from torch import Tensor

from ablate_shards.errors import PlanError
from ablate_shards.kernels import reference
from ablate_shards.kernels.choose import Form, choose_form
from ablate_shards.kernels.merge.merge_numpy import Added

__all__ = ["Merger", "merge", "update_norm"]

TILE_ROWS, TILE_COLS = 128, 2048
"""Of the torch form: 2 MiB of float64 scratch."""

_BLOCK_ELEMENTS = 1 << 22
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class Merger:
    """Adds one low-rank update to one matrix, in one pass over row blocks.

    Args:
        left: ``[rows, r]``, any float dtype and strides.
        right: ``[r, cols]``, on the same device.
        scale: The ``s`` above.
        dtype: What the matrix is stored in: bfloat16, float16 or float32.
        form: ``torch`` or ``triton``.

    Raises:
        PlanError: The factors do not fit each other, or the dtype is not one of the three.
    """

    def __init__(self, left: Tensor, right: Tensor, scale: float, dtype: torch.dtype, *, form: Form) -> None:
        if dtype not in _DTYPES:
            raise PlanError(f"dtype: expected bfloat16, float16 or float32, found {dtype}")
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise PlanError(
                f"low-rank update: expected [rows, r] and [r, cols], found {list(left.shape)} and {list(right.shape)}"
            )
        self._left, self._scale = left, scale
        self._right = right.to(torch.float64).contiguous()
        self._form = form
        self._limit = torch.finfo(dtype).max
        self._scratch: Tensor | None = None

    @property
    def chunk_rows(self) -> int:
        """Blocks start at a multiple of this, and all but the last are a multiple of it long."""
        return TILE_ROWS

    def apply(self, block: Tensor, start: int) -> Added:
        """Adds the update to rows in place.

        Args:
            block: ``[rows, cols]`` in the storage dtype, on the device of the factors.
            start: The first of its rows.
        """
        if block.numel() == 0:
            return Added([], overflows=False)
        rows, cols = block.shape
        if self._form == "triton":
            # Triton is imported only where it runs.
            from ablate_shards.kernels.merge.merge_triton import add_product

            squares, largest = add_product(block, self._rows_of_left(start, rows), self._right)
            return self._found([squares], [largest])
        if self._scratch is None:
            count = min(TILE_ROWS, self._left.shape[0]) * min(TILE_COLS, cols)
            self._scratch = torch.empty(count, dtype=torch.float64, device=block.device)
        before, after = [], []
        for low in range(0, rows, TILE_ROWS):
            strip = block[low : low + TILE_ROWS]
            left = self._rows_of_left(start + low, len(strip))
            for first in range(0, cols, TILE_COLS):
                part = strip[:, first : first + TILE_COLS]
                flat = self._scratch[: part.numel()]
                tile = flat.view(part.shape)
                tile.copy_(part)
                before.append(torch.dot(flat, flat))
                tile.addmm_(left, self._right[:, first : first + TILE_COLS])
                least, most = torch.aminmax(tile)
                after.append(torch.maximum(-least, most))
                part.copy_(tile)
        return self._found(before, after)

    def _rows_of_left(self, start: int, count: int) -> Tensor:
        return self._left[start : start + count].double().mul(self._scale).contiguous()

    def _found(self, squares: list[Tensor], largest: list[Tensor]) -> Added:
        """Returns what tiles gave, fetched from their device at once."""
        before, after = torch.stack([torch.stack(squares), torch.stack(largest)]).tolist()
        return Added(before, any(not most <= self._limit for most in after))


def merge(
    weight: Tensor,
    left: Tensor,
    right: Tensor,
    scale: float = 1.0,
    *,
    form: Form | Literal["auto"] = "auto",
    block_rows: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Adds a low-rank update to a weight that is in memory: ``weight + scale * left @ right``, rounded once.

    Args:
        weight: ``[rows, cols]``, bfloat16, float16 or float32, any strides; left as it is.
        left: ``[rows, r]``, any float dtype.
        right: ``[r, cols]``.
        scale: What the product is multiplied by.
        form: Which implementation; ``auto`` takes the one that suits the device.
        block_rows: Rows that one step covers, rounded up to whole tiles; the result does not depend on it.
        out: Where to write, of the same shape and dtype; may be ``weight`` itself.

    Returns:
        The new weight; what lies beyond the largest finite value of its dtype is infinite.

    Raises:
        PlanError: The shapes do not fit, or the dtype is not one of the three.
    """
    if weight.ndim != 2 or weight.shape != (left.shape[0], right.shape[-1]):
        raise PlanError(
            f"low-rank update: expected {list(left.shape[:1])} and {list(right.shape[-1:])} to be the shape of "
            f"the weight, found {list(weight.shape)}"
        )
    chosen, _ = choose_form(weight.device, form=form)
    out = torch.empty_like(weight) if out is None else out
    if chosen == "reference":
        return out.copy_(reference.round_to(reference.merge(weight, left, right, scale), weight.dtype))
    merger = Merger(left, right, scale, weight.dtype, form=chosen)
    result = weight.clone(memory_format=torch.contiguous_format)
    wanted = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1])) if block_rows is None else block_rows
    step = -(-wanted // merger.chunk_rows) * merger.chunk_rows
    for start in range(0, len(result), step):
        merger.apply(result[start : start + step], start)
    return out.copy_(result)


def update_norm(left: Tensor, right: Tensor) -> float:
    """Returns the Frobenius norm of ``left @ right`` without forming it: ``|LR|² = tr(LᵀL RRᵀ)``.

    Args:
        left: ``[rows, r]``.
        right: ``[r, cols]``.
    """
    left, right = left.double(), right.double()
    return math.sqrt(max(0.0, float(((left.mT @ left) * (right @ right.mT)).sum())))
