"""What describes a kind of writer, and the tensors that it describes sorted into writers and what cannot be edited."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.bitsandbytes import state_of
from ablate_shards.surgery.anatomy.families import Axis, Component, Part
from ablate_shards.surgery.anatomy.gains import factors_of
from ablate_shards.surgery.anatomy.scales import Scales, find_scales, is_beside_codes, is_codes
from ablate_shards.surgery.anatomy.writers import LeftOut, Writer
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["NONE", "OR", "Hit", "Rule", "read_gain", "sort_out"]

_EDITABLE = frozenset({"BF16", "F16", "F32"})
#: The residual axis of ``[..., n, d]``.
_LAST = -1
#: Between the names that a gain may have, and that of none.
OR, NONE = " | ", "none"


class Rule(NamedTuple):
    """One kind of writer, as a line of the table or a target describes it.

    Attributes:
        pattern: What the whole name of a tensor must match.
        component: What it belongs to.
        axis: Along which axis it writes; ``either`` where its shape tells.
        gain: What its post-norm gain may be (see ``gains.py``), between :data:`OR`, the pattern's groups in braces.
        gain_offset: What is added to the gain.
        fused: Whether it stacks matrices; None where it may.
        unless: The module that reads its output, where there is one.
        part: The part of the component, where the description says so.
    """

    pattern: re.Pattern[str]
    component: Component
    axis: Axis | Literal["either"]
    gain: str = ""
    gain_offset: float = 0.0
    fused: bool | None = None
    unless: str = ""
    part: Part | None = None


class Hit(NamedTuple):
    """A tensor that a rule describes; its rest is what follows the module's name."""

    name: str
    stem: str
    rest: str
    rule: Rule
    groups: Mapping[str, str]
    layer: int | None
    mtp: bool


def read_gain(gain: str) -> tuple[str, float]:
    """Returns the names of a gain, and what is added to its weight."""
    name = gain.removeprefix("1 +").strip()
    return name, 1.0 if name != gain.strip() else 0.0


def sort_out(
    hits: Iterable[Hit], tensors: Mapping[str, TensorInfo], hidden: int, quantisation: Any
) -> tuple[tuple[Writer, ...], list[LeftOut]]:
    """Returns the writers among the tensors that rules describe, by layer, and what is among them and cannot be edited.

    Args:
        hits: Those tensors.
        tensors: What the checkpoint holds.
        hidden: Length of the residual axis.
        quantisation: The ``quantization_config`` of its config.json, None where there is none.

    Raises:
        ArchitectureError: One does not have the shape that its rule says.
    """
    modules: dict[str, list[Hit]] = {}
    for hit in hits:
        modules.setdefault(hit.stem, []).append(hit)
    writers: list[Writer] = []
    left_out: list[LeftOut] = []
    for parts in modules.values():
        rule = parts[0].rule
        if rule.unless and (reader := rule.unless.format_map(parts[0].groups)) in modules:
            why = f"read by {reader}, not added to the stream"
            left_out += [LeftOut(hit.name, hit.layer, rule.component, why) for hit in parts]
            continue
        biases = [hit for hit in parts if hit.rest in (".bias", "_bias")]
        others = [hit for hit in parts if hit not in biases]
        weights, scales, blocked = _weights_among(others, tensors, hidden, quantisation)
        if blocked is not None:
            left_out.append(blocked)
        writers += [_writer(hit, tensors, hidden, scales) for hit in weights]
        writers += [_writer(hit, tensors, hidden) for hit in biases]
    writers.sort(key=lambda writer: (writer.mtp, -1 if writer.layer is None else writer.layer))
    return tuple(writers), left_out


def _weights_among(
    parts: Sequence[Hit], tensors: Mapping[str, TensorInfo], hidden: int, quantisation: Any
) -> tuple[Sequence[Hit], Scales | None, LeftOut | None]:
    """Returns a module's weights and the scales of their codes, or why there are none that can be edited."""
    codes = next((hit for hit in parts if is_codes(tensors[hit.name], hit.rest)), None)
    if codes is None or not all(hit is codes or is_beside_codes(hit.rest, tensors[codes.name]) for hit in parts):
        blocked = _blocked(parts, tensors)
        return ([] if blocked else parts), None, blocked
    try:
        # The shape of codes in one line does not say how many rows such a weight has.
        if _axis_of_codes(codes, tensors, hidden) == _LAST and state_of(tensors[codes.name], tensors) is not None:
            why = (
                "four bits of bitsandbytes are edited as [..., hidden, inputs] only; "
                "add --dequantise all to edit it in bfloat16"
            )
            return [], None, _left_out(codes, why)
        return [codes], find_scales(tensors[codes.name], tensors, quantisation, hidden), None
    except ArchitectureError as error:
        return [], None, _left_out(codes, str(error))


def _blocked(parts: Sequence[Hit], tensors: Mapping[str, TensorInfo]) -> LeftOut | None:
    """Returns why a module's parts are not a plain weight, named by the largest; None if they are one."""
    if not parts:
        return None
    chief = max(parts, key=lambda hit: tensors[hit.name].end - tensors[hit.name].start)
    odd = next((hit for hit in (chief, *parts) if hit.rest not in (".weight", "")), None)
    if (dtype := tensors[chief.name].dtype) not in _EDITABLE:
        plain = dtype == "F64" or (dtype == "F8_E5M2" and len(parts) == 1)  # numbers as they are, without scales
        way = "convert" if plain else "dequantise"
        why = f"expected BF16, F16 or F32, found {dtype}; {way} the checkpoint to one of them first"
    elif odd is not None:
        what = odd.rest.lstrip("._")
        why = f"expected a plain weight, found {what}; merge the adapter or dequantise the checkpoint first"
    else:
        return None
    return _left_out(chief, why)


def _left_out(hit: Hit, why: str) -> LeftOut:
    return LeftOut(hit.name, hit.layer, hit.rule.component, why, blocked=True, mtp=hit.mtp, part=hit.rule.part)


def _writer(hit: Hit, tensors: Mapping[str, TensorInfo], hidden: int, scales: Scales | None = None) -> Writer:
    tensor, rule = tensors[hit.name], _oriented(hit, tensors, hidden)
    bias = hit.rest in (".bias", "_bias")
    axis = _LAST if rule.axis != "out" or bias else -2
    shape = tensor.shape
    if scales is not None:
        axis = _axis_of_codes(hit, tensors, hidden)
        shape = (*scales.leading(shape), hidden if axis == _LAST and scales.holds(tensor, hidden) else 1)
    stacked = (2, 3) if rule.fused is None else (3,) if rule.fused else (2,)
    ranks = tuple(rank - 1 if bias else rank for rank in stacked)
    if len(shape) not in ranks:
        wanted = " or ".join(str(rank) for rank in ranks)
        raise ArchitectureError(
            f"{hit.name}: expected {wanted} {'dimension' if ranks == (1,) else 'dimensions'}, found "
            f"{list(tensor.shape)}; the checkpoint is not what its names and config.json say"
        )
    if shape[axis] != hidden:
        raise ArchitectureError(
            f"{hit.name}: expected the hidden size {hidden} on axis {axis}, found {list(tensor.shape)}; "
            "the checkpoint is not what its names and config.json say, or the axis of a target is wrong"
        )
    gain = _gain_of(hit, tensors, hidden) if rule.gain else None
    kind: Literal["weight", "bias"] = "bias" if bias else "weight"
    offset = 0.0 if gain is None else rule.gain_offset
    return Writer(hit.name, hit.layer, rule.component, axis, kind, gain, offset, hit.mtp, scales, rule.part)


def _axis_of_codes(hit: Hit, tensors: Mapping[str, TensorInfo], hidden: int) -> int:
    """Returns the residual axis of a weight of codes."""
    # Blocks are [experts, out, in] whatever the weight is, and what GPTQ and AWQ store is its transpose.
    if hit.rest in ("_blocks", ".qweight") or _oriented(hit, tensors, hidden).axis == "out":
        return -2
    return _LAST


def _oriented(hit: Hit, tensors: Mapping[str, TensorInfo], hidden: int) -> Rule:
    """Returns the rule with the axis along which experts are stored, where the architecture has them in either way.

    ``[E, d, n]`` and ``[E, n, d]`` differ unless n is d, and then the experts' first matrix, which has 2 n, tells. In
    MLX a stack is a module of its own, whose weight is ``[E, d, n]``.
    """
    if hit.rule.fused and hit.rest == ".weight" and hit.stem.endswith(".down_proj"):
        return hit.rule._replace(axis="out")
    if hit.rule.axis != "either":
        return hit.rule
    shape = tensors[hit.name].shape[-2:]
    first = tensors.get(hit.name.replace("down_proj", "gate_up_proj"))
    if shape == (hidden, hidden) and first is not None:
        shape = (first.shape[-1], first.shape[-2])
    if hidden not in shape or shape[0] == shape[-1]:
        raise ArchitectureError(
            f"{hit.name}: expected the hidden size {hidden} on one of the last two axes, found "
            f"{list(tensors[hit.name].shape)}; describe every writer with [[ablate.target]] in a recipe"
        )
    return hit.rule._replace(axis="out" if shape[0] == hidden else "in")


def _gain_of(hit: Hit, tensors: Mapping[str, TensorInfo], hidden: int) -> str | None:
    if strange := set(re.findall(r"\{(.*?)\}", hit.rule.gain)) - set(hit.groups):
        known = ", ".join(f"{{{group}}}" for group in hit.groups) or "none"
        raise ArchitectureError(
            f"gain {hit.rule.gain!r} of {hit.name}: expected groups of its pattern ({known}), found {{{min(strange)}}}"
        )
    gains = re.sub(r"\{(.*?)\}", lambda brace: hit.groups[brace[1]], hit.rule.gain).split(OR)
    gain = next((gain for gain in gains if gain == NONE or tensors.keys() >= {*factors_of(gain)}), gains[0])
    if gain == NONE:
        return None
    for name in factors_of(gain):
        if name not in tensors:
            raise ArchitectureError(f"{hit.name}: its output passes through {name}, which the checkpoint does not hold")
        if tensors[name].shape != (hidden,):
            raise ArchitectureError(
                f"{name}: expected [{hidden}], the gain of {hit.name}, found {list(tensors[name].shape)}"
            )
    return gain
