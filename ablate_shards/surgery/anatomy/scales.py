"""Finds what the codes of a quantised weight mean: its scales and other parts, and how far each scale reaches."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.bitsandbytes import find_bytes, find_line
from ablate_shards.surgery.anatomy.coded import (
    POWERS,
    WAY_OUT,
    WORD,
    Order,
    Part,
    Role,
    Scales,
    check_dtype,
    check_shape,
    leading_of,
    only_scales,
    part_beside,
    scales_of,
)
from ablate_shards.surgery.anatomy.mlx import find_mlx, is_mlx
from ablate_shards.surgery.checkpoint.checkpoint import text_part
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = [
    "Part",
    "Scales",
    "ending_of",
    "find_scales",
    "is_beside_codes",
    "is_codes",
    "method_of",
    "names_of_activations",
    "names_of_scales",
    "plain_name_of",
    "quantisation_of",
]

#: The last is that of MLX.
_KEYS = ("quantization_config", "quantization")
_DTYPES = ("F32", "BF16", "F16", *POWERS)
#: Of a module, after ``weight``; the last stands in its place.
_ENDINGS = ("_scale_inv", "_scale")
#: How names of codes end that are no plain weights, by dtype.
_CODES = {
    ".weight": ("F8_E4M3", "U8", "I8", "U32"),
    ".weight_packed": ("I32", "U8"),
    ".qweight": ("I32",),
    "_blocks": ("U8",),
}
#: What may stand beside codes that are called so, by what follows the module's name.
_SCALES = ("weight_scale_inv", "weight_scale", "scale", "scale_inv")
#: What Mistral publishes beside FP8 codes, one number; its params.json, which is no config.json, says that it does.
_MISTRAL = "qscale_weight"
_BITSANDBYTES = (
    *("weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
    *("weight.quant_state.bitsandbytes__nf4", "weight.quant_state.bitsandbytes__fp4", "SCB", "weight_format"),
)
_MLX = ("scales", "biases", "global_scale")
_BESIDE = {
    ".weight": (*_SCALES, _MISTRAL, "weight_scale_2", "weight_zero_point", *_BITSANDBYTES),
    "": _SCALES,
    ".weight_packed": ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale"),
    ".qweight": ("scales", "qzeros", "g_idx"),
    "_blocks": ("scales",),
}
#: What activations are multiplied by at run time, which does not touch the weight.
_ACTIVATIONS = frozenset({"input_scale", "activation_scale", "qscale_act", "input_global_scale", "input_zero_point"})
_FEWEST_BITS, _MOST_BITS = 2, 8
_FP8_METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "quark")
#: By method, where the configuration says how exactly integers are stored, and how that is: the first is the usual.
#: auto-round stores them in the forms of others.
_GPTQ: tuple[Order, Role] = ("inputs", "zero points less one")
_GPTQ_V2: tuple[Order, Role] = ("inputs", "zero points")
_AWQ: tuple[Order, Role] = ("outputs", "zero points")
_TRANSPOSED: Mapping[str, tuple[str, Mapping[str, tuple[Order, Role]]]] = {
    "gptq": ("checkpoint_format", {"gptq": _GPTQ, "gptq_v2": _GPTQ_V2}),
    "awq": ("version", {"gemm": _AWQ}),
    "auto-round": (
        "packing_format",
        {
            "auto_round:auto_gptq": _GPTQ,
            "auto_round:gptqmodel": _GPTQ_V2,
            "auto_round": _GPTQ_V2,
            "auto_round:auto_awq": _AWQ,
        },
    ),
}


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


def is_beside_codes(rest: str, codes: TensorInfo | None = None) -> bool:
    """Tells whether a part of a module is no part of a weight but says what its codes mean.

    Args:
        rest: How its name ends, after the module's.
        codes: The codes; None for any.
    """
    if codes is None:
        named: tuple[str, ...] = (*itertools.chain.from_iterable(_BESIDE.values()), *_MLX)
    else:
        named = _MLX if codes.dtype == "U32" else _BESIDE[ending_of(codes.name)]
    return rest.lstrip("._") in {*named, *_ACTIVATIONS}


def find_scales(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any, rows: int | None = None) -> Scales:
    """Finds the scales of a quantised weight by name and checks them, and what else belongs to it.

    Args:
        codes: The weight.
        tensors: What the checkpoint holds.
        config: The ``quantization_config`` of its config.json, None where there is none.
        rows: Rows of the weight, for codes whose shape does not say it (of bitsandbytes).

    Raises:
        ArchitectureError: There are none or two, or they do not fit; the message does not name the weight.
    """
    if codes.name.endswith(".weight_packed") and codes.dtype == "I32":
        return _packed_integers(codes, tensors, config)
    if codes.name.endswith(".qweight"):
        return _transposed_integers(codes, tensors, config)
    if codes.dtype == "U32":
        return find_mlx(codes, tensors, config)
    if codes.dtype == "U8" and (f"{codes.name}.absmax" in tensors or method_of(config) == "bitsandbytes"):
        return find_line(codes, tensors, config, rows)
    if codes.dtype == "I8" and (
        f"{codes.name.removesuffix('weight')}SCB" in tensors or method_of(config) == "bitsandbytes"
    ):
        return find_bytes(codes, tensors, config)
    if codes.dtype == "I8" and method_of(config) == "compressed-tensors":
        return _bytes_of_integers(codes, tensors, config)
    if codes.dtype in ("U8", "I8"):
        return _fp4(codes, tensors, config)
    if f"{codes.name}_zero_point" in tensors:
        raise ArchitectureError(f"expected no {codes.name}_zero_point beside FP8 codes; {WAY_OUT}")
    scales = only_scales(names_of_scales(codes.name), tensors, "FP8 codes")
    check_dtype(scales, _DTYPES)
    if config is None and scales.name.endswith(_MISTRAL):
        return scales_of(scales, _block_of(scales.name, scales.shape, codes.shape, None))
    _check_method(config, "FP8 codes", _FP8_METHODS)
    return scales_of(scales, _block_of(scales.name, scales.shape, codes.shape, _said_block(config)))


def names_of_scales(codes: str) -> list[str]:
    """Returns the names that the scales of a weight of codes may have."""
    if codes.endswith("_blocks"):
        return [f"{codes.removesuffix('_blocks')}_scales"]
    if codes.endswith(".weight_packed"):
        return [f"{codes.removesuffix('_packed')}_scale"]
    if codes.endswith(".qweight"):
        return [f"{codes.removesuffix('qweight')}scales"]
    names = [codes + ending for ending in _ENDINGS]
    module = codes.removesuffix("weight")
    return [*names, f"{module}scale", f"{module}{_MISTRAL}"] if codes.endswith(".weight") else names


def names_of_activations(module: str) -> list[str]:
    """Returns the names that what a module's activations are multiplied by may have."""
    return [f"{module}{joint}{name}" for name in sorted(_ACTIVATIONS) for joint in "._"]


def quantisation_of(config: Mapping[str, Any] | None) -> Any:
    """Returns the ``quantization_config`` of a config.json, or of MLX ``quantization``.

    That of the decoder's own part is taken before that of the rest.
    """
    whole = config or {}
    part = text_part(whole)
    places = (whole,) if part is None else (part[1], whole)
    return next((place[key] for key in _KEYS for place in places if place.get(key) is not None), None)


def method_of(config: Any) -> str | None:
    """Returns the ``quant_method`` of a configuration of quantised weights; ``mlx`` of MLX, which states none."""
    if is_mlx(config):
        return "mlx"
    return config.get("quant_method") if isinstance(config, Mapping) else None


def _check_method(config: Any, what: str, methods: Sequence[str]) -> None:
    if not isinstance(config, Mapping):
        raise ArchitectureError(
            f"holds {what}, but config.json has no quantization_config to say how they are read; restore the "
            f"config.json that came with the shards, or {WAY_OUT}"
        )
    if (method := config.get("quant_method")) not in methods:
        raise ArchitectureError(f"expected {', '.join(methods)} as quant_method of {what}, found {method!r}; {WAY_OUT}")
    if config.get("transform_config"):
        raise ArchitectureError(f"its values are rotated (transform_config), which is not undone here; {WAY_OUT}")


# ---------------------------------------------------------------------------------------- four bits and fewer


def _packed_integers(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Returns the scales of integers that compressed-tensors packed into words of 32 bits."""
    what, stem = "packed integers", codes.name.removesuffix("_packed")
    _check_method(config, what, ("compressed-tensors",))
    scales = only_scales(names_of_scales(codes.name), tensors, what)
    check_dtype(scales, ("F32", "BF16", "F16"))
    batch, words = leading_of(codes.shape), codes.shape[-1]
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
            f"are, found {found or 'none that fits'}; restore the config.json that came with the shards, or {WAY_OUT}"
        )
    bits, size, symmetric = fitting.pop()
    shape = part_beside(f"{stem}_shape", tensors, what)
    check_dtype(shape, ("I64", "I32"))
    check_shape(shape, (len(codes.shape),))
    parts = [Part.of("shape", shape)]
    zeros = tensors.get(f"{stem}_zero_point")
    if (zeros is None) != symmetric:
        said = "symmetric" if symmetric else "not symmetric"
        have = "none" if zeros is None else zeros.name
        raise ArchitectureError(
            f"config.json says that its integers are {said}, but its zero points are {have}; restore the config.json "
            f"that came with the shards, or {WAY_OUT}"
        )
    if zeros is not None:
        check_dtype(zeros, ("I32",))
        check_shape(zeros, (*batch[:-1], -(-batch[-1] * bits // 32), scales.shape[-1]))
        parts.append(Part.of("zero points", zeros))
    if (groups := tensors.get(f"{stem}_g_idx")) is not None:
        check_dtype(groups, ("I32", "I64"))
        parts.append(Part.of("groups", groups))
    return scales_of(scales, (1, size or words * 32 // bits), f"int{bits}", parts)


def _bytes_of_integers(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Returns the scales of integers that compressed-tensors stores as bytes (``int-quantized``)."""
    what = "integers of 8 bits"
    _check_method(config, what, ("compressed-tensors",))
    scales = only_scales(names_of_scales(codes.name), tensors, what)
    check_dtype(scales, ("F32", "BF16", "F16"))
    zeros = tensors.get(f"{codes.name}_zero_point")
    stated = [each for each in _groups(config) if each.get("num_bits") == 8 and each.get("type") == "int"]
    if not any((each.get("symmetric") is False) == (zeros is not None) for each in stated):
        how = "symmetric" if zeros is None else "not symmetric"
        raise ArchitectureError(
            f"expected one group of config_groups to have integers of 8 bits that are {how}, found none; restore the "
            f"config.json that came with the shards, or {WAY_OUT}"
        )
    parts = []
    if zeros is not None:
        check_dtype(zeros, ("I8",))
        check_shape(zeros, scales.shape)
        parts.append(Part.of("zero points", zeros))
    rows, cols = codes.shape[-2:]
    sizes = [size for bits, size, _ in _integer_schemes(config) if bits == 8 and size is not None]
    said = next((size for size in sizes if scales.shape == (*codes.shape[:-2], rows, -(-cols // size))), None)
    block = _block_of(scales.name, scales.shape, codes.shape, None if said is None else (1, said))
    return scales_of(scales, block, "signed8", parts)


def _transposed_integers(codes: TensorInfo, tensors: Mapping[str, TensorInfo], config: Any) -> Scales:
    """Returns the scales of integers as GPTQ and AWQ store them: ``[inputs, outputs]``, several in a word."""
    what, stem = "integers of GPTQ or AWQ", codes.name.removesuffix("qweight")
    _check_method(config, what, tuple(_TRANSPOSED))
    key, known = _TRANSPOSED[config["quant_method"]]
    form = str(config.get(key, next(iter(known)))).lower()
    if form not in known:
        raise ArchitectureError(f"expected {' or '.join(known)} as {key} of {what}, found {form!r}; {WAY_OUT}")
    order, role = known[form]
    gptq = order == "inputs"
    own = (config.get("extra_config") or {}).get(stem.removesuffix("."))
    config = {**config, **own} if isinstance(own, Mapping) else config
    bits, size = config.get("bits", config.get("w_bit")), config.get("group_size", config.get("q_group_size"))
    if bits not in ((2, 3, 4, 8) if gptq else (4,)) or type(size) is not int or not (size > 0 or size == -1):
        raise ArchitectureError(
            f"quantization_config: expected bits of {what} and their group_size, found {bits} and {size}; restore the "
            f"config.json that came with the shards, or {WAY_OUT}"
        )
    if len(codes.shape) != 2:
        raise ArchitectureError(f"expected {what} in two dimensions, found {list(codes.shape)}; {WAY_OUT}")
    down, across = codes.shape
    inputs, outputs = (down * WORD // bits, across) if gptq else (down, across * WORD // bits)
    scales = only_scales(names_of_scales(codes.name), tensors, what)
    check_dtype(scales, ("F16", "BF16", "F32"))
    size = inputs if size == -1 else size
    check_shape(scales, (-(-inputs // size), outputs))
    zeros = part_beside(f"{stem}qzeros", tensors, what)
    check_dtype(zeros, ("I32",))
    check_shape(zeros, (scales.shape[0], -(-outputs * bits // WORD)))
    parts = [Part.of(role, zeros)]
    if (groups := tensors.get(f"{stem}g_idx")) is not None:
        check_dtype(groups, ("I32", "I64"))
        check_shape(groups, (inputs,))
        parts.append(Part.of("groups", groups))
    return scales_of(scales, (1, size), f"int{bits}", parts, order)


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
    scales = only_scales(names_of_scales(codes.name), tensors, what)
    if codes.name.endswith("_blocks"):
        methods: tuple[str, ...] = ("mxfp4",)
    elif codes.name.endswith("_packed"):
        methods = ("compressed-tensors",)
    else:
        methods = ("fp8",) if codes.dtype == "I8" else ("modelopt", "quark")
    _check_method(config, what, methods)
    if f"{stem}_zero_point" in tensors:
        raise ArchitectureError(f"expected no {stem}_zero_point beside {what}; {WAY_OUT}")
    if any(f"{codes.name.rpartition('.')[0]}.{part}" in tensors for part in ("svdquant_lora_a", "svdquant_lora_b")):
        raise ArchitectureError(f"a side branch (svdquant_lora) adds to what it writes; {WAY_OUT}")
    batch = leading_of(codes.shape)
    cols = 2 * math.prod(codes.shape[len(batch) :])
    second = {"multiplier": tensors.get(f"{stem}_scale_2"), "divisor": tensors.get(f"{stem}_global_scale")}
    parts = [Part.of(role, tensor) for role, tensor in second.items() if tensor is not None]  # type: ignore[arg-type]
    if scales.dtype != "F8_E4M3":
        check_dtype(scales, POWERS)
        if parts:
            raise ArchitectureError(f"expected no {parts[0].name} beside powers of two as {scales.name}; {WAY_OUT}")
        size = 32
    elif len(parts) != 1:
        found = " and ".join(part.name for part in parts) or "none"
        raise ArchitectureError(
            f"expected one of {stem}_scale_2 and {stem}_global_scale beside {scales.name}, found {found}; fetch the "
            f"shards that hold it, or {WAY_OUT}"
        )
    else:
        size = 16
        check_dtype(parts[0], ("F32",))
        check_shape(parts[0], batch[:-1], (*batch[:-1], 1), *(() if batch[:-1] else ((),)))
    check_shape(scales, (*batch, -(-cols // size)))
    stated = [each for each in _groups(config) if each.get("num_bits") == 4 and each.get("type") == "float"]
    if _groups(config) and not any(each.get("group_size") in (size, None) for each in stated):
        raise ArchitectureError(
            f"expected config_groups to have floats of 4 bits in groups of {size} for {scales.name} of "
            f"{list(scales.shape)}, found none; restore the config.json that came with the shards, or {WAY_OUT}"
        )
    return scales_of(scales, (1, size), "E2M1", parts)


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
    if not stated and "MXFP8" in (str(config.get(key)).upper() for key in ("quant_algo", "quant_method")):
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
        f"and {blocks}; restore the config.json that came with the shards, or {WAY_OUT}"
    )
