"""Pairs, instructions and questions are read line by line; what is wrong is named by file, line and key."""

import json

import pytest

from ablate_shards.errors import AblateError, SamplesError
from ablate_shards.surgery.model.samples import (
    Instruction,
    Pair,
    Question,
    Rubric,
    Turn,
    load_instructions,
    load_pairs,
    load_questions,
)


@pytest.fixture
def file(tmp_path):
    def write(*lines):
        path = tmp_path / "samples.jsonl"
        path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), "utf-8")
        return path

    return write


def test_a_pair_may_be_two_prompts(file):
    assert load_pairs(file({"positive": "a", "negative": "b"})) == (Pair("1", "und", Turn("a"), Turn("b")),)


def test_a_pair_may_have_responses_and_system_messages(file):
    side = {"prompt": "a", "response": "b", "system": "c"}
    (pair,) = load_pairs(file({"id": "x", "language": "zh-Hant", "positive": side, "negative": {"prompt": "d"}}))
    assert pair == Pair("x", "zh-Hant", Turn("a", "b", "c"), Turn("d"))


def test_messages_are_in_the_order_of_a_chat():
    assert Turn("a", "b", "c").messages() == [
        {"role": "system", "content": "c"},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
    ]
    assert Turn("a").messages() == [{"role": "user", "content": "a"}]


def test_an_instruction_is_read_with_what_it_leaves_out(file):
    plain, full = load_instructions(
        file(
            {"prompt": "a", "response": "b"},
            {
                "id": "x",
                "language": "en",
                "kind": "contested",
                "prompt": "c",
                "response": "d",
                "system": "e",
                "sources": ["f"],
                "as_of": "2024-06-30",
            },
        )
    )
    assert plain == Instruction("1", "und", "general", "a", "b")
    assert full == Instruction("x", "en", "contested", "c", "d", "e", ("f",), "2024-06-30")
    assert full.turn == Turn("c", "d", "e")


def test_a_question_is_read_with_its_rubric(file):
    rubric = {"slanted": "s", "patterns": {"slanted": ["^yes"], "neutral": []}, "markers": False}
    plain, full = load_questions(
        file({"prompt": "a"}, {"prompt": "b", "group": "unrelated", "rubric": rubric, "answers": ["c"]})
    )
    assert plain == Question("1", "und", "held-out", "a")
    assert full.rubric == Rubric("s", patterns={"slanted": ("^yes",), "neutral": ()}, markers=False)
    assert full.answers == ("c",)
    assert full.turn == Turn("b")


def test_empty_lines_and_a_byte_order_mark_are_passed_over_but_counted(file):
    path = file("", {"positive": "a", "negative": "b"}, " ")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_pairs(path)[0].id == "2"


def test_a_line_separator_inside_a_text_is_text(file):
    assert load_pairs(file('{"positive": "a\u2028b", "negative": "c"}'))[0].positive.prompt == "a\u2028b"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"positive": "a"}, "line 2: expected negative"),
        ({"positive": "a", "negative": ""}, 'line 2: negative: prompt: expected text, found ""'),
        ({"positive": "a", "negative": "  "}, 'line 2: negative: prompt: expected text, found "  "'),
        ({"positive": {"response": "a"}, "negative": "b"}, "line 2: positive: expected prompt"),
        ({"positive": {"prompt": "a", "response": ""}, "negative": "b"}, "line 2: positive: response: expected text"),
        ({"positive": "a", "negatif": "b"}, "unknown key 'negatif'; the nearest known one is 'negative'"),
        ({"positive": ["a"], "negative": "b"}, 'positive: expected text, or an object with prompt, found ["a"]'),
        ({"id": "1", "positive": "a", "negative": "b"}, "line 2: the id '1' is taken by line 1"),
        ({"id": True, "positive": "a", "negative": "b"}, "line 2: id: expected text or a number, found true"),
        ("[1, 2]", "line 2: expected an object, found [1, 2]"),
        ("{", "line 2: expected one JSON object a line, found text that is not JSON"),
        ("[" * 100_000, "line 2: "),
        ('{"positive": "\\ud800", "negative": "b"}', "line 2: positive: prompt: expected text, found half a character"),
        ('{"positive": "a", "positive": "b", "negative": "c"}', "line 2: the key 'positive' stands there twice"),
    ],
)
def test_what_is_no_pair_is_named(file, line, said):
    path = file({"positive": "a", "negative": "b"}, line)
    with pytest.raises(SamplesError) as caught:
        load_pairs(path)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert isinstance(caught.value, AblateError)


ANSWERED = {"positive": {"prompt": "a", "response": "b"}, "negative": {"prompt": "a", "response": "c"}}
UNANSWERED = {"positive": "a", "negative": "b"}


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([UNANSWERED, UNANSWERED, ANSWERED, UNANSWERED], "line 3: expected no responses as in the lines before, found"),
        ([ANSWERED, ANSWERED, UNANSWERED, ANSWERED], "line 3: expected responses as in the lines before, found none"),
    ],
)
def test_a_file_has_pairs_of_one_kind(file, lines, said):
    with pytest.raises(SamplesError) as caught:
        load_pairs(file(*lines))
    assert said in str(caught.value)
    assert "files of their own" in str(caught.value)
    assert len(load_pairs(file(ANSWERED, ANSWERED))) == len(load_pairs(file(UNANSWERED, UNANSWERED))) == 2


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        ("a", "a"),
        ("a", {"prompt": "a"}),
        ({"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b\n"}),
        ({"prompt": "a", "response": "b", "system": "c"}, {"prompt": "a", "response": "b", "system": "c"}),
    ],
)
def test_a_pair_has_a_contrast(file, positive, negative):
    with pytest.raises(SamplesError, match="line 1: both sides are the same, so there is nothing to contrast"):
        load_pairs(file({"positive": positive, "negative": negative}))
    system = {"positive": {"prompt": "a", "system": "b"}, "negative": {"prompt": "a", "system": "c"}}
    assert len(load_pairs(file(system))) == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a"}, "line 1: expected response"),
        ({"prompt": "a", "response": ""}, 'line 1: response: expected text, found ""'),
        ({"prompt": "a", "response": "b", "kind": "odd"}, "kind: expected one of contested, general, everyday"),
        ({"prompt": "a", "response": "b", "kind": ["general"]}, "kind: expected one of"),
        ({"prompt": "a", "response": "b", "sources": "c"}, "sources: expected a list of texts"),
        ({"prompt": "a", "response": "b", "as_of": "last year"}, "as_of: expected a date such as 2024-06-30"),
    ],
)
def test_what_is_no_instruction_is_named(file, line, said):
    with pytest.raises(SamplesError) as caught:
        load_instructions(file(line))
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a", "group": "none"}, "group: expected one of core, held-out, related, unrelated"),
        ({"prompt": "a", "rubric": "b"}, "rubric: expected an object"),
        ({"prompt": "a", "rubric": {"slant": "b"}}, "rubric: unknown key 'slant'; the nearest known one is 'slanted'"),
        ({"prompt": "a", "rubric": {"patterns": {"good": ["b"]}}}, "rubric: patterns: expected one of slanted"),
        ({"prompt": "a", "rubric": {"patterns": {"slanted": ["("]}}}, "'(' is not a regular expression"),
        ({"prompt": "a", "rubric": {"markers": 1}}, "rubric: markers: expected true or false, found 1"),
        ({"prompt": "a", "rubric": {"patterns": {"unclear": ["b"]}}}, 'broken, found "unclear"'),
        (
            {"prompt": "a", "rubric": {"patterns": {"slanted": ["b"], "neutral": []}}},
            "rubric: patterns: expected some for neutral, the facts without which no answer counts as neutral, found "
            "slanted; add them, or leave patterns and markers out",
        ),
        ({"prompt": "a", "rubric": {"markers": False}}, "rubric: patterns: expected some for neutral"),
        (
            {"prompt": "a", "references": {"neutral": ["b"]}},
            "references: expected neutral answers and those of a side, such as prc, to compare them with, found "
            "neutral; add the partner, or leave references out",
        ),
        ({"prompt": "a", "references": {"prc": ["b"], "taiwan": ["c"]}}, "found prc and taiwan; add the partner"),
        ({"prompt": "a", "references": {"neutral": ["b"], "prc": []}}, "references: prc: expected at least one answer"),
        (
            {"prompt": "a", "references": {"neutral": ["b"], "prc": ["c", "b"]}},
            'references: "b" stands under neutral and prc; expected different answers',
        ),
    ],
)
def test_what_is_no_question_is_named(file, line, said):
    with pytest.raises(SamplesError) as caught:
        load_questions(file(line))
    assert said in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path, file):
    with pytest.raises(SamplesError, match="does not exist"):
        load_pairs(tmp_path / "none")
    with pytest.raises(SamplesError, match="cannot be read"):
        load_pairs(tmp_path)
    with pytest.raises(SamplesError, match="found no line at all"):
        load_pairs(file("", ""))
    (tmp_path / "latin").write_bytes(b'{"positive": "\xe9", "negative": "b"}')
    with pytest.raises(SamplesError, match="UTF-8"):
        load_pairs(tmp_path / "latin")


def test_a_rubric_in_words_alone_and_a_control_need_no_facts(file):
    rubric = {"slanted": "s", "neutral": "n"}
    control = {"prompt": "b", "answers": ["c"], "rubric": {"patterns": {"wrong": ["d"]}}}
    assert len(load_questions(file({"prompt": "a", "rubric": rubric}, control))) == 2
