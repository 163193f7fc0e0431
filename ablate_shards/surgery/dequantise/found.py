"""Finds the quantised weights of a checkpoint, what they become, and which of them engines load in one way only."""

import functools
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from ablate_shards.errors import ArchitectureError, UsageError
from ablate_shards.surgery.anatomy.scales import (
    Scales,
    ending_of,
    is_codes,
    method_of,
    names_of_activations,
    plain_name_of,
    quantisation_of,
)
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_range
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.dequantise.decoding import CodedWeight, read_scales

__all__ = [
    "DequantisedRecord",
    "QuantisedWeight",
    "find_quantised",
    "left_without_weights",
    "modules_and_experts",
    "names_of_codes",
    "with_their_experts",
]

_METHODS = (
    *("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors", "modelopt", "mxfp4", "quark"),
    *("gptq", "awq", "auto-round", "bitsandbytes", "mlx"),
)
#: Dimensions of a matrix; codes with more are those of a stack of experts.
_MATRIX = 2
_WAY_OUT = "dequantise it with the library that wrote it"
_EXPERTS = re.compile(r"(?P<experts>.*\.experts)[._]")
#: What says how a cache of keys and values is quantised.
_CACHE = ("k_scale", "v_scale", "q_scale", "kv_scale", "output_scale")
#: What only quantised weights are stored in, or parts of them are called.
_CODED_DTYPES = frozenset({"U8", "I8", "U16", "U32", "F4", "F6_E2M3", "F6_E3M2", "F8_E4M3", "F8_E5M2", "F8_E8M0"})
_CODED_PARTS = ("qweight", "qzeros", "g_idx", "weight_g_idx", "absmax", "quant_map", "SCB", "weight_packed")


@dataclass(frozen=True, slots=True)
class DequantisedRecord:
    """What a receipt says of a weight that was dequantised.

    Attributes:
        name: The tensor that it is now.
        shape: Its shape.
        stored_as: How its codes were stored, in words.
        parts: The tensors that it is made of, its codes first.
    """

    name: str
    shape: tuple[int, ...]
    stored_as: str
    parts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight that is stored as codes, and what it is in bfloat16.

    Attributes:
        codes: The tensor of its codes.
        scales: Their scales, and what else belongs to them.
        parts: The tensors that it is made of, its codes first, and those that only matter to quantised activations.
        name: The tensor that it becomes, in the same shard.
        shape: Its shape there.
        transposed: Whether that has rows and columns of each matrix swapped.
    """

    codes: TensorInfo
    scales: Scales
    parts: tuple[str, ...]
    name: str
    shape: tuple[int, ...]
    transposed: bool

    @property
    def record(self) -> DequantisedRecord:
        """What a receipt says of it."""
        return DequantisedRecord(self.name, self.shape, self.scales.form(self.codes.shape), self.parts)


def find_quantised(checkpoint: Checkpoint, names: Collection[str] | None = None) -> list[QuantisedWeight]:
    """Returns quantised weights, in the order of the checkpoint's tensors; of packed ones the shape has been read.

    Args:
        checkpoint: The source.
        names: The tensors of their codes; all if None.

    Raises:
        ArchitectureError: One of them is in a format that is not decoded here, or its parts do not fit.
        ExecuteError: A part says another shape than the codes have.
    """
    config = quantisation_of(checkpoint.config)
    method = method_of(config)
    if config is not None and method not in _METHODS:
        raise ArchitectureError(
            f"{checkpoint.name}: expected {', '.join(_METHODS)} as quant_method, found {method!r}, which is not "
            f"decoded here; {_WAY_OUT}"
        )
    found = []
    for tensor in checkpoint.tensors.values():
        if is_codes(tensor, ending_of(tensor.name)) and (names is None or tensor.name in names):
            try:
                scales = read_scales(tensor, checkpoint.tensors, config, functools.partial(read_range, checkpoint))
            except ArchitectureError as error:
                raise ArchitectureError(f"{tensor.name}: {error}") from error
            found.append(_quantised(checkpoint, tensor, scales))
    return found


def _quantised(checkpoint: Checkpoint, codes: TensorInfo, scales: Scales) -> QuantisedWeight:
    columns = CodedWeight(codes, scales, functools.partial(read_range, checkpoint), _WAY_OUT).columns()
    *stack, rows = scales.leading(codes.shape)
    # As transformers keeps what gpt-oss publishes in blocks.
    transposed = codes.name.endswith("_blocks")
    name = plain_name_of(codes.name)
    if name != codes.name and name in checkpoint.tensors:
        raise ArchitectureError(f"{codes.name}: {name} lies beside it; remove the one that is not of this model")
    parts = [codes.name, scales.name, *(part.name for part in scales.parts)]
    parts += [each for each in names_of_activations(_module_of(codes.name)) if each in checkpoint.tensors]
    shape = (*stack, columns, rows) if transposed else (*stack, rows, columns)
    return QuantisedWeight(codes, scales, tuple(parts), name, shape, transposed)


def left_without_weights(checkpoint: Checkpoint, weights: Iterable[QuantisedWeight]) -> list[str]:
    """Returns what means nothing once no weight is quantised: how a cache is quantised.

    Raises:
        ArchitectureError: A tensor is left that belongs to a quantised weight of another format.
    """
    parts = {name for weight in weights for name in weight.parts}
    rest = [tensor for tensor in checkpoint.tensors.values() if tensor.name not in parts]
    for tensor in rest:
        if tensor.dtype in _CODED_DTYPES or tensor.name.endswith(tuple(f".{part}" for part in _CODED_PARTS)):
            raise ArchitectureError(
                f"{tensor.name}: {tensor.dtype} of {list(tensor.shape)} is part of a format that is not decoded here; "
                f"{_WAY_OUT}"
            )
    return [tensor.name for tensor in rest if tensor.name.rpartition(".")[2] in _CACHE]


def _module_of(codes: str) -> str:
    """Returns the module that a tensor of codes belongs to."""
    return codes.removesuffix(ending_of(codes))


def _experts_of(codes: TensorInfo) -> str | None:
    """Returns the module of all routed experts that a weight is of, None where it is of none.

    Engines have one way of loading for all the experts of a layer. A stack of MLX is a module of its own, quantised or
    not.
    """
    if codes.dtype == "U32" and len(codes.shape) > _MATRIX:
        return None
    if (match := _EXPERTS.match(codes.name)) is not None:
        return match["experts"]
    return _module_of(codes.name).rpartition(".")[0] if len(codes.shape) > _MATRIX else None


def names_of_codes(checkpoint: Checkpoint) -> set[str]:
    """Returns the tensors that hold codes, in whatever format."""
    return {tensor.name for tensor in checkpoint.tensors.values() if is_codes(tensor, ending_of(tensor.name))}


def with_their_experts(checkpoint: Checkpoint, names: Collection[str]) -> set[str]:
    """Returns tensors of codes, and with those of routed experts all that the layer's experts have.

    Raises:
        UsageError: One of them holds no codes.
    """
    chosen = set()
    for name in names:
        tensor = checkpoint.tensors.get(name)
        if tensor is None or not is_codes(tensor, ending_of(name)):
            raise UsageError(f"{name}: holds no codes, so there is nothing to dequantise")
        chosen.add(name)
    experts = {_experts_of(checkpoint.tensors[name]) for name in chosen} - {None}
    if experts:
        every = names_of_codes(checkpoint)
        chosen |= {name for name in every if _experts_of(checkpoint.tensors[name]) in experts}
    return chosen


def modules_and_experts(weights: Sequence[QuantisedWeight], *, together: bool) -> tuple[list[str], list[str]]:
    """Returns the modules of weights that stand alone, and those of routed experts, each once.

    Args:
        weights: The weights.
        together: Whether a layer's experts are called by one name; else each weight stands alone.
    """
    experts = [_experts_of(weight.codes) if together else None for weight in weights]
    alone = [_module_of(weight.codes.name) for weight, among in zip(weights, experts, strict=True) if among is None]
    return alone, list(dict.fromkeys(module for module in experts if module is not None))
