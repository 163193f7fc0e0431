"""How bitsandbytes stores quantised weights: four bits in one line with a state, or bytes by row (LLM.int8)."""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from ablate_shards.errors import ArchitectureError, reason
from ablate_shards.surgery.anatomy.coded import (
    WAY_OUT,
    Part,
    Scales,
    check_dtype,
    check_shape,
    part_beside,
    scales_of,
)
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["NESTED", "State", "find_bytes", "find_line", "read_state", "state_of"]

NESTED = 256
"""Scales that one scale of scales is for."""

_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_TYPES = ("nf4", "fp4")
_METHOD = "bitsandbytes"


class State(NamedTuple):
    """What the state of a weight says.

    Attributes:
        kind: ``NF4`` or ``FP4``.
        block: Codes that one scale is for.
        shape: Rows and columns.
        offset: What is added to each scale, of scales that are codes; None where they are numbers.
    """

    kind: str
    block: int
    shape: tuple[int, int]
    offset: float | None


class _Stated(msgspec.Struct):
    quant_type: str
    blocksize: int
    shape: tuple[int, int]
    nested_blocksize: int = NESTED
    nested_offset: float | None = None


def state_of(codes: TensorInfo, tensors: Mapping[str, TensorInfo]) -> TensorInfo | None:
    """Returns the tensor that holds the state of a weight in four bits, None where there is none."""
    names = (f"{codes.name}.quant_state.bitsandbytes__{kind}" for kind in _TYPES)
    return next((tensors[name] for name in names if name in tensors), None)


def read_state(name: str, raw: bytes) -> State:
    """Reads a state.

    Raises:
        ArchitectureError: It is none.
    """
    try:
        said = msgspec.convert(json.loads(raw), _Stated)
    except (ValueError, RecursionError) as error:
        raise ArchitectureError(f"{name}: not a state of bitsandbytes ({reason(error)}); {WAY_OUT}") from error
    if said.nested_blocksize != NESTED or min(*said.shape, said.blocksize) < 1:
        raise ArchitectureError(
            f"{name}: expected positive sizes and scales in blocks of {NESTED}, found {list(said.shape)}, "
            f"{said.blocksize} and {said.nested_blocksize}; {WAY_OUT}"
        )
    return State(said.quant_type.upper(), said.blocksize, said.shape, said.nested_offset)


def find_line(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any, rows: int | None) -> Scales:
    """Finds the scales of codes of four bits that lie in one line.

    Args:
        codes: The weight.
        tensors: What the checkpoint holds.
        config: The ``quantization_config`` of its config.json.
        rows: Rows of the weight.

    Raises:
        ArchitectureError: They are missing, or do not fit; the message does not name the weight.
    """
    stem, what = codes.name, "codes of bitsandbytes"
    _check_config(config, "load_in_4bit", what)
    restore = f"restore the config.json that came with the shards, or {WAY_OUT}"
    if (state := state_of(codes, tensors)) is None:
        names = " or ".join(f"{stem}.quant_state.bitsandbytes__{kind}" for kind in _TYPES)
        raise ArchitectureError(f"expected {names} beside {what}, found none; fetch the shards again")
    kind = state.name.rpartition("__")[2]
    if (said := config.get("bnb_4bit_quant_type", kind)) != kind:
        raise ArchitectureError(f"config.json says {said!r}, but its state is {state.name}; {restore}")
    check_dtype(state, ("U8",))
    scales = part_beside(f"{stem}.absmax", tensors, what)
    check_dtype(scales, ("F32", "U8"))
    table = part_beside(f"{stem}.quant_map", tensors, what)
    check_dtype(table, ("F32",))
    check_shape(table, (16,))
    parts = [Part.of("state", state), Part.of("table", table)]
    count, blocks = 2 * math.prod(codes.shape), math.prod(scales.shape)
    if scales.dtype == "U8":
        nested = part_beside(f"{stem}.nested_absmax", tensors, what)
        values = part_beside(f"{stem}.nested_quant_map", tensors, what)
        check_dtype(nested, ("F32",))
        check_shape(nested, (-(-blocks // NESTED),))
        check_dtype(values, ("F32",))
        check_shape(values, (256,))
        parts += [Part.of("nested scales", nested), Part.of("nested table", values)]
    elif f"{stem}.nested_absmax" in tensors:
        raise ArchitectureError(f"expected {scales.name} in U8 beside {stem}.nested_absmax, found F32; {WAY_OUT}")
    block = next((size for size in _BLOCKS if -(-count // size) == blocks), None)
    if block is None:
        raise ArchitectureError(
            f"expected a scale for every {', '.join(map(str, _BLOCKS))} of {count} codes as {scales.name}, found "
            f"{blocks}; {WAY_OUT}"
        )
    if not rows or count % rows or count // rows % block:
        raise ArchitectureError(f"its rows, {rows} of {count} codes, end within a block of {block}; {WAY_OUT}")
    return scales_of(scales, (1, block), kind.upper(), parts, "line", rows)


def find_bytes(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Finds the scales of bytes of LLM.int8.

    Args:
        codes: The weight.
        tensors: What the checkpoint holds.
        config: The ``quantization_config`` of its config.json.

    Raises:
        ArchitectureError: They do not fit; the message does not name the weight.
    """
    what, stem = "codes of LLM.int8", codes.name.removesuffix("weight")
    _check_config(config, "load_in_8bit", what)
    scales = part_beside(f"{stem}SCB", tensors, what)
    check_dtype(scales, ("F32",))
    if len(codes.shape) != 2:
        raise ArchitectureError(f"expected {what} in two dimensions, found {list(codes.shape)}; {WAY_OUT}")
    check_shape(scales, codes.shape[:1], (codes.shape[0], 1))
    parts = []
    if (layout := tensors.get(f"{stem}weight_format")) is not None:
        check_dtype(layout, ("U8",))
        parts.append(Part.of("layout", layout))
    return scales_of(scales, (1, codes.shape[1]), "signed8", parts)


def _check_config(config: Any, key: str, what: str) -> None:
    method = config.get("quant_method") if isinstance(config, Mapping) else None
    if method != _METHOD:
        raise ArchitectureError(
            f"expected {_METHOD} as quant_method of {what}, found {method!r}; restore the config.json that came with "
            f"the shards, or {WAY_OUT}"
        )
    if not (config.get(key) or config.get(f"_{key}")):
        raise ArchitectureError(
            f"expected {key} in the quantization_config of {what}, found none; restore the config.json that came with "
            f"the shards, or {WAY_OUT}"
        )
