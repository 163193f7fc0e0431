"""Directed rounding of a matrix; ``reference.py`` has the definition. C does it where it was compiled, to the same bit.

Every sum goes down a column in the order of its rows, and no column depends on another, so the result depends neither
on which columns are computed together nor on memory or threads.
"""

from typing import NamedTuple

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid
from ablate_shards.kernels.native import native
from ablate_shards.kernels.rounding.reference import BUCKETS, MOST_POLISHES, MUCH, POLISHES, ROUNDS

__all__ = ["Rounded", "Undone", "round_directed", "round_nearest"]

_TILE = 1 << 16
"""Elements that are best computed at once: their values stay in a cache."""


class Rounded(NamedTuple):
    """What was measured of the columns of a rounded matrix, each ``[n]`` float64.

    Attributes:
        along: Squared norm of the target's component along the directions.
        nearest: The same of the nearest levels.
        total: Squared norm of the target.
        error: Squared norm of what rounding added.
        nearest_error: The same of the nearest levels.
        changed: Codes that are not the source's.
    """

    along: np.ndarray
    nearest: np.ndarray
    total: np.ndarray
    error: np.ndarray
    nearest_error: np.ndarray
    changed: np.ndarray


class Undone(NamedTuple):
    """What rounding to the nearest levels did to the change along the directions, each ``[n]`` float64.

    Attributes:
        asked: Squared norm of the component that the target has beyond the source.
        missed: Squared norm of the component that is missing to that of the target.
    """

    asked: np.ndarray
    missed: np.ndarray


def round_nearest(
    grid: Grid,
    target: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    basis: np.ndarray,
    zeros: np.ndarray | None = None,
) -> tuple[Rounded, Undone]:
    """Put the codes nearest to a matrix in place of those of its source, to see what that undoes.

    Args:
        grid: What the codes mean.
        target: As :func:`round_directed` takes it, as are the rest.
        codes: Receives the result.
        scales: Those of the codes.
        basis: Along what it is measured.
        zeros: Levels of the zero points.
    """
    scales = np.broadcast_to(scales, target.shape)
    zeros = None if zeros is None else np.broadcast_to(zeros, target.shape)
    measures = np.empty((len(Rounded._fields), target.shape[1]))
    undone = np.empty((len(Undone._fields), target.shape[1]))
    width = max(1, _TILE // max(1, len(target)))
    with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
        for start in range(0, target.shape[1], width):
            part = slice(start, start + width)
            around = _around(grid, zeros, part)
            kept = grid.levels_of(codes[:, part])
            columns = _Columns(grid, target[:, part], kept, scales[:, part], around, basis)
            before = grid.values_of(kept, scales[:, part], around)
            asked = _dots(basis, before - target[:, part].astype(np.float64))
            undone[:, part] = _sum(asked**2), _sum(columns.residual**2)
            measures[:, part] = _measured(columns, columns.residual.copy(), columns.error(), codes[:, part])
    return Rounded(*measures), Undone(*undone)


def round_directed(
    grid: Grid,
    target: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    basis: np.ndarray,
    zeros: np.ndarray | None = None,
) -> Rounded:
    """Put the codes of a matrix in place of those of its source, with as little along the directions as there can be.

    Args:
        grid: What the codes mean.
        target: ``[d, n]`` float32, the edited matrix.
        codes: ``[d, n]`` uint8, those of the source, none NaN; receives the result.
        scales: ``[d, n]`` float32, broadcast or not, finite; negative ones of affine codes and tables only.
        basis: ``[k, d]`` float64, orthonormal rows.
        zeros: ``[d, n]`` int8, broadcast or not, the levels of the zero points; None where they are 0. Of affine codes
            the offsets, float32.
    """
    scales = np.broadcast_to(scales, target.shape)
    zeros = None if zeros is None else np.broadcast_to(zeros, target.shape)
    measures = np.empty((len(Rounded._fields), target.shape[1]))
    if not native.round_directed(grid, target, codes, scales, zeros, basis, measures):
        width = max(1, _TILE // max(1, len(target)))
        with np.errstate(over="ignore", under="ignore", invalid="ignore", divide="ignore"):
            for start in range(0, target.shape[1], width):
                part = slice(start, start + width)
                around = _around(grid, zeros, part)
                measures[:, part] = _round(grid, target[:, part], codes[:, part], scales[:, part], around, basis)
    return Rounded(*measures)


def _around(grid: Grid, zeros: np.ndarray | None, part: slice) -> np.ndarray | None:
    """Return the zero points of some columns, such that levels and they can be subtracted."""
    if zeros is None or grid.kind == "affine":
        return None if zeros is None else zeros[:, part]
    return zeros[:, part].astype(np.int16)


def _round(
    grid: Grid,
    target: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    basis: np.ndarray,
) -> Rounded:
    columns = _Columns(grid, target, grid.levels_of(codes), scales, zeros, basis)
    nearest = columns.residual.copy()
    nearest_error = columns.error()
    _take_rounds(columns)
    _polish(columns)
    return _measured(columns, nearest, nearest_error, codes)


def _measured(columns: "_Columns", nearest: np.ndarray, nearest_error: np.ndarray, codes: np.ndarray) -> Rounded:
    """Puts the levels of columns in place of codes, and returns what was measured of them."""
    chosen = columns.grid.codes_of(columns.levels, codes)
    changed = np.count_nonzero(chosen != codes, axis=0)
    codes[...] = chosen
    return Rounded(
        along=_sum(columns.along**2),
        nearest=_sum((columns.along + nearest) ** 2),
        total=columns.total,
        error=columns.error(),
        nearest_error=nearest_error,
        changed=changed,
    )


class _Columns:
    """Columns on their way from the nearest levels to those that are chosen.

    Attributes:
        grid: What the codes mean.
        target: ``[d, n]`` float32.
        scales: Likewise.
        zeros: ``[d, n]`` int16, the levels of the zero points; None where they are 0. Of affine codes float32.
        basis: ``[k, d]`` float64.
        levels: ``[d, n]`` int16.
        values: ``[d, n]`` float32, what the levels stand for.
        along: ``[k, n]`` float64, the target's component.
        total: ``[n]`` float64, the target's squared norm.
        residual: ``[k, n]`` float64, what rounding adds to the component.
        nothing: ``[n]`` float64, below which a residual is as good as none.
    """

    def __init__(
        self,
        grid: Grid,
        target: np.ndarray,
        kept: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None,
        basis: np.ndarray,
    ) -> None:
        self.grid, self.target, self.scales, self.zeros, self.basis = grid, target, scales, zeros, basis
        self.levels = grid.levels_nearest_to(target, kept, scales, zeros)
        self.values = grid.values_of(self.levels, scales, zeros)
        wide = target.astype(np.float64)
        self.along, self.total = _dots(basis, wide), _sum(wide * wide)
        self.residual = _dots(basis, self.values - wide)
        self.nothing = grid.nothing * np.sqrt(self.total)

    def error(self) -> np.ndarray:
        """Return the squared norm of what rounding added, ``[n]`` float64."""
        off = self.values.astype(np.float64) - self.target
        return _sum(off * off)

    def size(self) -> np.ndarray:
        """Return the norm of the residual, ``[n]`` float64."""
        size: np.ndarray = np.sqrt(_sum(self.residual * self.residual))
        return size

    def moves(self, along: np.ndarray, which: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return for some columns the levels beside theirs against what points along, and their values."""
        scales = self.scales[:, which]
        moved = self.grid.levels_beside(self.levels[:, which], along, scales)
        zeros = None if self.zeros is None else self.zeros[:, which]
        return moved, self.grid.values_of(moved, scales, zeros)


def _take_rounds(columns: _Columns) -> None:
    """Take moves in the order of their price per gain until the residual is covered, as often as that helps."""
    reach = np.full(columns.total.shape, -1.0)
    for _ in range(ROUNDS):
        size = columns.size()
        which = np.flatnonzero(size > np.maximum(reach, columns.nothing))
        if not len(which):
            return
        size = size[which]
        along = _along(columns.basis, columns.residual[:, which] / size)
        moved, beside = columns.moves(along, which)
        step = beside - columns.values[:, which]
        gains = np.abs(along) * np.abs(step)
        reach[which] = gains.max(axis=0) / len(columns.basis) ** 2
        buckets = _buckets(columns, which, step, gains)
        taken = _cheapest(buckets, gains, size)
        columns.levels[:, which] = np.where(taken, moved, columns.levels[:, which])
        columns.values[:, which] = np.where(taken, beside, columns.values[:, which])
        columns.residual[:, which] += _dots(columns.basis, np.where(taken, step, 0.0))


def _buckets(columns: _Columns, which: np.ndarray, step: np.ndarray, gains: np.ndarray) -> np.ndarray:
    """Return the bucket of each move, by price per gain; of what moves nothing, one that is never reached."""
    off = columns.values[:, which] - columns.target[:, which]
    price = step * (off + off + step)
    norms = np.sqrt(columns.total[which])
    relative = (price / np.where(gains > 0, gains * norms, 1.0)).astype(np.float32)
    # The leading bits of a float: its exponent and a quarter of it.
    bits = (np.maximum(relative, np.float32(0)).view(np.int32) >> 21) - ((127 - 14) << 2)
    return np.where(gains > 0, np.clip(bits, 0, BUCKETS - 1), BUCKETS)


def _cheapest(buckets: np.ndarray, gains: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return which moves are taken: by bucket, then by row, until one would exceed the size."""
    cols = buckets.shape[1]
    sums = np.bincount((buckets * cols + np.arange(cols)).ravel(), gains.ravel(), (BUCKETS + 1) * cols)
    covered = np.cumsum(sums.reshape(BUCKETS + 1, cols), axis=0)
    border = (covered <= size).sum(axis=0)  # a bucket without moves does not count: its sum is that of the one before
    before = np.where(border > 0, np.take_along_axis(covered, np.maximum(border - 1, 0)[None], 0)[0], 0.0)
    at_border = buckets == border
    within = np.cumsum(np.where(at_border, gains, 0.0), axis=0) <= size - before
    taken: np.ndarray = (buckets < border) | (at_border & within)
    return taken & (buckets < BUCKETS)


def _polish(columns: _Columns) -> None:
    """Make the single moves that lower the residual the most, one after the other."""
    which, count = np.arange(len(columns.total)), len(columns.basis)
    heights = (columns.basis**2).sum(axis=0)[:, None]
    much = MUCH * np.sqrt(columns.total)
    for number in range(MOST_POLISHES * count):
        enough = columns.nothing if number < POLISHES * count else much
        which = which[columns.size()[which] > enough[which]]
        if not len(which):
            return
        along = _along(columns.basis, columns.residual[:, which])
        moved, beside = columns.moves(along, which)
        step = beside - columns.values[:, which]
        changes = step * (2 * along + step * heights)
        best = changes.argmin(axis=0)
        each = np.arange(len(which))
        better = changes[best, each] < 0
        best, each, which = best[better], each[better], which[better]
        columns.levels[best, which] = moved[best, each]
        columns.values[best, which] = beside[best, each]
        columns.residual[:, which] += columns.basis[:, best] * step[best, each]


def _dots(basis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Return ``R`` times columns, ``[k, n]`` float64, summed in the order of the rows."""
    return np.stack([_sum(line[:, None] * values) for line in basis])


def _along(basis: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the sum of the directions with weights ``[k, n]``, as columns ``[d, n]`` float64."""
    summed: np.ndarray = basis[0][:, None] * weights[0]
    for line, weight in zip(basis[1:], weights[1:], strict=True):
        summed += line[:, None] * weight
    return summed


def _sum(values: np.ndarray) -> np.ndarray:
    """Return the sum down each column, ``[n]``, in the order of the rows; NumPy adds up a single one in pairs."""
    summed: np.ndarray = values.sum(axis=0) if values.shape[1] > 1 else np.add.accumulate(values, axis=0)[-1]
    return summed
