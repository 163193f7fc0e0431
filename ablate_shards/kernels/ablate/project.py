"""Directional ablation of stored matrices, streamed over row blocks: ``W' = W - a RᵀRW``, norms kept.

``W`` is ``[d, n]`` with the residual axis first, ``R`` is ``[k, d]`` with orthonormal rows, ``a`` the
coefficient. The new norms come from closed forms over sums that a gather pass collects, so that a second
pass writes the result and no third is needed; ``docs/math.md`` derives them::

    columns   |w'_j before rescaling|² = |w_j|² - (2a - a²) |R w_j|²
    rows      |U_i|² = 1 - 2a R_iᵀ Q Ŵ_i + a² R_iᵀ Q Qᵀ R_i,   Ŵ_i = W_i / |W_i|,   Q = R Ŵ

Sums run in float32 inside a chunk of rows and in float64 from chunk to chunk, in order. The chunks follow
from the shape alone, hence the result does not depend on block sizes, batching or threads. Where
float32 is not accurate enough (strong cancellation, squares out of range), float64 is used.
"""

import math
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ablate_shards.errors import PlanError
from ablate_shards.kernels.ablate.options import AMPLIFICATION, Measure, ProjectOptions, check_fit, orthonormal
from ablate_shards.kernels.choose import Form
from ablate_shards.kernels.codecs.plain import GREATEST
from ablate_shards.kernels.form import GROUP_ROWS, HIGH, LOW, Arithmetic, Array, Arrays, extremes, in_range
from ablate_shards.kernels.native.native import NativeArrays, NativeForm
from ablate_shards.kernels.reference import DEGENERATE, Preserve

if TYPE_CHECKING:
    import torch

__all__ = ["Meter", "Preserve", "Projector", "Workspace"]

CHUNK_ROWS = 512


class _Piece(NamedTuple):
    """Rows ``span`` of the matrices ``entries`` of a batch, and what computes them."""

    form: Arithmetic
    entries: slice
    span: slice
    view: Array


class _Pair(NamedTuple):
    """Factors ``[1 or matrices, k, length]`` in both precisions."""

    single: Array
    double: Array

    def of(self, form: Arithmetic) -> Array:
        return self.double if form.is_double else self.single

    def part(self, span: slice) -> "_Pair":
        return _Pair(self.single[..., span], self.double[..., span])

    def entries(self, entries: slice) -> "_Pair":
        return self if len(self.double) == 1 else _Pair(self.single[entries], self.double[entries])


class _Factors(NamedTuple):
    """What the update of preserved vectors needs.

    Attributes:
        scale: ``[matrices, vectors]``.
        factor: What the directions, or ``Q``, are multiplied by: ``[matrices, k, vectors]``.
        doubtful: Vectors for which float32 is not accurate enough; None if there are none, as below.
        parallel: Vectors too close to the directions to be rescaled.
        still: Vectors without a component, whose bytes must not change.
    """

    scale: Array
    factor: Array
    doubtful: Array | None = None
    parallel: Array | None = None
    still: Array | None = None


class Workspace:
    """Where and how to compute, with scratch memory that is kept from one matrix to the next; one per thread.

    Args:
        device: Where the blocks are: ``cpu``, ``cuda:0`` or any other that torch knows.
        form: ``native``, ``torch`` or ``triton``.
        chunks_at_once: How much scratch memory torch takes for float32, in chunks of 1.8 MiB; the result does not
            depend on it.

    Attributes:
        arrays: Where blocks and sums live.
    """

    def __init__(self, device: "torch.device | str", form: Form, *, chunks_at_once: int = 2) -> None:
        self.arrays = _arrays(device, form, chunks_at_once)
        self._raw = np.empty(0, np.uint8)
        self._kept: tuple[tuple[int, int], tuple[Arithmetic, Arithmetic]] | None = None

    def forms(self, chunk_rows: int, cols: int) -> tuple[Arithmetic, Arithmetic]:
        """Return the arithmetic for matrices cut into chunks: in float32, and in float64."""
        if self._kept is None or self._kept[0] != (chunk_rows, cols):
            self._kept = None
            self._kept = ((chunk_rows, cols), self.arrays.forms(chunk_rows, cols))
        return self._kept[1]

    def raw(self, count: int) -> np.ndarray:
        """Return memory ``[count]`` uint8 for bytes read from and written to a file; the next call returns it again."""
        if len(self._raw) < count:
            self._raw = self.arrays.buffer(count)
        return self._raw[:count]


def _arrays(device: "torch.device | str", form: Form, chunks_at_once: int) -> Arrays:
    if form in ("native", "numpy"):
        return NativeArrays()
    # Torch and Triton are imported only where they run.
    import torch

    if form == "triton":
        from ablate_shards.kernels.ablate.project_triton import TritonArrays

        return TritonArrays(torch.device(device))
    from ablate_shards.kernels.ablate.project_torch import TorchArrays

    return TorchArrays(torch.device(device), chunks_at_once)


class _Stream:
    """Geometry, measured sums and their guards, which :class:`Projector` and :class:`Meter` share."""

    def __init__(
        self,
        basis: np.ndarray,
        shape: tuple[int, int, int],
        dtype: str,
        options: ProjectOptions,
        workspace: Workspace,
    ) -> None:
        if dtype not in AMPLIFICATION:
            raise PlanError(f"dtype: expected BF16, F16 or F32, found {dtype}")
        self._batch, self._rows, self._cols = shape
        check_fit(basis, shape, options.axis)
        basis = orthonormal(basis)
        self._options = options
        self._dtype = dtype
        self._dots_in_rows = options.axis == -1
        self._norms_in_rows = (options.preserve == "rows") == (options.axis == -2)
        self._chunk = _chunk_rows(self._cols, workspace.arrays.chunk_elements)
        self._workspace = workspace
        self._arrays, self._xp = workspace.arrays, workspace.arrays.xp
        self._basis = self._pair(self._arrays.state(basis[None]))
        count = len(basis)
        lines = count * (not self._dots_in_rows) + (not self._norms_in_rows)
        self._column_sums = self._zeros(lines, self._cols)
        self._squares = self._zeros(self._rows) if self._norms_in_rows else self._column_sums[:, -1]
        self._dots = self._zeros(count, self._rows) if self._dots_in_rows else self._column_sums[:, :count]

    @property
    def chunk_rows(self) -> int:
        """Blocks start at a multiple of this, and all but the last are a multiple of it long."""
        return self._chunk

    @property
    def nonfinite(self) -> int:
        """Preserved vectors that hold a NaN or an infinity; true once every pass is done."""
        return int((~self._xp.isfinite(self._squares)).sum())

    @property
    def nonfinite_entries(self) -> tuple[int, ...]:
        """The matrices of the batch that hold these vectors."""
        return tuple(self._entries(~self._xp.isfinite(self._squares)))

    # Asked for anew each time: matrices of another width may have taken the scratch memory meanwhile.

    @property
    def _single(self) -> Arithmetic:
        return self._workspace.forms(self._chunk, self._cols)[0]

    @property
    def _double(self) -> Arithmetic:
        return self._workspace.forms(self._chunk, self._cols)[1]

    def _zeros(self, *shape: int) -> Array:
        return self._arrays.zeros(self._batch, *shape)

    def _pair(self, double: Array) -> _Pair:
        return _Pair(self._arrays.single(double), double)

    def _entries(self, mask: Array) -> list[int]:
        """The matrices of the vectors ``[matrices, vectors]`` that a mask marks."""
        return [entry for entry, found in enumerate(mask.any(1).tolist()) if found]

    def _inverse(self, squares: Array) -> Array:
        """Return one over the norms, 0 for a norm of 0."""
        return self._xp.where(squares > 0, squares**-0.5, 0.0)

    def _measured(self) -> Measure:
        squares, dots = self._arrays.host(self._squares), self._arrays.host(self._dots)
        return Measure(
            norms=np.sqrt(squares),
            along=tuple(float(np.sum(matrix * matrix)) for matrix in dots),
            total=tuple(float(np.sum(matrix)) for matrix in squares),
        )

    def _measure(self, piece: _Piece) -> None:
        """Take the squared norms and the components of a piece."""
        entries, span = piece.entries, piece.span
        if isinstance(piece.form, NativeForm) and self._norms_in_rows and not self._dots_in_rows:
            self._mix(piece, piece.form)
            return
        if self._dots_in_rows:
            sums = self._row_sums(piece, self._basis, squares=self._norms_in_rows)
            self._dots[entries, :, span] = sums[:, : self._dots.shape[1]]
            if self._norms_in_rows:
                self._squares[entries, span] = sums[:, -1]
            else:
                self._add_columns(piece, None, self._column_sums, squares=True)
        else:
            if self._norms_in_rows:
                self._squares[entries, span] = self._row_sums(piece, None, squares=True)[:, 0]
            self._add_columns(piece, self._basis.part(span), self._column_sums, squares=not self._norms_in_rows)

    def _mix(self, piece: _Piece, form: NativeForm) -> None:
        """Take row norms and column sums at once."""
        entries = piece.entries
        basis, squares, into = self._basis.double[0], self._squares[entries], self._column_sums[entries]
        form.mix(piece.view, basis, piece.span.start, squares, into)

    def _row_sums(self, piece: _Piece, weights: _Pair | None, *, squares: bool) -> Array:
        """Row sums of a piece ``[matrices, k (+ 1), rows]``, float64, with unsafe chunks done exactly."""
        sums = piece.form.rows(piece.view, weights and weights.of(piece.form), squares=squares)
        if piece.form is self._double or self._dtype == "F16":
            return sums
        if squares:
            guarded = sums[:, -1]
        elif self._norms_in_rows:
            guarded = self._squares[piece.entries, piece.span]
        else:
            # Products alone: only their overflow shows, and only it matters.
            guarded = 1 + self._xp.amax(abs(sums), 1)
        for entry, chunk in self._unsafe(guarded):
            part = self._chunk_of(piece, entry, chunk)
            chosen = weights and weights.entries(slice(entry, entry + 1)).double
            low = part.span.start - piece.span.start
            sums[entry, :, low : low + self._chunk] = part.form.rows(part.view, chosen, squares=squares)[0]
        return sums

    def _add_columns(self, piece: _Piece, weights: _Pair | None, into: Array, *, squares: bool) -> None:
        """Add the column sums of a piece to ``into``, float64, with unsafe chunks done exactly."""
        arrays = self._arrays

        def repair(entry: int, chunk: int) -> Array:
            part = self._chunk_of(piece, entry, chunk)
            low = part.span.start - piece.span.start
            chosen = weights and weights.entries(slice(entry, entry + 1)).part(slice(low, low + self._chunk))
            sums = arrays.zeros(1, *into.shape[1:])
            # Not "repair" itself: a function that refers to itself keeps the scratch until a collection.
            part.form.add_columns(
                part.view, chosen and chosen.double, sums, squares=squares, unsafe=(), repair=_needless
            )
            return sums[0]

        unsafe: list[tuple[int, int]] | None = []
        if piece.form is self._single and self._dtype != "F16":
            if squares:
                unsafe = None
            elif self._norms_in_rows:
                unsafe = self._unsafe(self._squares[piece.entries, piece.span])
        chosen = weights and weights.of(piece.form)
        into = into[piece.entries]
        piece.form.add_columns(piece.view, chosen, into, squares=squares, unsafe=unsafe, repair=repair)

    def _unsafe(self, squares: Array) -> list[tuple[int, int]]:
        """Matrix and chunk of the rows ``[matrices, rows]`` whose squares are out of float32's range."""
        return [] if in_range(squares) else self._chunks_with(~((squares > LOW) & (squares < HIGH)))

    def _chunks_with(self, mask: Array) -> list[tuple[int, int]]:
        """Matrix and chunk of the rows that a mask ``[matrices, rows]`` marks."""
        return sorted({(entry, row // self._chunk) for entry, row in self._xp.argwhere(mask).tolist()})

    def _chunk_of(self, piece: _Piece, entry: int, chunk: int) -> _Piece:
        """One chunk of a piece, for float64."""
        low = chunk * self._chunk
        view = piece.view[entry : entry + 1, low : low + self._chunk]
        first, start = piece.entries.start + entry, piece.span.start + low
        return _Piece(self._double, slice(first, first + 1), slice(start, start + view.shape[1]), view)

    def _pieces(self, block: Array, start: int, entries: Sequence[int], exact: Container[int] = ()) -> Iterator[_Piece]:
        """Split a block into what each precision computes at once."""
        if 0 in block.shape:
            return
        span = slice(start, start + block.shape[1])
        single = [entry for entry in entries if entry not in exact]
        if len(single) == self._batch:
            yield _Piece(self._single, slice(0, self._batch), span, block)
            return
        for entry in entries:
            form = self._double if entry in exact else self._single
            yield _Piece(form, slice(entry, entry + 1), span, block[entry : entry + 1])


def _needless(entry: int, chunk: int) -> Array:
    raise AssertionError(f"float64 sums of chunk {chunk} of matrix {entry} cannot need repair")


class Meter(_Stream):
    """Measures a stored matrix, or a batch of them, in one pass over row blocks.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        shape: Matrices, stored rows, stored columns.
        dtype: What the matrices are stored in: ``BF16``, ``F16`` or ``F32``.
        options: Says which norms are meant and where the residual axis lies.
        workspace: Where and how to compute.

    Raises:
        DirectionsError: The basis does not fit the shape, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """

    def add(self, block: Array, start: int) -> None:
        """Take the rows from ``start``: ``[matrices, rows, cols]`` in the storage dtype, in order."""
        with self._arrays.quiet():
            for piece in self._pieces(block, start, range(self._batch)):
                self._measure(piece)

    def result(self) -> Measure:
        """Return the measure of all that was added."""
        return self._measured()


class Projector(_Stream):
    """Ablates a stored matrix, or a batch of them: gather passes over row blocks, then one apply pass.

    Every pass goes over all rows, in order. ``passes`` may grow when a pass ends: matrices that
    turn out to need float64 are gathered once more.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        shape: Matrices, stored rows, stored columns.
        dtype: What the matrices are stored in: ``BF16``, ``F16`` or ``F32``.
        options: The coefficient, the norms to preserve, the residual axis.
        workspace: Where and how to compute.

    Raises:
        DirectionsError: The basis does not fit the shape, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """

    def __init__(
        self,
        basis: np.ndarray,
        shape: tuple[int, int, int],
        dtype: str,
        options: ProjectOptions,
        workspace: Workspace,
    ) -> None:
        super().__init__(basis, shape, dtype, options, workspace)
        self._degenerate = 0
        self._exact: set[int] = set()
        self._doubtful: set[int] = set()
        # Rows of a matrix stored [n, d] need their norms first: Q comes from a pass of its own.
        self._mixes_apart = options.preserve == "rows" and self._dots_in_rows
        self._plan: list[tuple[str, tuple[int, ...]]] = []
        if 0 not in shape and not (self._dots_in_rows and self._norms_in_rows):
            kinds = ("measure", "mix") if self._mixes_apart else ("measure",)
            self._plan = [(kind, tuple(range(self._batch))) for kind in kinds]
        count = len(basis)
        if self._mixes_apart:
            self._mixed = self._zeros(count, self._rows)
            self._cross = self._zeros(count, self._cols)
        elif options.preserve == "rows":
            self._column_sums = self._zeros(2 * count, self._cols)
            self._dots, self._mixed = self._column_sums[:, :count], self._column_sums[:, count:]
        self._amplification = AMPLIFICATION[dtype]
        self._largest_norm = GREATEST[dtype] / (2 * (1 + abs(options.coefficient)))

    @property
    def passes(self) -> int:
        """Gather passes before the apply pass; read it again after each of them."""
        return len(self._plan)

    @property
    def degenerate(self) -> int:
        """Vectors whose component was removed without rescaling; true after the apply pass."""
        return self._degenerate

    def gather(self, step: int, block: Array, start: int) -> None:
        """Take rows in one of the gather passes.

        Args:
            step: The pass, from 0.
            block: ``[matrices, rows, cols]`` in the storage dtype, on the device.
            start: The first of its rows.
        """
        with self._arrays.quiet():
            self._gather(step, block, start)
            if start + block.shape[1] == self._rows:
                self._settle(step)

    def apply(self, block: Array, start: int) -> None:
        """Ablate rows in place: ``[matrices, rows, cols]`` in the storage dtype, on the device."""
        everything = range(self._batch)
        with self._arrays.quiet():
            if self._norms_in_rows:
                for piece in self._pieces(block, start, everything):
                    self._apply_to_rows(piece, piece.view)
            elif self._options.coefficient != 0:
                for piece in self._pieces(block, start, everything, self._exact):
                    self._apply_to_columns(piece)

    def before(self) -> Measure:
        """Return the measure of the matrices before the ablation; after the apply pass."""
        return self._measured()

    def _gather(self, step: int, block: Array, start: int) -> None:
        kind, entries = self._plan[step]
        for piece in self._pieces(block, start, entries, self._exact):
            if kind == "probe":
                dots = self._row_sums(piece, self._mixed_pair.entries(piece.entries), squares=False)
                doubtful = self._factors(piece.entries, piece.span, dots).doubtful
                if doubtful is not None:
                    self._doubtful.update(piece.entries.start + entry for entry in self._entries(doubtful))
            elif kind == "mix":
                mixed = self._row_sums(piece, self._unit_basis.entries(piece.entries), squares=False)
                self._mixed[piece.entries, :, piece.span] = mixed
                self._add_columns(piece, self._pair(mixed), self._cross, squares=False)
            elif self._norms_in_rows:
                self._mix_and_measure(piece)
            else:
                self._measure(piece)

    def _mix_and_measure(self, piece: _Piece) -> None:
        """Take row norms, then ``RW`` and ``Q`` at once."""
        if isinstance(piece.form, NativeForm):
            self._mix(piece, piece.form)
            return
        squares = self._row_sums(piece, None, squares=True)[:, 0]
        self._squares[piece.entries, piece.span] = squares
        basis = self._basis.double[..., piece.span]
        shape = (len(squares), *basis.shape[1:])
        lines = [self._xp.broadcast_to(basis, shape), basis * self._inverse(squares)[:, None]]
        weights = self._pair(self._xp.concatenate(lines, 1))
        self._add_columns(piece, weights, self._column_sums, squares=False)

    def _settle(self, step: int) -> None:
        """Close a gather pass: derive what follows from its sums, and plan float64 where float32 is not enough."""
        kind, entries = self._plan[step]
        repeat = [kind]
        doubtful: Array | None = None
        if kind == "probe":
            repeat = ["measure"]
        elif kind == "measure" and self._mixes_apart:
            self._unit_basis = self._pair(self._basis.double * self._inverse(self._squares)[:, None])
            if self._dtype != "F16":
                doubtful = ~(((self._squares > LOW) & (self._squares < HIGH)) | (self._squares == 0))
        elif self._norms_in_rows:
            self._gram = self._mixed_gram()
            self._mixed_pair = self._pair(self._arrays.clone(self._mixed))
            # |U_i| is at least |1 - a|R_iᵀQ||; where that does not decide, a probe does before the apply pass.
            moved = abs(self._options.coefficient) * self._xp.sqrt(self._heights(slice(None), slice(None)))
            near = self._entries(1 + moved > self._amplification * abs(1 - moved))
            probed = [entry for entry in entries if entry in near and entry not in self._exact]
            if probed:
                self._plan.append(("probe", tuple(probed)))
            return
        else:
            if kind == "mix":
                self._gram = self._mixed_gram()
                repeat = ["measure", "mix"]
            self._by_column = self._factors(slice(None), slice(None), self._cross if kind == "mix" else self._dots)
            self._scale = self._pair(self._by_column.scale[:, None])
            self._column_factor = self._pair(self._by_column.factor)
            self._degenerate = _count(self._by_column.parallel)
            doubtful = self._by_column.doubtful
        found = self._doubtful if doubtful is None else self._entries(doubtful)
        fresh = sorted(set(found) - self._exact)
        if fresh:
            self._exact.update(fresh)
            self._plan[step + 1 : step + 1] = [(again, tuple(fresh)) for again in repeat]
            self._column_sums[fresh] = 0
            if kind == "mix":
                self._cross[fresh] = 0

    def _mixed_gram(self) -> Array:
        """Return ``Q Qᵀ`` per matrix, ``[matrices, k, k]``, in an order that no thread count changes."""
        mixed = self._arrays.host(self._mixed)
        return self._arrays.state(np.sum(mixed[:, :, None] * mixed[:, None], axis=-1))

    def _heights(self, entries: slice, lines: slice) -> Array:
        """Return ``R_iᵀ Q Qᵀ R_i`` for residual indices ``lines``: ``[matrices, lines]``."""
        basis = self._basis.double[..., lines]
        gram = self._gram[entries]
        # Not a matrix product, which may take several threads and then add in another order.
        mixed = sum(gram[:, :, line, None] * basis[:, line, None] for line in range(basis.shape[1]))
        return self._xp.clip((mixed * basis).sum(1), 0, None)

    def _factors(self, entries: slice, lines: slice, dots: Array) -> _Factors:
        """What the update of the preserved vectors ``lines`` needs.

        Args:
            entries: The matrices.
            lines: The preserved vectors.
            dots: ``R w`` of each vector, or ``Q w`` where rows are preserved: ``[matrices, k, lines]``.
        """
        alpha, xp = self._options.coefficient, self._xp
        squares = self._squares[entries, lines]
        if self._options.preserve == "rows":
            basis = self._basis.double[..., lines]
            along = self._heights(entries, lines)
            cross = (basis * dots).sum(1) * self._inverse(squares)
            ratio = 1 - 2 * alpha * cross + alpha**2 * along
            factor = alpha * basis * self._xp.sqrt(squares)[:, None]
        else:
            along = (dots * dots).sum(1) / squares
            ratio = 1 - (2 * alpha - alpha**2) * along
            factor = alpha * dots
        if self._is_calm(squares, along, ratio):
            scale = xp.ones_like(ratio) if self._options.preserve == "none" else 1 / xp.sqrt(ratio)
            return _Factors(scale, factor * scale[:, None])
        present = squares > 0
        ratio = xp.where(present, ratio, 1.0)
        parallel = ratio < DEGENERATE
        scale = xp.where(parallel, 1.0, 1 / xp.sqrt(ratio))
        if self._options.preserve == "none":
            parallel, scale = xp.zeros_like(parallel), xp.ones_like(scale)
        moved = abs(alpha) * xp.sqrt(along)
        doubtful = present & ((1 + moved) ** 2 > self._amplification**2 * ratio)
        doubtful |= squares > self._largest_norm**2
        still = (along == 0) | ~present
        return _Factors(scale, factor * scale[:, None], _some(doubtful), _some(parallel), _some(still))

    def _is_calm(self, squares: Array, along: Array, ratio: Array) -> bool:
        """Whether no vector is doubtful, parallel or still, as the extremes alone show."""
        if 0 in squares.shape:
            return False
        smallest, largest = extremes(squares)
        least, most = extremes(along)
        moved = 1 + abs(self._options.coefficient) * math.sqrt(most) if least > 0 else math.inf
        lowest = max(DEGENERATE, moved**2 / self._amplification**2)
        return smallest > 0 and largest <= self._largest_norm**2 and float(ratio.min()) >= lowest

    def _apply_to_columns(self, piece: _Piece) -> None:
        """Update a piece of matrices whose preserved vectors are stored columns."""
        entries, span, form = piece.entries, piece.span, piece.form
        rows = self._pair(self._mixed[entries, :, span]) if self._mixes_apart else self._basis.part(span)
        scale = None if self._options.preserve == "none" else self._scale.entries(entries).of(form)
        factor = self._column_factor.entries(entries).of(form)
        still = self._by_column.still
        original = self._arrays.clone(piece.view) if still is not None else None
        form.update(piece.view, piece.view, scale, rows.of(form), factor)
        if still is not None and original is not None:
            self._arrays.keep(piece.view, original, still[entries, None])

    def _apply_to_rows(self, piece: _Piece, source: Array) -> None:
        """Update a piece of matrices whose preserved vectors are stored rows.

        Args:
            piece: What to write.
            source: What to read: the view of the piece, or a copy of it.
        """
        entries, span, form = piece.entries, piece.span, piece.form
        if isinstance(form, NativeForm) and self._options.preserve == "rows":
            if self._options.coefficient != 0:
                mixed, gram, squares = self._mixed_pair.entries(entries), self._gram[entries], self._squares[entries]
                limits = (self._options.coefficient, self._amplification, self._largest_norm)
                basis = self._basis.double[0]
                self._degenerate += form.move(piece.view, basis, span.start, squares, gram, mixed, limits)
            return
        given = piece._replace(view=source)
        if self._options.preserve == "rows":
            columns = self._mixed_pair.entries(entries)
            dots = self._row_sums(given, columns, squares=False)
        else:
            columns = self._basis
            self._measure(given)
            dots = self._dots[entries, :, span]
        if self._options.coefficient == 0:
            return
        factors = self._factors(entries, span, dots)
        copies: list[tuple[_Piece, Array]] = []
        if form is self._double:
            self._degenerate += _count(factors.parallel)
        elif factors.doubtful is not None:
            parts = [self._chunk_of(piece, *place) for place in self._chunks_with(factors.doubtful)]
            copies = [(part, self._arrays.clone(part.view)) for part in parts]
        original = self._arrays.clone(source) if factors.still is not None else None
        scale = None if self._options.preserve == "none" else self._pair(factors.scale[..., None]).of(form)
        form.update(piece.view, source, scale, self._pair(factors.factor).of(form), columns.of(form))
        if factors.still is not None and original is not None:
            self._arrays.keep(piece.view, original, factors.still[..., None])
        for part, copy in copies:
            self._apply_to_rows(part, copy)


def _some(mask: Array) -> Array | None:
    return mask if mask.any() else None


def _count(mask: Array | None) -> int:
    return 0 if mask is None else int(mask.sum())


def _chunk_rows(cols: int, elements: int) -> int:
    """Return how many stored rows make a chunk: little memory, and whole groups of rows that float32 sums."""
    rows = max(1, min(CHUNK_ROWS, elements // max(1, cols)))
    multiple = GROUP_ROWS if rows > GROUP_ROWS else 8
    return rows - rows % multiple if rows > multiple else rows
