"""E4M3, the codes of FP8 and MXFP8: a sign, four bits of exponent, three of mantissa.

0x7F and 0xFF are NaN, there is no infinity, and the greatest value is 448.
"""

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid

__all__ = ["E4M3"]

_MAGNITUDES = [
    (code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10) for code in range(127)
]

E4M3 = Grid(
    "E4M3",
    kind="E4M3",
    bits=8,
    values=np.array([*_MAGNITUDES, np.nan, *(-size for size in _MAGNITUDES), np.nan], np.float32),
)
