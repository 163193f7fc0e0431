"""What a search leaves: a recipe that makes the chosen edit, what the recipe names, and a record of everything."""

import dataclasses
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate_shards import __version__
from ablate_shards.errors import SearchError, UsageError
from ablate_shards.names import SEARCH_SUFFIX
from ablate_shards.surgery.directions.formats import write_directions
from ablate_shards.surgery.evaluate.evaluation_file import write_evaluation
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.plan.recipe import AblateOptions
from ablate_shards.surgery.search.choice import Candidate
from ablate_shards.surgery.search.search import Found
from ablate_shards.surgery.search.space import Setting

__all__ = ["FORMAT", "Places", "coefficients", "places_of", "record_of", "write_found"]

FORMAT = "ablate-shards.search/1"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the files of a search are.

    Attributes:
        recipe: The recipe that makes the chosen edit.
        directions: The directions that it removes.
        questions: The questions of the report, which nothing was chosen by; what the recipe evaluates with.
        record: All trials, the choice and the figures.
        journal: Optuna's journal, which a search that was interrupted goes on from.
    """

    recipe: Path
    directions: Path
    questions: Path
    record: Path
    journal: Path

    def report(self, name: str) -> Path:
        """Returns where an evaluation on the questions of the report is."""
        return self.record.with_name(f"{self.record.name.removesuffix(SEARCH_SUFFIX)}.{name}.evaluation.json")


def places_of(recipe: Path, *, overwrite: bool) -> Places:
    """Returns where the files of a search go, all beside its recipe.

    Raises:
        SearchError: The recipe is there and may not be replaced.
        UsageError: It is no name of a recipe, or its folder does not exist.
    """
    if recipe.suffix != ".toml" or recipe.is_dir():
        raise UsageError(f"{recipe}: expected the name of a recipe, such as found.toml")
    if not recipe.absolute().parent.is_dir():
        raise UsageError(f"{recipe.parent}: the folder that OUT would lie in does not exist; make it first")
    if recipe.exists() and not overwrite:
        raise SearchError(f"{recipe}: already exists; --overwrite replaces it, or name another file")
    stem = recipe.name.removesuffix(".toml")
    beside = {
        "directions": f"{stem}.directions.safetensors",
        "questions": f"{stem}.questions.jsonl",
        "record": f"{stem}{SEARCH_SUFFIX}",
        "journal": f"{stem}.study.journal",
    }
    return Places(recipe, **{what: recipe.with_name(name) for what, name in beside.items()})


def write_found(found: Found, places: Places, questions: Sequence[Path]) -> None:
    """Writes everything that a search found, the recipe last.

    Args:
        found: What was found.
        places: Where the files go.
        questions: The files that the questions were read from.

    Raises:
        OSError: A file cannot be written.
    """
    edit = found.job.space.edit(found.chosen.setting)
    write_directions(found.job.contrasts.directions(edit.contrast, edit.rank, edit.without), places.directions)
    prompts = {question.prompt for question in found.job.parts.report}
    lines = [line for path in questions for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    kept = [line for line in lines if json.loads(line).get("prompt") in prompts]
    write_whole(places.questions, ["".join(f"{line}\n" for line in kept).encode()])
    for name, evaluation in found.reports.items():
        write_evaluation(evaluation, places.report(name))
    write_whole(places.record, [json.dumps(record_of(found, places), indent=1, ensure_ascii=False).encode() + b"\n"])
    write_whole(places.recipe, [_recipe(found, edit.options, places).encode()])


def coefficients(options: AblateOptions, layers: Sequence[int]) -> dict[str, list[float]]:
    """Returns the coefficient of each layer, by part."""
    return {
        part: [round(profile.coefficient(layer), 4) for layer in layers]
        for profile in options.profiles
        for part in profile.components
    }


def _recipe(found: Found, options: AblateOptions, places: Places) -> str:
    """Returns the recipe of the chosen edit."""

    def relative(path: Path) -> str:
        return json.dumps(os.path.relpath(path.resolve(), places.recipe.resolve().parent), ensure_ascii=False)

    report = found.reports["chosen"]
    moved = report.comparison and report.comparison.divergence
    lines = [
        f"# Found by a search of {len(found.trials)} trials; {places.record.name} has all of them.",
        f"# Trial {found.chosen.trial}, on questions that nothing was chosen by: {_said(found.reports)}",
        *([f"# KL {moved.tokens:.2g} nats a token on unrelated answers."] if moved else []),
        "",
        "[source]",
        f"source = {relative(found.job.folder)}",
        "",
        "[directions]",
        f"directions = {relative(places.directions)}",
        "",
        "[ablate]",
        f"components = {json.dumps(list(options.components))}",
        f"coefficient = {options.coefficient!r}",
        f"preserve = {json.dumps(options.preserve)}",
        f"biproject = {json.dumps(options.biproject)}",
        f"source-layer = {json.dumps(options.source_layer)}",
        *([f"layers = {json.dumps(sorted(options.layers))}"] if options.layers is not None else []),
    ]
    for profile in options.profiles:
        lines += [
            "",
            "[[ablate.profile]]",
            f"components = {json.dumps(list(profile.components))}",
            *(f"{name} = {getattr(profile, name)!r}" for name in ("peak", "place", "reach", "floor")),
        ]
    lines += ["", "[evaluate]", f"questions = {relative(places.questions)}"]
    return "\n".join(lines) + "\n"


def _said(reports: Mapping[str, Any]) -> str:
    from ablate_shards.surgery.evaluate.effect import effect

    return effect(reports["chosen"])


def record_of(found: Found, places: Places) -> dict[str, Any]:
    """Returns the record of a search as JSON types."""
    job = found.job
    layers = sorted(job.contrasts.directions(job.contrasts.names[0]).layers)
    plain = job.space.plain()

    def measured(candidate: Candidate) -> dict[str, Any]:
        return {
            "trial": candidate.trial,
            "values": dict(candidate.values),
            "shares": {name: list(share) for name, share in candidate.shares.items()},
            "answers": [
                {name: getattr(answer, name) for name in ("id", "language", "prompt", "text", "verdict", "given")}
                for answer in candidate.answers
            ],
            **({} if candidate.trial is None else {"coefficients": _of(candidate.setting)}),
        }

    def _of(setting: Setting) -> dict[str, list[float]]:
        return coefficients(job.space.edit(setting).options, layers)

    return {
        "format": FORMAT,
        "tool": f"ablate-shards {__version__}",
        "model": job.folder.resolve().name,
        "questions": {
            part: [question.id for question in getattr(job.parts, part)] for part in ("trials", "choice", "report")
        },
        "options": {
            **{
                name: getattr(job.options, name)
                for name in (
                    "trials",
                    "timeout",
                    "seed",
                    "limit",
                    "front",
                    "choose",
                    "length",
                    "dtype",
                    "device",
                    "engine",
                    "workers",
                )
            },
            "budget": dataclasses.asdict(job.options.budget),
            "asking": dataclasses.asdict(job.options.asking),
        },
        "space": job.space.as_dict(),
        "objectives": [
            {"name": name, "direction": direction, "base": base} for name, direction, base in found.objectives
        ],
        "layers": layers,
        "trials": [
            {
                "number": trial.number,
                "setting": dict(trial.setting),
                "values": {name: value for name, value in trial.tried.values.items() if math.isfinite(value)},
                "complete": trial.tried.complete,
                "seconds": trial.tried.seconds,
                "digest": trial.tried.digest,
                "coefficients": _of(trial.setting),
            }
            for trial in found.trials
        ],
        "front": [trial.number for trial in found.front],
        "plain": next((trial.number for trial in found.trials if dict(trial.setting) == plain), None),
        "importance": {name: dict(shares) for name, shares in found.importance.items()},
        "base": measured(found.base),
        "candidates": [measured(candidate) for candidate in found.candidates if candidate.finite],
        "chosen": found.chosen.trial,
        "beats_plain": found.beats_plain,
        "recipe": places.recipe.name,
        "reports": {name: places.report(name).name for name in found.reports},
    }
