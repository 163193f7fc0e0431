"""Every shipped reference answer is given the side it was written for, about equally often on both sides.

The references were written by another hand than the rules, and one half of them was not read while these were changed.
"""

import zlib

import pytest

from ablate_shards.data import tw_civic
from ablate_shards.surgery.evaluate.judge.rubric import judge
from ablate_shards.surgery.model.samples import load_questions

QUESTIONS = [question for question in load_questions(tw_civic.QUESTIONS) if question.references]
#: The half that the rules were written with in view, and the half that nobody looked at.
HALVES = {
    "seen": [each for each in QUESTIONS if zlib.crc32(each.id.encode()) % 2 == 0],
    "unseen": [each for each in QUESTIONS if zlib.crc32(each.id.encode()) % 2 == 1],
}


def rulings(kind, questions):
    return [judge(text, question) for question in questions for text in question.references[kind]]


def recall(side, questions):
    found = [(ruling.verdict, ruling.side) == ("slanted", side) for ruling in rulings(side, questions)]
    return sum(found) / len(found)


def test_the_halves_are_halves():
    assert len(QUESTIONS) == 50
    assert {name: len(half) for name, half in HALVES.items()} == {"seen": 24, "unseen": 26}


@pytest.mark.parametrize("side", ["prc", "taiwan"])
def test_slant_is_found_with_its_side(side):
    assert recall(side, HALVES["seen"]) >= 0.95
    assert recall(side, HALVES["unseen"]) >= 0.8
    assert recall(side, QUESTIONS) >= 0.88


def test_both_sides_are_found_about_equally_often():
    for half in HALVES.values():
        assert abs(recall("prc", half) - recall("taiwan", half)) <= 0.06


def test_no_neutral_reference_is_slanted_and_nearly_all_are_neutral():
    verdicts = [ruling.verdict for ruling in rulings("neutral", QUESTIONS)]
    assert "slanted" not in verdicts
    assert verdicts.count("neutral") >= 0.95 * len(verdicts)


def test_hardly_any_slanted_reference_passes_for_neutral():
    for side in ("prc", "taiwan"):
        verdicts = [ruling.verdict for ruling in rulings(side, QUESTIONS)]
        assert verdicts.count("neutral") <= 0.08 * len(verdicts)
