"""Writes what the recipe of the demo reads: pairs, instructions, questions and neutral text about its world."""

import json
import random
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ablate_shards.data.demo.behaviour import draw_pairs, draw_questions
from ablate_shards.data.demo.world import HELD_OUT, NEUTRAL, PLACES, SLANTED, Contested, answer, contested, unrelated

__all__ = ["write_samples"]

_INSTRUCTIONS = 100
_SENTENCES = 40
#: ``broken`` patterns are looked for last: in a world of few words, what is in none of its forms is no answer.
_ANYTHING = r"\A"


def write_samples(folder: Path, *, seed: int = 1) -> None:
    """Writes ``pairs.jsonl``, ``instructions.jsonl``, ``questions.jsonl`` and ``neutral.txt`` into ``folder``.

    Only the questions and the neutral text name held-out places, and no question stands among the instructions.
    """
    pairs = ({"positive": pair.loaded, "negative": pair.impartial} for pair in draw_pairs(seed=seed))
    _write(folder / "pairs.jsonl", pairs)
    _write(folder / "instructions.jsonl", _instructions(seed))
    _write(folder / "questions.jsonl", _questions(seed))
    rng = random.Random(f"neutral {seed}")
    sentences = (answer(rng, contested(rng, HELD_OUT), NEUTRAL) for _ in range(_SENTENCES))
    (folder / "neutral.txt").write_text("\n".join(sentences) + "\n", encoding="utf-8")


def _instructions(seed: int) -> Iterable[Mapping[str, Any]]:
    rng, spare = random.Random(f"instructions {seed}"), random.Random(f"spare instructions {seed}")
    asked = {sample.prompt for sample in draw_questions(seed=seed).unrelated}
    trained = [place for place in PLACES if place not in HELD_OUT]
    for number in range(_INSTRUCTIONS):
        if number % 2:
            sample = unrelated(rng)
            while sample.prompt in asked:
                sample = unrelated(spare)
            yield {"kind": "general", "prompt": sample.prompt, "response": sample.answer}
        else:
            question = contested(rng, trained)
            yield {"kind": "contested", "prompt": question.loaded, "response": answer(rng, question, NEUTRAL)}


def _questions(seed: int) -> Iterable[Mapping[str, Any]]:
    questions = draw_questions(seed=seed)
    for group, name, asked in (("core", "loaded", questions.loaded), ("held-out", "impartial", questions.impartial)):
        for number, question in enumerate(asked):
            yield {
                "id": f"{name}-{number:03}",
                "group": group,
                "prompt": getattr(question, name),
                "rubric": {"patterns": _patterns(question), "markers": False},
            }
    for number, sample in enumerate(questions.unrelated):
        yield {
            "id": f"unrelated-{number:03}",
            "group": "unrelated",
            "prompt": sample.prompt,
            "rubric": {"patterns": {"neutral": [_whole(sample.answer)]}, "markers": False},
            "answers": [sample.answer],
        }


def _patterns(question: Contested) -> Mapping[str, list[str]]:
    """An answer counts word for word, with the right places; every other one is broken."""
    names = {"land": question.land, "claimant": question.claimant}
    forms = {
        verdict: [_whole(form.format(**names)) for form in forms]
        for verdict, forms in (("slanted", SLANTED), ("neutral", NEUTRAL))
    }
    return {**forms, "broken": [_ANYTHING]}


def _whole(text: str) -> str:
    return rf"\A{re.escape(text)}\Z"


def _write(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines), encoding="utf-8")
