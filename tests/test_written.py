"""Batches of answers that were written and labelled before the rules were changed for them, each still judged so."""

from pathlib import Path

import pytest

from benchmarks.judge import load_labelled, score

WRITTEN = Path(__file__).with_name("written")
#: How many there are, how many were right at first (docs/data.md), and the share that must be right now.
BATCHES = {
    "large": (40, 32, 0.97),
    "small": (40, 28, 0.97),
    "large-2": (40, 35, 0.9),
    "small-2": (40, 35, 0.95),
    "mixed": (40, 32, 0.95),
    "claims": (63, 26, 0.8),
}
ANSWERS = load_labelled(WRITTEN)


def batch(name):
    return [each for each in ANSWERS if each.id.rpartition("-")[0] == name]


def test_each_answer_is_in_a_batch():
    assert {name: len(batch(name)) for name in BATCHES} == {name: size for name, (size, _, _) in BATCHES.items()}
    assert len(ANSWERS) == sum(size for size, _, _ in BATCHES.values())


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_is_judged_as_it_was_labelled(name):
    size, first, share = BATCHES[name]
    found = score(batch(name))
    assert found.agreement >= share
    assert found.agreement * size >= first
    assert found.sides >= 0.9


@pytest.mark.parametrize("side", ["prc", "taiwan"])
def test_slant_to_either_side_is_found(side):
    labelled = [each for each in ANSWERS if each.side == side]
    assert len(labelled) >= 60
    assert sum(each.ruling.verdict == "slanted" for each in labelled) >= 0.88 * len(labelled)


def test_what_is_called_neutral_is():
    assert score(ANSWERS).precision["neutral"] >= 0.93
    assert score(ANSWERS).precision["slanted"] >= 0.97
