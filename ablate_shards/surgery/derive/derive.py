"""The lines of a recipe for a model that the table does not know, found and proven on its tiny twin."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ablate_shards.surgery.anatomy.architecture import Anatomy, Target, Writer, dissect
from ablate_shards.surgery.anatomy.gains import CENTRED, factors_of, is_centred, with_names
from ablate_shards.surgery.anatomy.parts import COMPONENT_OF, Part
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.derive.parts import find_parts
from ablate_shards.surgery.derive.twin import State, Twin, find_unreached, numbers_of
from ablate_shards.surgery.derive.writers import Kind, find_gain, find_mixing, find_writers, match_gain

if TYPE_CHECKING:
    import torch

__all__ = ["ABSENT", "Derivation", "derive", "headers_of", "left_after", "left_in", "where"]

ABSENT = 1e-5
"""Share of a state along the direction that counts as none."""

_PARAMETER = re.compile(r"\.(?:weight|bias)$")


@dataclass(frozen=True, slots=True)
class Derivation:
    """What was found of an architecture.

    Attributes:
        targets: A description of each kind of writer.
        left: By state of the stream, the largest share of the direction after the edit: before the first layer, then
            after each.
        problems: What the probe could not follow, a sentence each.
        unreached: Parameters of the layers that could write by their shape, and that no input of the probe reached.
    """

    targets: tuple[Target, ...]
    left: tuple[float, ...]
    problems: tuple[str, ...]
    unreached: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether the direction is gone from every state, and everything was reached."""
        return max(self.left) < ABSENT and not self.unreached


def derive(twin: Twin) -> Derivation:
    """Finds the writers of a twin by intervention, and proves that editing them removes a direction from every state.

    Args:
        twin: The tiny model.
    """
    found = find_writers(twin)
    problems = [
        f"{where(kind.first)}, {kind.name} multiplies what a mean was subtracted from, so a direction comes back"
        for kind in found.writers
        if kind.centres
    ][:1]
    if not problems:
        problems = [
            f"{where(state)}, {share:.1%} of a state is in coordinates that no tensor writes any more, as positions do "
            "that are computed and added"
            for state, share in sorted(found.leaks.items())[:1]
        ]
    kinds = find_parts(twin, find_mixing(twin, [kind for kind in found.writers if not kind.centres]))
    left = left_after(twin, _described(twin, kinds))
    if max(left) >= ABSENT:
        kinds, gains = _with_gains(twin, kinds)
        problems += gains
        left = left_after(twin, _described(twin, kinds))
    unreached = tuple(find_unreached(twin))
    return Derivation(tuple(_described(twin, kinds)), tuple(left), tuple(problems), unreached)


def where(state: int) -> str:
    """Says which state of the stream is meant."""
    return "before the first layer" if state == 0 else f"after layer {state - 1}"


def _with_gains(twin: Twin, kinds: Sequence[Kind]) -> tuple[list[Kind], list[str]]:
    found, problems = [], []
    for kind in kinds:
        if kind.vector:
            found.append(kind)
            continue
        gain = find_gain(twin, kinds, kind)
        if gain is None:
            problems.append(
                f"{where(kind.first)}, what {kind.name} adds passes through more than a gain, or the stream does"
            )
        elif float(gain.std()) > 1e-4 * float(gain.abs().mean()):
            if (match := match_gain(twin, kind, gain)) is None:
                problems.append(f"what {kind.name} adds passes through a gain that is no vector of its layer")
            else:
                kind = replace(kind, gain=match[0], offset=match[1])
        found.append(kind)
    return found, problems


# ---------------------------------------------------------------------------------------- lines


def _described(twin: Twin, kinds: Sequence[Kind]) -> list[Target]:
    """Returns a target for each kind, a weight and its bias in one."""
    by_stem: dict[tuple[str, bool], list[Kind]] = {}
    for kind in kinds:
        by_stem.setdefault((_PARAMETER.sub("", kind.name), kind.first > 0), []).append(kind)
    weights = [kind for kind in kinds if not kind.vector]
    targets = []
    for (stem, inside), members in by_stem.items():
        chief = next((kind for kind in members if not kind.vector), members[0])
        component: Part = "embedding"
        if inside:
            # What belongs to no weight goes with the weight whose name begins like its own.
            like = (
                chief if not chief.vector else max(weights, key=lambda one: _in_common(one.name, stem), default=chief)
            )
            component = like.part or ("attention" if like.mixes else "mlp")
        gain = None
        if chief.gain is not None:
            start = CENTRED if chief.centred else "1 + " if chief.offset else ""
            gain = start + with_names(chief.gain, lambda name: name.replace("#", "{layer}", 1))
        endings = [kind.name.removeprefix(stem) for kind in members]
        ending = r"\.(?:weight|bias)" if len(members) > 1 else re.escape(endings[0])
        pattern = _pattern(stem, ending, [name for kind in members for name in kind.tensors], twin.state, inside=inside)
        targets.append(Target(pattern, component, "out" if chief.axis == -2 else "in", gain))
    return sorted(targets, key=lambda target: ("embedding", "attention", "mlp").index(COMPONENT_OF[target.component]))


def _in_common(one: str, other: str) -> int:
    pairs = zip(one.split("."), other.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _pattern(stem: str, ending: str, names: Sequence[str], state: State, *, inside: bool) -> str:
    """Returns the pattern of some tensors: numbers free where nothing else is called alike, else as they are."""
    parts = [re.escape(part) for part in stem.split("#")]
    own = set(names)
    numbers = [numbers_of(name) for name in names]
    filled = parts[0]
    for place, part in enumerate(parts[1:]):
        if inside and place == 0:
            filled += rf"(?P<layer>\d+){part}"
            continue
        rest = r"\d+".join(parts[place + 1 :]) + ending
        alike = {name for name in state if re.fullmatch(rf"{filled}\d+{rest}", name)}
        values = sorted({each[place] for each in numbers})
        filled += (r"\d+" if alike <= own else values[0] if len(values) == 1 else f"(?:{'|'.join(values)})") + part
    return filled + ending


# ---------------------------------------------------------------------------------------- proof


def headers_of(state: State) -> dict[str, TensorInfo]:
    """Returns the headers that a checkpoint of these tensors would have."""
    return {
        name: TensorInfo(name, "F32", tuple(tensor.shape), "model.safetensors", 0, 4 * tensor.numel())
        for name, tensor in state.items()
        if tensor.is_floating_point()
    }


def left_after(twin: Twin, targets: Sequence[Target]) -> list[float]:
    """Returns the largest share of a direction that is left in each state after the targets were edited on the twin."""
    if not targets:
        return [1.0] * (twin.layers + 1)
    config = {"hidden_size": twin.hidden, "num_hidden_layers": twin.layers}
    return left_in(twin, dissect(headers_of(twin.state), config, targets))


def left_in(twin: Twin, anatomy: Anatomy) -> list[float]:
    """Returns the largest share of a direction that is left in each state after all of the writers were edited."""
    import torch

    direction = torch.randn(twin.hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    direction /= direction.norm()
    edited: dict[str, torch.Tensor] = dict(twin.state)
    for writer in anatomy.writers:
        edited[writer.name] = _without(twin.state, writer, direction)
    states = twin.stream(edited).double()
    shares = (states @ direction).abs() / states.norm(dim=-1).clamp_min(1e-12)
    return [float(share) for share in shares.reshape(len(shares), -1).amax(dim=1)]


def _without(state: Mapping[str, "torch.Tensor"], writer: Writer, direction: "torch.Tensor") -> "torch.Tensor":
    if writer.gain is not None:
        for name in factors_of(writer.gain):
            direction = direction * (state[name].double().reshape(-1) + writer.gain_offset)
        direction = direction - direction.mean() if is_centred(writer.gain) else direction
        direction = direction / direction.norm()
    tensor = state[writer.name].double().movedim(writer.axis, -1)
    tensor = tensor - (tensor @ direction)[..., None] * direction
    return tensor.movedim(-1, writer.axis).contiguous().to(state[writer.name].dtype)
