"""A small real model: what no model of our own can show."""

import math
import shutil

import pytest
import torch
from progress import Heard
from safetensors.torch import load_file, save_file

from ablate_shards.data import tw_civic
from ablate_shards.surgery.evaluate.effect import Limits, effect, faults
from ablate_shards.surgery.evaluate.interview import EvaluateOptions, evaluate
from ablate_shards.surgery.model.samples import load_questions
from benchmarks.real import NotHere, build

pytestmark = pytest.mark.real

#: In float32, so that the answers are the same on every processor.
OPTIONS = EvaluateOptions(length=64, dtype="float32")


@pytest.fixture(scope="module")
def smollm():
    try:
        return build("smollm")
    except NotHere as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def questions():
    every = load_questions(tw_civic.QUESTIONS)
    wanted = ("core-en-1", "core-en-2", "held-out-en-03", "unrelated-en-03", "unrelated-en-04", "unrelated-en-06")
    return [question for question in every if question.id in wanted]


@pytest.fixture(scope="module")
def before(smollm, questions):
    return evaluate(smollm, questions, OPTIONS, Heard())


def test_a_real_model_answers_in_words_and_leans(before):
    assert len(before.answers) == 6
    assert not [answer for answer in before.answers if answer.verdict == "broken"]
    assert sum(answer.given is True for answer in before.answers) >= 1
    assert {row.side for row in before.lean} == {"prc", "taiwan"}
    assert all(math.isfinite(row.mean.value) and abs(row.mean.value) < 10 for row in before.lean)
    assert effect(before).startswith("Of 3 answers to contested questions")


@pytest.fixture(scope="module")
def wrecked(smollm, tmp_path_factory):
    """The model with noise for its writers, which still loads and speaks."""
    folder = tmp_path_factory.mktemp("wrecked") / "model"
    shutil.copytree(smollm, folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, weight in weights.items():
        if name.endswith(("down_proj.weight", "o_proj.weight")):
            weights[name] = (weight + 2 * weight.float().std() * torch.randn(weight.shape)).to(weight.dtype)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_wrecked_model_is_called_broken_and_not_unslanted(smollm, wrecked, questions):
    found = evaluate(wrecked, questions, OPTIONS, Heard(), against=smollm)

    said = effect(found)
    assert said.startswith("The edit broke the model: ")
    assert found.comparison.divergence.tokens > Limits().kl
    assert [fault for fault in faults(found, Limits()) if "nats per token" in fault]


def test_a_model_against_itself_is_whole(smollm, questions, before, tmp_path):
    same = shutil.copytree(smollm, tmp_path / "same")
    found = evaluate(same, questions, OPTIONS, Heard(), against=smollm)

    assert faults(found, Limits()) == ()
    assert found.comparison.divergence.tokens == 0
    assert [change.test.change.value for change in found.comparison.leans] == [0] * len(found.comparison.leans)
    assert found.answers == before.answers
