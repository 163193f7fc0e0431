"""The codes of bitsandbytes in four bits: values from a table, quantiles of the normal distribution (NF4), or FP4."""

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid

__all__ = ["FP4", "NF4"]

_NORMAL = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
_MAGNITUDES = (
    *(0.0, 0.0052083334885537624, 0.6666666865348816, 1.0),
    *(0.3333333432674408, 0.5, 0.1666666716337204, 0.25),
)

NF4 = Grid("NF4", kind="table", bits=4, values=np.array(_NORMAL, np.float32))

FP4 = Grid(
    "FP4",
    kind="table",
    bits=4,
    values=np.array([*_MAGNITUDES, *(-size if size else 0.0 for size in _MAGNITUDES)], np.float32),
)
"""A table of its own, not E2M1."""
