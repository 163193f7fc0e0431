"""Ablates a matrix of FP8 codes: the scales stay, and codes are chosen so that rounding does not undo the edit."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.edit.sections import Reader
from ablate_shards.surgery.plan.edits import TensorEdit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.options import Measure, ProjectOptions
    from ablate_shards.kernels.ablate.project import Meter, Projector, Workspace

__all__ = ["CodedMatrix", "CodesMeasured", "ReadRange", "RoundedMatrix", "Rounding"]

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


class CodedMatrix:
    """A matrix of FP8 codes to ablate: see ``Section``.

    Its codes before and after are in memory from gathering to the last block, two bytes an element. The edited matrix
    is there in stripes of columns: it is what an ablation of the decoded matrix in float32 gives.

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
        self._edit, self._scales, self._number = edit, scales, number
        self._basis, self._workspace, self._read_scales, self._room = basis, workspace, read, room
        self._rows, self._cols = edit.shape[-2:]
        self.start = edit.start + number * self._rows * self._cols
        self.end = self.start + self._rows * self._cols
        self.block = 0
        self._chosen = np.empty((0, 0), np.uint8)
        self._grid = np.empty((0, 0), np.float32)
        self._before: Measure | None = None

    def gather(self, read: Reader) -> None:
        """Reads all of it and chooses the codes.

        Raises:
            ExecuteError: A code or a scale is NaN, or what they stand for is too large for float32.
        """
        from ablate_shards.kernels.ablate.project import Projector

        shape = (1, self._rows, self._cols)
        projector = Projector(self._basis, shape, "F32", self._options, self._workspace())
        chunk = projector.chunk_rows
        self._step = max(chunk, self._room // max(1, self._cols) // chunk * chunk)
        self.block = max(1, self._step * self._cols)
        self._grid = self._decoded_scales()
        codes = self._codes(read)
        step = 0
        while step < projector.passes:
            for rows in self._spans():
                projector.gather(step, self._loaded(self._decoded(codes[rows], rows)), rows.start)
            step += 1
        if projector.nonfinite:
            raise self._refused("codes times scales are too large for float32")
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
        first = (offset - self.start) // self._cols
        rows = slice(first, first + len(raw) // self._cols)
        codes = raw.reshape(-1, self._cols)
        self._check_codes(codes)
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
        from ablate_shards.kernels.codecs.fp8 import spread
        from ablate_shards.kernels.rounding.directed import Rounded, round_directed

        tile = max(1, _TILE // max(1, self._rows))
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
                scales = spread(self._grid, self._scales.block, every_row, part)
                wanted = target[:, part.start - first : part.stop - first]
                tiles.append(round_directed(wanted, self._chosen[:, part], scales, self._basis))
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
        codes = np.empty((self._rows, self._cols), np.uint8)
        flat = codes.reshape(-1)
        for offset in range(self.start, self.end, self.block):
            data = read(offset, min(self.block, self.end - offset))
            flat[offset - self.start :][: len(data)] = data
        for rows in self._spans():
            self._check_codes(codes[rows])
        return codes

    def _check_codes(self, codes: np.ndarray) -> None:
        from ablate_shards.kernels.codecs.fp8 import has_nan

        if has_nan(codes):
            raise self._refused("holds NaN codes (0x7F or 0xFF), which no projection can edit")

    def _decoded_scales(self) -> np.ndarray:
        """Returns the matrix's own scales, ``[blocks down, blocks across]`` float32."""
        from ablate_shards.kernels.codecs.fp8 import decode_scales

        whole, matrices = self._scales.tensor, math.prod(self._edit.shape[:-2])
        size = (whole.end - whole.start) // max(1, matrices)
        start = whole.start + self._number * size
        raw = self._read_scales(TensorInfo(whole.name, whole.dtype, (), whole.shard, start, start + size))
        values = decode_scales(raw, whole.dtype)
        if not (np.isfinite(values) & (values >= 0)).all():
            raise self._refused(f"its scales {whole.name} hold NaN, infinite or negative values")
        return values.reshape(-(-self._rows // self._scales.block[0]), -1)

    def _decoded(self, codes: np.ndarray, rows: slice) -> np.ndarray:
        """Returns what the codes of some rows stand for, float32."""
        from ablate_shards.kernels.codecs.fp8 import decode_rows

        return decode_rows(codes, self._grid, self._scales.block, rows.start)

    def _loaded(self, values: np.ndarray) -> "object":
        return self._workspace().arrays.load(_bytes_of(values), "F32", (1, *values.shape))

    def _spans(self) -> Iterator[slice]:
        for start in range(0, self._rows if self._cols else 0, self._step):
            yield slice(start, min(start + self._step, self._rows))

    def _refused(self, why: str) -> ExecuteError:
        where = f"{self._edit.name}, expert {self._number}" if len(self._edit.shape) > 2 else self._edit.name
        return ExecuteError(f"{where}: {why}; fetch its shard again, or leave it out with --layers or --components")

    @property
    def _options(self) -> "ProjectOptions":
        from ablate_shards.kernels.ablate.options import ProjectOptions

        edit = self._edit
        return ProjectOptions(coefficient=edit.coefficient, preserve=edit.preserve, axis=edit.axis)


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8).reshape(-1)
