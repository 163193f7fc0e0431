"""Directional ablation of stored matrices, streamed over row blocks: ``W' = W - a RᵀRW``, norms kept.

``W`` is ``[d, n]`` with the residual axis first, ``R`` is ``[k, d]`` with orthonormal rows, ``a`` the
coefficient. The new norms come from closed forms over sums that a gather pass collects, so that a second
pass writes the result and no third one is needed; ``docs/math.md`` derives them::

    columns   |w'_j before rescaling|² = |w_j|² - (2a - a²) |R w_j|²
    rows      |U_i|² = 1 - 2a R_iᵀ Q Ŵ_i + a² R_iᵀ Q Qᵀ R_i,   Ŵ_i = W_i / |W_i|,   Q = R Ŵ

Sums run in float32 inside a chunk of rows and in float64 from chunk to chunk, in order. The chunks follow
from the shape alone, hence the result does not depend on block sizes, batching or threads. What float32
cannot carry (strong cancellation, squares out of range) is done again in float64.
"""

import importlib
import math
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ablate_shards.errors import DirectionsError, PlanError
from ablate_shards.kernels import reference
from ablate_shards.kernels.project_torch import GROUP_ROWS, HIGH, LOW, TorchForm, in_range
from ablate_shards.kernels.reference import DEGENERATE, Preserve

__all__ = [
    "Form",
    "Measure",
    "Meter",
    "Preserve",
    "ProjectOptions",
    "ProjectReport",
    "Projector",
    "Workspace",
    "choose_form",
    "merge",
    "norm_drift",
    "project",
    "project_vector",
]

Form = Literal["reference", "torch", "triton"]

CHUNK_ROWS = 512
CHUNK_ELEMENTS = 128 * 3584
"""Of a chunk: 1.8 MiB of float32 scratch, and twice that where float64 is needed."""
BLOCK_ELEMENTS = 1 << 22
ORTHONORMAL = 1e-9
AMPLIFICATION = {torch.bfloat16: 8.0, torch.float16: 2.0, torch.float32: 4.0}
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
        norms: Norms of the preserved vectors ``[batch, vectors]``, float64 on the CPU; the columns' where
            none are preserved.
        along: Per matrix, the squared norm of its component along the directions.
        total: Per matrix, its squared norm.
    """

    norms: Tensor
    along: tuple[float, ...]
    total: tuple[float, ...]

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


def merge(measures: Iterable[Measure]) -> Measure:
    """Join the measures of several batches, such as one per expert, into that of all of them.

    Args:
        measures: At least one, all with equally many vectors.
    """
    parts = list(measures)
    return Measure(
        norms=torch.cat([part.norms for part in parts]),
        along=tuple(value for part in parts for value in part.along),
        total=tuple(value for part in parts for value in part.total),
    )


def norm_drift(before: Measure, after: Measure) -> float:
    """Return the largest ``|after / before - 1|`` over the vectors whose norm was not zero."""
    present = before.norms > 0
    change = (after.norms[present] / before.norms[present] - 1).abs()
    return float(change.max()) if change.numel() else 0.0


def choose_form(device: torch.device, *, form: Form | Literal["auto"] = "auto") -> tuple[Form, str]:
    """Choose the form that suits a device, and say why in a few words.

    Args:
        device: Where the tensors will be.
        form: A form to insist on, or ``auto``.
    """
    if form != "auto":
        return form, "asked for"
    if device.type not in ("cuda", "xpu"):
        return "torch", f"Triton does not run on {device.type}"
    try:
        importlib.import_module("triton")
    except ImportError:
        return "torch", "triton is not installed"
    return "triton", f"Triton runs on {device.type}"


class _Arithmetic(Protocol):
    """The sums and the update in one precision; :class:`TorchForm` documents the methods."""

    precision: torch.dtype

    def rows(self, block: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor: ...
    def add_columns(
        self,
        block: Tensor,
        weights: Tensor | None,
        into: Tensor,
        *,
        squares: bool,
        unsafe: Container[tuple[int, int]] | None,
        repair: Callable[[int, int], Tensor],
    ) -> None: ...
    def update(
        self,
        block: Tensor,
        source: Tensor,
        scale: Tensor | None,
        row_factor: Tensor,
        column_factor: Tensor,
    ) -> None: ...


class _Piece(NamedTuple):
    """Rows ``span`` of the matrices ``entries`` of a batch, and what computes them."""

    form: _Arithmetic
    entries: slice
    span: slice
    view: Tensor


class _Pair(NamedTuple):
    """Factors ``[1 or matrices, k, length]`` in both precisions."""

    single: Tensor
    double: Tensor

    def of(self, form: _Arithmetic) -> Tensor:
        return self.double if form.precision == torch.float64 else self.single

    def part(self, span: slice) -> "_Pair":
        return _Pair(self.single[..., span], self.double[..., span])

    def entries(self, entries: slice) -> "_Pair":
        return self if len(self.double) == 1 else _Pair(self.single[entries], self.double[entries])


class _Factors(NamedTuple):
    """What the update of preserved vectors needs.

    Attributes:
        scale: ``[matrices, vectors]``.
        factor: What the directions, or ``Q``, are multiplied by: ``[matrices, k, vectors]``.
        doubtful: Vectors that float32 cannot carry; None if there are none, as below.
        parallel: Vectors too close to the directions to be rescaled.
        still: Vectors without a component, whose bytes must not change.
    """

    scale: Tensor
    factor: Tensor
    doubtful: Tensor | None = None
    parallel: Tensor | None = None
    still: Tensor | None = None


class Workspace:
    """Where and how to compute, with scratch memory that is kept from one matrix to the next; one per thread.

    Args:
        device: Where the blocks are.
        form: ``torch`` or ``triton``.
        chunks_at_once: How much scratch memory float32 takes, in chunks of 1.8 MiB; the result does not depend on it.
    """

    def __init__(self, device: torch.device, form: Form, *, chunks_at_once: int = 2) -> None:
        self.device = device
        self._chunks_at_once = chunks_at_once
        # MPS has no float64, and not every XPU has it.
        self.state = device if device.type in ("cpu", "cuda") else torch.device("cpu")
        self._form = form
        self._kept: tuple[_Arithmetic, TorchForm] | None = None

    def forms(self, chunk_rows: int, cols: int) -> tuple[_Arithmetic, _Arithmetic]:
        """Return the arithmetic for matrices cut into chunks: in float32, and in float64."""
        if self._kept is None or (self._kept[1].chunk_rows, self._kept[1].cols) != (chunk_rows, cols):
            self._kept = None
            self._kept = (
                self._single(chunk_rows, cols),
                TorchForm(torch.float64, chunk_rows, cols, self.state, self.state),
            )
        return self._kept

    def _single(self, chunk_rows: int, cols: int) -> _Arithmetic:
        if self._form != "triton":
            return TorchForm(torch.float32, chunk_rows, cols, self.device, self.state, self._chunks_at_once)
        # Triton is imported only where it runs.
        from ablate_shards.kernels.project_triton import TritonForm

        return TritonForm(chunk_rows, self.state)


class _Stream:
    """Geometry, measured sums and their guards, which :class:`Projector` and :class:`Meter` share."""

    def __init__(
        self,
        basis: Tensor,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        options: ProjectOptions,
        workspace: Workspace,
    ) -> None:
        if dtype not in AMPLIFICATION:
            raise PlanError(f"dtype: expected bfloat16, float16 or float32, found {dtype}")
        self._batch, self._rows, self._cols = shape
        residual = self._rows if options.axis == -2 else self._cols
        if basis.ndim != 2 or len(basis) == 0 or basis.shape[1] != residual:
            raise DirectionsError(
                f"directions: expected [k, {residual}] for a weight of shape {list(shape)} "
                f"with the residual axis {options.axis}, found {list(basis.shape)}"
            )
        basis = basis.to("cpu", torch.float64)
        error = float((basis @ basis.mT - torch.eye(len(basis), dtype=torch.float64)).abs().max())
        if not error <= ORTHONORMAL:
            raise DirectionsError(
                f"directions: expected orthonormal rows, found a deviation of {error:.1e}; "
                "orthonormalise them in float64"
            )
        self._options = options
        self._dtype = dtype
        self._dots_in_rows = options.axis == -1
        self._norms_in_rows = (options.preserve == "rows") == (options.axis == -2)
        self._chunk = _chunk_rows(self._cols)
        self._single, self._double = workspace.forms(self._chunk, self._cols)
        self._state, self._device = workspace.state, workspace.device
        self._basis = self._pair(basis[None].to(self._state))
        count = basis.shape[0]
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
        return int((~self._squares.isfinite()).sum())

    @property
    def nonfinite_entries(self) -> tuple[int, ...]:
        """The matrices of the batch that hold these vectors."""
        return tuple((~self._squares.isfinite()).any(dim=1).nonzero().flatten().tolist())

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self._batch, *shape, dtype=torch.float64, device=self._state)

    def _pair(self, double: Tensor) -> _Pair:
        return _Pair(double.to(torch.float32).to(self._device), double)

    def _measured(self) -> Measure:
        squares, dots = self._squares.cpu(), self._dots.cpu()
        return Measure(
            norms=squares.sqrt(),
            along=tuple(_sum(matrix.square()) for matrix in dots),
            total=tuple(_sum(matrix) for matrix in squares),
        )

    def _measure(self, piece: _Piece) -> None:
        """Take the squared norms and the components of a piece."""
        entries, span = piece.entries, piece.span
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

    def _row_sums(self, piece: _Piece, weights: _Pair | None, *, squares: bool) -> Tensor:
        """Row sums of a piece ``[matrices, k (+ 1), rows]``, float64, with unsafe chunks done exactly."""
        sums = piece.form.rows(piece.view, weights and weights.of(piece.form), squares=squares).to(self._state)
        if piece.form is self._double or self._dtype == torch.float16:
            return sums
        if squares:
            guarded = sums[:, -1]
        elif self._norms_in_rows:
            guarded = self._squares[piece.entries, piece.span]
        else:
            # Products alone: only their overflow shows, and only it matters.
            guarded = 1 + sums.abs().amax(dim=1)
        for entry, chunk in self._unsafe(guarded):
            part = self._chunk_of(piece, entry, chunk)
            chosen = weights and weights.entries(slice(entry, entry + 1)).double
            low = part.span.start - piece.span.start
            sums[entry, :, low : low + self._chunk] = part.form.rows(part.view, chosen, squares=squares)[0]
        return sums

    def _add_columns(self, piece: _Piece, weights: _Pair | None, into: Tensor, *, squares: bool) -> None:
        """Add the column sums of a piece to ``into``, float64, with unsafe chunks done exactly."""

        def repair(entry: int, chunk: int) -> Tensor:
            part = self._chunk_of(piece, entry, chunk)
            low = part.span.start - piece.span.start
            chosen = weights and weights.entries(slice(entry, entry + 1)).part(slice(low, low + self._chunk))
            sums = into.new_zeros(1, *into.shape[1:])
            # Not "repair" itself: a function that refers to itself keeps the scratch until a collection.
            part.form.add_columns(
                part.view, chosen and chosen.double, sums, squares=squares, unsafe=(), repair=_needless
            )
            return sums[0]

        unsafe: list[tuple[int, int]] | None = []
        if piece.form is self._single and self._dtype != torch.float16:
            if squares:
                unsafe = None
            elif self._norms_in_rows:
                unsafe = self._unsafe(self._squares[piece.entries, piece.span])
        chosen = weights and weights.of(piece.form)
        into = into[piece.entries]
        piece.form.add_columns(piece.view, chosen, into, squares=squares, unsafe=unsafe, repair=repair)

    def _unsafe(self, squares: Tensor) -> list[tuple[int, int]]:
        """Matrix and chunk of the rows ``[matrices, rows]`` whose squares float32 cannot carry."""
        return [] if in_range(squares) else self._chunks_with(~((squares > LOW) & (squares < HIGH)))

    def _chunks_with(self, mask: Tensor) -> list[tuple[int, int]]:
        """Matrix and chunk of the rows that a mask ``[matrices, rows]`` marks."""
        return sorted({(entry, row // self._chunk) for entry, row in mask.nonzero().tolist()})

    def _chunk_of(self, piece: _Piece, entry: int, chunk: int) -> _Piece:
        """One chunk of a piece, for float64."""
        low = chunk * self._chunk
        view = piece.view[entry : entry + 1, low : low + self._chunk]
        first, start = piece.entries.start + entry, piece.span.start + low
        return _Piece(self._double, slice(first, first + 1), slice(start, start + view.shape[1]), view)

    def _pieces(
        self, block: Tensor, start: int, entries: Sequence[int], exact: Container[int] = ()
    ) -> Iterator[_Piece]:
        """Split a block into what each precision computes at once."""
        if block.numel() == 0:
            return
        span = slice(start, start + block.shape[1])
        single = [entry for entry in entries if entry not in exact]
        if len(single) == self._batch:
            yield _Piece(self._single, slice(0, self._batch), span, block)
            return
        for entry in entries:
            form = self._double if entry in exact else self._single
            yield _Piece(form, slice(entry, entry + 1), span, block[entry : entry + 1])


def _needless(entry: int, chunk: int) -> Tensor:
    raise AssertionError(f"float64 sums of chunk {chunk} of matrix {entry} cannot need repair")


class Meter(_Stream):
    """Measures a stored matrix, or a batch of them, in one pass over row blocks.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        shape: Matrices, stored rows, stored columns.
        dtype: bfloat16, float16 or float32.
        options: Says which norms are meant and where the residual axis lies.
        workspace: Where and how to compute.

    Raises:
        DirectionsError: The basis does not fit the shape, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """

    def add(self, block: Tensor, start: int) -> None:
        """Take the rows from ``start``: ``[matrices, rows, cols]`` in the storage dtype, in order."""
        for piece in self._pieces(block, start, range(self._batch)):
            self._measure(piece)

    def result(self) -> Measure:
        """Return the measure of all that was added."""
        return self._measured()


class Projector(_Stream):
    """Ablates a stored matrix, or a batch of them: gather passes over row blocks, then one apply pass.

    Every pass goes over all rows, in order. ``passes`` may grow when a pass ends: what turns out to need
    float64 is gathered once more.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        shape: Matrices, stored rows, stored columns.
        dtype: bfloat16, float16 or float32.
        options: The coefficient, the norms to preserve, the residual axis.
        workspace: Where and how to compute.

    Raises:
        DirectionsError: The basis does not fit the shape, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """

    def __init__(
        self,
        basis: Tensor,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        options: ProjectOptions,
        workspace: Workspace,
    ) -> None:
        super().__init__(basis, shape, dtype, options, workspace)
        self._degenerate = 0
        self._exact: set[int] = set()
        self._doubtful = torch.zeros(self._batch, 1, dtype=torch.bool, device=self._state)
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
        self._largest_norm = torch.finfo(dtype).max / (2 * (1 + abs(options.coefficient)))

    @property
    def passes(self) -> int:
        """Gather passes before the apply pass; read it again after each of them."""
        return len(self._plan)

    @property
    def degenerate(self) -> int:
        """Vectors whose component was removed without rescaling; true after the apply pass."""
        return self._degenerate

    def gather(self, step: int, block: Tensor, start: int) -> None:
        """Take rows in one of the gather passes.

        Args:
            step: The pass, from 0.
            block: ``[matrices, rows, cols]`` in the storage dtype, on the device.
            start: The first of its rows.
        """
        kind, entries = self._plan[step]
        for piece in self._pieces(block, start, entries, self._exact):
            if kind == "probe":
                dots = self._row_sums(piece, self._mixed_pair.entries(piece.entries), squares=False)
                doubtful = self._factors(piece.entries, piece.span, dots).doubtful
                if doubtful is not None:
                    self._doubtful[piece.entries] |= doubtful.any(dim=1, keepdim=True)
                continue
            if kind == "mix":
                mixed = self._row_sums(piece, self._unit_basis.entries(piece.entries), squares=False)
                self._mixed[piece.entries, :, piece.span] = mixed
                self._add_columns(piece, self._pair(mixed), self._cross, squares=False)
                continue
            if self._norms_in_rows:
                self._mix_and_measure(piece)
            else:
                self._measure(piece)
        if start + block.shape[1] == self._rows:
            self._settle(step)

    def apply(self, block: Tensor, start: int) -> None:
        """Ablate rows in place: ``[matrices, rows, cols]`` in the storage dtype, on the device."""
        everything = range(self._batch)
        if self._norms_in_rows:
            for piece in self._pieces(block, start, everything):
                self._apply_to_rows(piece, piece.view)
        elif self._options.coefficient != 0:
            for piece in self._pieces(block, start, everything, self._exact):
                self._apply_to_columns(piece)

    def before(self) -> Measure:
        """Return the measure of the matrices before the ablation; after the apply pass."""
        return self._measured()

    def _mix_and_measure(self, piece: _Piece) -> None:
        """Take row norms, then ``RW`` and ``Q`` at once."""
        squares = self._row_sums(piece, None, squares=True)[:, 0]
        self._squares[piece.entries, piece.span] = squares
        basis = self._basis.double[..., piece.span].expand(len(squares), -1, -1)
        weights = self._pair(torch.cat([basis, basis * _inverse(squares)[:, None]], dim=1))
        self._add_columns(piece, weights, self._column_sums, squares=False)

    def _settle(self, step: int) -> None:
        """Close a gather pass: derive what follows from it, and plan again what float32 cannot carry."""
        kind, entries = self._plan[step]
        repeat = [kind]
        doubtful: Tensor | None
        if kind == "probe":
            doubtful, repeat = self._doubtful, ["measure"]
        elif kind == "measure" and self._mixes_apart:
            self._unit_basis = self._pair(self._basis.double * _inverse(self._squares)[:, None])
            safe = ((self._squares > LOW) & (self._squares < HIGH)) | (self._squares == 0)
            doubtful = ~safe if self._dtype != torch.float16 else torch.zeros_like(safe)
        elif self._norms_in_rows:
            self._gram = _gram(self._mixed)
            self._mixed_pair = self._pair(self._mixed)
            # |U_i| is at least |1 - a|R_iᵀQ||; where that is no help, a probe tells before the apply pass.
            moved = abs(self._options.coefficient) * self._heights(slice(None), slice(None)).sqrt()
            near = (1 + moved > self._amplification * (1 - moved).abs()).any(dim=1)
            probed = [entry for entry in entries if near[entry] and entry not in self._exact]
            if probed:
                self._plan.append(("probe", tuple(probed)))
            return
        else:
            if kind == "mix":
                self._gram = _gram(self._mixed)
                repeat = ["measure", "mix"]
            self._by_column = self._factors(slice(None), slice(None), self._cross if kind == "mix" else self._dots)
            self._scale = self._pair(self._by_column.scale[:, None])
            self._column_factor = self._pair(self._by_column.factor)
            self._degenerate = _count(self._by_column.parallel)
            doubtful = self._by_column.doubtful
        if doubtful is None:
            return
        fresh = sorted(set(doubtful.any(dim=1).nonzero().flatten().tolist()) - self._exact)
        if fresh:
            self._exact.update(fresh)
            self._plan[step + 1 : step + 1] = [(again, tuple(fresh)) for again in repeat]
            self._column_sums[fresh] = 0
            if kind == "mix":
                self._cross[fresh] = 0

    def _heights(self, entries: slice, lines: slice) -> Tensor:
        """Return ``R_iᵀ Q Qᵀ R_i`` for residual indices ``lines``: ``[matrices, lines]``."""
        basis = self._basis.double[..., lines]
        return (self._gram[entries] @ basis * basis).sum(dim=1).clamp_(min=0)

    def _factors(self, entries: slice, lines: slice, dots: Tensor) -> _Factors:
        """What the update of the preserved vectors ``lines`` needs.

        Args:
            entries: The matrices.
            lines: The preserved vectors.
            dots: ``R w`` of each vector, or ``Q w`` where rows are preserved: ``[matrices, k, lines]``.
        """
        alpha = self._options.coefficient
        squares = self._squares[entries, lines]
        if self._options.preserve == "rows":
            basis = self._basis.double[..., lines]
            along = self._heights(entries, lines)
            cross = (basis * dots).sum(dim=1) * _inverse(squares)
            ratio = 1 - 2 * alpha * cross + alpha**2 * along
            factor = alpha * basis * squares.sqrt()[:, None]
        else:
            along = dots.square().sum(dim=1) / squares
            ratio = 1 - (2 * alpha - alpha**2) * along
            factor = alpha * dots
        if self._is_calm(squares, along, ratio):
            scale = torch.ones_like(ratio) if self._options.preserve == "none" else ratio.rsqrt()
            return _Factors(scale, factor * scale[:, None])
        present = squares > 0
        ratio = torch.where(present, ratio, 1.0)
        parallel = ratio < DEGENERATE
        scale = torch.where(parallel, 1.0, ratio.rsqrt())
        if self._options.preserve == "none":
            parallel, scale = torch.zeros_like(parallel), torch.ones_like(scale)
        moved = abs(alpha) * along.sqrt()
        doubtful = present & ((1 + moved).square() > self._amplification**2 * ratio)
        doubtful |= squares > self._largest_norm**2
        still = (along == 0) | ~present
        return _Factors(scale, factor * scale[:, None], _some(doubtful), _some(parallel), _some(still))

    def _is_calm(self, squares: Tensor, along: Tensor, ratio: Tensor) -> bool:
        """Whether no vector is doubtful, parallel or still, told by the extremes alone."""
        if squares.numel() == 0:
            return False
        smallest, largest = (bound.item() for bound in torch.aminmax(squares))
        least, most = (bound.item() for bound in torch.aminmax(along))
        moved = 1 + abs(self._options.coefficient) * math.sqrt(most) if least > 0 else math.inf
        lowest = max(DEGENERATE, moved**2 / self._amplification**2)
        return smallest > 0 and largest <= self._largest_norm**2 and ratio.min().item() >= lowest

    def _apply_to_columns(self, piece: _Piece) -> None:
        """Update a piece of matrices whose preserved vectors are stored columns."""
        entries, span, form = piece.entries, piece.span, piece.form
        rows = self._pair(self._mixed[entries, :, span]) if self._mixes_apart else self._basis.part(span)
        scale = None if self._options.preserve == "none" else self._scale.entries(entries).of(form)
        factor = self._column_factor.entries(entries).of(form)
        still = self._by_column.still
        original = piece.view.clone() if still is not None else None
        form.update(piece.view, piece.view, scale, rows.of(form), factor)
        if still is not None and original is not None:
            _keep(piece.view, original, still[entries, None])

    def _apply_to_rows(self, piece: _Piece, source: Tensor) -> None:
        """Update a piece of matrices whose preserved vectors are stored rows.

        Args:
            piece: What to write.
            source: What to read: the view of the piece, or a copy of it.
        """
        entries, span, form = piece.entries, piece.span, piece.form
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
        copies: list[tuple[_Piece, Tensor]] = []
        if form is self._double:
            self._degenerate += _count(factors.parallel)
        elif factors.doubtful is not None:
            parts = [self._chunk_of(piece, *place) for place in self._chunks_with(factors.doubtful)]
            copies = [(part, part.view.clone()) for part in parts]
        original = source.clone() if factors.still is not None else None
        scale = None if self._options.preserve == "none" else self._pair(factors.scale[..., None]).of(form)
        form.update(piece.view, source, scale, self._pair(factors.factor).of(form), columns.of(form))
        if factors.still is not None and original is not None:
            _keep(piece.view, original, factors.still[..., None])
        for part, copy in copies:
            self._apply_to_rows(part, copy)


def project(
    weight: Tensor,
    basis: Tensor,
    options: ProjectOptions,
    *,
    form: Form | Literal["auto"] = "auto",
    block_rows: int | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, ProjectReport]:
    """Ablate a weight that is in memory.

    Args:
        weight: ``[..., rows, cols]``, bfloat16, float16 or float32, any strides; left as it is.
        basis: ``[k, d]`` float64, orthonormal rows, ``d`` the length of the residual axis.
        options: The coefficient, the norms to preserve, the residual axis.
        form: Which implementation; ``auto`` takes the one that suits the device.
        block_rows: Rows that one step covers, rounded up to whole chunks; the result does not depend on it.
        out: Where to write, of the same shape and dtype; may be ``weight`` itself.

    Returns:
        The new weight and what was measured.

    Raises:
        DirectionsError: The basis does not fit the weight, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """
    chosen, _ = choose_form(weight.device, form=form)
    out = torch.empty_like(weight) if out is None else out
    shape = (math.prod(weight.shape[:-2]), weight.shape[-2], weight.shape[-1])
    if chosen == "reference":
        return _project_by_definition(weight, basis, options, out)
    workspace = Workspace(weight.device, chosen)
    projector = Projector(basis, shape, weight.dtype, options, workspace)
    meter = Meter(basis, shape, weight.dtype, options, workspace)
    rows, chunk = shape[1], projector.chunk_rows
    wanted = max(1, BLOCK_ELEMENTS // max(1, shape[0] * shape[2])) if block_rows is None else block_rows
    step_rows = -(-wanted // chunk) * chunk
    source = weight.reshape(shape)
    result = source.clone(memory_format=torch.contiguous_format)
    step = 0
    while step < projector.passes:
        for start in range(0, rows, step_rows):
            projector.gather(step, result[:, start : start + step_rows], start)
        step += 1
    for start in range(0, rows, step_rows):
        block = result[:, start : start + step_rows]
        projector.apply(block, start)
        meter.add(block, start)
    out.copy_(result.view(weight.shape))
    before, after = projector.before(), meter.result()
    return out, ProjectReport(before, after, norm_drift(before, after), projector.degenerate)


def project_vector(bias: Tensor, basis: Tensor, coefficient: float) -> Tensor:
    """Remove the directions from what a bias writes: ``b - a RᵀRb``, float64 inside, rounded once.

    Args:
        bias: ``[..., d]``, any float dtype.
        basis: ``[k, d]`` float64, orthonormal rows.
        coefficient: 1 removes the component, 2 reflects it.
    """
    if coefficient == 0:
        return bias.clone()
    vector = bias.to("cpu", torch.float64)
    directions = basis.to("cpu", torch.float64)
    moved = vector - coefficient * (vector @ directions.mT @ directions)
    return reference.round_to(moved, bias.dtype).to(bias.device)


def _project_by_definition(
    weight: Tensor, basis: Tensor, options: ProjectOptions, out: Tensor
) -> tuple[Tensor, ProjectReport]:
    exact, degenerate = reference.ablate(
        weight, basis, coefficient=options.coefficient, preserve=options.preserve, axis=options.axis
    )
    before = _measure_by_definition(weight, basis, options)
    out.copy_(reference.round_to(exact, weight.dtype))
    after = _measure_by_definition(out, basis, options)
    return out, ProjectReport(before, after, norm_drift(before, after), int(degenerate.sum()))


def _measure_by_definition(weight: Tensor, basis: Tensor, options: ProjectOptions) -> Measure:
    matrix = weight.to("cpu", torch.float64)
    matrix = (matrix if options.axis == -2 else matrix.mT).reshape(-1, basis.shape[1], _other(weight, options))
    dots = basis.to("cpu", torch.float64) @ matrix
    norms = torch.linalg.vector_norm(matrix, dim=-1 if options.preserve == "rows" else -2)
    return Measure(norms, tuple(map(_sum, dots.square())), tuple(map(_sum, matrix.square())))


def _other(weight: Tensor, options: ProjectOptions) -> int:
    return weight.shape[-1 if options.axis == -2 else -2]


def _some(mask: Tensor) -> Tensor | None:
    return mask if mask.any() else None


def _count(mask: Tensor | None) -> int:
    return 0 if mask is None else int(mask.sum())


def _inverse(squares: Tensor) -> Tensor:
    """Return one over the norms, 0 for a norm of 0."""
    return torch.where(squares > 0, squares.rsqrt(), 0.0)


def _gram(mixed: Tensor) -> Tensor:
    """Return ``Q Qᵀ`` per matrix, ``[matrices, k, k]``, in an order that no thread count changes."""
    sums = [[[_sum(first * second) for second in matrix] for first in matrix] for matrix in mixed.cpu()]
    return torch.tensor(sums, dtype=torch.float64, device=mixed.device)


def _sum(values: Tensor) -> float:
    # NumPy adds pairwise on one thread.
    return float(np.sum(values.numpy()))


def _chunk_rows(cols: int) -> int:
    """Return how many stored rows make a chunk: little memory, and whole groups of what float32 can sum."""
    rows = max(1, min(CHUNK_ROWS, CHUNK_ELEMENTS // max(1, cols)))
    multiple = GROUP_ROWS if rows > GROUP_ROWS else 8
    return rows - rows % multiple if rows > multiple else rows


def _keep(block: Tensor, original: Tensor, still: Tensor) -> None:
    """Put back what must not change by a bit, such as the sign of a zero."""
    block.copy_(torch.where(still.to(block.device), original, block))
