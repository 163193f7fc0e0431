"""Matrices of codes that are stored as ``[inputs, outputs]``, several codes in each word of 32 bits."""

import numpy as np

from ablate_shards.kernels.codecs.packing import pack, packed_bytes, unpack

__all__ = ["from_rows", "outputs_in_order", "to_rows"]

#: Which of eight outputs each of the codes in a word of AWQ is, from the lowest bits on.
_OUTPUTS = np.array([0, 2, 4, 6, 1, 3, 5, 7])
#: Inputs that are turned at a time.
_TOGETHER = 1024


def to_rows(stored: np.ndarray, order: str, bits: int, rows: int) -> np.ndarray:
    """Return a matrix as it would be stored row by row, ``[rows, bytes]`` uint8.

    Args:
        stored: Its bytes, uint8.
        order: ``inputs`` where words hold several inputs of an output (GPTQ), ``outputs`` where they hold several
            outputs of an input (AWQ).
        bits: Bits of a code.
        rows: Outputs.
    """
    if order == "inputs":
        return np.ascontiguousarray(stored.view("<u4").reshape(-1, rows).T).view(np.uint8)
    words = stored.reshape(-1, rows * bits // 8)
    turned = np.zeros((rows, packed_bytes(len(words), bits)), np.uint8)
    for first in range(0, len(words), _TOGETHER):
        codes = outputs_in_order(unpack(words[first : first + _TOGETHER], bits, rows))
        pack(np.ascontiguousarray(codes.T), bits, turned[:, first * bits // 8 :])
    return turned


def from_rows(matrix: np.ndarray, order: str, bits: int, cols: int) -> np.ndarray:
    """Return the bytes that a matrix of :func:`to_rows` is stored as, uint8.

    Args:
        matrix: ``[rows, bytes]`` uint8.
        order: As :func:`to_rows` takes it.
        bits: Bits of a code.
        cols: Inputs.
    """
    if order == "inputs":
        return np.ascontiguousarray(matrix.view("<u4").T).view(np.uint8).reshape(-1)
    rows = len(matrix)
    stored = np.empty((cols, rows * bits // 8), np.uint8)
    for first in range(0, cols, _TOGETHER):
        count = min(_TOGETHER, cols - first)
        codes = unpack(matrix[:, first * bits // 8 : packed_bytes(first + count, bits)], bits, count).T
        lines = codes.reshape(count, -1, len(_OUTPUTS))[..., _OUTPUTS].reshape(count, rows)
        pack(lines, bits, stored[first : first + count])
    return stored.reshape(-1)


def outputs_in_order(codes: np.ndarray) -> np.ndarray:
    """Return codes ``[n, outputs]`` of AWQ's words in the order of the outputs."""
    ordered = np.empty_like(codes)
    ordered.reshape(len(codes), -1, len(_OUTPUTS))[..., _OUTPUTS] = codes.reshape(len(codes), -1, len(_OUTPUTS))
    return ordered
