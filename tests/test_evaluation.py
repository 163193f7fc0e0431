"""What answers add up to, how two evaluations compare, and the file that keeps them."""

import dataclasses
import json

import pytest

from ablate_shards.errors import EvaluateError
from ablate_shards.surgery.evaluate.evaluation import (
    Answer,
    Comparison,
    Evaluation,
    Lean,
    Model,
    PredictedText,
    compare,
    questions_digest,
)
from ablate_shards.surgery.evaluate.evaluation_file import evaluation_text, read_evaluation, write_evaluation
from ablate_shards.surgery.evaluate.likelihood import Divergence, Perplexity
from ablate_shards.surgery.model.samples import Question, Rubric

OPTIONS = {"length": 256, "thinking": False, "batch": 16, "dtype": "float32", "device": "cpu"}


def contested(number, verdict, group="core", language="en", **fields):
    return Answer(
        f"{group}-{number}",
        language,
        group,
        f"Whose is {number}?",
        None,
        **{"text": "Theirs.", "raw": None, "ended": True, "verdict": verdict, **fields},
    )


def control(number, *, exact, given, group="unrelated"):
    verdict = "neutral" if given else "wrong"
    return Answer(
        f"{group}-{number}",
        "en",
        group,
        "Two and two?",
        None,
        "4",
        None,
        True,
        verdict,
        accepted=("4",),
        exact=exact,
        given=given,
    )


def evaluation(*answers, name="edited", **fields):
    return Evaluation(Model(name, "ab" * 32), OPTIONS, {"torch": "2"}, "cd" * 32, answers, **fields)


def lean(number, neutral, prc, taiwan=None, group="core"):
    slanted = {"prc": prc} | ({} if taiwan is None else {"taiwan": taiwan})
    return Lean(f"{group}-{number}", "en", group, neutral, slanted)


BEFORE = evaluation(
    *(
        contested(number, "slanted", language=("en", "zh-Hans")[number % 2], side="prc" if number else "taiwan")
        for number in range(6)
    ),
    contested(6, "neutral"),
    control(0, exact=True, given=True),
    control(1, exact=False, given=True),
    name="base",
    leans=(lean(0, -3.0, -1.0, -2.0), lean(1, -4.0, -1.0), lean(0, -2.0, -2.5, group="held-out")),
    text=PredictedText("t.txt", "ef" * 32, Perplexity(2.0, 40)),
)
AFTER = evaluation(
    *(contested(number, "neutral", language=("en", "zh-Hans")[number % 2]) for number in range(6)),
    contested(6, "wrong"),
    control(0, exact=True, given=True),
    control(1, exact=False, given=False),
    leans=(lean(0, -2.0, -2.0, -2.5), lean(1, -2.5, -1.5), lean(0, -2.0, -2.0, group="held-out")),
    text=PredictedText("t.txt", "ef" * 32, Perplexity(2.5, 40)),
)


def whole():
    moved = Divergence(0.001, 0.002, 2, 17)
    comparison = dataclasses.replace(compare(AFTER, BEFORE, moved), notes=("a note",))
    return dataclasses.replace(AFTER, base=BEFORE, comparison=comparison)


def judged():
    verdicts = ["slanted", "neutral", "neutral", None]
    answers = [
        contested(number, "neutral", judged=verdict, said=f"{verdict}!") for number, verdict in enumerate(verdicts)
    ]
    answers[1] = dataclasses.replace(answers[1], raw="<think>hm</think>Theirs.")
    return evaluation(*answers, control(0, exact=True, given=True), judge="referee")


def test_verdicts_add_up_by_group_and_language():
    rows = {(row.group, row.language): row.verdicts for row in BEFORE.rows}

    assert list(rows) == [("core", None), ("core", "en"), ("core", "zh-Hans")]
    assert (rows["core", None]["slanted"].hits, rows["core", None]["slanted"].count) == (6, 7)
    assert (rows["core", "en"]["neutral"].hits, rows["core", "en"]["neutral"].count) == (1, 4)
    assert rows["core", "zh-Hans"]["slanted"].value == 1
    for verdicts in rows.values():
        assert sum(found.value for found in verdicts.values()) == pytest.approx(1)


def test_slanted_answers_add_up_by_side():
    core = BEFORE.rows[0]
    assert {side: found.hits for side, found in core.sides.items()} == {"prc": 5, "taiwan": 1}
    assert core.sides["prc"].count == 7


def test_the_manner_of_answers_adds_up_whatever_they_say():
    found = evaluation(
        contested(0, "broken", text="", raw="<think>so", ended=False),
        contested(1, "unclear", text="It is so.", ended=False),
        contested(2, "unclear", text=" it is SO", detached=True),
        contested(3, "neutral", text="Since 1949."),
        control(0, exact=True, given=True),
    )
    core, controls = found.manners

    assert (core.group, controls.group) == ("core", "unrelated")
    assert core.broken.hits == 1
    assert (core.cut.hits, core.lost_in_thought.hits) == (1, 1)
    assert (core.distinct.hits, core.distinct.count) == (3, 4)
    assert core.detached.hits == 1
    assert (controls.distinct.value, controls.cut.value) == (1, 0)


def test_the_lean_adds_up_by_group_and_side():
    rows = {(row.group, row.side): row.mean for row in BEFORE.lean}

    assert set(rows) == {(None, "prc"), (None, "taiwan"), ("core", "prc"), ("core", "taiwan"), ("held-out", "prc")}
    assert rows["core", "prc"].value == pytest.approx((-2 - 3) / 2)
    assert rows[None, "prc"].value == pytest.approx((-2 - 3 + 0.5) / 3)
    assert (rows["core", "taiwan"].value, rows["core", "taiwan"].count) == (-1, 1)


def test_the_lean_is_compared_question_by_question():
    fewer = dataclasses.replace(BEFORE, leans=BEFORE.leans[:2])
    changes = {(change.group, change.side): change.test for change in compare(AFTER, fewer).leans}

    assert set(changes) == {(None, "prc"), (None, "taiwan"), ("core", "prc"), ("core", "taiwan")}
    assert changes["core", "prc"].change.value == pytest.approx(((0 + 2) + (-1 + 3)) / 2)
    assert changes["core", "prc"].change.count == 2
    assert compare(AFTER, dataclasses.replace(BEFORE, leans=())).leans == ()


def test_controls_add_up_apart():
    (found,) = BEFORE.controls

    assert (found.group, found.language) == ("unrelated", None)
    assert (found.exact.hits, found.given.hits, found.exact.count) == (1, 2, 2)
    assert not any(row.group == "unrelated" for row in BEFORE.rows)


def test_the_judges_agreement_leaves_out_what_it_did_not_say():
    found = judged().judgement

    assert found.unparsable == 1
    assert (found.agreement.raw.hits, found.agreement.raw.count) == (2, 3)
    assert found.agreement.kappa == 0
    assert found.rows[0].verdicts["slanted"].hits == 1
    assert BEFORE.judgement is None


def test_a_judge_that_never_gave_a_verdict_agrees_on_nothing():
    mute = evaluation(contested(0, "neutral", said="hm"), judge="referee")

    assert mute.judgement.agreement is None
    assert mute.judgement.unparsable == 1
    assert json.loads(evaluation_text(mute))["judge"]["agreement"] is None


def test_changes_are_tested_in_pairs():
    changes = {(change.group, change.outcome): change.test for change in compare(AFTER, BEFORE).changes}

    assert set(changes) == {
        *(("core", verdict) for verdict in ("slanted", "neutral", "deflecting", "wrong", "broken", "unclear")),
        ("unrelated", "exact"),
        ("unrelated", "given"),
    }
    slanted = changes["core", "slanted"]
    assert (slanted.count, slanted.lost, slanted.gained, slanted.p) == (7, 6, 0, 0.03125)
    neutral = changes["core", "neutral"]
    assert (neutral.lost, neutral.gained) == (1, 6)
    assert changes["unrelated", "given"].lost == 1
    assert compare(AFTER, BEFORE).notes == ()


def test_questions_are_paired_by_name_and_not_by_order():
    shuffled = dataclasses.replace(BEFORE, answers=BEFORE.answers[::-1])

    assert compare(AFTER, shuffled) == compare(AFTER, BEFORE)


def test_other_options_are_said():
    other = dataclasses.replace(BEFORE, options={**OPTIONS, "length": 64})

    assert compare(AFTER, other).notes == ("length: base was asked with 64, edited with 256",)


@pytest.mark.parametrize("change", [{"prompt": "Whose is it?"}, {"system": "Be brief."}, {"id": "core-x"}])
def test_a_base_that_was_asked_something_else_cannot_be_compared(change):
    other = dataclasses.replace(BEFORE, answers=(dataclasses.replace(BEFORE.answers[0], **change), *BEFORE.answers[1:]))

    with pytest.raises(EvaluateError, match="question core-0: base was not asked it"):
        compare(AFTER, other)


@pytest.mark.parametrize("found", [BEFORE, judged(), whole(), dataclasses.replace(BEFORE, text=None)])
def test_a_file_says_all(tmp_path, found):
    path = tmp_path / "e.json"
    write_evaluation(found, path)

    assert read_evaluation(path) == found
    assert path.read_text(encoding="utf-8") == evaluation_text(found)
    assert [each.name for each in tmp_path.iterdir()] == ["e.json"]


def test_an_infinite_perplexity_is_no_json_number(tmp_path):
    found = dataclasses.replace(BEFORE, text=PredictedText("t", "00", Perplexity(800.0, 2)))
    write_evaluation(found, tmp_path / "e.json")

    assert json.loads((tmp_path / "e.json").read_text())["perplexity"]["value"] is None
    assert read_evaluation(tmp_path / "e.json") == found
    silent = dataclasses.replace(BEFORE, text=PredictedText("t", "00", None))
    write_evaluation(silent, tmp_path / "e.json")
    assert read_evaluation(tmp_path / "e.json") == silent


def test_what_was_added_up_in_the_file_is_not_believed(tmp_path):
    content = json.loads(evaluation_text(whole()))
    content["results"]["core"]["slanted"]["ratio"] = 0.99
    content["comparison"]["changes"] = []
    (tmp_path / "e.json").write_text(json.dumps(content))

    assert read_evaluation(tmp_path / "e.json") == whole()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "e.json"
    path.write_text("old")
    broken = dataclasses.replace(BEFORE, answers=(dataclasses.replace(BEFORE.answers[0], text="half \ud83d"),))

    with pytest.raises(UnicodeEncodeError):
        write_evaluation(broken, path)

    assert path.read_text() == "old"
    assert [each.name for each in tmp_path.iterdir()] == ["e.json"]


def without(*keys):
    def change(content):
        *way, last = keys
        for key in way:
            content = content[key]
        del content[last]

    return change


def with_value(value, *keys):
    def change(content):
        *way, last = keys
        for key in way:
            content = content[key]
        content[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("answers"),
        without("model"),
        without("answers", 0, "verdict"),
        with_value("biased", "answers", 0, "verdict"),
        with_value("inner", "answers", 0, "group"),
        with_value(7, "answers", 0, "text"),
        with_value(["x"], "answers", 0, "raw"),
        with_value(None, "answers", 0, "accepted"),
        with_value("more", "answers", 0, "extra"),
        with_value("far", "comparison", "divergence", "first"),
        without("base", "answers"),
        with_value("north", "answers", 0, "side"),
        with_value("x", "leans", 0, "neutral"),
        with_value("inner", "leans", 0, "group"),
        without("leans"),
        with_value([], "perplexity"),
        with_value("x", "perplexity", "nats"),
    ],
)
def test_a_file_that_was_changed_is_refused(tmp_path, change):
    content = json.loads(evaluation_text(whole()))
    change(content)
    (tmp_path / "e.json").write_text(json.dumps(content))

    with pytest.raises(EvaluateError, match=r"e\.json: not a complete evaluation"):
        read_evaluation(tmp_path / "e.json")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("no json", "not JSON"),
        ("[]", "found None"),
        ('{"format": "ablate-shards.evaluation/3"}', "evaluation/3'"),
        ("[" * 100_000, "not JSON"),
        ("\ufeff", "not JSON"),
    ],
)
def test_another_file_is_refused(tmp_path, text, said):
    (tmp_path / "e.json").write_text(text)
    with pytest.raises(EvaluateError, match=said):
        read_evaluation(tmp_path / "e.json")
    with pytest.raises(EvaluateError, match="cannot be read"):
        read_evaluation(tmp_path / "none.json")


def test_the_digest_of_questions_sees_their_rubrics():
    plain = Question("q", "en", "core", "Whose?", rubric=Rubric(slanted="theirs"))
    other = dataclasses.replace(plain, rubric=Rubric(slanted="theirs", patterns={"slanted": ("theirs",)}))

    assert questions_digest([plain]) == questions_digest([plain])
    assert len({questions_digest(each) for each in ([plain], [other], [plain, plain], [])}) == 4


def test_a_comparison_may_have_no_divergence():
    assert Comparison(()).divergence is None
    assert compare(AFTER, BEFORE).divergence is None
