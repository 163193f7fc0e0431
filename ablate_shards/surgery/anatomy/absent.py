"""Tells a layer that has no attention or no MLP by design from one whose tensors are missing."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from ablate_shards.surgery.anatomy.families import Component

__all__ = ["PARTS", "Absent", "Stated", "counted_by", "missing_beside", "stated_by"]

#: The parts of a layer.
PARTS: tuple[Component, ...] = ("attention", "mlp")

_TYPES = ("layers_block_type", "layer_types", "block_types")
_PATTERN = "hybrid_override_pattern"
_BLOCKS = "block_configs"
_OF_BLOCKS: Mapping[Component, tuple[str, ...]] = {"attention": ("attention",), "mlp": ("ffn", "mlp")}
_MLP_TYPES = frozenset({"mlp", "moe", "ffn", "feed_forward"})
_MLP_MARKS = frozenset("-E")
_MARKS = frozenset("M*") | _MLP_MARKS
#: Keys that list the layers from which a part was taken, such as drop_attn_list.
_TAKEN = re.compile(r"drop|skip|prun|remov|no_?op|without", re.IGNORECASE)
_TAKEN_PARTS: Mapping[Component, re.Pattern[str]] = {
    "attention": re.compile(r"att(?:n|ention)", re.IGNORECASE),
    "mlp": re.compile(r"mlp|ffn|feed_?forward", re.IGNORECASE),
}


@dataclass(frozen=True, slots=True)
class Absent:
    """A part that a decoder layer does not have, so that nothing of it writes to the stream.

    Attributes:
        layer: The decoder layer.
        component: The part.
        reason: What says so.
    """

    layer: int
    component: Component
    reason: str


@dataclass(frozen=True, slots=True)
class Stated:
    """What a configuration says of one part of one layer.

    Attributes:
        has: Whether the layer has the part.
        by: The key and its value, in words.
    """

    has: bool
    by: str


def counted_by(places: Iterable[Mapping[str, Any]]) -> int | None:
    """Returns how many layers a configuration describes one by one, None where it describes none so."""
    for values in places:
        for key in (_BLOCKS, *_TYPES, _PATTERN):
            if isinstance(found := values.get(key), list | str) and found:
                return len(found)
    return None


def stated_by(places: Sequence[Mapping[str, Any]], layer: int, part: Component) -> Stated | None:
    """Returns what config.json says of a part of a layer, None where it does not say.

    Args:
        places: Its tables, the decoder's own before the rest.
        layer: The decoder layer.
        part: The part.
    """
    for values in places:
        for find in (_by_block, _by_type, _by_pattern, _by_list):
            if (found := find(values, layer, part)) is not None:
                return found
    return None


def _by_block(values: Mapping[str, Any], layer: int, part: Component) -> Stated | None:
    """Reads the blocks of an architecture search, as DeciLM and Nemotron-NAS state them."""
    block = _at(values.get(_BLOCKS), layer)
    if not isinstance(block, Mapping):
        return None
    key = next((key for key in _OF_BLOCKS[part] if isinstance(block.get(key), Mapping)), None)
    if key is None:
        return None
    without = block[key].get("no_op") is True
    return Stated(not without, f"{_BLOCKS}[{layer}].{key} has no_op = {str(without).lower()}")


def _by_type(values: Mapping[str, Any], layer: int, part: Component) -> Stated | None:
    """Reads the type of a layer; it speaks of the MLP only where some layers are an MLP and nothing else."""
    for key in _TYPES:
        types = values.get(key)
        kind = _at(types, layer)
        if not isinstance(kind, str) or not isinstance(types, list):
            continue
        alone = any(each in _MLP_TYPES for each in types if isinstance(each, str))
        if alone or part == "attention":
            return Stated((kind in _MLP_TYPES) == (part == "mlp"), f"{key}[{layer}] is {kind!r}")
    return None


def _by_pattern(values: Mapping[str, Any], layer: int, part: Component) -> Stated | None:
    """Reads Nemotron-H's pattern, a character a layer: M Mamba, * attention, - MLP, E experts."""
    pattern = values.get(_PATTERN)
    if not isinstance(pattern, str) or not set(pattern) <= _MARKS or layer >= len(pattern):
        return None
    return Stated((pattern[layer] in _MLP_MARKS) == (part == "mlp"), f"{_PATTERN}[{layer}] is {pattern[layer]!r}")


def _by_list(values: Mapping[str, Any], layer: int, part: Component) -> Stated | None:
    """Reads lists of the layers from which a part was taken; a layer that none of them names has it."""
    keys = [key for key in values if _TAKEN.search(key) and _TAKEN_PARTS[part].search(key)]
    lists = [(key, values[key]) for key in keys if _is_layers(values[key])]
    for key, layers in lists:
        if layer in layers:
            return Stated(has=False, by=f"{key} names the layer")
    return Stated(has=True, by=f"{lists[0][0]} does not name the layer") if lists else None


def _is_layers(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(type(each) is int for each in found)


def _at(found: Any, layer: int) -> Any:
    return found[layer] if isinstance(found, list) and layer < len(found) else None


def missing_beside(
    inner: Mapping[int, Set[str]], writers: Mapping[int, Iterable[str]], layer: int
) -> tuple[str, str] | None:
    """Finds the traces of a writer that is missing: a tensor of its module that elsewhere never is without it.

    Args:
        inner: The names of each layer's tensors within the layer.
        writers: Of those, the weights of one component that write, by layer; none in ``layer``.
        layer: The layer without them.

    Returns:
        The name within the layer of the tensor that is there, and of the one that is missing; None where there is
        no trace.
    """
    with_writer: dict[str, set[str]] = defaultdict(set)
    without: set[str] = set()
    for number, names in inner.items():
        if number == layer:
            continue
        kinds = set(map(_kind, names))
        writing = {_kind(name) for name in writers.get(number, ())}
        modules = {_module(kind): kind for kind in writing}
        for kind in kinds - writing:
            if (writer := modules.get(_module(kind))) is not None:
                with_writer[kind].add(writer)
            else:
                without.add(kind)
    for name in sorted(inner.get(layer, ())):
        kind = _kind(name)
        if kind not in without and with_writer[kind]:
            return name, min(with_writer[kind])
    return None


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _module(kind: str) -> str:
    """Returns the module that a tensor's own module lies in."""
    return kind.rpartition(".")[0].rpartition(".")[0]
