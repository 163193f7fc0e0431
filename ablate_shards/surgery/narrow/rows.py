"""What an edit reads from a writer's inputs, made blind to inputs that are to be kept: see ``docs/narrow.md``."""

import math
from typing import NamedTuple

import numpy as np

__all__ = ["Inputs", "Narrowed", "narrow_rows"]

#: Of the mean eigenvalue of the kept inputs' second moment, what is added to each: directions that no kept prompt
#: happened to use are not free.
_DAMPING = 1e-2
#: Of the largest ratio of contested to kept, what a direction has at least; below is rounding.
_LEAST_RATIO = 1e-9


class Inputs(NamedTuple):
    """What a writer is given.

    Attributes:
        contested: Where the model answers contested prompts, ``[N, n]``.
        kept: The second moment where it answers prompts that are to be kept, mean of ``x xᵀ``, ``[n, n]``.
    """

    contested: np.ndarray
    kept: np.ndarray


class Narrowed(NamedTuple):
    """Rows that do to contested inputs what others do, and as little as can be to kept ones.

    Attributes:
        rows: The rows, ``[k, n]`` float64.
        contested: Root mean square over contested inputs of what they make, over that of the rows before.
        kept: The same over kept inputs.
    """

    rows: np.ndarray
    contested: float
    kept: float


def narrow_rows(rows: np.ndarray, inputs: Inputs, rank: int) -> Narrowed:
    """Returns rows of which an input sees only its part along the directions that set contested inputs apart.

    With P and U the second moments of contested and kept inputs, those are the generalised eigenvectors v with the
    largest vᵀPv for vᵀUv = 1 (as in common spatial patterns, Koles 1991), and the rows are multiplied by the oblique
    projection Σ (Uv) vᵀ onto them. They follow from the contested inputs, of which there are fewer than dimensions.
    In float64.

    Args:
        rows: What the edit reads, ``[k, n]``.
        inputs: What the writer is given.
        rank: How many of the directions are left.
    """
    rows, kept = rows.astype(np.float64), inputs.kept.astype(np.float64)
    contested = inputs.contested.astype(np.float64) / math.sqrt(max(1, len(inputs.contested)))
    damping = _DAMPING * float(np.trace(kept)) / len(kept) or 1.0
    diagonal = np.diagonal(kept).copy()
    np.fill_diagonal(kept, diagonal + damping)
    solved = np.linalg.solve(kept, contested.T)
    np.fill_diagonal(kept, diagonal)
    ratios, vectors = np.linalg.eigh(contested @ solved)
    ratios, vectors = ratios[-rank:], vectors[:, -rank:]
    found = ratios > max(_LEAST_RATIO * ratios[-1], 0)
    scaled = vectors[:, found] / np.sqrt(ratios[found])
    narrowed = rows @ (contested.T @ scaled) @ (solved @ scaled).T

    def share(moment: np.ndarray) -> float:
        after, before = (float(np.sum((which @ moment) * which)) for which in (narrowed, rows))
        return math.sqrt(max(after, 0) / before) if before > 0 else 0.0

    return Narrowed(narrowed, share(contested.T @ contested), share(kept))
