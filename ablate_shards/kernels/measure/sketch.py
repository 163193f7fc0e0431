"""How one matrix differs from another: the size and rank of the difference, and whether it is an ablation.

The difference is never held whole. Row blocks are read one after another, at most eight times, and the state is
O((rows + columns) · l) for a sketch of ``l`` columns: subspace iteration on the Gram matrix from a seeded Gaussian
start (Halko, Martinsson and Tropp 2011, section 4.5), then Rayleigh–Ritz. Energies are float64, products float32.

Three forms are tried, the simplest first, where ``A`` is the old matrix and ``L`` has low rank:
``B = A + L``, ``B = SA + L`` and ``B = AT + L`` with diagonal ``S`` and ``T``. The last two are what an edit that
keeps the norms of rows or columns leaves behind. For a given column space of ``L`` the scales solve a least-squares
problem per row or column, and the other way round; the two are alternated.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Blocks", "Change", "Fit", "Projection", "Rescaling", "Steps", "Unit", "compare_matrix", "compare_vector"]

Rescaling = Literal["plain", "rows", "columns", "full"]
"""What was rescaled beside the change of low rank: nothing, rows or columns; ``full`` where no low rank explains it."""

Blocks = Callable[[], Iterator[tuple[int, Tensor, Tensor]]]
"""Yields the first row of a block, its old values and what is added to them, float32 ``[rows, n]``, in order."""

_OVERSAMPLE = 8
_SCALED = 8
_TALL = 1 << 14
_ROUNDS = 6
_GAIN = 0.5
_SMALL = (0.3, 0.1)
_STEPS = 0.01
_TINY = 1e-300
_NOISE = 2.5
_EDGE = 1.1
_FLOOR = 1e-6
_PROMISING = 0.8
_CHIEF = 0.85
_ABLATION = 0.9
_ABLATION_IN_CODES, _ABOVE_CHANCE = 0.4, 4.0
_EXPONENT = 0x7F800000
_NORM_NOISE = 16.0
_NORM_FLOOR = 2e-6
_HUGE = 1e12


class Steps(Protocol):
    """How far apart the values are that can be stored near each value."""

    @property
    def allowed(self) -> float:
        """By how many steps rounding may change a value."""

    @property
    def directed(self) -> bool:
        """Whether rounding may leave a pattern of its own beside an edit, as where codes are chosen together."""

    def of(self, first: int, old: Tensor, added: Tensor) -> Tensor:
        """Returns the step at each value of a block, positive; ``first`` is what the block begins with."""


class Unit(NamedTuple):
    """The unit in the last place of a dtype: ``max(2^e · relative, least)`` for a value of exponent ``e``."""

    relative: float
    least: float

    @property
    def allowed(self) -> float:
        """One unit."""
        return 1.0

    @property
    def directed(self) -> bool:
        """Each value is rounded by itself."""
        return False

    def of(self, first: int, old: Tensor, added: Tensor) -> Tensor:
        """Returns the unit at each value of a block."""
        units = torch.maximum(old.abs(), (old + added).abs_())
        units.view(torch.int32).bitwise_and_(_EXPONENT)
        return units.mul_(self.relative).clamp_(min=self.least)


@dataclass(frozen=True, slots=True)
class Projection:
    """An ablation that explains a difference: ``−α RᵀR W`` on one axis, up to the scales of its form.

    Attributes:
        axis: -2 where the columns of the matrix lose the direction, -1 where its rows do.
        coefficient: ``α``; negative where the direction was added.
        cosine: Of the low-rank part and the best such ablation.
        basis: ``R``, ``[k, d]`` float64, orthonormal rows.
        explains: ``exactly`` where the cosine is near one. Where codes were chosen together a change of few bits lies
            in the rows where ``R`` is largest, and these are all of it that is seen; a cosine that is only well above
            what an edit of another kind has by chance explains it ``in codes``. ``no`` else.
    """

    axis: Literal[-2, -1]
    coefficient: float
    cosine: float
    basis: Tensor
    explains: Literal["exactly", "in codes", "no"]


@dataclass(frozen=True, slots=True)
class Fit:
    """The low-rank part of a difference.

    Attributes:
        form: Which scales were undone first; ``full`` where no low rank explains the difference.
        rank: Singular values above what rounding leaves; the length of the sketch where ``full``.
        energy: Squared Frobenius norm of the difference once the scales are undone.
        rest: The part of that energy that lies outside of the sketch.
        values: Singular values, descending, ``[l]`` float64.
        left: ``[rows, k]`` float64, the top left singular vectors.
        right: ``[columns, k]`` float64.
        rows: What each row was multiplied by, ``[rows]`` float64.
        columns: What each column was multiplied by, ``[columns]`` float64.
    """

    form: Rescaling
    rank: int
    energy: float
    rest: float
    values: Tensor
    left: Tensor
    right: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def simple(self) -> bool:
        """Whether one singular value at most explains the difference."""
        return self.form != "full" and self.rank < 2


@dataclass(frozen=True, slots=True)
class Change:
    """How a matrix or vector changed.

    Attributes:
        elements: How many values it has.
        changed: How many differ.
        beyond: How many differ by more steps than rounding may: one unit in the last place, of a dtype.
        units: The largest difference in steps.
        largest: The largest difference.
        nonfinite: How many values are NaN or infinite on either side, or beyond 1e12 where squares overflow; they
            count as changed where they differ, and for nothing else.
        before: Squared norm of the old values.
        energy: Squared norm of the difference.
        row_drift: Largest relative change of a row's norm; None of a vector.
        column_drift: The same of a column's.
        rows_kept: Whether no row's norm changed by more than rounding does.
        columns_kept: The same of the columns.
        fit: The low-rank part; None of a vector.
        projection: The ablation that explains the low-rank part, if one does.
    """

    elements: int
    changed: int
    beyond: int
    units: float
    largest: float
    nonfinite: int
    before: float
    energy: float
    row_drift: float | None = None
    column_drift: float | None = None
    rows_kept: bool = False
    columns_kept: bool = False
    fit: Fit | None = None
    projection: Projection | None = None


def compare_vector(blocks: Blocks, unit: Steps) -> Change:
    """Measures a difference element by element.

    Args:
        blocks: Yields the values, in any shape.
        unit: The steps of what is stored.

    Returns:
        The change, without a fit.
    """
    tally = _Tally(unit)
    before = energy = 0.0
    for first, old, added in blocks():
        old, added, _ = tally.add(first, old, added)
        before += float(old.square().sum(dtype=torch.float64))
        energy += float(added.square().sum(dtype=torch.float64))
    if not math.isfinite(before + energy):
        return compare_vector(partial(_within, blocks), unit)
    return tally.change(before, energy)


def compare_matrix(blocks: Blocks, shape: tuple[int, int], unit: Steps, rank: int) -> Change:
    """Measures a difference and finds its low-rank part.

    Args:
        blocks: Yields the row blocks; called once per pass.
        shape: Rows and columns.
        unit: The steps of what is stored.
        rank: The largest rank to tell; the sketch has eight columns more, and at most half the smaller side.

    Returns:
        The change.
    """
    width = max(1, min(rank + _OVERSAMPLE, min(shape) // 2))
    sums = _Sums(shape, unit)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape[1], width, generator=generator)
    gram = torch.zeros(shape[1], width)
    for first, old, added in blocks():
        clean = sums.add(first, old, added)
        gram.addmm_(clean.T, clean @ start)
    if not (sums.rows.isfinite().all() and sums.columns.isfinite().all() and gram.isfinite().all()):
        return compare_matrix(partial(_within, blocks), shape, unit, rank)
    change = sums.tally.change(float(sums.rows[0].sum()), float(sums.rows[2].sum()))
    if not change.energy:
        return change
    if change.nonfinite:
        blocks = partial(_finite, blocks)
    fit = _best_fit(blocks, sums, _orthonormal(gram))
    kept = sums.drifts()
    return Change(
        **{name: getattr(change, name) for name in _TALLIED},
        row_drift=kept[0][0],
        column_drift=kept[1][0],
        rows_kept=kept[0][1],
        columns_kept=kept[1][1],
        fit=fit,
        projection=_projection_in_codes(blocks, sums, fit) if unit.directed else _projection(blocks, sums, fit),
    )


_TALLIED = ("elements", "changed", "beyond", "units", "largest", "nonfinite", "before", "energy")


def _finite(blocks: Blocks) -> Iterator[tuple[int, Tensor, Tensor]]:
    for first, old, added in blocks():
        wrong = ~torch.isfinite(added)
        yield first, old.masked_fill(wrong, 0.0), added.masked_fill(wrong, 0.0)


def _within(blocks: Blocks) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yields values with NaN where they changed and are too large for sums of squares in float32, zero where not."""
    for first, old, added in blocks():
        wrong = ~((old.abs() < _HUGE) & (added.abs() < _HUGE))
        kept = torch.where(added == 0, 0.0, float("nan"))
        yield first, old.masked_fill(wrong, 0.0), torch.where(wrong, kept, added)


class _Tally:
    """Counts and largest values, element by element."""

    def __init__(self, unit: Steps) -> None:
        self._unit = unit
        self.elements = self.changed = self.beyond = self.nonfinite = 0
        self.units = self.largest = 0.0

    def add(self, first: int, old: Tensor, added: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Counts a block; returns it with zeros for what is not finite, and its steps."""
        size = added.abs()
        self.elements += old.numel()
        self.changed += _count(added != 0)
        largest = float(size.max())
        if not largest < float("inf"):
            wrong = ~torch.isfinite(added)
            self.nonfinite += int(wrong.sum())
            old, added, size = (part.masked_fill(wrong, 0.0) for part in (old, added, size))
            largest = float(size.max())
        self.largest = max(self.largest, largest)
        units = self._unit.of(first, old, added)
        size.div_(units)
        self.units = max(self.units, float(size.max()))
        if self.units > self._unit.allowed:
            self.beyond += _count(size > self._unit.allowed)
        return old, added, units

    def change(self, before: float, energy: float) -> Change:
        """Returns what was counted."""
        return Change(
            self.elements,
            self.changed,
            self.beyond,
            self.units,
            self.largest,
            self.nonfinite,
            before,
            energy,
        )


def _count(mask: Tensor) -> int:
    """Counts like ``torch.count_nonzero``, ten times as fast."""
    return int(np.count_nonzero(mask.numpy()))


class _Sums:
    """Sums along rows and columns: old squares, products, squares of what was added, squares of rounding."""

    def __init__(self, shape: tuple[int, int], unit: Steps) -> None:
        self.tally = _Tally(unit)
        self.rows = torch.zeros(4, shape[0], dtype=torch.float64)
        self.columns = torch.zeros(4, shape[1], dtype=torch.float64)

    def add(self, first: int, old: Tensor, added: Tensor) -> Tensor:
        """Adds a block and returns what was added in it, finite everywhere."""
        old, added, units = self.tally.add(first, old, added)
        scratch = torch.empty_like(old)
        rows = slice(first, first + len(old))
        for number, (one, other) in enumerate(((old, old), (old, added), (added, added), (units, units))):
            torch.mul(one, other, out=scratch)
            self.rows[number, rows] = scratch.sum(1).double()
            self.columns[number] += scratch.sum(0)
        return added

    @property
    def energy(self) -> float:
        """Squared norm of the difference."""
        return float(self.rows[2].sum())

    @property
    def noise(self) -> float:
        """Squared norm of what rounding is expected to add: a twelfth of a squared unit per element."""
        return float(self.rows[3].sum()) / 12

    @property
    def edge(self) -> float:
        """Largest singular value that rounding is expected to leave (Bandeira and van Handel 2016)."""
        return _EDGE * float((self.rows[3].max() / 12).sqrt() + (self.columns[3].max() / 12).sqrt())

    def drifts(self) -> tuple[tuple[float, bool], tuple[float, bool]]:
        """Returns the largest relative change of a norm and whether rounding explains it, of rows and of columns."""
        found = []
        for sums, length in ((self.rows, self.columns.shape[1]), (self.columns, self.rows.shape[1])):
            old, product, added, units = sums[:, sums[0] > 0]
            drift = ((1 + (2 * product + added) / old).clamp(min=0).sqrt() - 1).abs()
            allowed = _NORM_NOISE * (units / 12 / length / old).sqrt() + _NORM_FLOOR
            found.append((float(drift.max()) if len(drift) else 0.0, bool((drift <= allowed).all())))
        return found[0], found[1]


def _chief(fit: Fit) -> int:
    """Returns how many singular values hold nearly all of the energy of the low-rank part."""
    energies = fit.values[: fit.rank].square().cumsum(0)
    return int((energies < _CHIEF * energies[-1]).sum()) + 1 if len(energies) else 0


def _best_fit(blocks: Blocks, sums: _Sums, right: Tensor) -> Fit:
    """Returns the form with the fewest singular values, and a plain one unless another has half as many."""
    fit = _fit_plain(blocks, sums, right)
    if fit.simple:
        return fit
    low_rank = float(fit.values[:_SCALED].square().sum())
    scaled = []
    for totals, alternation, space in (
        (sums.rows, _Rows(blocks, sums), fit.right),
        (sums.columns, _Columns(blocks, sums), fit.left),
    ):
        by_scales = float((totals[1].square() / totals[0].clamp(min=_TINY)).sum())
        if low_rank + by_scales > _PROMISING * sums.energy:
            scaled.append(_alternate(alternation, space))
    found = [other for other in scaled if other.form != "full"]
    if not found:
        return fit
    best = min(found, key=lambda other: (other.rank, other.rest))
    return best if fit.form == "full" or 2 * best.rank <= fit.rank else fit


def _fit_plain(blocks: Blocks, sums: _Sums, right: Tensor) -> Fit:
    rows, columns = sums.rows.shape[1], sums.columns.shape[1]
    thin, images = right.float(), torch.empty(rows, right.shape[1])
    for first, _, added in blocks():
        torch.matmul(added, thin, out=images[first : first + len(added)])
    ones = (torch.ones(side, dtype=torch.float64) for side in (rows, columns))
    return _ritz("plain", images, right, sums.energy, sums, *ones)


class _Rows:
    """Undoes a scale per row: with ``P`` off the right space, ``s − 1 = ⟨ΔP, AP⟩ / ⟨AP, AP⟩`` row by row."""

    def __init__(self, blocks: Blocks, sums: _Sums) -> None:
        self._blocks, self._sums = blocks, sums

    def fit(self, space: Tensor) -> Fit:
        """Fits the scales for a right space, and the low-rank part within it."""
        squares, products, _, _ = self._sums.rows
        scales, thin = torch.zeros_like(squares), space.float()
        self._images, self._gram = torch.empty(len(scales), space.shape[1]), torch.zeros(space.shape)
        for first, old, added in self._blocks():
            rows = slice(first, first + len(old))
            old_inside, added_inside = old @ thin, added @ thin
            shared = (old_inside * added_inside).sum(1).double()
            scales[rows] = _ratio(products[rows] - shared, squares[rows], old_inside.square().sum(1).double())
            scale = scales[rows, None].float()
            self._images[rows] = added_inside - scale * old_inside
            self._gram.addmm_(torch.addcmul(added, scale, old, value=-1).T, self._images[rows])
        ones = torch.ones_like(self._sums.columns[0])
        return _ritz("rows", self._images, space, _left_over(self._sums.rows, scales), self._sums, 1 + scales, ones)

    def next_space(self, small: float) -> Tensor:
        """Returns the right space of what is left, once more multiplied by it."""
        return _orthonormal(self._gram.double() @ _dominant(self._images.double(), small))


class _Columns:
    """Undoes a scale per column, as :class:`_Rows` does per row; the left space takes a pass of its own."""

    def __init__(self, blocks: Blocks, sums: _Sums) -> None:
        self._blocks, self._sums = blocks, sums

    def fit(self, space: Tensor) -> Fit:
        """Fits the scales for a left space, and the low-rank part within it."""
        squares, products, _, _ = self._sums.columns
        thin = space.float()
        inside = torch.zeros(2, space.shape[1], len(squares), dtype=torch.float64)
        for first, old, added in self._blocks():
            weights = thin[first : first + len(old)].T
            inside[0] += weights @ old
            inside[1] += weights @ added
        self._scales = _ratio(products - (inside[0] * inside[1]).sum(0), squares, inside[0].square().sum(0))
        self._images = (inside[1] - self._scales * inside[0]).T
        ones, energy = torch.ones_like(self._sums.rows[0]), _left_over(self._sums.columns, self._scales)
        turned = _ritz("columns", self._images, space, energy, self._sums, 1 + self._scales, ones)
        return replace(turned, left=turned.right, right=turned.left, rows=turned.columns, columns=turned.rows)

    def next_space(self, small: float) -> Tensor:
        """Returns the left space of what is left."""
        right, scale = _orthonormal(self._images @ _dominant(self._images, small)).float(), self._scales.float()
        left = torch.empty(self._sums.rows.shape[1], right.shape[1])
        for first, old, added in self._blocks():
            left[first : first + len(old)] = torch.addcmul(added, scale, old, value=-1) @ right
        return _orthonormal(left)


def _alternate(alternation: _Rows | _Columns, start: Tensor) -> Fit:
    """Fits scales and space in turn until one singular value is left, or nothing is gained.

    The space is kept as small as it can be: a direction too many may hide the scale of a row for good.
    """
    best = fit = alternation.fit(start)
    for small in _SMALL:
        last = math.inf
        for turn in range(_ROUNDS):
            if best.simple:
                return best
            fit = alternation.fit(alternation.next_space(small))
            if best.form == "full" or (fit.form != "full" and fit.rank < best.rank):
                best = fit
            if turn and fit.rest > _GAIN * last:
                break
            last = fit.rest
    return best


def _left_over(totals: Tensor, scales: Tensor) -> float:
    """Returns the squared norm of the difference once the scales are undone."""
    squares, products, added, _ = totals
    return float((added - 2 * scales * products + scales.square() * squares).clamp(min=0).sum())


def _ratio(numerator: Tensor, squares: Tensor, inside: Tensor) -> Tensor:
    """Returns the scales, zero where next to nothing of the old vector lies outside of the space."""
    outside = squares - inside
    return torch.where(outside > 1e-6 * squares, numerator / outside.clamp(min=_TINY), 0.0)


def _ritz(
    form: Rescaling, images: Tensor, space: Tensor, energy: float, sums: _Sums, rows: Tensor, columns: Tensor
) -> Fit:
    """Finds the singular values and vectors within a right space from the images of its basis, ``[rows, l]``."""
    gram = torch.zeros(2 * (images.shape[1],), dtype=torch.float64)
    for start in range(0, len(images), _TALL):
        double = images[start : start + _TALL].double()
        gram += double.T @ double
    squares, turn = torch.linalg.eigh(gram)
    values, turn = squares.flip(0).clamp(min=0).sqrt(), turn.flip(1)
    rank = _rank(values, energy, sums)
    top = turn[:, :_SCALED]
    return Fit(
        form="full" if rank is None else form,
        rank=len(values) if rank is None else rank,
        energy=energy,
        rest=max(0.0, energy - float(values.square().sum())),
        values=values,
        left=(images @ top.to(images.dtype)).double() / values[:_SCALED].clamp(min=_TINY),
        right=space @ top,
        rows=rows,
        columns=columns,
    )


def _rank(values: Tensor, energy: float, sums: _Sums) -> int | None:
    """Counts singular values that rounding does not explain; None where more is left than it explains."""
    rest = energy - torch.cat([torch.zeros(1, dtype=torch.float64), values.square().cumsum(0)])
    noise = sums.noise
    allowed = max(_NOISE * noise, _FLOOR * sums.energy)
    if float(rest[-1]) > allowed:
        return None
    # Where both sides were rounded, twice the energy is left and the edge is as much higher.
    louder = max(1.0, float(rest[-1]) / noise) ** 0.5 if noise else 1.0
    # Changes of about a unit in the last place round to steps, whose pattern is of low rank itself.
    least = max(sums.edge * louder, _STEPS * float(values[0]), (_FLOOR * sums.energy) ** 0.5)
    return max(int((values > least).sum()), int((rest > allowed).sum()))


def _dominant(images: Tensor, small: float) -> Tensor:
    """Keeps those directions of a space that are not small beside the first: the rest would only hide the scales."""
    squares, turn = torch.linalg.eigh(images.T @ images)
    count = max(1, int((squares > small**2 * squares[-1]).sum()))
    top: Tensor = turn[:, -count:]
    return top


def _orthonormal(columns: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(columns.double() / columns.abs().max().clamp(min=_TINY))[0]
    return basis


def _projection_in_codes(blocks: Blocks, sums: _Sums, fit: Fit) -> Projection | None:
    """Tests whether what holds nearly all of the low-rank part is an ablation, or one singular vector of it.

    Codes that were chosen together add a pattern of their own, in the rows where the direction is largest.
    """
    count = _chief(fit)
    found = _projection(blocks, sums, replace(fit, rank=count), in_codes=True)
    for number in range(count if count > 1 and found is not None and found.explains != "exactly" else 0):
        one = slice(number, number + 1)
        values, left, right = fit.values[one], fit.left[:, one], fit.right[:, one]
        alone = replace(fit, rank=1, values=values, left=left, right=right)
        found = max(found, _projection(blocks, sums, alone, in_codes=True), key=lambda each: each.cosine if each else 0)
    return found


def _projection(blocks: Blocks, sums: _Sums, fit: Fit, *, in_codes: bool = False) -> Projection | None:
    """Tests whether the low-rank part is an ablation of the old matrix, from either side.

    With ``E = U Σ Vᵀ`` what is left once ``S`` and ``T`` are undone, an ablation of the columns has
    ``E = −α H Rᵀ R H⁻¹ S A T``, where ``H`` is ``S``, or ``S`` times the norms of the rows for an ablation of
    normalised rows. ``R`` spans ``H⁻¹ U``, so ``Σ Vᵀ`` is compared with ``R H⁻¹ S A T``. Rows alike.
    """
    k = fit.rank
    if fit.form == "full" or not 0 < k <= _SCALED:
        return None
    values = fit.values[:k]
    sides = []
    for number, (vectors, scales, totals) in enumerate(
        ((fit.left, fit.rows, sums.rows), (fit.right, fit.columns, sums.columns))
    ):
        norms = totals[0].sqrt()
        for weights in (scales, scales * norms):
            usable = weights.abs() > 1e-6 * weights.abs().max()
            inverse = torch.where(usable, 1 / torch.where(usable, weights, 1.0), 0.0)
            basis, inner = torch.linalg.qr(inverse[:, None] * vectors[:, :k])
            other = (fit.right if number == 0 else fit.left)[:, :k]
            sides.append((number, basis, (inverse * scales)[:, None] * basis, other * values @ inner.T))
    on_rows = torch.cat([probe for number, _, probe, _ in sides if number == 0], 1).float()
    on_columns = torch.cat([probe for number, _, probe, _ in sides if number == 1], 1).float()
    from_rows = torch.zeros(len(on_columns), on_rows.shape[1], dtype=torch.float64)
    from_columns = torch.empty(len(on_rows), on_columns.shape[1])
    for first, old, _ in blocks():
        rows = slice(first, first + len(old))
        from_rows += old.T @ on_rows[rows]
        from_columns[rows] = old @ on_columns
    seen = [side.narrow(1, start, k) for side in (from_rows, from_columns.double()) for start in (0, k)]
    # How much of the old matrix lies along the other side's vectors, which a side seen by chance would have as well.
    before = float(sums.rows[0].sum()) ** 0.5
    chances = [float(seen[2].norm()) / before, float(seen[0].norm()) / before]
    best = None
    for (number, basis, _, expected), image in zip(sides, seen, strict=True):
        image = image * (fit.columns if number == 0 else fit.rows)[:, None]
        shared, square = float((expected * image).sum()), float(image.square().sum())
        if not square > 0:
            continue
        cosine = abs(shared) / (square**0.5 * float(expected.norm()))
        if best is None or cosine > best.cosine:
            least = max(_ABLATION_IN_CODES, _ABOVE_CHANCE * chances[number])
            how: Literal["exactly", "in codes", "no"]
            how = "exactly" if cosine > _ABLATION else "in codes" if in_codes and cosine > least else "no"
            best = Projection(-2 if number == 0 else -1, -shared / square, cosine, basis.T.contiguous(), how)
    return best
