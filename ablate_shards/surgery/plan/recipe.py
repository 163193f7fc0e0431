"""Reads a recipe: the options of the command line as a TOML file, plus overrides and targets."""

import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from ablate_shards.errors import RecipeError
from ablate_shards.surgery.anatomy.architecture import Component, Target
from ablate_shards.surgery.anatomy.parts import COMPONENT_OF, Part
from ablate_shards.surgery.plan.profile import Profile
from ablate_shards.validation import checked, unknown

__all__ = [
    "COMPONENTS",
    "TABLES",
    "AblateOptions",
    "Override",
    "Preserve",
    "Recipe",
    "Rounding",
    "SourceLayer",
    "layer_ranges",
    "parse_components",
    "parse_layers",
    "parse_parts",
    "parse_source_layer",
    "read_recipe",
]

_Item = TypeVar("_Item")

Preserve = Literal["rows", "columns", "none"]
Rounding = Literal["directed", "nearest"]
SourceLayer = Literal["best", "own"] | int | float

COMPONENTS: tuple[Component, ...] = ("attention", "mlp", "embedding")

_Switch = bool
_Word = str | int | float
_Value = Annotated[_Word | list[_Word], Meta(description="a value")]
_File = Annotated[str, Meta(description="a path")]
_Files = Annotated[_File | Annotated[list[_File], Meta(min_length=1)], Meta(description="a path or a list of paths")]

#: What of ``[directions]`` concerns ``capture`` alone.
_CAPTURE = frozenset(
    {"pairs", "position", "plain", "batch", "dtype", "offload", "device", "memory", "engine", "workers"}
)

#: The recipe's tables, and what their keys hold; each key is the long name of a flag or argument.
TABLES: Mapping[str, Mapping[str, Any]] = {
    "source": dict.fromkeys(("source", "out", "work"), _File),
    "directions": {
        **dict.fromkeys(("directions", "activations"), _File),
        **dict.fromkeys(("pairs", "without"), _Files),
        **dict.fromkeys(("estimator", "rank", "winsorize"), _Value),
        **dict.fromkeys(("position", "batch", "dtype", "offload", "device", "memory", "engine", "workers"), _Value),
        "plain": _Switch,
    },
    "ablate": {
        **dict.fromkeys(
            ("layers", "components", "coefficient", "preserve", "source-layer", "mtp", "dequantise", "rounding"), _Value
        ),
        **{"adapter": _Switch, "adapter-rank": _Value},
        **dict.fromkeys(("device", "memory", "jobs"), _Value),
        **dict.fromkeys(
            ("biproject", "cache", "private", "link", "sync", "dry-run", "resume", "overwrite", "force"), _Switch
        ),
    },
    "lora": {
        **dict.fromkeys(("data", "keep"), _File),
        **dict.fromkeys(("rank", "alpha", "dropout", "targets", "epochs", "learning-rate", "length", "batch"), _Value),
        **dict.fromkeys(("accumulate", "seed", "evaluation-share", "keep-weight", "keep-length", "beta"), _Value),
        **dict.fromkeys(("prefer-weight", "patience", "dtype", "device", "scale"), _Value),
        **dict.fromkeys(("rslora", "gradient-checkpointing"), _Switch),
    },
    "search": {
        **dict.fromkeys(("questions", "without"), _Files),
        "report-questions": _File,
        **dict.fromkeys(("trials", "timeout", "seed", "objective", "kl", "controls", "broken"), _Value),
        **dict.fromkeys(("subject", "limit"), _Value),
        **dict.fromkeys(("choose", "front", "length", "batch", "dtype", "device", "memory", "jobs"), _Value),
        **dict.fromkeys(("engine", "workers"), _Value),
    },
    "evaluate": {
        **dict.fromkeys(("questions", "text"), _File),
        **dict.fromkeys(("batch", "device", "dtype", "length", "endpoint", "endpoint-model", "judge"), _Value),
        **dict.fromkeys(("judge-model", "timeout", "thoughts", "tasks", "task-limit", "engine", "workers"), _Value),
        **dict.fromkeys(("thinking", "perplexity", "divergence", "lean", "task-chat"), _Switch),
    },
    "gate": {**dict.fromkeys(("broken", "controls", "kl", "distinct", "detached"), _Value), "gate": _Switch},
    "publish": {
        **dict.fromkeys(("repo", "revision", "message", "base-model"), _Value),
        **dict.fromkeys(("private", "create-pr", "replace"), _Switch),
        "card": _File,
    },
}
#: The parts that a profile may be of: embeddings lie at no depth.
_PROFILED: tuple[Part, ...] = tuple(part for part, component in COMPONENT_OF.items() if component != "embedding")
_EDIT_TABLES = ("source", "directions", "ablate")
#: The lists of tables in ``[ablate]``.
_LISTS = ("override", "profile", "target")


@dataclass(frozen=True, slots=True)
class Override:
    """What differs for some layers or components; None leaves the general setting.

    Attributes:
        layers: The decoder layers it holds for, all if None.
        components: The components, or parts of them, that it holds for; all if None.
        coefficient: See ``AblateOptions``, as are the rest.
    """

    layers: frozenset[int] | None = None
    components: tuple[Part, ...] | None = None
    coefficient: float | None = None
    preserve: Preserve | None = None
    biproject: bool | None = None
    source_layer: SourceLayer | None = None


@dataclass(frozen=True, slots=True)
class AblateOptions:
    """What to remove, and how.

    Attributes:
        layers: The decoder layers to edit; if None, every layer with a direction, or all where ``source_layer`` names
            the only one.
        components: What to edit in them; ``embedding`` adds the token and position embeddings.
        coefficient: The α of the projection: 1 removes, 2 reflects.
        preserve: Which norms of a weight stay, those of its rows, of its columns, or none.
        biproject: Make the direction orthogonal to the reference means of both layers first.
        source_layer: Where the direction is measured: the edited layer, the best layer, or a number, which may lie
            between two layers.
        mtp: Whether multi-token-prediction layers are edited.
        rounding: How the codes of quantised weights are chosen: so that rounding does not undo the edit, or the nearest
            ones, to see what those undo.
        profiles: Coefficients over depth, which win over ``coefficient``; later ones win.
        overrides: Exceptions to all of it, later ones win.
        targets: Writers described by the user, instead of the architecture table.
    """

    layers: frozenset[int] | None = None
    components: tuple[Part, ...] = ("attention", "mlp")
    coefficient: float = 1.0
    preserve: Preserve = "rows"
    biproject: bool = True
    source_layer: SourceLayer = "own"
    mtp: Literal["keep", "edit"] = "keep"
    rounding: Rounding = "directed"
    profiles: tuple[Profile, ...] = ()
    overrides: tuple[Override, ...] = ()
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as read.

    Attributes:
        tables: Per table, values by flag name as a user would type them; paths are relative to the recipe, and
            several of one key are a tuple.
        profiles: The ``[[ablate.profile]]`` entries.
        overrides: The ``[[ablate.override]]`` entries.
        targets: The ``[[ablate.target]]`` entries.
        space: The ``[search.space]`` table.
    """

    tables: Mapping[str, Mapping[str, Any]]
    profiles: tuple[Profile, ...] = ()
    overrides: tuple[Override, ...] = ()
    targets: tuple[Target, ...] = ()
    space: Mapping[str, Any] = field(default_factory=dict)

    @property
    def edit_flags(self) -> Mapping[str, Any]:
        """What concerns the ablation: the flags of ``ablate``."""
        tables = {table: self.tables.get(table, {}) for table in _EDIT_TABLES}
        return {
            key: value
            for table, entries in tables.items()
            for key, value in entries.items()
            if table != "directions" or key not in _CAPTURE
        }


def parse_layers(text: str | int | Sequence[int]) -> frozenset[int]:
    """Returns the layers that ``1-23,30`` (or a list of numbers) names.

    Raises:
        ValueError: The text is not a list of numbers and ranges.
    """
    parts = str(text).split(",") if isinstance(text, str | int) else [str(part) for part in text]
    layers: set[int] = set()
    for part in parts:
        match = re.fullmatch(r"\s*(\d{1,5})\s*(?:-\s*(\d{1,5})\s*)?", part)
        if match is None or (match[2] is not None and int(match[2]) < int(match[1])):
            raise ValueError(f"expected numbers and ranges such as 1-23,30, found {part.strip()!r}")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)


def layer_ranges(layers: Iterable[int], *, to: str = "-", between: str = ", ") -> str:
    """Returns layers as the ranges they form, such as ``1-23, 30``; what :func:`parse_layers` reads.

    Args:
        layers: The layers, in any order.
        to: What stands between the ends of a range.
        between: What stands between ranges.
    """
    runs: list[list[int]] = []
    for layer in sorted(set(layers)):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return between.join(f"{low}" if low == high else f"{low}{to}{high}" for low, high in runs)


def parse_components(text: str | Sequence[str]) -> tuple[Part, ...]:
    """Returns the components, or parts of them, that ``attention,mlp`` or a list names, in their usual order.

    Raises:
        ValueError: A name is neither.
    """
    return _parse_parts(text, tuple(COMPONENT_OF))


def parse_parts(text: str | Sequence[str]) -> tuple[Part, ...]:
    """Returns the parts of a layer that a name or a list of names names.

    Raises:
        ValueError: A name is no part.
    """
    return _parse_parts(text, _PROFILED)


def _parse_parts(text: str | Sequence[str], known: Sequence[Part]) -> tuple[Part, ...]:
    names = [name.strip() for name in (text.split(",") if isinstance(text, str) else map(str, text))]
    names = [_plain_part(name) for name in names]
    for name in names:
        if name not in known:
            raise ValueError(f"expected some of {', '.join(known)}, found {name!r}")
    return tuple(part for part in known if part in names)


def _plain_part(name: Any) -> Any:
    """Returns a part by the name that the code has for it."""
    return "routed-experts" if name == "experts" else name


def parse_source_layer(text: str | int) -> SourceLayer:
    """Returns the source layer that ``best``, ``own`` or a number names.

    Raises:
        ValueError: The text is none of them.
    """
    match str(text):
        case "best":
            return "best"
        case "own":
            return "own"
        case number if re.fullmatch(r"\d{1,5}", number):
            return int(number)
        case number if re.fullmatch(r"\d{1,5}\.\d{1,6}", number):
            return int(float(number)) if float(number).is_integer() else float(number)
    raise ValueError(f"expected best, own or a layer number, found {text!r}")


def read_recipe(path: Path) -> Recipe:
    """Reads a TOML recipe and checks every key.

    Args:
        path: The file. Paths in it are relative to its folder.

    Raises:
        RecipeError: The file is not TOML, or names a table or key that does not exist, or holds a value
            of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RecipeError(f"{path}: the recipe does not exist") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not valid TOML ({error})") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror})") from error
    tables: dict[str, dict[str, Any]] = {}
    lists: dict[str, list[Any]] = {name: [] for name in _LISTS}
    space: Mapping[str, Any] = {}
    for table, entries in content.items():
        if table not in TABLES:
            raise RecipeError(f"{path}: {unknown(table, TABLES, 'table:')}")
        if not isinstance(entries, dict):
            raise RecipeError(f"{path}: {table}: expected a table, found {entries!r}")
        flags = tables[table] = {}
        for raw_key, value in entries.items():
            key = raw_key.replace("_", "-")
            if table == "ablate" and key in _LISTS:
                if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                    raise RecipeError(f"{path}: write {key} as [[ablate.{key}]]")
                lists[key] += [_read_item(path, key, item, _KINDS[key]) for item in value]
                continue
            if table == "search" and key == "space":
                if not isinstance(value, dict):
                    raise RecipeError(f"{path}: write space as [search.space]")
                space = value
                continue
            flags[key] = _read_flag(path, table, key, value)
    made = tables.get("directions", {})
    if "without" in made and "directions" in made:
        raise RecipeError(
            f"{path}: [directions] without is about pairs or activations, but directions names directions that are "
            "computed already; remove one of the two"
        )
    for profile in lists["profile"]:
        if not profile.reach > 0:
            raise RecipeError(
                f"{path}: [[ablate.profile]]: reach: expected more than 0 layers, found {profile.reach:g}"
            )
    profiles, overrides, targets = (tuple(lists[name]) for name in ("profile", "override", "target"))
    return Recipe(tables, profiles, overrides, targets, space)


def _read_flag(recipe: Path, table: str, key: str, value: Any) -> Any:
    """Returns a value as a user would type it; paths are as they are from where the recipe lies."""
    known = TABLES[table]
    if key not in known:
        keys = (*known, *_LISTS) if table == "ablate" else known
        raise RecipeError(f"{recipe}: {unknown(key, keys, f'key in [{table}]:')}")
    where = f"[{table}] {key}"
    try:
        value = checked(value, known[key], where)
    except ValueError as error:
        raise RecipeError(f"{recipe}: {error}") from error
    if known[key] is _File:
        return _located(recipe, key, value)
    if known[key] is _Files:
        paths = tuple(_located(recipe, key, each) for each in (value if isinstance(value, list) else [value]))
        if len(set(paths)) < len(paths):
            raise RecipeError(f"{recipe}: {where}: names a file twice; name each once")
        return paths
    if (table, key) == ("evaluate", "tasks"):
        names = value if isinstance(value, list) else str(value).split(",")
        value = [str(recipe.parent / name) if _is_file_of_tasks(name) else name for name in map(str, names)]
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _is_file_of_tasks(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _located(recipe: Path, key: str, value: str) -> str:
    """Makes a path relative to the recipe; a place on the Hub or a URL stays what it is."""
    path = recipe.parent / Path(value).expanduser()
    elsewhere = key in ("source", "out") and re.match(r"\w{2,}:", value)
    hub_id = key == "source" and not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", value)
    return value if elsewhere or hub_id else str(path)


#: What the entries of each list are, and how those of their keys are read that may be written in several ways.
_KINDS: Mapping[str, type[Any]] = {"override": Override, "profile": Profile, "target": Target}
_READERS: Mapping[type[Any], Mapping[str, Callable[[Any], Any]]] = {
    Override: {"layers": parse_layers, "components": parse_components, "source_layer": parse_source_layer},
    Profile: {"components": parse_parts},
    Target: {"component": _plain_part},
}


def _read_item(path: Path, table: str, item: Mapping[str, Any], kind: type[_Item]) -> _Item:
    where = f"{path}: [[ablate.{table}]]"
    values = {}
    for raw_key, value in item.items():
        key = raw_key.replace("-", "_")
        try:
            values[key] = _READERS[kind][key](value) if key in _READERS[kind] else value
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where}: {raw_key}: {error}") from error
    try:
        return checked(values, kind, closed=(kind,))
    except ValueError as error:
        raise RecipeError(f"{where}: {error}") from error
