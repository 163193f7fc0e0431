"""Directional ablation of stored matrices, streamed over row blocks: ``W' = W - a RᵀRW``, norms kept.

``W`` is ``[d, n]`` with the residual axis first, ``R`` is ``[k, d]`` with orthonormal rows, ``a`` the
coefficient. The new norms come from closed forms over sums that a gather pass collects, so that a second
pass writes the result and no third is needed; ``docs/math.md`` derives them::

    columns   |w'_j before rescaling|² = |w_j|² - (2a - a²) |R w_j|²
    rows      |U_i|² = 1 - 2a R_iᵀ Q Ŵ_i + a² R_iᵀ Q Qᵀ R_i,   Ŵ_i = W_i / |W_i|,   Q = R Ŵ

Sums run in float32 inside a chunk of rows and in float64 from chunk to chunk, in order. The chunks follow
from the shape alone, hence the result does not depend on block sizes, batching or threads. Where
float32 is not accurate enough (strong cancellation, squares out of range), float64 is used.
"""

import functools

import numpy as np

from ablate_shards.kernels.ablate.batch import Batch
from ablate_shards.kernels.ablate.options import Measure, ProjectOptions
from ablate_shards.kernels.ablate.passes import marked, passes_of
from ablate_shards.kernels.ablate.workspace import Workspace
from ablate_shards.kernels.form import Array, Turn
from ablate_shards.kernels.reference import Preserve

__all__ = ["Meter", "Preserve", "Projector", "Workspace"]


class _Streamed:
    """What :class:`Projector` and :class:`Meter` share."""

    def __init__(
        self,
        basis: np.ndarray,
        shape: tuple[int, int, int],
        dtype: str,
        options: ProjectOptions,
        workspace: Workspace,
    ) -> None:
        self._batch = Batch(basis, shape, dtype, options, workspace)
        self._passes = passes_of(options)(self._batch)

    @property
    def chunk_rows(self) -> int:
        """Blocks start at a multiple of this, and all but the last are a multiple of it long."""
        return self._batch.chunk_rows

    @property
    def nonfinite(self) -> int:
        """Preserved vectors that hold a NaN or an infinity; true once every pass is done."""
        return int(self._passes.nonfinite().sum())

    @property
    def nonfinite_entries(self) -> tuple[int, ...]:
        """The matrices of the batch that hold these vectors."""
        return tuple(marked(self._passes.nonfinite()))


class Meter(_Streamed):
    """Measures a stored matrix, or a batch of them, in one pass over row blocks.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        shape: Matrices, stored rows, stored columns.
        dtype: What the matrices are stored in: ``BF16``, ``F16`` or ``F32``.
        options: Says which norms are meant and where the residual axis lies.
        workspace: Where and how to compute.

    Raises:
        DirectionsError: The basis does not fit the shape, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """

    def add(self, block: Array, start: int, turn: Turn | None = None) -> None:
        """Take the rows from ``start``: ``[matrices, rows, cols]`` in the storage dtype; in order, unless in turn."""
        with self._batch.arrays.quiet():
            for piece in self._batch.pieces(block, start, self._batch.matrices, turn=turn):
                self._passes.measure(piece)

    def result(self) -> Measure:
        """Return the measure of all that was added."""
        return self._passes.measured()


class Projector(_Streamed):
    """Ablates a stored matrix, or a batch of them: gather passes over row blocks, then one apply pass.

    Every pass goes over all rows, in order. ``passes`` may grow when a pass ends: matrices that
    turn out to need float64 are gathered once more.

    In the native form, which has no scratch memory, several threads may take the blocks of a pass, each block with its
    turn; the result does not depend on them.

    Args:
        basis: ``[k, d]`` float64, orthonormal rows.
        shape: Matrices, stored rows, stored columns.
        dtype: What the matrices are stored in: ``BF16``, ``F16`` or ``F32``.
        options: The coefficient, the norms to preserve, the residual axis.
        workspace: Where and how to compute.

    Raises:
        DirectionsError: The basis does not fit the shape, or is not orthonormal.
        PlanError: The dtype is not one of the three.
    """

    def __init__(
        self,
        basis: np.ndarray,
        shape: tuple[int, int, int],
        dtype: str,
        options: ProjectOptions,
        workspace: Workspace,
    ) -> None:
        super().__init__(basis, shape, dtype, options, workspace)
        self._plan = [] if 0 in shape else self._passes.gathering()

    @property
    def passes(self) -> int:
        """Gather passes before the apply pass; read it again after each of them."""
        return len(self._plan)

    @property
    def degenerate(self) -> int:
        """Vectors whose component was removed without rescaling; true after the apply pass."""
        return self._passes.degenerate

    def gather(self, step: int, block: Array, start: int, turn: Turn | None = None) -> None:
        """Take rows in one of the gather passes.

        Args:
            step: The pass, from 0.
            block: ``[matrices, rows, cols]`` in the storage dtype, on the device.
            start: The first of its rows.
            turn: When what it adds to the sums may be added; None where the blocks before it have been.
        """
        now = self._plan[step]
        with self._batch.arrays.quiet():
            for piece in self._batch.pieces(block, start, now.entries, self._passes.exact, turn):
                now.take(piece)
        if start + block.shape[1] < self._batch.rows:
            return
        if turn is None:
            self._close(step)
        else:
            turn.do(functools.partial(self._close, step))

    def _close(self, step: int) -> None:
        with self._batch.arrays.quiet():
            self._plan[step + 1 : step + 1] = self._plan[step].close()

    def apply(self, block: Array, start: int) -> None:
        """Ablate rows in place: ``[matrices, rows, cols]`` in the storage dtype, on the device."""
        with self._batch.arrays.quiet():
            self._passes.apply(block, start)

    @property
    def by_parts(self) -> bool:
        """Whether some columns of ``[d, n]`` can be ablated without the others, to the same bit."""
        return self._batch.arrays.by_parts

    def apply_part(self, block: Array, start: int, columns: slice) -> None:
        """Ablate some columns of rows in place, as :meth:`apply` does; where row norms are kept, after it.

        Args:
            block: ``[matrices, rows, columns]`` in the storage dtype.
            start: The first of its rows.
            columns: Which columns it has, both ends given.
        """
        with self._batch.arrays.quiet():
            self._passes.apply_part(block, start, columns)

    def before(self) -> Measure:
        """Return the measure of the matrices before the ablation; after the apply pass."""
        return self._passes.measured()
