"""E2M1, the codes of MXFP4 and NVFP4: a sign, two bits of exponent, one of mantissa; every code is a number."""

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid

__all__ = ["E2M1"]

_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

E2M1 = Grid("E2M1", kind="E2M1", bits=4, values=np.array([*_MAGNITUDES, *(-size for size in _MAGNITUDES)], np.float32))
