"""What a search may vary, and which edit one point of it is."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ablate_shards.errors import UsageError
from ablate_shards.surgery.anatomy.architecture import Component
from ablate_shards.surgery.anatomy.parts import COMPONENT_OF, Part
from ablate_shards.surgery.plan.profile import Profile
from ablate_shards.surgery.plan.recipe import COMPONENTS, AblateOptions, Preserve, SourceLayer, parse_layers
from ablate_shards.validation import shown, unknown

if TYPE_CHECKING:
    from optuna.trial import Trial

__all__ = ["Choice", "Edit", "Number", "Setting", "Space", "make_space"]

#: A point of a space: each parameter's value, by its name.
Setting = Mapping[str, Any]

#: How fine numbers are: finer ones tell nothing, and a recipe is read by people.
_STEPS = {"peak": 0.01, "floor": 0.01, "place": 0.1, "reach": 0.1, "source-layer": 0.1}
_MOST_PEAK = 2.0
_PRESERVE: tuple[Preserve, ...] = get_args(Preserve)
_MOST_FLOOR = 1.5
#: From where in the stack on one layer's direction is looked for, if all take it from there. The last layer is among
#: them: what a model decides late is not to be seen before.
_FIRST_SOURCE = 0.3
#: The coefficients that are tried first. To remove a direction may not suffice where a model does not decide at 0.
_FIRST = (1.0, 1.25)


@dataclass(frozen=True, slots=True)
class Number:
    """A number between two, both included, in steps."""

    low: float
    high: float
    step: float

    @property
    def quarters(self) -> tuple[float, ...]:
        """What divides it into four."""
        return tuple(self.low + part / 4 * (self.high - self.low) for part in (1, 2, 3))


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some values."""

    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Edit:
    """The edit that a setting is.

    Attributes:
        contrast: The directions, by name.
        rank: How many of each layer's directions.
        without: The directions that are taken out of them first, by name, if any.
        options: How they are removed.
    """

    contrast: str
    rank: int | None
    without: str | None
    options: AblateOptions


@dataclass(frozen=True, slots=True)
class Space:
    """What varies, and what is fixed.

    Attributes:
        parameters: What varies, by name; a value that is fixed is a choice of one.
        parts: The parts of the model that are edited, each by a profile of its own.
    """

    parameters: Mapping[str, Number | Choice]
    parts: tuple[Part, ...]

    @property
    def free(self) -> tuple[str, ...]:
        """The parameters that have more than one value."""
        own = self.parameters["source"] == Choice(("own",))
        unused = {"source-layer"} if own else set()
        return tuple(name for name, values in self.parameters.items() if name not in unused and not _is_fixed(values))

    def suggest(self, trial: "Trial") -> Setting:
        """Returns the setting that a sampler proposes."""
        setting: dict[str, Any] = {}
        for name, values in self.parameters.items():
            if name == "source-layer" and setting.get("source") == "own":
                continue
            if _is_fixed(values):
                setting[name] = values.values[0] if isinstance(values, Choice) else values.low
            elif isinstance(values, Choice):
                setting[name] = trial.suggest_categorical(name, values.values)
            else:
                setting[name] = round(trial.suggest_float(name, values.low, values.high, step=values.step), 6)
        return setting

    def edit(self, setting: Setting) -> Edit:
        """Returns the edit that a setting is."""
        profiles = tuple(
            Profile(
                components=(part,),
                **{name: float(setting[f"{part}.{name}"]) for name in ("peak", "place", "reach", "floor")},
            )
            for part in self.parts
        )
        several = "+" in setting["contrast"] or setting["rank"] > 1
        source: SourceLayer = "own"
        if setting["source"] == "one":
            # Between two layers there is no telling which of several directions belong together.
            source = _whole(round(setting["source-layer"]) if several else setting["source-layer"])
        layers = setting["layers"]
        return Edit(
            contrast=setting["contrast"],
            rank=setting["rank"],
            without=None if setting["without"] == "none" else setting["without"],
            options=AblateOptions(
                layers=None if layers == "all" else parse_layers(layers),
                components=_components(self.parts),
                # Of the parts that the space leaves out.
                coefficient=0.0,
                preserve=setting["preserve"],
                biproject=setting["biproject"],
                source_layer=source,
                profiles=profiles,
            ),
        )

    def plain(self) -> Setting:
        """Returns the setting that is compared with: own layer, coefficient 1, as far as the space has it."""
        return self._alike(1.0)

    def _alike(self, coefficient: float) -> Setting:
        """Returns the setting with each layer's own direction and one coefficient, as far as the space has it."""
        wanted = {"source": "own", "preserve": "rows", "biproject": True, "without": "none", "layers": "all"}
        found: dict[str, Any] = {}
        for name, values in self.parameters.items():
            leaf = name.rpartition(".")[2]
            nearest = coefficient if leaf in ("peak", "floor") else math.inf if leaf == "reach" else 0.0
            if isinstance(values, Number):
                found[name] = _on_step(min(max(nearest, values.low), values.high), values)
            else:
                found[name] = wanted[name] if wanted.get(name) in values.values else values.values[0]
        if found["source"] == "own":
            found.pop("source-layer", None)
        return found

    def starts(self, best: Mapping[str, Sequence[int]]) -> tuple[Setting, ...]:
        """Returns what is tried first: each contrast alike at all depths, from each layer's own direction and from one.

        A sampler that meets one of two sources only with odd profiles at first gives it up. The layer that separates
        best need not be the one whose direction costs least, so that others are tried as well.

        Args:
            best: The layers of contrasts that are worth a try as the source of all, as far as these are known.
        """
        plain = self.plain()
        tried = [plain]
        layers, sources = self.parameters["source-layer"], _values(self.parameters["source"])
        for coefficient in _FIRST:
            alike = self._alike(coefficient)
            for contrast in _values(self.parameters["contrast"]):
                common = {name: value for name, value in alike.items() if name != "source-layer"}
                common["contrast"] = contrast
                if "own" in sources and "+" not in contrast:
                    tried.append({**common, "source": "own"})
                if "one" in sources and isinstance(layers, Number) and contrast in best:
                    among = layers.quarters if coefficient == _FIRST[0] else ()
                    for layer in (*best[contrast], *among):
                        near = _on_step(min(max(float(layer), layers.low), layers.high), layers)
                        tried.append({**common, "source": "one", "source-layer": near})
        return tuple(setting for number, setting in enumerate(tried) if setting not in tried[:number])

    def as_dict(self) -> dict[str, Any]:
        """Returns the space as JSON types, as a recipe writes it."""
        return {
            name: list(values.values) if isinstance(values, Choice) else [values.low, values.high]
            for name, values in self.parameters.items()
        }


def make_space(
    table: Mapping[str, Any],
    where: str,
    *,
    contrasts: Sequence[str],
    without: Sequence[str],
    rank: int,
    layers: int,
    sources: Sequence[int],
    parts: Sequence[Part],
) -> Space:
    """Makes the space of a model, with what a recipe says of it.

    Args:
        table: The recipe's ``[search.space]``: for each parameter one value, which fixes it, two numbers, between
            which it is searched, or a list of choices. A part of the model has a table of its own, or ``false``.
        where: What to call the table in errors.
        contrasts: The names of the directions that there are.
        without: The names of those that can be taken out.
        rank: How many directions there are per layer, at most.
        layers: How many layers the model has.
        sources: The layers that there are directions of.
        parts: The parts that write to its residual stream.

    Raises:
        UsageError: A parameter is unknown, a range is upside down, or there is nothing to choose from.
    """
    last, first_source, last_source = layers - 1, min(sources), min(max(sources), layers - 1)
    usual: dict[str, Number | Choice] = {
        "contrast": Choice(tuple(contrasts)),
        "source": Choice(("own", "one")),
        "source-layer": Number(
            float(min(max(round(_FIRST_SOURCE * last, 1), first_source), last_source)),
            float(last_source),
            _STEPS["source-layer"],
        ),
        "preserve": Choice(("rows",)),
        "rank": Choice((rank,)),
        "without": Choice(("none", *without)),
        "biproject": Choice((True,)),
        "layers": Choice(("all",)),
    }
    profile = {
        "peak": Number(0.0, _MOST_PEAK, _STEPS["peak"]),
        "place": Number(0.0, float(last), _STEPS["place"]),
        "reach": Number(1.0, float(layers), _STEPS["reach"]),
        "floor": Number(0.0, _MOST_FLOOR, _STEPS["floor"]),
    }
    for key in table:
        if key not in usual and key not in parts:
            raise UsageError(f"{where}: {unknown(key, [*usual, *parts])}")
    kept = [part for part in parts if table.get(part) is not False]
    if not kept:
        raise UsageError(
            f"{where}: leaves out every part of the model ({', '.join(parts)}), so there is nothing to edit"
        )
    parameters = {
        name: _read(table[name], values, f"{where}: {name}") if name in table else values
        for name, values in usual.items()
    }
    for part in kept:
        given = table.get(part, {})
        if not isinstance(given, Mapping):
            raise UsageError(
                f"{where}: {part}: expected a table with {', '.join(profile)}, or false, found {shown(given)}"
            )
        for key in given:
            if key not in profile:
                raise UsageError(f"{where}: {part}: {unknown(key, profile)}")
        for name, values in profile.items():
            read = _read(given[name], values, f"{where}: {part}: {name}") if name in given else values
            if name == "reach" and not min(_values(read)) > 0:
                raise UsageError(f"{where}: {part}: reach: expected more than 0 layers, found {shown(given[name])}")
            parameters[f"{part}.{name}"] = read
    known = {"contrast": contrasts, "without": ("none", *without), "preserve": _PRESERVE, "source": ("own", "one")}
    for name, allowed in known.items():
        for value in _values(parameters[name]):
            if value not in allowed:
                raise UsageError(f"{where}: {name}: expected some of {', '.join(allowed)}, found {shown(value)}")
    for value in _values(parameters["rank"]):
        if not isinstance(value, int) or not 1 <= value <= rank:
            raise UsageError(f"{where}: rank: the directions have {rank} per layer, found {shown(value)}")
    if not all(first_source <= value <= last_source for value in _values(parameters["source-layer"])):
        raise UsageError(
            f"{where}: source-layer: the directions have layers from {first_source} to {last_source}, found "
            f"{shown(table['source-layer'])}"
        )
    for value in _values(parameters["layers"]):
        if value != "all":
            try:
                beyond = max(parse_layers(value)) > last
            except (ValueError, TypeError) as error:
                raise UsageError(f"{where}: layers: {error}, or all") from error
            if beyond:
                raise UsageError(f"{where}: layers: the model has layers from 0 to {last}, found {shown(value)}")
    space = Space(parameters, tuple(kept))
    if not space.free:
        raise UsageError(f"{where}: fixes every parameter, so there is nothing to search; edit with `ablate --recipe`")
    return space


def _read(given: Any, usual: Number | Choice, where: str) -> Number | Choice:
    """Returns what a recipe says of one parameter.

    Raises:
        UsageError: It says nothing that the parameter can be.
    """
    if isinstance(usual, Choice):
        values = tuple(given) if isinstance(given, list) else (given,)
        if not values or len(set(map(str, values))) < len(values):
            raise UsageError(f"{where}: expected values to choose from, each once, found {shown(given)}")
        return Choice(values)
    numbers = given if isinstance(given, list) else [given, given]
    if len(numbers) != 2 or not all(isinstance(each, int | float) and not isinstance(each, bool) for each in numbers):
        raise UsageError(f"{where}: expected a number, or two between which it lies, found {shown(given)}")
    low, high = map(float, numbers)
    if not math.isfinite(low) or not math.isfinite(high) or low > high:
        raise UsageError(f"{where}: expected the smaller number first, found {shown(given)}")
    # The sampler counts steps from the low end, and the last one has to be there.
    return Number(low, round(low + math.floor((high - low) / usual.step + 1e-9) * usual.step, 6), usual.step)


def _on_step(value: float, values: Number) -> float:
    return round(values.low + round((value - values.low) / values.step) * values.step, 6)


def _values(values: Number | Choice) -> tuple[Any, ...]:
    return values.values if isinstance(values, Choice) else (values.low, values.high)


def _is_fixed(values: Number | Choice) -> bool:
    return len(set(_values(values))) == 1


def _whole(number: float) -> int | float:
    """Returns a layer's number as an integer where it is one; between two layers it is none."""
    return int(number) if float(number).is_integer() else number


def _components(parts: Sequence[Part]) -> tuple[Component, ...]:
    """Returns the components that parts belong to."""
    found = {COMPONENT_OF[part] for part in parts}
    return tuple(component for component in COMPONENTS if component in found)
