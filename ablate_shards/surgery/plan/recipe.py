"""Reads a recipe: the options of the command line as a TOML file, plus overrides and targets."""

import difflib
import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ablate_shards.errors import RecipeError
from ablate_shards.surgery.anatomy.architecture import Component, Target

__all__ = [
    "COMPONENTS",
    "PRESERVE",
    "TABLES",
    "AblateOptions",
    "Override",
    "Preserve",
    "Recipe",
    "SourceLayer",
    "layer_ranges",
    "parse_components",
    "parse_layers",
    "parse_source_layer",
    "read_recipe",
]

Preserve = Literal["rows", "columns", "none"]
SourceLayer = Literal["best", "own"] | int

COMPONENTS: tuple[Component, ...] = ("attention", "mlp", "embedding")
PRESERVE: tuple[Preserve, ...] = ("rows", "columns", "none")

#: What of ``[directions]`` concerns ``capture`` alone.
_CAPTURE = frozenset({"pairs", "position", "plain", "batch", "dtype", "offload", "device", "memory"})

#: The recipe's tables and their keys; each key is the long name of a flag or argument.
TABLES: Mapping[str, frozenset[str]] = {
    "source": frozenset({"source", "out", "work"}),
    "directions": frozenset({"directions", "activations", "estimator", "rank", "winsorize", "without", *_CAPTURE}),
    "ablate": frozenset(
        {
            "layers",
            "components",
            "coefficient",
            "preserve",
            "biproject",
            "source-layer",
            "mtp",
            "device",
            "memory",
            "jobs",
            "cache",
            "private",
            "link",
            "sync",
            "dry-run",
            "resume",
            "overwrite",
        }
    ),
    "lora": frozenset(
        {
            "data",
            "rank",
            "alpha",
            "dropout",
            "targets",
            "epochs",
            "learning-rate",
            "length",
            "batch",
            "accumulate",
            "seed",
            "evaluation-share",
            "rslora",
            "gradient-checkpointing",
            "keep",
            "keep-weight",
            "keep-length",
            "beta",
            "prefer-weight",
            "patience",
            "dtype",
            "device",
            "scale",
        }
    ),
    "evaluate": frozenset(
        {
            "questions",
            "text",
            "batch",
            "device",
            "dtype",
            "length",
            "thinking",
            "endpoint",
            "endpoint-model",
            "judge",
            "judge-model",
            "timeout",
            "perplexity",
            "divergence",
            "lean",
            "thoughts",
            "tasks",
            "task-limit",
            "task-chat",
        }
    ),
    "gate": frozenset({"gate", "broken", "controls", "kl", "distinct", "detached"}),
    "publish": frozenset({"repo", "private", "create-pr", "revision", "message", "base-model", "card", "replace"}),
}
_EDIT_TABLES = ("source", "directions", "ablate")
_PATHS = frozenset(
    {
        "source",
        "out",
        "work",
        "directions",
        "activations",
        "pairs",
        "without",
        "data",
        "keep",
        "questions",
        "text",
        "card",
    }
)
#: Those that may be lists.
_PATH_LISTS = frozenset({"pairs", "without"})
_SWITCHES = frozenset(
    {
        "biproject",
        "link",
        "sync",
        "dry-run",
        "resume",
        "overwrite",
        "plain",
        "rslora",
        "gradient-checkpointing",
        "thinking",
        "perplexity",
        "divergence",
        "lean",
        "task-chat",
        "gate",
        "private",
        "create-pr",
        "replace",
        "cache",
    }
)
_LISTS = frozenset({"override", "target"})


@dataclass(frozen=True, slots=True)
class Override:
    """What differs for some layers or components; None leaves the general setting.

    Attributes:
        layers: The decoder layers it holds for, all if None.
        components: The components it holds for, all if None.
        coefficient: See ``AblateOptions``, as are the rest.
    """

    layers: frozenset[int] | None = None
    components: tuple[Component, ...] | None = None
    coefficient: float | None = None
    preserve: Preserve | None = None
    biproject: bool | None = None
    source_layer: SourceLayer | None = None


@dataclass(frozen=True, slots=True)
class AblateOptions:
    """What to remove, and how.

    Attributes:
        layers: The decoder layers to edit, every layer with a direction if None.
        components: What to edit in them; ``embedding`` adds the token and position embeddings.
        coefficient: The α of the projection: 1 removes, 2 reflects.
        preserve: Which norms of a weight stay, those of its rows, of its columns, or none.
        biproject: Make the direction orthogonal to the reference means of both layers first.
        source_layer: Where the direction is measured: the edited layer, the best layer, or a number.
        mtp: Whether multi-token-prediction layers are edited.
        overrides: Exceptions, later ones win.
        targets: Writers described by the user, instead of the architecture table.
    """

    layers: frozenset[int] | None = None
    components: tuple[Component, ...] = ("attention", "mlp")
    coefficient: float = 1.0
    preserve: Preserve = "rows"
    biproject: bool = True
    source_layer: SourceLayer = "own"
    mtp: Literal["keep", "edit"] = "keep"
    overrides: tuple[Override, ...] = ()
    targets: tuple[Target, ...] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe as read.

    Attributes:
        tables: Per table, values by flag name as a user would type them; paths are relative to the recipe, and
            several of one key are a tuple.
        overrides: The ``[[ablate.override]]`` entries.
        targets: The ``[[ablate.target]]`` entries.
    """

    tables: Mapping[str, Mapping[str, Any]]
    overrides: tuple[Override, ...]
    targets: tuple[Target, ...]

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


def parse_components(text: str | Sequence[str]) -> tuple[Component, ...]:
    """Returns the components that ``attention,mlp`` (or a list of names) names, in their usual order.

    Raises:
        ValueError: A name is not a component.
    """
    names = text.split(",") if isinstance(text, str) else [str(part) for part in text]
    names = [name.strip() for name in names]
    for name in names:
        if name not in COMPONENTS:
            raise ValueError(f"expected some of {', '.join(COMPONENTS)}, found {name!r}")
    return tuple(component for component in COMPONENTS if component in names)


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
    overrides: list[Override] = []
    targets: list[Target] = []
    for table, entries in content.items():
        _known(path, "table", table, TABLES)
        if not isinstance(entries, dict):
            raise RecipeError(f"{path}: {table}: expected a table, found {entries!r}")
        flags: dict[str, Any] = {}
        tables[table] = flags
        for raw_key, value in entries.items():
            key = raw_key.replace("_", "-")
            if table == "ablate" and key in _LISTS:
                if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
                    raise RecipeError(f"{path}: write {key} as [[ablate.{key}]]")
                for item in value:
                    if key == "override":
                        overrides.append(_override(path, item))
                    else:
                        targets.append(_target(path, item))
                continue
            _known(path, f"key in [{table}]", key, TABLES[table] | (_LISTS if table == "ablate" else set()))
            if isinstance(value, bool) != (key in _SWITCHES):
                wanted = "true or false" if key in _SWITCHES else "a value"
                raise RecipeError(f"{path}: [{table}] {key}: expected {wanted}, found {json.dumps(value)}")
            if isinstance(value, dict):
                raise RecipeError(f"{path}: [{table}] {key}: expected a value, found a table")
            if key in _PATH_LISTS:
                flags[key] = _paths(path, table, key, value)
                continue
            if key in _PATHS:
                if not isinstance(value, str):
                    raise RecipeError(f"{path}: [{table}] {key}: expected a path, found {value!r}")
                value = _located(path, key, value)
            if (table, key) == ("evaluate", "tasks"):
                names = value if isinstance(value, list) else str(value).split(",")
                value = [str(path.parent / name) if _is_file_of_tasks(name) else name for name in map(str, names)]
            flags[key] = ",".join(map(str, value)) if isinstance(value, list) else value
    made = tables.get("directions", {})
    if "without" in made and "directions" in made:
        raise RecipeError(
            f"{path}: [directions] without is about pairs or activations, but directions names directions that are "
            "computed already; remove one of the two"
        )
    return Recipe(tables, tuple(overrides), tuple(targets))


def _paths(recipe: Path, table: str, key: str, value: Any) -> tuple[str, ...]:
    """Returns one path or several, as they are from where the recipe lies."""
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(each, str) for each in found):
        raise RecipeError(f"{recipe}: [{table}] {key}: expected a path or a list of paths, found {json.dumps(value)}")
    paths = tuple(_located(recipe, key, each) for each in found)
    if len(set(paths)) < len(paths):
        raise RecipeError(f"{recipe}: [{table}] {key}: names a file twice; name each once")
    return paths


def _is_file_of_tasks(name: str) -> bool:
    return "/" in name or name.endswith((".yaml", ".yml"))


def _located(recipe: Path, key: str, value: str) -> str:
    """Makes a path relative to the recipe; a place on the Hub or a URL stays what it is."""
    path = recipe.parent / Path(value).expanduser()
    elsewhere = key in ("source", "out") and re.match(r"\w{2,}:", value)
    hub_id = key == "source" and not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", value)
    return value if elsewhere or hub_id else str(path)


def _override(path: Path, item: Mapping[str, Any]) -> Override:
    where = f"{path}: [[ablate.override]]"
    readers: Mapping[str, Callable[[Any], Any]] = {
        "layers": parse_layers,
        "components": parse_components,
        "coefficient": _number,
        "preserve": lambda value: _one_of(value, PRESERVE),
        "biproject": _boolean,
        "source-layer": parse_source_layer,
    }
    return Override(**_read_item(path, where, item, readers))


def _target(path: Path, item: Mapping[str, Any]) -> Target:
    where = f"{path}: [[ablate.target]]"
    readers: Mapping[str, Callable[[Any], Any]] = {
        "pattern": _text,
        "component": lambda value: _one_of(value, COMPONENTS),
        "axis": lambda value: _one_of(value, ("out", "in")),
        "gain": _text,
    }
    values = _read_item(path, where, item, readers)
    if missing := {"pattern", "component", "axis"} - values.keys():
        raise RecipeError(f"{where}: needs {' and '.join(sorted(missing))}")
    return Target(**values)


def _read_item(
    path: Path, where: str, item: Mapping[str, Any], readers: Mapping[str, Callable[[Any], Any]]
) -> dict[str, Any]:
    values = {}
    for raw_key, value in item.items():
        key = raw_key.replace("_", "-")
        _known(path, f"key in {where.removeprefix(f'{path}: ')}", key, readers)
        try:
            values[key.replace("-", "_")] = readers[key](value)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"{where} {key}: {error}") from error
    return values


def _known(path: Path, what: str, found: str, known: Mapping[str, Any] | frozenset[str]) -> None:
    if found not in known:
        nearest = difflib.get_close_matches(found, known, n=1, cutoff=0.0)[0]
        raise RecipeError(f"{path}: unknown {what}: {found!r}; the nearest known one is {nearest!r}")


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {value!r}")
    return float(value)


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {value!r}")
    return value


def _one_of(value: Any, allowed: Sequence[str]) -> Any:
    if value not in allowed:
        raise ValueError(f"expected one of {', '.join(allowed)}, found {value!r}")
    return value
