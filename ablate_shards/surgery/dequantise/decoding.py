"""Reads what the codes of a quantised weight stand for: scales, zero points and shapes from its parts."""

import math
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ablate_shards.errors import ArchitectureError, ExecuteError
from ablate_shards.surgery.anatomy.bitsandbytes import NESTED, State, read_state, state_of
from ablate_shards.surgery.anatomy.scales import Scales, find_scales
from ablate_shards.surgery.checkpoint.headers import TensorInfo

if TYPE_CHECKING:
    from ablate_shards.kernels.codecs.grid import Grid
    from ablate_shards.kernels.codecs.scales import Spread

__all__ = ["AT_ONCE", "CodedWeight", "Kept", "ReadRange", "pieces", "read_scales"]

ReadRange = Callable[[TensorInfo], bytes]
"""Returns the bytes of a tensor of the source, or of a part of one, from whichever shard it lies in."""

AT_ONCE = 1 << 17
"""Codes decoded at once: their numbers in float32 stay in a core's cache."""

#: The greatest code of NVFP4 times its greatest scale.
_GREATEST_NVFP4 = 6 * 448
#: Stands in place of groups that follow each other.
_UNORDERED = -1


class Kept(threading.local):
    """What a thread needs again for the next rows of the same matrix: its scales, or all of it transposed.

    Each is kept with what it is of. Beside them memory to decode into, which would otherwise be given back to the
    system and fetched again each time.
    """

    spread: "tuple[object, Spread] | None" = None
    matrix: tuple[object, np.ndarray] | None = None

    def __init__(self) -> None:
        self.room = np.empty(AT_ONCE, np.float32)
        self.bits = np.empty(AT_ONCE, np.uint32)


def pieces(height: int, first: int, last: int) -> Iterator[tuple[int, slice]]:
    """Yields a matrix and rows of it at a time, for rows of matrices of one height that are counted together."""
    while first < last:
        number, row = divmod(first, height)
        stop = min(height, row + last - first)
        yield number, slice(row, stop)
        first += stop - row


def read_scales(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any, read: ReadRange) -> Scales:
    """Finds the scales of any quantised weight: ``find_scales``, with what has to be read for it.

    Args:
        codes: The weight.
        tensors: What the checkpoint holds.
        config: The ``quantization_config`` of its config.json, None where there is none.
        read: Reads from the source.

    Raises:
        ArchitectureError: There are none or two, or they do not fit; the message does not name the weight.
    """
    state = state_of(codes, tensors)
    rows = None if state is None else read_state(state.name, read(state)).shape[0]
    return find_scales(codes, tensors, config, rows)


class _Codes(Protocol):
    """Where codes lie: what a ``TensorInfo`` says."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shard(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> int: ...
    @property
    def end(self) -> int: ...


class CodedWeight:
    """A weight of codes, ``[rows, columns]`` or several such matrices.

    Args:
        codes: Where its codes lie.
        scales: What they are multiplied by, and what else belongs to them.
        read: Reads these from the source.
        way_out: How a message about it ends.

    Attributes:
        matrices: How many it has.
        rows: Rows of each.
        size: Bytes of codes of each.
        by_rows: Whether they are stored row by row; others are turned when they were read, and back.
        row_bytes: Bytes of codes in a row.
    """

    def __init__(self, codes: _Codes, scales: Scales, read: ReadRange, way_out: str) -> None:
        self._codes, self._scales, self._read, self._way_out = codes, scales, read, way_out
        *stack, self.rows = scales.leading(codes.shape)
        self.matrices = math.prod(stack)
        self.size = (codes.end - codes.start) // max(1, self.matrices)
        self.by_rows = scales.order in ("rows", "line")
        bits = scales.bits
        self._most = self.size * 8 // bits // max(1, self.rows)
        self.row_bytes = self.size // max(1, self.rows) if self.by_rows else -(-self._most * bits // 8)

    def columns(self) -> int:
        """Returns how many columns each matrix has: what a part says, or as many as its bytes hold.

        Raises:
            ExecuteError: The part says what its bytes do not hold.
        """
        bits, most = self._scales.bits, self._most
        if (state := self._state()) is not None and state.shape != (self.rows, most):
            found, whole = list(state.shape), self._scales.part("state")
            raise self.refused(0, f"{whole and whole.name} says {found}, but its codes are {[self.rows, most]}")
        if (part := self._scales.part("shape")) is None:
            return most
        said = np.frombuffer(self._read(part), {"I64": "<i8", "I32": "<i4"}[part.dtype]).tolist()
        expected = [*self._scales.leading(self._codes.shape), said[-1]]
        if said != expected or -(-said[-1] * bits // 32) * 4 != self.row_bytes:
            raise self.refused(
                0,
                f"{part.name} says {said}, but {self.row_bytes // 4} words a row of {bits} bits are "
                f"{[*expected[:-1], most]}",
            )
        return int(said[-1])

    def spread(self, number: int) -> "Spread":
        """Returns the scales and zero points of one of its matrices.

        Raises:
            ExecuteError: A scale is NaN, infinite or negative, or a column is of a group that is not there.
        """
        from ablate_shards.kernels.codecs.grids import grid_named
        from ablate_shards.kernels.codecs.scales import Spread, decode_scales

        grid, block = grid_named(self._scales.codes), self._scales.block
        if self._scales.part("nested scales") is not None:
            values = self._nested()
        else:
            values = decode_scales(self._read_own(self._scales, number), self._scales.meant_as)
        self._check_table(grid)
        if (part := self._scales.part("multiplier", "divisor", "maximum")) is not None:
            factor = decode_scales(self._read_own(part, number), part.dtype)
            with np.errstate(all="ignore"):
                if part.role == "maximum":
                    factor = factor / np.float32(_GREATEST_NVFP4)
                values = values / factor if part.role == "divisor" else values * factor
        signed = grid.kind in ("affine", "table")
        if not (np.isfinite(values) & (signed | (values >= 0))).all():
            name = self._scales.name if part is None else f"{self._scales.name} and {part.name}"
            kinds = "NaN or infinite" if signed else "NaN, infinite or negative"
            raise self.refused(number, f"its scales {name} hold {kinds} values")
        if self.by_rows:
            values = values.reshape(-(-self.rows // block[0]), -1)
        else:
            values = np.ascontiguousarray(values.reshape(-1, self.rows).T)
        count = values.shape[1]
        zeros = self._zeros(grid, number, count)
        return Spread(grid, block, values, zeros, self._groups(number, count), self._scales.factor)

    def read_rows(self, number: int, rows: slice) -> np.ndarray:
        """Reads rows of a matrix of codes, ``[rows, row_bytes]`` uint8; where it is not stored so, all is read."""
        start = self._codes.start + number * self.size
        end = start + self.size
        if self.by_rows:
            start, end = start + rows.start * self.row_bytes, start + rows.stop * self.row_bytes
        where = TensorInfo(self._codes.name, self._codes.dtype, (), self._codes.shard, start, end)
        raw = np.frombuffer(self._read(where), np.uint8)
        return self.turned(raw) if self.by_rows else self.turned(raw)[rows]

    def turned(self, stored: np.ndarray) -> np.ndarray:
        """Returns the codes of a matrix row by row, ``[rows, row_bytes]``, from its bytes, uint8.

        Of those that are stored by rows, any number of rows is taken.
        """
        from ablate_shards.kernels.codecs.orders import to_rows

        if self.by_rows:
            return self._nibbles_turned(stored).reshape(-1, self.row_bytes)
        return to_rows(stored, self._scales.order, self._scales.bits, self.rows)

    def turned_back(self, codes: np.ndarray) -> np.ndarray:
        """Returns the bytes that the codes of a matrix are stored as, uint8: the reverse of :meth:`turned`."""
        from ablate_shards.kernels.codecs.orders import from_rows

        if self.by_rows:
            return self._nibbles_turned(codes.reshape(-1))
        return from_rows(codes, self._scales.order, self._scales.bits, self._most)

    def _nibbles_turned(self, stored: np.ndarray) -> np.ndarray:
        return stored << 4 | stored >> 4 if self._scales.order == "line" else stored

    def kept_spread(self, number: int, kept: Kept) -> "Spread":
        """Returns what :meth:`spread` does, read once for rows that follow each other."""
        key = (id(self), number)
        if kept.spread is None or kept.spread[0] != key:
            kept.spread = key, self.spread(number)
        return kept.spread[1]

    def decode(
        self,
        raw: np.ndarray,
        spread: "Spread",
        first: int,
        columns: int,
        column: int = 0,
        room: np.ndarray | None = None,
    ) -> np.ndarray:
        """Returns what rows of codes stand for, float32.

        Args:
            raw: ``[rows, bytes]`` uint8, from the byte on in which their first column begins.
            spread: The scales of their matrix.
            first: The number of the first row.
            columns: How many columns they have.
            column: The number of the first column.
            room: Memory to put it into, float32, where that is large enough; new memory if None.
        """
        from ablate_shards.kernels.codecs.packing import unpack

        count = len(raw) * columns
        values = (np.empty(count, np.float32) if room is None or len(room) < count else room[:count]).reshape(
            -1, columns
        )
        step = max(1, AT_ONCE // max(1, columns))
        for start in range(0, len(raw), step):
            codes = unpack(raw[start : start + step], spread.grid.bits, columns)
            spread.decode_rows(codes, first + start, column, values[start : start + step])
        return values

    def check(self, number: int, raw: np.ndarray) -> None:
        """Looks for codes that stand for nothing.

        Args:
            number: The matrix that they are of.
            raw: Codes as stored, uint8.

        Raises:
            ExecuteError: One is NaN.
        """
        from ablate_shards.kernels.codecs.grids import grid_named

        grid = grid_named(self._scales.codes)
        if grid.bits == raw.itemsize * 8 and grid.has_nan(raw):
            raise self.refused(number, "holds NaN codes (0x7F or 0xFF)")

    def refused(self, number: int, why: str) -> ExecuteError:
        """Returns the error of a matrix that cannot be decoded or edited."""
        name = self._codes.name
        where = f"{name}, expert {number}" if len(self._scales.leading(self._codes.shape)) > 1 else name
        return ExecuteError(f"{where}: {why}; {self._way_out}")

    def _zeros(self, grid: "Grid", number: int, groups: int) -> np.ndarray | None:
        """Returns the levels of a matrix's zero points, ``[rows, groups]`` int8, or its offsets, float32, or none."""
        from ablate_shards.kernels.codecs.orders import outputs_in_order
        from ablate_shards.kernels.codecs.packing import unpack
        from ablate_shards.kernels.codecs.scales import decode_scales

        if (part := self._scales.part("offsets")) is not None:
            offsets = decode_scales(self._read_own(part, number), part.dtype)
            if not np.isfinite(offsets).all():
                raise self.refused(number, f"its offsets {part.name} hold NaN or infinite values")
            return offsets.reshape(-1, groups)
        if (part := self._scales.part("zero points", "zero points less one")) is None:
            return None
        if part.dtype == "I8":
            return np.frombuffer(self._read_own(part, number), np.int8).reshape(-1, groups)
        words = np.frombuffer(self._read_own(part, number), "<i4")
        lines = np.ascontiguousarray(words.reshape(-1, groups).T) if self.by_rows else words.reshape(groups, -1)
        codes = unpack(lines.view(np.uint8), grid.bits, self.rows)
        if self._scales.order == "outputs":
            codes = outputs_in_order(codes)
        levels = grid.levels_of(codes) + (part.role == "zero points less one")
        return np.ascontiguousarray(levels.T.astype(np.int8))

    def _state(self) -> State | None:
        """Returns what the state of a weight of bitsandbytes says.

        Raises:
            ExecuteError: It does not fit the codes.
        """
        if (part := self._scales.part("state")) is None:
            return None
        try:
            state = read_state(part.name, self._read(part))
        except ArchitectureError as error:
            raise self.refused(0, str(error)) from error
        nested = self._scales.part("nested scales") is not None
        said = (state.kind, state.block, state.offset is not None)
        if said != (self._scales.codes, self._scales.block[1], nested):
            raise self.refused(
                0,
                f"{part.name} says {state.kind} in blocks of {state.block}, {'with' if said[2] else 'without'} an "
                f"offset of scales, but its parts are {self._scales.form(())}",
            )
        return state

    def _nested(self) -> np.ndarray:
        """Returns scales that are codes themselves, float32: of a table, times scales, plus an offset."""
        scales, table = self._scales.part("nested scales"), self._scales.part("nested table")
        state = self._state()
        if scales is None or table is None or state is None or state.offset is None:
            raise RuntimeError(f"{self._codes.name}: its scales are no codes")
        codes = np.frombuffer(self._read(self._scales), np.uint8)
        values = np.frombuffer(self._read(table), "<f4")[codes]
        with np.errstate(all="ignore"):
            values *= np.frombuffer(self._read(scales), "<f4").repeat(NESTED)[: len(codes)]
            values += np.float32(state.offset)
        return values

    def _check_table(self, grid: "Grid") -> None:
        """Compares the values of codes, and how bytes lie, with what is known.

        Raises:
            ExecuteError: They are others.
        """
        table, layout = self._scales.part("table"), self._scales.part("layout")
        if table is not None and not np.array_equal(np.frombuffer(self._read(table), "<f4"), grid.values):
            raise self.refused(0, f"{table.name} holds other values than those of {grid.name}")
        if layout is not None and any(self._read(layout)):
            raise self.refused(0, f"{layout.name} says that its bytes do not lie row by row")

    def _groups(self, number: int, count: int) -> np.ndarray | None:
        """Returns the group of each column, where the checkpoint says it."""
        if (part := self._scales.part("groups")) is None:
            return None
        groups = np.frombuffer(self._read(part), {"I64": "<i8", "I32": "<i4"}[part.dtype])
        columns = self.columns()
        if (groups == _UNORDERED).any():
            return None
        if len(groups) != columns or groups.min(initial=0) < 0 or groups.max(initial=0) >= count:
            found = f"{len(groups)} numbers from {groups.min(initial=0)} to {groups.max(initial=0)}"
            raise self.refused(number, f"{part.name} has {found}, but there are {columns} columns in {count} groups")
        return groups

    def _read_own(self, whole: TensorInfo, number: int) -> bytes:
        """Returns the bytes of a tensor that are one matrix's."""
        size = (whole.end - whole.start) // max(1, self.matrices)
        start = whole.start + number * size
        return self._read(TensorInfo(whole.name, whole.dtype, (), whole.shard, start, start + size))
