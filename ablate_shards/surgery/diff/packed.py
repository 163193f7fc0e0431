"""Codes of less than eight bits, and integers, as values: packed rows are read and decoded where they are needed."""

import numpy as np

from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.dequantise.decoding import CodedWeight, Kept, ReadRange, pieces

__all__ = ["PackedScales"]


class PackedScales:
    """The codes and scales of a weight whose codes are not a dtype of their own.

    Args:
        codes: The tensor of codes.
        found: Its scales, and what else belongs to it.
        read: Reads either.
        kept: What threads keep, which all weights of a comparison share.

    Attributes:
        name: The tensor of scales.
        grid: What the codes are.
        form: How they are stored, in words.
        shape: The shape of the weight, as transformers has it.

    Raises:
        ExecuteError: A part says another shape than the codes have.
    """

    def __init__(self, codes: TensorInfo, found: Scales, read: ReadRange, kept: Kept) -> None:
        self._kept = kept
        self._weight = CodedWeight(codes, found, read, "fetch its shard again")
        self.name, self.grid, self.form = found.name, found.codes, found.form(codes.shape)
        self._columns = self._weight.columns()
        # As transformers keeps what gpt-oss publishes in blocks.
        self._transposed = codes.name.endswith("_blocks")
        *stack, rows = found.leading(codes.shape)
        self.shape = (*stack, self._columns, rows) if self._transposed else (*stack, rows, self._columns)

    def of(self, first: int, count: int) -> np.ndarray:
        """Returns the scale of each of ``count`` values from a flat position on, float32."""
        return self._flat(first, count, values=False)

    def decode(self, first: int, count: int) -> np.ndarray:
        """Returns ``count`` values from a flat position on, float32.

        Raises:
            ExecuteError: A scale is NaN, infinite or negative.
        """
        return self._flat(first, count, values=True)

    def same(self, other: object) -> bool:
        """Tells whether another weight's scales and zero points mean the same."""
        if not isinstance(other, PackedScales) or (self.shape, self.grid) != (other.shape, other.grid):
            return False
        if self._transposed != other._transposed:
            return False
        for number in range(self._weight.matrices):
            ours, theirs = self._weight.spread(number), other._weight.spread(number)
            if (ours.block, ours.factor) != (theirs.block, theirs.factor):
                return False
            if not np.array_equal(ours.scales, theirs.scales):
                return False
            if not (_equal(ours.zeros, theirs.zeros) and _equal(ours.groups, theirs.groups)):
                return False
        return True

    def _flat(self, first: int, count: int, *, values: bool) -> np.ndarray:
        width = self.shape[-1]
        top, bottom = first // width, -(-(first + count) // width)
        parts = [
            self._rows(number, rows, values=values).reshape(-1) for number, rows in pieces(self.shape[-2], top, bottom)
        ]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        found: np.ndarray = whole[first - top * width :][:count]
        return found

    def _rows(self, number: int, rows: slice, *, values: bool) -> np.ndarray:
        if not self._transposed and self._weight.by_rows:
            return self._stored(number, rows, values=values)
        key = (id(self), number, values)
        if self._kept.matrix is None or self._kept.matrix[0] != key:
            self._kept.matrix = None  # so that two are never there at once
            whole = self._stored(number, slice(0, self._weight.rows), values=values)
            self._kept.matrix = key, whole.T.copy() if self._transposed else whole
        return self._kept.matrix[1][rows]

    def _stored(self, number: int, rows: slice, *, values: bool) -> np.ndarray:
        """Returns values or scales of some rows of codes, ``[rows, columns]`` float32."""
        weight = self._weight
        spread = weight.kept_spread(number, self._kept)
        if not values:
            part, _ = spread.part(rows, slice(0, self._columns))
            return np.broadcast_to(part, (rows.stop - rows.start, self._columns))
        return weight.decode(weight.read_rows(number, rows), spread, rows.start, self._columns)


def _equal(one: np.ndarray | None, other: np.ndarray | None) -> bool:
    return (one is None and other is None) or (one is not None and other is not None and np.array_equal(one, other))
