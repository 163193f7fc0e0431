"""Says in words what the differences between two checkpoints come to."""

import itertools
import re
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from ablate_shards.surgery.anatomy.architecture import common_ending
from ablate_shards.surgery.anatomy.scales import is_beside_codes
from ablate_shards.surgery.diff.differences import Diff, Fusion, TensorDiff, leaf
from ablate_shards.surgery.diff.stored import BARE
from ablate_shards.surgery.plan.recipe import layer_ranges

__all__ = ["describe"]

#: Least cosine of directions that are called one.
_SAME = 0.95
#: The same where only their largest entries are seen.
_SAME_IN_CODES = 0.6
#: Coefficients that differ by less are called one.
_SAME_COEFFICIENT = 0.05
#: What share of the tensors is nearly all.
_MOST = 0.9


def describe(found: Diff) -> tuple[str, ...]:
    """Returns a sentence for each kind of difference, the most telling first; ``no difference`` where there is none."""
    if found.same:
        return ("no difference",)
    lines = [
        *_by_kind(found.tensors),
        *_codes(found.tensors),
        *_retyped(found),
        *_renamed(found.tensors),
        *_fused(found.fused),
        *(f"{what} missing in B" for what in _by_tower(found.lost)),
        *(f"{what} only in B" for what in _by_tower(found.added)),
    ]
    if not lines:
        lines.append("the weights are equal")
    if found.metadata:
        lines.append(f"{_count(len(found.metadata), 'difference')} in the shards' metadata or number")
    if found.files:
        lines.append(f"{_count(len(found.files), 'difference')} in the files beside the weights")
    return tuple(lines)


def _by_kind(tensors: Iterable[TensorDiff]) -> Iterator[str]:
    kinds: dict[str, list[TensorDiff]] = defaultdict(list)
    for tensor in tensors:
        kinds[tensor.kind].append(tensor)
    for kind, sentence in _SENTENCES.items():
        if kind in kinds:
            yield sentence(kinds[kind])


def _say_ablation(tensors: Sequence[TensorDiff]) -> str:
    ablations = [tensor.ablation for tensor in tensors if tensor.ablation is not None]
    writers = all(tensor.writer for tensor in tensors)
    noun = "residual writer" if writers else "weight"
    coefficients = [item.coefficient for item in ablations]
    low, high = min(coefficients), max(coefficients)
    if high - low < _SAME_COEFFICIENT:
        coefficient = f"coefficient {statistics.median(coefficients):.2f}"
    else:
        coefficient = f"coefficients {low:.2f} to {high:.2f}"
    rounded = "up to rounding to codes" if any(item.in_codes for item in ablations) else ""
    facts = [coefficient, rounded, _kept(tensors), _same_direction(tensors), _along(tensors)]
    return (
        f"{_ranks(tensors)} edit{'' if len(tensors) == 1 else 's'} of {_count(len(tensors), noun)}{_where(tensors)}, "
        f"consistent with directional ablation ({', '.join(fact for fact in facts if fact)})"
    )


def _kept(tensors: Sequence[TensorDiff]) -> str:
    """Says whose norms an edit kept, where it did so in nearly all tensors."""
    for name in ("columns", "rows"):
        keeping = [tensor for tensor in tensors if name in tensor.kept]
        if len(keeping) >= _MOST * len(tensors):
            drift = max((tensor.row_drift if name == "rows" else tensor.column_drift) or 0.0 for tensor in keeping)
            return f"{name.removesuffix('s')} norms kept to {drift:.0e}".replace("e-0", "e-")
    return "norms not kept"


def _same_direction(tensors: Sequence[TensorDiff]) -> str:
    cosines = [tensor.ablation.same_direction for tensor in tensors if tensor.ablation is not None]
    if len(cosines) < 2:
        return ""
    in_codes = any(tensor.ablation.in_codes for tensor in tensors if tensor.ablation is not None)
    if min(cosines) >= (_SAME_IN_CODES if in_codes else _SAME):
        return f"one direction in all, cosines at least {min(cosines):.2f}"
    if in_codes:
        return ""
    return f"directions differ, cosines with the first down to {min(cosines):.2f}"


def _along(tensors: Sequence[TensorDiff]) -> str:
    """Says how the changes fit given directions."""
    aligned = [tensor.alignment for tensor in tensors if tensor.alignment is not None]
    if not aligned:
        return ""
    layer, count = Counter(alignment.best_layer for alignment in aligned).most_common(1)[0]
    own = sum(alignment.cosine == alignment.best_cosine for alignment in aligned)
    if own > count:
        chosen = [alignment.cosine or 0.0 for alignment in aligned]
        what = "the given directions of their own layers"
    else:
        chosen = [alignment.best_cosine for alignment in aligned if alignment.best_layer == layer]
        what = f"the given direction of layer {layer}" + ("" if count == len(aligned) else f" in {count} of them")
    return f"cosine with {what}: {statistics.median(chosen):.2f}"


def _say_low_rank(tensors: Sequence[TensorDiff]) -> str:
    rank = max(tensor.rank or 0 for tensor in tensors)
    shape = f"rank ≤ {rank}" if rank > 1 else "rank 1"
    scaled = Counter(tensor.form for tensor in tensors if tensor.form != "plain")
    undone = "".join(f", once {form} are rescaled in {count}" for form, count in scaled.items())
    modules = ", ".join(dict.fromkeys(_module(tensor.name) for tensor in tensors))
    along = _along(tensors)
    lora = "" if scaled else ", consistent with a merged LoRA adapter"
    return (
        f"low-rank update of {shape} of {modules}{_where(tensors, listed=False)}{undone}{lora} "
        f"({_relative(tensors)}{', ' + along if along else ''})"
    )


def _say_scaled(tensors: Sequence[TensorDiff]) -> str:
    forms = " or ".join(sorted({str(tensor.form) for tensor in tensors}))
    return f"{forms} of {_count(len(tensors), 'tensor')} rescaled{_where(tensors)} ({_relative(tensors)})"


def _say_full(tensors: Sequence[TensorDiff]) -> str:
    rank = min(tensor.rank or 0 for tensor in tensors)
    who = _count(len(tensors), "matrix", "matrices")
    return (
        f"{who} changed at full rank (above {rank}){_where(tensors)}, consistent with training or noise "
        f"({_relative(tensors)})"
    )


def _say_vector(tensors: Sequence[TensorDiff]) -> str:
    return f"{_count(len(tensors), 'vector')} changed{_where(tensors)} ({_relative(tensors)})"


def _say_sparse(tensors: Sequence[TensorDiff]) -> str:
    changed = sum(tensor.changed for tensor in tensors)
    return f"{_count(changed, 'single value')} changed in {_count(len(tensors), 'tensor')}{_where(tensors)}"


def _codes(tensors: Iterable[TensorDiff]) -> Iterator[str]:
    """Says how many codes changed on one grid, and which codes were not decoded."""
    by_form: dict[str, list[TensorDiff]] = defaultdict(list)
    for tensor in tensors:
        if tensor.equal_scales and tensor.changed:
            by_form[str(tensor.codes).partition(" ")[0]].append(tensor)
    for form, changed in by_form.items():
        codes = sum(tensor.changed for tensor in changed)
        share = codes / max(1, sum(tensor.elements for tensor in changed))
        steps = max(tensor.units for tensor in changed)
        yield (
            f"{_count(codes, 'code')} of {_count(len(changed), 'tensor')} in {form} changed ({share:.2%} of theirs, by "
            f"up to {_count(round(steps), 'step')}), scales equal"
        )
    bare = [tensor for tensor in tensors if BARE in (tensor.codes, tensor.new_codes)]
    if bare := [tensor for tensor in bare if tensor.kind != "equal"]:
        yield (
            f"{_count(len(bare), 'tensor')} of FP8 codes not decoded, as config.json does not say how their scales are "
            f"read (such as {bare[0].name}); restore the config.json that came with the shards"
        )


def _say_scales(tensors: Sequence[TensorDiff]) -> str:
    return f"{_count(len(tensors), 'tensor')} of scales differ; the values that they and the codes make are compared"


def _say_rounding(tensors: Sequence[TensorDiff]) -> str:
    coded: dict[tuple[str | None, str | None], list[TensorDiff]] = defaultdict(list)
    for tensor in tensors:
        coded[tensor.codes, tensor.new_codes].append(tensor)
    return "; ".join(_say_rounding_to(old, new, alike) for (old, new), alike in coded.items())


def _say_rounding_to(old: str | None, new: str | None, tensors: Sequence[TensorDiff]) -> str:
    """Says how much tensors differ by rounding to a dtype, or to codes where either side is stored so."""
    if old is None and new is None:
        return _say_rounding_of_last_place(tensors)
    share = sum(tensor.changed for tensor in tensors) / max(1, sum(tensor.elements for tensor in tensors))
    beyond, units = sum(tensor.beyond for tensor in tensors), max(tensor.units for tensor in tensors)
    both = old is not None and new is not None
    forms = " and ".join(dict.fromkeys(form for form in (old, new) if form))
    allowed = "one step" if both else "half a step"
    size = (
        f"none by more than {allowed} of its grid"
        if not beyond
        else f"{_count(beyond, 'value')} by more than {allowed} of its grid, up to {units:.3g}"
    )
    differ, whose = ("differs", "its") if len(tensors) == 1 else ("differ", "their")
    return f"{_count(len(tensors), 'tensor')} {differ} by rounding to {forms} ({share:.2%} of {whose} values, {size})"


def _say_rounding_of_last_place(tensors: Sequence[TensorDiff]) -> str:
    share = sum(tensor.changed for tensor in tensors) / max(1, sum(tensor.elements for tensor in tensors))
    units = max(tensor.units for tensor in tensors)
    beyond = sum(tensor.beyond for tensor in tensors)
    size = (
        "none by more than one unit in the last place"
        if not beyond
        else f"by up to {units:.3g} units in the last place"
    )
    if not any(tensor.changed for tensor in tensors):
        return f"{_count(len(tensors), 'tensor')} equal in value but not in bytes"
    differ, whose = ("differs", "its") if len(tensors) == 1 else ("differ", "their")
    return f"{_count(len(tensors), 'tensor')} {differ} by rounding only ({share:.2%} of {whose} values, {size})"


def _say_shapes(tensors: Sequence[TensorDiff]) -> str:
    first = tensors[0]
    how = {
        "reshaped": "reshaped, bytes equal",
        "transposed": "transposed, values equal",
        "resized": "resized, common rows equal",
        "other shape": "of another shape",
    }[first.kind]
    return (
        f"{_count(len(tensors), 'tensor')} {how} (such as {first.name}: {list(first.shape)} → {list(first.new_shape)})"
    )


def _say_raw(tensors: Sequence[TensorDiff]) -> str:
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors} | {tensor.new_dtype for tensor in tensors}))
    changed = sum(tensor.changed for tensor in tensors)
    return (
        f"{_count(len(tensors), 'tensor')} of types that are not decoded changed ({dtypes}; {_count(changed, 'value')})"
    )


def _say_nonfinite(tensors: Sequence[TensorDiff]) -> str:
    count = sum(tensor.nonfinite for tensor in tensors)
    return (
        f"{_count(count, 'NaN, infinite or huge value')} in {_count(len(tensors), 'changed tensor')}{_where(tensors)}"
    )


_SENTENCES: Mapping[str, Callable[[Sequence[TensorDiff]], str]] = {
    "ablation": _say_ablation,
    "low-rank": _say_low_rank,
    "scaled": _say_scaled,
    "full-rank": _say_full,
    "vector": _say_vector,
    "sparse": _say_sparse,
    "non-finite": _say_nonfinite,
    "raw": _say_raw,
    "rounding": _say_rounding,
    "scales": _say_scales,
    "reshaped": _say_shapes,
    "transposed": _say_shapes,
    "resized": _say_shapes,
    "other shape": _say_shapes,
}


def _retyped(found: Diff) -> Iterator[str]:
    changes: dict[tuple[str, str], list[TensorDiff]] = defaultdict(list)
    for tensor in found.tensors:
        if tensor.dtype != tensor.new_dtype:
            changes[tensor.codes or tensor.dtype, tensor.new_codes or tensor.new_dtype].append(tensor)
    for (old, new), tensors in changes.items():
        every = not found.equal and len(tensors) == len(found.tensors)
        who = "every tensor" if every else _count(len(tensors), "tensor")
        equal = sum(tensor.kind == "retyped" for tensor in tensors)
        rounded = sum(tensor.kind == "rounding" for tensor in tensors)
        if equal == len(tensors):
            what = ", values equal"
        elif len(tensors) == (unread := sum(tensor.kind == "raw" for tensor in tensors)):
            what = ", values not compared"
        elif equal + rounded == len(tensors):
            what = ", differences are rounding only"
        else:
            beside = f", {unread} not compared" if unread else ""
            what = f", {len(tensors) - equal - rounded - unread} of them changed by more than rounding{beside}"
        yield f"{who} retyped from {old} to {new}{what}"


def _renamed(tensors: Iterable[TensorDiff]) -> Iterator[str]:
    """Says how many tensors were renamed, and which beginning of their names became which where one did for several."""
    renamed = [tensor for tensor in tensors if tensor.name != tensor.new_name]
    if not renamed:
        return
    changes: Counter[tuple[str, str]] = Counter()
    for tensor in renamed:
        ending = common_ending(tensor.name, tensor.new_name)
        starts = (name.split(".") for name in (tensor.name, tensor.new_name))
        one, other = (".".join(parts[: len(parts) - ending]) for parts in starts)
        changes[one, other] += 1
    (old, new), count = changes.most_common(1)[0]
    if count == 1:
        how = f"such as {renamed[0].name} → {renamed[0].new_name}"
    elif old and new:
        how = f"{count} of them from {old}. to {new}."
    else:
        how = f"{count} of them: {old or new}. {'put before' if new else 'taken off'}"
    yield f"{_count(len(renamed), 'tensor')} renamed ({how})"


def _fused(fusions: Iterable[Fusion]) -> Iterator[str]:
    """Says how many tensors were joined and how many were split."""
    fusions = sorted(fusions, key=lambda fusion: fusion.split)
    for split, alike in itertools.groupby(fusions, key=lambda fusion: fusion.split):
        wholes = list(alike)
        parts, equal = sum(len(whole.parts) for whole in wholes), sum(whole.equal for whole in wholes)
        what = "every part equal to the byte" if equal == parts else f"{_count(parts - equal, 'part')} changed as well"
        if split:
            yield f"{_count(len(wholes), 'tensor')} split into {parts}, {what}"
        else:
            yield f"{_count(parts, 'tensor')} joined into {len(wholes)}, {what}"


def _by_tower(names: Iterable[str]) -> Iterator[str]:
    """Counts tensors by what part of a model they belong to."""
    for noun, count in Counter(map(_noun, names)).items():
        yield _count(count, noun, "tensors of scales" if noun == "tensor of scales" else None)


def _noun(name: str) -> str:
    parts = name.split(".")
    if "mtp" in parts:
        return "MTP tensor"
    if any("visual" in part or "vision" in part for part in parts):
        return "vision tensor"
    beside = any(is_beside_codes(".".join(parts[-count:])) for count in (1, 2, 3))
    if beside or re.search(r"_scale(?:_inv)?$", parts[-1]):
        return "tensor of scales"
    return "head tensor" if "lm_head" in parts else "tensor"


def _where(tensors: Sequence[TensorDiff], *, listed: bool = True) -> str:
    """Says in which layers tensors lie, and outside of which."""
    layers = sorted({tensor.layer for tensor in tensors if tensor.layer is not None})
    if not layers:
        names = list(dict.fromkeys(tensor.name for tensor in tensors))
        return f" ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
    outside = sum(tensor.layer is None for tensor in tensors)
    if not listed and not outside and len(layers) > 1:
        return f" in {len(layers)} layers"
    noun = "layers" if len(layers) > 1 else "layer"
    beside = f" and {outside} outside of them" if outside else ""
    return f" in {noun} {layer_ranges(layers, to='–')}{beside}"


def _ranks(tensors: Sequence[TensorDiff]) -> str:
    ranks = sorted({tensor.rank or 0 for tensor in tensors})
    return f"rank-{ranks[0]}" if len(ranks) == 1 else f"rank-{ranks[0]} to rank-{ranks[-1]}"


def _relative(tensors: Sequence[TensorDiff]) -> str:
    sizes = [tensor.relative for tensor in tensors if tensor.relative is not None]
    if not sizes:
        return "relative size unknown"
    low, high = (f"{100 * size:.2g}" for size in (min(sizes), max(sizes)))
    return f"relative size {high} %" if low == high else f"relative size {low} to {high} %"


def _module(name: str) -> str:
    return leaf(name).removesuffix("_proj")


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number} {noun if number == 1 else plural or noun + 's'}"
