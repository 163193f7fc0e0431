"""Vectors and spans of rows, in float64."""

import numpy as np

__all__ = ["LARGEST", "NOTHING_LEFT", "orthonormal", "project_out", "smallest_singular_value", "unit"]

NOTHING_LEFT = 1e-6


def project_out(vectors: np.ndarray, axes: np.ndarray) -> np.ndarray:
    """Removes orthonormal axes ``[m, d]`` from vectors ``[..., d]``."""
    rest: np.ndarray = vectors - (vectors @ axes.T) @ axes
    return rest


def orthonormal(rows: np.ndarray) -> np.ndarray:
    """Returns an orthonormal basis of the rows' span; the first row keeps its direction."""
    q, r = np.linalg.qr(rows.T)
    return np.ascontiguousarray((q * np.where(np.diag(r) < 0, -1.0, 1.0)).T)


def smallest_singular_value(rows: np.ndarray) -> float:
    """Returns the smallest singular value."""
    return float(np.linalg.svd(rows, compute_uv=False)[-1])


def unit(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors ``[..., d]`` to norm 1; zero stays zero."""
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norms > 0, norms, 1)


LARGEST = float(np.finfo(np.float32).max)
