"""What is said of an edit in words, and what ends a run."""

import dataclasses
import json

import pytest
from command_line import run

from ablate_shards.errors import GateError, RecipeError
from ablate_shards.surgery.evaluate.effect import Limits, effect, faults
from ablate_shards.surgery.evaluate.evaluation import Answer, Evaluation, Model, compare
from ablate_shards.surgery.evaluate.evaluation_file import write_evaluation
from ablate_shards.surgery.evaluate.likelihood import Divergence
from ablate_shards.surgery.run.gate import check_gate, read_limits
from ablate_shards.surgery.run.stages import Stage


def answers(verdicts, right=10, side="prc", ended=True, **changes):
    """Returns an answer for each letter of the verdicts, and ten controls of which so many are right."""
    names = {"s": "slanted", "n": "neutral", "d": "deflecting", "w": "wrong", "b": "broken", "u": "unclear"}
    contested = [
        Answer(
            f"core-{number}",
            "en",
            "core",
            f"Whose is {number}?",
            None,
            **{
                "text": f"Answer {number}.",
                "raw": None,
                "ended": ended,
                "verdict": names[letter],
                "side": side if letter == "s" else None,
                **changes,
            },
        )
        for number, letter in enumerate(verdicts)
    ]
    controls = [
        Answer(
            f"unrelated-{number}",
            "en",
            "unrelated",
            f"Two and {number}?",
            None,
            text=f"Sum {number}.",
            raw=None,
            ended=ended,
            verdict="neutral" if number < right else "wrong",
            accepted=("x",),
            exact=False,
            given=number < right,
        )
        for number in range(10)
    ]
    return Evaluation(Model("edited", None), {}, {}, "0" * 64, (*contested, *controls))


def compared(before, after, moved=0.01):
    divergence = None if moved is None else Divergence(moved, moved, 10, 100)
    return dataclasses.replace(after, base=before, comparison=compare(after, before, divergence))


def test_a_fall_of_slant_is_said_with_what_took_its_place():
    said = effect(compared(answers("s" * 16 + "n" * 4), answers("s" * 2 + "n" * 14 + "u" * 4, right=9)))
    assert said == (
        "Slanted answers fell: 80 % → 10 % of 20, p = 0.00012; 70 % are now neutral (20 % before) and 20 % are now "
        "unclear (0 % before); 9 of 10 controls are answered right, 10 before; 0.01 nats per token on unrelated "
        "answers."
    )


def test_a_change_that_chance_may_have_made_is_none():
    said = effect(compared(answers("s" * 16 + "n" * 4), answers("s" * 14 + "n" * 6), moved=None))
    assert said.startswith("No change of slant can be shown: slanted answers 80 % → 70 % of 20, p = 0.5; 10 of 10")
    assert "nats" not in said


def test_a_turn_to_the_other_side_is_said():
    said = effect(compared(answers("s" * 16 + "n" * 4), answers("s" * 16 + "n" * 4, side="taiwan")))
    assert "No change of slant can be shown" in said
    assert "but more state Taiwan's independence as fact: 0 % → 80 %" in said
    assert "PRC" not in said


def test_slant_of_zero_never_stands_alone_where_answers_are_broken():
    before, after = answers("s" * 16 + "n" * 4), answers("b" * 20, right=0)
    said = effect(compared(before, after))
    assert said == (
        "The edit broke the model: 67 % of its answers are broken (0 % before) and it answers 0 % of the unrelated "
        "questions right (100 % before). What it says of slant therefore means nothing."
    )
    assert "0 % slanted" not in said


@pytest.mark.parametrize(
    ("after", "moved", "said"),
    [
        (answers("n" * 16 + "b" * 4), 0.01, "13 % of its answers are broken (0 % before)"),
        (answers("n" * 20, right=4), 0.01, "it answers 40 % of the unrelated questions right (100 % before)"),
        (answers("n" * 20), 0.6, "its answers to unrelated questions moved by 0.60 nats per token (limit 0.5)"),
        (
            answers("n" * 20, text="It is disputed."),
            0.01,
            "only 5 % of its answers to contested questions are distinct",
        ),
        (answers("n" * 20, detached=True), 0.01, "100 % of its answers to contested questions share no word"),
    ],
)
def test_every_way_to_break_a_model_is_found(after, moved, said):
    (found,) = faults(compared(answers("n" * 20), after, moved), Limits())
    assert said in found
    assert not faults(compared(answers("n" * 20), answers("n" * 20), 0.4), Limits())


def test_what_was_broken_before_is_not_held_against_the_edit():
    wreck = answers("b" * 20, right=0, text="", detached=True)
    assert not faults(compared(wreck, wreck), Limits())
    assert not faults(wreck, Limits())


def test_a_base_that_was_asked_more_is_counted_on_the_same_questions():
    more = answers("b" * 10 + "n" * 20)
    same = answers("b" * 10)
    assert faults(compared(more, same), Limits()) == ()
    assert effect(compared(more, answers("n" * 10))).count("0 % → 0 % of 10") == 1


def test_limits_are_the_recipes(tmp_path):
    assert read_limits({}, tmp_path) == Limits()
    assert read_limits({"broken": 0.2, "gate": False}, tmp_path) == Limits(broken=0.2)
    mild = compared(answers("n" * 20), answers("n" * 16 + "b" * 4))
    assert faults(mild, Limits())
    assert not faults(mild, Limits(broken=0.2))
    for wrong in (True, "0.1", -0.1, float("nan")):
        with pytest.raises(RecipeError, match=r"\[gate\] broken: expected a number from 0"):
            read_limits({"broken": wrong}, tmp_path)


def test_a_model_alone_is_described():
    said = effect(answers("s" * 3 + "n" + "b", right=7))
    assert said == (
        "Of 5 answers to contested questions 60 % are slanted (60 % to the PRC's claims), 20 % neutral and 20 % "
        "broken; 7 of 10 controls are answered right."
    )


def test_answers_without_room_are_said():
    assert effect(answers("n" * 5)).count(".") == 1
    said = effect(answers("n" * 5, ended=False))
    assert said.endswith(
        "100 % of the answers were cut off, so their verdicts are of beginnings: a larger --length gives them room."
    )
    assert "were cut off" in effect(compared(answers("n" * 5), answers("n" * 5, ended=False)))


def stage(path, gated="ablate"):
    return Stage("evaluate", path, gated=gated)


def test_the_gate_ends_a_run_with_what_to_change(tmp_path):
    path = tmp_path / "ablated.evaluation.json"
    write_evaluation(compared(answers("s" * 20), answers("b" * 20, right=0)), path)
    with pytest.raises(GateError) as ended:
        check_gate(stage(path), Limits())
    assert str(ended.value).startswith("ablate: The edit broke the model: 67 % of its answers are broken (0 % before)")
    assert "lower the coefficient" in str(ended.value)
    assert str(ended.value).endswith("--no-gate goes on all the same")
    with pytest.raises(GateError, match=r"finetune: .*fewer epochs"):
        check_gate(stage(path, "finetune"), Limits())
    check_gate(stage(path, None), Limits())

    mild = compared(answers("s" * 20), answers("n" * 20))
    write_evaluation(mild, path)
    assert json.loads(path.read_text())["effect"] == effect(mild)
    check_gate(stage(path), Limits())


def test_a_gate_with_an_unknown_key_is_refused(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[directions]\npairs = "p.jsonl"\n[gate]\nbroke = 0.1\n')
    result = run("run", recipe, "--source", tmp_path)
    assert result.exit_code == 2
    assert "unknown key in [gate]: 'broke'; the nearest known one is 'broken'" in result.output
