"""What is gathered and applied in which pass: the table "Passes over the file" in ``docs/math.md``.

Each class at the end is a row of the table. A pass in which float32 turns out not to be accurate enough for some
matrices asks for another one, in float64.
"""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from ablate_shards.kernels.ablate.batch import Batch
from ablate_shards.kernels.ablate.factors import Factors, column_factors, heights, inverse, row_factors
from ablate_shards.kernels.ablate.options import Measure, ProjectOptions
from ablate_shards.kernels.ablate.stepwise import update_rows
from ablate_shards.kernels.form import HIGH, LOW, Array, Arrays, BothPrecisions, Piece

__all__ = ["Pass", "Passes", "marked", "passes_of"]


_Take: TypeAlias = Callable[[Piece], None]
_Close: TypeAlias = "Callable[[], list[Pass]]"


class Pass(NamedTuple):
    """A gather pass.

    Attributes:
        entries: The matrices that it goes over.
        take: Takes a piece of them.
        close: Derives what follows from the sums, and returns the passes that must come next.
    """

    entries: Sequence[int]
    take: _Take
    close: _Close


class Passes(ABC):
    """What is gathered and applied.

    Attributes:
        batch: The matrices.
        squares: Squared norms of the preserved vectors ``[matrices, vectors]``, float64.
        dots: ``RW`` ``[matrices, k, n]``, float64.
        exact: The matrices that are gathered in float64.
        degenerate: Vectors whose component was removed without rescaling; true after the apply pass.
    """

    squares: Array
    dots: Array

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.exact: set[int] = set()
        self.degenerate = 0
        self._counting = threading.Lock()

    @abstractmethod
    def measure(self, piece: Piece) -> None:
        """Take the squared norms and the components of a piece."""

    def gathering(self) -> list[Pass]:
        """Return the gather passes before the apply pass."""
        return []

    @abstractmethod
    def apply(self, block: Array, start: int) -> None:
        """Ablate the rows from ``start`` in place."""

    def apply_part(self, block: Array, start: int, columns: slice) -> None:
        """Ablate some columns of the rows from ``start`` in place: of ``[d, n]`` only, where the form does that."""
        raise RuntimeError("expected whole rows: these are not updated by parts")

    def nonfinite(self) -> Array:
        """Return which preserved vectors hold a NaN or an infinity: ``[matrices, vectors]``."""
        return ~self.batch.xp.isfinite(self.squares)

    def measured(self) -> Measure:
        """Return what :meth:`measure` took."""
        squares, dots = self.batch.arrays.host(self.squares), self.batch.arrays.host(self.dots)
        return Measure(
            norms=np.sqrt(squares),
            along=tuple(float(np.sum(matrix * matrix)) for matrix in dots),
            total=tuple(float(np.sum(matrix)) for matrix in squares),
            largest=tuple(float(np.sum(matrix * matrix, axis=0).max(initial=0)) for matrix in dots),
        )

    def _count(self, degenerate: int) -> None:
        """Count vectors that were not rescaled, in whichever thread."""
        with self._counting:
            self.degenerate += degenerate

    def _again(self, doubtful: Iterable[int], added: Sequence[Array], *steps: tuple[_Take, _Close]) -> list[Pass]:
        """Return passes that gather matrices over again in float64, unless they were.

        Args:
            doubtful: The matrices for which float32 is not accurate enough.
            added: The sums that the passes add to.
            *steps: What takes the pieces, and what follows.
        """
        fresh = sorted(set(doubtful) - self.exact)
        if not fresh:
            return []
        self.exact.update(fresh)
        for sums in added:
            sums[fresh] = 0
        return [Pass(fresh, take, close) for take, close in steps]


class _StoredInColumns(Passes):
    """What updates preserved vectors that are stored columns."""

    _factors: Factors
    _scale: BothPrecisions | None
    _factor: BothPrecisions

    @abstractmethod
    def _row_factor(self, piece: Piece) -> BothPrecisions:
        """Return what the columns' factors are multiplied by: ``[1 or matrices, k, rows]``."""

    def _keep(self, factors: Factors) -> None:
        """Keep what the columns are updated by."""
        self._factors = factors
        self._scale = None if factors.scale is None else self.batch.pair(factors.scale[:, None])
        self._factor = self.batch.pair(factors.factor)
        self.degenerate = 0 if factors.parallel is None else int(factors.parallel.sum())

    def apply(self, block: Array, start: int) -> None:
        """Ablate the rows from ``start`` in place."""
        self._apply(block, start, slice(None))

    def _apply(self, block: Array, start: int, columns: slice) -> None:
        if self.batch.limits.coefficient == 0:
            return
        arrays = self.batch.arrays
        for piece in self.batch.pieces(block, start, self.batch.matrices, self.exact):
            entries, form, view, still = piece.entries, piece.form, piece.view, self._factors.still
            original = None if still is None else arrays.clone(view)
            scale = None if self._scale is None else self._scale.entries(entries).of(form)[..., columns]
            factor = self._factor.entries(entries).of(form)[..., columns]
            form.update(view, view, scale, self._row_factor(piece).of(form), factor)
            if still is not None:
                arrays.keep(view, original, still[entries, None, columns])


class ColumnNorms(_StoredInColumns):
    """``[d, n]``, norms of columns or none kept: gathers ``RW`` and column norms, applies the update."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self._sums = batch.zeros(batch.count + 1, batch.cols)
        self.dots, self.squares = self._sums[:, :-1], self._sums[:, -1]

    def measure(self, piece: Piece) -> None:
        """Take the column norms and ``RW``."""
        piece.add_columns(self.batch.basis.part(piece.span), self._sums[piece.entries], squares=True)

    def gathering(self) -> list[Pass]:
        """Return the pass that measures."""
        return [Pass(self.batch.matrices, self.measure, self._close)]

    def apply_part(self, block: Array, start: int, columns: slice) -> None:
        """Ablate some columns of the rows from ``start`` in place."""
        self._apply(block, start, columns)

    def _close(self) -> list[Pass]:
        batch = self.batch
        self._keep(column_factors(self.squares, self.dots, batch.limits, batch.xp, rescale=batch.rescale))
        return self._again(marked(self._factors.doubtful), [self._sums], (self.measure, self._close))

    def _row_factor(self, piece: Piece) -> BothPrecisions:
        return self.batch.basis.part(piece.span)


class RowNorms(Passes):
    """``[d, n]``, norms of rows kept: gathers row norms and ``Q``, applies ``QŴᵀ`` of each row, then the update."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.squares = batch.zeros(batch.rows)
        self.dots = self._sums = batch.zeros(batch.count, batch.cols)
        self._doubtful: set[int] = set()

    def measure(self, piece: Piece) -> None:
        """Take the row norms and ``RW``; when gathering, also ``Q``."""
        piece.form.mix(piece, self.batch.basis.double[0], self.squares, self._sums)

    def gathering(self) -> list[Pass]:
        """Return the pass that measures and takes ``Q``."""
        count = self.batch.count
        self._sums = self.batch.zeros(2 * count, self.batch.cols)
        self.dots, self._sums_of_q = self._sums[:, :count], self._sums[:, count:]
        return [Pass(self.batch.matrices, self.measure, self._close)]

    def apply(self, block: Array, start: int) -> None:
        """Ablate the rows from ``start`` in place."""
        self._count(self._apply(block, start, None))

    def apply_part(self, block: Array, start: int, columns: slice) -> None:
        """Ablate some columns of the rows from ``start`` in place, which were ablated whole before."""
        self._apply(block, start, columns)

    def _apply(self, block: Array, start: int, columns: slice | None) -> int:
        """Ablate rows, and return how many were not rescaled."""
        limits, basis = self.batch.limits, self.batch.basis.double[0]
        if limits.coefficient == 0:
            return 0
        # In float32 whatever was gathered in float64: single chunks are done over again where they need it.
        return sum(
            piece.form.move(piece, basis, self.squares, self._gram, self._q, limits, self._crosses, columns)
            for piece in self.batch.pieces(block, start, self.batch.matrices)
        )

    def _close(self) -> list[Pass]:
        """Probe the matrices that the bound ``|U_i| >= |1 - a|R_iᵀQ||`` does not show float32 to be enough for."""
        self._keep_q()
        batch = self.batch
        along = batch.xp.sqrt(heights(batch.basis.double, self._gram, batch.xp))
        moved = abs(batch.limits.coefficient) * along
        near = marked(1 + moved > batch.limits.amplification * abs(1 - moved))
        return [Pass(near, self._probe, self._close_probe)] if near else []

    def _probe(self, piece: Piece) -> None:
        """Take ``QŴᵀ`` of each row, to find the matrices that float32 is not accurate enough for."""
        entries, span, batch = piece.entries, piece.span, self.batch
        squares, basis = self.squares[entries, span], batch.basis.double[..., span]
        dots = piece.row_sums(self._q.entries(entries), known=squares)
        factors = row_factors(squares, basis, self._gram[entries], dots, batch.limits, batch.xp)
        self._doubtful.update(entries.start + entry for entry in marked(factors.doubtful))

    def _close_probe(self) -> list[Pass]:
        return self._again(self._doubtful, [self._sums], (self.measure, self._keep_q))

    def _keep_q(self) -> list[Pass]:
        """Keep ``Q`` and ``Q Qᵀ`` for the apply pass; no other pass is needed."""
        self._gram, self._crosses = _gram(self._sums_of_q, self.batch.arrays), self.batch.zeros(self.batch.rows, 2)
        self._q = self.batch.pair(self.batch.arrays.clone(self._sums_of_q))
        return []


class TransposedColumnNorms(Passes):
    """``[n, d]``, norms of columns or none kept: applies ``RW`` and norm of each stored row, then the update."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self.squares, self.dots = batch.zeros(batch.rows), batch.zeros(batch.count, batch.rows)

    def measure(self, piece: Piece) -> None:
        """Take the norm and ``RW`` of each stored row."""
        sums = piece.row_sums(self.batch.basis, squares=True)
        self.dots[piece.entries, :, piece.span] = sums[:, :-1]
        self.squares[piece.entries, piece.span] = sums[:, -1]

    def apply(self, block: Array, start: int) -> None:
        """Ablate the rows from ``start`` in place."""
        for piece in self.batch.pieces(block, start, self.batch.matrices):
            self._count(self._apply(piece))

    def _apply(self, piece: Piece) -> int:
        """Measure and update a piece, and return how many of its rows were not rescaled."""
        self.measure(piece)
        batch, entries, span = self.batch, piece.entries, piece.span
        if batch.limits.coefficient == 0:
            return 0
        squares, dots, rescale = self.squares[entries, span], self.dots[entries, :, span], batch.rescale
        factors = column_factors(squares, dots, batch.limits, batch.xp, rescale=rescale)
        return update_rows(piece, factors, batch.basis, self._apply)


class TransposedRowNorms(_StoredInColumns):
    """``[n, d]``, norms of rows kept: gathers norms, then ``Q`` and ``QŴᵀ``, applies the update."""

    def __init__(self, batch: Batch) -> None:
        super().__init__(batch)
        self._sums, self.dots = batch.zeros(1, batch.cols), batch.zeros(batch.count, batch.rows)
        self.squares = self._sums[:, 0]

    def measure(self, piece: Piece) -> None:
        """Take the norms and ``RW``."""
        self.dots[piece.entries, :, piece.span] = piece.row_sums(self.batch.basis)
        piece.add_columns(None, self._sums[piece.entries], squares=True)

    def gathering(self) -> list[Pass]:
        """Return the pass that measures, and the pass that takes ``Q`` and ``QŴᵀ``."""
        count = self.batch.count
        self._q, self._cross = self.batch.zeros(count, self.batch.rows), self.batch.zeros(count, self.batch.cols)
        everything = self.batch.matrices
        return [Pass(everything, self.measure, self._close_norms), Pass(everything, self._mix, self._close)]

    def _close_norms(self) -> list[Pass]:
        squares, batch = self.squares, self.batch
        self._unit_basis = batch.pair(batch.basis.double * inverse(squares, batch.xp)[:, None])
        if not batch.guarded:
            return []
        doubtful = marked(~(((squares > LOW) & (squares < HIGH)) | (squares == 0)))
        return self._again(doubtful, [self._sums], (self.measure, self._close_norms))

    def _mix(self, piece: Piece) -> None:
        """Take ``Q`` and ``QŴᵀ``."""
        mixed = piece.row_sums(self._unit_basis.entries(piece.entries))
        self._q[piece.entries, :, piece.span] = mixed
        piece.add_columns(self.batch.pair(mixed), self._cross[piece.entries])

    def _close(self) -> list[Pass]:
        batch = self.batch
        gram = _gram(self._q, batch.arrays)
        self._keep(row_factors(self.squares, batch.basis.double, gram, self._cross, batch.limits, batch.xp))
        steps = (self.measure, self._close_norms), (self._mix, self._close)
        return self._again(marked(self._factors.doubtful), [self._sums, self._cross], *steps)

    def _row_factor(self, piece: Piece) -> BothPrecisions:
        return self.batch.pair(self._q[piece.entries, :, piece.span])


def passes_of(options: ProjectOptions) -> type[Passes]:
    """Return the class that is the row of the table for how a matrix is stored and which norms are kept."""
    stored_as = "[d, n]" if options.axis == -2 else "[n, d]"
    return {
        ("[d, n]", "columns"): ColumnNorms,
        ("[d, n]", "none"): ColumnNorms,
        ("[d, n]", "rows"): RowNorms,
        ("[n, d]", "columns"): TransposedColumnNorms,
        ("[n, d]", "none"): TransposedColumnNorms,
        ("[n, d]", "rows"): TransposedRowNorms,
    }[stored_as, options.preserve]


def _gram(mixed: Array, arrays: Arrays) -> Array:
    """Return ``Q Qᵀ`` per matrix, ``[matrices, k, k]``, in an order that no thread count changes."""
    values = arrays.host(mixed)
    return arrays.state(np.sum(values[:, :, None] * values[:, None], axis=-1))


def marked(mask: Array | None) -> list[int]:
    """Return the matrices of the vectors ``[matrices, vectors]`` that a mask marks, if there is one."""
    return [] if mask is None else [entry for entry, found in enumerate(mask.any(1).tolist()) if found]
