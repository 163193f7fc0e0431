"""What a form of the ablation's arithmetic must do, and how float64 stands in where its float32 sums fail."""

import math
from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeAlias

import numpy as np

__all__ = [
    "GROUP_ROWS",
    "HIGH",
    "LOW",
    "Arithmetic",
    "Array",
    "Arrays",
    "BothPrecisions",
    "Float32Limits",
    "Piece",
    "Turn",
    "extremes",
    "in_range",
]

Array: TypeAlias = Any
"""A NumPy array or a torch tensor. What is written once for both keeps to what both understand alike."""

LOW, HIGH = 1e-30, 1e30
"""Squared norms between which float32 sums of squares neither underflow nor overflow."""

GROUP_ROWS = 128
"""Rows that one float32 reduction down a column covers at most."""


class Float32Limits(NamedTuple):
    """The coefficient, and up to which amplification of its rounding and up to which norm float32 is trusted."""

    coefficient: float
    amplification: float
    largest_norm: float


class Turn(Protocol):
    """When a block may add to sums that go on from block to block: after all blocks before it."""

    def has_come(self) -> bool:
        """Whether it may add by now."""

    def do(self, add: Callable[[], None]) -> None:
        """Add now, or later and perhaps in another thread: what is added must still be there then."""


class Arithmetic(Protocol):
    """The sums and the update in one precision; blocks are ``[matrices, rows, cols]`` and start at a chunk."""

    @property
    def is_double(self) -> bool:
        """Whether the precision is float64 rather than float32."""

    def rows(self, block: Array, weights: Array | None, *, squares: bool) -> Array:
        """Reduce along each row.

        Args:
            block: ``[matrices, rows, cols]``, as stored.
            weights: ``[1 or matrices, k, cols]`` in this form's precision.
            squares: Whether the squared norms of the rows are wanted.

        Returns:
            ``[matrices, k (+ 1), rows]`` float64: products with the weights, then the squares.
        """

    def add_columns(
        self,
        block: Array,
        weights: Array | None,
        into: Array,
        *,
        squares: bool,
        unsafe: Container[tuple[int, int]] | None,
        repair: Callable[[int, int], Array],
    ) -> None:
        """Reduce along each column of each chunk, and add the chunks in order.

        Args:
            block: ``[matrices, rows, cols]``, as stored.
            weights: ``[1 or matrices, k, rows]`` in this form's precision.
            into: ``[matrices, k (+ 1), cols]`` float64, what to add to, laid out as :meth:`rows` does.
            squares: Whether the squared norms of the columns are wanted.
            unsafe: Matrix and chunk where this precision fails; None to judge by the squares.
            repair: Returns the sums of such a chunk, ``[k (+ 1), cols]`` float64.
        """

    def update(self, block: Array, source: Array, scale: Array | None, row_factor: Array, column_factor: Array) -> None:
        """Write ``scale * source - sum_k row_factor[k] ⊗ column_factor[k]``, rounded to what is stored.

        Args:
            block: Where to write, ``[matrices, rows, cols]``.
            source: What to read, of the same shape; may be the block.
            scale: ``[matrices, rows, 1]`` or ``[matrices, 1, cols]``, or None for 1.
            row_factor: ``[1 or matrices, k, rows]``.
            column_factor: ``[1 or matrices, k, cols]``.
        """

    def mix(self, piece: "Piece", basis: Array, squares: Array, into: Array) -> None:
        """Take the squared norms of rows, and with them what is added up along the directions.

        Args:
            piece: The rows; what follows is of the whole batch.
            basis: ``[k, rows]`` float64.
            squares: Where the squared norms go, ``[matrices, rows]`` float64.
            into: What to add to, float64: ``R W`` ``[matrices, k, cols]``, or ``[matrices, 2k, cols]`` with ``Q``.
        """

    def move(
        self,
        piece: "Piece",
        basis: Array,
        squares: Array,
        gram: Array,
        mixed: "BothPrecisions",
        limits: Float32Limits,
        crosses: Array,
        columns: slice | None,
    ) -> int:
        """Ablate rows and keep their norms.

        Args:
            piece: The rows; what follows is of the whole batch.
            basis: ``[k, rows]`` float64.
            squares: Squared norms ``[matrices, rows]``, float64.
            gram: ``Q Qᵀ``, ``[matrices, k, k]`` float64.
            mixed: ``Q``, ``[matrices, k, cols]``.
            limits: The coefficient, and where float64 takes over.
            crosses: ``[matrices, rows, 2]`` float64: what a form that updates by parts keeps of each row.
            columns: The columns that the piece has, of rows that were ablated whole before; None where it has all.

        Returns:
            How many rows were too close to the directions to be rescaled.
        """


class Arrays(Protocol):
    """Where blocks and sums live: in NumPy arrays, or in torch tensors of a device.

    Attributes:
        xp: ``numpy`` or ``torch``.
        chunk_elements: Elements that a chunk has at most, unless one row has more.
        by_parts: Whether some columns can be updated without the others, to the same bit.
    """

    xp: ModuleType
    chunk_elements: int
    by_parts: bool

    def forms(self, chunk_rows: int, cols: int) -> tuple[Arithmetic, Arithmetic]:
        """Return the arithmetic for matrices cut into chunks: in float32, and in float64."""

    def zeros(self, *shape: int) -> Array:
        """Return float64 zeros for sums."""

    def state(self, values: np.ndarray) -> Array:
        """Bring float64 values to where the sums are."""

    def single(self, values: Array) -> Array:
        """Bring sums in float32 to where the blocks are."""

    def host(self, values: Array) -> np.ndarray:
        """Bring sums to NumPy."""

    def clone(self, block: Array) -> Array:
        """Return a contiguous copy."""

    def keep(self, block: Array, original: Array, still: Array) -> None:
        """Put back what must not change by a bit, such as the sign of a zero; the mask is broadcast."""

    def buffer(self, count: int) -> np.ndarray:
        """Return new memory ``[count]`` uint8 for bytes on their way from and to a file."""

    def load(self, raw: np.ndarray, dtype: str, shape: tuple[int, int, int]) -> Array:
        """Return a block made of stored bytes ``[count]`` uint8; a view of them where it can be one."""

    def store(self, block: Array, raw: np.ndarray) -> None:
        """Put the bytes of a block where they were loaded from."""

    def quiet(self) -> AbstractContextManager[object]:
        """Turn off warnings of values that become NaN or infinite: they are looked for afterwards."""


class BothPrecisions(NamedTuple):
    """Factors ``[1 or matrices, k, length]`` in both precisions."""

    single: Array
    double: Array

    @classmethod
    def rounded(cls, double: Array, arrays: Arrays) -> "BothPrecisions":
        """Return float64 factors, and what float32 makes of them."""
        return cls(arrays.single(double), double)

    def of(self, form: Arithmetic) -> Array:
        """Return them in the precision of a form."""
        return self.double if form.is_double else self.single

    def part(self, span: slice) -> "BothPrecisions":
        """Return a part of their length."""
        return BothPrecisions(self.single[..., span], self.double[..., span])

    def entries(self, entries: slice) -> "BothPrecisions":
        """Return those of some matrices."""
        return self if len(self.double) == 1 else BothPrecisions(self.single[entries], self.double[entries])


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows of some matrices of a batch; chunks whose float32 sums cannot be trusted are summed in float64.

    Attributes:
        form: What computes it.
        exact: The same in float64.
        guarded: Whether the sums of ``form`` may fail: not in float64, nor in float32 of what is stored as float16.
        arrays: Where its sums live.
        chunk_rows: Rows of a chunk.
        entries: Which matrices.
        span: Which of their rows; they begin at a chunk.
        view: Where to write, ``[matrices, rows, cols]``.
        source: What to read: the view, or a copy of it.
        turn: When its sums may be added to those of the rows before it; None for now.
        spare: Memory for sums that wait for their turn, by shape; used again, as the system takes long to lend it.
    """

    form: Arithmetic
    exact: Arithmetic
    guarded: bool
    arrays: Arrays
    chunk_rows: int
    entries: slice
    span: slice
    view: Array
    source: Array
    turn: Turn | None = None
    spare: dict[tuple[int, ...], list[Array]] = field(default_factory=dict)

    def row_sums(self, weights: BothPrecisions | None, *, squares: bool = False, known: Array | None = None) -> Array:
        """Reduce along each row, as :meth:`Arithmetic.rows` does.

        Args:
            weights: ``[1 or matrices, k, cols]``.
            squares: Whether the squared norms of the rows are wanted.
            known: These norms ``[matrices, rows]``, where they are known already.
        """
        sums = self.form.rows(self.source, weights and weights.of(self.form), squares=squares)
        if not self.guarded:
            return sums
        if squares:
            known = sums[:, -1]
        elif known is None:
            # Products alone: only their overflow shows, and only it matters.
            known = 1 + self.arrays.xp.amax(abs(sums), 1)
        for entry, chunk in self._unsafe(known):
            chosen = weights and weights.entries(slice(entry, entry + 1))
            exact = self.chunk(entry, chunk).row_sums(chosen, squares=squares)
            sums[entry, :, self._rows_of(chunk)] = exact[0]
        return sums

    def add_columns(
        self, weights: BothPrecisions | None, into: Array, *, squares: bool = False, known: Array | None = None
    ) -> None:
        """Reduce along each column and add to ``into``, as :meth:`Arithmetic.add_columns` does.

        Args:
            weights: ``[1 or matrices, k, rows]``.
            into: ``[matrices, k (+ 1), cols]`` float64.
            squares: Whether the squared norms of the columns are wanted.
            known: Squared norms of the rows ``[matrices, rows]``; without either, float32 is trusted.
        """
        if self.turn is not None and not self.turn.has_come():
            parts = [self._rows_of(chunk) for chunk in range(math.ceil(self.source.shape[1] / self.chunk_rows))]
            apart = self.apart(into, len(parts))
            for part, sums in zip(parts, apart, strict=True):
                chosen = weights and weights.part(part)
                norms = None if known is None else known[:, part]
                self._some_rows(part).add_columns(chosen, sums, squares=squares, known=norms)
            self.add_in_turn(into, apart)
            return

        def repair(entry: int, chunk: int) -> Array:
            chosen = weights and weights.entries(slice(entry, entry + 1)).part(self._rows_of(chunk))
            sums = self.arrays.zeros(1, *into.shape[1:])
            self.chunk(entry, chunk).add_columns(chosen, sums, squares=squares)
            return sums[0]

        unsafe: list[tuple[int, int]] | None = []
        if self.guarded and squares:
            unsafe = None
        elif self.guarded and known is not None:
            unsafe = self._unsafe(known)
        chosen = weights and weights.of(self.form)
        self.form.add_columns(self.source, chosen, into, squares=squares, unsafe=unsafe, repair=repair)

    def apart(self, into: Array, count: int) -> list[Array]:
        """Return as many zeros to add to as sums that have an order need, for :meth:`add_in_turn`."""
        spare = self.spare.setdefault(tuple(into.shape), [])
        parts = []
        for _ in range(count):
            try:
                part = spare.pop()
            except IndexError:
                parts.append(self.arrays.zeros(*into.shape))
            else:
                part[...] = 0
                parts.append(part)
        return parts

    def add_in_turn(self, into: Array, parts: list[Array]) -> None:
        """Add to sums, part after part, once what comes before has been added."""

        def add() -> None:
            with self.arrays.quiet():
                for part in parts:
                    self.arrays.xp.add(into, part, out=into)
            self.spare[tuple(into.shape)].extend(parts)

        if self.turn is None:
            add()
        else:
            self.turn.do(add)

    def chunks_with(self, mask: Array) -> list[tuple[int, int]]:
        """Return matrix and chunk of the rows that a mask ``[matrices, rows]`` marks."""
        return sorted({(entry, row // self.chunk_rows) for entry, row in self.arrays.xp.argwhere(mask).tolist()})

    def chunk(self, entry: int, chunk: int) -> "Piece":
        """Return one chunk, for float64."""
        rows, first = self._rows_of(chunk), self.entries.start + entry
        view, source = (block[entry : entry + 1, rows] for block in (self.view, self.source))
        whole = self._some_rows(rows)
        return replace(whole, form=self.exact, guarded=False, entries=slice(first, first + 1), view=view, source=source)

    def _some_rows(self, rows: slice) -> "Piece":
        """Return some rows of it, whose sums are added to what they are given at once."""
        view, source, start = self.view[:, rows], self.source[:, rows], self.span.start + rows.start
        return replace(self, span=slice(start, start + view.shape[1]), view=view, source=source, turn=None)

    def _unsafe(self, squares: Array) -> list[tuple[int, int]]:
        """Matrix and chunk of the rows ``[matrices, rows]`` whose squares are out of float32's range."""
        return [] if in_range(squares) else self.chunks_with(~((squares > LOW) & (squares < HIGH)))

    def _rows_of(self, chunk: int) -> slice:
        return slice(chunk * self.chunk_rows, (chunk + 1) * self.chunk_rows)


def extremes(values: Array) -> tuple[float, float]:
    """Return the least and the greatest value; both are NaN if any is."""
    if isinstance(values, np.ndarray):
        return float(values.min()), float(values.max())
    least, most = values.aminmax()
    return least.item(), most.item()


def in_range(squares: Array) -> bool:
    """Whether float32 sums of squares can be trusted: no overflow, underflow, zero or NaN among them."""
    if 0 in squares.shape:
        return True
    least, most = extremes(squares)
    return least > LOW and most < HIGH
