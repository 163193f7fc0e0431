"""Ablates a matrix of codes whose rows lie along the residual stream, such as an embedding: a few rows at a time."""

import math
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.dequantise.decoding import CodedWeight, ReadRange
from ablate_shards.surgery.edit.coded import WAY_OUT, CodesMeasured, RoundedMatrix, bytes_of, options_of
from ablate_shards.surgery.edit.loops import Each
from ablate_shards.surgery.edit.sections import Reader
from ablate_shards.surgery.plan.edits import TensorEdit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Meter, Projector, Workspace
    from ablate_shards.kernels.codecs.scales import Spread
    from ablate_shards.kernels.form import Turn

__all__ = ["CodedRows"]


class CodedRows:
    """A matrix of codes ``[n, d]`` to ablate: see ``Section``.

    What it writes to the stream is a stored row each time, whose codes are chosen by themselves: only the rows of a
    block are in memory. Of every row a few numbers are kept that were measured.

    Args:
        edit: The tensor, whose codes are stored row by row.
        scales: What its codes are multiplied by.
        number: Which of its matrices.
        basis: The basis to remove, ``[k, d]`` float64, orthonormal rows.
        workspace: Returns where to compute, which is the calling thread's own and on the CPU.
        read: Reads the scales.
        room: Codes that a block may have.
        each: Goes over blocks in several threads; None if one thread has to take all of them.
    """

    gathers, light = True, True
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
        each: Each | None,
    ) -> None:
        self._edit, self._number = edit, number
        self._basis, self._workspace, self._room = basis, workspace, room
        self.divisible = each is not None
        self._beginning = threading.Lock()
        self._weight = CodedWeight(edit, scales, read, WAY_OUT)
        self._rows, self._row_bytes = self._weight.rows, self._weight.row_bytes
        self.start = edit.start + number * self._weight.size
        self.end = self.start + self._weight.size
        self.block = 0
        self._cols = 0
        self._spread: Spread
        self._projector: Projector

    def gather(self, read: Reader) -> None:
        """Reads all of it and takes the sums that a block needs.

        Raises:
            ExecuteError: A code or a scale is NaN.
        """
        from ablate_shards.kernels.ablate.project import Projector
        from ablate_shards.kernels.rounding.directed import Rounded, Undone

        self._spread = self._weight.spread(self._number)
        self._cols = self._weight.columns()
        projector = Projector(self._basis, self._shape, "F32", options_of(self._edit), self._workspace())
        chunk = projector.chunk_rows
        step = max(chunk, self._room // max(1, self._cols) // chunk * chunk)
        self.block = max(1, step * self._row_bytes)
        self._rounded = np.zeros((len(Rounded._fields), self._rows))
        self._undone = np.zeros((len(Undone._fields), self._rows))
        number = 0
        while number < projector.passes:
            for offset in range(self.start, self.end, self.block):
                codes = self._codes(read(offset, min(self.block, self.end - offset)))
                first = self._row(offset)
                projector.gather(number, self._loaded(self._decoded(codes, first)), first)
            number += 1
        self._projector = projector

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Puts the chosen codes in place of a block.

        Raises:
            ExecuteError: A code is NaN.
        """
        from ablate_shards.kernels.codecs.packing import pack, unpack
        from ablate_shards.kernels.rounding.directed import round_directed, round_nearest

        stored, first = self._codes(raw), self._row(offset)
        values = self._decoded(stored, first)
        block = self._loaded(values)
        self._projector.apply(block, first)
        self._workspace().arrays.store(block, bytes_of(values))
        grid, rows = self._spread.grid, slice(first, first + len(values))
        scales, zeros = self._spread.part(rows, slice(0, self._cols))
        zeros = None if zeros is None else np.broadcast_to(zeros, values.shape).T
        scales = np.broadcast_to(scales, values.shape).T
        chosen = np.ascontiguousarray(unpack(stored, grid.bits, self._cols).T)
        target = np.ascontiguousarray(values.T)
        if self._edit.rounding == "nearest":
            rounded, undone = round_nearest(grid, target, chosen, scales, self._basis, zeros)
            self._undone[:, rows] = undone
        else:
            rounded = round_directed(grid, target, chosen, scales, self._basis, zeros)
        self._rounded[:, rows] = rounded
        pack(np.ascontiguousarray(chosen.T), grid.bits, stored)

    def measure(self, raw: np.ndarray, offset: int, turn: "Turn | None" = None) -> None:
        """Takes a block as it was written."""
        with self._beginning:
            self._meter = self._meter or self._new_meter()
        first = self._row(offset)
        self._meter.add(self._loaded(self._decoded(self._codes(raw), first)), first, turn)

    def measured(self) -> CodesMeasured:
        """Returns what was measured; measuring begins anew after it.

        Raises:
            ExecuteError: What codes and scales stand for is too large for float32.
        """
        meter, self._meter = self._meter or self._new_meter(), None
        if self._projector.nonfinite:  # some norms are known only once all blocks are edited
            raise self._weight.refused(self._number, "codes times scales are too large for float32")
        after = meter.result()
        (total,), (largest,) = after.total, after.largest
        along, nearest, norm, error, nearest_error, changed = (math.fsum(each) for each in self._rounded)
        asked, missed = (math.fsum(each) for each in self._undone)
        nearest_ones = self._edit.rounding == "nearest"
        return CodesMeasured(
            before=self._projector.before(),
            after=after,
            degenerate=self._projector.degenerate,
            worst_column=math.sqrt(largest * self._rows / total) if total else 0.0,
            rounding=RoundedMatrix(
                *(along, nearest, norm, error, nearest_error, int(changed)),
                asked=asked if nearest_ones else None,
                missed=missed if nearest_ones else None,
            ),
        )

    def _codes(self, raw: np.ndarray) -> np.ndarray:
        """Returns the codes of a block, ``[rows, row_bytes]``, after a look at them."""
        codes = self._weight.turned(raw)
        self._weight.check(self._number, codes)
        return codes

    def _decoded(self, codes: np.ndarray, first: int) -> np.ndarray:
        return self._weight.decode(codes, self._spread, first, self._cols)

    def _loaded(self, values: np.ndarray) -> "object":
        return self._workspace().arrays.load(bytes_of(values), "F32", (1, *values.shape))

    def _row(self, offset: int) -> int:
        return (offset - self.start) // self._row_bytes

    def _new_meter(self) -> "Meter":
        from ablate_shards.kernels.ablate.project import Meter

        return Meter(self._basis, self._shape, "F32", options_of(self._edit), self._workspace())

    @property
    def _shape(self) -> tuple[int, int, int]:
        return 1, self._rows, self._cols
