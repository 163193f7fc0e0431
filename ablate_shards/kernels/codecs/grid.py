"""Grids of codes: which value each code of a quantised weight has before it is scaled, and which code is nearest.

*Levels* are the codes in the order of their values, counted from zero, so that neighbours differ by one; two codes of
one value have one level.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

__all__ = ["Grid", "Kind"]

Kind = Literal["E4M3", "E2M1", "integer"]
"""The grids that ``native_codes.h`` knows, which computes values instead of looking them up."""

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
            "_between": (ordered[1:] + ordered[:-1]) / 2,
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

    def has_nan(self, codes: np.ndarray) -> bool:
        """Return whether a code of any shape, uint8, is NaN."""
        strange = np.flatnonzero(np.isnan(self.values))
        return len(strange) > 0 and bool(np.isin(codes, strange).any())

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
            zeros: Levels of the zero points, int16, broadcast; only integers have them.
        """
        if zeros is None:
            values: np.ndarray = self._ordered[levels - np.int16(self.lowest)]
        else:
            values = (levels - zeros).astype(np.float32)
        with np.errstate(over="ignore", under="ignore"):
            scaled: np.ndarray = values * scales
        return scaled

    def nearest_levels(self, values: np.ndarray, zeros: "np.ndarray | np.int16 | None" = None) -> np.ndarray:
        """Return the levels nearest to unscaled values, int16; ties to even, and what is beyond the last becomes that.

        Args:
            values: Any shape, float32, none NaN.
            zeros: As :meth:`values_of` takes them.
        """
        if zeros is not None:
            around: np.ndarray = np.rint(np.clip(values, -512, 512)).astype(np.int16) + zeros
            return around.clip(self.lowest, self.highest)
        levels = np.searchsorted(self._between, values).astype(np.int16) + np.int16(self.lowest)
        beside = self._between[np.minimum(levels - np.int16(self.lowest), len(self._between) - 1)]
        nearest: np.ndarray = levels + ((values == beside) & (levels % 2 != 0))
        return nearest
