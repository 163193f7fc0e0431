"""What codes are multiplied by, and their zero points: one for each block of a matrix."""

from typing import NamedTuple

import numpy as np

from ablate_shards.kernels.codecs.e4m3 import E4M3
from ablate_shards.kernels.codecs.grid import Grid
from ablate_shards.kernels.codecs.plain import decoded

__all__ = ["SCALE_BYTES", "Spread", "decode_scales", "spread"]

SCALE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1}
"""Bytes of a scale by its dtype; U8 are the bits of E8M0, a power of two."""

_POWERS = np.array([*(2.0 ** (exponent - 127) for exponent in range(255)), np.nan], np.float32)


def decode_scales(raw: bytes, dtype: str) -> np.ndarray:
    """Return scales as float32 ``[count]``; one that is NaN stays NaN."""
    if dtype == "F8_E4M3":
        values: np.ndarray = E4M3.values[np.frombuffer(raw, np.uint8)]
        return values
    if dtype in ("F8_E8M0", "U8"):
        powers: np.ndarray = _POWERS[np.frombuffer(raw, np.uint8)]
        return powers
    return decoded(np.frombuffer(raw, {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}[dtype]), np.float32)


def spread(
    values: np.ndarray, block: tuple[int, int], rows: slice, columns: slice, groups: np.ndarray | None = None
) -> np.ndarray:
    """Return the scale or zero point of each element in a part of a matrix, ``[rows, columns]``, perhaps broadcast.

    Args:
        values: ``[blocks down, blocks across]``; the last ones may reach beyond the matrix.
        block: Rows and columns of a block.
        rows: The rows wanted, both ends given.
        columns: The columns wanted, likewise.
        groups: ``[cols]`` integers, the block of each column; None where they follow each other.
    """
    down: np.ndarray = values[np.arange(rows.start, rows.stop) // block[0]]
    if groups is not None:
        chosen: np.ndarray = down[:, groups[columns]]
        return chosen
    if values.shape[1] == 1:
        return down
    first = columns.start // block[1]
    wide = np.repeat(down[:, first : -(-columns.stop // block[1])], block[1], axis=1)
    part: np.ndarray = wide[:, columns.start - first * block[1] :][:, : columns.stop - columns.start]
    return part


class Spread(NamedTuple):
    """The scales of a matrix of codes, and its zero points where it has them.

    Attributes:
        grid: What the codes mean.
        block: Rows and columns that one scale is for.
        scales: ``[blocks down, blocks across]`` float32.
        zeros: The same of levels, int8; None where zero is zero. Of affine codes the offsets, float32.
        groups: ``[cols]`` integers, the block of each column; None where they follow each other.
        factor: What products with scales are multiplied by.
    """

    grid: Grid
    block: tuple[int, int]
    scales: np.ndarray
    zeros: np.ndarray | None = None
    groups: np.ndarray | None = None
    factor: float = 1.0

    def part(self, rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray | None]:
        """Return the scale and the zero point of each element in a part of the matrix: :func:`spread`."""
        zeros = None if self.zeros is None else spread(self.zeros, self.block, rows, columns, self.groups)
        scales = spread(self.scales, self.block, rows, columns, self.groups)
        return scales if self.factor == 1 else scales * np.float32(self.factor), zeros

    def decode_rows(self, codes: np.ndarray, first: int, column: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """Return what rows of the matrix stand for, float32.

        Args:
            codes: ``[rows, cols]`` uint8.
            first: The number of the first row.
            column: That of the first column.
            out: Where to put it, adjacent; a new array if None.
        """
        # It looks codes up in half the time that an index takes; no code is beyond the last, and only a mode that
        # would clip it writes in place.
        values: np.ndarray = self.grid.values.take(codes, out=out, mode="clip")
        rows, columns = slice(first, first + len(codes)), slice(column, column + codes.shape[1])
        zeros = None if self.zeros is None else spread(self.zeros, self.block, rows, columns, self.groups)
        if zeros is not None and self.grid.kind != "affine":
            values -= zeros
        with np.errstate(over="ignore", under="ignore"):
            values *= spread(self.scales, self.block, rows, columns, self.groups)
            if self.factor != 1:
                values *= np.float32(self.factor)
            if zeros is not None and self.grid.kind == "affine":
                values += zeros
        return values
