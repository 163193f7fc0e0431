"""The sums and the update of an ablation in NumPy, strip by strip, on a CPU.

A run on a CPU spends less time on arithmetic than importing torch takes, and less memory than torch maps. NumPy
reads a weight once per operation, so strips are small enough for a core's second-level cache.
"""

import contextlib
import math
from collections.abc import Callable, Container, Iterator
from functools import cached_property
from types import ModuleType

import numpy as np

from ablate_shards.kernels.form import GREATEST, in_range, stored_dtype

__all__ = ["NumpyArrays", "NumpyForm", "decoded", "encode"]

STORED: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
"""NumPy has no bfloat16: its bits travel as integers."""

STRIP_ELEMENTS = 1 << 17
SEGMENT = 8192
"""Columns that one float32 product along a row covers; the segments of a row are added in float64. OpenBLAS puts
dot products on several threads from 10,000 elements on, which would let the result depend on how many there are."""

GROUP_ROWS, PANEL = 32, 256
"""Rows and columns that one float32 product down the columns covers at most. OpenBLAS puts such a product on several
threads from 9,216 elements on."""

LONG = 8192
"""Columns from which on so many rows would leave the cache."""

ALIGNMENT = 64
WIDTH_UNIT = 16
BUFFER_ELEMENTS = 1024
"""With NumPy's own 8192, every operation on short rows that are broadcast copies them together first."""


class NumpyForm:
    """Chunk arithmetic in one precision, over scratch memory that is allocated once.

    Blocks are ``[matrices, rows, cols]`` as stored and start at a chunk; :class:`Arithmetic` says what the methods
    do. No result depends on the size of a strip.

    Args:
        precision: float32 or float64.
        chunk_rows: Rows whose sums are added in this precision at most.
        cols: Columns of the stored matrices.
    """

    def __init__(self, precision: type[np.floating], chunk_rows: int, cols: int) -> None:
        self._precision = precision
        self._chunk_rows = chunk_rows
        self._cols = cols
        # What is added in one product follows from the shape alone, how much is loaded at once may not show.
        self._group = min(chunk_rows, GROUP_ROWS if cols < LONG else GROUP_ROWS // 4)
        self._strip = max(1, min(STRIP_ELEMENTS // max(1, cols), chunk_rows) // self._group) * self._group
        self._panels = max(1, math.ceil(cols / PANEL))
        self._width = math.ceil(cols / self._panels / WIDTH_UNIT) * WIDTH_UNIT

    @property
    def is_double(self) -> bool:
        """Whether the precision is float64 rather than float32."""
        return self._precision is np.float64

    def rows(self, block: np.ndarray, weights: np.ndarray | None, *, squares: bool) -> np.ndarray:
        """Reduce along each row."""
        count = 0 if weights is None else weights.shape[1]
        sums = np.zeros((len(block), count + squares, block.shape[1]))
        for entry, (matrix, outs) in enumerate(zip(block, sums, strict=True)):
            lines = () if weights is None else weights[min(entry, len(weights) - 1)]
            for span in self._strips(0, len(matrix)):
                tile = self._load(matrix[span])
                for low in range(0, self._cols, SEGMENT):
                    part = tile[:, low : low + SEGMENT]
                    for line, out in zip(lines, outs, strict=False):
                        out[span] += np.vecdot(part, line[low : low + SEGMENT])
                    if squares:
                        outs[count, span] += np.vecdot(part, part)
        return sums

    def add_columns(
        self,
        block: np.ndarray,
        weights: np.ndarray | None,
        into: np.ndarray,
        *,
        squares: bool,
        unsafe: Container[tuple[int, int]] | None,
        repair: Callable[[int, int], np.ndarray],
    ) -> None:
        """Reduce along each column of each chunk, and add the chunks in order."""
        for entry, (matrix, total) in enumerate(zip(block, into, strict=True)):
            lines = np.empty((0, len(matrix))) if weights is None else weights[min(entry, len(weights) - 1)]
            for chunk, low in enumerate(range(0, len(matrix), self._chunk_rows)):
                if unsafe is not None and (entry, chunk) in unsafe:
                    total += repair(entry, chunk)
                    continue
                span = slice(low, min(low + self._chunk_rows, len(matrix)))
                sums = self._column_sums(matrix, lines, span, squares=squares)
                total += repair(entry, chunk) if unsafe is None and not in_range(sums[-1]) else sums

    def update(
        self,
        block: np.ndarray,
        source: np.ndarray,
        scale: np.ndarray | None,
        row_factor: np.ndarray,
        column_factor: np.ndarray,
    ) -> None:
        """Write ``scale * source - sum_k row_factor[k] ⊗ column_factor[k]``, rounded to what is stored."""
        for entry, (target, matrix) in enumerate(zip(block, source, strict=True)):
            rows = row_factor[min(entry, len(row_factor) - 1)][:, :, None]
            columns = column_factor[min(entry, len(column_factor) - 1)]
            for span in self._strips(0, len(matrix)):
                tile = self._load(matrix[span])
                other = self._other[: len(tile), : self._cols]
                if scale is not None:
                    tile *= scale[entry] if len(scale[entry]) == 1 else scale[entry, span]
                for row, column in zip(rows, columns, strict=True):
                    np.multiply(row[span], column, out=other)
                    np.subtract(tile, other, out=tile)
                encode(tile, target[span], other)

    def _column_sums(self, matrix: np.ndarray, lines: np.ndarray, rows: slice, *, squares: bool) -> np.ndarray:
        """Return the sums over the rows of one chunk, ``[k (+ 1), cols]`` float64."""
        count, group = len(lines), self._group
        sums = self._sums(count + squares)
        done = 0
        for span in self._strips(rows.start, rows.stop):
            tile = self._load(matrix[span])
            groups = math.ceil(len(tile) / group)
            self._tile[len(tile) : groups * group] = 0
            panels = self._tile[: groups * group].reshape(groups, group, self._panels, self._width).swapaxes(1, 2)
            outs = sums[:, done : done + groups]
            # One thin product per direction is faster than one product for all of them.
            for line, out in zip(lines, outs, strict=False):
                self._line[: len(tile)] = line[span]
                self._line[len(tile) :] = 0
                np.matmul(self._line[: groups * group].reshape(groups, 1, 1, group), panels, out=out)
            if squares:
                np.square(tile, out=tile)
                np.matmul(self._ones, panels, out=outs[count])
            done += groups
        flat = sums[:, :done].reshape(count + squares, done, self._panels * self._width)
        total: np.ndarray = np.add.reduce(flat[:, :, : self._cols], axis=1, dtype=np.float64)
        return total

    def _strips(self, start: int, stop: int) -> Iterator[slice]:
        for low in range(start, stop, self._strip):
            yield slice(low, min(low + self._strip, stop))

    def _load(self, part: np.ndarray) -> np.ndarray:
        """Bring rows to the scratch memory; its padding stays zero."""
        tile = self._tile[: len(part), : self._cols]
        decode(part, tile)
        return tile

    @cached_property
    def _tile(self) -> np.ndarray:
        return self._zeros(self._strip, self._panels * self._width)

    @cached_property
    def _other(self) -> np.ndarray:
        return self._zeros(self._strip, self._panels * self._width)

    @cached_property
    def _line(self) -> np.ndarray:
        return self._zeros(self._strip)

    @cached_property
    def _ones(self) -> np.ndarray:
        ones = self._zeros(1, self._group)
        ones.fill(1)
        return ones

    @cached_property
    def _kept_sums(self) -> dict[int, np.ndarray]:
        return {}

    def _sums(self, lines: int) -> np.ndarray:
        """Return scratch memory for the sums of a chunk: ``[lines, groups, panels, 1, columns of a panel]``."""
        if lines not in self._kept_sums:
            groups = math.ceil(self._chunk_rows / self._group)
            self._kept_sums[lines] = self._zeros(lines, groups, self._panels, 1, self._width)
        return self._kept_sums[lines]

    def _zeros(self, *shape: int) -> np.ndarray:
        """Return zeros that start on a cache line: what a product reads lies the same way in every thread."""
        size = math.prod(shape) * np.dtype(self._precision).itemsize
        raw = np.zeros(size + ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % ALIGNMENT
        return raw[start : start + size].view(self._precision).reshape(shape)


class NumpyArrays:
    """Blocks and sums in NumPy arrays; :class:`Arrays` says what the methods do."""

    xp: ModuleType = np

    def forms(self, chunk_rows: int, cols: int) -> tuple[NumpyForm, NumpyForm]:
        """Return the arithmetic in float32 and in float64."""
        return NumpyForm(np.float32, chunk_rows, cols), NumpyForm(np.float64, chunk_rows, cols)

    def zeros(self, *shape: int) -> np.ndarray:
        """Return float64 zeros for sums."""
        return np.zeros(shape)

    def state(self, values: np.ndarray) -> np.ndarray:
        """Return the values: they are where they should be."""
        return values

    def single(self, values: np.ndarray) -> np.ndarray:
        """Return sums in float32."""
        return values.astype(np.float32)

    def host(self, values: np.ndarray) -> np.ndarray:
        """Return the sums: they are where they should be."""
        return values

    def clone(self, block: np.ndarray) -> np.ndarray:
        """Return a contiguous copy."""
        return block.copy()

    def keep(self, block: np.ndarray, original: np.ndarray, still: np.ndarray) -> None:
        """Put back what must not change by a bit."""
        np.copyto(block, original, where=still)

    def buffer(self, count: int) -> np.ndarray:
        """Return new memory for bytes."""
        return np.empty(count, np.uint8)

    def load(self, raw: np.ndarray, dtype: str, shape: tuple[int, int, int]) -> np.ndarray:
        """Return a view of stored bytes."""
        return raw.view(STORED[dtype]).reshape(shape)

    def store(self, block: np.ndarray, raw: np.ndarray) -> None:
        """Do nothing: a block is a view of its bytes."""

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Let what is out of range pass without a warning, and rows be broadcast without a copy."""
        with np.errstate(all="ignore"):
            np.setbufsize(BUFFER_ELEMENTS)
            yield


def decode(stored: np.ndarray, out: np.ndarray) -> None:
    """Convert stored values to float32 or float64.

    Args:
        stored: uint16 (the bits of bfloat16), float16 or float32, any shape.
        out: float32 or float64, of that shape.
    """
    if out.dtype == np.float64:
        out[...] = stored if stored.dtype == np.float32 else decoded(stored, np.float32)
    elif stored.dtype == np.uint16:
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    elif stored.dtype == np.float16 and not _has_nonfinite(stored):
        # NumPy converts one number at a time. The bits of a half, read as those of a float32, are off by a factor.
        bits = out.view(np.int32)
        np.left_shift(stored.view(np.int16), 13, out=bits, dtype=np.int32)
        np.bitwise_and(bits, _HALF_BITS, out=bits)
        np.multiply(out, _HALF_FACTOR, out=out)
    else:
        out[...] = stored


def decoded(stored: np.ndarray, precision: type[np.floating]) -> np.ndarray:
    """Return stored values in float32 or float64."""
    out = np.empty(stored.shape, precision)
    with np.errstate(all="ignore"):
        decode(stored, out)
    return out


def encode(values: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """Round to the nearest stored value, ties to even.

    From float32, what lies beyond the greatest finite value becomes infinite or, in float16, anything; from float64
    it becomes the greatest finite value.

    Args:
        values: float32 or float64; may be overwritten.
        out: uint16 (the bits of bfloat16), float16 or float32, of that shape.
        scratch: Of the shape and dtype of the values; is overwritten.
    """
    if values.dtype == np.float64:
        limit = GREATEST[stored_dtype(out) or "F32"]
        np.clip(values, -limit, limit, out=values)
        if out.dtype == np.uint16:
            single = _to_odd(values)
            encode(single, out, np.empty_like(single))
        else:
            out[...] = values
    elif out.dtype == np.uint16:
        bits, carry = values.view(np.uint32), scratch.view(np.uint32)
        np.right_shift(bits, 16, out=carry)
        np.bitwise_and(carry, 1, out=carry)
        np.add(carry, 0x7FFF, out=carry)
        np.add(carry, bits, out=carry)
        np.right_shift(carry, 16, out=carry)
        np.copyto(out, carry, casting="unsafe")
    elif out.dtype == np.float16:
        _encode_half(values, out.view(np.uint16), scratch)
    else:
        out[...] = values


_HALF_BITS = np.int32(-0x70002000)
_HALF_FACTOR = np.float32(2.0**112)


def _has_nonfinite(stored: np.ndarray) -> bool:
    bits = stored.view(np.uint16)
    return bool(bits.max(initial=0) >= 0xFC00 or bits.view(np.int16).max(initial=0) >= 0x7C00)


def _encode_half(values: np.ndarray, out: np.ndarray, scratch: np.ndarray) -> None:
    """Round float32 to the bits of float16 by adding and subtracting what leaves only the wanted digits.

    One and a half times ``2**13`` times the power of two below ``|x|`` has ten digits of ``x`` in front of its last
    one, whatever the sign of ``x``; below the least normal number the digits end where they end there.
    """
    given, bits = values.view(np.uint32), scratch.view(np.uint32)
    np.right_shift(given, 16, out=bits)
    np.copyto(out, bits, casting="unsafe")
    np.bitwise_and(out, 0x8000, out=out)
    np.bitwise_and(given, 0x7F800000, out=bits)
    np.multiply(scratch, np.float32(1.5 * 2**13), out=scratch)
    np.maximum(scratch, np.float32(1.5 * 2**-1), out=scratch)
    np.add(values, scratch, out=values)
    np.subtract(values, scratch, out=values)
    np.multiply(values, 1 / _HALF_FACTOR, out=values)
    np.right_shift(given, 13, out=bits)
    np.bitwise_or(out, bits, out=out, casting="unsafe")


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32 such that a second rounding to fewer digits errs no more than one would alone."""
    single = values.astype(np.float32)
    bits = single.view(np.int32)
    bits -= np.abs(single.astype(np.float64)) > np.abs(values)
    bits |= single.astype(np.float64) != values
    return single
