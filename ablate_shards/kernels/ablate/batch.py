"""A batch of stored matrices, cut into what is computed at once."""

from collections.abc import Container, Iterator, Sequence

import numpy as np

from ablate_shards.errors import PlanError
from ablate_shards.kernels.ablate.options import AMPLIFICATION, ProjectOptions, check_fit, checked_basis
from ablate_shards.kernels.ablate.workspace import Workspace
from ablate_shards.kernels.codecs.plain import GREATEST
from ablate_shards.kernels.form import GROUP_ROWS, Array, BothPrecisions, Float32Limits, Piece, Turn

__all__ = ["Batch"]

CHUNK_ROWS = 512


class Batch:
    """Stored matrices of one shape, the directions, and what computes with them, of what a ``Projector`` is given.

    Attributes:
        matrices: The numbers of the matrices, from 0.
        rows: Stored rows of each.
        cols: Stored columns.
        chunk_rows: Rows of a chunk.
        count: Directions, ``k``.
        basis: The directions, ``[1, k, d]``.
        limits: The coefficient, and where float64 takes over.
        guarded: Whether float32 sums may fail, which those of what is stored as float16 cannot.
        rescale: Whether preserved vectors get their norms back.
        arrays: Where blocks and sums live.
        xp: ``numpy`` or ``torch``.
    """

    def __init__(
        self,
        basis: np.ndarray,
        shape: tuple[int, int, int],
        dtype: str,
        options: ProjectOptions,
        workspace: Workspace,
    ) -> None:
        if dtype not in AMPLIFICATION:
            raise PlanError(f"dtype: expected BF16, F16 or F32, found {dtype}")
        check_fit(basis, shape, options.axis)
        self.guarded, self.rescale = dtype != "F16", options.preserve != "none"
        self.matrices, self.rows, self.cols = range(shape[0]), *shape[1:]
        self._workspace, self.arrays, self.xp = workspace, workspace.arrays, workspace.arrays.xp
        self.chunk_rows = _chunk_rows(self.cols, self.arrays.chunk_elements)
        self._spare: dict[tuple[int, ...], list[Array]] = {}
        self.count = len(basis)
        self.basis = self.pair(self.arrays.state(checked_basis(basis)[None]))
        largest_norm = GREATEST[dtype] / (2 * (1 + abs(options.coefficient)))
        self.limits = Float32Limits(options.coefficient, AMPLIFICATION[dtype], largest_norm)

    def zeros(self, *shape: int) -> Array:
        """Return sums ``[matrices, *shape]`` to add to, float64."""
        return self.arrays.zeros(len(self.matrices), *shape)

    def pair(self, double: Array) -> BothPrecisions:
        """Return float64 factors in both precisions."""
        return BothPrecisions.rounded(double, self.arrays)

    def pieces(
        self,
        block: Array,
        start: int,
        entries: Sequence[int],
        exact: Container[int] = (),
        turn: Turn | None = None,
    ) -> Iterator[Piece]:
        """Split the rows of a block into what each precision computes at once.

        Args:
            block: ``[matrices, rows, cols]`` in the storage dtype.
            start: The first of its rows.
            entries: The matrices to take.
            exact: Those of them that need float64.
            turn: When the sums of the block may be added to those before it; None for now.
        """
        if 0 in block.shape:
            return
        # Asked for anew each time: matrices of another width may have taken the scratch memory meanwhile.
        single, double = self._workspace.forms(self.chunk_rows, self.cols)
        parts = [(slice(entry, entry + 1), entry in exact) for entry in entries]
        if len(parts) == len(self.matrices) and not any(is_exact for _, is_exact in parts):
            parts = [(slice(0, len(self.matrices)), False)]
        for part, is_exact in parts:
            yield Piece(
                form=double if is_exact else single,
                exact=double,
                guarded=self.guarded and not is_exact,
                arrays=self.arrays,
                chunk_rows=self.chunk_rows,
                entries=part,
                span=slice(start, start + block.shape[1]),
                view=block[part],
                source=block[part],
                turn=turn,
                spare=self._spare,
            )


def _chunk_rows(cols: int, elements: int) -> int:
    """Return how many stored rows make a chunk: little memory, and whole groups of rows that float32 sums."""
    rows = max(1, min(CHUNK_ROWS, elements // max(1, cols)))
    multiple = GROUP_ROWS if rows > GROUP_ROWS else 8
    return rows - rows % multiple if rows > multiple else rows
