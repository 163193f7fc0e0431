"""Finds what the codes of a quantised weight mean: its scales and other parts, and how far each scale reaches."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.checkpoint.checkpoint import text_part
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = [
    "Part",
    "Scales",
    "ending_of",
    "find_scales",
    "is_beside_codes",
    "is_codes",
    "names_of_activations",
    "names_of_scales",
    "plain_name_of",
    "quantisation_of",
]

_KEY = "quantization_config"
_POWERS = ("F8_E8M0", "U8")
_DTYPES = ("F32", "BF16", "F16", *_POWERS)
#: Of a module, after ``weight``; the last stands in its place.
_ENDINGS = ("_scale_inv", "_scale")
#: How names of codes end that are no plain weights, by dtype.
_CODES = {
    ".weight": ("F8_E4M3", "U8", "I8"),
    ".weight_packed": ("I32", "U8"),
    ".qweight": ("I32",),
    "_blocks": ("U8",),
}
#: What may stand beside codes that are called so, by what follows the module's name.
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "scale_inv")
_BESIDE = {
    ".weight": (*_SCALES, "weight_scale_2"),
    "": _SCALES,
    ".weight_packed": ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    ".qweight": ("scales", "qzeros", "g_idx"),
    "_blocks": ("scales",),
}
#: What activations are multiplied by at run time, which does not touch the weight.
_ACTIVATIONS = frozenset({"input_scale", "activation_scale", "input_global_scale", "input_zero_point"})
_WAY_OUT = "dequantise the checkpoint with the library that wrote it first"
_FEWEST_BITS, _MOST_BITS = 2, 8
#: Bits of a word that codes are packed into.
_WORD = 32
#: Dimensions of a stack; codes may have one more, which cuts each row into blocks.
_STACKED = 3

Role = Literal["multiplier", "divisor", "zero points", "zero points less one", "groups", "shape"]
Order = Literal["rows", "inputs", "outputs"]
"""How codes lie: row by row, or transposed, in words of codes of several inputs (GPTQ) or several outputs (AWQ)."""


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor beside the codes and the scales of a weight.

    Attributes:
        role: What it is: a number that all scales are multiplied or divided by, the zero points of the scales' blocks
            or one less than these, the group of each column, or the rows and columns of the weight.
        name: The tensor.
        shard: The shard that holds it, which may be another than that of the codes.
        dtype: Its safetensors dtype.
        shape: Its shape as stored.
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
    """

    role: Role
    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @classmethod
    def of(cls, role: Role, tensor: TensorInfo) -> "Part":
        """Returns a tensor as a part."""
        return cls(role, tensor.name, tensor.shard, tensor.dtype, tensor.shape, tensor.start, tensor.end)

    @property
    def tensor(self) -> TensorInfo:
        """Where it lies."""
        return TensorInfo(self.name, self.dtype, self.shape, self.shard, self.start, self.end)


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
        codes: What the codes are: ``E4M3``, ``E2M1``, ``signed8`` (bytes), or ``int4`` and others of 2 to 8 bits.
        parts: What else says what they mean.
        order: How they lie; transposed ones have transposed scales and zero points.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    block: tuple[int, int]
    codes: str = "E4M3"
    parts: tuple[Part, ...] = ()
    order: Order = "rows"

    @property
    def tensor(self) -> TensorInfo:
        """Where they lie."""
        return TensorInfo(self.name, self.dtype, self.shape, self.shard, self.start, self.end)

    def part(self, *roles: Role) -> Part | None:
        """Returns the part that has one of the roles."""
        return next((part for part in self.parts if part.role in roles), None)

    def leading(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of a weight without its columns, ``[rows]`` or ``[matrices, rows]``, from that of codes."""
        if self.order == "rows":
            return _leading(shape)
        return (shape[-1] * (1 if self.order == "inputs" else _WORD // self.bits),)

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return {"E4M3": 8, "E2M1": 4, "signed8": 8}.get(self.codes) or int(self.codes.removeprefix("int"))

    @property
    def format(self) -> str:
        """What the format is called."""
        if self.codes == "E2M1":
            return "NVFP4" if self.part("multiplier", "divisor") else "MXFP4"
        if self.codes == "E4M3":
            return "MXFP8" if self.block == (1, 32) and self.dtype in _POWERS else "FP8"
        return {"rows": "", "inputs": "GPTQ ", "outputs": "AWQ "}[self.order] + self.codes.replace("signed", "int")

    def form(self, shape: Sequence[int]) -> str:
        """Returns how the codes of a weight of a shape are stored, in words."""
        if self.format in ("MXFP4", "MXFP8", "NVFP4"):
            return self.format
        zeros = ", with zero points" if self.part("zero points", "zero points less one") else ""
        if self.block == tuple(shape[-2:]):
            reach = "per tensor"
        elif self.codes != "E4M3":
            groups = self.shape[0 if self.order != "rows" else -1] if len(self.shape) > 1 else 1
            reach = "per channel" if groups == 1 else f"in groups of {self.block[1]}"
        elif self.block == (1, shape[-1]):
            reach = "per channel"
        else:
            reach = f"in blocks of {self.block[0]} x {self.block[1]}"
        return f"{self.format} {reach}{zeros}"


def ending_of(codes: str) -> str:
    """Returns how the name of codes ends after their module's; empty for a parameter of the module itself."""
    return next((ending for ending in _CODES if codes.endswith(ending)), "")


def plain_name_of(codes: str) -> str:
    """Returns what a tensor of codes would be called if it were not quantised."""
    plain = codes.removesuffix("_packed").removesuffix("_blocks")
    return f"{plain.removesuffix('qweight')}weight" if plain.endswith(".qweight") else plain


def is_codes(tensor: TensorInfo, rest: str) -> bool:
    """Tells whether a part of a module, by its name, what of it follows the module's, and dtype, may be codes."""
    if tensor.dtype == "F8_E4M3" and rest in (".weight", "") and not tensor.name.endswith(("_scale", "_scales")):
        return True
    return any(tensor.name.endswith(ending) and tensor.dtype in dtypes for ending, dtypes in _CODES.items())


def is_beside_codes(rest: str, codes: str | None = None) -> bool:
    """Tells whether a part of a module is no part of a weight but says what its codes mean.

    Args:
        rest: How its name ends, after the module's.
        codes: How that of the codes ends; None for codes of any name.
    """
    named = itertools.chain.from_iterable(_BESIDE.values()) if codes is None else _BESIDE.get(codes, ())
    return rest.lstrip("._") in {*named, *_ACTIVATIONS}


def find_scales(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Finds the scales of a quantised weight by name and checks them, and what else belongs to it.

    Args:
        codes: The weight.
        tensors: What the checkpoint holds.
        config: The ``quantization_config`` of its config.json, None where there is none.

    Raises:
        ArchitectureError: There are none or two, or they do not fit; the message does not name the weight.
    """
    if codes.name.endswith(".weight_packed") and codes.dtype == "I32":
        return _packed_integers(codes, tensors, config)
    if codes.name.endswith(".qweight"):
        return _transposed_integers(codes, tensors, config)
    if codes.dtype == "I8" and isinstance(config, Mapping) and config.get("quant_method") == "compressed-tensors":
        return _bytes_of_integers(codes, tensors, config)
    if codes.dtype in ("U8", "I8"):
        return _fp4(codes, tensors, config)
    scales = _only_scales(codes, tensors, "FP8 codes")
    _check_dtype(scales, _DTYPES)
    _check_method(config, "FP8 codes", ("fp8", "compressed-tensors", "modelopt", "quark"))
    return _scales(scales, _block_of(scales.name, scales.shape, codes.shape, _said_block(config)))


def names_of_scales(codes: str) -> list[str]:
    """Returns the names that the scales of a weight of codes may have."""
    if codes.endswith("_blocks"):
        return [f"{codes.removesuffix('_blocks')}_scales"]
    if codes.endswith(".weight_packed"):
        return [f"{codes.removesuffix('_packed')}_scale"]
    if codes.endswith(".qweight"):
        return [f"{codes.removesuffix('qweight')}scales"]
    names = [codes + ending for ending in _ENDINGS]
    return [*names, f"{codes.removesuffix('weight')}scale"] if codes.endswith(".weight") else names


def names_of_activations(module: str) -> list[str]:
    """Returns the names that what a module's activations are multiplied by may have."""
    return [f"{module}{joint}{name}" for name in sorted(_ACTIVATIONS) for joint in "._"]


def quantisation_of(config: Mapping[str, Any] | None) -> Any:
    """Returns the ``quantization_config`` of a config.json, of the decoder's own part before the rest."""
    whole = config or {}
    part = text_part(whole)
    places = (whole,) if part is None else (part[1], whole)
    return next((place[_KEY] for place in places if place.get(_KEY) is not None), None)


def _leading(codes: Sequence[int]) -> tuple[int, ...]:
    return tuple(codes[:-2] if len(codes) > _STACKED else codes[:-1])


def _scales(
    tensor: TensorInfo,
    block: tuple[int, int],
    codes: str = "E4M3",
    parts: Sequence[Part] = (),
    order: Order = "rows",
) -> Scales:
    where = (tensor.name, tensor.shard, tensor.dtype, tensor.shape, tensor.start, tensor.end)
    return Scales(*where, block=block, codes=codes, parts=tuple(parts), order=order)


def _only_scales(codes: TensorInfo, tensors: Mapping[str, TensorInfo], what: str) -> TensorInfo:
    """Returns the one tensor that is called as the scales of codes are."""
    names = names_of_scales(codes.name)
    found = [tensors[name] for name in names if name in tensors]
    if len(found) != 1:
        have = " and ".join(tensor.name for tensor in found) or "none"
        one = f"in one of {', '.join(names)}" if len(names) > 1 else f"in {names[0]}"
        raise ArchitectureError(
            f"expected the scales of {what} {one}, found {have}; fetch the shards that hold them, or {_WAY_OUT}"
        )
    return found[0]


def _check_dtype(tensor: TensorInfo, expected: Sequence[str]) -> None:
    if tensor.dtype not in expected:
        raise ArchitectureError(f"expected {', '.join(expected)} as {tensor.name}, found {tensor.dtype}; {_WAY_OUT}")


def _check_shape(tensor: TensorInfo, *expected: tuple[int, ...]) -> None:
    if tensor.shape not in expected:
        wanted = " or ".join(str(list(shape)) for shape in expected)
        raise ArchitectureError(
            f"expected {wanted} as {tensor.name}, found {list(tensor.shape)}; restore the config.json that came with "
            f"the shards, or {_WAY_OUT}"
        )


def _check_method(config: Any, what: str, methods: Sequence[str]) -> None:
    if not isinstance(config, Mapping):
        raise ArchitectureError(
            f"holds {what}, but config.json has no quantization_config to say how they are read; restore the "
            f"config.json that came with the shards, or {_WAY_OUT}"
        )
    if (method := config.get("quant_method")) not in methods:
        raise ArchitectureError(
            f"expected {', '.join(methods)} as quant_method of {what}, found {method!r}; {_WAY_OUT}"
        )
    if config.get("transform_config"):
        raise ArchitectureError(f"its values are rotated (transform_config), which is not undone here; {_WAY_OUT}")


# ---------------------------------------------------------------------------------------- four bits and fewer


def _packed_integers(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Returns the scales of integers that compressed-tensors packed into words of 32 bits."""
    what, stem = "packed integers", codes.name.removesuffix("_packed")
    _check_method(config, what, ("compressed-tensors",))
    scales = _only_scales(codes, tensors, what)
    _check_dtype(scales, ("F32", "BF16", "F16"))
    batch, words = _leading(codes.shape), codes.shape[-1]
    fitting = {
        (bits, size, symmetric)
        for bits, size, symmetric in _integer_schemes(config)
        if scales.shape == (*batch, 1 if size is None else -(-(words * 32 // bits) // size))
    }
    if len(fitting) != 1:
        found = " and ".join(
            f"{bits} bits in groups of {size or 'a row'}" for bits, size, _ in sorted(fitting, key=str)
        )
        raise ArchitectureError(
            f"expected one group of config_groups to say what {words} words a row and scales of {list(scales.shape)} "
            f"are, found {found or 'none that fits'}; restore the config.json that came with the shards, or {_WAY_OUT}"
        )
    bits, size, symmetric = fitting.pop()
    if (shape := tensors.get(f"{stem}_shape")) is None:
        raise ArchitectureError(f"expected {stem}_shape beside {what}, found none; fetch the shards again")
    _check_dtype(shape, ("I64", "I32"))
    _check_shape(shape, (len(codes.shape),))
    parts = [Part.of("shape", shape)]
    zeros = tensors.get(f"{stem}_zero_point")
    if (zeros is None) != symmetric:
        said = "symmetric" if symmetric else "not symmetric"
        have = "none" if zeros is None else zeros.name
        raise ArchitectureError(
            f"config.json says that its integers are {said}, but its zero points are {have}; restore the config.json "
            f"that came with the shards, or {_WAY_OUT}"
        )
    if zeros is not None:
        _check_dtype(zeros, ("I32",))
        _check_shape(zeros, (*batch[:-1], -(-batch[-1] * bits // 32), scales.shape[-1]))
        parts.append(Part.of("zero points", zeros))
    if (groups := tensors.get(f"{stem}_g_idx")) is not None:
        _check_dtype(groups, ("I32", "I64"))
        parts.append(Part.of("groups", groups))
    return _scales(scales, (1, size or words * 32 // bits), f"int{bits}", parts)


def _bytes_of_integers(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Returns the scales of integers that compressed-tensors stores as bytes (``int-quantized``)."""
    what = "integers of 8 bits"
    _check_method(config, what, ("compressed-tensors",))
    scales = _only_scales(codes, tensors, what)
    _check_dtype(scales, ("F32", "BF16", "F16"))
    zeros = f"{codes.name}_zero_point"
    if zeros in tensors:
        raise ArchitectureError(f"has zero points ({zeros}), which are read of packed integers only; {_WAY_OUT}")
    if not any(each.get("num_bits") == 8 and each.get("type") == "int" for each in _groups(config)):
        raise ArchitectureError(
            f"expected one group of config_groups to have integers of 8 bits, found none; restore the config.json that "
            f"came with the shards, or {_WAY_OUT}"
        )
    rows, cols = codes.shape[-2:]
    sizes = [size for bits, size, _ in _integer_schemes(config) if bits == 8 and size is not None]
    said = next((size for size in sizes if scales.shape == (*codes.shape[:-2], rows, -(-cols // size))), None)
    block = _block_of(scales.name, scales.shape, codes.shape, None if said is None else (1, said))
    return _scales(scales, block, "signed8")


def _transposed_integers(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Returns the scales of integers as GPTQ and AWQ store them: ``[inputs, outputs]``, several in a word."""
    what, stem = "integers of GPTQ or AWQ", codes.name.removesuffix("qweight")
    _check_method(config, what, ("gptq", "awq"))
    gptq = config["quant_method"] == "gptq"
    key, known = ("checkpoint_format", ("gptq", "gptq_v2")) if gptq else ("version", ("gemm",))
    form = str(config.get(key, known[0])).lower()
    if form not in known:
        raise ArchitectureError(f"expected {' or '.join(known)} as {key} of {what}, found {form!r}; {_WAY_OUT}")
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits not in ((2, 3, 4, 8) if gptq else (4,)) or type(size) is not int or not (size > 0 or size == -1):
        raise ArchitectureError(
            f"quantization_config: expected bits of {what} and their group_size, found {bits} and {size}; restore the "
            f"config.json that came with the shards, or {_WAY_OUT}"
        )
    if len(codes.shape) != 2:
        raise ArchitectureError(f"expected {what} in two dimensions, found {list(codes.shape)}; {_WAY_OUT}")
    down, across = codes.shape
    inputs, outputs = (down * _WORD // bits, across) if gptq else (down, across * _WORD // bits)
    scales = _only_scales(codes, tensors, what)
    _check_dtype(scales, ("F16", "BF16", "F32"))
    size = inputs if size == -1 else size
    _check_shape(scales, (-(-inputs // size), outputs))
    if (zeros := tensors.get(f"{stem}qzeros")) is None:
        raise ArchitectureError(f"expected {stem}qzeros beside {what}, found none; fetch the shards again")
    _check_dtype(zeros, ("I32",))
    _check_shape(zeros, (scales.shape[0], -(-outputs * bits // _WORD)))
    parts = [Part.of("zero points less one" if form == "gptq" else "zero points", zeros)]
    if (groups := tensors.get(f"{stem}g_idx")) is not None:
        _check_dtype(groups, ("I32", "I64"))
        _check_shape(groups, (inputs,))
        parts.append(Part.of("groups", groups))
    return _scales(scales, (1, size), f"int{bits}", parts, "inputs" if gptq else "outputs")


def _integer_schemes(config: Mapping[str, Any]) -> list[tuple[int, int | None, bool]]:
    """Returns bits, size of groups (None for rows) and symmetry of each way that integers are stored."""
    found: list[tuple[int, int | None, bool]] = []
    for weights in _groups(config):
        bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
        if weights.get("type") != "int" or type(bits) is not int or not _FEWEST_BITS <= bits <= _MOST_BITS:
            continue
        if strategy == "channel" or (strategy is None and size in (None, -1)):
            found.append((bits, None, weights.get("symmetric") is not False))
        elif strategy in ("group", None) and type(size) is int and size > 0:
            found.append((bits, size, weights.get("symmetric") is not False))
    return found


def _groups(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Returns what each of the ``config_groups`` says of weights."""
    groups = config.get("config_groups")
    weights = (
        [each.get("weights") for each in groups.values() if isinstance(each, Mapping)]
        if isinstance(groups, Mapping)
        else []
    )
    return [each for each in weights if isinstance(each, Mapping)]


def _fp4(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Returns the scales of FP4 codes, two in a byte: MXFP4 has powers of two for 32, NVFP4 two numbers for 16."""
    what, stem = "FP4 codes", codes.name.removesuffix("_packed")
    scales = _only_scales(codes, tensors, what)
    if codes.name.endswith("_blocks"):
        methods: tuple[str, ...] = ("mxfp4",)
    elif codes.name.endswith("_packed"):
        methods = ("compressed-tensors",)
    else:
        methods = ("fp8",) if codes.dtype == "I8" else ("modelopt", "quark")
    _check_method(config, what, methods)
    if f"{stem}_zero_point" in tensors:
        raise ArchitectureError(f"expected no {stem}_zero_point beside {what}; {_WAY_OUT}")
    if any(f"{codes.name.rpartition('.')[0]}.{part}" in tensors for part in ("svdquant_lora_a", "svdquant_lora_b")):
        raise ArchitectureError(f"a side branch (svdquant_lora) adds to what it writes; {_WAY_OUT}")
    batch = _leading(codes.shape)
    cols = 2 * math.prod(codes.shape[len(batch) :])
    second = {"multiplier": tensors.get(f"{stem}_scale_2"), "divisor": tensors.get(f"{stem}_global_scale")}
    parts = [Part.of(role, tensor) for role, tensor in second.items() if tensor is not None]  # type: ignore[arg-type]
    if scales.dtype != "F8_E4M3":
        _check_dtype(scales, _POWERS)
        if parts:
            raise ArchitectureError(f"expected no {parts[0].name} beside powers of two as {scales.name}; {_WAY_OUT}")
        size = 32
    elif len(parts) != 1:
        found = " and ".join(part.name for part in parts) or "none"
        raise ArchitectureError(
            f"expected one of {stem}_scale_2 and {stem}_global_scale beside {scales.name}, found {found}; fetch the "
            f"shards that hold it, or {_WAY_OUT}"
        )
    else:
        size = 16
        _check_dtype(parts[0].tensor, ("F32",))
        _check_shape(parts[0].tensor, batch[:-1], (*batch[:-1], 1), *(() if batch[:-1] else ((),)))
    _check_shape(scales, (*batch, -(-cols // size)))
    stated = [each for each in _groups(config) if each.get("num_bits") == 4 and each.get("type") == "float"]
    if _groups(config) and not any(each.get("group_size") in (size, None) for each in stated):
        raise ArchitectureError(
            f"expected config_groups to have floats of 4 bits in groups of {size} for {scales.name} of "
            f"{list(scales.shape)}, found none; restore the config.json that came with the shards, or {_WAY_OUT}"
        )
    return _scales(scales, (1, size), "E2M1", parts)


# ---------------------------------------------------------------------------------------- blocks of FP8


def _said_block(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Returns the size of blocks that the configuration states, None where it states none."""
    groups = [each for each in _groups(config) if each.get("type", "float") == "float" and each.get("num_bits", 8) == 8]
    said = [config.get("weight_block_size"), *(each.get("block_structure") for each in groups)]
    said += [[1, each["group_size"]] for each in groups if each.get("group_size") and each.get("strategy") == "group"]
    stated = [each for each in said if each is not None]
    for each in stated:
        sizes = each if isinstance(each, list) else []
        if len(sizes) != 2 or any(type(size) is not int or size < 1 for size in sizes) or each != stated[0]:
            raise ArchitectureError(
                f"quantization_config: expected one size of blocks, two positive integers, found {stated}; restore it"
            )
    if not stated and str(config.get("quant_algo")).upper() == "MXFP8":
        return 1, 32
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
