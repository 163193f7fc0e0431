"""The best update ``B·A`` of a low rank for what an edit adds to a matrix, in passes over row blocks.

``Δ = W' − W`` is ``[d, n]``, ``R`` is ``[k, d]`` with orthonormal rows. The part of the difference along ``R``,
``RᵀRΔ``, has rank ``k`` and is taken as it is, so that ``R(W + B·A) = RW'``; what is left, ``M = (I − RᵀR)Δ``, is
approximated within the complement of ``R`` by a randomised singular value decomposition with one step of subspace
iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4)::

    first pass    Z = MᵀΩ        Ω random, in the complement of R    Q = orth(Z)
    second pass   Y = MQ         [d, l]                              T = orth(Y)
    third pass    G = TᵀM        [l, n]                              U Σ Vᵀ = svd(G), B = T U √Σ, A = √Σ Vᵀ

Everything is float64; the sketch depends on the shape alone, so that the same matrices give the same factors. What is
missing is known without another pass: ``|M|² − Σσ²``.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeAlias

import numpy as np

__all__ = ["Blocks", "LowRank", "Merged", "approximate", "measure"]

Blocks: TypeAlias = Callable[[], Iterator[tuple[int, np.ndarray, np.ndarray]]]
"""Goes over a matrix once, always in the same blocks: the first stored row, ``W`` and ``W'`` of the rows from there on,
``[rows, cols]`` float32."""

#: Columns of the sketch beyond the rank that is wanted.
_OVERSAMPLING = 8
_SEED = 20_260_101


class LowRank(NamedTuple):
    """An update ``B·A``, and what it leaves out.

    Attributes:
        up: B, ``[d, r]`` float64.
        down: A, ``[r, n]`` float64.
        energy: Squared norm of the difference.
        missing: Squared norm of what of the difference the update lacks.
    """

    up: np.ndarray
    down: np.ndarray
    energy: float
    missing: float

    @property
    def error(self) -> float:
        """Norm of what is missing, relative to the difference; 0 where there is none."""
        return math.sqrt(self.missing / self.energy) if self.energy > 0 else 0.0


class Merged(NamedTuple):
    """Squared norms of a matrix before and after an edit, and with the update in its place.

    Attributes:
        total: Of W.
        along: Of ``RW``.
        edited: Of W'.
        edited_along: Of ``RW'``.
        merged: Of ``W + B·A``, rounded to what the matrix is stored in.
        merged_along: Of R times that.
        left: Of R times the difference between that and W': what of the component the update leaves and the edit
            does not.
        energy: Of the edit's difference, W' - W.
        missing: Of what the update lacks of it, W' - W - B·A, before any rounding.
    """

    total: float
    along: float
    edited: float
    edited_along: float
    merged: float
    merged_along: float
    left: float
    energy: float
    missing: float


def approximate(blocks: Blocks, shape: tuple[int, int], axis: int, basis: np.ndarray | None, rank: int) -> LowRank:
    """Return the update of a rank that comes closest to a difference, its part along the directions exact.

    Args:
        blocks: The stored matrices, ``[d, n]`` or ``[n, d]``.
        shape: ``d`` and ``n``.
        axis: Where the residual axis lies in the stored matrices: -2 for ``[d, n]``, -1 for ``[n, d]``.
        basis: ``[k, d]`` float64, orthonormal rows; None where no direction is to be kept exact.
        rank: The rank, at least ``k``; the update has a lower one where a side of the matrix is shorter.
    """
    d, n = shape
    basis = np.empty((0, d)) if basis is None else basis
    most = min(d - len(basis), n)
    wanted = max(0, min(rank - len(basis), most))
    width = min(wanted + _OVERSAMPLING, most) if wanted else 0
    sketch = _within_complement(np.random.default_rng((_SEED, d, n)).standard_normal((d, width)), basis)
    passes = _Passes(blocks, shape, axis)
    images = passes.left(np.hstack([basis.T, sketch]))
    along, energy = images[: len(basis)], passes.energy
    kept = float(np.sum(along * along))
    scale = np.sqrt(np.linalg.norm(along, axis=1))
    # Both factors of the same size: neither loses more than the other where they are rounded.
    scale = np.where(scale > 0, scale, 1.0)
    up, down = basis.T * scale, along / scale[:, None]
    missing = max(0.0, energy - kept)
    if not width:
        return LowRank(up, down, energy, missing)
    right = np.linalg.qr(images[len(basis) :].T)[0]
    left = np.linalg.qr(_within_complement(passes.right(right), basis))[0]
    left = np.linalg.qr(_within_complement(left, basis))[0]
    across, square = np.linalg.qr(passes.left(left).T)
    turned, values, inner = np.linalg.svd(square.T)
    top = slice(0, wanted)
    roots = np.sqrt(values[top])
    return LowRank(
        up=np.hstack([up, left @ turned[:, top] * roots]),
        down=np.vstack([down, roots[:, None] * (inner[top] @ across.T)]),
        energy=energy,
        missing=max(0.0, missing - float(np.sum(values[top] ** 2))),
    )


def measure(
    blocks: Blocks,
    shape: tuple[int, int],
    axis: int,
    basis: np.ndarray,
    update: tuple[np.ndarray, np.ndarray],
    rounded: Callable[[np.ndarray], np.ndarray],
) -> Merged:
    """Return what a matrix holds along directions once an update is added to it as peft adds it.

    Blocks are computed in float32 and summed up in float64.

    Args:
        blocks: The stored matrices, ``[d, n]`` or ``[n, d]``.
        shape: ``d`` and ``n``.
        axis: Where the residual axis lies in the stored matrices.
        basis: ``[k, d]`` float64, orthonormal rows.
        update: B, ``[d, r]``, and A, ``[r, n]``, as they are stored.
        rounded: Returns float32 values as the matrix would store them, float32; may overwrite them.
    """
    up, down, thin = (factor.astype(np.float32) for factor in (*update, basis))
    sums = np.zeros((3, len(basis), shape[1]))
    totals, energy, missing = np.zeros(3), 0.0, 0.0
    for first, before, after in blocks():
        rows = slice(first, first + len(before))
        added = up[rows] @ down if axis == -2 else down[:, rows].T @ up.T
        change = after - before
        energy += _square(change)
        change -= added
        missing += _square(change)
        added += before
        for number, values in enumerate((before, after, rounded(added))):
            totals[number] += _square(values)
            if axis == -2:
                sums[number] += thin[:, rows] @ values
            else:
                sums[number, :, rows] = thin @ values.T
    along = np.sum(sums * sums, axis=(1, 2)).tolist()
    left = sums[2] - sums[1]
    total, edited, merged_total = totals.tolist()
    return Merged(
        total, along[0], edited, along[1], merged_total, along[2], float(np.sum(left * left)), energy, missing
    )


def _square(values: np.ndarray) -> float:
    return float(np.vdot(values, values))


class _Passes:
    """Products of the difference with thin matrices, each in one pass over the blocks.

    Attributes:
        energy: Squared norm of the difference, known after a pass.
    """

    def __init__(self, blocks: Blocks, shape: tuple[int, int], axis: int) -> None:
        self._blocks, self._shape, self._stored_first = blocks, shape, axis == -2
        self.energy = 0.0

    def left(self, thin: np.ndarray) -> np.ndarray:
        """Return ``thinᵀ Δ``, ``[l, n]``, of ``[d, l]``."""
        return self._down(thin) if self._stored_first else self._across(thin).T

    def right(self, thin: np.ndarray) -> np.ndarray:
        """Return ``Δ thin``, ``[d, l]``, of ``[n, l]``."""
        return self._across(thin) if self._stored_first else self._down(thin).T

    def _down(self, thin: np.ndarray) -> np.ndarray:
        """Return ``thinᵀ D`` of the stored difference ``D`` ``[rows, cols]``."""
        found = np.zeros((thin.shape[1], self._shape[1] if self._stored_first else self._shape[0]))
        for first, added in self._differences():
            found += thin[first : first + len(added)].T @ added
        return found

    def _across(self, thin: np.ndarray) -> np.ndarray:
        """Return ``D thin`` of the stored difference ``D`` ``[rows, cols]``."""
        found = np.empty((self._shape[0] if self._stored_first else self._shape[1], thin.shape[1]))
        for first, added in self._differences():
            np.matmul(added, thin, out=found[first : first + len(added)])
        return found

    def _differences(self) -> Iterator[tuple[int, np.ndarray]]:
        self.energy = 0.0
        for first, before, after in self._blocks():
            added = np.subtract(after, before, dtype=np.float64)
            self.energy += float(np.vdot(added, added))
            yield first, added


def _within_complement(columns: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Return columns ``[d, l]`` without what of them lies along orthonormal rows ``[k, d]``."""
    found: np.ndarray = columns - basis.T @ (basis @ columns)
    return found
