"""Computes the bytes of a weight in bfloat16 from its codes, any range of them."""

import functools
from collections.abc import Iterator

import numpy as np

from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_range
from ablate_shards.surgery.dequantise.decoding import AT_ONCE, CodedWeight, Kept, pieces
from ablate_shards.surgery.dequantise.found import QuantisedWeight

__all__ = ["Values"]

_BYTES = 2
_WAY_OUT = "fetch its shard again"


class Values:
    """The bytes of one weight in bfloat16: a ``Fill``.

    Args:
        checkpoint: The source.
        weight: The weight.
        kept: What threads keep, which all weights of a checkpoint share.
    """

    def __init__(self, checkpoint: Checkpoint, weight: QuantisedWeight, kept: Kept) -> None:
        self._weight, self._kept = weight, kept
        read = functools.partial(read_range, checkpoint)
        self._coded = CodedWeight(weight.codes, weight.scales, read, _WAY_OUT)
        self._height, self._width = weight.shape[-2:]

    def __call__(self, data: memoryview, offset: int) -> None:
        """Fills a buffer from an offset; several threads may call it.

        Raises:
            ExecuteError: A code or a scale is NaN, or what they stand for is too large for bfloat16.
        """
        row_bytes = self._width * _BYTES
        first, last = offset // row_bytes, -(-(offset + len(data)) // row_bytes)
        filled = np.frombuffer(data, np.uint8)
        for number, rows in pieces(self._height, first, last):
            raw = self._rows(number, rows).view(np.uint8).reshape(-1)
            start = (number * self._height + rows.start) * row_bytes - offset
            low, high = max(0, start), min(len(filled), start + len(raw))
            filled[low:high] = raw[low - start : high - start]

    def _rows(self, number: int, rows: slice) -> np.ndarray:
        """Returns rows of a matrix as the bits of bfloat16, uint16."""
        transposed = self._weight.transposed
        if not transposed and self._coded.by_rows:
            bits = np.empty((rows.stop - rows.start, self._width), np.uint16)
            for span, values in self._decoded(number, rows):
                bits[span.start - rows.start : span.stop - rows.start] = values
            return bits
        key = (self._weight.name, number)
        if self._kept.matrix is None or self._kept.matrix[0] != key:
            self._kept.matrix = None  # so that two are never there at once
            whole = np.empty((self._height, self._width), np.uint16)
            for span, values in self._decoded(number, slice(0, self._coded.rows)):
                (whole.T if transposed else whole)[span] = values
            self._kept.matrix = key, whole
        return self._kept.matrix[1][rows]

    def _decoded(self, number: int, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields some rows of codes at a time, and the bits of what they stand for."""
        from ablate_shards.kernels.codecs.plain import INFINITE, round_to_bfloat16

        coded = self._coded
        columns = self._height if self._weight.transposed else self._width
        spread = coded.kept_spread(number, self._kept)
        raw = coded.read_rows(number, rows)
        step = max(1, AT_ONCE // max(1, columns))
        for first in range(rows.start, rows.stop, step):
            span = slice(first, min(first + step, rows.stop))
            part = raw[span.start - rows.start : span.stop - rows.start]
            values = coded.decode(part, spread, first, columns, room=self._kept.room)
            count = values.size
            room = self._kept.bits[:count].reshape(values.shape) if count <= AT_ONCE else None
            bits = round_to_bfloat16(values, room=room)
            if (bits & 0x7FFF).max(initial=0) >= INFINITE:
                coded.check(number, part)
                raise coded.refused(number, "codes times scales are too large for bfloat16")
            yield span, bits
