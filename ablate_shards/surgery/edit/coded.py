"""Ablates a matrix of codes: the scales stay, and codes are chosen so that rounding does not undo the edit."""

import functools
import itertools
import math
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.dequantise.decoding import CodedWeight, ReadRange
from ablate_shards.surgery.edit.loops import Each
from ablate_shards.surgery.edit.sections import Reader
from ablate_shards.surgery.plan.edits import TensorEdit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.options import Measure, ProjectOptions
    from ablate_shards.kernels.ablate.project import Meter, Projector, Workspace
    from ablate_shards.kernels.codecs.scales import Spread
    from ablate_shards.kernels.form import Turn

__all__ = ["CodedMatrix", "CodedSection", "CodesMeasured", "RoundedMatrix", "Rounding"]

#: Bytes of the edited matrix in float32 that are there at a time, and elements that are rounded at once.
_STRIPE, _TILE = 32 << 20, 1 << 20
_WAY_OUT = "fetch its shard again, or leave it out with --layers or --components"


@dataclass(frozen=True, slots=True)
class Rounding:
    """What rounding an edited weight to codes did; norms are relative to that of the weight before rounding.

    Attributes:
        ideal: Component of the edited weight along the basis before rounding.
        nearest: Component that the nearest codes would have left.
        changed: Codes that are not the source's.
        error: Norm of what rounding added.
        nearest_error: Norm of what the nearest codes would have added.
        undone: How much of the change along the basis the nearest codes undid, where these were chosen; else None.
    """

    ideal: float
    nearest: float
    changed: int
    error: float
    nearest_error: float
    undone: float | None

    @classmethod
    def pooled(cls, parts: "Iterable[RoundedMatrix]") -> "Rounding":
        """Returns what was done to several matrices together."""
        measured = list(parts)
        total = math.fsum(each.total for each in measured)

        asked = math.fsum(each.asked for each in measured if each.asked is not None)
        missed = [each.missed for each in measured if each.missed is not None]

        def relative(squares: Iterable[float]) -> float:
            return math.sqrt(math.fsum(squares) / total) if total else 0.0

        return cls(
            ideal=relative(each.along for each in measured),
            nearest=relative(each.nearest for each in measured),
            changed=sum(each.changed for each in measured),
            error=relative(each.error for each in measured),
            nearest_error=relative(each.nearest_error for each in measured),
            undone=math.sqrt(math.fsum(missed) / asked) if asked else 0.0 if missed else None,
        )


class RoundedMatrix(NamedTuple):
    """What was measured of a rounded matrix, its columns summed: see ``Rounded``, and ``Undone`` of nearest codes."""

    along: float
    nearest: float
    total: float
    error: float
    nearest_error: float
    changed: int
    asked: float | None = None
    missed: float | None = None


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


class CodedSection:
    """What every matrix of codes to ablate has, whichever way its codes are chosen: see ``Section``.

    Args:
        edit: The tensor.
        scales: What its codes are multiplied by.
        number: Which of its matrices.
        basis: The basis to remove, ``[k, d]`` float64, orthonormal rows.
        workspace: Returns where to compute, which is the calling thread's own and on the CPU.
        read: Reads the scales.
        room: Codes that a block may have.
        each: Goes over blocks and stripes.
    """

    gathers = True
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
        each: Each,
    ) -> None:
        self._edit, self._number = edit, number
        self._basis, self._workspace, self._room = basis, workspace, room
        self.each = each
        self._beginning = threading.Lock()
        self._weight = CodedWeight(edit, scales, read, _WAY_OUT)
        self._rows, self._row_bytes = self._weight.rows, self._weight.row_bytes
        self._cols = self._step = self.block = 0
        self.start = edit.start + number * self._weight.size
        self.end = self.start + self._weight.size
        self._spread: Spread

    def _begin(self) -> "Projector":
        """Reads the scales, decides on the size of blocks, and returns what ablates."""
        from ablate_shards.kernels.ablate.project import Projector

        self._spread = self._weight.spread(self._number)
        self._cols = self._weight.columns()
        projector = Projector(self._basis, self._shape, "F32", self._options, self._workspace())
        chunk = projector.chunk_rows
        self._step = max(chunk, self._room // max(1, self._cols) // chunk * chunk)
        self.block = max(1, self._step * self._row_bytes)
        return projector

    def _check_size(self, projector: "Projector") -> None:
        if projector.nonfinite:
            raise self._weight.refused(self._number, "codes times scales are too large for float32")

    def _decoded(self, raw: np.ndarray, first: int) -> np.ndarray:
        """Returns what the codes of rows from a row on stand for, float32."""
        return self._weight.decode(raw, self._spread, first, self._cols)

    def _loaded(self, values: np.ndarray) -> "object":
        return self._workspace().arrays.load(_bytes_of(values), "F32", (1, *values.shape))

    def _ablated(self, values: np.ndarray, ablate: "Callable[[Any], None]") -> np.ndarray:
        """Returns decoded values after an ablation in place."""
        block = self._loaded(values)
        ablate(block)
        self._workspace().arrays.store(block, _bytes_of(values))
        return values

    def _meter_rows(self, codes: np.ndarray, first: int, turn: "Turn | None") -> None:
        """Measures rows of codes from a row on."""
        with self._beginning:
            self._meter = self._meter or self._new_meter()
        self._weight.check(self._number, codes)
        self._meter.add(self._loaded(self._decoded(codes, first)), first, turn)

    def _metered(self, vectors: int) -> "tuple[Measure, float]":
        """Returns what was measured, and the worst of so many vectors; measuring begins anew after it."""
        meter, self._meter = self._meter or self._new_meter(), None
        after = meter.result()
        (total,), (largest,) = after.total, after.largest
        return after, math.sqrt(largest * vectors / total) if total else 0.0

    def _new_meter(self) -> "Meter":
        from ablate_shards.kernels.ablate.project import Meter

        return Meter(self._basis, self._shape, "F32", self._options, self._workspace())

    @property
    def _shape(self) -> tuple[int, int, int]:
        return 1, self._rows, self._cols

    @property
    def _options(self) -> "ProjectOptions":
        from ablate_shards.kernels.ablate.options import ProjectOptions

        edit = self._edit
        return ProjectOptions(coefficient=edit.coefficient, preserve=edit.preserve, axis=edit.axis)


class CodedMatrix(CodedSection):
    """A matrix of codes ``[d, n]`` to ablate.

    Its codes before and after are in memory from gathering to the last block, as they are stored. The edited matrix is
    there in stripes of columns: it is what an ablation of the decoded matrix in float32 gives. Codes that are stored
    transposed are turned when they were read, and back when they were chosen; they are measured when all were written.
    """

    light = False
    _before: "Measure | None" = None
    _chosen = np.empty((0, 0), np.uint8)
    _stored = _written = np.empty(0, np.uint8)

    def gather(self, read: Reader) -> None:
        """Reads all of it and chooses the codes.

        Raises:
            ExecuteError: A code or a scale is NaN, or what they stand for is too large for float32.
        """
        projector = self._begin()
        codes = self._codes(read)

        def take(step: int, first: int, turn: "Turn | None") -> None:
            projector.gather(step, self._loaded(self._decoded(codes[self._span(first)], first)), first, turn)

        step = 0
        while step < projector.passes:
            self.each(self._spans(), functools.partial(take, step))
            step += 1
        self._check_size(projector)
        self._chosen = codes.copy()
        self._before = projector.before()
        self._round(projector, codes)
        self._stored = self._weight.turned_back(self._chosen)

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Puts the chosen codes in place of a block."""
        raw[:] = self._stored[offset - self.start :][: len(raw)]

    def measure(self, raw: np.ndarray, offset: int, turn: "Turn | None" = None) -> None:
        """Takes a block as it was written."""
        if self._weight.by_rows:
            self._meter_rows(self._weight.turned(raw), (offset - self.start) // self._row_bytes, turn)
            return
        with self._beginning:
            if not len(self._written):
                self._written = np.empty(self._weight.size, np.uint8)
        self._written[offset - self.start :][: len(raw)] = raw

    def measured(self) -> CodesMeasured:
        """Returns what was measured; measuring begins anew after it."""
        if len(self._written):
            codes = self._weight.turned(self._written)
            self.each(self._spans(), lambda first, turn: self._meter_rows(codes[self._span(first)], first, turn))
            self._written = np.empty(0, np.uint8)
        if self._before is None:
            raise RuntimeError(f"{self._edit.name}: measured before it was gathered")
        after, worst = self._metered(self._cols)
        return CodesMeasured(self._before, after, self._degenerate, worst, self._rounded)

    def _round(self, projector: "Projector", codes: np.ndarray) -> None:
        """Chooses the codes of stripe after stripe of the edited matrix."""
        from ablate_shards.kernels.codecs.packing import ALIGNED, pack, packed_bytes, unpack
        from ablate_shards.kernels.rounding.directed import Rounded, Undone, round_directed, round_nearest

        grid = self._spread.grid
        tile = max(1, _TILE // max(1, self._rows))
        tile = tile if grid.bits == ALIGNED else -(-tile // ALIGNED) * ALIGNED
        width = max(tile, _STRIPE // (4 * max(1, self._rows)) // tile * tile)
        self._degenerate = 0
        tiles: dict[int, Rounded] = {}
        undone: dict[int, Undone] = {}
        nearest_ones = self._edit.rounding == "nearest"
        every_row = slice(0, self._rows)

        def take(target: np.ndarray, stripe: slice, start: int, turn: "Turn | None") -> None:
            part = slice(start, min(start + tile, stripe.stop))
            scales, zeros = self._spread.part(every_row, part)
            wanted = target[:, part.start - stripe.start : part.stop - stripe.start]
            raw = self._chosen[:, packed_bytes(start, grid.bits) : packed_bytes(part.stop, grid.bits)]
            chosen = unpack(raw, grid.bits, part.stop - start)
            if nearest_ones:
                tiles[start], undone[start] = round_nearest(grid, wanted, chosen, scales, self._basis, zeros)
            else:
                tiles[start] = round_directed(grid, wanted, chosen, scales, self._basis, zeros)
            pack(chosen, grid.bits, raw)

        for first in range(0, self._cols, width):
            stripe = slice(first, min(first + width, self._cols))
            if projector.by_parts and (first > 0 or self._edit.preserve != "rows"):
                target = self._edited_part(projector, codes, stripe)
            else:
                target = self._edited(projector, codes, stripe)
            # Where every stripe is made by editing all rows anew, they are counted anew.
            self._degenerate = projector.degenerate if first == 0 else self._degenerate
            self.each(range(stripe.start, stripe.stop, tile), functools.partial(take, target, stripe))
        # In whichever order: the sums are rounded once, from all of them.
        along, nearest, total, error, nearest_error, changed = _sums(tiles.values(), len(Rounded._fields))
        asked, missed = _sums(undone.values(), len(Undone._fields)) if nearest_ones else (None, None)
        self._rounded = RoundedMatrix(along, nearest, total, error, nearest_error, int(changed), asked, missed)

    def _edited(self, projector: "Projector", codes: np.ndarray, stripe: slice) -> np.ndarray:
        """Returns some columns of the edited matrix, float32, for which all of it is decoded."""
        target = np.empty((self._rows, stripe.stop - stripe.start), np.float32)

        def take(first: int, turn: "Turn | None") -> None:
            rows = self._span(first)
            values = self._decoded(codes[rows], first)
            target[rows] = self._ablated(values, lambda block: projector.apply(block, first))[:, stripe]

        self.each(self._spans(), take)
        return target

    def _edited_part(self, projector: "Projector", codes: np.ndarray, stripe: slice) -> np.ndarray:
        """Returns some columns of the edited matrix, float32, for which only these are decoded."""
        from ablate_shards.kernels.codecs.packing import packed_bytes

        width, bits = stripe.stop - stripe.start, self._spread.grid.bits
        target = np.empty((self._rows, width), np.float32)
        raw = codes[:, packed_bytes(stripe.start, bits) : packed_bytes(stripe.stop, bits)]
        # As many codes at a time as in whole rows.
        step = self._step * max(1, self._cols // width)

        def take(first: int, turn: "Turn | None") -> None:
            rows = slice(first, min(first + step, self._rows))
            values = self._weight.decode(raw[rows], self._spread, first, width, stripe.start)
            target[rows] = self._ablated(values, lambda block: projector.apply_part(block, first, stripe))

        self.each(range(0, self._rows, step), take)
        return target

    def _codes(self, read: Reader) -> np.ndarray:
        flat = np.empty(self._weight.size, np.uint8)
        for offset in range(self.start, self.end, self.block):
            data = read(offset, min(self.block, self.end - offset))
            flat[offset - self.start :][: len(data)] = data
        codes = self._weight.turned(flat)
        for first in self._spans():
            self._weight.check(self._number, codes[self._span(first)])
        return codes

    def _spans(self) -> range:
        """Returns the first rows of what is decoded at once."""
        return range(0, self._rows if self._cols else 0, self._step)

    def _span(self, first: int) -> slice:
        return slice(first, min(first + self._step, self._rows))


def _sums(tiles: Collection[Sequence[np.ndarray]], measures: int) -> list[float]:
    """Returns the sums of what was measured of the columns of tiles."""
    return [math.fsum(itertools.chain.from_iterable(each[measure] for each in tiles)) for measure in range(measures)]


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8).reshape(-1)
