"""Runs the stages of a recipe in order, and skips those whose inputs have not changed."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError, RecipeError
from ablate_shards.names import STATE_NAME, is_report
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.plan.recipe import Recipe

__all__ = ["Stage", "Status", "as_flags", "plan_stages", "run_stages", "size_of", "status_of"]

Status = Literal["done", "changed", "missing"]

_FORMAT = "ablate-shards.stages/1"
#: Switches that are on or off where nobody says so.
_BOTH_WAYS = frozenset({"gradient-checkpointing", "perplexity", "divergence", "lean"})


@dataclass(frozen=True, slots=True)
class Stage:
    """One command of a recipe.

    Attributes:
        name: What it does, in a word or two.
        command: The arguments of ``ablate-shards``; paths among them are exactly ``inputs`` and ``output``.
        inputs: What it reads.
        output: What it makes: a file, or a folder.
        flags: Arguments that cannot change the output, such as ``--resume``; given, but not compared.
        gated: For an evaluation, the stage whose edit it measures, and after which a broken model ends the run.
    """

    name: str
    command: tuple[str, ...]
    inputs: tuple[Path, ...]
    output: Path
    flags: tuple[str, ...] = ()
    gated: str | None = None


def plan_stages(recipe: Recipe, path: Path, source: Path, out: Path, work: Path) -> tuple[Stage, ...]:
    """Returns what a recipe asks for, in order: each table that is there adds its stages.

    Each file of pairs is captured in a stage of its own, and the directions of several are compared.
    ``[evaluate]`` measures the source, the ablated checkpoint and the result; ``[lora]`` trains an adapter on
    the ablated checkpoint and merges it. With ``[lora]`` and neither ``[directions]`` nor ``[ablate]``, nothing is
    ablated, and the adapter is trained on the source.

    Args:
        recipe: The recipe.
        path: Where it was read from.
        source: The checkpoint to start from.
        out: Where the result goes.
        work: The folder for everything between.

    Raises:
        RecipeError: The recipe names no directions and nothing to make them from, two files of pairs of one name, or
            no data for ``[lora]``.
    """
    given = {name: dict(recipe.tables.get(name, {})) for name in ("directions", "lora", "evaluate")}
    stages: list[Stage] = []

    def evaluated(name: str, model: Path, base: Path | None, edit: str | None = None) -> None:
        if "evaluate" not in recipe.tables:
            return
        result = work / f"{name}.evaluation.json"
        options, files = _options(given["evaluate"], files=("questions", "text"))
        against = () if base is None else ("--against", str(base))
        reuse = () if base is None else ("--reuse", str(work / "source.evaluation.json"))
        command = ("evaluate", str(model), *against, "--out", str(result), *options)
        inputs = (model, *files) if base is None else (model, base, *files)
        stages.append(Stage(f"evaluate {name}", command, inputs, result, (*reuse, "--overwrite"), edit))

    evaluated("source", source, None)
    trained = source
    if "lora" not in recipe.tables or recipe.tables.keys() & {"directions", "ablate"}:
        trained = work / "ablated" if "lora" in recipe.tables else out
        stages += _ablation(given["directions"], path, source, trained, work)
        evaluated("ablated", trained, source, "ablate")
    if "lora" in recipe.tables:
        if "data" not in given["lora"]:
            raise RecipeError(f"{path}: [lora] needs data, a file of instructions")
        adapter = work / "adapter"
        scale = {"scale": given["lora"].pop("scale")} if "scale" in given["lora"] else {}
        options, files = _options(given["lora"], files=("data", "keep"))
        stages.append(
            Stage(
                "finetune",
                ("finetune", str(trained), str(adapter), *options),
                (trained, *files),
                adapter,
                ("--resume", "--overwrite"),
            )
        )
        options, _ = _options(scale)
        stages.append(
            Stage(
                "merge",
                ("merge", str(trained), str(adapter), str(out), *options),
                (trained, adapter),
                out,
                ("--resume", "--overwrite"),
            )
        )
        evaluated("result", out, source, "finetune")
    return tuple(stages)


def _ablation(made: Mapping[str, Any], recipe: Path, source: Path, ablated: Path, work: Path) -> list[Stage]:
    """Returns the stages up to the ablated checkpoint."""
    stages: list[Stage] = []
    if "directions" in made:
        directions = Path(made["directions"])
    else:
        computed = _only(made, "estimator", "rank", "winsorize", "without")
        if "activations" in made:
            dumps = [Path(made["activations"])]
        elif "pairs" in made:
            settings = {key: value for key, value in made.items() if key not in computed}
            stages += _captures(settings, recipe, source, work)
            dumps = [stage.output for stage in stages]
        else:
            raise RecipeError(f"{recipe}: [directions] needs pairs, activations or directions to start from")
        directions = work / "directions.safetensors"
        options, files = _options(computed, files=("without",))
        stages.append(
            Stage(
                "directions",
                ("directions", *map(str, dumps), str(directions), *options),
                (*dumps, *files),
                directions,
                ("--overwrite",),
            )
        )
    stages.append(
        Stage(
            "ablate",
            ("ablate", str(source), str(ablated), "--recipe", str(recipe), "--directions", str(directions)),
            (source, recipe, directions),
            ablated,
            ("--resume", "--overwrite"),
        )
    )
    return stages


def _captures(settings: Mapping[str, Any], recipe: Path, source: Path, work: Path) -> list[Stage]:
    """Returns a stage per file of pairs; that of a single one does not carry its name."""
    pairs: Sequence[str] = settings["pairs"]
    stems = [Path(file).stem for file in pairs]
    stages = []
    for file, stem in zip(pairs, stems, strict=True):
        if [other.casefold() for other in stems].count(stem.casefold()) > 1:
            raise RecipeError(
                f"{recipe}: [directions] pairs: two files are called {stem}, which is what their dumps would be called "
                "by; rename one"
            )
        name, dump = ("capture", "activations") if len(pairs) == 1 else (f"capture {stem}", f"activations-{stem}")
        output = work / f"{dump}.safetensors"
        options = as_flags({**settings, "pairs": file})
        command = ("capture", str(source), str(output), *options)
        stages.append(Stage(name, command, (source, Path(file)), output, ("--resume", "--overwrite")))
    return stages


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
    """Turns keys of a recipe into flags of a command."""
    words: list[str] = []
    for key, value in table.items():
        if value is True:
            words.append(f"--{key}")
        elif value is False:
            words += [f"--no-{key}"] if key in _BOTH_WAYS else []
        else:
            words += [word for each in _each(value) for word in (f"--{key}", str(each))]
    return tuple(words)


def size_of(path: Path) -> int | None:
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
            whole.update(f"{file.relative_to(path)}\0{self._file_digest(file)}\n".encode())
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


def _only(table: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key in keys}


def _options(table: Mapping[str, Any], files: Sequence[str] = ()) -> tuple[tuple[str, ...], tuple[Path, ...]]:
    """Returns the flags that keys stand for, and those among them that are files to read."""
    return as_flags(table), tuple(Path(each) for key in files if key in table for each in _each(table[key]))


def _each(value: Any) -> tuple[Any, ...]:
    """Returns the values of a key that may be given several times."""
    return value if isinstance(value, tuple) else (value,)
