"""Edits parts of tensors block by block, for whoever hands the blocks over one at a time and takes them again."""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.checkpoint.checkpoint import ITEM_BYTES
from ablate_shards.surgery.plan.plan import TensorEdit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Measure, Meter, ProjectOptions, Projector, Workspace
    from ablate_shards.kernels.form import Array

__all__ = ["AblatedBias", "AblatedMatrices", "Reader", "Section"]


Reader: TypeAlias = Callable[[int, int], np.ndarray]
"""Returns bytes of the source, from an offset and that many, in memory that the next call may take again."""


class Section(Protocol):
    """A part of a tensor that is edited by itself, one block after the other, and again where that is wanted.

    Attributes:
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        block: Bytes of a block, known once it has been gathered; the last one may be shorter.
        gathers: Whether all of it is read before its first block can be edited.
    """

    start: int
    end: int
    block: int
    gathers: bool

    def gather(self, read: Reader) -> None:
        """Learns what has to be known of all of it.

        Raises:
            AblateError: The tensor cannot be edited.
        """

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Edits a block in place, ``[bytes]`` uint8, as read from an offset of the shard.

        Raises:
            AblateError: The tensor cannot be edited.
        """

    def measure(self, raw: np.ndarray, offset: int) -> None:
        """Takes a block as it was written; all of them once, in order."""

    def measured(self) -> Any:
        """Returns what was measured, for :meth:`BlockEditor.result`.

        Raises:
            AblateError: The tensor cannot be edited.
        """


class AblatedMatrices:
    """A matrix to ablate, or several of one tensor at once: see ``Section``.

    Args:
        edit: The tensor.
        first: The first of the matrices.
        shape: Matrices, stored rows, stored columns.
        basis: The basis to remove, ``[k, d]`` float64, orthonormal rows.
        workspace: Returns where to compute, which is the calling thread's own.
        room: Bytes that a block may have.
    """

    gathers = True
    _meter: "Meter | None" = None

    def __init__(
        self,
        edit: TensorEdit,
        first: int,
        shape: tuple[int, int, int],
        *,
        basis: np.ndarray,
        workspace: "Callable[[], Workspace]",
        room: int,
    ) -> None:
        self._edit, self._first, self._shape = edit, first, shape
        self._basis, self._workspace, self._room = basis, workspace, room
        self._row_bytes = shape[2] * ITEM_BYTES[edit.dtype]
        self.start = edit.start + first * shape[1] * self._row_bytes
        self.end = self.start + shape[0] * shape[1] * self._row_bytes
        self.block = 0
        self._projector: Projector | None = None

    def gather(self, read: Reader) -> None:
        """Takes the sums that the apply pass needs.

        Raises:
            ExecuteError: It holds NaN or infinite values.
        """
        from ablate_shards.kernels.ablate.project import Projector

        projector = Projector(self._basis, self._shape, self._edit.dtype, self._options, self._workspace())
        chunk = projector.chunk_rows
        resident = self.end - self.start <= self._room
        block = self.end - self.start if resident else max(chunk, self._room // self._row_bytes // chunk * chunk)
        self.block = max(1, block if resident else block * self._row_bytes)
        step = 0
        while step < projector.passes:
            for offset in range(self.start, self.end, self.block):
                data = read(offset, min(self.block, self.end - offset))
                projector.gather(step, self._load(data), self._row(offset))
            step += 1
        self._projector = projector
        self._check_finite(projector)

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Ablates a block in place."""
        block = self._load(raw)
        self._gathered().apply(block, self._row(offset))
        self._workspace().arrays.store(block, raw)

    def measure(self, raw: np.ndarray, offset: int) -> None:
        """Takes a block as it was written."""
        self._meter = self._meter or self._new_meter()
        self._meter.add(self._load(raw), self._row(offset))

    def measured(self) -> "tuple[Measure, Measure, int]":
        """Returns the measures before and after, and how many vectors were not rescaled.

        Raises:
            ExecuteError: It holds NaN or infinite values.
        """
        meter, self._meter = self._meter or self._new_meter(), None
        projector = self._gathered()
        self._check_finite(projector)  # some norms are known only once all blocks are edited
        return projector.before(), meter.result(), projector.degenerate

    def _check_finite(self, projector: "Projector") -> None:
        if projector.nonfinite:
            raise nonfinite(self._edit, self._first + projector.nonfinite_entries[0])

    def _gathered(self) -> "Projector":
        if self._projector is None:
            raise RuntimeError(f"{self._edit.name}: edited before it was gathered")
        return self._projector

    def _new_meter(self) -> "Meter":
        from ablate_shards.kernels.ablate.project import Meter

        return Meter(self._basis, self._shape, self._edit.dtype, self._options, self._workspace())

    @property
    def _options(self) -> "ProjectOptions":
        from ablate_shards.kernels.ablate.project import ProjectOptions

        edit = self._edit
        return ProjectOptions(coefficient=edit.coefficient, preserve=edit.preserve, axis=edit.axis)

    def _load(self, raw: np.ndarray) -> "Array":
        count, _, cols = self._shape
        rows = len(raw) // max(1, count * self._row_bytes)
        return self._workspace().arrays.load(raw, self._edit.dtype, (count, rows, cols))

    def _row(self, offset: int) -> int:
        return (offset - self.start) // self._row_bytes


class AblatedBias:
    """A bias to ablate, in one block: see ``Section``."""

    gathers = False

    def __init__(self, edit: TensorEdit, basis: np.ndarray) -> None:
        self._edit, self._basis = edit, basis
        self.start, self.end = edit.start, edit.end
        self.block = max(1, edit.end - edit.start)
        self._before = self._after = 0.0

    def gather(self, read: Reader) -> None:
        """Does nothing: the one block is all there is to know."""

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Ablates a block in place.

        Raises:
            ExecuteError: It holds NaN or infinite values.
        """
        from ablate_shards.kernels.ablate.project import project_vector

        self._before = self._component(raw)
        if not math.isfinite(self._before):
            raise ExecuteError(f"{self._edit.name}: holds NaN or infinite values; fetch its shard again")
        bias = self._stored(raw)
        bias[...] = project_vector(bias, self._basis, self._edit.coefficient)

    def measure(self, raw: np.ndarray, offset: int) -> None:
        """Takes a block as it was written."""
        self._after = self._component(raw)

    def measured(self) -> tuple[float, float]:
        """Returns the relative component before and after."""
        return self._before, self._after

    def _component(self, raw: np.ndarray) -> float:
        from ablate_shards.kernels.ablate.project import vector_component

        return vector_component(self._stored(raw), self._basis)

    def _stored(self, raw: np.ndarray) -> np.ndarray:
        from ablate_shards.kernels.codecs.plain import STORED

        return raw.view(STORED[self._edit.dtype]).reshape(self._edit.shape)


def nonfinite(edit: TensorEdit, matrix: int) -> ExecuteError:
    """Returns the error of a matrix that holds what no projection can edit."""
    where = f"{edit.name}, expert {matrix}" if len(edit.shape) > 2 else edit.name
    return ExecuteError(
        f"{where}: holds NaN or infinite values, which no projection can edit; "
        "fetch its shard again, or leave it out with --layers or --components"
    )
