"""Makes what a search leaves behind, small and without a model: its record, recipe, directions and evaluations."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from raw_checkpoints import write_directions
from report_runs import HOSTILE, LAYERS, answers, evaluation

from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.evaluate.evaluation import compare
from ablate_shards.surgery.evaluate.likelihood import Divergence
from ablate_shards.surgery.model.samples import Question
from ablate_shards.surgery.search.bench import Tried
from ablate_shards.surgery.search.choice import Candidate
from ablate_shards.surgery.search.contrasts import Contrasts
from ablate_shards.surgery.search.files import places_of, write_found
from ablate_shards.surgery.search.questions import Parts
from ablate_shards.surgery.search.search import Found, Job, SearchOptions
from ablate_shards.surgery.search.space import Number, make_space
from ablate_shards.surgery.search.study import Trial, best_of

PARTS = ("attention", "mlp")
TRIALS = 24
#: Of the objectives of the search: which way is better, and the measure of the unedited model.
OBJECTIVES = {"lean": ("maximize", -0.8), "kl": ("minimize", 0.0)}


def make_search(
    place: Path,
    *,
    name: str = "found",
    chosen: int | None = None,
    beats: bool = True,
    hostile: bool = False,
    repeats: bool = True,
) -> Path:
    """Makes the files of a search on ``source``; returns its record.

    Args:
        place: The folder.
        name: What the files are called by.
        chosen: The trial that is chosen, the one with the largest effect if None.
        beats: Whether it beats the plain edit.
        hostile: Whether the model, an objective, a contrast and an answer would run a script if they were not escaped.
        repeats: Whether answers repeat words of their questions, so that ``subject`` is measured.
    """
    contrasts = ("topic", HOSTILE.replace("/", "-")) if hostile else ("topic", "answer")
    read = {
        contrast: read_directions(write_directions(place / f"{number}.safetensors", layers=LAYERS, seed=number + 1))
        for number, contrast in enumerate(contrasts)
    }
    known = Contrasts(read, {})
    space = make_space(
        {},
        "[search.space]",
        contrasts=known.names,
        without=(),
        rank=known.rank,
        layers=LAYERS,
        sources=known.layers,
        parts=PARTS,
    )
    objectives = [SimpleNamespace(name=each, direction=OBJECTIVES[each][0]) for each in OBJECTIVES]
    trials = tuple(_trials(space))
    front = best_of(trials, objectives)
    looked_at = list(dict.fromkeys([0, *(trial.number for trial in front[:3])]))
    chosen = looked_at[1] if chosen is None else chosen
    said = [replace(answer, id=f"choice-{answer.id}") for answer in answers(14, 20)]
    subject = {"subject": 0.125} if repeats else {}
    base = Candidate(None, {}, {"lean": -0.75, "kl": 0.0} | subject, tuple(said))
    candidates = tuple(
        Candidate(
            number,
            trials[number].setting,
            {"lean": trials[number].tried.values["lean"] - 0.1, "kl": 1.5 * trials[number].tried.values["kl"]}
            | subject,
            tuple(replace(answer, id=f"choice-{answer.id}") for answer in answers(8 - 2 * rank, 19)),
        )
        for rank, number in enumerate(looked_at)
    )
    reports = {"chosen": reported("source, chosen", 3 if beats else 9, 0.01)}
    if chosen != 0:
        reports["plain"] = reported("source, plain", 7, 0.04)
    asked = reports["chosen"].answers
    questions = place / f"{name}.asked.jsonl"
    questions.write_text("".join(f"{json.dumps({'prompt': answer.prompt})}\n" for answer in asked))
    job = Job(
        folder=place / (HOSTILE.replace("/", "-") if hostile else "source"),
        contrasts=known,
        space=space,
        parts=Parts(
            tuple(Question(f"trial-{number}", "en", "core", f"What is {number}?") for number in range(30)),
            tuple(Question(answer.id, answer.language, answer.group, answer.prompt) for answer in said),
            tuple(Question(answer.id, answer.language, answer.group, answer.prompt) for answer in asked),
        ),
        options=SearchOptions(trials=TRIALS, seed=7),
        journal=place / f"{name}.study.journal",
    )
    found = Found(
        job=job,
        objectives=tuple((each, *OBJECTIVES[each]) for each in OBJECTIVES),
        trials=trials,
        front=tuple(front),
        importance={
            "lean": {"mlp.peak": 0.6, "contrast": 0.3, "mlp.place": 0.1},
            "kl": {"attention.floor": 0.75, "mlp.floor": 0.25},
        },
        base=base,
        candidates=candidates,
        chosen=next(candidate for candidate in candidates if candidate.trial == chosen),
        reports=reports,
        beats_plain=None if chosen == 0 else beats,
    )
    places = places_of(place / f"{name}.toml", overwrite=True)
    write_found(found, places, [questions])
    return places.record


def _trials(space):
    """Yields trials, the plain edit first; every sixth ends at its divergence, one of them infinite."""
    rng = np.random.default_rng(3)
    for number in range(TRIALS):
        setting = space.plain() if number == 0 else _setting(space, rng)
        strength = sum(setting[f"{part}.peak"] for part in PARTS) / 4
        values = {"kl": float(f"{0.2 * strength**4 * rng.uniform(0.2, 1):.4g}")}
        over = values["kl"] - 0.5
        if number % 6 == 5:
            values["kl"] = over = math.inf if number == 5 else 0.5 + number / 10
        else:
            values["lean"] = float(f"{-0.8 + 1.8 * strength * rng.uniform(0.5, 1):.4g}")
        yield Trial(number, setting, Tried(values, over, 1.0, f"{number:064}"))


def _setting(space, rng):
    setting = {
        name: round(rng.uniform(values.low, values.high), 2)
        if isinstance(values, Number)
        else values.values[int(rng.integers(len(values.values)))]
        for name, values in space.parameters.items()
    }
    if setting["source"] == "own":
        del setting["source-layer"]
    return setting


def reported(name, slanted, moved):
    base = evaluation("source", 14, 20)
    found = evaluation(name, slanted, 19, base)
    found = replace(found, model=replace(found.model, sha256=None))
    return replace(found, comparison=compare(found, base, Divergence(moved / 2, moved, 20, 60)))
