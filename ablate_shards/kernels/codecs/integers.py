"""Integers: of 2 to 8 bits with half of their range added, or from zero on with an offset, or of 8 as they are."""

import functools

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid

__all__ = ["SIGNED", "affine", "integers"]

SIGNED = Grid("signed8", kind="integer", bits=8, values=np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32))
"""Bytes in two's complement."""


@functools.cache
def integers(bits: int) -> Grid:
    """Return the integers of so many bits, from ``-2**(bits - 1)`` on."""
    half = 1 << (bits - 1)
    return Grid(f"int{bits}", kind="integer", bits=bits, values=np.arange(-half, half, dtype=np.float32))


@functools.cache
def affine(bits: int) -> Grid:
    """Return the integers of so many bits, from zero on, whose products with a scale have an offset added."""
    return Grid(f"uint{bits}", kind="affine", bits=bits, values=np.arange(1 << bits, dtype=np.float32))
