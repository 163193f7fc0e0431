"""Runs the stages of a recipe in order, and skips those whose inputs have not changed."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError, RecipeError
from ablate_shards.names import STATE_NAME, is_report
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.plan.recipe import Recipe

__all__ = ["Stage", "Status", "as_flags", "bytes_in", "plan_stages", "run_stages", "status_of"]

StageKind = Literal["capture", "directions", "search", "ablate", "finetune", "merge", "evaluate"]
Status = Literal["done", "changed", "missing"]

_FORMAT = "ablate-shards.stages/1"
#: Switches that are on or off where nobody says so.
_BOTH_WAYS = frozenset({"gradient-checkpointing", "perplexity", "divergence", "lean"})
#: Settings that name files to read.
_FILES = frozenset({"pairs", "without", "data", "keep", "questions", "report-questions", "text"})
#: Settings of ``[directions]`` that are about computing them; the others are about capturing.
_COMPUTED = frozenset({"estimator", "rank", "winsorize", "without"})
#: Settings of ``[ablate]`` that make an adapter, which the recipe that a search writes does not have.
_OF_ADAPTER = ("adapter", "adapter-rank")


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of a recipe: what it reads, what it makes, and how.

    Attributes:
        kind: The command.
        output: What it makes: a file, or a folder.
        subject: What tells it from other stages of its kind, such as a file of pairs; empty where it is the only one.
        model: The checkpoint that it reads, None for ``directions``.
        adapter: For ``merge``, the adapter.
        activations: For ``directions`` and ``search``, the dumps.
        recipe: For ``ablate``, the recipe.
        directions: For ``ablate`` and ``search``, the directions.
        base: For ``evaluate``, the checkpoint that the model is compared with, None if it is that one itself.
        base_evaluation: For ``evaluate``, the evaluation of the base, whose answers are used again.
        gated: For ``evaluate``, the stage whose edit it measures, and after which a broken model ends the run.
        settings: Keys of the recipe, with their values.
    """

    kind: StageKind
    output: Path
    subject: str = ""
    model: Path | None = None
    adapter: Path | None = None
    activations: tuple[Path, ...] = ()
    recipe: Path | None = None
    directions: Path | None = None
    base: Path | None = None
    base_evaluation: Path | None = None
    gated: Literal["ablate", "finetune"] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it does, in a word or two; the name of no other stage of the run."""
        return f"{self.kind} {self.subject}".rstrip()

    @property
    def makes_checkpoint(self) -> bool:
        """Whether its output is a checkpoint, not an adapter or a file."""
        return self.kind == "merge" or (self.kind == "ablate" and not self.settings.get("adapter"))

    @property
    def inputs(self) -> tuple[Path, ...]:
        """What it reads and its output depends on."""
        read = (self.model, self.adapter, *self.activations, self.base, self.recipe, self.directions)
        files = (Path(each) for key, value in self.settings.items() if key in _FILES for each in _each(value))
        return (*(path for path in read if path is not None), *files)

    @property
    def command(self) -> tuple[str, ...]:
        """The arguments of ``ablate-shards`` that its output depends on; paths are exactly inputs and the output."""
        measures, searches = self.kind == "evaluate", self.kind == "search"
        dumps = () if searches else self.activations
        places = (self.model, self.adapter, *dumps, None if measures else self.output)
        named = {
            "activations": self.activations if searches else None,
            "against": self.base,
            "out": self.output if measures else None,
            "recipe": self.recipe,
            "directions": self.directions,
        }
        return (
            self.kind,
            *(str(place) for place in places if place is not None),
            *as_flags(named),
            *as_flags(self.settings),
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """Arguments that cannot change the output; given, but not compared."""
        resumable = self.kind not in ("directions", "evaluate", "search")
        return as_flags({"reuse": self.base_evaluation, "resume": resumable, "overwrite": True})


def plan_stages(recipe: Recipe, path: Path, source: Path, out: Path, work: Path) -> tuple[Stage, ...]:
    """Returns what a recipe asks for, in order: each table that is there adds its stages.

    Each file of pairs is captured in a stage of its own, and the directions of several are compared.
    ``[search]`` finds the edit, whose recipe then stands in for ``[ablate]``. ``[evaluate]`` measures the source, the
    ablated checkpoint and the result; ``[lora]`` trains an adapter on the ablated checkpoint and merges it. With
    ``[lora]`` and neither ``[directions]`` nor ``[ablate]``, nothing is ablated, and the adapter is trained on the
    source. With ``adapter`` in ``[ablate]``, the result is an adapter; ``[evaluate]`` then measures the checkpoint that
    it makes of the source.

    Args:
        recipe: The recipe.
        path: Where it was read from.
        source: The checkpoint to start from.
        out: Where the result goes.
        work: The folder for everything between.

    Raises:
        RecipeError: The recipe names no directions and nothing to make them from, two files of pairs of one name, no
            data for ``[lora]``, or asks for both ``[lora]`` and an adapter of the edit.
    """
    given, lora, evaluate = (recipe.tables.get(name, {}) for name in ("directions", "lora", "evaluate"))
    trains, measures = "lora" in recipe.tables, "evaluate" in recipe.tables
    as_adapter = {key: value for key, value in recipe.tables.get("ablate", {}).items() if key in _OF_ADAPTER}
    if trains and as_adapter.get("adapter"):
        raise RecipeError(
            f"{path}: [lora] trains on the edited checkpoint, and adapter in [ablate] makes none; remove one of the two"
        )
    ablates = not trains or bool(recipe.tables.keys() & {"directions", "ablate"})

    stages = [_evaluate("source", source, evaluate, work)]
    model = source
    if ablates:
        model = work / "ablated" if trains else out
        if "search" in recipe.tables:
            dumps = _dumps_from(given, path, source, work)
            stages += [*dumps.captures, _search(source, given, dumps.files, recipe, work / "found.toml")]
            edit, directions = work / "found.toml", work / "found.directions.safetensors"
        else:
            stages += _directions_from(given, path, source, work)
            edit, directions = path, Path(given["directions"]) if "directions" in given else stages[-1].output
        stages.append(_ablate(source, edit, directions, model, as_adapter))
        if measures and as_adapter.get("adapter"):
            model = work / "ablated"
            stages.append(_merge(source, out, {}, model))
        stages.append(_evaluate("ablated", model, evaluate, work, base=source, gated="ablate"))
    if trains:
        adapter = work / "adapter"
        stages.append(_finetune(model, lora, path, adapter))
        stages.append(_merge(model, adapter, lora, out))
        stages.append(_evaluate("result", out, evaluate, work, base=source, gated="finetune"))
    return tuple(stage for stage in stages if measures or stage.kind != "evaluate")


def _directions_from(table: Mapping[str, Any], recipe: Path, source: Path, work: Path) -> list[Stage]:
    """Returns the stages that make the directions, the last of which writes them; none where they are given."""
    if "directions" in table:
        return []
    dumps = _dumps_from(table, recipe, source, work)
    return [*dumps.captures, _directions(dumps.files, table, work / "directions.safetensors")]


class _Dumps(NamedTuple):
    """Dumps, and the stages that make them."""

    captures: Sequence[Stage]
    files: Sequence[Path]


def _dumps_from(table: Mapping[str, Any], recipe: Path, source: Path, work: Path) -> _Dumps:
    """Returns the dumps that directions are computed from; none where these are given."""
    if "directions" in table:
        return _Dumps((), ())
    if "activations" in table:
        return _Dumps((), [Path(table["activations"])])
    if "pairs" in table:
        captures = _captures(table, recipe, source, work)
        return _Dumps(captures, [stage.output for stage in captures])
    raise RecipeError(f"{recipe}: [directions] needs pairs, activations or directions to start from")


def _search(model: Path, table: Mapping[str, Any], dumps: Sequence[Path], recipe: Recipe, found: Path) -> Stage:
    settings = {key: value for key, value in table.items() if key in _COMPUTED} | dict(recipe.tables["search"])
    if recipe.space:
        settings["space"] = json.dumps(recipe.space, sort_keys=True)
    directions = Path(table["directions"]) if "directions" in table else None
    return Stage("search", found, model=model, activations=tuple(dumps), directions=directions, settings=settings)


def _captures(table: Mapping[str, Any], recipe: Path, source: Path, work: Path) -> list[Stage]:
    """Returns a stage per file of pairs; that of a single one does not carry its name."""
    pairs: Sequence[str] = table["pairs"]
    if len(pairs) == 1:
        return [_capture(source, pairs[0], table, work / "activations.safetensors")]
    stems = [Path(file).stem for file in pairs]
    folded = [stem.casefold() for stem in stems]
    for stem in stems:
        if folded.count(stem.casefold()) > 1:
            raise RecipeError(
                f"{recipe}: [directions] pairs: two files are called {stem}, which is what their dumps would be called "
                "by; rename one"
            )
    return [
        _capture(source, file, table, work / f"activations-{stem}.safetensors", subject=stem)
        for file, stem in zip(pairs, stems, strict=True)
    ]


def _capture(model: Path, pairs: str, table: Mapping[str, Any], dump: Path, subject: str = "") -> Stage:
    settings = {key: value for key, value in table.items() if key not in _COMPUTED}
    return Stage("capture", dump, subject, model=model, settings={**settings, "pairs": pairs})


def _directions(dumps: Sequence[Path], table: Mapping[str, Any], output: Path) -> Stage:
    settings = {key: value for key, value in table.items() if key in _COMPUTED}
    return Stage("directions", output, activations=tuple(dumps), settings=settings)


def _ablate(model: Path, recipe: Path, directions: Path, out: Path, as_adapter: Mapping[str, Any]) -> Stage:
    return Stage("ablate", out, model=model, recipe=recipe, directions=directions, settings=as_adapter)


def _finetune(model: Path, table: Mapping[str, Any], recipe: Path, adapter: Path) -> Stage:
    if "data" not in table:
        raise RecipeError(f"{recipe}: [lora] needs data, a file of instructions")
    settings = {key: value for key, value in table.items() if key != "scale"}
    return Stage("finetune", adapter, model=model, settings=settings)


def _merge(model: Path, adapter: Path, table: Mapping[str, Any], out: Path) -> Stage:
    settings = {key: value for key, value in table.items() if key == "scale"}
    return Stage("merge", out, model=model, adapter=adapter, settings=settings)


def _evaluate(
    subject: str,
    model: Path,
    table: Mapping[str, Any],
    work: Path,
    *,
    base: Path | None = None,
    gated: Literal["ablate", "finetune"] | None = None,
) -> Stage:
    return Stage(
        "evaluate",
        work / f"{subject}.evaluation.json",
        subject,
        model=model,
        base=base,
        base_evaluation=None if base is None else work / "source.evaluation.json",
        gated=gated,
        settings=table,
    )


def run_stages(
    stages: Sequence[Stage],
    work: Path,
    call: Callable[[Sequence[str]], None],
    tell: Callable[[int, Stage, Status], None],
    check: Callable[[Stage], None],
) -> None:
    """Runs what is not done yet; what is done stays done, whatever happens to a later stage.

    Args:
        stages: The stages, in order.
        work: The folder for the state and everything between.
        call: Runs a command of ``ablate-shards``, and raises what it raises.
        tell: Is told of each stage before it runs or is skipped.
        check: Looks at each stage that is done, whenever it was done, and raises what ends the run.

    Raises:
        ExecuteError: The state of a former run cannot be read.
    """
    work.mkdir(parents=True, exist_ok=True)
    state = _State.read(work / STATE_NAME)
    for number, stage in enumerate(stages, start=1):
        status = state.status(stage)
        tell(number, stage, status)
        if status != "done":
            call((*stage.command, *stage.flags))
            state.keep(stage)
        check(stage)


def status_of(stages: Sequence[Stage], work: Path) -> tuple[Status, ...]:
    """Returns what a run would find; a stage after one that must run counts as changed.

    Raises:
        ExecuteError: The state of a former run cannot be read.
    """
    state = _State.read(work / STATE_NAME)
    found: list[Status] = []
    for stage in stages:
        status = state.status(stage)
        made_before = {done.output for done, known in zip(stages, found, strict=False) if known != "done"}
        if status == "done" and made_before & set(stage.inputs):
            status = "changed"
        found.append(status)
    return tuple(found)


def as_flags(table: Mapping[str, Any]) -> tuple[str, ...]:
    """Turns keys of a recipe into flags of a command; a key without a value gives none."""
    words: list[str] = []
    for key, value in table.items():
        if value is None:
            continue
        if value is True:
            words.append(f"--{key}")
        elif value is False:
            words += [f"--no-{key}"] if key in _BOTH_WAYS else []
        else:
            words += [word for each in _each(value) for word in (f"--{key}", str(each))]
    return tuple(words)


def bytes_in(path: Path) -> int | None:
    """Returns the bytes of a file, or of the files in a folder; None if there is nothing."""
    files = _files(path)
    return sum(file.stat().st_size for file in files) if files else None


class _State:
    """Which stages are done, by the digests of what they read and made."""

    def __init__(self, path: Path, stages: dict[str, dict[str, str]], digests: dict[str, list[Any]]) -> None:
        self._path = path
        self._stages = stages
        self._digests = digests

    @classmethod
    def read(cls, path: Path) -> "_State":
        if not path.is_file():
            return cls(path, {}, {})
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            return cls(path, dict(content["stages"]), dict(content["digests"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExecuteError(
                f"{path}: expected the stages of a former run, {_FORMAT} ({error}); remove it to start again"
            ) from error

    def status(self, stage: Stage) -> Status:
        output = self._digest(stage.output)
        if output is None:
            return "missing"
        known = self._stages.get(stage.name)
        return "done" if known == {"key": self._key(stage), "output": output} else "changed"

    def keep(self, stage: Stage) -> None:
        output = self._digest(stage.output)
        if output is None:
            raise ExecuteError(f"{stage.output}: {stage.name} ended without making it")
        self._stages[stage.name] = {"key": self._key(stage), "output": output}
        content = {"format": _FORMAT, "stages": self._stages, "digests": self._digests}
        write_whole(self._path, [json.dumps(content, indent=1).encode()])

    def _key(self, stage: Stage) -> str:
        """Digest of the tool, the command and the contents of what it reads; not of where that lies."""
        known = {str(path): self._digest(path) for path in stage.inputs}
        command = [known.get(word) or ("output" if word == str(stage.output) else word) for word in stage.command]
        content = json.dumps([__version__, command, sorted(map(str, known.values()))])
        return hashlib.sha256(content.encode()).hexdigest()

    def _digest(self, path: Path) -> str | None:
        """SHA-256 of the names and contents of a file or a folder; None if there is nothing."""
        files = _files(path)
        if not files:
            return None
        whole = hashlib.sha256()
        for file in files:
            whole.update(f"{file.relative_to(path).as_posix()}\0{self._file_digest(file)}\n".encode())
        return whole.hexdigest()

    def _file_digest(self, file: Path) -> str:
        """SHA-256 of a file, remembered for as long as its size and modification time stay."""
        found = file.stat()
        stamp = [found.st_size, found.st_mtime_ns]
        remembered = self._digests.get(str(file.resolve()))
        if remembered is not None and remembered[:2] == stamp:
            return str(remembered[2])
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        self._digests[str(file.resolve())] = [*stamp, digest]
        return digest


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = (Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    return sorted(file for file in found if file.is_file() and not is_report(file.relative_to(path).as_posix()))


def _each(value: Any) -> tuple[Any, ...]:
    """Returns the values of a key that may be given several times."""
    return value if isinstance(value, tuple) else (value,)
