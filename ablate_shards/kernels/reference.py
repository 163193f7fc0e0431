"""Ablation and merging by definition, for comparison: in float64, unblocked, without a closed form."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor, dtype

__all__ = ["DEGENERATE", "Preserve", "ablate", "merge", "round_to"]

Preserve = Literal["rows", "columns", "none"]

DEGENERATE = 1e-6
"""Squared residual, relative to the squared norm, below which a vector is not rescaled."""


def ablate(
    weight: "Tensor", basis: "Tensor", *, coefficient: float = 1.0, preserve: Preserve = "rows", axis: int = -2
) -> "tuple[Tensor, Tensor]":
    """Remove the directions from a weight by definition, and say which vectors were left unscaled.

    With the residual axis first, ``[d, n]``: ``none`` is ``W - a RᵀRW``; ``columns`` rescales each column
    of that to its old norm; ``rows`` first normalises the rows, removes the directions from the normalised
    matrix, normalises its rows again and multiplies the old norms back (grimjim, "Norm-Preserving
    Biprojected Abliteration", 2025-11).

    Args:
        weight: ``[..., d, n]``, or ``[..., n, d]`` with ``axis=-1``; finite, any float dtype.
        basis: ``[k, d]``, orthonormal rows.
        coefficient: The ``a`` above; 1 removes, 2 reflects.
        preserve: Which norms stay.
        axis: Where the residual axis lies, -2 or -1.

    Returns:
        The new weight in float64, before any rounding, and a mask ``[..., vectors]`` of the vectors so
        nearly parallel to the directions that they were not rescaled.
    """
    import torch

    matrix = weight.to("cpu", torch.float64)
    matrix = matrix if axis == -2 else matrix.mT
    directions = basis.to("cpu", torch.float64)
    if preserve == "none":
        result = _remove(matrix, directions, coefficient)
        degenerate = torch.zeros(result.shape[:-2] + result.shape[-1:], dtype=torch.bool)
    else:
        along = -1 if preserve == "rows" else -2
        norms = torch.linalg.vector_norm(matrix, dim=along, keepdim=True)
        unit = torch.where(norms > 0, matrix / norms, matrix)
        moved = _remove(unit, directions, coefficient)
        left = torch.linalg.vector_norm(moved, dim=along, keepdim=True)
        parallel = (left.square() < DEGENERATE) & (norms > 0)
        rescaled = torch.where(parallel | (norms == 0), moved, moved / left)
        result, degenerate = norms * rescaled, parallel.squeeze(along)
    return (result if axis == -2 else result.mT), degenerate


def merge(weight: "Tensor", left: "Tensor", right: "Tensor", scale: float = 1.0) -> "Tensor":
    """Add a low-rank update to a weight by definition: ``weight + scale * left @ right``.

    Args:
        weight: ``[rows, cols]``, any float dtype.
        left: ``[rows, r]``.
        right: ``[r, cols]``.
        scale: What the product is multiplied by.

    Returns:
        The new weight in float64, before any rounding.
    """
    import torch

    product = left.to("cpu", torch.float64) @ right.to("cpu", torch.float64)
    return weight.to("cpu", torch.float64) + scale * product


def round_to(values: "Tensor", dtype: "dtype") -> "Tensor":
    """Round float64 values to the nearest finite value of a dtype, ties to even, in one rounding.

    PyTorch converts float64 to a 16-bit type through float32, which rounds twice. Rounding to float32 "to
    odd" first keeps the second rounding exact (Boldo and Melquiond, "Emulation of FMA and correctly rounded
    sums: proved algorithms using rounding to odd", 2008).

    Args:
        values: Any shape, float64.
        dtype: bfloat16, float16, float32 or float64.

    Returns:
        The rounded values, same shape; what lies beyond the largest finite value becomes that value.
    """
    import torch

    limit = torch.finfo(dtype).max
    values = values.clamp(-limit, limit)
    if dtype in (torch.float32, torch.float64):
        return values.to(dtype)
    single = values.to(torch.float32)
    away = single.double().abs() > values.abs()
    bits = single.view(torch.int32) - away.to(torch.int32)
    odd = bits | (bits.view(torch.float32).double() != values).to(torch.int32)
    return odd.view(torch.float32).to(dtype)


def _remove(matrix: "Tensor", directions: "Tensor", coefficient: float) -> "Tensor":
    return matrix - coefficient * (directions.mT @ (directions @ matrix))
