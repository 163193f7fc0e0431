"""Codes of less than eight bits, packed without gaps along a row: the first one in the lowest bits."""

import numpy as np

__all__ = ["ALIGNED", "pack", "packed_bytes", "unpack"]

ALIGNED = 8
"""So many codes, of however many bits, fill whole bytes."""


def packed_bytes(count: int, bits: int) -> int:
    """Return how many bytes codes take."""
    return -(-count * bits // 8)


def unpack(raw: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Return codes ``[rows, count]`` uint8; those of eight bits are a view.

    Args:
        raw: ``[rows, bytes]`` uint8, at least as many as the codes take.
        bits: Bits of a code.
        count: Codes of a row.
    """
    if bits == 8:
        return raw[:, :count]
    if bits == 4:
        codes = np.empty((len(raw), 2 * raw.shape[1]), np.uint8)
        np.bitwise_and(raw, 15, out=codes[:, ::2])
        np.right_shift(raw, 4, out=codes[:, 1::2])
        return codes[:, :count]
    lines = np.unpackbits(raw, axis=1, count=count * bits, bitorder="little").reshape(len(raw), count, bits)
    return np.packbits(lines, axis=2, bitorder="little")[..., 0]


def pack(codes: np.ndarray, bits: int, raw: np.ndarray) -> None:
    """Put codes ``[rows, count]`` uint8 into what they were unpacked from; bits beyond them stay."""
    if bits == 8:
        raw[:, : codes.shape[1]] = codes
        return
    count = codes.shape[1]
    if bits == 4:
        pairs = count // 2
        raw[:, :pairs] = codes[:, : 2 * pairs : 2] | codes[:, 1 : 2 * pairs : 2] << 4
        if count % 2:
            raw[:, pairs] = raw[:, pairs] & 0xF0 | codes[:, -1]
        return
    size = packed_bytes(count, bits)
    lines = np.unpackbits(raw[:, :size], axis=1, bitorder="little")
    each = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little")
    lines[:, : count * bits] = each.reshape(len(codes), count * bits)
    raw[:, :size] = np.packbits(lines, axis=1, bitorder="little")
