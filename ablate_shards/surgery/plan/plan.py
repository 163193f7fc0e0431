"""Decides what to edit, before any byte is written: one TensorEdit per weight, as pure data."""

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ablate_shards.errors import DirectionsError, PlanError, UsageError
from ablate_shards.surgery.anatomy.absent import PARTS, Absent
from ablate_shards.surgery.anatomy.architecture import Anatomy, Component, LeftOut, Writer, dissect, split_layer
from ablate_shards.surgery.anatomy.parts import COMPONENT_OF, belongs_to, part_of
from ablate_shards.surgery.anatomy.tied import StoredHead, stored_head
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES, TensorInfo
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.plan.bases import resolve_bases
from ablate_shards.surgery.plan.edits import BasisKey, Skip, TensorEdit, neighbours
from ablate_shards.surgery.plan.recipe import COMPONENTS, AblateOptions, SourceLayer, layer_ranges

__all__ = ["Plan", "make_plan"]

_LARGEST_COEFFICIENT = 1000
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_EXPERT = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do.

    Attributes:
        family: The architecture the table recognised.
        hidden_size: Length of the residual axis.
        edits: The edits, in the order of shards and bytes.
        skipped: What could have been edited and is not.
        absent: The parts that selected layers do not have, so that nothing of them is edited.
        notes: What the user should know before the run, a line each.
        directions_sha256: Digest of the directions.
        bases: For each basis that an edit names ``[k, d]`` float64, orthonormal rows. They follow from the rest and
            the source, hence are in no digest.
    """

    family: str
    hidden_size: int
    edits: tuple[TensorEdit, ...]
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]
    directions_sha256: str
    bases: Mapping[BasisKey, np.ndarray] = field(repr=False, compare=False)
    absent: tuple[Absent, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON types."""
        content = dataclasses.asdict(dataclasses.replace(self, bases={}))
        del content["bases"]
        if not self.absent:
            del content["absent"]
        for edit in content["edits"]:
            if edit["rounding"] == "directed":
                del edit["rounding"]
            if edit["scales"] is None:
                del edit["scales"]
                continue
            if edit["scales"]["order"] == "rows":
                del edit["scales"]["order"]
            if not edit["scales"]["rows"]:
                del edit["scales"]["rows"]
            if not edit["scales"]["parts"] and edit["scales"]["codes"] == "E4M3":
                del edit["scales"]["parts"], edit["scales"]["codes"]
        return content

    def sha256(self) -> str:
        """Returns the digest of the plan's canonical JSON form."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


def make_plan(checkpoint: Checkpoint, directions: Directions, options: AblateOptions) -> Plan:
    """Decides what to edit.

    Args:
        checkpoint: The source.
        directions: What to remove.
        options: How.

    Returns:
        The plan; nothing of the weights has been read but headers and post-norm gains.

    Raises:
        ArchitectureError: The architecture is not known, or a writer does not have the expected shape.
        DirectionsError: The directions do not fit the checkpoint, nothing is left of one, or a reference mean is
            missing.
        PlanError: A selected layer has no writer, or a writer cannot be edited.
        UsageError: A coefficient is not a number.
    """
    profiled = (value for profile in options.profiles for value in (profile.peak, profile.floor))
    for coefficient in (options.coefficient, *profiled, *(override.coefficient for override in options.overrides)):
        if coefficient is not None and not abs(coefficient) <= _LARGEST_COEFFICIENT:
            raise UsageError(
                f"coefficient: expected a number from -{_LARGEST_COEFFICIENT} to {_LARGEST_COEFFICIENT}, "
                f"found {coefficient}"
            )
    anatomy = dissect(checkpoint.tensors, checkpoint.config, options.targets)
    if directions.hidden_size != anatomy.hidden_size:
        raise DirectionsError(
            f"{checkpoint.name}: hidden size {anatomy.hidden_size}, but the directions have "
            f"{directions.hidden_size}; use directions captured from this model"
        )
    layers = _select_layers(anatomy.layers, directions, options)
    decoder_last = max(anatomy.layers, default=0)
    best = functools.cache(directions.best_layer)
    edits: list[TensorEdit] = []
    skipped = [Skip(item.name, item.layer, item.component, item.reason) for item in anatomy.left_out]
    for item in anatomy.left_out:
        if item.blocked and _why_skipped(item, layers, options) is None:
            raise PlanError(f"{item.name}: {item.reason}")
    for writer in anatomy.writers:
        if (reason := _why_skipped(writer, layers, options)) is not None:
            skipped.append(Skip(writer.name, writer.layer, writer.component, reason))
        else:
            tensor = checkpoint.tensors[writer.name]
            edit = _edit(writer, tensor, directions, options, decoder_last, best)
            if options.profiles and edit.coefficient == 0:
                skipped.append(Skip(writer.name, writer.layer, writer.component, "its coefficient is 0"))
            else:
                edits.append(edit)
    head = None
    if any(edit.component == "embedding" for edit in edits):
        head = stored_head(checkpoint, anatomy)
        edits += _of_head(head, edits)
    if options.rounding != "directed" and all(edit.scales is None for edit in edits):
        raise UsageError(
            f"--rounding is about codes, and none of the weights that would be edited in {checkpoint.name} has any; "
            "leave it out"
        )
    absent = _check_coverage(checkpoint, anatomy, layers, options)
    _check_experts(edit for edit in edits if not edit.mtp)
    order = {shard.name: number for number, shard in enumerate(checkpoint.shards)}
    edits.sort(key=lambda edit: (order[edit.shard], edit.start))
    return Plan(
        family=anatomy.family,
        hidden_size=anatomy.hidden_size,
        edits=tuple(edits),
        skipped=tuple(skipped),
        notes=(
            *_notes(edits, directions, options, tied=anatomy.tied, head=head),
            *_unplaced(anatomy, layers),
        ),
        directions_sha256=directions.sha256(),
        bases=resolve_bases(edits, checkpoint, directions),
        absent=absent,
    )


def _select_layers(existing: Sequence[int], directions: Directions, options: AblateOptions) -> frozenset[int]:
    wanted = frozenset(directions.layers) if options.layers is None else options.layers
    if missing := sorted(wanted - set(existing)):
        what = "the directions have" if options.layers is None else "--layers names"
        way_out = "select them with --layers" if options.layers is None else "leave it out"
        there = layer_ranges(existing) or "none"
        raise PlanError(f"{what} layer {missing[0]}, but the checkpoint has layers {there}; {way_out}")
    return wanted


def _why_skipped(writer: Writer | LeftOut, layers: frozenset[int], options: AblateOptions) -> str | None:
    if writer.mtp and options.mtp == "keep":
        return "multi-token prediction is kept; --mtp edit includes it"
    if not belongs_to(writer, options.components):
        return f"{part_of(writer)} is not among --components"
    if writer.mtp:
        return None
    if writer.layer is not None and writer.layer not in layers:
        return "the layer is not selected"
    return None


def _edit(
    writer: Writer,
    tensor: TensorInfo,
    directions: Directions,
    options: AblateOptions,
    decoder_last: int,
    best: Callable[[], int],
) -> TensorEdit:
    coefficient, preserve = _general_coefficient(writer, options), options.preserve
    project, source = options.biproject, options.source_layer
    for override in options.overrides:
        if override.layers is not None and (writer.mtp or writer.layer not in override.layers):
            continue
        if override.components is not None and not belongs_to(writer, override.components):
            continue
        coefficient = coefficient if override.coefficient is None else override.coefficient
        preserve = override.preserve or preserve
        project = project if override.biproject is None else override.biproject
        source = source if override.source_layer is None else override.source_layer
    if tensor.dtype not in ITEM_BYTES and writer.scales is None:
        raise PlanError(
            f"{tensor.name}: expected BF16, F16 or F32, found {tensor.dtype}; convert the checkpoint to one of them"
        )
    if writer.mtp:
        own = decoder_last
    elif writer.layer is None:
        own = min(directions.layers)
    else:
        own = writer.layer
    measured = best() if source == "best" else _source_layer(source, own, directions, tensor.name)
    at = () if writer.layer is None or writer.mtp else (writer.layer,)
    return TensorEdit(
        name=tensor.name,
        shard=tensor.shard,
        dtype=tensor.dtype,
        shape=tensor.shape,
        start=tensor.start,
        end=tensor.end,
        axis=writer.axis,
        kind=writer.kind,
        layer=writer.layer,
        component=writer.component,
        mtp=writer.mtp,
        coefficient=coefficient,
        preserve=preserve if writer.kind == "weight" else "none",
        basis=BasisKey(
            source_layer=measured,
            references=tuple(dict.fromkeys((*neighbours(measured), *at))) if project else (),
            gain=writer.gain,
            gain_offset=writer.gain_offset,
        ),
        scales=writer.scales,
        rounding="directed" if writer.scales is None else options.rounding,
    )


def _of_head(head: StoredHead | None, edits: Sequence[TensorEdit]) -> list[TensorEdit]:
    """Returns the edit of a head that is stored and tied: that of the embedding whose bytes it has."""
    if head is None or any(edit.name == head.tensor.name for edit in edits):
        return []
    place = dataclasses.asdict(head.tensor)
    return [dataclasses.replace(edit, **place) for edit in edits if edit.name == head.embedding]


def _general_coefficient(writer: Writer, options: AblateOptions) -> float:
    """Returns the coefficient of a writer before overrides: by the last profile that holds for it, if one does."""
    coefficient = options.coefficient
    if writer.layer is not None and not writer.mtp:
        for profile in options.profiles:
            if belongs_to(writer, profile.components):
                coefficient = profile.coefficient(writer.layer)
    return coefficient


def _source_layer(source: SourceLayer, own: int, directions: Directions, name: str) -> int | float:
    layer = own if isinstance(source, str) else source
    for needed in neighbours(layer):
        if needed not in directions.basis:
            raise DirectionsError(
                f"{name}: needs the direction of layer {needed}, but the directions have layers "
                f"{layer_ranges(directions.layers)}; use --source-layer best or another --layers"
            )
    return layer


def _check_coverage(
    checkpoint: Checkpoint, anatomy: Anatomy, layers: frozenset[int], options: AblateOptions
) -> tuple[Absent, ...]:
    """Returns the selected parts that layers do not have, and refuses those of which a writer should be there."""
    weights = [writer for writer in anatomy.writers if writer.kind == "weight" and not writer.mtp]
    _check_parts(checkpoint, weights, layers, options)
    found = {(writer.layer, writer.component) for writer in weights}
    absent: dict[tuple[int | None, Component], Absent] = {(item.layer, item.component): item for item in anatomy.absent}
    missing: dict[tuple[int | None, Component], str] = {
        (item.layer, item.component): item.reason for item in anatomy.missing
    }
    needed: list[tuple[int | None, Component]] = [
        (layer, component) for layer in sorted(layers) for component in PARTS if component in options.components
    ]
    if options.targets:
        described = {COMPONENT_OF[target.component] for target in options.targets}
        needed = [(layer, component) for layer, component in needed if component in described]
    if "embedding" in options.components:
        needed.append((None, "embedding"))
    lacking: list[Absent] = []
    for layer, component in needed:
        if (layer, component) in found:
            continue
        if (layer, component) in absent:
            lacking.append(absent[layer, component])
        elif layer is not None and (layer, component) not in missing and _left_alone(layer, component, options):
            lacking.append(Absent(layer, component, "an override sets its coefficient to 0, and no writer was found"))
        else:
            what = "no token embedding" if layer is None else f"layer {layer}: no {component} writer"
            way_out = _way_out(layer, component, missing.get((layer, component)))
            raise PlanError(f"{checkpoint.name}: {what} was found among {_names_of(checkpoint, layer)}; {way_out}")
    return tuple(lacking)


def _check_parts(
    checkpoint: Checkpoint, weights: Sequence[Writer], layers: frozenset[int], options: AblateOptions
) -> None:
    """Refuses a part of a component, such as mamba, that no selected layer has; a layer without it is none of its."""
    there = [part_of(one) for one in weights if one.layer in layers]
    for part in options.components:
        if part not in COMPONENTS and part not in there:
            has = ", ".join(one for one in COMPONENT_OF if one in there) or "none"
            raise PlanError(
                f"{checkpoint.name}: no {part} writer was found in the selected layers, which have {has}; select one "
                "of these with --components"
            )


def _way_out(layer: int | None, component: Component, missing: str | None) -> str:
    """Returns what to do about a part of which no writer was found, and why it is taken to be missing, if it is."""
    if missing is not None:
        return (
            f"it is missing: {missing}; fetch the shard that holds it and the index that came with it, or leave the "
            "layer out with --layers"
        )
    describe = "describe it with [[ablate.target]] in a recipe"
    if layer is None:
        return f"{describe}, or leave it out with --components"
    return (
        f"{describe}, or leave it out with --layers or --components; if the layer has no {component}, say so in a "
        f'recipe with [[ablate.override]], layers = "{layer}", components = "{component}", coefficient = 0'
    )


def _left_alone(layer: int, component: Component, options: AblateOptions) -> bool:
    """Tells whether the last override that sets a coefficient for a part of a layer, by its number, sets it to 0."""
    said = [
        override.coefficient
        for override in options.overrides
        if override.coefficient is not None
        and override.layers is not None
        and layer in override.layers
        and (override.components is None or component in override.components)
    ]
    return bool(said) and said[-1] == 0


def _unplaced(anatomy: Anatomy, layers: frozenset[int]) -> Iterator[str]:
    """Names what is edited in no selected layer although it could write to the stream by its shape."""
    layer_of = {item.name: item.layer for item in anatomy.left_out}
    kinds = dict.fromkeys(_NUMBER.sub("*", name) for name in anatomy.unplaced if layer_of.get(name) in layers)
    if kinds:
        yield (
            f"not edited: {', '.join(kinds)}, which by shape could write to the stream in the selected layers; if one "
            "does, part of the direction stays: describe every writer with [[ablate.target]] in a recipe"
        )


def _names_of(checkpoint: Checkpoint, layer: int | None) -> str:
    names = (name for name in checkpoint.tensors if split_layer(name)[0] == layer)
    return ", ".join(sorted({_EXPERT.sub(".experts.*.", name) for name in names})) or "its tensors"


def _check_experts(edits: Iterable[TensorEdit]) -> None:
    """Refuses stacks of experts, one tensor each, in which one is missing."""
    stacks: dict[str, set[int]] = {}
    for edit in edits:
        if match := _EXPERT.search(edit.name):
            stacks.setdefault(_EXPERT.sub(".experts.*.", edit.name), set()).add(int(match[1]))
    count = max((max(found) + 1 for found in stacks.values()), default=0)
    for name, found in stacks.items():
        if missing := sorted(set(range(count)) - found):
            raise PlanError(f"{name}: expert {missing[0]} of {count} is missing; the checkpoint is incomplete")


def _notes(
    edits: Sequence[TensorEdit], directions: Directions, options: AblateOptions, *, tied: bool, head: StoredHead | None
) -> Iterator[str]:
    # Directions without scores have no best layer; then no edit is left to it, or there would be no plan.
    if options.source_layer == "best" and directions.scores:
        yield f"source layer: {directions.best_layer()}, the best by its scores"
    if head is not None:
        yield head.note
    elif tied and any(edit.component == "embedding" for edit in edits):
        yield "the output head is tied to the token embedding, so both are edited"
    above = max((edit.coefficient for edit in edits), default=0.0)
    if above > 1:
        yield (
            f"coefficient {above:g} is above 1: it turns the component into {1 - above:+g} times itself "
            "(1 removes, 2 reflects)"
        )
