"""Quantised weights as values: the scales of FP8 codes, read where they are needed, and the steps of any grid."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeAlias

import numpy as np

from ablate_shards.surgery.diff.packed import PackedScales
from ablate_shards.surgery.machine.files import pread_into

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AnyScales", "EqualScales", "OneCoded", "StoredScales", "TwoCoded"]

_EXPONENT = 0x7F800000
_MANTISSA = 23
_TINY = 2.0**-120
#: Quantisers divide by a scale or multiply by its reciprocal, which decides ties either way.
_TIE = 1e-4


class _Floats(NamedTuple):
    """A grid of codes with an exponent.

    Attributes:
        bits: Bits of a mantissa.
        greatest: The greatest value.
        least: The least one above zero.
        least_normal: The least one with all of its mantissa.
    """

    bits: int
    greatest: float
    least: float
    least_normal: float


#: On grids of integers neighbours are one apart; of tables they are looked up.
_FLOATS = {"E4M3": _Floats(3, 448.0, 2.0**-9, 2.0**-6), "E2M1": _Floats(1, 6.0, 0.5, 1.0)}


@dataclass(frozen=True, slots=True)
class StoredScales:
    """The scales of a weight's codes in an open file.

    Attributes:
        name: Their tensor.
        dtype: Its safetensors dtype.
        file: The descriptor of its shard.
        start: Where in it the tensor begins.
        block: Rows and columns of a matrix that one scale is for.
        shape: The shape of the codes.
        form: How they are stored, in words.
    """

    name: str
    dtype: str
    file: int
    start: int
    block: tuple[int, int]
    shape: tuple[int, ...]
    form: str
    grid: ClassVar[str] = "E4M3"

    def of(self, first: int, count: int) -> np.ndarray:
        """Returns the scale of each of ``count`` values from a flat position on, float32."""
        from ablate_shards.kernels.codecs.scales import spread

        rows, columns = self.shape[-2:]
        top, bottom = first // columns, -(-(first + count) // columns)
        parts = []
        for matrix in range(top // rows, -(-bottom // rows)):
            begin, end = max(top - matrix * rows, 0), min(bottom - matrix * rows, rows)
            above = begin // self.block[0]
            scales = self._rows(matrix, above, -(-end // self.block[0]))
            offset = above * self.block[0]
            part = spread(scales, self.block, slice(begin - offset, end - offset), slice(0, columns))
            parts.append(np.broadcast_to(part, (end - begin, columns)).reshape(-1))
        skipped = first - top * columns
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        found: np.ndarray = whole[skipped : skipped + count]
        return found

    def same(self, other: object) -> bool:
        """Tells whether another weight's scales mean the same, read a few rows of them at a time."""
        rows, columns = self.shape[-2:]
        if not isinstance(other, StoredScales) or self.shape != other.shape or self.block != other.block:
            return False
        down = -(-rows // self.block[0])
        step = max(1, (1 << 18) // -(-columns // self.block[1]))
        return all(
            np.array_equal(self._rows(matrix, row, last), other._rows(matrix, row, last), equal_nan=True)
            for matrix in range(math.prod(self.shape[:-2]))
            for row in range(0, down, step)
            for last in [min(row + step, down)]
        )

    def _rows(self, matrix: int, first: int, last: int) -> np.ndarray:
        """Reads rows of a matrix's scales, ``[blocks down, blocks across]`` float32."""
        from ablate_shards.kernels.codecs.scales import SCALE_BYTES, decode_scales

        rows, columns = self.shape[-2:]
        across = -(-columns // self.block[1])
        size = SCALE_BYTES[self.dtype]
        raw = bytearray((last - first) * across * size)
        before = matrix * -(-rows // self.block[0]) + first
        pread_into(self.file, memoryview(raw), self.start + before * across * size)
        return decode_scales(bytes(raw), self.dtype).reshape(-1, across)


AnyScales: TypeAlias = StoredScales | PackedScales
"""The scales of a weight's codes, whatever its grid."""


def _scales(stored: AnyScales, first: int, like: "Tensor") -> "Tensor":
    """Returns scales to divide by; only those of tables keep their sign, whose values are others turned round."""
    import torch

    found = torch.from_numpy(np.array(stored.of(first, like.numel())))
    sizes = found.abs().nan_to_num_(nan=1.0, posinf=1.0).clamp_(min=_TINY)
    return (sizes if _table(stored.grid) is None else sizes.copysign_(found)).view_as(like)


def _steps_at(values: "Tensor", others: "Tensor", scales: "Tensor", grid: str) -> "Tensor":
    """Returns the distance from the codes of values to their neighbours on the side of others, scaled.

    Args:
        values: Decoded codes.
        others: What they are compared with.
        scales: Their scales, positive but for tables.
        grid: What the codes are.
    """
    import torch

    if (floats := _FLOATS.get(grid)) is not None:
        codes = _codes(values, scales, floats)
        return _steps(codes, (others / scales).abs_(), floats).mul_(scales)
    if (table := _table(grid)) is None:
        return scales.clone()
    found = torch.from_numpy(table)
    unscaled = values / scales
    levels = torch.bucketize(unscaled, (found[1:] + found[:-1]) / 2)
    beside = (levels + torch.where((others < values) != (scales < 0), -1, 1)).clamp_(0, len(table) - 1)
    beside = torch.where(beside == levels, (levels - 1).clamp_(min=1), beside)
    return (found[beside] - found[levels]).mul_(scales).abs_()


def _table(grid: str) -> np.ndarray | None:
    """Returns the values of the levels of a grid, where they are looked up."""
    from ablate_shards.kernels.codecs.grids import grid_named

    found = grid_named(grid)
    return np.unique(found.values) if found.kind == "table" else None


def _codes(values: "Tensor", scales: "Tensor", floats: _Floats) -> "Tensor":
    """Returns the sizes of the codes that decoded values have, exactly: the division may be off in its last bit."""
    import torch

    sizes = (values / scales).abs_().clamp_(max=floats.greatest)
    # Half of what follows the bits of a code's mantissa, and what keeps those.
    half, kept = 1 << (_MANTISSA - floats.bits - 1), -1 << (_MANTISSA - floats.bits)
    return sizes.view(torch.int32).add_(half).bitwise_and_(kept).view(torch.float32)


def _steps(codes: "Tensor", others: "Tensor", floats: _Floats) -> "Tensor":
    """Returns the distance from codes to their neighbours on the side of other values, both as sizes, unscaled."""
    import torch

    powers, relative = codes.clone(), 2.0**-floats.bits
    powers.view(torch.int32).bitwise_and_(_EXPONENT)
    halved = (codes == powers) & (powers > floats.least_normal) & (others < codes)
    return torch.where(halved, powers * (relative / 2), powers * relative).clamp_(min=floats.least)


def _apart(before: "Tensor", after: "Tensor", grid: str) -> "Tensor":
    """Returns how many levels lie between unscaled values, float32."""
    import torch

    from ablate_shards.kernels.codecs.grids import grid_named

    found = grid_named(grid)
    if found.kind in ("integer", "affine"):
        return (after - before).abs_().round_()
    levels = [found.nearest_levels(each.numpy()).astype(np.float32) for each in (before, after)]
    return torch.from_numpy(np.abs(levels[1] - levels[0]))


class OneCoded:
    """The steps of a grid of codes, where the values on the other side are not rounded to it.

    A value that was rounded to its nearest code is within half a step of it.
    """

    allowed = 0.5 + _TIE
    directed = True

    def __init__(self, scales: AnyScales, first: int, columns: int, *, new: bool) -> None:
        """Takes the scales, where the measured values begin, the length of a row, and which side is coded."""
        self._scales, self._first, self._columns, self._new = scales, first, columns, new

    def of(self, first: int, old: "Tensor", added: "Tensor") -> "Tensor":
        """Returns the step at each value from a row on."""
        scales = _scales(self._scales, self._first + first * self._columns, old)
        both = old, old + added
        return _steps_at(both[self._new], both[not self._new], scales, self._scales.grid)


class TwoCoded:
    """The wider of the steps of two grids: two roundings of one value lie within it of one another."""

    allowed = 1.0 + _TIE
    directed = True

    def __init__(self, scales: tuple[AnyScales, AnyScales], first: int, columns: int) -> None:
        """Takes the scales of either side, where the measured values begin, and the length of a row."""
        self._sides, self._first, self._columns = scales, first, columns

    def of(self, first: int, old: "Tensor", added: "Tensor") -> "Tensor":
        """Returns the wider step at each value from a row on."""
        import torch

        found = []
        for stored, values in zip(self._sides, (old, old + added), strict=True):
            scales = _scales(stored, self._first + first * self._columns, old)
            found.append(_steps_at(values, values, scales, stored.grid))
        return torch.maximum(*found)


class EqualScales:
    """The steps between two codes on one grid, where no difference is rounding: a change is so many codes."""

    allowed = 0.0
    directed = True

    def __init__(self, scales: AnyScales, first: int, columns: int) -> None:
        """Takes the scales of both sides, where the measured values begin, and the length of a row."""
        self._scales, self._first, self._columns = scales, first, columns

    def of(self, first: int, old: "Tensor", added: "Tensor") -> "Tensor":
        """Returns the mean step between the codes of each value, that of the code where they are equal."""
        import torch

        grid = self._scales.grid
        scales = _scales(self._scales, self._first + first * self._columns, old)
        before, after = (torch.nan_to_num(values / scales) for values in (old, old + added))
        apart = _apart(before, after, grid)
        return torch.where(apart > 0, added.abs() / apart.clamp(min=1.0), _steps_at(old, old, scales, grid))
