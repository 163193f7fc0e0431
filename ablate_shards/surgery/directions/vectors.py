"""Vectors and spans of rows, in float64."""

from collections.abc import Iterable

import numpy as np

__all__ = [
    "LARGEST",
    "NOTHING_LEFT",
    "orthogonal_to",
    "orthonormal",
    "project_out",
    "smallest_singular_value",
    "span",
    "unit",
]

NOTHING_LEFT = 1e-6


def project_out(vectors: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Removes orthonormal axes ``[m, d]`` from vectors ``[..., d]``."""
    rest: np.ndarray = vectors - (vectors @ axes.T) @ axes
    return rest


def orthonormal(rows: np.ndarray) -> np.ndarray:
    """Returns an orthonormal basis of the rows' span; the first row keeps its direction."""
    q, r = np.linalg.qr(rows.T)
    return np.ascontiguousarray((q * np.where(np.diag(r) < 0, -1.0, 1.0)).T)


def span(vectors: Iterable[np.ndarray], size: int) -> np.ndarray:
    """Returns an orthonormal basis ``[m, size]`` of what vectors span; zero and repeated ones do not count."""
    axes = np.empty((0, size))
    for vector in vectors:
        rest = project_out(unit(vector.astype(np.float64)), axes)
        if np.linalg.norm(rest) > NOTHING_LEFT:
            axes = np.vstack([axes, unit(project_out(unit(rest), axes))])
    return axes


def orthogonal_to(axes: np.ndarray, basis: np.ndarray) -> tuple[np.ndarray, float]:
    """Makes directions orthogonal to axes, by Gram-Schmidt in two passes, and orthonormal again.

    Args:
        axes: ``[m, d]`` float64, orthonormal rows.
        basis: ``[k, d]``, orthonormal rows.

    Returns:
        ``[k, d]`` float64 with orthonormal rows, and the smallest norm that was left of a direction; below
        ``NOTHING_LEFT`` the rows mean nothing.
    """
    rest = project_out(basis.astype(np.float64), axes)
    return orthonormal(project_out(orthonormal(rest), axes)), smallest_singular_value(rest)


def smallest_singular_value(rows: np.ndarray) -> float:
    """Returns the smallest singular value."""
    return float(np.linalg.svd(rows, compute_uv=False)[-1])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors ``[..., d]`` to norm 1; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


LARGEST = float(np.finfo(np.float32).max)
