"""Integers of 2 to 8 bits, stored with half of their range added, so that the smallest one is code 0."""

import functools

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid

__all__ = ["integers"]


@functools.cache
def integers(bits: int) -> Grid:
    """Return the integers of so many bits, from ``-2**(bits - 1)`` on."""
    half = 1 << (bits - 1)
    return Grid(f"int{bits}", kind="integer", bits=bits, values=np.arange(-half, half, dtype=np.float32))
