"""Thoughts are parted from answers, however a chat template opened them."""

import pytest

from ablate_shards.surgery.evaluate.thoughts import Parted, without_thoughts


@pytest.mark.parametrize(
    ("said", "answer", "thoughts"),
    [
        ("Plain.", "Plain.", None),
        ("  spaces \n", "spaces", None),
        ("<think>\nhm\n</think>\n\nYes.", "Yes.", "hm"),
        ("<think></think>Yes.", "Yes.", ""),
        ("opened in the prompt</think>Yes.", "Yes.", "opened in the prompt"),
        ("<think>cut off", "", "cut off"),
        ("Yes. <think>then cut off", "Yes.", "then cut off"),
        ("<think>one</think>Yes <think>two</think>indeed.", "Yes indeed.", "one\ntwo"),
        ("", "", None),
        ("1 < 2 > 1", "1 < 2 > 1", None),
    ],
)
def test_the_two_parts(said, answer, thoughts):
    assert without_thoughts(said) == Parted(answer, thoughts)
