"""How MLX stores quantised weights: codes in words of 32 bits, scales beside them, and offsets that are added."""

from collections.abc import Mapping
from typing import Any

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.coded import (
    WAY_OUT,
    WORD,
    Part,
    Scales,
    check_dtype,
    check_shape,
    part_beside,
    scales_of,
)
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["find_mlx", "is_mlx"]

_BITS = (2, 3, 4, 5, 6, 8)
#: What codes are, their bits and the columns of a scale, by mode.
_FLOATS = {"mxfp4": ("E2M1", 4, 32), "mxfp8": ("E4M3", 8, 32), "nvfp4": ("E2M1", 4, 16)}


def is_mlx(config: Any) -> bool:
    """Tells whether a configuration of quantised weights is one of MLX, which names no method."""
    return isinstance(config, Mapping) and "quant_method" not in config and "group_size" in config


def find_mlx(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Finds the scales and offsets of codes in words of 32 bits.

    Args:
        codes: The weight.
        tensors: What the checkpoint holds.
        config: ``quantization`` of its config.json.

    Raises:
        ArchitectureError: They are missing, or do not fit; the message does not name the weight.
    """
    module = codes.name.removesuffix(".weight")
    kind, bits, size = _settings(config, module)
    restore = f"restore the config.json that came with the shards, or {WAY_OUT}"
    scales = part_beside(f"{module}.scales", tensors, "codes of MLX")
    *batch, words = codes.shape
    columns, rest = divmod(words * WORD, bits)
    if rest or columns % size or scales.shape != (*batch, columns // size):
        raise ArchitectureError(
            f"config.json says {bits} bits in groups of {size}, but {words} words a row have scales of "
            f"{list(scales.shape)}; {restore}"
        )
    if kind.startswith("uint"):
        check_dtype(scales, ("F32", "BF16", "F16"))
        offsets = part_beside(f"{module}.biases", tensors, scales.name)
        check_dtype(offsets, (scales.dtype,))
        check_shape(offsets, scales.shape)
        parts = [Part.of("offsets", offsets)]
    else:
        check_dtype(scales, ("U8",))
        if (strange := tensors.get(f"{module}.biases")) is not None:
            raise ArchitectureError(f"config.json says {kind} without offsets, but {strange.name} is there; {restore}")
        parts = []
    if (largest := tensors.get(f"{module}.global_scale")) is not None:
        if (kind, bits, size) != _FLOATS["nvfp4"]:
            raise ArchitectureError(f"config.json says {kind}, but {largest.name} is of nvfp4 alone; {restore}")
        check_dtype(largest, ("F32",))
        check_shape(largest, tuple(batch[:-1]))
        parts.append(Part.of("maximum", largest))
    return scales_of(scales, (1, size), kind, parts)


def _settings(config: Any, module: str) -> tuple[str, int, int]:
    """Returns what the codes of a module are, their bits, and the columns of a scale."""
    if not is_mlx(config):
        method = config.get("quant_method") if isinstance(config, Mapping) else None
        found = "no quantization" if method is None else f"quant_method {method!r}"
        raise ArchitectureError(
            f"holds words of codes as MLX stores them, but config.json has {found} to say how they are read; restore "
            f"the config.json that came with the shards, or {WAY_OUT}"
        )
    own = config.get(module)
    if own is False:
        raise ArchitectureError(
            f"config.json says that {module} is not quantised, but it holds codes; restore the config.json that came "
            f"with the shards, or {WAY_OUT}"
        )
    # What a module has of its own is all that MLX reads for it.
    said = own if isinstance(own, Mapping) else config
    mode = said.get("mode", "affine")
    _, usual_bits, usual_size = _FLOATS.get(mode if isinstance(mode, str) else "", ("", 4, 64))
    bits, size = said.get("bits", usual_bits), said.get("group_size", usual_size)
    known = _FLOATS.get(mode) if isinstance(mode, str) else None
    if known is not None and (bits, size) == known[1:]:
        return known
    if mode != "affine" or bits not in _BITS or type(size) is not int or size < 1:
        raise ArchitectureError(
            f"expected {', '.join(map(str, _BITS))} as bits, a group_size, and affine, {', '.join(_FLOATS)} as mode of "
            f"MLX, found {bits}, {size} and {mode!r}; {WAY_OUT}"
        )
    return f"uint{bits}", bits, size
