"""Removes directions from the tensors of a plan: what is edited of each at a time, and what is measured of it."""

import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES
from ablate_shards.surgery.dequantise.decoding import ReadRange
from ablate_shards.surgery.edit.blocks import BlockEditor
from ablate_shards.surgery.edit.coded import CodedMatrix, Rounding
from ablate_shards.surgery.edit.coded_rows import CodedRows
from ablate_shards.surgery.edit.loops import Each, in_order
from ablate_shards.surgery.edit.sections import Reader, Section
from ablate_shards.surgery.plan.edits import BasisKey, TensorEdit
from ablate_shards.validation import Finite

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.options import Measure, ProjectOptions
    from ablate_shards.kernels.ablate.project import Meter, Projector, Workspace
    from ablate_shards.kernels.form import Array, Turn

__all__ = [
    "AblatedBias",
    "AblatedMatrices",
    "AblationEditor",
    "BiasMeasured",
    "CodedResult",
    "MatricesMeasured",
    "TensorResult",
    "nonfinite",
]

#: Codes decoded at once: in float32 they are four times their bytes.
_CODES_AT_ONCE = 1 << 18


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What was measured of one edited tensor, as re-read from the written file.

    Attributes:
        before: Relative component along the basis, ‖RW‖/‖W‖, in the source.
        after: The same in the output.
        norm_drift: Largest relative change of a preserved norm; None where none is preserved.
        degenerate: Vectors whose component was removed without rescaling.
        blake3: Digest of the tensor's bytes in the output.
    """

    before: Finite
    after: Finite
    norm_drift: Finite | None
    degenerate: int
    blake3: str

    @staticmethod
    def kept(**values: Any) -> "TensorResult":
        """Returns a result from the fields that were kept of it."""
        return CodedResult(**values) if "ideal" in values else TensorResult(**values)


@dataclass(frozen=True, slots=True)
class CodedResult(TensorResult):
    """What was measured of an edited tensor of codes besides.

    Attributes:
        ideal: Relative component along the basis of the edited weight before it is rounded to codes.
        nearest: The component that the nearest codes would have left, relative likewise.
        worst_column: The largest component of one column in the output, relative to the columns' root mean square.
        changed: Codes that are not the source's.
        error: Norm of the difference between the output and the edited weight before rounding, relative to the latter.
        nearest_error: The same of the nearest codes.
        undone: With ``--rounding nearest``: how much of the change along the basis rounding undid; 1 is all of it.
    """

    ideal: Finite
    nearest: Finite
    worst_column: Finite
    changed: int
    error: Finite
    nearest_error: Finite
    undone: Finite | None = None


class MatricesMeasured(NamedTuple):
    """What was measured of ablated matrices.

    Attributes:
        before: Measured in the source.
        after: Measured in the output.
        degenerate: Vectors whose component was removed without rescaling.
    """

    before: "Measure"
    after: "Measure"
    degenerate: int


class BiasMeasured(NamedTuple):
    """The relative component of a bias along the basis, in the source and in the output."""

    before: float
    after: float


class AblatedMatrices:
    """A matrix to ablate, or several of one tensor at once: see ``Section``.

    Args:
        edit: The tensor.
        first: The first of the matrices.
        shape: Matrices, stored rows, stored columns.
        basis: The basis to remove, ``[k, d]`` float64, orthonormal rows.
        workspace: Returns where to compute, which is the calling thread's own.
        room: Bytes that a block may have.
        each: Goes over the blocks.
    """

    gathers, light = True, True
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
        each: Each,
    ) -> None:
        self._edit, self._first, self._shape = edit, first, shape
        self._basis, self._workspace, self._room = basis, workspace, room
        self.each = each
        self._beginning = threading.Lock()
        self._row_bytes = shape[2] * ITEM_BYTES[edit.dtype]
        self.start = edit.start + first * shape[1] * self._row_bytes
        self.end = self.start + shape[0] * shape[1] * self._row_bytes
        self.block = 0
        self._projector: Projector | None = None

    def gather(self, read: Reader) -> None:
        """Reads all of it and takes the sums that the apply pass needs.

        Raises:
            ExecuteError: It holds NaN or infinite values.
        """
        from ablate_shards.kernels.ablate.project import Projector

        projector = Projector(self._basis, self._shape, self._edit.dtype, self._options, self._workspace())
        chunk = projector.chunk_rows
        resident = self.end - self.start <= self._room
        block = self.end - self.start if resident else max(chunk, self._room // self._row_bytes // chunk * chunk)
        self.block = max(1, block if resident else block * self._row_bytes)

        def take(step: int, offset: int, turn: "Turn | None") -> None:
            data = read(offset, min(self.block, self.end - offset))
            projector.gather(step, self._load(data), self._row(offset), turn)

        step = 0
        while step < projector.passes:
            self.each(range(self.start, self.end, self.block), functools.partial(take, step))
            step += 1
        self._projector = projector
        self._check_finite(projector)

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Ablates a block in place."""
        block = self._load(raw)
        self._gathered().apply(block, self._row(offset))
        self._workspace().arrays.store(block, raw)

    def measure(self, raw: np.ndarray, offset: int, turn: "Turn | None" = None) -> None:
        """Takes a block as it was written."""
        with self._beginning:
            self._meter = self._meter or self._new_meter()
        self._meter.add(self._load(raw), self._row(offset), turn)

    def measured(self) -> MatricesMeasured:
        """Returns what was measured; measuring begins anew after it.

        Raises:
            ExecuteError: It holds NaN or infinite values.
        """
        meter, self._meter = self._meter or self._new_meter(), None
        projector = self._gathered()
        self._check_finite(projector)  # some norms are known only once all blocks are edited
        return MatricesMeasured(projector.before(), meter.result(), projector.degenerate)

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
        from ablate_shards.kernels.ablate.options import ProjectOptions

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

    gathers, light = False, True

    def __init__(self, edit: TensorEdit, basis: np.ndarray) -> None:
        self._edit, self._basis = edit, basis
        self.each: Each = in_order
        self.start, self.end = edit.start, edit.end
        self.block = max(1, edit.end - edit.start)
        self._before = self._after = 0.0

    def gather(self, read: Reader) -> None:
        """Does nothing: the bias is one block."""

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Ablates a block in place.

        Raises:
            ExecuteError: It holds NaN or infinite values.
        """
        from ablate_shards.kernels.ablate.memory import project_vector

        self._before = self._component(raw)
        if not math.isfinite(self._before):
            raise ExecuteError(f"{self._edit.name}: holds NaN or infinite values; fetch its shard again")
        bias = self._stored(raw)
        bias[...] = project_vector(bias, self._basis, self._edit.coefficient)

    def measure(self, raw: np.ndarray, offset: int, turn: "Turn | None" = None) -> None:
        """Takes a block as it was written."""
        self._after = self._component(raw)

    def measured(self) -> BiasMeasured:
        """Returns what was measured."""
        return BiasMeasured(self._before, self._after)

    def _component(self, raw: np.ndarray) -> float:
        from ablate_shards.kernels.ablate.memory import vector_component

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


class AblationEditor(BlockEditor[TensorEdit, TensorResult]):
    """Removes directions from tensors.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        memory: Bytes for all buffers of all jobs together.
        jobs: Tensors, or parts of large ones, edited at a time, one per available core if None.
        stop: Set when the run should end early.
        bases: The bases to remove, ``[k, d]`` float64, orthonormal rows.
        read: Reads scales of codes from the source; None where the edits have none.

    Raises:
        UsageError: There is no such device.
    """

    on_cpu = "native"

    def __init__(
        self,
        device: str,
        memory: int,
        jobs: int | None,
        stop: threading.Event,
        bases: Mapping[BasisKey, np.ndarray],
        read: ReadRange | None = None,
    ) -> None:
        super().__init__(device, memory, jobs, stop)
        self._bases, self._read = bases, read

    def sections(self, edit: TensorEdit) -> Sequence[Section]:
        """Returns a section per matrix, or per as many as fit into a block, and one for a bias."""
        if edit.kind == "bias":
            return [AblatedBias(edit, self._bases[edit.basis])]
        each: Each = in_order
        if edit.scales is not None:
            count = math.prod(edit.scales.leading(edit.shape)[:-1])
            if self._form_on_cpu() == "native":
                each = self._each_of((edit.end - edit.start) // max(count, 1), codes=True)
            return [self._coded(edit, edit.scales, number, each) for number in range(count)]
        batch, rows, cols = (1,) * (3 - len(edit.shape)) + edit.shape
        matrix_bytes = (edit.end - edit.start) // max(batch, 1)
        group = max(1, min(batch, self._room // max(matrix_bytes, 1)))
        if self._form == "native":
            each = self._each_of(group * matrix_bytes)
        return [
            AblatedMatrices(
                edit,
                first,
                (min(group, batch - first), rows, cols),
                basis=self._bases[edit.basis],
                workspace=self._workspace,
                room=self._room,
                each=each,
            )
            for first in range(0, batch, group)
        ]

    def _coded(self, edit: TensorEdit, scales: Scales, number: int, each: Each) -> CodedMatrix | CodedRows:
        if self._read is None:
            raise RuntimeError(f"{edit.name}: its scales cannot be read")
        section = CodedMatrix if edit.axis == -2 else CodedRows
        return section(
            edit,
            scales,
            number,
            basis=self._bases[edit.basis],
            workspace=self._workspace_on_cpu,
            read=self._read,
            room=_CODES_AT_ONCE,
            each=each,
        )

    def result(self, edit: TensorEdit, measured: Sequence[Any], digest: str) -> TensorResult:
        """Returns what was measured of a tensor."""
        from ablate_shards.kernels.ablate.options import Measure, norm_drift

        if edit.kind == "bias":
            (bias,) = measured
            return TensorResult(before=bias.before, after=bias.after, norm_drift=None, degenerate=0, blake3=digest)
        before = Measure.pooled(each.before for each in measured)
        after = Measure.pooled(each.after for each in measured)
        found = TensorResult(
            before=before.component,
            after=after.component,
            norm_drift=None if edit.preserve == "none" else norm_drift(before, after),
            degenerate=sum(each.degenerate for each in measured),
            blake3=digest,
        )
        if edit.scales is None:
            return found
        return CodedResult(
            **dataclasses.asdict(found),
            **dataclasses.asdict(Rounding.pooled(each.rounding for each in measured)),
            worst_column=max((each.worst_column for each in measured), default=0.0),
        )
