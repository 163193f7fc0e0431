"""Finds the tensors of a checkpoint that write to the residual stream, along which axis, and through which gain."""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.absent import PARTS, Absent, counted_by, missing_beside, stated_by
from ablate_shards.surgery.anatomy.advice import advise
from ablate_shards.surgery.anatomy.families import FAMILIES, TIED_BY_DEFAULT, Axis, Component, Family, Layout, Module
from ablate_shards.surgery.anatomy.gains import with_names
from ablate_shards.surgery.anatomy.parts import COMPONENT_OF
from ablate_shards.surgery.anatomy.roles import is_lone_bias, orientation, role_of, split_stack
from ablate_shards.surgery.anatomy.rules import NONE, OR, Hit, Rule, read_gain, sort_out
from ablate_shards.surgery.anatomy.scales import is_beside_codes, is_codes, quantisation_of
from ablate_shards.surgery.anatomy.unsupported import reason_for
from ablate_shards.surgery.anatomy.wrappers import unwrapped
from ablate_shards.surgery.anatomy.writers import Anatomy, LeftOut, Target, Writer
from ablate_shards.surgery.checkpoint.checkpoint import text_part
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = [
    "Anatomy",
    "Axis",
    "Component",
    "LeftOut",
    "Target",
    "Writer",
    "common_ending",
    "dissect",
    "family_names",
    "head_of",
    "is_published_form",
    "marks_prediction",
    "split_layer",
]


_HIDDEN_KEYS = ("hidden_size", "n_embd", "n_embed", "d_model")
#: Of an encoder and a decoder, the decoder's.
_DEPTH_KEYS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer")
_MOST_LAYERS = 99_999
_LAYER = r"(?P<layer>[0-9]{1,5})"
#: Modules of experts, or of all of them, whose stack mlx-lm calls otherwise; those of Gemma lie in the layer itself.
_STACKED = re.compile(r"(?P<home>(?:.+\.)?)(?:experts\.(?:#\.)?(?:down_proj|w2)|(?<=block_sparse_moe\.)output_linear)")
_MTP_ROOT = "mtp."
_MTP_CHILDREN = frozenset({"eh_proj", "enorm", "hnorm", "shared_head", "embed_tokens"})
_MTP_MARK = re.compile(r"(?:eh_proj|enorm|hnorm|shared_head)\.")
_ALL_MODULES = [
    (re.escape(module.leaf), module in layout.embedding)
    for layout in {layout for family in FAMILIES for layout in family.layouts}
    for module in (*layout.attention, *layout.mlp, *layout.embedding)
]
_EMBEDDINGS = rf"(?:{'|'.join(sorted({leaf for leaf, embeds in _ALL_MODULES if embeds}))})"
#: What modules that write are called: the table's, and those of decoders and towers that it does not know.
_WRITER_LIKE = re.compile(
    rf"(?:^|\.)(?:{'|'.join(sorted({leaf for leaf, _ in _ALL_MODULES} - {'linear_attn', 'linear'}))}"
    r"|self_attn\.linear_attn"
    r"|eh_proj|fc|linear_2|linear_fc2|output_linear|proj|wo)(?=\.|$|_bias$|_blocks$|_scales$)"
)
#: After the name of a family that is the first of several that fit.
_LIKE = "-like"
_DESCRIBE = "describe every writer with [[ablate.target]] in a recipe"
_PROJECTOR = re.compile(r"projector|merger|embed_vision|embed_audio")
_ATTENTION = re.compile(r"attn|attention")
_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_IN_LAYER = re.compile(rf"(?P<head>.*?(?:^|\.)(?:layers?|h|blocks?))\.{_LAYER}\.(?P<inner>.+)")


@dataclass(frozen=True, slots=True)
class _Settings:
    """What config.json says of the decoder, the part of it alone before the rest."""

    given: bool
    values: tuple[Mapping[str, Any], ...]

    @property
    def whole(self) -> Mapping[str, Any] | None:
        """All of it."""
        return self.values[-1] if self.values else None

    @property
    def model_type(self) -> str | None:
        found = self.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def hidden_size(self) -> int | None:
        return self._count(_HIDDEN_KEYS, 2**31)

    @property
    def depth(self) -> int | None:
        return self._count(_DEPTH_KEYS, _MOST_LAYERS) or counted_by(self.values)

    def get(self, key: str) -> Any:
        return next((values[key] for values in self.values if values.get(key) is not None), None)

    def _count(self, keys: Iterable[str], most: int) -> int | None:
        for key in keys:
            found = self.get(key)
            if found is None:
                continue
            if isinstance(found, bool) or not isinstance(found, int) or not 1 <= found <= most:
                raise ArchitectureError(f"config.json: expected {key} from 1 to {most}, found {found!r}")
            return found
        return None


def marks_prediction(inner: str) -> bool:
    """Tells whether a tensor, by its name within its layer, is of a layer of multi-token prediction alone."""
    return _MTP_MARK.match(inner) is not None


def split_layer(name: str) -> tuple[int | None, str]:
    """Returns the layer or block a tensor lies in and its name within it; None and the whole name if in none."""
    place = _IN_LAYER.fullmatch(name)
    return (int(place["layer"]), place["inner"]) if place else (None, name)


def common_ending(one: str, other: str) -> int:
    """Counts the parts that two names end with in common."""
    pairs = zip(reversed(one.split(".")), reversed(other.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def family_names() -> tuple[str, ...]:
    """Returns the names of the architectures in the table."""
    return tuple(family.name for family in FAMILIES)


def dissect(
    tensors: Mapping[str, TensorInfo], config: Mapping[str, Any] | None, targets: Sequence[Target] = ()
) -> Anatomy:
    """Finds every tensor that writes to the residual stream, by name.

    Shapes are checked against the hidden size; a shape never decides an axis.

    Args:
        tensors: What the checkpoint holds.
        config: Its config.json, if it has one.
        targets: Descriptions that replace the table.

    Returns:
        The writers, and what looks like one and is not.

    Raises:
        ArchitectureError: The table does not know the architecture, the names do not decide, a target cannot
            be used, or a writer does not have the expected shape.
    """
    settings = _read_settings(config)
    if targets:
        return _dissect_by_targets(tensors, settings, targets)
    stored = {unwrapped(name): name for name in tensors}
    if len(stored) == len(tensors) and any(plain != name for plain, name in stored.items()):
        return _renamed(dissect({plain: tensors[name] for plain, name in stored.items()}, config), stored)
    family = _in_form(_family_of(tensors, settings), tensors)
    for key, value, why in family.layout.refused:
        found = settings.get(key)
        if bool(found) if value is True else found == value:
            raise ArchitectureError(f"{family.name} with {key} = {str(found).lower()} is refused: {why}")
    return _dissect_by_family(tensors, settings, family)


def _renamed(anatomy: Anatomy, names: Mapping[str, str]) -> Anatomy:
    """Returns what was found under plain names under those that are stored, which hold the names of wrappers."""
    wrapped = next(name for plain, name in names.items() if plain != name)
    note = f"names hold those of a wrapper, as in {wrapped}; they are kept, and transformers loads none of them"
    return replace(
        anatomy,
        writers=tuple(
            replace(
                writer,
                name=names[writer.name],
                gain=None if writer.gain is None else with_names(writer.gain, names.__getitem__),
            )
            for writer in anatomy.writers
        ),
        left_out=tuple(replace(item, name=names[item.name]) for item in anatomy.left_out),
        notes=(*anatomy.notes, note),
    )


def _read_settings(config: Mapping[str, Any] | None) -> _Settings:
    if config is None:
        return _Settings(given=False, values=())
    part = text_part(config)
    return _Settings(given=True, values=(config,) if part is None else (part[1], config))


# ---------------------------------------------------------------------------------------- by family


def _family_of(tensors: Mapping[str, TensorInfo], settings: _Settings) -> Family:
    kind = settings.model_type
    if kind is not None:
        for family in FAMILIES:
            if kind in family.model_types:
                return family
        if (why := reason_for(kind)) is not None:
            raise ArchitectureError(
                f"config.json: model_type {kind!r} is refused: {why}; to edit it all the same, describe its writers "
                "with [[ablate.target]] in a recipe: `ablate-shards inspect SOURCE --derive` prints such lines and "
                "says how much of a direction they leave"
            )
        raise _unknown(tensors, settings, f"config.json: the table does not know model_type {kind!r}")
    names = {_NUMBER.sub("#", name) for name in tensors}
    fitting = [
        (family, found)
        for family in FAMILIES
        for layout in family.layouts
        if (found := _modules_by_names(layout, names))
    ]
    marked = [(family, found) for family, found in fitting if family.layout.marks]
    fitting = marked or fitting
    what = "config.json has no model_type" if settings.given else "there is no config.json"
    if not fitting:
        raise _unknown(tensors, settings, f"{what}, and the tensor names are not those of an architecture in the table")
    if len({found for _, found in fitting}) > 1:
        candidates = " and ".join(family.name for family, _ in fitting)
        raise ArchitectureError(
            f"{what}, and the tensor names fit {candidates}, which store or normalise their outputs "
            "differently; put the model's config.json beside the shards"
        )
    first = fitting[0][0]
    return first if len(fitting) == 1 else first._replace(name=first.name + _LIKE)


def _in_form(family: Family, tensors: Iterable[str]) -> Family:
    """Returns the family with the one of its layouts in which the tensors name most, the first where none does."""
    if family.published is None:
        return family
    names = [name for name in tensors if _WRITER_LIKE.search(name)]
    counts = []
    for layout in family.layouts:
        rules = _rules_of(layout)
        counts.append(sum(1 for name in names if _hit(name, rules, frozenset())))
    return family._replace(layout=family.layouts[counts.index(max(counts))])


def is_published_form(tensors: Iterable[str], family: str) -> bool:
    """Tells whether tensors of a family go by the names of its makers, which transformers has no modules of."""
    row = next((row for row in FAMILIES if row.name == family.removesuffix(_LIKE)), None)
    return row is not None and _in_form(row, tensors).layout is row.published


def _modules_by_names(layout: Layout, names: Set[str]) -> frozenset[Module] | None:
    """Returns the modules that would be edited if the names (numbers as ``#``) fit this layout, else None."""
    own = (*layout.attention, *layout.mlp)
    parents = {module.path.split(".")[0] for module in own}
    flat = {module.path for module in layout.embedding} | {
        *layout.beside,
        layout.final,
        "lm_head",
        "embed_out",
    }
    for root in layout.roots:
        prefix = f"{root}{layout.layers}.#."
        inner = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        inner = {name for name in inner if name.split(".")[0] not in _MTP_CHILDREN}
        if not inner or f"{root}{layout.final}.weight" not in names or not inner.issuperset(layout.marks):
            continue
        around = {name.split(".")[0] for name in inner} - parents
        if around not in [set(variant.split()) for variant in layout.around]:
            continue
        outer = {name.removeprefix(root).rpartition(".")[0] for name in names if name.startswith(root)}
        if {name for name in outer if name and "." not in name} - flat:
            continue
        inner = {name for name in inner if name.split(".")[0] not in layout.within}
        found = [_module_of(name, own) for name in inner if _WRITER_LIKE.search(name)]
        modules = frozenset(module for module in found if module is not None)
        if None not in found and modules & {*layout.attention} and modules & {*layout.mlp}:
            return modules
    return None


def _module_of(inner: str, modules: Iterable[Module]) -> Module | None:
    return next((module for module in modules if re.fullmatch(_path_pattern(module), inner)), None)


def _path_pattern(module: Module) -> str:
    if module.path.endswith(".bias"):
        return re.escape(module.path.removesuffix(".bias")) + r"(?P<rest>\.bias)"
    path = r"\.".join(r"[\d#]+" if part == "#" else re.escape(part) for part in module.path.split("."))
    rest = r"(?P<rest>(?:[._].+)?)" if module.fused or module.bare else r"(?P<rest>\..+)"
    return path + rest


def _rules_of(layout: Layout) -> list[Rule]:
    root = rf"(?P<root>{'|'.join(map(re.escape, layout.roots))})"
    roots = "|".join(map(re.escape, (*layout.roots, _MTP_ROOT)))
    layer = rf"(?P<root>{roots}){layout.layers}\.{_LAYER}\."
    parts: tuple[tuple[Component, str, tuple[Module, ...]], ...] = (
        ("attention", layer, layout.attention),
        ("mlp", layer, (*layout.mlp, *_stacked_by_mlx(layout.mlp))),
        ("embedding", root, layout.embedding),
        # Multi-token prediction starts a stream of its own, from the last state and the next token.
        ("embedding", rf"(?P<root>{re.escape(_MTP_ROOT)})", (Module("fc"),)),
        ("embedding", layer, (Module("eh_proj"),)),
    )
    rules = []
    for component, place, modules in parts:
        for module in modules:
            gain, offset = read_gain(module.gain)
            if gain:
                home = "{root}" if place is root else f"{{root}}{layout.layers}.{{layer}}."
                gain = OR.join(one if one == NONE else _placed(one, home) for one in gain.split(OR))
            pattern = re.compile(place + _path_pattern(module))
            unless = module.unless and (
                f"{{root}}{module.unless}" if place is root else f"{{root}}{layout.layers}.{{layer}}.{module.unless}"
            )
            rules.append(Rule(pattern, component, module.axis, gain, offset, module.fused, unless))
    return rules


def _stacked_by_mlx(modules: Iterable[Module]) -> tuple[Module, ...]:
    """Returns the stacks ``[E, d, n]`` that mlx-lm makes of experts among modules, each once."""
    found = {}
    for module in modules:
        if (place := _STACKED.fullmatch(module.path)) is not None:
            home = place["home"]
            path = f"{home}switch_mlp.down_proj" if home else "experts.switch_glu.down_proj"
            found[path] = module._replace(path=path, axis="out", fused=True)
    return tuple(found.values())


def _placed(gain: str, home: str) -> str:
    """Returns a gain of norms in a place as one of tensors."""
    return with_names(gain, lambda norm: f"{home}{norm}.weight")


def _dissect_by_family(tensors: Mapping[str, TensorInfo], settings: _Settings, family: Family) -> Anatomy:
    layout = family.layout
    rules = _rules_of(layout)
    roots = "|".join(map(re.escape, layout.roots))
    in_layer = re.compile(rf"(?P<root>{roots}){layout.layers}\.{_LAYER}\.(?P<inner>.+)")
    places = {name: place for name in tensors if (place := in_layer.fullmatch(name))}
    extra = {int(place["layer"]) for place in places.values() if marks_prediction(place["inner"])}
    depth = settings.depth
    hits: list[Hit] = []
    strays: list[LeftOut] = []
    for name in tensors:
        if _WRITER_LIKE.search(name) is None:
            continue
        hit = _hit(name, rules, extra)
        if hit is None:
            strays.append(_stray(name, family, places.get(name), extra))
        elif hit.layer is not None and not hit.mtp and depth is not None and hit.layer >= depth:
            why = f"config.json counts {depth} layers, so this one is never run"
            strays.append(LeftOut(name, hit.layer, hit.rule.component, why))
        else:
            hits.append(hit)
    homes = {hit.groups["root"]: hit.name for hit in hits if hit.layer is not None and not hit.mtp}
    if not homes:
        raise _unknown(tensors, settings, f"no tensor is named as a writer of {family.name} is")
    if len(homes) > 1:
        first, second = list(homes.values())[:2]
        raise ArchitectureError(
            f"{first} and {second} lie in two decoders, expected one; describe the one to edit with "
            "[[ablate.target]] in a recipe"
        )
    root = next(iter(homes))
    hidden = settings.hidden_size or _length_of(f"{root}{layout.final}.weight", tensors)
    writers, left_out = sort_out(hits, tensors, hidden, quantisation_of(settings.whole))
    # A layer that holds tensors and none that writes is a layer too, so that it is not passed over.
    found = {int(place["layer"]) for place in places.values() if place["root"] == root} - extra
    layers = tuple(range(depth)) if depth is not None else tuple(sorted(found))
    absent, missing = _parts_without_writers(tensors, settings, layers, writers, (*left_out, *strays))
    modules: Mapping[Component, tuple[Module, ...]] = {"attention": layout.attention, "mlp": layout.mlp}
    without = [part for part in PARTS if not modules[part]]
    absent = (
        *(item for item in absent if item.component not in without),
        *(Absent(layer, part, f"{family.name} has none") for part in without for layer in layers),
    )
    missing = tuple(item for item in missing if item.component not in without)
    known = {item.name for item in (*left_out, *strays)} | {hit.name for hit in hits}
    unplaced = {
        name: layer
        for name, layer in _could_write(tensors, {hit.name: hit for hit in hits}, hidden).items()
        if name not in known and layer in layers
    }
    why = f"{family.name} has none of this name, and by its shape it could write to the stream"
    strays += [LeftOut(name, layer, None, why) for name, layer in unplaced.items()]
    return Anatomy(
        family=family.name,
        hidden_size=hidden,
        layers=layers,
        writers=writers,
        left_out=(*left_out, *strays),
        tied=_is_tied(tensors, settings),
        notes=_notes(tensors, settings, (*writers, *left_out, *strays)),
        absent=absent,
        missing=missing,
        unplaced=tuple(unplaced),
    )


def _parts_without_writers(
    tensors: Mapping[str, TensorInfo],
    settings: _Settings,
    layers: Sequence[int],
    writers: Sequence[Writer],
    left_out: Sequence[LeftOut],
) -> tuple[tuple[Absent, ...], tuple[Absent, ...]]:
    """Returns the parts that layers do not have by design, and those that they should have and of which none writes.

    What the configuration says of a layer decides, unless the layer holds tensors that elsewhere never are without
    the writer. Where neither tells, the part is in neither list.
    """
    own = [writer for writer in writers if not writer.mtp and writer.layer is not None and writer.kind == "weight"]
    heads = {place.head for writer in own if (place := split_stack(writer.name))}
    inner: dict[int, set[str]] = {}
    for name in tensors:
        if (place := split_stack(name)) is not None and place.head in heads:
            inner.setdefault(place.layer, set()).add(place.inner)
    there = {(writer.layer, writer.component) for writer in own}
    there |= {(item.layer, item.component) for item in left_out if item.blocked and item.component is not None}
    absent: list[Absent] = []
    missing: list[Absent] = []
    for part in PARTS:
        writing: dict[int, list[str]] = {}
        for writer in own:
            if writer.component == part and (place := split_stack(writer.name)) is not None:
                writing.setdefault(place.layer, []).append(place.inner)
        for layer in layers:
            if (layer, part) in there:
                continue
            said = stated_by(settings.values, layer, part)
            if trace := missing_beside(inner, writing, layer):
                missing.append(Absent(layer, part, f"it holds {trace[0]}, which is never without {trace[1]} elsewhere"))
            elif said is not None:
                (missing if said.has else absent).append(Absent(layer, part, f"config.json: {said.by}"))
    return tuple(absent), tuple(missing)


def _hit(name: str, rules: Iterable[Rule], extra: Set[int]) -> Hit | None:
    for rule in rules:
        if match := rule.pattern.fullmatch(name):
            groups = {key: value for key, value in match.groupdict().items() if value is not None}
            layer = int(groups["layer"]) if "layer" in groups else None
            mtp = groups["root"] == _MTP_ROOT or layer in extra
            rest = groups["rest"]
            return Hit(name, name.removesuffix(rest), rest, rule, groups, layer, mtp)
    return None


def _stray(name: str, family: Family, place: re.Match[str] | None, extra: Set[int]) -> LeftOut:
    layer = int(place["layer"]) if place else None
    mtp = layer in extra or name.startswith(_MTP_ROOT)
    if mtp and ".embed_" in name:
        why = "read through a norm and a projection, not added to the stream"
        return LeftOut(name, layer, "embedding", why, mtp=True)
    if place and not mtp and place["inner"].split(".")[0] in family.layout.within:
        return LeftOut(name, layer, None, "read within its layer, not added to the stream")
    if place or mtp:
        component: Component = "attention" if _ATTENTION.search(name) else "mlp"
        why = f"looks like a writer, but {family.name} has none of this name; {_DESCRIBE}"
        return LeftOut(name, layer, component, why, blocked=True, mtp=mtp)
    if any(re.fullmatch(re.escape(root) + _EMBEDDINGS + r"\.(?:weight|bias)", name) for root in family.layout.roots):
        why = f"looks like an embedding, but {family.name} has none of this name; {_DESCRIBE}"
        return LeftOut(name, None, "embedding", why, blocked=True)
    if _PROJECTOR.search(name):
        return LeftOut(name, None, None, "writes image or sound features in place of token embeddings, which stay")
    return LeftOut(name, None, None, "lies outside the decoder")


# ---------------------------------------------------------------------------------------- by target


def _dissect_by_targets(tensors: Mapping[str, TensorInfo], settings: _Settings, targets: Sequence[Target]) -> Anatomy:
    depth = settings.depth
    hits: dict[str, Hit] = {}
    for target in targets:
        rule = _rule_of(target)
        found = [(name, match) for name in tensors if (match := rule.pattern.fullmatch(name))]
        if not found:
            raise ArchitectureError(
                f"target {target.pattern!r} matches no tensor; it must match whole names, such as "
                f"{next(iter(tensors), 'model.layers.0.mlp.down_proj.weight')}"
            )
        for name, match in found:
            groups = {key: value for key, value in match.groupdict().items() if value is not None}
            layer = _layer_of(target, name, groups)
            mtp = name.startswith(_MTP_ROOT) or (depth is not None and layer is not None and layer >= depth)
            rest = ".bias" if name.endswith("bias") else ".weight"
            hit = Hit(name, name, rest, rule, groups, layer, mtp)
            before = hits.setdefault(name, hit)
            if before.rule._replace(pattern=rule.pattern) != rule:
                raise ArchitectureError(
                    f"{name}: expected one description, found those of targets "
                    f"{before.rule.pattern.pattern!r} and {target.pattern!r}"
                )
    hidden = settings.hidden_size or _residual_length(hits.values(), tensors)
    writers, left_out = sort_out(hits.values(), tensors, hidden, quantisation_of(settings.whole))
    could_write = _could_write(tensors, hits, hidden)
    for name in tensors:
        if name in hits or (name not in could_write and _WRITER_LIKE.search(name) is None):
            continue
        layer = could_write[name] if name in could_write else split_layer(name)[0]
        owner = hits.get(f"{name.removesuffix('bias')}weight") if name.endswith(".bias") else None
        if owner is not None:
            why = "is added to what a target writes, but no target describes it; let a pattern match it too"
            left_out.append(LeftOut(name, owner.layer, owner.rule.component, why, blocked=True, mtp=owner.mtp))
        else:
            why = "no target describes it, and by its shape it could write to the stream"
            left_out.append(LeftOut(name, layer, None, why if name in could_write else "no target describes it"))
    numbers = {hit.layer for hit in hits.values() if hit.layer is not None and not hit.mtp}
    layers = tuple(range(depth)) if depth is not None else tuple(sorted(numbers))
    absent, missing = _parts_without_writers(tensors, settings, layers, writers, left_out)
    absent = (*absent, *_not_described(layers, writers, targets, (*absent, *missing), could_write))
    return Anatomy(
        family="recipe",
        hidden_size=hidden,
        layers=layers,
        writers=writers,
        left_out=tuple(left_out),
        tied=_is_tied(tensors, settings),
        notes=_notes(tensors, settings, (*writers, *left_out)),
        absent=absent,
        missing=missing,
        unplaced=tuple(could_write),
    )


def _could_write(tensors: Mapping[str, TensorInfo], hits: Mapping[str, Hit], hidden: int) -> dict[str, int]:
    """Returns what lies in the layers of the writers, is none of them, and could write by its shape, by layer."""
    inside = (name for name, hit in hits.items() if hit.layer is not None and not hit.mtp)
    heads = {place.head for name in inside if (place := split_stack(name))}
    places = {name: place for name in tensors if (place := split_stack(name)) is not None and place.head in heads}
    stored = orientation(tensors, places)
    return {
        name: place.layer
        for name, place in places.items()
        if name not in hits
        and not _is_beside_codes(name, tensors)
        and (role_of(name, tensors[name].shape, hidden, stored)[0] != "none" or is_lone_bias(name, tensors, hidden))
    }


def _is_beside_codes(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Tells whether a tensor says what the codes of a weight mean."""
    module, _, rest = name.rpartition(".")
    codes = tensors.get(f"{module}.weight")
    return codes is not None and is_codes(codes, ".weight") and is_beside_codes(rest, codes)


def _not_described(
    layers: Iterable[int],
    writers: Iterable[Writer],
    targets: Iterable[Target],
    known: Iterable[Absent],
    could_write: Mapping[str, int],
) -> Iterator[Absent]:
    """Yields the parts that layers do not have as far as shapes tell: a target describes another of their writers."""
    found: dict[int, set[str]] = {}
    for writer in writers:
        if writer.layer is not None and not writer.mtp:
            found.setdefault(writer.layer, set()).add(writer.component)
    told = {(part.layer, part.component) for part in known}
    open_layers = set(could_write.values())
    described = {COMPONENT_OF[target.component] for target in targets}
    for layer in layers:
        for part in PARTS:
            without = part in described and part not in found.get(layer, {part}) and (layer, part) not in told
            if without and layer not in open_layers:
                yield Absent(layer, part, "no target describes one, and no other tensor of the layer could write")


def _rule_of(target: Target) -> Rule:
    try:
        pattern = re.compile(target.pattern)
    except re.error as error:
        raise ArchitectureError(f"target {target.pattern!r} is not a regular expression: {error}") from error
    if target.component != "embedding" and "layer" not in pattern.groupindex:
        raise ArchitectureError(
            f"target {target.pattern!r} has no group for the layer; write its number as (?P<layer>\\d+)"
        )
    gain, offset = read_gain(target.gain or "")
    component = COMPONENT_OF[target.component]
    part = None if target.component == component else target.component
    return Rule(pattern, component, target.axis, gain, offset, part=part)


def _layer_of(target: Target, name: str, groups: Mapping[str, str]) -> int | None:
    if "layer" not in groups:
        return None
    if re.fullmatch(_LAYER, groups["layer"]) is None:
        raise ArchitectureError(
            f"target {target.pattern!r}: expected a number as layer, found {groups['layer']!r} in {name}"
        )
    return int(groups["layer"])


def _residual_length(hits: Iterable[Hit], tensors: Mapping[str, TensorInfo]) -> int:
    for hit in hits:
        shape = tensors[hit.name].shape
        if hit.rest == ".weight" and len(shape) > 1:
            return shape[-2 if hit.rule.axis == "out" else -1]
    raise ArchitectureError("the targets match no matrix, and there is no config.json with the hidden size")


# ---------------------------------------------------------------------------------------- by tensor


def _length_of(name: str, tensors: Mapping[str, TensorInfo]) -> int:
    if name in tensors and len(tensors[name].shape) == 1:
        return tensors[name].shape[0]
    raise ArchitectureError(
        f"the hidden size is not known: there is no config.json with hidden_size, and no {name}; "
        "put the model's config.json beside the shards"
    )


def head_of(tensors: Mapping[str, TensorInfo]) -> str | None:
    """Returns the tensor that is the output head, None where none is stored."""
    return next((name for name in tensors if _HEAD.search(name) and not name.startswith(_MTP_ROOT)), None)


def _is_tied(tensors: Mapping[str, TensorInfo], settings: _Settings) -> bool:
    # The outer configuration ties; one that does not say so leaves it to its class, and a missing head is a tied head.
    said = [values.get("tie_word_embeddings") for values in reversed(settings.values)]
    by_default = settings.model_type in TIED_BY_DEFAULT or head_of(tensors) is None
    return bool(next((tied for tied in said if tied is not None), by_default))


def _notes(
    tensors: Mapping[str, TensorInfo], settings: _Settings, items: Sequence[Writer | LeftOut]
) -> tuple[str, ...]:
    notes = []
    if _is_tied(tensors, settings) and (head := head_of(tensors)) is not None:
        notes.append(
            f"the output head is tied to the token embedding, yet {head} is stored too: where their bytes are equal, "
            "both are edited, otherwise each is a parameter of its own"
        )
    if count := sum(item.mtp for item in items):
        notes.append(
            f"{count} tensors belong to multi-token prediction, which reads the stream and writes to one of its own"
        )
    if any(_PROJECTOR.search(name) for name in tensors):
        notes.append(
            "image or sound features, where they are used, enter the stream through a projector that is not edited"
        )
    return tuple(notes)


def _unknown(tensors: Mapping[str, TensorInfo], settings: _Settings, why: str) -> ArchitectureError:
    """Returns the error that shows the recipe lines describing the checkpoint's own names, and what they leave open."""
    keys = {key for values in settings.values for key in values}
    advice = advise(tensors, settings.hidden_size, settings.depth, keys)
    remarks = "".join(f"; {remark}" for remark in advice.open)
    return ArchitectureError(
        f"{why}; `ablate-shards inspect SOURCE --derive` finds and proves its writers where the installed transformers "
        "knows it, else describe each tensor that writes to the residual stream in a recipe, as in these lines made "
        'from its names and shapes (axis "out" is [hidden, inputs] as in nn.Linear, "in" is [inputs, hidden] as in '
        "Conv1D; where a norm stands between the output and the residual addition, add its gain; where the stream "
        f"itself is normalised or scaled, which names do not show, no edit of writers holds){remarks}:\n\n"
        + "\n\n".join(advice.lines)
    )
