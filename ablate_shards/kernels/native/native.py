"""What C does on a CPU for ablations, directions and merges: the same bytes on every one.

``native.c`` is compiled when the package is installed, where there is a C compiler. What it computes depends on no
instruction set, no number of threads and no library, so that a receipt can be checked to the bit on another machine.
"""

import ctypes
import functools
import math
import threading
from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from ablate_shards.kernels.codecs.grid import Grid, Kind
from ablate_shards.kernels.codecs.plain import STORED
from ablate_shards.kernels.form import BothPrecisions, Float32Limits, Piece, in_range

__all__ = [
    "LIBRARY",
    "PIECE",
    "NativeArrays",
    "NativeForm",
    "add_exactly",
    "add_group_sums",
    "add_rounded",
    "greatest_bits",
    "group_dots",
    "guard",
    "is_built",
    "pairs_in_order",
    "round_directed",
]

LIBRARY = Path(__file__).with_name("_native.so")
_VERSION = 15
_DTYPES = {np.dtype(STORED[name]): number for number, name in enumerate(("BF16", "F16", "F32"))}
_PRECISIONS: dict[type[np.floating], str] = {np.float32: "single", np.float64: "double"}
_UNSCALED, _BY_ROW, _BY_COLUMN = range(3)

_VARIANTS = {8: "avx2", 16: "avx512"}
_PAIR = 32
#: Rows that the library adds up in float32 before it adds to the sums of a block.
_GROUP = 32
#: Bytes a row: of 16 columns four values in float32, a level, a bucket and a zero point.
_ROUNDING_SCRATCH = 16 * (5 * 4 + 3)
_SIGN = np.uint8(0x80)
_guarding = threading.Lock()
_KINDS: dict[Kind, int] = {"E4M3": 0, "E2M1": 1, "integer": 2, "affine": 3, "table": 4}

PIECE = 64
"""Elements that :func:`add_rounded` looks at together."""


class _Shape(ctypes.Structure):
    """A block: matrices, rows, columns, and from one matrix or row to the next in elements."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("batch", "rows", "cols", "matrix_stride", "row_stride"))


class _Move(ctypes.Structure):
    """What rows lose their component by: ``Move`` in ``native.c``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "count")),
        *((name, ctypes.c_double) for name in ("coefficient", "amplification", "largest_norm")),
        *((name, ctypes.c_void_p) for name in ("basis", "squares", "gram", "mixed_single", "mixed_double")),
        *((name, ctypes.c_void_p) for name in ("crosses", "scratch")),
        ("known", ctypes.c_int64),
    )


class _Table(ctypes.Structure):
    """Codes whose values are looked up: ``Table`` in ``native_codes.h``."""

    _fields_ = (
        *((name, ctypes.c_float * 16) for name in ("values", "below")),
        *((name, ctypes.c_int32 * 16) for name in ("levels", "codes")),
        ("greatest", ctypes.c_int32),
    )


class _Rounding(ctypes.Structure):
    """A matrix that is rounded to codes: ``Rounding`` in ``native_codes.h``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("kind", "bits", "rows", "cols", "target_stride", "code_stride")),
        *((name, ctypes.c_int64) for name in ("scale_row", "scale_col", "zero_row", "zero_col", "count")),
        *((name, ctypes.c_void_p) for name in ("target", "codes", "scales", "zeros", "table", "basis", "heights")),
        *((name, ctypes.c_void_p) for name in ("measures", "scratch")),
        ("nothing", ctypes.c_double),
    )


def is_built() -> bool:
    """Whether the library was built when the package was installed, and for this version of it."""
    return _library() is not None


@cache
def _library() -> ctypes.CDLL | None:
    """Return the library with the widest vectors that this CPU has, or none."""
    library = _load(LIBRARY)
    width = library.ablate_vector_width() if library else 0
    for least, name in sorted(_VARIANTS.items(), reverse=True):
        faster = _load(LIBRARY.with_stem(f"{LIBRARY.stem}_{name}")) if width >= least else None
        if faster is not None:
            return faster
    return library


def _load(path: Path) -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(str(path))
        if ctypes.c_int.in_dll(library, "ablate_version").value != _VERSION:
            return None
        _declare(library)
    except (OSError, ValueError, AttributeError):  # there is none, or it lacks something
        return None
    return library


def _declare(library: ctypes.CDLL) -> None:
    """Say what each function takes and returns."""
    address, count, flag, shape = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.POINTER(_Shape)
    columns = (flag, address, shape, address, count, count, flag, address)
    update = (flag, address, shape, address, shape, address, flag, address, count, address, count, count, address)
    library.ablate_vector_width.argtypes = ()
    library.ablate_vector_width.restype = flag
    library.ablate_mix.argtypes = (flag, address, shape, count, flag, address, count, count, flag, address, address)
    library.ablate_mix.restype = None
    library.ablate_move.argtypes = (flag, address, shape, flag, ctypes.POINTER(_Move))
    library.ablate_move.restype = count
    library.ablate_group_sums.argtypes = (flag, address, shape, count, count, address, address)
    library.ablate_group_sums.restype = None
    library.ablate_group_dots.argtypes = (flag, address, shape, count, count, address, address, address, address)
    library.ablate_group_dots.restype = None
    library.ablate_pairs.argtypes = (address, count, address, count)
    library.ablate_pairs.restype = count
    library.ablate_greatest.argtypes = (address, shape)
    library.ablate_greatest.restype = flag
    library.ablate_add.argtypes = (
        *(address, shape, address, count, address, address, ctypes.c_float, ctypes.c_float),
        *(address, address, count, address),
    )
    library.ablate_add.restype = count
    library.ablate_add_exactly.argtypes = (address, shape, address, address, count, address, count, address)
    library.ablate_add_exactly.restype = None
    library.ablate_guard.argtypes, library.ablate_guard.restype = (address, count, ctypes.c_char_p), flag
    library.ablate_unguard.argtypes, library.ablate_unguard.restype = (flag,), None
    library.ablate_round.argtypes, library.ablate_round.restype = (ctypes.POINTER(_Rounding),), None
    for precision in _PRECISIONS.values():
        for name, arguments in (("rows", (*columns, address)), ("columns", columns), ("update", update)):
            function = getattr(library, f"ablate_{name}_{precision}")
            function.argtypes, function.restype = arguments, None


def add_group_sums(block: np.ndarray, first: int, into: np.ndarray) -> bool:
    """Do what :func:`~.grouped.add_group_sums` does; return False, having done nothing, where it cannot."""
    library = _for_groups(block)
    if library is not None:
        scratch = np.empty((len(into), _whole_pairs(block)))
        library.ablate_group_sums(*_described(block[None]), first, len(into), into.ctypes.data, scratch.ctypes.data)
    return library is not None


def group_dots(block: np.ndarray, first: int, weights: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> bool:
    """Write to ``out`` what :func:`~.grouped.group_dots` returns; False where it cannot be."""
    library = _for_groups(block)
    if library is not None:
        weights, offsets = np.ascontiguousarray(weights), np.ascontiguousarray(offsets)
        scratch = np.empty((len(weights), _whole_pairs(block)))
        library.ablate_group_dots(
            *_described(block[None]), first, len(weights), weights.ctypes.data, offsets.ctypes.data,
            scratch.ctypes.data, out.ctypes.data,
        )  # fmt: skip
    return library is not None


def pairs_in_order(lower: np.ndarray, higher: np.ndarray) -> int | None:
    """Return what :func:`~.grouped.pairs_in_order` does of ascending values; None if it cannot."""
    library = _library()
    if library is None:
        return None
    return int(library.ablate_pairs(lower.ctypes.data, len(lower), higher.ctypes.data, len(higher)))


def guard(address: int, size: int, sentence: str) -> Callable[[], None] | None:
    """Let the process end with a sentence, and exit code 1, when mapped memory is touched that its file has lost.

    Otherwise it ends with a bus error, which no Python sees.

    Args:
        address: Where the memory begins.
        size: Bytes of it.
        sentence: What is written to stderr.

    Returns:
        What takes the guard away, to be called before the memory is unmapped; None where there can be no guard.
    """
    library = _library()
    if library is None:
        return None
    with _guarding:
        slot = library.ablate_guard(address, size, f"{sentence}\n".encode(errors="replace"))
    return None if slot < 0 else functools.partial(library.ablate_unguard, slot)


def greatest_bits(block: np.ndarray) -> int:
    """Return the bits of the greatest magnitude among bfloat16 or float16 values ``[rows, cols]``."""
    library = _library()
    if library is None:
        return int((block.view(np.uint16) & 0x7FFF).max())
    _, address, shape = _described(block.view(np.uint16)[None])
    return int(library.ablate_greatest(address, shape))


def add_rounded(
    block: np.ndarray,
    added: np.ndarray,
    rows: np.ndarray,
    columns: np.ndarray,
    slope: float,
    least: float,
    out: np.ndarray,
    unsure: np.ndarray,
) -> tuple[int, float] | None:
    """Add to bfloat16 values what is known to within a margin, where both ends of the margin round to the same sum.

    The margin of element ``w`` in row ``i`` and column ``j`` is ``rows[i] * columns[j] + slope |w| + least``.

    Args:
        block: ``[rows, cols]`` uint16, the bits of bfloat16.
        added: ``[rows, cols]`` float32, rows of adjacent columns.
        rows: ``[rows]`` float32.
        columns: ``[cols]`` float32.
        slope: As above.
        least: As above.
        out: Where the sums go, ``[rows, cols]`` uint16, adjacent.
        unsure: Where to list the elements that are not rounded alike, int64; all but its last ``PIECE`` places are
            filled before the rest of the block is left undone.

    Returns:
        How many were listed, and the sum of squares of what was there; None, and nothing is done, where the library was
        not built.
    """
    library = _library()
    if library is None:
        return None
    squares = ctypes.c_double(0)
    _, address, shape = _described(block[None])
    count = library.ablate_add(
        address, shape, added.ctypes.data, added.strides[0] // added.itemsize, rows.ctypes.data, columns.ctypes.data,
        slope, least, out.ctypes.data, unsure.ctypes.data, len(unsure) - PIECE, ctypes.addressof(squares),
    )  # fmt: skip
    return int(count), squares.value


def add_exactly(block: np.ndarray, left: np.ndarray, right: np.ndarray, places: np.ndarray, out: np.ndarray) -> bool:
    """Add a low-rank product to some bfloat16 values in float64; return False where the library was not built.

    Args:
        block: ``[rows, cols]`` uint16, the bits of bfloat16.
        left: ``[rows, r]`` float64, adjacent.
        right: ``[cols, r]`` float64, adjacent.
        places: Which values, int64, counted along the rows.
        out: Where the sums go, rounded, ``[rows, cols]`` uint16, adjacent.
    """
    library = _library()
    if library is not None:
        _, address, shape = _described(block[None])
        library.ablate_add_exactly(
            address, shape, left.ctypes.data, right.ctypes.data, left.shape[1], places.ctypes.data, len(places),
            out.ctypes.data,
        )  # fmt: skip
    return library is not None


def _for_groups(block: np.ndarray) -> ctypes.CDLL | None:
    return _library() if block.size and block.dtype in _DTYPES and block.flags.aligned else None


class NativeForm:
    """Chunk arithmetic in one precision, on NumPy arrays; :class:`Arithmetic` says what the methods do.

    Args:
        precision: float32 or float64; float32 sums cover 32 rows or 512 columns at most.
        chunk_rows: Rows whose sums are looked at together for what float32 cannot carry.

    Raises:
        RuntimeError: The library was not built; see :func:`is_built`.
    """

    def __init__(self, precision: type[np.floating], chunk_rows: int) -> None:
        library = _library()
        if library is None:
            raise RuntimeError(f"{LIBRARY}: not built; install the package again where there is a C compiler")
        self._precision, self._chunk_rows = precision, chunk_rows
        self._mix, self._move = library.ablate_mix, library.ablate_move
        self._rows, self._columns, self._update = (
            getattr(library, f"ablate_{name}_{_PRECISIONS[precision]}") for name in ("rows", "columns", "update")
        )

    @property
    def is_double(self) -> bool:
        """Whether the precision is float64 rather than float32."""
        return self._precision is np.float64

    def rows(self, block: np.ndarray, weights: np.ndarray | None, *, squares: bool) -> np.ndarray:
        """Reduce along each row."""
        factors = _Adjacent(weights)
        sums = np.empty((len(block), factors.count + squares, block.shape[1]))
        scratch = self._scratch(block, factors.count)
        self._rows(
            *_described(block), *factors.described(), factors.count, squares, scratch.ctypes.data, sums.ctypes.data
        )
        return sums

    def add_columns(
        self,
        block: np.ndarray,
        weights: np.ndarray | None,
        into: np.ndarray,
        *,
        squares: bool,
        unsafe: Container[tuple[int, int]] | None,
        repair: Callable[[int, int], np.ndarray],
    ) -> None:
        """Reduce along each column of each chunk, and add the chunks in order."""
        sums = np.empty((1, *into.shape[1:]))
        for entry, total in enumerate(into):
            lines = None if weights is None else weights[min(entry, len(weights) - 1)][None]
            for chunk, low in enumerate(range(0, block.shape[1], self._chunk_rows)):
                if unsafe is not None and (entry, chunk) in unsafe:
                    total += repair(entry, chunk)
                    continue
                part = slice(low, low + self._chunk_rows)
                factors = _Adjacent(None if lines is None else lines[..., part])
                sums.fill(0)
                described = _described(block[entry : entry + 1, part])
                self._columns(*described, *factors.described(), factors.count, squares, sums.ctypes.data)
                total += repair(entry, chunk) if unsafe is None and not in_range(sums[0, -1]) else sums[0]

    def update(
        self,
        block: np.ndarray,
        source: np.ndarray,
        scale: np.ndarray | None,
        row_factor: np.ndarray,
        column_factor: np.ndarray,
    ) -> None:
        """Write ``scale * source - sum_k row_factor[k] ⊗ column_factor[k]``, rounded to what is stored."""
        scales, rows, columns = _Adjacent(scale), _Adjacent(row_factor), _Adjacent(column_factor)
        scaled = _UNSCALED
        if scale is not None:
            scaled = _BY_ROW if scale.shape[1:] == (block.shape[1], 1) else _BY_COLUMN
        _, address, shape = _described(source)
        where, _ = scales.described()
        scratch = self._scratch(block, rows.count + 1)
        self._update(
            *_described(block), address, shape, where, scaled, *rows.described(), *columns.described(), rows.count,
            scratch.ctypes.data,
        )  # fmt: skip

    def _scratch(self, block: np.ndarray, lines: int) -> np.ndarray:
        """Return scratch memory for ``lines`` factors of each column, laid out as the library wants it."""
        return np.empty((lines, _whole_pairs(block)), self._precision)

    def mix(self, piece: Piece, basis: np.ndarray, squares: np.ndarray, into: np.ndarray) -> None:
        """Take the squared norms of rows, and with them what is added up along the directions."""
        squares, into, turn, height = squares[piece.entries], into[piece.entries], piece.turn, piece.source.shape[1]
        if turn is None or turn.has_come():
            self._mix_rows(piece, slice(0, height), basis, squares, into)
            return
        groups = [
            slice(low, min(low + _GROUP, start + self._chunk_rows, height))
            for start in range(0, height, self._chunk_rows)
            for low in range(start, min(start + self._chunk_rows, height), _GROUP)
        ]
        apart = piece.apart(into, len(groups))
        for group, sums in zip(groups, apart, strict=True):
            self._mix_rows(piece, group, basis, squares, sums)
        piece.add_in_turn(into, apart)

    def _mix_rows(self, piece: Piece, part: slice, basis: np.ndarray, squares: np.ndarray, into: np.ndarray) -> None:
        """Do what :meth:`mix` does of some rows of a piece; norms and sums are those of the piece's matrices."""
        count, rows = basis.shape
        first = 8 * (piece.span.start + part.start)
        self._mix(
            *_described(piece.source[:, part]), self._chunk_rows, self.is_double, basis.ctypes.data + first, rows,
            count, into.shape[1] > count, squares.ctypes.data + first, into.ctypes.data,
        )  # fmt: skip

    def move(
        self,
        piece: Piece,
        basis: np.ndarray,
        squares: np.ndarray,
        gram: np.ndarray,
        mixed: BothPrecisions,
        limits: Float32Limits,
        crosses: np.ndarray,
        columns: slice | None,
    ) -> int:
        """Ablate rows and keep their norms; return how many were too close to the directions to be rescaled."""
        count, rows = basis.shape
        first, squares, gram = 8 * piece.span.start, squares[piece.entries], gram[piece.entries]
        single, double = mixed.entries(piece.entries)
        if columns is not None:
            single, double = (np.ascontiguousarray(each[..., columns]) for each in (single, double))
        crosses = crosses[piece.entries]
        scratch = np.empty((2 * count, _whole_pairs(piece.view)))
        move = _Move(
            rows, count, *limits, basis.ctypes.data + first, squares.ctypes.data + first, gram.ctypes.data,
            single.ctypes.data, double.ctypes.data, crosses.ctypes.data + 2 * first, scratch.ctypes.data,
            columns is not None,
        )  # fmt: skip
        return int(self._move(*_described(piece.view), self.is_double, move))


class _Adjacent:
    """Factors ``[1 or matrices, k, length]``, which lie adjacent while a call uses them."""

    def __init__(self, values: np.ndarray | None) -> None:
        self._values = None if values is None else np.ascontiguousarray(values)
        self.count = 0 if values is None else values.shape[1]

    def described(self) -> tuple[int | None, int]:
        """Return where they are, and how far one matrix's are from the next one's: 0 if all share them."""
        if self._values is None:
            return None, 0
        return self._values.ctypes.data, self._values[0].size if len(self._values) > 1 else 0


class NativeArrays:
    """Blocks and sums in NumPy arrays; :class:`Arrays` says what the methods do."""

    xp: ModuleType = np
    chunk_elements = 1 << 19
    by_parts = True

    def forms(self, chunk_rows: int, cols: int) -> tuple[NativeForm, NativeForm]:
        """Return the arithmetic in float32 and in float64."""
        return NativeForm(np.float32, chunk_rows), NativeForm(np.float64, chunk_rows)

    def zeros(self, *shape: int) -> np.ndarray:
        """Return float64 zeros for sums."""
        return np.zeros(shape)

    def state(self, values: np.ndarray) -> np.ndarray:
        """Return the values: they are where they should be."""
        return values

    def single(self, values: np.ndarray) -> np.ndarray:
        """Return sums in float32."""
        return values.astype(np.float32)

    def host(self, values: np.ndarray) -> np.ndarray:
        """Return the sums: they are where they should be."""
        return values

    def clone(self, block: np.ndarray) -> np.ndarray:
        """Return a contiguous copy."""
        return block.copy()

    def keep(self, block: np.ndarray, original: np.ndarray, still: np.ndarray) -> None:
        """Put back what must not change by a bit."""
        np.copyto(block, original, where=still)

    def buffer(self, count: int) -> np.ndarray:
        """Return new memory for bytes."""
        return np.empty(count, np.uint8)

    def load(self, raw: np.ndarray, dtype: str, shape: tuple[int, int, int]) -> np.ndarray:
        """Return a view of stored bytes."""
        return raw.view(STORED[dtype]).reshape(shape)

    def store(self, block: np.ndarray, raw: np.ndarray) -> None:
        """Do nothing: a block is a view of its bytes."""

    def quiet(self) -> AbstractContextManager[None]:
        """Turn off warnings of values out of range."""
        return np.errstate(all="ignore")


def _whole_pairs(block: np.ndarray) -> int:
    columns: int = block.shape[-1]
    return math.ceil(columns / _PAIR) * _PAIR


def _described(block: np.ndarray) -> tuple[int, int, _Shape]:
    """Return the dtype, the address and the shape of a block whose columns are adjacent."""
    matrix, row, column = block.strides
    if column != block.itemsize and block.shape[2] > 1:
        raise ValueError(f"columns: expected {block.itemsize} bytes from one to the next, found {column}")
    shape = _Shape(*block.shape, matrix // block.itemsize, row // block.itemsize)
    return _DTYPES[block.dtype], block.ctypes.data, shape


def round_directed(
    grid: Grid,
    target: np.ndarray,
    codes: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray | None,
    basis: np.ndarray,
    measures: np.ndarray,
) -> bool:
    """Do what :func:`~.directed.round_directed` does; return False, having done nothing, where it cannot.

    Args:
        grid: What the codes mean.
        target: ``[d, n]`` float32, adjacent columns.
        codes: ``[d, n]`` uint8, adjacent columns; receives the result.
        scales: ``[d, n]`` float32.
        zeros: ``[d, n]`` int8, or None, of integers; float32 of affine codes.
        basis: ``[k, d]`` float64.
        measures: ``[6, n]`` float64, receives what :class:`~.directed.Rounded` holds.
    """
    library = _library()
    if library is None:
        return False
    basis = np.ascontiguousarray(basis)
    heights = (basis**2).sum(axis=0)
    scratch = np.empty(len(target) * _ROUNDING_SCRATCH, np.uint8)
    table = _Table(*grid.table()) if grid.kind == "table" else None
    job = _Rounding(
        _KINDS[grid.kind], grid.bits, *target.shape, target.strides[0] // target.itemsize, codes.strides[0],
        *(stride // scales.itemsize for stride in scales.strides),
        *((0, 0) if zeros is None else (stride // zeros.itemsize for stride in zeros.strides)),
        len(basis), *(each.ctypes.data for each in (target, codes, scales)),
        None if zeros is None else zeros.ctypes.data, None if table is None else ctypes.addressof(table),
        *(each.ctypes.data for each in (basis, heights, measures, scratch)), grid.nothing,
    )  # fmt: skip
    # The library counts integers from the smallest one on.
    if grid.signed:
        np.bitwise_xor(codes, _SIGN, out=codes)
    library.ablate_round(job)
    if grid.signed:
        np.bitwise_xor(codes, _SIGN, out=codes)
    return True
