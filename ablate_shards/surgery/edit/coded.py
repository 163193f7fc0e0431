"""Ablates a matrix of codes: the scales stay, and codes are chosen so that rounding does not undo the edit."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.anatomy.scales import Scales, leading
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.edit.sections import Reader
from ablate_shards.surgery.plan.edits import Edit, TensorEdit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.options import Measure, ProjectOptions
    from ablate_shards.kernels.ablate.project import Meter, Projector, Workspace
    from ablate_shards.kernels.codecs.scales import Spread

__all__ = ["CodedMatrix", "CodesMeasured", "ReadRange", "RoundedMatrix", "Rounding", "StoredCodes"]

ReadRange = Callable[[TensorInfo], bytes]
"""Returns the bytes of a tensor of the source, or of a part of one, from whichever shard it lies in."""

#: Bytes of the edited matrix in float32 that are there at a time, and elements that are rounded at once.
_STRIPE, _TILE = 32 << 20, 1 << 20


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding an edited weight to codes did; norms are relative to that of the weight before rounding.

    Attributes:
        ideal: Component of the edited weight along the basis before rounding.
        nearest: Component that the nearest codes would have left.
        changed: Codes that are not the source's.
        error: Norm of what rounding added.
        nearest_error: Norm of what the nearest codes would have added.
    """

    ideal: float
    nearest: float
    changed: int
    error: float
    nearest_error: float

    @classmethod
    def pooled(cls, parts: "Iterable[RoundedMatrix]") -> "Rounding":
        """Returns what was done to several matrices together."""
        measured = list(parts)
        total = math.fsum(each.total for each in measured)

        def relative(squares: Iterable[float]) -> float:
            return math.sqrt(math.fsum(squares) / total) if total else 0.0

        return cls(
            ideal=relative(each.along for each in measured),
            nearest=relative(each.nearest for each in measured),
            changed=sum(each.changed for each in measured),
            error=relative(each.error for each in measured),
            nearest_error=relative(each.nearest_error for each in measured),
        )


class RoundedMatrix(NamedTuple):
    """What was measured of the columns of a rounded matrix, summed: see :class:`~.directed.Rounded`."""

    along: float
    nearest: float
    total: float
    error: float
    nearest_error: float
    changed: int


class CodesMeasured(NamedTuple):
    """What was measured of an ablated matrix of codes.

    Attributes:
        before: Measured in the source.
        after: Measured in the output.
        degenerate: Vectors whose component was removed without rescaling.
        worst_column: The largest component of a column in the output, relative to the columns' root mean square.
        rounding: What rounding did.
    """

    before: "Measure"
    after: "Measure"
    degenerate: int
    worst_column: float
    rounding: RoundedMatrix


class StoredCodes:
    """A matrix of codes as it is stored, and what its codes stand for.

    Args:
        tensor: The tensor of the codes, where it lies and of which shape.
        scales: What its codes are multiplied by.
        number: Which of its matrices.
        read: Reads the scales.

    Attributes:
        rows: How many rows it has.
        cols: How many columns, once it has been opened.
        row_bytes: Bytes of a row.
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        spread: Its scales and zero points, once it has been opened.
    """

    spread: "Spread"

    def __init__(self, tensor: Edit, scales: Scales, number: int, read: ReadRange) -> None:
        self._tensor, self._scales, self._number, self._read = tensor, scales, number, read
        *stack, self.rows = leading(tensor.shape)
        self._matrices = math.prod(stack)
        self.row_bytes = (tensor.end - tensor.start) // max(1, self._matrices * self.rows)
        self.cols = 0
        self.start = tensor.start + number * self.rows * self.row_bytes
        self.end = self.start + self.rows * self.row_bytes

    def open(self) -> None:
        """Reads the scales and zero points.

        Raises:
            ExecuteError: One is not finite or negative, or the shape does not fit the codes.
        """
        self.spread = self._read_spread()
        self.cols = self._columns(self.spread.grid.bits)

    def decoded(self, raw: np.ndarray, first: int) -> np.ndarray:
        """Returns what the codes of some rows stand for, float32.

        Args:
            raw: ``[rows, bytes]`` uint8.
            first: The number of the first row.
        """
        from ablate_shards.kernels.codecs.packing import unpack

        return self.spread.decode_rows(unpack(raw, self.spread.grid.bits, self.cols), first)

    def check(self, raw: np.ndarray) -> None:
        """Refuses codes that stand for nothing.

        Raises:
            ExecuteError: One is NaN.
        """
        grid = self.spread.grid
        if grid.bits == raw.itemsize * 8 and grid.has_nan(raw):
            raise self.refused("holds NaN codes (0x7F or 0xFF), which no projection can edit")

    def refused(self, why: str) -> ExecuteError:
        """Returns the error of a matrix that cannot be edited."""
        where = self._tensor.name
        where = f"{where}, expert {self._number}" if len(leading(self._tensor.shape)) > 1 else where
        return ExecuteError(f"{where}: {why}; fetch its shard again, or leave it out with --layers or --components")

    def _columns(self, bits: int) -> int:
        """Returns how many columns the matrix has: what a part says, or as many as its bytes hold."""
        most = self.row_bytes * 8 // bits
        if (part := self._scales.part("shape")) is None:
            return most
        said = np.frombuffer(self._read(part.tensor), {"I64": "<i8", "I32": "<i4"}[part.dtype]).tolist()
        expected = [*leading(self._tensor.shape), said[-1]]
        if said != expected or -(-said[-1] * bits // 32) * 4 != self.row_bytes:
            raise self.refused(
                f"{part.name} says {said}, but {self.row_bytes // 4} words a row of {bits} bits are "
                f"{[*expected[:-1], most]}"
            )
        return int(said[-1])

    def _read_spread(self) -> "Spread":
        """Returns the matrix's own scales and zero points."""
        from ablate_shards.kernels.codecs.grids import grid_named
        from ablate_shards.kernels.codecs.packing import unpack
        from ablate_shards.kernels.codecs.scales import Spread, decode_scales

        grid, block = grid_named(self._scales.codes), self._scales.block
        values = decode_scales(self._read_own(self._scales.tensor), self._scales.dtype)
        if (part := self._scales.part("multiplier", "divisor")) is not None:
            factor = decode_scales(self._read_own(part.tensor), part.dtype)
            with np.errstate(all="ignore"):
                values = values * factor if part.role == "multiplier" else values / factor
        if not (np.isfinite(values) & (values >= 0)).all():
            name = self._scales.name if part is None else f"{self._scales.name} and {part.name}"
            raise self.refused(f"its scales {name} hold NaN, infinite or negative values")
        values = values.reshape(-(-self.rows // block[0]), -1)
        zeros = None
        if (part := self._scales.part("zero points")) is not None:
            words = np.frombuffer(self._read_own(part.tensor), "<i4").reshape(-1, values.shape[1])
            codes = unpack(np.ascontiguousarray(words.T).view(np.uint8), grid.bits, self.rows)
            zeros = np.ascontiguousarray(grid.levels_of(codes).T.astype(np.int8))
        return Spread(grid, block, values, zeros)

    def _read_own(self, whole: TensorInfo) -> bytes:
        """Returns the bytes of a tensor that are this matrix's."""
        size = (whole.end - whole.start) // max(1, self._matrices)
        start = whole.start + self._number * size
        return self._read(TensorInfo(whole.name, whole.dtype, (), whole.shard, start, start + size))


class CodedMatrix:
    """A matrix of codes to ablate: see ``Section``.

    Its codes before and after are in memory from gathering to the last block, as they are stored. The edited matrix is
    there in stripes of columns: it is what an ablation of the decoded matrix in float32 gives.

    Args:
        edit: The tensor.
        scales: What its codes are multiplied by.
        number: Which of its matrices.
        basis: The basis to remove, ``[k, d]`` float64, orthonormal rows.
        workspace: Returns where to compute, which is the calling thread's own and on the CPU.
        read: Reads the scales.
        room: Codes that a block may have.
    """

    gathers, light = True, False
    _meter: "Meter | None" = None

    def __init__(
        self,
        edit: TensorEdit,
        scales: Scales,
        number: int,
        *,
        basis: np.ndarray,
        workspace: "Callable[[], Workspace]",
        read: ReadRange,
        room: int,
    ) -> None:
        self._edit = edit
        self._basis, self._workspace, self._room = basis, workspace, room
        self._stored = StoredCodes(edit, scales, number, read)
        self._rows, self._row_bytes = self._stored.rows, self._stored.row_bytes
        self.start, self.end = self._stored.start, self._stored.end
        self._cols = self.block = 0
        self._chosen = np.empty((0, 0), np.uint8)
        self._before: Measure | None = None

    def gather(self, read: Reader) -> None:
        """Reads all of it and chooses the codes.

        Raises:
            ExecuteError: A code or a scale is NaN, or what they stand for is too large for float32.
        """
        from ablate_shards.kernels.ablate.project import Projector

        self._stored.open()
        self._spread, self._cols = self._stored.spread, self._stored.cols
        shape = (1, self._rows, self._cols)
        projector = Projector(self._basis, shape, "F32", self._options, self._workspace())
        chunk = projector.chunk_rows
        self._step = max(chunk, self._room // max(1, self._cols) // chunk * chunk)
        self.block = max(1, self._step * self._row_bytes)
        codes = self._codes(read)
        step = 0
        while step < projector.passes:
            for rows in self._spans():
                projector.gather(step, self._loaded(self._decoded(codes[rows], rows)), rows.start)
            step += 1
        if projector.nonfinite:
            raise self._stored.refused("codes times scales are too large for float32")
        self._chosen = codes.copy()
        self._before = projector.before()
        self._round(projector, codes)

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Puts the chosen codes in place of a block."""
        raw[:] = self._chosen.reshape(-1)[offset - self.start :][: len(raw)]

    def measure(self, raw: np.ndarray, offset: int) -> None:
        """Takes a block as it was written."""
        from ablate_shards.kernels.ablate.project import Meter

        if self._meter is None:
            shape = (1, self._rows, self._cols)
            self._meter = Meter(self._basis, shape, "F32", self._options, self._workspace())
        first = (offset - self.start) // self._row_bytes
        rows = slice(first, first + len(raw) // self._row_bytes)
        codes = raw.reshape(-1, self._row_bytes)
        self._stored.check(codes)
        self._meter.add(self._loaded(self._decoded(codes, rows)), first)

    def measured(self) -> CodesMeasured:
        """Returns what was measured; measuring begins anew after it."""
        from ablate_shards.kernels.ablate.project import Meter

        shape = (1, self._rows, self._cols)
        meter = self._meter or Meter(self._basis, shape, "F32", self._options, self._workspace())
        self._meter = None
        if self._before is None:
            raise RuntimeError(f"{self._edit.name}: measured before it was gathered")
        after = meter.result()
        (total,), (largest,) = after.total, after.largest
        worst = math.sqrt(largest * self._cols / total) if total else 0.0
        return CodesMeasured(self._before, after, self._degenerate, worst, self._rounded)

    def _round(self, projector: "Projector", codes: np.ndarray) -> None:
        """Chooses the codes of stripe after stripe of the edited matrix."""
        from ablate_shards.kernels.codecs.packing import ALIGNED, pack, packed_bytes, unpack
        from ablate_shards.kernels.rounding.directed import Rounded, round_directed

        grid = self._spread.grid
        tile = max(1, _TILE // max(1, self._rows))
        tile = tile if grid.bits == ALIGNED else -(-tile // ALIGNED) * ALIGNED
        width = max(tile, _STRIPE // (4 * max(1, self._rows)) // tile * tile)
        self._degenerate = 0
        tiles: list[Rounded] = []
        every_row = slice(0, self._rows)
        for first in range(0, self._cols, width):
            stripe = slice(first, min(first + width, self._cols))
            target = self._edited(projector, codes, stripe)
            # Every stripe is made by editing all rows anew, which counts them anew.
            self._degenerate = projector.degenerate if first == 0 else self._degenerate
            for start in range(stripe.start, stripe.stop, tile):
                part = slice(start, min(start + tile, stripe.stop))
                scales, zeros = self._spread.part(every_row, part)
                wanted = target[:, part.start - first : part.stop - first]
                raw = self._chosen[:, packed_bytes(start, grid.bits) : packed_bytes(part.stop, grid.bits)]
                chosen = unpack(raw, grid.bits, part.stop - start)
                tiles.append(round_directed(grid, wanted, chosen, scales, self._basis, zeros))
                pack(chosen, grid.bits, raw)
        along, nearest, total, error, nearest_error, changed = (
            math.fsum(itertools.chain.from_iterable(each[measure] for each in tiles))
            for measure in range(len(Rounded._fields))
        )
        self._rounded = RoundedMatrix(along, nearest, total, error, nearest_error, int(changed))

    def _edited(self, projector: "Projector", codes: np.ndarray, stripe: slice) -> np.ndarray:
        """Returns some columns of the edited matrix, float32."""
        target = np.empty((self._rows, stripe.stop - stripe.start), np.float32)
        for rows in self._spans():
            values = self._decoded(codes[rows], rows)
            block = self._loaded(values)
            projector.apply(block, rows.start)
            self._workspace().arrays.store(block, _bytes_of(values))
            target[rows] = values[:, stripe]
        return target

    def _codes(self, read: Reader) -> np.ndarray:
        codes = np.empty((self._rows, self._row_bytes), np.uint8)
        flat = codes.reshape(-1)
        for offset in range(self.start, self.end, self.block):
            data = read(offset, min(self.block, self.end - offset))
            flat[offset - self.start :][: len(data)] = data
        for rows in self._spans():
            self._stored.check(codes[rows])
        return codes

    def _decoded(self, raw: np.ndarray, rows: slice) -> np.ndarray:
        """Returns what the codes of some rows stand for, float32."""
        return self._stored.decoded(raw, rows.start)

    def _loaded(self, values: np.ndarray) -> "object":
        return self._workspace().arrays.load(_bytes_of(values), "F32", (1, *values.shape))

    def _spans(self) -> Iterator[slice]:
        for start in range(0, self._rows if self._cols else 0, self._step):
            yield slice(start, min(start + self._step, self._rows))

    @property
    def _options(self) -> "ProjectOptions":
        from ablate_shards.kernels.ablate.options import ProjectOptions

        edit = self._edit
        return ProjectOptions(coefficient=edit.coefficient, preserve=edit.preserve, axis=edit.axis)


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8).reshape(-1)
