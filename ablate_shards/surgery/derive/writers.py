"""Finds by intervention which tensors of a twin write to the stream, along which axis and through which gain.

Coordinates of the stream are knocked out: in every tensor, along every axis of the stream's length, the slices of some
coordinates become zero, so that nothing reads or writes them and they are zero in every state. Then one kind of tensor
along one axis gets its slice of one coordinate back. Where that coordinate is not zero any more, the kind writes along
that axis; a kind that reads, or whose output another tensor takes, cannot change it. Each coordinate stands for another
kind, so that one run decides about as many kinds as coordinates are knocked out.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ablate_shards.surgery.anatomy.gains import TIMES
from ablate_shards.surgery.anatomy.parts import Part
from ablate_shards.surgery.derive.twin import SEQUENCES, State, Twin, kind_of, numbers_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "Found",
    "Kind",
    "find_gain",
    "find_mixing",
    "find_writers",
    "match_gain",
    "shares_of",
    "silence",
]

#: Share of a state's length below which a coordinate counts as zero.
_NOTHING = 1e-6
#: Times its length up to which a tensor is taken for a vector: biases, gains, and taps of a convolution.
_VECTOR = 4
#: Share by which what a token gets differs where another token has a part in it.
_MIXED = 1e-5
#: Within this, two shares are the same.
_SAME = 1e-4


@dataclass(frozen=True, slots=True)
class Kind:
    """Tensors that differ only in their numbers, along one axis.

    Attributes:
        name: Their name, numbers as ``#``.
        axis: The axis that is as long as the stream, negative.
        tensors: Their names.
        vector: Whether they have about as many elements as the stream has coordinates.
        first: The state that first shows what they write: 0 is before the first layer, 1 after it.
        mixes: Whether what they write at one token depends on other tokens.
        reach: How many tokens show that another one differs.
        crosses: Whether it depends on what an encoder is given.
        centres: Whether it multiplies what a mean was subtracted from, which brings back what was removed.
        gain: The kind of vector that their output is multiplied by before it is added, if there is one.
        offset: What is added to that vector first.
        centred: Whether a mean is subtracted from their output before that.
        part: The part of a component that they are, where something tells.
    """

    name: str
    axis: int
    tensors: tuple[str, ...]
    vector: bool
    first: int = 0
    mixes: bool = False
    reach: int = 0
    crosses: bool = False
    centres: bool = False
    gain: str | None = None
    offset: float = 0.0
    centred: bool = False
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """What the interventions showed.

    Attributes:
        writers: The kinds that write.
        leaks: By state, the largest share that is left in a coordinate although all writers of it are knocked out.
    """

    writers: tuple[Kind, ...]
    leaks: Mapping[int, float] = field(default_factory=dict)


def find_writers(twin: Twin) -> Found:
    """Finds what writes to the stream of a twin.

    The axes of a tensor that are not as long as the stream are left out; which of the others is meant, and whether the
    tensor writes at all, is found by intervention alone.
    """
    kinds = _candidates(twin)
    vectors = [kind for kind in kinds if kind.vector]
    matrices = [kind for kind in kinds if not kind.vector]
    biases, leaks = _restored(twin, vectors, knocked=kinds)
    writers, more = _restored(twin, matrices, knocked=[*matrices, *biases])
    leaks = {state: max(leaks.get(state, 0.0), more.get(state, 0.0)) for state in {*leaks, *more}}
    norms = [kind for kind in biases if kind.centres and kind.first == 0]
    if len(norms) == 1:
        biases = [kind for kind in biases if kind is not norms[0]]
        writers += _normalised_by(twin, norms[0], matrices, biases)
    return Found((*writers, *biases), leaks)


def _normalised_by(twin: Twin, norm: Kind, matrices: Sequence[Kind], biases: Sequence[Kind]) -> list[Kind]:
    """Returns the kinds whose output a norm before the first layer takes: each alone brings a state back.

    There a coordinate shows nothing, since the mean that is subtracted has a part in each.
    """
    silent = silence(twin.state, [*matrices, *biases])
    return [
        replace(kind, gain=norm.name, centred=True)
        for kind in matrices
        if bool(twin.stream({**silent, **{name: twin.state[name] for name in kind.tensors}})[0].any())
    ]


def _candidates(twin: Twin) -> list[Kind]:
    members: dict[tuple[str, int], list[str]] = {}
    for name, tensor in twin.state.items():
        for axis in range(-tensor.ndim, 0):
            if tensor.is_floating_point() and tensor.shape[axis] == twin.hidden:
                members.setdefault((kind_of(name), axis), []).append(name)
    return [
        Kind(kind, axis, tuple(names), all(twin.state[name].numel() <= _VECTOR * twin.hidden for name in names))
        for (kind, axis), names in members.items()
    ]


def _restored(twin: Twin, kinds: Sequence[Kind], knocked: Sequence[Kind]) -> tuple[list[Kind], dict[int, float]]:
    """Returns those of the kinds that, given back alone, bring back a coordinate; and what was there without any."""
    writers: list[Kind] = []
    leaks: dict[int, float] = {}
    coordinates = list(range(0, twin.hidden, 2))
    controls, places = coordinates[:4], coordinates[4:]
    for first in range(0, max(len(kinds), 1), len(places)):
        tried = dict(zip(places, kinds[first : first + len(places)], strict=False))
        states = twin.stream(knock_out(twin.state, knocked, [*controls, *tried], tried))
        shares = shares_of(states)
        for state, share in enumerate(shares[:, controls].amax(dim=1).tolist()):
            if not share <= _NOTHING:
                leaks[state] = max(leaks.get(state, 0.0), share)
        base = shares[:, controls].amax(dim=1)
        for place, kind in tried.items():
            shows = [state for state in range(len(shares)) if not shares[state, place] <= 4 * base[state] + _NOTHING]
            if shows:
                # What a vector adds has one sign; what it multiplies has both.
                added = states[shows[0], ..., place]
                lone = all(twin.state[name].numel() == twin.hidden for name in kind.tensors)
                centres = lone and bool(added.amin() < 0) and bool(added.amax() > 0)
                writers.append(replace(kind, first=shows[0], centres=centres))
    return writers, leaks


def find_mixing(twin: Twin, writers: Sequence[Kind]) -> list[Kind]:
    """Returns the writers with whether they mix tokens.

    Within layers, nothing but the kind writes, so what it first adds depends on the stream before the first layer
    alone. Where that is the same in two sequences and what is added is not, tokens are mixed.
    """
    inside = [kind for kind in writers if kind.first > 0]
    found: list[Kind] = []
    for kind in writers:
        if kind.first > 0 and not kind.vector:
            states = twin.stream(silence(twin.state, [each for each in inside if each != kind]))[[0, kind.first]]
            before, after = states.reshape(2, -1, SEQUENCES, *states.shape[-2:])
            crosses, reach = _reach(before, after, 2) > 0, _reach(before, after, 1)
            kind = replace(kind, crosses=crosses, mixes=crosses or reach > 0, reach=reach)
        found.append(kind)
    return found


def _reach(before: "torch.Tensor", after: "torch.Tensor", other: int) -> int:
    """Returns how many tokens of a state differ between the first sequence and another where those before it do not."""
    same = (before[:, 0] == before[:, other]).all(dim=-1)
    apart = (after[:, 0] - after[:, other]).abs().amax(dim=-1) > _MIXED * float(after.abs().amax())
    return int((apart & same).sum(dim=-1).amax())


def silence(state: State, kinds: Iterable[Kind]) -> dict[str, "torch.Tensor"]:
    """Returns the tensors, those of some kinds zero."""
    return {**state, **{name: state[name] * 0 for kind in kinds for name in kind.tensors}}


def find_gain(twin: Twin, writers: Sequence[Kind], kind: Kind) -> "torch.Tensor | None":
    """Returns what each coordinate of a kind's output is multiplied by, but for one factor; None if it depends on more.

    Its slices are made equal, so that without a gain every coordinate gets the same.
    """
    import torch

    state = silence(twin.state, [each for each in writers if (each.first > 0) == (kind.first > 0)])
    base = twin.stream(state)[kind.first]
    for name in kind.tensors:
        one = twin.state[name].select(kind.axis, 0).unsqueeze(kind.axis)
        state[name] = one.expand(twin.state[name].shape).contiguous()
    added = (twin.stream(state)[kind.first] - base).double().reshape(-1, twin.hidden)
    strength = added.norm(dim=-1)
    added = added[strength > strength.amax() / 4] if bool(strength.amax() > 0) else added
    at = added.abs().amin(dim=0).argmax()
    ratios = added / added[:, at : at + 1]
    gain = ratios.mean(dim=0)
    if not bool(torch.isfinite(ratios).all()) or bool(((ratios - gain).abs() > _SAME * gain.abs().amax()).any()):
        return None
    return torch.as_tensor(gain)


def match_gain(twin: Twin, kind: Kind, gain: "torch.Tensor") -> tuple[str, float] | None:
    """Returns the kind of vector that a gain is proportional to, and what is added to it; None where there is none.

    Where no vector alone is, two of the layer may be, one after the other.
    """
    import torch

    layer = str(kind.first - 1)
    vectors = {
        name: tensor.double().reshape(-1)
        for name, tensor in twin.state.items()
        if tensor.numel() == twin.hidden
        and tensor.is_floating_point()
        and (not (numbers := numbers_of(name)) or numbers[0] == layer)
    }
    for names in itertools.chain(zip(vectors, strict=True), itertools.combinations(vectors, 2)):
        for offset in (0.0, 1.0):
            value = torch.stack([vectors[name] + offset for name in names]).prod(dim=0)
            if bool(torch.allclose(value / value.norm(), gain / gain.norm() * torch.sign(gain @ value), atol=_SAME)):
                return TIMES.join(map(kind_of, names)), offset
    return None


def knock_out(
    state: State, kinds: Iterable[Kind], coordinates: Sequence[int], spared: Mapping[int, Kind]
) -> dict[str, "torch.Tensor"]:
    """Returns the tensors without the slices of some coordinates along the axis of each kind.

    Args:
        state: The tensors.
        kinds: Those that lose them.
        coordinates: Which slices.
        spared: By coordinate, the kind that keeps its slice.
    """
    import torch

    changed = dict(state)
    for kind in kinds:
        lost = [
            place
            for place in coordinates
            if (one := spared.get(place)) is None or (one.name, one.axis) != (kind.name, kind.axis)
        ]
        for name in kind.tensors:
            changed[name] = changed[name].index_fill(kind.axis, torch.tensor(lost, dtype=torch.long), 0)
    return changed


def shares_of(states: "torch.Tensor") -> "torch.Tensor":
    """Returns the largest share that each coordinate has in a token's state, ``[states, d]``."""
    import torch

    length = states.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    shares = (states.abs() / length).reshape(len(states), -1, states.shape[-1])
    return torch.amax(shares, dim=1)
