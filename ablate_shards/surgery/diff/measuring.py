"""Measures how a tensor differs from its partner: by bytes first, by values only where these differ."""

import math
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ablate_shards.surgery.diff.coded import EqualScales, OneCoded, TwoCoded
from ablate_shards.surgery.diff.differences import DiffKind, TensorDiff
from ablate_shards.surgery.diff.kinds import Explained, explain
from ablate_shards.surgery.diff.stored import CHUNK_BYTES, FLOATS, StoredTensor, same_bytes

if TYPE_CHECKING:
    import torch

    from ablate_shards.kernels.measure.sketch import Blocks, Change, Steps

__all__ = ["Measuring"]

#: Values that are decoded at a time.
_BLOCK = 1 << 18
#: Matrices with shorter sides or longer rows are measured as vectors.
_LEAST_SIDE, _LONGEST_ROW = 8, 1 << 22
_LEAST_RANK = 8
_SKETCH_BYTES = 10


class Measuring:
    """Measures one tensor after another, in as many threads as call it."""

    def __init__(self, memory: int, rank: int, cleanup: ExitStack) -> None:
        """Prepares to measure.

        Args:
            memory: Bytes that one tensor may take.
            rank: The largest rank that is recognised as low.
            cleanup: Sets torch back to as many threads as it had.
        """
        self._memory, self._rank = memory, rank
        self._cleanup = cleanup
        self._lock = threading.Lock()
        self._torch_has_one_thread = False

    def measure(self, blank: TensorDiff, old: StoredTensor, new: StoredTensor) -> Explained:
        """Returns how a tensor differs.

        Args:
            blank: The tensor, said to be equal.
            old: Where it lies in the first checkpoint.
            new: Where it lies in the second.
        """
        equal_scales = old.scales is not None and new.scales is not None and old.scales.same(new.scales)
        blank = replace(blank, codes=old.form, new_codes=new.form, equal_scales=equal_scales)
        comparable = equal_scales or (old.scales is None and new.scales is None)
        if comparable and old.dtype == new.dtype and old.size == new.size and same_bytes(old, new, old.size):
            return Explained(blank if old.shape == new.shape else replace(blank, kind="reshaped"))
        if old.role == new.role == "scales":
            return Explained(replace(blank, kind="scales"))
        if old.shape != new.shape:
            return Explained(replace(blank, kind=_kind_of_shape(old, new)))
        if not (old.is_float and new.is_float):
            return Explained(replace(blank, kind="raw", changed=_count_changed(old, new)))
        self._keep_torch_to_one_thread()
        return explain(blank, list(self._changes(old, new, equal_scales=equal_scales)))

    def _changes(self, old: StoredTensor, new: StoredTensor, *, equal_scales: bool) -> Iterator["Change"]:
        """Yields how the vector or matrix changed; of a stack, how each matrix did that differs."""
        from ablate_shards.kernels.measure.sketch import compare_matrix, compare_vector

        if (matrices := _matrices(old.shape)) is None:
            yield compare_vector(
                _read_blocks(old, new, 0, old.elements, None), _unit_of(old, new, 0, 1, equal_scales=equal_scales)
            )
            return
        count, rows, columns = matrices
        room = self._memory // (_SKETCH_BYTES * (rows + columns)) - _LEAST_RANK
        rank = max(_LEAST_RANK, min(self._rank, room))
        elements = rows * columns
        for first in range(0, count * elements, elements):
            size = old.size // count
            start = first // elements * size
            alike = equal_scales or (old.scales is None and new.scales is None)
            if count > 1 and alike and old.dtype == new.dtype and same_bytes(old, new, size, start, start):
                continue
            blocks = _read_blocks(old, new, first, elements, columns)
            if 8 * elements <= self._memory // 2:
                blocks = _remembered(blocks)
            unit = _unit_of(old, new, first, columns, equal_scales=equal_scales)
            yield compare_matrix(blocks, (rows, columns), unit, rank)

    def _keep_torch_to_one_thread(self) -> None:
        """Leaves the cores to other tensors. Torch takes long to load, so that it is not where nothing differs."""
        from ablate_shards.kernels.choose import one_thread

        with self._lock:
            if not self._torch_has_one_thread:
                self._torch_has_one_thread = True
                self._cleanup.enter_context(one_thread("torch"))


def _unit_of(old: StoredTensor, new: StoredTensor, first: int, columns: int, *, equal_scales: bool) -> "Steps":
    """Returns the steps of what is stored from a value on, in rows of a length: of the coarser side, where both count.

    Codes are coarser than any number that is not one.
    """
    from ablate_shards.kernels.measure.sketch import Unit

    if old.scales is not None and new.scales is not None:
        if equal_scales:
            return EqualScales(old.scales, first, columns)
        return TwoCoded((old.scales, new.scales), first, columns)
    if (scales := old.scales or new.scales) is not None:
        return OneCoded(scales, first, columns, new=new.scales is not None)
    formats = FLOATS[old.dtype], FLOATS[new.dtype]
    return Unit(max(each.relative for each in formats), max(each.least for each in formats))


def _kind_of_shape(old: StoredTensor, new: StoredTensor) -> DiffKind:
    """Distinguishes a transposed matrix, and added or dropped rows, from any other change of shape."""
    if len(old.shape) != 2 or old.dtype != new.dtype or not old.is_float:
        return "other shape"
    if old.shape == new.shape[::-1] and old.elements:
        return "transposed" if _is_transposed(old, new) else "other shape"
    same_rows = old.shape[1] == new.shape[1] and same_bytes(old, new, min(old.size, new.size))
    return "resized" if same_rows else "other shape"


def _is_transposed(old: StoredTensor, new: StoredTensor) -> bool:
    """Tells whether the first columns of one are the first rows of the other."""
    rows, columns = old.shape
    few = min(_LEAST_SIDE, columns)
    wanted = new.numbers(0, few * rows).reshape(few, rows)
    step = max(1, _BLOCK // columns)
    for row in range(0, rows, step):
        count = min(step, rows - row)
        block = old.numbers(row * columns, count * columns).reshape(count, columns)
        if not np.array_equal(block[:, :few].T, wanted[:, row : row + count]):
            return False
    return True


def _count_changed(old: StoredTensor, new: StoredTensor) -> int:
    """Counts the values that differ of a dtype that is not decoded; all of them where the dtypes differ."""
    if old.dtype != new.dtype:
        return old.elements
    changed, step = 0, CHUNK_BYTES // old.width * old.width
    for done in range(0, old.size, step):
        ours, theirs = (np.empty(min(step, old.size - done), np.uint8) for _ in range(2))
        old.read_into(ours, done)
        new.read_into(theirs, done)
        changed += int((ours != theirs).reshape(-1, old.width).any(axis=1).sum())
    return changed


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int] | None:
    """Returns how many matrices a tensor holds and their sides; None where it is measured as a vector."""
    if len(shape) == 3 and min(shape[1:]) >= _LEAST_SIDE:
        count, rows, columns = shape
    elif len(shape) > 1:
        count, rows, columns = 1, shape[0], math.prod(shape[1:])
    else:
        return None
    if not count or min(rows, columns) < _LEAST_SIDE or columns > _LONGEST_ROW:
        return None
    return count, rows, columns


def _read_blocks(old: StoredTensor, new: StoredTensor, first: int, count: int, columns: int | None) -> "Blocks":
    """Returns what reads values by row blocks, or by flat ones where ``columns`` is None, and what is added to them.

    Args:
        old: The values before.
        new: The values after.
        first: The first value to read.
        count: How many to read.
        columns: The length of a row.
    """
    step = max(1, _BLOCK // columns) * columns if columns else _BLOCK

    def read() -> Iterator[tuple[int, "torch.Tensor", "torch.Tensor"]]:
        for start in range(0, count, step):
            size = min(step, count - start)
            before, after = (_decoded(tensor, first + start, size) for tensor in (old, new))
            added = after.sub_(before).float()
            before = before.float()
            if columns is None:
                yield start, before, added
            else:
                yield start // columns, before.view(-1, columns), added.view(-1, columns)

    return read


def _decoded(tensor: StoredTensor, first: int, count: int) -> "torch.Tensor":
    import torch

    values = tensor.decode(first, count)
    return values if tensor.dtype == "F64" else values.to(torch.float32)


def _remembered(blocks: "Blocks") -> "Blocks":
    """Returns what reads blocks once and then yields them from memory."""
    kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def recall() -> Iterator[tuple[int, "torch.Tensor", "torch.Tensor"]]:
        if kept:
            yield from kept
            return
        found = []
        for block in blocks():
            found.append(block)
            yield block
        kept.extend(found)

    return recall
