"""Directed rounding by definition, for comparison: column by column, in float64."""

import math

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid

__all__ = ["BUCKETS", "MOST_POLISHES", "MUCH", "POLISHES", "ROUNDS", "bucket_of", "round_by_definition"]

ROUNDS = 12
"""How often moves are taken in the order of their price at most."""

POLISHES = 8
"""How many best single moves follow for each direction at most, unless much is left."""

MOST_POLISHES = 40
"""How many follow at most where much is left, as of several directions in four bits."""

MUCH = 1e-5
"""Residual, relative to the norm of the column, that is much."""

BUCKETS = 64
"""Prices are told apart to a quarter of a power of two, from 2**-14 to 4 times the norm of the column."""


def bucket_of(price: float) -> int:
    """Return the bucket of a price per gain, relative to the norm of the column."""
    return 0 if price <= 0 else min(max(math.floor(_quarters(price)) + 4 * 14, 0), BUCKETS - 1)


def round_by_definition(
    grid: Grid,
    target: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    basis: np.ndarray,
    zeros: np.ndarray | None = None,
) -> np.ndarray:
    """Return the levels that stand for a matrix with as little error along the directions as there can be.

    Every column starts from the nearest levels. ``r = R (v - t)`` is what rounding adds along the directions, ``v``
    being the rounded column and ``t`` the target. Along ``u = r / |r|`` every element has one move, to the next level
    on the side that lowers ``u r``, by the gain ``|(uR)_i| |v'_i - v_i|``, for the price ``(v'_i - t_i)² - (v_i -
    t_i)²``. Moves are taken in the order of price per gain (in buckets, and in a bucket by row) until one would
    exceed ``|r|``; that is a round, and rounds go on while ``|r|`` is more than the largest gain. Then the single moves
    that lower ``|r|`` the most are made one by one.

    Args:
        grid: What the codes mean.
        target: ``[d, n]`` float32.
        codes: ``[d, n]`` uint8, those of the source; a column whose scale is 0 keeps them.
        scales: ``[d, n]`` float32, finite; negative ones of affine codes and tables only.
        basis: ``[k, d]`` float64, orthonormal rows.
        zeros: ``[d, n]`` int8, the levels of the zero points; None where they are 0. Of affine codes the offsets,
            float32.
    """
    result = np.empty(target.shape, np.int16)
    for column in range(target.shape[1]):
        t, s = target[:, column], scales[:, column]
        z = None if zeros is None else zeros[:, column]
        z = z if z is None or grid.kind == "affine" else z.astype(np.int16)
        start = grid.levels_nearest_to(t, grid.levels_of(codes[:, column]), s, z)
        result[:, column] = _round_column(grid, t, start, s, z, basis)
    return result


def _round_column(
    grid: Grid,
    target: np.ndarray,
    levels: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    basis: np.ndarray,
) -> np.ndarray:
    t, norm = target.astype(np.float64), math.sqrt(float((target.astype(np.float64) ** 2).sum()))

    def values(levels: np.ndarray) -> np.ndarray:
        return grid.values_of(levels, scales, zeros).astype(np.float64)

    def beside(along: np.ndarray) -> np.ndarray:
        return grid.levels_beside(levels, along, scales)

    def residual() -> np.ndarray:
        found: np.ndarray = basis @ (values(levels) - t)
        return found

    reach = -1.0
    for _ in range(ROUNDS):
        r = residual()
        size = float(np.linalg.norm(r))
        if size <= max(reach, grid.nothing * norm):
            break
        along = (r / size) @ basis
        moved = beside(along)
        v, w = values(levels), values(moved)
        gains = np.abs(along) * np.abs(w - v)
        reach = float(gains.max()) / len(basis) ** 2
        price = ((w - t) ** 2 - (v - t) ** 2) / np.where(gains > 0, gains, 1)
        order = sorted((bucket_of(price[row] / norm), row) for row in np.flatnonzero(gains > 0))
        covered = 0.0
        for _, row in order:
            covered += gains[row]
            if covered > size:
                break
            levels[row] = moved[row]
    for step in range(MOST_POLISHES * len(basis)):
        r = residual()
        if np.linalg.norm(r) <= (grid.nothing if step < POLISHES * len(basis) else MUCH) * norm:
            break
        along = r @ basis
        moved = beside(along)
        steps = values(moved) - values(levels)
        changes = steps * (2 * along + steps * (basis**2).sum(0))
        best = int(changes.argmin())
        if changes[best] >= 0:
            break
        levels[best] = moved[best]
    return levels


def _quarters(price: float) -> float:
    """Return four times the logarithm to base 2, linear between powers of two: what the leading bits of a float say."""
    fraction, exponent = math.frexp(price)
    return 4 * (exponent - 1) + math.floor(8 * fraction - 4)
