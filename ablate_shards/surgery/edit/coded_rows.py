"""Ablates a matrix of codes whose rows lie along the residual stream, such as an embedding: a few rows at a time."""

import math
from typing import TYPE_CHECKING

import numpy as np

from ablate_shards.surgery.edit.coded import CodedSection, CodesMeasured, RoundedMatrix
from ablate_shards.surgery.edit.sections import Reader

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Projector
    from ablate_shards.kernels.form import Turn

__all__ = ["CodedRows"]


class CodedRows(CodedSection):
    """A matrix of codes ``[n, d]`` to ablate, stored row by row.

    What it writes to the stream is a stored row each time, whose codes are chosen by themselves: only the rows of a
    block are in memory. Of every row a few numbers are kept that were measured.
    """

    light = True
    _projector: "Projector"

    def gather(self, read: Reader) -> None:
        """Reads all of it and takes the sums that a block needs.

        Raises:
            ExecuteError: A code or a scale is NaN.
        """
        from ablate_shards.kernels.rounding.directed import Rounded, Undone

        projector = self._begin()
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
        values = self._ablated(self._decoded(stored, first), lambda block: self._projector.apply(block, first))
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
        self._meter_rows(self._weight.turned(raw), self._row(offset), turn)

    def measured(self) -> CodesMeasured:
        """Returns what was measured; measuring begins anew after it.

        Raises:
            ExecuteError: What codes and scales stand for is too large for float32.
        """
        self._check_size(self._projector)  # some norms are known only once all blocks are edited
        after, worst = self._metered(self._rows)
        along, nearest, norm, error, nearest_error, changed = (math.fsum(each) for each in self._rounded)
        asked, missed = (math.fsum(each) for each in self._undone)
        nearest_ones = self._edit.rounding == "nearest"
        return CodesMeasured(
            before=self._projector.before(),
            after=after,
            degenerate=self._projector.degenerate,
            worst_column=worst,
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

    def _row(self, offset: int) -> int:
        return (offset - self.start) // self._row_bytes
