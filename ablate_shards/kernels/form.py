"""What a form of the ablation's arithmetic must do, and what all of them agree on."""

from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any, Protocol, TypeAlias

import numpy as np

__all__ = ["GROUP_ROWS", "HIGH", "LOW", "Arithmetic", "Array", "Arrays", "extremes", "in_range"]

Array: TypeAlias = Any
"""A NumPy array or a torch tensor. What is written once for both keeps to what both understand alike."""

LOW, HIGH = 1e-30, 1e30
"""Squared norms between which float32 sums of squares neither underflow nor overflow."""

GROUP_ROWS = 128
"""Rows that one float32 reduction down a column covers at most."""


class Arithmetic(Protocol):
    """The sums and the update in one precision; blocks are ``[matrices, rows, cols]`` and start at a chunk."""

    @property
    def is_double(self) -> bool:
        """Whether the precision is float64 rather than float32."""

    def rows(self, block: Array, weights: Array | None, *, squares: bool) -> Array:
        """Reduce along each row.

        Args:
            block: ``[matrices, rows, cols]``, as stored.
            weights: ``[1 or matrices, k, cols]`` in this form's precision.
            squares: Whether the squared norms of the rows are wanted.

        Returns:
            ``[matrices, k (+ 1), rows]`` float64: products with the weights, then the squares.
        """

    def add_columns(
        self,
        block: Array,
        weights: Array | None,
        into: Array,
        *,
        squares: bool,
        unsafe: Container[tuple[int, int]] | None,
        repair: Callable[[int, int], Array],
    ) -> None:
        """Reduce along each column of each chunk, and add the chunks in order.

        Args:
            block: ``[matrices, rows, cols]``, as stored.
            weights: ``[1 or matrices, k, rows]`` in this form's precision.
            into: ``[matrices, k (+ 1), cols]`` float64, what to add to, laid out as :meth:`rows` does.
            squares: Whether the squared norms of the columns are wanted.
            unsafe: Matrix and chunk where this precision fails; None to judge by the squares.
            repair: Returns the sums of such a chunk, ``[k (+ 1), cols]`` float64.
        """

    def update(self, block: Array, source: Array, scale: Array | None, row_factor: Array, column_factor: Array) -> None:
        """Write ``scale * source - sum_k row_factor[k] ⊗ column_factor[k]``, rounded to what is stored.

        Args:
            block: Where to write, ``[matrices, rows, cols]``.
            source: What to read, of the same shape; may be the block.
            scale: ``[matrices, rows, 1]`` or ``[matrices, 1, cols]``, or None for 1.
            row_factor: ``[1 or matrices, k, rows]``.
            column_factor: ``[1 or matrices, k, cols]``.
        """


class Arrays(Protocol):
    """Where blocks and sums live: in NumPy arrays, or in torch tensors of a device.

    Attributes:
        xp: ``numpy`` or ``torch``.
        chunk_elements: Elements that a chunk has at most, unless one row has more.
    """

    xp: ModuleType
    chunk_elements: int

    def forms(self, chunk_rows: int, cols: int) -> tuple[Arithmetic, Arithmetic]:
        """Return the arithmetic for matrices cut into chunks: in float32, and in float64."""

    def zeros(self, *shape: int) -> Array:
        """Return float64 zeros for sums."""

    def state(self, values: np.ndarray) -> Array:
        """Bring float64 values to where the sums are."""

    def single(self, values: Array) -> Array:
        """Bring sums in float32 to where the blocks are."""

    def host(self, values: Array) -> np.ndarray:
        """Bring sums to NumPy."""

    def clone(self, block: Array) -> Array:
        """Return a contiguous copy."""

    def keep(self, block: Array, original: Array, still: Array) -> None:
        """Put back what must not change by a bit, such as the sign of a zero; the mask is broadcast."""

    def buffer(self, count: int) -> np.ndarray:
        """Return new memory ``[count]`` uint8 for bytes on their way from and to a file."""

    def load(self, raw: np.ndarray, dtype: str, shape: tuple[int, int, int]) -> Array:
        """Return a block made of stored bytes ``[count]`` uint8; a view of them where it can be one."""

    def store(self, block: Array, raw: np.ndarray) -> None:
        """Put the bytes of a block where they were loaded from."""

    def quiet(self) -> AbstractContextManager[object]:
        """Turn off warnings of values that become NaN or infinite: they are looked for afterwards."""


def extremes(values: Array) -> tuple[float, float]:
    """Return the least and the greatest value; both are NaN if any is."""
    if isinstance(values, np.ndarray):
        return float(values.min()), float(values.max())
    least, most = values.aminmax()
    return least.item(), most.item()


def in_range(squares: Array) -> bool:
    """Whether float32 sums of squares can be trusted: no overflow, underflow, zero or NaN among them."""
    if 0 in squares.shape:
        return True
    least, most = extremes(squares)
    return least > LOW and most < HIGH
