"""A matrix before and after an edit, in blocks that can be gone over as often as is needed; nothing is written."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES
from ablate_shards.surgery.dequantise.decoding import CodedWeight, ReadRange
from ablate_shards.surgery.edit.ablation_editor import nonfinite
from ablate_shards.surgery.plan.edits import Edit, TensorEdit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Workspace

__all__ = ["AblatedMatrix", "ChangedMatrix", "JoinedMatrix", "Pair", "ReadInto", "StoredMatrix", "count_matrices"]

#: Values that are decoded at a time.
_ROOM = 1 << 18
_WAY_OUT = "fetch its shard again, or leave it out with --layers or --components"

ReadInto = Callable[[Edit, memoryview, int], None]
"""Fills a buffer from an offset of the shard that holds a tensor."""


def count_matrices(tensor: Edit, scales: Scales | None) -> int:
    """Returns how many matrices a tensor holds."""
    shape = tensor.shape if scales is None else (*scales.leading(tensor.shape), 1)
    return shape[0] if len(shape) > 2 else 1


class StoredMatrix:
    """A matrix as it is stored, decoded row by row.

    Args:
        tensor: The tensor, a matrix or a stack of them.
        scales: What its codes are multiplied by, None where it holds plain numbers.
        number: Which of its matrices.
        read: Reads its bytes.
        read_range: Reads its scales.

    Attributes:
        rows: Its stored rows.
        cols: Its stored columns.
    """

    def __init__(self, tensor: Edit, scales: Scales | None, number: int, read: ReadInto, read_range: ReadRange) -> None:
        self._tensor, self._read, self._number = tensor, read, number
        self._weight: CodedWeight | None = None
        self._turned: np.ndarray | None = None
        if scales is not None:
            weight = self._weight = CodedWeight(tensor, scales, read_range, _WAY_OUT)
            self._spread = weight.spread(number)
            self.rows, self.cols, self._row_bytes = weight.rows, weight.columns(), weight.row_bytes
            self._start = tensor.start + number * weight.size
            if not weight.by_rows:
                stored = np.empty(weight.size, np.uint8)
                read(tensor, stored.data, self._start)
                self._turned = weight.turned(stored)
            return
        self.rows, self.cols = tensor.shape[-2:]
        self._row_bytes = self.cols * ITEM_BYTES[tensor.dtype]
        self._start = tensor.start + number * self.rows * self._row_bytes

    def values(self, first: int, count: int) -> np.ndarray:
        """Returns some rows, ``[count, cols]`` float32, in memory of their own."""
        from ablate_shards.kernels.codecs.plain import STORED, decoded

        if self._turned is not None:
            raw = self._turned[first : first + count]
        else:
            raw = np.empty((count, self._row_bytes), np.uint8)
            self._read(self._tensor, raw.reshape(-1).data, self._start + first * self._row_bytes)
            raw = raw if self._weight is None else self._weight.turned(raw)
        if self._weight is not None:
            self._weight.check(self._number, raw)
            return np.ascontiguousarray(self._weight.decode(raw, self._spread, first, self.cols))
        return decoded(raw.view(STORED[self._tensor.dtype]), np.float32)


class Pair(ABC):
    """A matrix before and after an edit.

    Attributes:
        rows: Its stored rows.
        cols: Its stored columns.
        room: Bytes of blocks that may stay in memory, so that they are not made again; none of one that has more.
    """

    rows: int
    cols: int
    room = 0
    _step: int
    _kept: tuple[tuple[int, np.ndarray, np.ndarray], ...] = ()

    def __call__(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields the first row of each block, and the block before and after, ``[rows, cols]`` float32."""
        if self._kept:
            yield from self._kept
            return
        made = []
        for first in range(0, self.rows, self._step):
            block = (first, *self._block(first, min(self._step, self.rows - first)))
            if 2 * 4 * self.rows * self.cols <= self.room:
                made.append(block)
            yield block
        self._kept = tuple(made)

    @abstractmethod
    def _block(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns some rows before and after."""


class AblatedMatrix(Pair):
    """A matrix and what an ablation makes of it, to the precision of float32 and not rounded to what is stored.

    Args:
        stored: The matrix.
        edit: What is done to the tensor that it is of.
        number: Which of its matrices it is.
        basis: The basis to remove, ``[k, d]`` float64, orthonormal rows.
        workspace: Where to compute, for one thread.

    Raises:
        ExecuteError: It holds NaN or infinite values.
    """

    def __init__(
        self, stored: StoredMatrix, edit: TensorEdit, number: int, basis: np.ndarray, workspace: "Workspace"
    ) -> None:
        from ablate_shards.kernels.ablate.options import ProjectOptions
        from ablate_shards.kernels.ablate.project import Projector

        self.rows, self.cols = stored.rows, stored.cols
        self._stored, self._workspace = stored, workspace
        options = ProjectOptions(coefficient=edit.coefficient, preserve=edit.preserve, axis=edit.axis)
        self._projector = Projector(basis, (1, self.rows, self.cols), "F32", options, workspace)
        chunk = self._projector.chunk_rows
        self._step = max(chunk, _ROOM // max(1, self.cols) // chunk * chunk)
        step = 0
        while step < self._projector.passes:
            for first in range(0, self.rows, self._step):
                values = stored.values(first, min(self._step, self.rows - first))
                self._projector.gather(step, self._loaded(values), first)
            step += 1
        if self._projector.nonfinite:
            raise nonfinite(edit, number)

    def _block(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        before = self._stored.values(first, count)
        after = before.copy()
        block = self._loaded(after)
        self._projector.apply(block, first)
        self._workspace.arrays.store(block, _bytes_of(after))
        return before, after

    def _loaded(self, values: np.ndarray) -> object:
        return self._workspace.arrays.load(_bytes_of(values), "F32", (1, *values.shape))


class ChangedMatrix(Pair):
    """A matrix of one checkpoint and the one in its place in another.

    Args:
        before: That of the first checkpoint.
        after: That of the second, of the same shape.
        name: What errors call it.
    """

    def __init__(self, before: StoredMatrix, after: StoredMatrix, name: str) -> None:
        self.rows, self.cols = before.rows, before.cols
        self._before, self._after, self._name = before, after, name
        self._step = max(1, _ROOM // max(1, self.cols))

    def _block(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = self._before.values(first, count), self._after.values(first, count)
        if not (np.isfinite(before).all() and np.isfinite(after).all()):
            raise ExecuteError(
                f"{self._name}: holds NaN or infinite values, which no adapter can bring about; fetch its shard again"
            )
        return before, after


class JoinedMatrix(Pair):
    """Two matrices of which the model makes one, the rows of the second below those of the first.

    Args:
        upper: The first, before and after.
        lower: The second, of as many columns.
    """

    def __init__(self, upper: Pair, lower: Pair) -> None:
        self.rows, self.cols = upper.rows + lower.rows, upper.cols
        self._parts = (0, upper), (upper.rows, lower)
        self._step = max(1, _ROOM // max(1, self.cols))

    def _block(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        made = []
        for start, pair in self._parts:
            low, high = max(first, start), min(first + count, start + pair.rows)
            if low < high:
                made.append(pair._block(low - start, high - low))
        before, after = (np.concatenate(blocks) for blocks in zip(*made, strict=True))
        return before, after


def _bytes_of(values: np.ndarray) -> np.ndarray:
    return values.view(np.uint8).reshape(-1)
