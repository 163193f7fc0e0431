"""The sums that directions and their scores are computed from: in C where it was built, else in NumPy.

These are sums over groups of rows, a product per row with its group's weight, and how well such products separate.
Row ``i`` of a block whose first row has the index ``first`` belongs to group ``(first + i) mod groups``.
"""

from collections.abc import Iterator

import numpy as np

from ablate_shards.kernels.codecs.plain import decoded
from ablate_shards.kernels.native import native

__all__ = ["add_group_sums", "group_dots", "pairs_in_order"]

_ELEMENTS = 1 << 19


def add_group_sums(block: np.ndarray, first: int, into: np.ndarray) -> None:
    """Add rows to the sum of their group, in float64.

    Args:
        block: ``[rows, d]`` float64, or as stored: float32, float16, or uint16, which are the bits of bfloat16.
        first: The index of the first row.
        into: What to add to, ``[groups, d]`` float64.
    """
    if native.add_group_sums(block, first, into):
        return
    for start, values in _exact(block):
        for phase in range(len(into)):
            into[(first + start + phase) % len(into)] += values[phase :: len(into)].sum(0)


def group_dots(block: np.ndarray, first: int, weights: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Return the product of each row with the weight of its group, less the group's offset, ``[rows]`` float64.

    Args:
        block: ``[rows, d]`` as in :func:`add_group_sums`.
        first: The index of the first row.
        weights: ``[groups, d]`` float64.
        offsets: ``[groups]`` float64.
    """
    out = np.empty(len(block))
    if native.group_dots(block, first, weights, offsets, out):
        return out
    for start, values in _exact(block):
        found = out[start : start + len(values)]
        for phase in range(len(weights)):
            group = (first + start + phase) % len(weights)
            found[phase :: len(weights)] = np.vecdot(values[phase :: len(weights)], weights[group]) - offsets[group]
    return out


def pairs_in_order(lower: np.ndarray, higher: np.ndarray) -> int:
    """Return twice the number of pairs in which the value of ``lower`` is below that of ``higher``; ties count half.

    Args:
        lower: ``[n]`` float64, none NaN.
        higher: ``[m]`` float64.
    """
    lower, higher = np.sort(lower), np.sort(higher)
    counted = native.pairs_in_order(lower, higher)
    if counted is None:
        return int((np.searchsorted(lower, higher, "left") + np.searchsorted(lower, higher, "right")).sum())
    return counted


def _exact(block: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield a few rows at a time in float64, each time with the number of the first."""
    rows = max(1, _ELEMENTS // max(1, block.shape[1]))
    for start in range(0, len(block), rows):
        part = block[start : start + rows]
        yield start, part if part.dtype == np.float64 else decoded(part, np.float64)
