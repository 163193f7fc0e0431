"""The passes over rows, made of the sums and the update that every form has."""

from collections.abc import Callable
from dataclasses import replace

from ablate_shards.kernels.ablate.factors import Factors, inverse, row_factors
from ablate_shards.kernels.form import Array, BothPrecisions, Float32Limits, Piece

__all__ = ["Stepwise", "update_rows"]


class Stepwise:
    """The passes that C does at once, step by step, for forms that have none of their own: see :class:`Arithmetic`."""

    def mix(self, piece: Piece, basis: Array, squares: Array, into: Array) -> None:
        """Take the squared norms of rows, and with them what is added up along the directions."""
        xp = piece.arrays.xp
        norms = piece.row_sums(None, squares=True)[:, 0]
        squares[piece.entries, piece.span] = norms
        lines = basis[None, :, piece.span]
        if into.shape[1] > len(basis):
            shared = xp.broadcast_to(lines, (len(norms), *lines.shape[1:]))
            lines = xp.concatenate([shared, lines * inverse(norms, xp)[:, None]], 1)
        piece.add_columns(BothPrecisions.rounded(lines, piece.arrays), into[piece.entries], known=norms)

    def move(
        self,
        piece: Piece,
        basis: Array,
        squares: Array,
        gram: Array,
        mixed: BothPrecisions,
        limits: Float32Limits,
        crosses: Array,
        columns: slice | None,
    ) -> int:
        """Ablate whole rows and keep their norms; return how many were too close to the directions to be rescaled."""
        if columns is not None:
            raise RuntimeError("expected whole rows: this form does not update them by parts")
        norms, lines_of_q = squares[piece.entries, piece.span], mixed.entries(piece.entries)
        dots = piece.row_sums(lines_of_q, known=norms)
        lines = basis[None, :, piece.span]
        factors = row_factors(norms, lines, gram[piece.entries], dots, limits, piece.arrays.xp)
        return update_rows(
            piece,
            factors,
            lines_of_q,
            lambda part: part.form.move(part, basis, squares, gram, mixed, limits, crosses, None),
        )


def update_rows(piece: Piece, factors: Factors, columns: BothPrecisions, again: Callable[[Piece], int]) -> int:
    """Update a piece whose preserved vectors are stored rows.

    Args:
        piece: The rows.
        factors: What they are updated by.
        columns: What their factors are multiplied by, ``[1 or matrices, k, cols]``.
        again: Updates a chunk with doubtful rows over again, in float64, and returns what this function does.

    Returns:
        How many rows were too close to the directions to be rescaled.
    """
    form, arrays = piece.form, piece.arrays
    chunks: list[Piece] = []
    if not form.is_double and factors.doubtful is not None:
        chunks = [piece.chunk(*place) for place in piece.chunks_with(factors.doubtful)]
        chunks = [replace(chunk, source=arrays.clone(chunk.source)) for chunk in chunks]
    original = None if factors.still is None else arrays.clone(piece.source)
    scale = None if factors.scale is None else BothPrecisions.rounded(factors.scale[..., None], arrays).of(form)
    rows = BothPrecisions.rounded(factors.factor, arrays)
    form.update(piece.view, piece.source, scale, rows.of(form), columns.of(form))
    if factors.still is not None:
        arrays.keep(piece.view, original, factors.still[..., None])
    if form.is_double:
        return 0 if factors.parallel is None else int(factors.parallel.sum())
    # Whatever is parallel is doubtful too, and counted where it is done over again.
    return sum(again(chunk) for chunk in chunks)
