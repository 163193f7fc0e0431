"""What a weight is before an adapter's update is added to it, where that is not what the base holds."""

from typing import NoReturn

import numpy as np

from ablate_shards.errors import ExecuteError
from ablate_shards.kernels.codecs.plain import GREATEST, STORED, encode
from ablate_shards.kernels.merge.merge_numpy import NumpyMerger
from ablate_shards.kernels.merge.taken import taken_factors
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES
from ablate_shards.surgery.edit.sections import Reader
from ablate_shards.surgery.merge.adapter import Adapter
from ablate_shards.surgery.merge.plan import PIECE_ELEMENTS, MergeEdit

__all__ = ["Beginning", "refuse"]


class Beginning:
    """Makes of a weight's blocks what they were when the training began.

    Args:
        edit: The edit of the weight.
        adapter: What holds the rows that it begins as.

    Attributes:
        gathers: Whether all of the weight has to be read first.
    """

    def __init__(self, edit: MergeEdit, adapter: Adapter) -> None:
        self._edit, self._adapter = edit, adapter
        self.gathers = edit.taken is not None
        self._taker: NumpyMerger | None = None

    def gather(self, read: Reader) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns what is taken out of the weight over the scale, as ``[m, r]`` and ``[r, n]``; None where nothing is.

        Raises:
            ExecuteError: The weight holds NaN or infinite values, or cannot be decomposed.
        """
        edit = self._edit
        if edit.taken is None:
            return None
        whole = np.empty(edit.end - edit.start, np.uint8)
        step = PIECE_ELEMENTS * ITEM_BYTES[edit.dtype]
        for done in range(0, len(whole), step):
            piece = whole[done : done + step]
            piece[:] = read(edit.start + done, len(piece))
            self._put_rows(piece, edit.start + done)
        weight = whole.view(STORED[edit.dtype]).reshape(edit.shape)
        try:
            left, right = taken_factors(edit.taken, weight, edit.rank or 0, edit.scale, transposed=edit.transposed)
        except (np.linalg.LinAlgError, RuntimeError):
            refuse(edit, finite=False)
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            refuse(edit, finite=False)
        self._taker = NumpyMerger(left, right, -edit.scale, edit.dtype)
        return left, right

    def apply(self, raw: np.ndarray, offset: int) -> list[float] | None:
        """Changes a block, ``[bytes]`` uint8 as read from an offset of the shard, in place.

        Returns:
            Sums of squares of what the base holds; None where nothing is taken out of it.

        Raises:
            ExecuteError: A value is not finite, or lies beyond what the dtype can hold.
        """
        self._put_rows(raw, offset)
        if self._taker is None:
            return None
        edit = self._edit
        first = (offset - edit.start) // (edit.shape[-1] * ITEM_BYTES[edit.dtype])
        found = self._taker.apply(raw.view(STORED[edit.dtype]).reshape(-1, edit.shape[-1]), first)
        if found.overflows:
            refuse(edit, finite=bool(np.isfinite(found.squares).all()))
        return found.squares

    def _put_rows(self, raw: np.ndarray, offset: int) -> None:
        """Fills a block with what the adapter says that the weight was before the training."""
        edit = self._edit
        if edit.begins_as is None:
            return
        stored = raw.view(STORED[edit.dtype])
        first = (offset - edit.start) // stored.itemsize
        given = self._adapter.read(edit.begins_as, first, len(stored)).astype(np.float64)
        if not (np.abs(given) <= GREATEST[edit.dtype]).all():
            refuse(edit, finite=True)
        encode(given, stored)


def refuse(edit: MergeEdit, *, finite: bool) -> NoReturn:
    """Raises the error of values that nothing can be added to, or that are too large with the adapter added."""
    if not finite:
        raise ExecuteError(
            f"{edit.name}: holds NaN or infinite values, which nothing can be added to; fetch its shard again"
        )
    raise ExecuteError(
        f"{edit.name}: with the adapter added, values lie beyond what {edit.dtype} can hold; "
        "convert the checkpoint to BF16, or lower --scale"
    )
