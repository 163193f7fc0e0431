"""The low-rank update on a CPU, in NumPy and C: float32 where that gives the exact rounding, else float64.

Most of ``W + s·L·R`` rounds to the same bfloat16 whether it is computed in float32 or exactly. A bound on the error of
float32 shows which elements do: those whose rounding is the same at both ends of the interval that the bound leaves.
The others, a few in a thousand, are computed again in float64. So every result is the exact sum correctly rounded,
as far as float64 can tell, and neither blocks nor threads can change it. ``docs/math.md`` derives the bound. float16
and float32 leave too little room for it, and are computed in float64 throughout.
"""

import math
import threading
from typing import Any, NamedTuple

import numpy as np

from ablate_shards.kernels.codecs.plain import GREATEST, decode, decoded, encode
from ablate_shards.kernels.native.native import PIECE, add_exactly, add_rounded, greatest_bits

__all__ = ["Added", "NumpyMerger", "update_norm"]

TILE_ELEMENTS, TILE_COLS = 1 << 18, 4096
"""Smaller tiles would stay in a core's own cache, but threads would then wait for the interpreter at every step."""

STRIP_ROWS = 16
AGAIN_ELEMENTS = 1 << 16
"""Of the factors of elements that are computed again, at a time."""

PRODUCT = 1 << 18
"""Multiplications in one product at most. OpenBLAS puts larger ones on several threads, which here would wait for each
other, and in float64 could let the result depend on how many there are."""

UNIT = 2.0**-24
LEAST = 2.0**-149
MOST_AGAIN = 1 / 16
"""Share of a tile from which on all of it is computed in float64."""

LEAST_SINGLE, MOST_SINGLE = 1e-15, 1e15
"""Greatest weights between which float32 sums of squares neither underflow nor overflow."""


class Added(NamedTuple):
    """What was found while an update was added to a block.

    Attributes:
        squares: Sums of squares of what was there, of one tile after the other; not finite where a value was not.
        overflows: Whether a result lies beyond what the storage dtype can hold, or a value was not finite.
    """

    squares: list[float]
    overflows: bool


class NumpyMerger:
    """Adds one low-rank update to one matrix, in one pass over row blocks, as :class:`Merger` does.

    Several threads may add it to blocks at once.

    Args:
        left: ``[rows, r]`` float32, any strides.
        right: ``[r, cols]`` float32, any strides.
        scale: The ``s`` above.
        dtype: What the matrix is stored in: BF16, F16 or F32.
    """

    def __init__(self, left: np.ndarray, right: np.ndarray, scale: float, dtype: str) -> None:
        self._left = np.multiply(left, scale, dtype=np.float64, order="C")
        self._dtype = dtype
        self._rank, cols = right.shape
        self._width = max(1, min(cols, TILE_COLS))
        self._tile_rows: int = max(1, TILE_ELEMENTS // self._width // STRIP_ROWS) * STRIP_ROWS
        most = max(16, PRODUCT // STRIP_ROWS // max(1, self._rank) // 16 * 16)
        self._panel = math.ceil(self._width / math.ceil(self._width / most) / 16) * 16
        self._columns = [_Columns(right[:, first : first + self._width], self._panel) for first in self._firsts(cols)]
        self._scratch = _Scratch()

    @property
    def chunk_rows(self) -> int:
        """Blocks start at a multiple of this, and all but the last are a multiple of it long."""
        return self._tile_rows

    def apply(self, block: np.ndarray, start: int) -> Added:
        """Adds the update to rows in place.

        Args:
            block: ``[rows, cols]`` as stored, bfloat16 as its bits.
            start: The first of its rows.
        """
        tiles = []
        with np.errstate(all="ignore"):
            for low in range(0, len(block), self._tile_rows):
                strip = block[low : low + self._tile_rows]
                left = self._left[start + low : start + low + len(strip)]
                for first, columns in zip(self._firsts(block.shape[1]), self._columns, strict=True):
                    tiles.append(self._add(strip[:, first : first + self._width], left, columns))
        return Added([squares for squares, _ in tiles], any(overflows for _, overflows in tiles))

    def _firsts(self, cols: int) -> range:
        """Returns the first columns of tiles."""
        return range(0, cols, self._width)

    def _add(self, part: np.ndarray, left: np.ndarray, columns: "_Columns") -> tuple[float, bool]:
        """Adds the update to one tile; returns the sum of squares of what was there, and whether a result overflows."""
        weight = _greatest(part)
        if not math.isfinite(weight):
            return math.inf, True
        # Neither an element of the product nor the sum of the sizes of its terms is greater (Cauchy and Schwarz).
        norms = np.sqrt(np.vecdot(left, left))
        product = float(norms.max()) * columns.greatest
        reach = weight + product
        if self._dtype != "BF16" or not LEAST_SINGLE < weight < MOST_SINGLE or not reach < GREATEST["BF16"] / 2:
            return self._add_exactly(part, left, columns)
        margin = _Margin(
            rows=_up(UNIT * (1.01 * (self._rank + 1) + 2.02) * norms),
            columns=columns.norms,
            slope=float(_up(UNIT * 2.02)),
            least=float(_up((self._rank + 4) * LEAST * (1 + reach))),
        )
        result = self._room(part.shape, "result", np.uint16)
        again, squares = self._add_single(part, self._product(left, columns, np.float32), margin, weight, result)
        if len(again) > MOST_AGAIN * part.size:
            return self._add_exactly(part, left, columns)
        self._again(part, left, columns, again, result)
        np.copyto(part, result)
        return squares, False

    def _add_single(
        self, part: np.ndarray, added: np.ndarray, margin: "_Margin", weight: float, out: np.ndarray
    ) -> tuple[np.ndarray, float]:
        """Rounds what float32 makes of a tile.

        Args:
            part: The tile, whose greatest magnitude is ``weight``.
            added: The product, in float32; is overwritten.
            margin: How far their sum may be off.
            weight: As above.
            out: Where it goes.

        Returns:
            Where the rounding is not sure, or enough of that to tell that it is too much; and the sum of squares of
            what was there.
        """
        unsure = self._room((int(MOST_AGAIN * part.size) + 1 + PIECE,), "unsure", np.int64)
        if found := add_rounded(part, added, margin.rows, margin.columns, margin.slope, margin.least, out, unsure):
            count, squares = found
            return unsure[:count], squares
        old, most = self._room(part.shape, "old", np.float32), self._room(part.shape, "most", np.uint16)
        decode(part, old)
        squares = float(np.vecdot(old, old).sum(dtype=np.float64))
        greatest = np.float32(float(margin.rows.max()) * float(margin.columns.max()) + margin.slope * weight)
        greatest += np.float32(margin.least)
        np.add(old, added, out=added)
        np.subtract(added, greatest, out=old)
        np.add(added, greatest, out=added)
        _round(old, out)
        _round(added, most)
        return np.flatnonzero(out != most), squares

    def _again(
        self, part: np.ndarray, left: np.ndarray, columns: "_Columns", places: np.ndarray, out: np.ndarray
    ) -> None:
        """Rounds what float64 makes of some elements of a tile."""
        if add_exactly(part, left, columns.right, places, out):
            return
        piece = max(1, AGAIN_ELEMENTS // max(1, self._rank))
        for low in range(0, len(places), piece):
            row, column = np.divmod(places[low : low + piece], part.shape[1])
            exact = decoded(part[row, column], np.float64)
            exact += np.vecdot(left[row], columns.right[column])
            rounded = np.empty(len(exact), np.uint16)
            encode(exact, rounded)
            out[row, column] = rounded

    def _add_exactly(self, part: np.ndarray, left: np.ndarray, columns: "_Columns") -> tuple[float, bool]:
        """Adds the update to one tile in float64; returns what :meth:`_add` does."""
        old, total = self._room(part.shape, "old", np.float64), self._product(left, columns, np.float64)
        decode(part, old)
        squares = float(np.vecdot(old, old).sum())
        np.add(old, total, out=total)
        overflows = max(float(total.max()), -float(total.min())) > GREATEST[self._dtype]
        encode(total, part)
        return squares, overflows

    def _product(self, left: np.ndarray, columns: "_Columns", precision: type[np.floating]) -> np.ndarray:
        """Returns the product of the factors of one tile, in scratch memory, strip by strip and panel by panel."""
        strips, panels = math.ceil(len(left) / STRIP_ROWS), columns.panels(precision)
        rows = np.zeros((strips * STRIP_ROWS, self._rank), precision)
        rows[: len(left)] = left
        whole = self._room((len(rows), len(panels) * self._panel), "product", precision)
        tiles = whole.reshape(strips, STRIP_ROWS, len(panels), self._panel).swapaxes(1, 2)
        np.matmul(rows.reshape(strips, 1, STRIP_ROWS, self._rank), panels, out=tiles)
        return whole[: len(left), : len(columns.right)]

    def _room(self, shape: tuple[int, ...], name: str, dtype: Any) -> np.ndarray:
        """Returns scratch memory of this thread, which is kept from tile to tile."""
        size, kept = math.prod(shape), self._scratch.kept
        key = name, np.dtype(dtype)
        if key not in kept or len(kept[key]) < size:
            kept[key] = np.empty(size, dtype)
        return kept[key][:size].reshape(shape)


class _Scratch(threading.local):
    """Memory of each thread, by what it is for and in which type."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, np.dtype[Any]], np.ndarray] = {}


class _Margin(NamedTuple):
    """How far the float32 sum of an element ``w`` may be off: ``rows * columns + slope |w| + least``.

    Attributes:
        rows: ``[rows]`` float32.
        columns: ``[cols]`` float32.
        slope: As above.
        least: As above.
    """

    rows: np.ndarray
    columns: np.ndarray
    slope: float
    least: float


class _Columns:
    """The right factor of the columns of a tile.

    Args:
        right: ``[r, width]``, any strides.
        panel: Columns of one product.

    Attributes:
        right: ``[width, r]`` float64.
        norms: Norm of every column, ``[width]`` float32, rounded up.
        greatest: The greatest of them.
    """

    def __init__(self, right: np.ndarray, panel: int) -> None:
        self.right = np.array(right.T, np.float64, order="C")
        self.norms = _up(np.sqrt(np.vecdot(self.right, self.right)))
        self.greatest = float(self.norms.max())
        self._panel = panel
        self._panels: dict[type[np.floating], np.ndarray] = {}

    def panels(self, precision: type[np.floating]) -> np.ndarray:
        """Returns the factor as ``[panels, r, columns]``, the last one filled up with zeros."""
        if precision not in self._panels:
            width, rank = self.right.shape
            count = math.ceil(width / self._panel)
            filled = np.zeros((count * self._panel, rank), precision)
            filled[:width] = self.right
            self._panels[precision] = np.ascontiguousarray(filled.reshape(count, self._panel, rank).swapaxes(1, 2))
        return self._panels[precision]


def update_norm(left: np.ndarray, right: np.ndarray) -> float:
    """Returns the Frobenius norm of ``left @ right`` without forming it: ``|LR|² = tr(LᵀL RRᵀ)``.

    Args:
        left: ``[rows, r]``.
        right: ``[r, cols]``.
    """
    return math.sqrt(max(0.0, float((_gram(left) * _gram(right.T)).sum())))


def _gram(factor: np.ndarray) -> np.ndarray:
    """Returns ``FᵀF`` of ``[rows, r]`` in float64, in products that no thread count can change."""
    rank = factor.shape[1]
    step = max(STRIP_ROWS, PRODUCT // max(1, rank * rank))
    total = np.zeros((rank, rank))
    for low in range(0, len(factor), step):
        part = factor[low : low + step].astype(np.float64)
        total += part.T @ part
    return total


def _up(values: np.ndarray | float) -> np.ndarray:
    """Returns float32 that is not less."""
    return np.nextafter(np.asarray(values, np.float32), np.float32(np.inf))


def _greatest(stored: np.ndarray) -> float:
    """Returns the greatest magnitude, infinite where a value is not finite."""
    if stored.dtype == np.float32:
        greatest = float(np.abs(stored).max())
    else:
        # Magnitudes are in the order of the bits below the sign.
        most = np.array([greatest_bits(stored)], np.uint16)
        greatest = float(decoded(most.view(stored.dtype), np.float64)[0])
    return greatest if math.isfinite(greatest) else math.inf


def _round(values: np.ndarray, out: np.ndarray) -> None:
    """Rounds float32, which is overwritten, to the nearest bfloat16, a tie away from zero."""
    bits = values.view(np.uint32)
    np.add(bits, 0x8000, out=bits)
    np.right_shift(bits, 16, out=bits)
    np.copyto(out, bits, casting="unsafe")
