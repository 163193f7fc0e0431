"""What the update of preserved vectors needs, and which of them float32 cannot update; ``docs/math.md`` derives it."""

import math
from types import ModuleType
from typing import NamedTuple

from ablate_shards.kernels.form import Array, Float32Limits, extremes
from ablate_shards.kernels.reference import DEGENERATE

__all__ = ["Factors", "column_factors", "heights", "inverse", "row_factors"]


class Factors(NamedTuple):
    """What the update of preserved vectors needs.

    Attributes:
        scale: ``[matrices, vectors]``; None where they are not rescaled.
        factor: What the directions, or ``Q``, are multiplied by: ``[matrices, k, vectors]``.
        doubtful: Vectors for which float32 is not accurate enough; None if there are none, as below.
        parallel: Vectors too close to the directions to be rescaled.
        still: Vectors without a component, whose bytes must not change.
    """

    scale: Array | None
    factor: Array
    doubtful: Array | None = None
    parallel: Array | None = None
    still: Array | None = None


def column_factors(squares: Array, dots: Array, limits: Float32Limits, xp: ModuleType, *, rescale: bool) -> Factors:
    """Return what columns of ``[d, n]`` are updated by.

    Args:
        squares: Their squared norms, ``[matrices, vectors]``.
        dots: ``R w`` of each, ``[matrices, k, vectors]``.
        limits: The coefficient, and where float64 takes over.
        xp: ``numpy`` or ``torch``.
        rescale: Whether they keep their norms.
    """
    alpha = limits.coefficient
    along = (dots * dots).sum(1) / squares
    ratio = 1 - (2 * alpha - alpha**2) * along
    return _factors(squares, along, ratio, alpha * dots, limits, xp, rescale=rescale)


def row_factors(
    squares: Array, basis: Array, gram: Array, dots: Array, limits: Float32Limits, xp: ModuleType
) -> Factors:
    """Return what rows of ``[d, n]`` that keep their norms are updated by.

    Args:
        squares: Their squared norms, ``[matrices, vectors]``.
        basis: The directions, ``[1, k, vectors]``.
        gram: ``Q Qᵀ``, ``[matrices, k, k]``.
        dots: ``Q w`` of each, ``[matrices, k, vectors]``.
        limits: The coefficient, and where float64 takes over.
        xp: ``numpy`` or ``torch``.
    """
    alpha = limits.coefficient
    along = heights(basis, gram, xp)
    cross = (basis * dots).sum(1) * inverse(squares, xp)
    ratio = 1 - 2 * alpha * cross + alpha**2 * along
    factor = alpha * basis * xp.sqrt(squares)[:, None]
    return _factors(squares, along, ratio, factor, limits, xp, rescale=True)


def heights(basis: Array, gram: Array, xp: ModuleType) -> Array:
    """Return ``R_iᵀ Q Qᵀ R_i`` of directions ``[1, k, vectors]`` and a gram ``[matrices, k, k]``."""
    # Not a matrix product, which may take several threads and then add in another order.
    mixed = sum(gram[:, :, line, None] * basis[:, line, None] for line in range(basis.shape[1]))
    return xp.clip((mixed * basis).sum(1), 0, None)


def inverse(squares: Array, xp: ModuleType) -> Array:
    """Return one over the norms, 0 for a norm of 0."""
    # A root and a division are rounded alike by every library and CPU; a power is not.
    return xp.where(squares > 0, 1 / xp.sqrt(squares), 0.0)


def _factors(
    squares: Array, along: Array, ratio: Array, factor: Array, limits: Float32Limits, xp: ModuleType, *, rescale: bool
) -> Factors:
    """Find the vectors that are doubtful, parallel or still, and the scale of the others.

    Args:
        squares: Squared norms before.
        along: Squared norms of what is removed, relative to these, for a coefficient of 1.
        ratio: Squared norms of what is left, relative to these.
        factor: What is removed is multiplied by, before any rescaling.
        limits: The coefficient, and where float64 takes over.
        xp: ``numpy`` or ``torch``.
        rescale: Whether the vectors keep their norms.
    """
    if _is_calm(squares, along, ratio, limits):
        if not rescale:
            return Factors(None, factor)
        scale = 1 / xp.sqrt(ratio)
        return Factors(scale, factor * scale[:, None])
    present = squares > 0
    ratio = xp.where(present, ratio, 1.0)
    grown = 1 + abs(limits.coefficient) * xp.sqrt(along)
    doubtful = present & (grown**2 > limits.amplification**2 * ratio)
    doubtful |= squares > limits.largest_norm**2
    still = (along == 0) | ~present
    if not rescale:
        return Factors(None, factor, _some(doubtful), None, _some(still))
    parallel = ratio < DEGENERATE
    scale = xp.where(parallel, 1.0, 1 / xp.sqrt(ratio))
    return Factors(scale, factor * scale[:, None], _some(doubtful), _some(parallel), _some(still))


def _is_calm(squares: Array, along: Array, ratio: Array, limits: Float32Limits) -> bool:
    """Whether no vector is doubtful, parallel or still, as the extremes alone show."""
    if 0 in squares.shape:
        return False
    smallest, largest = extremes(squares)
    least, most = extremes(along)
    grown = 1 + abs(limits.coefficient) * math.sqrt(most) if least > 0 else math.inf
    lowest = max(DEGENERATE, grown**2 / limits.amplification**2)
    return smallest > 0 and largest <= limits.largest_norm**2 and float(ratio.min()) >= lowest


def _some(mask: Array) -> Array | None:
    return mask if mask.any() else None
