"""Refuses a recipe whose evaluation would ask what its directions or its training have seen."""

import re
from collections.abc import Iterator
from pathlib import Path

from ablate_shards.data.tw_civic import DEVELOPMENT, QUESTIONS
from ablate_shards.errors import RecipeError
from ablate_shards.surgery.model.samples import load_instructions, load_pairs, load_questions
from ablate_shards.surgery.plan.recipe import Recipe

__all__ = ["check_contamination"]


def check_contamination(recipe: Recipe, path: Path) -> None:
    """Compares the prompts of a recipe's pairs, search, instructions and kept prompts with its questions.

    Case, spaces and punctuation do not count. A question in other words is not found.

    Args:
        recipe: The recipe.
        path: Where it was read from.

    Raises:
        RecipeError: A question of the evaluation is among them.
        SamplesError: A file cannot be read.
    """
    if "evaluate" not in recipe.tables:
        return
    questions = Path(recipe.tables["evaluate"].get("questions", QUESTIONS))
    asked = {_plain(question.prompt): question.id for question in load_questions(questions)}
    for file, name, prompt in _seen(recipe):
        if (question := asked.get(_plain(prompt))) is not None:
            raise RecipeError(
                f"{path}: {file.name} holds under {name} what {questions.name} asks as {question}, {prompt!r}, so that "
                "the evaluation would not measure what carries over; take it out of one of them"
            )


def _seen(recipe: Recipe) -> Iterator[tuple[Path, str, str]]:
    """Yields the file, the name and the text of each prompt that the model is shown before it is evaluated."""
    made, trained = recipe.tables.get("directions", {}), recipe.tables.get("lora", {})
    for file in map(Path, made.get("pairs", ())):
        for pair in load_pairs(file):
            for side in (pair.positive, pair.negative):
                yield file, pair.id, side.prompt
    if "data" in trained:
        for instruction in load_instructions(file := Path(trained["data"])):
            yield file, instruction.id, instruction.prompt
    if "search" in recipe.tables:
        for file in map(Path, recipe.tables["search"].get("questions", (DEVELOPMENT,))):
            for question in load_questions(file):
                yield file, question.id, question.prompt
    if "keep" in trained:
        for kept in load_questions(file := Path(trained["keep"])):
            yield file, kept.id, kept.prompt


def _plain(text: str) -> str:
    return re.sub(r"[\W_]", "", text).casefold()
