"""Finds the scales that the codes of a quantised weight are multiplied by, and how far each of them reaches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["CODED", "Scales", "find_scales", "is_beside_codes", "names_of_scales", "quantisation_of"]

CODED = "F8_E4M3"
"""The dtype of the codes that can be edited."""

_KEY = "quantization_config"
_DTYPES = ("F32", "BF16", "F16", "F8_E8M0", "U8")
#: Of a module, after ``weight``; the last stands in its place.
_ENDINGS = ("_scale_inv", "_scale")
_BESIDE = frozenset({"weight_scale_inv", "weight_scale", "scale", "scale_inv"})
#: What activations are multiplied by at run time, which does not touch the weight.
_ACTIVATIONS = frozenset({"input_scale", "activation_scale"})
#: Each multiplies codes by scales, and nothing else.
_METHODS = ("fp8", "compressed-tensors", "modelopt", "quark")
_WAY_OUT = "dequantise the checkpoint to BF16, F16 or F32 first"


@dataclass(frozen=True, slots=True)
class Scales:
    """The scales of a weight's codes.

    Attributes:
        name: Their tensor.
        shard: The shard that holds it, which may be another than that of the codes.
        dtype: Its safetensors dtype.
        shape: Its shape as stored.
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        block: Rows and columns of a matrix that one scale is for.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    block: tuple[int, int]

    @property
    def tensor(self) -> TensorInfo:
        """Where they lie."""
        return TensorInfo(self.name, self.dtype, self.shape, self.shard, self.start, self.end)

    def form(self, shape: Sequence[int]) -> str:
        """Returns how the codes of a weight of a shape are stored, in words."""
        if self.block == tuple(shape[-2:]):
            return "FP8 per tensor"
        if self.block == (1, shape[-1]):
            return "FP8 per channel"
        return f"FP8 in blocks of {self.block[0]} x {self.block[1]}"


def is_beside_codes(rest: str) -> bool:
    """Tells whether a part of a module, by what follows its name, is no part of a weight but a scale of FP8."""
    return rest.lstrip("._") in _BESIDE | _ACTIVATIONS


def find_scales(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Finds the scales of an FP8 weight by name and checks them.

    Args:
        codes: The weight.
        tensors: What the checkpoint holds.
        config: The ``quantization_config`` of its config.json, None where there is none.

    Raises:
        ArchitectureError: There are none or two, or they do not fit; the message does not name the weight.
    """
    names = names_of_scales(codes.name)
    found = [tensors[name] for name in names if name in tensors]
    if len(found) != 1:
        what = " and ".join(tensor.name for tensor in found) or "none"
        raise ArchitectureError(
            f"expected the scales of FP8 codes in one of {', '.join(names)}, found {what}; fetch the shards that "
            f"hold them, or {_WAY_OUT}"
        )
    scales = found[0]
    if scales.dtype not in _DTYPES:
        raise ArchitectureError(f"expected {', '.join(_DTYPES)} as {scales.name}, found {scales.dtype}; {_WAY_OUT}")
    _check_method(config)
    block = _block_of(scales.name, scales.shape, codes.shape, _said_block(config))
    return Scales(scales.name, scales.shard, scales.dtype, scales.shape, scales.start, scales.end, block)


def names_of_scales(codes: str) -> list[str]:
    """Returns the names that the scales of a weight of codes may have."""
    names = [codes + ending for ending in _ENDINGS]
    return [*names, f"{codes.removesuffix('weight')}scale"] if codes.endswith(".weight") else names


def quantisation_of(config: Mapping[str, Any] | None) -> Any:
    """Returns the ``quantization_config`` of a config.json, of the decoder's own part before the rest."""
    whole = config or {}
    text = whole.get("text_config")
    places = (text, whole) if isinstance(text, Mapping) else (whole,)
    return next((place[_KEY] for place in places if place.get(_KEY) is not None), None)


def _check_method(config: Any) -> None:
    if not isinstance(config, Mapping):
        raise ArchitectureError(
            "holds FP8 codes, but config.json has no quantization_config to say how they are read; restore the "
            f"config.json that came with the shards, or {_WAY_OUT}"
        )
    if (method := config.get("quant_method")) not in _METHODS:
        raise ArchitectureError(
            f"expected {', '.join(_METHODS)} as quant_method of FP8 codes, found {method!r}; {_WAY_OUT}"
        )
    if config.get("transform_config"):
        raise ArchitectureError(f"its values are rotated (transform_config), which is not undone here; {_WAY_OUT}")


def _said_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the size of blocks that the configuration states, None where it states none."""
    said = [config.get("weight_block_size")]
    groups = config.get("config_groups")
    if isinstance(groups, Mapping):
        weights = [group.get("weights") for group in groups.values() if isinstance(group, Mapping)]
        said += [each.get("block_structure") for each in weights if isinstance(each, Mapping)]
    stated = [each for each in said if each is not None]
    for each in stated:
        sizes = each if isinstance(each, list) else []
        if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes) or each != stated[0]:
            raise ArchitectureError(
                f"quantization_config: expected one size of blocks, two positive integers, found {stated}; restore it"
            )
    return (stated[0][0], stated[0][1]) if stated else None


def _block_of(
    name: str, scales: tuple[int, ...], codes: tuple[int, ...], said: tuple[int, int] | None
) -> tuple[int, int]:
    """Returns the block of one scale, from the shapes of scales and codes and the size of blocks that is stated."""
    batch, (rows, cols) = codes[:-2], codes[-2:]
    if said is not None and scales == (*batch, -(-rows // said[0]), -(-cols // said[1])):
        return said
    if scales == (*batch, rows, 1) or (not batch and scales == (rows,)):
        return 1, cols
    if scales in ((*batch, 1, 1), batch, (*batch, 1)) or (not batch and scales == (1,)):
        return rows, cols
    blocks = (
        "weight_block_size is not stated"
        if said is None
        else f"blocks of {said[0]} x {said[1]} would be {[*batch, -(-rows // said[0]), -(-cols // said[1])]}"
    )
    raise ArchitectureError(
        f"the scales {name} are {list(scales)}, which is neither one per row ({[*batch, rows, 1]}) nor one per matrix, "
        f"and {blocks}; restore the config.json that came with the shards, or {_WAY_OUT}"
    )
