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

import importlib.util
import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ablate_shards.errors import DirectionsError, PlanError
from ablate_shards.kernels import reference
from ablate_shards.kernels.project_torch import TorchForm
from ablate_shards.kernels.reference import DEGENERATE, Preserve

__all__ = [
    "Form",
    "Measure",
    "Meter",
    "Preserve",
    "ProjectOptions",
    "ProjectReport",
    "Projector",
    "choose_form",
    "merge",
    "norm_drift",
    "project",
    "project_vector",
]

Form = Literal["reference", "torch", "triton"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CHUNK_ROWS = 64
CHUNK_ELEMENTS = 64 * 3584
"""With float32 and, when needed, float64 scratch, a chunk of this size takes 2.6 MiB."""
BLOCK_ELEMENTS = 1 << 22
ORTHONORMAL = 1e-9
CANCELLED = 0.25
"""Squared residual, relative to the squared norm, below which float32 loses too many digits."""
LOW, HIGH = 1e-30, 1e30
"""Squared norms between which float32 sums of squares neither underflow nor overflow."""


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
    if importlib.util.find_spec("triton") is None:
        return "torch", "triton is not installed"
    return "triton", f"Triton runs on {device.type}"


class Arithmetic(Protocol):
    """The sums and the update in one precision; :class:`TorchForm` documents the methods."""

    whole_blocks: bool
    precision: torch.dtype
    device: torch.device

    def load(self, block: Tensor) -> Tensor: ...
    def rows(self, tile: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor: ...
    def columns(self, tile: Tensor, weights: Tensor | None, *, squares: bool) -> Tensor: ...
    def accumulate(self, partial: Tensor, into: Tensor) -> None: ...
    def update(
        self, tile: Tensor, block: Tensor, scale: Tensor | None, row_factor: Tensor, column_factor: Tensor
    ) -> None: ...


class _Piece(NamedTuple):
    """A part of a block that is computed at once: some matrices of the batch, whole chunks of rows."""

    form: Arithmetic
    entries: slice
    span: slice
    view: Tensor


class _Pair(NamedTuple):
    """Factors ``[1 or matrices, k, length]`` in both precisions."""

    single: Tensor
    double: Tensor

    def of(self, form: Arithmetic) -> Tensor:
        return self.double if form.precision == torch.float64 else self.single

    def part(self, span: slice) -> "_Pair":
        return _Pair(self.single[..., span], self.double[..., span])

    def entries(self, entries: slice) -> "_Pair":
        return self if len(self.double) == 1 else _Pair(self.single[entries], self.double[entries])


class _Stream:
    """Geometry, measured sums and their guards, which :class:`Projector` and :class:`Meter` share."""

    def __init__(
        self,
        basis: Tensor,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        options: ProjectOptions,
        *,
        device: torch.device,
        form: Form,
    ) -> None:
        if dtype not in DTYPES:
            raise PlanError(f"dtype: expected bfloat16, float16 or float32, found {dtype}")
        self._batch, self._rows, self._cols = shape
        residual = self._rows if options.axis == -2 else self._cols
        if basis.ndim != 2 or basis.shape[1] != residual:
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
        # Only sums over a column depend on how many rows a chunk has.
        cap = 4 * CHUNK_ROWS if self._dots_in_rows and self._norms_in_rows else CHUNK_ROWS
        chunk = max(1, min(cap, CHUNK_ELEMENTS // max(1, self._cols)))
        self._chunk = chunk - chunk % 8 if chunk >= 8 else chunk

        # MPS has no float64.
        exact_device = torch.device("cpu") if device.type == "mps" else device
        self._double: Arithmetic = TorchForm(self._chunk, self._cols, torch.float64, exact_device)
        self._single: Arithmetic = _single_form(form, self._chunk, self._cols, device)
        self._state = exact_device
        self._device = device
        self._basis = self._pair(basis[None].to(exact_device))
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

    def _measure(self, piece: _Piece, tile: Tensor) -> None:
        """Take the squared norms and the components of a piece; column squares use up the tile."""
        entries, span = piece.entries, piece.span
        if self._norms_in_rows:
            weights = self._basis if self._dots_in_rows else None
            sums = self._row_sums(piece, tile, weights, squares=True)
            self._squares[entries, span] = sums[:, -1]
            if weights is not None:
                self._dots[entries, :, span] = sums[:, :-1]
            else:
                self._add_columns(piece, tile, self._basis.part(span), self._column_sums, squares=False)
        else:
            if self._dots_in_rows:
                self._dots[entries, :, span] = self._row_sums(piece, tile, self._basis, squares=False)
                weights = None
            else:
                weights = self._basis.part(span)
            self._add_columns(piece, tile, weights, self._column_sums, squares=True)

    def _row_sums(
        self, piece: _Piece, tile: Tensor, weights: _Pair | None, *, squares: bool
    ) -> Tensor:
        """Row sums of a piece ``[matrices, k (+ 1), rows]``, float64, with unsafe chunks done exactly."""
        sums = piece.form.rows(tile, weights and weights.of(piece.form), squares=squares).to(self._state)
        if piece.form is self._double:
            return sums
        if squares:
            unsafe = self._unsafe(sums[:, -1])
        elif self._norms_in_rows:
            unsafe = self._unsafe(self._squares[piece.entries, piece.span])
        else:
            unsafe = self._unsafe(sums.abs().amax(dim=1) + 1)
        for part, entry, span in self._chunks(piece, unsafe):
            tile = self._double.load(part.view)
            chosen = weights and weights.entries(slice(entry, entry + 1)).double
            sums[entry, :, span] = self._double.rows(tile, chosen, squares=squares)[0]
        return sums

    def _add_columns(
        self, piece: _Piece, tile: Tensor, weights: _Pair | None, into: Tensor, *, squares: bool
    ) -> None:
        """Add the column sums of a piece to ``into``, float64, with unsafe chunks done exactly."""
        into = into[piece.entries]
        partial = piece.form.columns(tile, weights and weights.of(piece.form), squares=squares)
        unsafe: list[tuple[int, int]] = []
        if piece.form is self._single and squares:
            unsafe = self._unsafe(partial[:, :, -1])
        elif piece.form is self._single and self._norms_in_rows:
            unsafe = self._unsafe(self._squares[piece.entries, piece.span])
        if not unsafe:
            piece.form.accumulate(partial, into)
            return
        exact = partial.to(self._state, torch.float64)
        for part, entry, span in self._chunks(piece, unsafe):
            tile = self._double.load(part.view)
            chosen = weights and weights.part(span).entries(slice(entry, entry + 1)).double
            exact[entry, span.start // self._chunk] = self._double.columns(tile, chosen, squares=squares)[0, 0]
        self._double.accumulate(exact, into)

    def _unsafe(self, squares: Tensor) -> list[tuple[int, int]]:
        """Matrix and chunk where float32 squares overflow, underflow or meet a non-finite weight.

        Args:
            squares: ``[matrices, rows]``, or ``[matrices, chunks, cols]``.
        """
        if self._dtype == torch.float16 or squares.numel() == 0:
            return []
        least, most = torch.aminmax(squares)
        if least.item() > LOW and most.item() < HIGH:
            return []
        return self._grouped(~((squares > LOW) & (squares < HIGH)))

    def _grouped(self, mask: Tensor) -> list[tuple[int, int]]:
        """Matrix and chunk of what a mask ``[matrices, rows]`` or ``[matrices, chunks, cols]`` marks."""
        if mask.ndim == 3:
            return [(entry, chunk) for entry, chunk in mask.any(dim=2).nonzero().tolist()]
        return sorted({(entry, row // self._chunk) for entry, row in mask.nonzero().tolist()})

    def _chunks(
        self, piece: _Piece, chosen: list[tuple[int, int]]
    ) -> Iterator[tuple[_Piece, int, slice]]:
        """The chosen chunks of a piece, as pieces of their own for float64, with their place in it."""
        for entry, chunk in chosen:
            low = chunk * self._chunk
            high = min(low + self._chunk, piece.view.shape[1])
            matrix = slice(piece.entries.start + entry, piece.entries.start + entry + 1)
            rows = slice(piece.span.start + low, piece.span.start + high)
            part = _Piece(self._double, matrix, rows, piece.view[entry : entry + 1, low:high])
            yield part, entry, slice(low, high)

    def _pieces(
        self, block: Tensor, start: int, entries: Iterable[int], exact: Container[int] = ()
    ) -> Iterator[_Piece]:
        rows = block.shape[1]
        chosen = list(entries)
        if self._single.whole_blocks:
            single = [entry for entry in chosen if entry not in exact]
            chosen = [entry for entry in chosen if entry in exact]
            everything = len(single) == self._batch
            spans = [slice(0, self._batch)] if everything else [slice(b, b + 1) for b in single]
            for span in spans:
                yield _Piece(self._single, span, slice(start, start + rows), block[span])
        for entry in chosen:
            form = self._double if entry in exact else self._single
            for low in range(0, rows, self._chunk):
                high = min(rows, low + self._chunk)
                view = block[entry : entry + 1, low:high]
                yield _Piece(form, slice(entry, entry + 1), slice(start + low, start + high), view)


class Meter(_Stream):
    """Measures a stored matrix, or a batch of them, in one pass over row blocks.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        shape: Matrices, stored rows, stored columns.
        dtype: bfloat16, float16 or float32.
        options: Says which norms are meant and where the residual axis lies.
        device: Where the blocks are.
        form: ``torch`` or ``triton``.

    Raises:
        DirectionsError: The basis does not fit the shape, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """

    def add(self, block: Tensor, start: int) -> None:
        """Take the rows from ``start``: ``[matrices, rows, cols]`` in the storage dtype, in order."""
        for piece in self._pieces(block, start, range(self._batch)):
            self._measure(piece, piece.form.load(piece.view))

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
        device: Where the blocks are.
        form: ``torch`` or ``triton``.

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
        *,
        device: torch.device,
        form: Form,
    ) -> None:
        super().__init__(basis, shape, dtype, options, device=device, form=form)
        self._degenerate = 0
        self._exact: set[int] = set()
        everything = tuple(range(self._batch))
        self._plan: list[tuple[str, tuple[int, ...]]] = []
        if 0 not in shape and not (self._dots_in_rows and self._norms_in_rows):
            self._plan.append(("measure", everything))
        if options.preserve == "rows":
            count = basis.shape[0]
            self._mixed = self._zeros(count, self._rows if self._dots_in_rows else self._cols)
            if self._dots_in_rows and self._plan:
                self._cross = self._zeros(count, self._cols)
                self._plan.append(("mix", everything))
        ceiling = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
        self._largest_norm = ceiling / (2 * (1 + abs(options.coefficient)))

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
            tile = piece.form.load(piece.view)
            if kind == "mix":
                self._mix_rows(piece, tile)
            elif self._options.preserve == "rows" and not self._dots_in_rows:
                self._measure(piece, tile)
                weights = self._pair(self._basis.double[..., piece.span] * self._inverse(piece)[:, None])
                self._add_columns(piece, tile, weights, self._mixed, squares=False)
            else:
                self._measure(piece, tile)
        if start + block.shape[1] == self._rows:
            self._settle(step)

    def apply(self, block: Tensor, start: int) -> None:
        """Ablate rows in place: ``[matrices, rows, cols]`` in the storage dtype, on the device."""
        everything = range(self._batch)
        if self._norms_in_rows:
            for piece in self._pieces(block, start, everything):
                self._apply_rows(piece, piece.view)
        elif self._options.coefficient != 0:
            for piece in self._pieces(block, start, everything, self._exact):
                self._apply_columns(piece)

    def before(self) -> Measure:
        """Return the measure of the matrices before the ablation; after the apply pass."""
        return self._measured()

    def _mix_rows(self, piece: _Piece, tile: Tensor) -> None:
        """Second gather pass for rows of a matrix stored ``[n, d]``: ``Q`` per stored row, and ``Q Wᵀ``."""
        entries = piece.entries
        sums = self._row_sums(piece, tile, self._unit_basis.entries(entries), squares=False)
        self._mixed[entries, :, piece.span] = sums
        self._add_columns(piece, tile, self._pair(sums), self._cross, squares=False)

    def _inverse(self, piece: _Piece) -> Tensor:
        return _inverse_norms(self._squares[piece.entries, piece.span])

    def _settle(self, step: int) -> None:
        """Close a gather pass: derive the factors, or plan to gather again what float32 cannot carry."""
        kind, entries = self._plan[step]
        again: set[int] = set()
        following = step + 1 == len(self._plan)
        if self._options.preserve == "rows" and self._dots_in_rows:
            if kind == "measure":
                if self._dtype != torch.float16:
                    odd = (self._squares != 0) & ~((self._squares > LOW) & (self._squares < HIGH))
                    again = set(odd.any(dim=1).nonzero().flatten().tolist()) - self._exact
                    self._exact |= again
                if again:
                    self._plan.insert(step + 1, ("measure", tuple(sorted(again))))
                    self._clear(again, self._column_sums)
                self._unit_basis = self._pair(self._basis.double * _inverse_norms(self._squares)[:, None])
                return
        if not following:
            return
