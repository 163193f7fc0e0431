"""Says what kind of edit a difference is, from what was measured of the matrices of a tensor."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from ablate_shards.surgery.diff.differences import AblationFit, DiffKind, TensorDiff

if TYPE_CHECKING:
    from ablate_shards.kernels.measure.sketch import Change, Fit

__all__ = ["Explained", "explain"]

#: What share of the values is few, and how many are in any tensor but a short vector.
_FEW, _FEW_ANYWAY, _SHORT = 1e-3, 4, 64
#: Least share of the energy in the first singular values where these make a pattern.
_PATTERN = 0.5
_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Explained:
    """A difference whose kind is known.

    Attributes:
        tensor: The difference.
        bases: Directions that it lies along, each ``[k, d]`` float64 of one axis: the one that an ablation took
            out, or else the first singular vectors of either side.
    """

    tensor: TensorDiff
    bases: tuple[np.ndarray, ...] = ()


def explain(blank: TensorDiff, changes: Sequence["Change"]) -> Explained:
    """Says what kind of difference the changes of a tensor's values are.

    Args:
        blank: The tensor, without what was measured.
        changes: What was measured of the vector or matrix; of a stack, of each matrix that differs.
    """
    counted = _pool(blank, changes)
    moved = () if counted.nonfinite else tuple(_Moved(one, one.fit) for one in changes if one.energy and one.fit)
    measured = _Measured(
        _spectrum(counted, moved) if moved else counted,
        energy=sum(change.energy for change in changes),
        ablation=_ablation(moved) if moved else None,
    )
    kind = next(kind for kind, applies in _KINDS if applies(measured))
    tensor = replace(measured.tensor, kind=kind, ablation=measured.ablation if kind == "ablation" else None)
    return Explained(tensor, _bases(kind, moved))


@dataclass(frozen=True, slots=True)
class _Moved:
    """A matrix that changed, and what was fitted to its change."""

    change: "Change"
    fit: "Fit"


@dataclass(frozen=True, slots=True)
class _Measured:
    """All that was measured of a difference, before its kind is known.

    Attributes:
        tensor: The tensor with its measures; those of the spectrum only of finite matrices that changed.
        energy: Squared norm of the difference.
        ablation: The ablation that explains its low-rank part, if one does.
    """

    tensor: TensorDiff
    energy: float
    ablation: AblationFit | None

    @property
    def retyped(self) -> bool:
        """Whether it has another dtype."""
        return self.tensor.dtype != self.tensor.new_dtype

    @property
    def is_vector(self) -> bool:
        """Whether no rank was measured."""
        return self.tensor.rank is None

    @property
    def full_rank(self) -> bool:
        """Whether no low rank explains the difference."""
        return not self.is_vector and self.tensor.form is None

    @property
    def patterned(self) -> bool:
        """Whether a few singular values make up most of the difference, as those of rounding do not."""
        return not self.full_rank and bool(self.tensor.rank) and sum(self.tensor.shares) > _PATTERN

    @property
    def few(self) -> bool:
        """Whether few values changed."""
        return self.tensor.changed <= max(_FEW_ANYWAY, _FEW * self.tensor.elements)


#: What makes a difference of values one of a kind. The first kind that applies is the tensor's.
_KINDS: tuple[tuple[DiffKind, Callable[[_Measured], bool]], ...] = (
    # Nothing else that was measured holds for values that are no numbers.
    ("non-finite", lambda it: it.tensor.nonfinite > 0),
    ("retyped", lambda it: not it.energy and it.retyped),
    # Equal values of unequal bytes, as a zero has two signs; or differences so small that their squares vanish.
    ("rounding", lambda it: not it.energy),
    # An edit may stay below a unit everywhere and is told by its pattern; across dtypes rounding itself has patterns.
    ("rounding", lambda it: not it.tensor.beyond and (it.retyped or not it.patterned)),
    # A few changed values are of low rank as well; in a short vector four are not few.
    ("sparse", lambda it: it.few and not (it.is_vector and it.tensor.elements <= _SHORT)),
    ("vector", lambda it: it.is_vector),
    # One matrix of a stack is enough.
    ("full-rank", lambda it: it.full_rank),
    # Some values are off by more than a unit, but all of them together by no more than rounding explains.
    ("rounding", lambda it: it.tensor.rank == 0 and it.tensor.form == "plain"),
    ("scaled", lambda it: it.tensor.rank == 0),
    ("ablation", lambda it: it.ablation is not None),
    ("low-rank", lambda _: True),
)


def _pool(blank: TensorDiff, changes: Sequence["Change"]) -> TensorDiff:
    """Puts together what was counted in the matrices of a tensor."""
    energy = sum(change.energy for change in changes)
    before = sum(change.before for change in changes)
    return replace(
        blank,
        changed=sum(change.changed for change in changes),
        beyond=sum(change.beyond for change in changes),
        units=max(change.units for change in changes),
        largest=max(change.largest for change in changes),
        nonfinite=sum(change.nonfinite for change in changes),
        relative=math.sqrt(energy / before) if before else None,
    )


def _spectrum(counted: TensorDiff, moved: Sequence[_Moved]) -> TensorDiff:
    """Adds form and rank of a difference, and how far it kept norms: the highest rank, the values of the loudest."""
    fits = [one.fit for one in moved]
    forms = {fit.form for fit in fits}
    loudest = _loudest(moved).fit
    first = float(loudest.values[0].square())
    energy = sum(fit.energy for fit in fits)
    length = min(_SHOWN, *(len(fit.values) for fit in fits))
    shares = np.sum([fit.values[:length].square().numpy() for fit in fits], axis=0) / (energy or 1.0)
    kept = {
        "rows": all(one.change.rows_kept for one in moved),
        "columns": all(one.change.columns_kept for one in moved),
    }
    return replace(
        counted,
        form=None if "full" in forms else min(forms - {"plain"}, default="plain"),
        rank=max(fit.rank for fit in fits),
        stable_rank=loudest.energy / first if first else None,
        values=tuple(loudest.values[:_SHOWN].tolist()),
        shares=tuple(shares.tolist()) if energy else (),
        row_drift=max(one.change.row_drift or 0.0 for one in moved),
        column_drift=max(one.change.column_drift or 0.0 for one in moved),
        kept=tuple(name for name, keeps in kept.items() if keeps),
    )


def _ablation(moved: Sequence[_Moved]) -> AblationFit | None:
    """Returns the ablation along one axis that explains every change of low rank, if one does."""
    best = _loudest(moved).change.projection
    low_rank = [one.change for one in moved if one.fit.rank]
    explained = [(one.projection, one.energy) for one in low_rank if one.projection is not None]
    if best is None or len(explained) < len(low_rank):
        return None
    if not all(found.axis == best.axis and found.explains != "no" for found, _ in explained):
        return None
    coefficients, weights = zip(*((found.coefficient, energy) for found, energy in explained), strict=True)
    return AblationFit(
        axis=best.axis,
        coefficient=float(np.average(coefficients, weights=weights)),
        cosine=min(found.cosine for found, _ in explained),
        same_direction=1.0,
        in_codes=any(found.explains == "in codes" for found, _ in explained),
    )


def _bases(kind: DiffKind, moved: Sequence[_Moved]) -> tuple[np.ndarray, ...]:
    """Returns the directions that the matrix that changed most was changed along."""
    if kind not in ("ablation", "low-rank", "full-rank"):
        return ()
    loudest = _loudest(moved)
    if kind == "ablation" and loudest.change.projection is not None:
        return (loudest.change.projection.basis.numpy(),)
    return tuple(side[:, :1].T.contiguous().numpy() for side in (loudest.fit.left, loudest.fit.right))


def _loudest(moved: Sequence[_Moved]) -> _Moved:
    return max(moved, key=lambda one: one.change.energy)
