"""What an ablation is asked for and what it measures, and the checks that all of its forms share."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ablate_shards.errors import DirectionsError, PlanError
from ablate_shards.kernels.reference import Preserve

__all__ = [
    "AMPLIFICATION",
    "ORTHONORMAL",
    "Measure",
    "ProjectOptions",
    "ProjectReport",
    "check_fit",
    "checked_basis",
    "norm_drift",
]

ORTHONORMAL = 1e-9

AMPLIFICATION = {"BF16": 8.0, "F16": 2.0, "F32": 4.0}
"""How much cancellation may amplify the rounding of float32 before float64 takes over."""


@dataclass(frozen=True, slots=True)
class ProjectOptions:
    """How to ablate.

    Attributes:
        coefficient: 1 removes the component, 2 reflects it.
        preserve: Which norms stay: those of the rows, the columns, or none.
        axis: Where the residual axis lies in the stored matrix: -2 for ``[d, n]``, -1 for ``[n, d]``. Rows
            and columns are always those of ``[d, n]``.
    """

    coefficient: float = 1.0
    preserve: Preserve = "rows"
    axis: int = -2

    def __post_init__(self) -> None:
        """Refuse what has no meaning.

        Raises:
            PlanError: A coefficient that is not finite, an unknown norm or axis.
        """
        if not math.isfinite(self.coefficient):
            raise PlanError(f"coefficient: expected a finite number, found {self.coefficient}")
        if self.preserve not in ("rows", "columns", "none"):
            raise PlanError(f"preserve: expected rows, columns or none, found {self.preserve!r}")
        if self.axis not in (-2, -1):
            raise PlanError(f"residual axis: expected -2 or -1, found {self.axis}")


@dataclass(frozen=True, slots=True, eq=False)
class Measure:
    """What a batch of stored matrices holds of the directions, and the norms an ablation preserves.

    Attributes:
        norms: Norms of the preserved vectors ``[batch, vectors]``, float64; the columns' where
            none are preserved.
        along: Per matrix, the squared norm of its component along the directions.
        total: Per matrix, its squared norm.
        largest: Per matrix, the squared norm of the component of the column that has the largest.
    """

    norms: np.ndarray
    along: tuple[float, ...]
    total: tuple[float, ...]
    largest: tuple[float, ...] = ()

    @classmethod
    def pooled(cls, measures: "Iterable[Measure]") -> "Measure":
        """Return the measure of several batches together, such as one per expert.

        Args:
            measures: At least one, all with equally many vectors.
        """
        parts = list(measures)
        return cls(
            norms=np.concatenate([part.norms for part in parts]),
            along=tuple(value for part in parts for value in part.along),
            total=tuple(value for part in parts for value in part.total),
            largest=tuple(value for part in parts for value in part.largest),
        )

    @property
    def component(self) -> float:
        """Norm of the component along the directions, relative to the norm; 0 for a zero matrix."""
        total = math.fsum(self.total)
        return math.sqrt(math.fsum(self.along) / total) if total != 0 else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class ProjectReport:
    """What :func:`project` did.

    Attributes:
        before: Measured on the input.
        after: Measured on the rounded output.
        drift: Largest relative change of a preserved norm.
        degenerate: Vectors nearly parallel to the directions, whose component was removed without rescaling.
    """

    before: Measure
    after: Measure
    drift: float
    degenerate: int


def checked_basis(basis: np.ndarray) -> np.ndarray:
    """Return directions ``[k, d]`` as contiguous float64.

    Raises:
        DirectionsError: There are none, or their rows are not orthonormal.
    """
    basis = np.ascontiguousarray(basis, np.float64)
    if basis.ndim != 2 or not len(basis):
        raise DirectionsError(f"directions: expected [k, d] with at least one row, found {list(basis.shape)}")
    error = float(np.abs(basis @ basis.T - np.eye(len(basis))).max())
    if not error <= ORTHONORMAL:
        raise DirectionsError(
            f"directions: expected orthonormal rows, found a deviation of {error:.1e}; orthonormalise them in float64"
        )
    return basis


def check_fit(basis: np.ndarray, shape: Sequence[int], axis: int) -> None:
    """Compare directions with a weight.

    Args:
        basis: The directions, ``[k, d]``.
        shape: The weight's, ``[..., rows, cols]``.
        axis: Its residual axis, negative.

    Raises:
        DirectionsError: There are none, or ``d`` is not the length of the residual axis.
    """
    if basis.ndim != 2 or len(basis) == 0 or basis.shape[1] != shape[axis]:
        raise DirectionsError(
            f"directions: expected [k, {shape[axis]}] for a weight of shape {list(shape)} "
            f"with the residual axis {axis}, found {list(basis.shape)}"
        )


def norm_drift(before: Measure, after: Measure) -> float:
    """Return the largest ``|after / before - 1|`` over the vectors whose norm was not zero."""
    present = before.norms > 0
    change = np.abs(after.norms[present] / before.norms[present] - 1)
    return float(change.max(initial=0.0))
