"""Stored weights as NumPy arrays: bfloat16, float16 and float32, read and rounded without torch."""

from typing import Any

import numpy as np

__all__ = ["GREATEST", "INFINITE", "STORED", "decode", "decoded", "encode", "round_to_bfloat16", "stored_dtype"]

STORED: dict[str, type[np.generic]] = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}
"""NumPy has no bfloat16: its bits travel as integers."""


def decode(stored: np.ndarray, out: np.ndarray) -> None:
    """Convert stored values to float32 or float64.

    Args:
        stored: uint16 (the bits of bfloat16), float16 or float32, any shape.
        out: float32 or float64, of that shape.
    """
    if out.dtype == np.float64:
        out[...] = stored if stored.dtype == np.float32 else decoded(stored, np.float32)
    elif stored.dtype == np.uint16:
        bits = out.view(np.uint32)
        np.copyto(bits, stored)
        np.left_shift(bits, 16, out=bits)
    elif stored.dtype == np.float16 and not _has_nonfinite(stored):
        # NumPy converts one number at a time. The bits of a half, read as those of a float32, are off by a factor.
        bits = out.view(np.int32)
        np.left_shift(stored.view(np.int16), 13, out=bits, dtype=np.int32)
        np.bitwise_and(bits, _HALF_BITS, out=bits)
        np.multiply(out, _HALF_FACTOR, out=out)
    else:
        out[...] = stored


def decoded(stored: np.ndarray, precision: type[np.floating]) -> np.ndarray:
    """Return stored values in float32 or float64."""
    out = np.empty(stored.shape, precision)
    with np.errstate(all="ignore"):
        decode(stored, out)
    return out


def encode(values: np.ndarray, out: np.ndarray) -> None:
    """Round to the nearest stored value, ties to even; what lies beyond the greatest finite one becomes that one.

    Args:
        values: float64; is overwritten.
        out: uint16 (the bits of bfloat16), float16 or float32, of that shape.
    """
    limit = GREATEST[stored_dtype(out) or "F32"]
    np.clip(values, -limit, limit, out=values)
    if out.dtype == np.uint16:
        round_to_bfloat16(_to_odd(values), out)
    else:
        out[...] = values


INFINITE = 0x7F80
"""The bits of bfloat16 that infinity has; those of what is no number are greater."""


def round_to_bfloat16(values: np.ndarray, out: np.ndarray | None = None, room: np.ndarray | None = None) -> np.ndarray:
    """Return the bits of the nearest bfloat16, uint16, of float32 values that are numbers; ties to even.

    Args:
        values: Any shape.
        out: Where to put them, a new array if None.
        room: Memory for what is computed on the way, uint32 of the same shape; new memory if None.
    """
    bits = values.view(np.uint32)
    rounded = np.right_shift(bits, 16, out=room)
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    out = np.empty(values.shape, np.uint16) if out is None else out
    out[...] = rounded
    return out


_HALF_BITS = np.int32(-0x70002000)
_HALF_FACTOR = np.float32(2.0**112)


def _has_nonfinite(stored: np.ndarray) -> bool:
    bits = stored.view(np.uint16)
    return bool(bits.max(initial=0) >= 0xFC00 or bits.view(np.int16).max(initial=0) >= 0x7C00)


def _to_odd(values: np.ndarray) -> np.ndarray:
    """Round float64 to float32 such that a second rounding to fewer digits errs no more than one would alone."""
    single = values.astype(np.float32)
    bits = single.view(np.int32)
    bits -= np.abs(single.astype(np.float64)) > np.abs(values)
    bits |= single.astype(np.float64) != values
    return single


_NAMES = {
    "uint16": "BF16",
    "float16": "F16",
    "float32": "F32",
    "torch.bfloat16": "BF16",
    "torch.float16": "F16",
    "torch.float32": "F32",
}

GREATEST = {
    "BF16": float.fromhex("0x1.fep127"),
    "F16": 65504.0,
    "F32": float.fromhex("0x1.fffffep127"),
}
"""The greatest finite value of what a weight can be stored in, by its name in safetensors."""


def stored_dtype(values: Any) -> str | None:
    """Return the stored dtype that an array or a tensor holds, NumPy's uint16 being the bits of bfloat16."""
    return _NAMES.get(str(values.dtype))
