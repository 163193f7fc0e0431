"""FP8 weights: codes in E4M3 and the scales that they are multiplied by, per block, per row or per tensor.

A code is a sign, four bits of exponent and three of mantissa; 0x7F and 0xFF are NaN, there is no infinity. *Levels* are
the codes in the order of their values, -126 to 126, with both zeros at 0, so that neighbours differ by one.
"""

import numpy as np

from ablate_shards.kernels.codecs.plain import decoded

__all__ = [
    "LAST",
    "SCALE_BYTES",
    "codes_of",
    "decode_rows",
    "decode_scales",
    "has_nan",
    "levels_of",
    "nearest_levels",
    "spread",
    "values_of",
]

LAST = 126
"""The level of the greatest finite value, 448."""

SCALE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F8_E8M0": 1, "U8": 1}
"""Bytes of a scale by its dtype; U8 are the bits of E8M0, a power of two."""

_NAN, _SIGN = 0x7F, 0x80
_LEAST_NORMAL, _SUBNORMALS = np.float32(2.0**-6), np.float32(2.0**9)
_MAGNITUDES = np.array(
    [
        (code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10)
        for code in range(LAST + 1)
    ],
    np.float32,
)  # fmt: skip
_VALUES = np.concatenate([-_MAGNITUDES[:0:-1], _MAGNITUDES])
_DECODED = np.concatenate([_MAGNITUDES, [np.nan], -_MAGNITUDES, [np.nan]]).astype(np.float32)
_LEVELS = np.concatenate([np.arange(_SIGN), -np.arange(_SIGN)]).astype(np.int16)


def has_nan(codes: np.ndarray) -> bool:
    """Return whether a code of any shape, uint8, is NaN."""
    return bool(((codes & _NAN) == _NAN).any())


def levels_of(codes: np.ndarray) -> np.ndarray:
    """Return the levels, int16, of codes of any shape, uint8, none of which is NaN."""
    levels: np.ndarray = _LEVELS[codes]
    return levels


def codes_of(levels: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return codes, uint8, of levels; where a code that is given has the level already, that code."""
    codes = (np.abs(levels) | np.where(levels < 0, _SIGN, 0)).astype(np.uint8)
    chosen: np.ndarray = np.where(levels == levels_of(kept), kept, codes)
    return chosen


def values_of(levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return what levels stand for, float32: the value of the code times its scale, float32 and broadcast."""
    values: np.ndarray = _VALUES[levels + np.int16(LAST)]
    with np.errstate(over="ignore", under="ignore"):
        values *= scales
    return values


def nearest_levels(values: np.ndarray) -> np.ndarray:
    """Return the levels nearest to unscaled values, int16; ties to even, and what is beyond 448 becomes 448.

    Args:
        values: Any shape, float32, none NaN.
    """
    size = np.minimum(np.abs(values), _MAGNITUDES[LAST])
    bits = size.view(np.uint32)
    # What rounds up to the next power of two carries into the exponent, whose bias is 127 there and 7 here.
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20).view(np.int32) - ((127 - 7) << 3)
    levels = np.where(size < _LEAST_NORMAL, np.rint(size * _SUBNORMALS).astype(np.int32), normal)
    signed: np.ndarray = np.where(values < 0, -levels, levels)
    return signed.astype(np.int16)


def decode_scales(raw: bytes, dtype: str) -> np.ndarray:
    """Return scales as float32 ``[count]``; one that is NaN stays NaN."""
    if dtype in ("F8_E8M0", "U8"):
        exponents = np.frombuffer(raw, np.uint8)
        powers = np.ldexp(1.0, np.minimum(exponents, 0xFE).astype(np.int32) - 127).astype(np.float32)
        return np.where(exponents == 0xFF, np.float32(np.nan), powers)
    return decoded(np.frombuffer(raw, {"F32": "<f4", "BF16": "<u2", "F16": "<f2"}[dtype]), np.float32)


def spread(scales: np.ndarray, block: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    """Return the scale of each element in a part of a matrix, float32 ``[rows, columns]``, perhaps broadcast.

    Args:
        scales: ``[blocks down, blocks across]`` float32; the last ones may reach beyond the matrix.
        block: Rows and columns of a block.
        rows: The rows wanted, both ends given.
        columns: The columns wanted, likewise.
    """
    down: np.ndarray = scales[np.arange(rows.start, rows.stop) // block[0]]
    if scales.shape[1] == 1:
        return down
    first = columns.start // block[1]
    wide = np.repeat(down[:, first : -(-columns.stop // block[1])], block[1], axis=1)
    part: np.ndarray = wide[:, columns.start - first * block[1] :][:, : columns.stop - columns.start]
    return part


def decode_rows(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int], first: int) -> np.ndarray:
    """Return what whole rows of a matrix stand for, float32.

    Args:
        codes: ``[rows, cols]`` uint8.
        scales: As :func:`spread` takes them.
        block: Likewise.
        first: The number of the first row.
    """
    values: np.ndarray = _DECODED[codes]
    down = scales[np.arange(first, first + len(codes)) // block[0]]
    with np.errstate(over="ignore", under="ignore"):
        for number in range(scales.shape[1]):
            values[:, number * block[1] : (number + 1) * block[1]] *= down[:, number, None]
    return values
