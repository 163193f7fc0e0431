"""Grids of codes: which value each code of a quantised weight has before it is scaled, and which code is nearest.

*Levels* are the codes in the order of their values, counted from zero, so that neighbours differ by one; two codes of
one value have one level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

__all__ = ["Grid", "Kind"]

Kind = Literal["E4M3", "E2M1", "integer", "affine", "table"]
"""The grids that ``native_codes.h`` knows; it looks up the values of a table, and computes others.

Affine codes are integers from zero on, to whose value times the scale an offset is added. Scales of these and of tables
may be negative.
"""

_FINE_BITS, _NOTHING, _NOTHING_IN_FEW_BITS = 8, 1e-7, 1e-6


@dataclass(frozen=True, eq=False)
class Grid:
    """The codes of a format.

    Attributes:
        name: What it is called.
        kind: How its values are made.
        bits: Bits of a code.
        values: The value of each code, ``[2**bits]`` float32; NaN for those that stand for none.
        lowest: The level of the smallest value.
        highest: The level of the greatest.
    """

    name: str
    kind: Kind
    bits: int
    values: np.ndarray
    lowest: int = field(init=False)
    highest: int = field(init=False)
    _levels: np.ndarray = field(init=False, repr=False)
    _codes: np.ndarray = field(init=False, repr=False)
    _ordered: np.ndarray = field(init=False, repr=False)
    _between: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        known = self.values[~np.isnan(self.values)]
        ordered, first = np.unique(np.where(known == 0, np.float32(0), known), return_index=True)
        zero = int(np.searchsorted(ordered, 0))
        places = np.searchsorted(ordered, np.nan_to_num(self.values))
        made = {
            "lowest": -zero,
            "highest": len(ordered) - 1 - zero,
            "_levels": (places - zero).astype(np.int16),
            "_codes": np.flatnonzero(~np.isnan(self.values))[first].astype(np.uint8),
            "_ordered": ordered,
            "_between": _between(ordered, zero),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def signed(self) -> bool:
        """Whether codes are integers in two's complement, from the zero on, instead of from the smallest one on."""
        return self.kind == "integer" and float(self.values[0]) == 0

    @property
    def nothing(self) -> float:
        """Residual along a direction, relative to the norm of a column, that is as good as none.

        What is less than that only rows in which the direction is tiny could take away. In few bits, whose steps are
        large, these would be filled with errors for it.
        """
        return _NOTHING if self.bits >= _FINE_BITS else _NOTHING_IN_FEW_BITS

    def table(self) -> tuple[Sequence[float], Sequence[float], Sequence[int], Sequence[int], int]:
        """Return what the kernel looks up, levels counted from the lowest.

        Returns:
            The value of each level, the greatest value that is nearest to it, the level of each code, the code of each
            level, and the highest level.
        """
        levels = (self._levels - np.int16(self.lowest)).tolist()
        bounds = (*self._between.tolist(), math.inf)
        return tuple(self._ordered.tolist()), bounds, tuple(levels), tuple(self._codes.tolist()), max(levels)

    def has_nan(self, codes: np.ndarray) -> bool:
        """Return whether a code of any shape, uint8, is NaN."""
        strange = np.flatnonzero(np.isnan(self.values)).astype(np.uint8)
        # Bytes are compared many at a time, as np.isin does not.
        return any(bool((codes == code).any()) for code in strange)

    def levels_of(self, codes: np.ndarray) -> np.ndarray:
        """Return the levels, int16, of codes of any shape, uint8, none of which is NaN."""
        levels: np.ndarray = self._levels[codes]
        return levels

    def codes_of(self, levels: np.ndarray, kept: np.ndarray) -> np.ndarray:
        """Return codes, uint8, of levels; where a code that is given has the level already, that code."""
        chosen: np.ndarray = np.where(levels == self.levels_of(kept), kept, self._codes[levels - np.int16(self.lowest)])
        return chosen

    def values_of(
        self, levels: np.ndarray, scales: np.ndarray, zeros: "np.ndarray | np.int16 | None" = None
    ) -> np.ndarray:
        """Return what levels stand for, float32: the value of the code, less that of the zero point, times the scale.

        Args:
            levels: Any shape, int16.
            scales: float32, broadcast.
            zeros: Levels of the zero points, int16, broadcast; only integers have them. Of affine codes the offsets,
                float32, broadcast, which are added.
        """
        shifted = zeros is not None and self.kind != "affine"
        values = (levels - zeros).astype(np.float32) if shifted else self._ordered[levels - np.int16(self.lowest)]
        with np.errstate(over="ignore", under="ignore"):
            scaled: np.ndarray = values * scales
            if self.kind == "affine" and zeros is not None:
                scaled += zeros
        return scaled

    def nearest_levels(self, values: np.ndarray, zeros: "np.ndarray | np.int16 | None" = None) -> np.ndarray:
        """Return the levels nearest to unscaled values, int16; ties to even, and what is beyond the last becomes that.

        Args:
            values: Any shape, float32, none NaN.
            zeros: Levels of the zero points of integers, int16, broadcast.
        """
        if zeros is not None:
            around: np.ndarray = np.rint(np.clip(values, -512, 512)).astype(np.int16) + zeros
            return around.clip(self.lowest, self.highest)
        levels: np.ndarray = np.searchsorted(self._between, values).astype(np.int16) + np.int16(self.lowest)
        return levels

    def levels_nearest_to(
        self, target: np.ndarray, kept: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None
    ) -> np.ndarray:
        """Return the levels that stand for the values nearest to a target, int16; where a scale is 0, those kept.

        Args:
            target: float32.
            kept: Levels, int16.
            scales: As :meth:`values_of` takes them.
            zeros: Likewise.
        """
        if self.kind == "affine" and zeros is not None:
            target, zeros = target - zeros, None
        if scales.all():
            return self.nearest_levels(target / scales, zeros)
        present = scales != 0
        return np.where(present, self.nearest_levels(target / np.where(present, scales, 1), zeros), kept)

    def levels_beside(self, levels: np.ndarray, along: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """Return for levels those beside them whose values are less where ``along`` is positive, and else greater."""
        less = np.sign(along).astype(np.int16)
        if self.kind in ("affine", "table"):
            less *= np.sign(scales).astype(np.int16)
        beside: np.ndarray = np.clip(levels - less, self.lowest, self.highest)
        return beside


def _between(ordered: np.ndarray, zero: int) -> np.ndarray:
    """Return the greatest value that is nearest to each level but the last, or as near to the next and that odd."""
    middle: np.ndarray = (ordered[1:] + ordered[:-1]) / 2
    odd = (np.arange(len(middle)) - zero) % 2 != 0
    return np.where(odd, np.nextafter(middle, np.float32(-np.inf)), middle)
