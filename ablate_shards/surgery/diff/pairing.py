"""Finds which tensor of one checkpoint is which of the other: by name, by values, or as a part of it."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ablate_shards.surgery.anatomy.architecture import common_ending
from ablate_shards.surgery.diff.differences import Fusion
from ablate_shards.surgery.diff.stored import StoredTensor, same_bytes

__all__ = ["Pairing", "pair_tensors"]

#: A sample is so many runs of so many values.
_RUNS, _RUN = 4, 256
_ALIKE = 0.9
#: Bytes at the start of a part by which its place in a whole is found.
_HEAD = 256
_SAMPLES_AT_A_TIME = 256


@dataclass(frozen=True, slots=True)
class Pairing:
    """Which tensor is which.

    Attributes:
        pairs: A tensor of the first checkpoint and its partner in the second, in the order of the first.
        lost: Tensors that only the first holds.
        added: Tensors that only the second holds.
        fused: Tensors that were joined or split.
    """

    pairs: tuple[tuple[StoredTensor, StoredTensor], ...]
    lost: tuple[str, ...]
    added: tuple[str, ...]
    fused: tuple[Fusion, ...]


def pair_tensors(first: Mapping[str, StoredTensor], second: Mapping[str, StoredTensor]) -> Pairing:
    """Pairs tensors of one name, quantised or not, then what is left by shape and values, and those joined or split."""
    by_plain_name = {tensor.plain_name: tensor for tensor in second.values() if tensor.role == "codes"}
    partners = {
        name: partner
        for name, tensor in first.items()
        if (partner := second.get(name) or by_plain_name.get(name) or second.get(tensor.plain_name)) is not None
    }
    left = _without(first, partners), _without(second, {tensor.name for tensor in partners.values()})
    partners |= _renamed(*left)
    lost = _without(first, partners)
    added = _without(second, {tensor.name for tensor in partners.values()})
    fused = list(_fusions(lost, added, split=False))
    lost, added = (_without(tensors, _names(fused)) for tensors in (lost, added))
    fused += _fusions(added, lost, split=True)
    lost, added = (_without(tensors, _names(fused)) for tensors in (lost, added))
    return Pairing(
        pairs=tuple((tensor, partners[name]) for name, tensor in first.items() if name in partners),
        lost=tuple(lost),
        added=tuple(added),
        fused=tuple(fused),
    )


def _without(tensors: Mapping[str, StoredTensor], names: Collection[str]) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in tensors.items() if name not in names}


def _names(fused: Sequence[Fusion]) -> set[str]:
    return {name for fusion in fused for name in (fusion.whole, *fusion.parts)}


# ---------------------------------------------------------------------------------------- renamed


def _renamed(lost: Mapping[str, StoredTensor], added: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Returns the partners of tensors that go by another name, found by shape and values."""
    groups: dict[tuple[object, ...], tuple[list[StoredTensor], list[StoredTensor]]] = defaultdict(lambda: ([], []))
    for side, tensors in enumerate((lost, added)):
        for tensor in tensors.values():
            if tensor.elements:
                # What is not decoded can only be compared with what is stored in the same way.
                groups[tensor.shape, None if tensor.is_float else tensor.dtype][side].append(tensor)
    return {name: new for olds, news in groups.values() if olds and news for name, new in _best_pairs(olds, news)}


def _best_pairs(olds: Sequence[StoredTensor], news: Sequence[StoredTensor]) -> Iterator[tuple[str, StoredTensor]]:
    """Pairs tensors of one shape whose values agree, those that agree best first."""
    taken_olds, taken_news = set(), set()
    for *_, old, new in sorted(_likely_pairs(olds, news)):
        if old not in taken_olds and new not in taken_news:
            taken_olds.add(old)
            taken_news.add(new)
            yield olds[old].name, news[new]


def _likely_pairs(
    olds: Sequence[StoredTensor], news: Sequence[StoredTensor]
) -> Iterator[tuple[float, float, int, int]]:
    """Yields the numbers of tensors that agree, after what they are ranked by: the smaller, the better they agree."""
    samples, others = (_unit(np.stack([_sample(tensor) for tensor in tensors])) for tensors in (olds, news))
    vectors = len(olds[0].shape) < 2
    for start in range(0, len(olds), _SAMPLES_AT_A_TIME):
        cosines = samples[start : start + _SAMPLES_AT_A_TIME] @ others.T
        for row, new in np.argwhere(cosines > _ALIKE).tolist():
            old = start + row
            cosine, ending = round(float(cosines[row, new]), 2), common_ending(olds[old].name, news[new].name)
            if not vectors:
                yield -cosine, -ending, old, new
            # Gains and biases are alike everywhere, so that only the name can tell them apart.
            elif ending > 1:
                yield -ending, -cosine, old, new


def _sample(tensor: StoredTensor) -> np.ndarray:
    """Reads a few runs of values, spread over a tensor."""
    count = tensor.elements if tensor.is_float else tensor.size // tensor.width
    starts = sorted({max(0, (count - _RUN) * step // (_RUNS - 1)) for step in range(_RUNS)})
    return np.concatenate([tensor.numbers(start, min(_RUN, count - start)) for start in starts])


def _unit(samples: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(samples, axis=1, keepdims=True)
    # Two tensors of zeros are alike, too.
    return np.where(norms > 0, samples / np.where(norms > 0, norms, 1), 1 / math.sqrt(samples.shape[1]))


# ---------------------------------------------------------------------------------------- joined and split


def _fusions(parts: Mapping[str, StoredTensor], wholes: Mapping[str, StoredTensor], *, split: bool) -> Iterator[Fusion]:
    """Finds tensors that hold others, one after the other, from their first to their last byte."""
    by_head: dict[tuple[str, bytes], list[StoredTensor]] = defaultdict(list)
    for part in parts.values():
        if part.size >= _HEAD:
            by_head[part.dtype, part.head(0, _HEAD)].append(part)
    if not by_head:
        return
    for whole in wholes.values():
        places = _parts_of(whole, by_head)
        if len(places) > 1:
            equal = sum(same_bytes(part, whole, part.size, 0, start) for start, part in places.items())
            yield Fusion(whole.name, tuple(part.name for part in places.values()), split, equal)


def _parts_of(
    whole: StoredTensor, by_head: Mapping[tuple[str, bytes], Sequence[StoredTensor]]
) -> dict[int, StoredTensor]:
    """Returns the parts of a tensor by where in it they begin, none where something else lies between them."""
    places: dict[int, StoredTensor] = {}
    chosen: set[str] = set()
    start = 0
    while start < whole.size:
        fitting = (
            part
            for part in by_head.get((whole.dtype, whole.head(start, _HEAD)), ())
            if part.name not in chosen and part.size <= whole.size - start
        )
        if (part := next(fitting, None)) is None:
            return {}
        places[start] = part
        chosen.add(part.name)
        start += part.size
    return places
