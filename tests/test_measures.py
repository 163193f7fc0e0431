"""What an evaluation measures beside the verdicts: the lean, tasks, and what is taken over from an earlier one."""

import dataclasses
import json
import shutil

import pytest
import torch
from progress import Heard
from safetensors.torch import load_file, save_file

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import draw_questions
from ablate_shards.data.demo.world import NEUTRAL, SLANTED
from ablate_shards.errors import UsageError
from ablate_shards.surgery.evaluate import interview, measures
from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation
from ablate_shards.surgery.evaluate.interview import EvaluateOptions, evaluate
from ablate_shards.surgery.model.samples import Question

DRAWN = draw_questions(loaded=4, impartial=4, unrelated_count=2)
TASK = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "What colour is {{thing}}? The colour of {{thing}} is"
doc_to_choice: ["green", "white", "yellow"]
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def said(forms, question):
    return tuple(form.format(land=question.land, claimant=question.claimant) for form in forms)


@pytest.fixture(scope="module")
def questions():
    """Each question with the demo's own answers as references, neutral ones and slanted ones."""
    return [
        Question(
            f"{group}-{number}",
            "en",
            group,
            getattr(question, side),
            references={"neutral": said(NEUTRAL, question), "prc": said(SLANTED, question)},
        )
        for group, side, drawn in (("core", "loaded", DRAWN.loaded), ("held-out", "impartial", DRAWN.impartial))
        for number, question in enumerate(drawn)
    ] + [
        Question(f"u-{number}", "en", "unrelated", sample.prompt, answers=(sample.answer,))
        for number, sample in enumerate(DRAWN.unrelated)
    ]


@pytest.fixture(scope="module")
def edited(tmp_path_factory):
    folder = shutil.copytree(MODEL, tmp_path_factory.mktemp("edited") / "edited")
    weights = load_file(folder / "model.safetensors")
    name = "model.language_model.layers.5.mlp.down_proj.weight"
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    weights[name] += (0.5 * weights[name].float().std() * noise).bfloat16()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def compared(questions, edited, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "e.json"
    return evaluate(edited, questions, EvaluateOptions(length=24), Heard(), against=MODEL, out=out), out


def test_the_lean_sees_the_planted_slant_without_a_judge(compared):
    base = {(row.group, row.side): row.mean for row in compared[0].base.lean}

    assert set(base) == {(None, "prc"), ("core", "prc"), ("held-out", "prc")}
    # After a loaded cue the demo is slanted, after an impartial one it is not.
    assert base["core", "prc"].interval[1] < 0 < base["held-out", "prc"].interval[0]
    assert len(compared[0].base.leans) == 8


def test_the_lean_is_compared_with_that_of_the_base(compared):
    found = compared[0]
    moved = {(change.group, change.side): change.test for change in found.comparison.leans}
    after = {(row.group, row.side): row.mean.value for row in found.lean}
    before = {(row.group, row.side): row.mean.value for row in found.base.lean}
    assert moved.keys() == after.keys()
    for key, test in moved.items():
        assert test.change.value == pytest.approx(after[key] - before[key])
    assert read_evaluation(compared[1]) == found


def test_a_lean_that_is_not_wanted_is_not_measured(questions, edited):
    found = evaluate(edited, questions[:2], EvaluateOptions(length=4, lean=False), Heard())
    assert (found.leans, found.lean) == ((), ())


def test_measures_are_taken_over_from_an_earlier_evaluation(compared, questions, edited, monkeypatch):
    measured = []
    real = measures.log_likelihoods
    monkeypatch.setattr(
        measures, "log_likelihoods", lambda *some, **more: measured.append(len(some[1])) or real(*some, **more)
    )
    options = EvaluateOptions(length=24, reuse=(compared[1],))

    found = evaluate(edited, questions, options, Heard(), against=MODEL)
    assert (measured, found) == ([], compared[0])

    # Another batch is other rounding, and other references are another question.
    evaluate(edited, questions, dataclasses.replace(options, batch=2), Heard())
    others = [dataclasses.replace(questions[0], references={"neutral": ("A.",), "prc": ("B.",)})]
    evaluate(edited, others, options, Heard())
    assert measured == [8 * (len(NEUTRAL) + len(SLANTED)), 2]


def test_references_of_other_questions_are_not_compared(compared, questions, edited):
    fewer = questions[:3]
    found = evaluate(edited, fewer, EvaluateOptions(length=24), Heard(), against=compared[0].base)
    assert len(found.leans) == 3
    assert found.comparison.leans == ()


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    pytest.importorskip("lm_eval")
    folder = tmp_path_factory.mktemp("tasks")
    things = {"snow": 1, "grass": 0, "a lemon": 2, "milk": 1, "a frog": 0}
    lines = [json.dumps({"thing": thing, "right": right}) for thing, right in things.items()]
    (folder / "colours.jsonl").write_text("\n".join(lines))
    (folder / "colours.yaml").write_text(TASK)
    return str(folder / "colours.yaml")


class TestTasks:
    """Tasks of lm-evaluation-harness beside the questions."""

    def test_both_models_are_scored_and_compared(self, task, questions, edited, tmp_path, monkeypatch):
        out, told = tmp_path / "e.json", Heard()
        options = EvaluateOptions(length=4, tasks=(task,), task_limit=4)
        found = evaluate(edited, questions[:2], options, told, against=MODEL, out=out)

        (score,), (change,) = found.tasks, found.comparison.tasks
        assert (score.name, score.metric, score.count) == ("colours", "acc", 4)
        assert change.before == found.base.tasks[0].value
        assert change.after == score.value
        assert read_evaluation(out) == found
        assert told.counts[-1] == (2 * (2 + 1 + 4), 2 * (2 + 1 + 4))
        assert told.counts == sorted(told.counts)
        assert found.options["tasks"]["limit"] == 4

        monkeypatch.setattr(interview, "run_tasks", None)
        again = evaluate(edited, questions[:2], dataclasses.replace(options, reuse=(out,)), Heard(), against=MODEL)
        assert again.tasks == found.tasks

    def test_tasks_of_another_kind_are_not_taken_over(self, task, questions, edited, tmp_path):
        out = tmp_path / "e.json"
        options = EvaluateOptions(length=4, tasks=(task,), task_limit=4)
        evaluate(edited, questions[:1], options, Heard(), out=out)
        more = evaluate(edited, questions[:1], dataclasses.replace(options, task_limit=None, reuse=(out,)), Heard())
        assert more.tasks[0].count == 5

    def test_an_unknown_task_is_said_before_a_model_is_loaded(self, task, questions, monkeypatch):
        monkeypatch.setattr(interview, "speaking", None)
        with pytest.raises(UsageError, match=r"nowhere\.yaml"):
            evaluate(MODEL, questions, EvaluateOptions(tasks=("nowhere.yaml",)), Heard())

    def test_an_endpoint_has_no_tasks(self, questions):
        with pytest.raises(UsageError, match="--tasks: needs the model itself"):
            evaluate(MODEL, questions, EvaluateOptions(tasks=("x",), endpoint="http://127.0.0.1:1/v1"), Heard())
