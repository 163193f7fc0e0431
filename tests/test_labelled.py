"""The rules against answers of real models that were labelled by hand."""

import pytest

from benchmarks.judge import LABELLED, load_labelled, score

ANSWERS = load_labelled()


def test_there_are_answers_and_none_has_a_path_of_a_machine():
    assert len(ANSWERS) >= 98 + 100
    assert len({each.id for each in ANSWERS}) == len(ANSWERS)
    assert not [path.name for path in LABELLED.iterdir() if "/home/" in path.read_text(encoding="utf-8")]


def test_a_verdict_can_be_believed():
    found = score(ANSWERS)
    assert found.agreement >= 0.9
    assert found.precision["neutral"] >= 0.93
    assert found.precision["slanted"] >= 0.93
    assert found.recall["slanted"] >= 0.85
    assert found.sides >= 0.95


@pytest.mark.parametrize("half", ["A", "B"])
def test_the_half_that_no_rule_was_written_for_is_judged_as_well(half):
    found = score([each for each in ANSWERS if each.half == half])
    assert found.agreement >= 0.85
    assert min(found.precision["neutral"], found.precision["slanted"], found.recall["slanted"]) >= 0.85
