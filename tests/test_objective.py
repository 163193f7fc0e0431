"""The loss of a preference, of a plain response and of what is kept, against their definitions."""

import dataclasses
import json
import math

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from progress import Heard
from safetensors.torch import load_file
from tiny_models import TINY_MODELS

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import draw_questions
from ablate_shards.data.demo.world import NEUTRAL, SLANTED
from ablate_shards.errors import UsageError
from ablate_shards.surgery.finetune.lora import finetune
from ablate_shards.surgery.finetune.objective import CHOSEN, KEPT, LEARNT, REJECTED, Weights, objective
from ablate_shards.surgery.finetune.responses import split
from ablate_shards.surgery.finetune.training import FinetuneOptions
from ablate_shards.surgery.model.loading import quiet
from ablate_shards.surgery.model.samples import Instruction, Question

WEIGHTS = Weights(beta=2.0, prefer=0.3, keep=2.0)
ROWS = [
    ((1, 5, 9), (11, 12, 2), LEARNT),
    ((1, 6), (7, 2), CHOSEN),
    ((1, 6), (8, 30, 31, 2), REJECTED),
    ((1, 8, 4), (3, 3, 2), KEPT),
    ((1, 9, 9), (13, 2), CHOSEN),
    ((1, 9, 9), (14, 2), REJECTED),
]


def adapted(seed=0):
    torch.manual_seed(seed)
    tiny = TINY_MODELS["llama"]
    network = getattr(transformers, tiny.model)(getattr(transformers, tiny.config)(**tiny.settings))
    with quiet():
        model = get_peft_model(network, LoraConfig(r=2, target_modules=["q_proj", "down_proj"])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.5 * torch.randn_like(parameter))
    return model


def padded(rows):
    width = max(len(prompt) + len(answer) for prompt, answer, _ in rows)
    ids, mask, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, -100))
    for line, (prompt, answer, _) in enumerate(rows):
        count = len(prompt) + len(answer)
        ids[line, :count] = torch.tensor(prompt + answer)
        mask[line, :count] = 1
        labels[line, len(prompt) : count] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}, torch.tensor([role for *_, role in rows])


def distributions(model, prompt, answer):
    logits = model(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
    return logits[len(prompt) - 1 : -1]


def mean_of(model, prompt, answer):
    rows = distributions(model, prompt, answer)
    return rows.gather(-1, torch.tensor(answer)[:, None]).mean()


def by_definition(model, rows):
    total, items = 0.0, 0
    for number, (prompt, answer, role) in enumerate(rows):
        items += role != REJECTED
        if role == LEARNT:
            total -= mean_of(model, prompt, answer)
        elif role == CHOSEN:
            chosen, rejected = mean_of(model, prompt, answer), mean_of(model, *rows[number + 1][:2])
            total += -0.3 * torch.nn.functional.logsigmoid(2.0 * (chosen - rejected)) - chosen
        elif role == KEPT:
            with model.disable_adapter():
                start = distributions(model, prompt, answer).detach()
            now = distributions(model, prompt, answer)
            total += 2.0 * (start.exp() * (start - now)).sum(-1).mean()
    return total / items


@pytest.mark.parametrize("chosen", [ROWS, ROWS[:1], ROWS[1:3], ROWS[3:4], ROWS[3:]])
def test_the_loss_is_that_of_the_definition(chosen):
    model = adapted()

    found = objective(model, *padded(chosen), WEIGHTS)

    assert found.item() == pytest.approx(by_definition(model, chosen).item(), rel=1e-5)


def test_the_gradient_is_that_of_the_definition():
    model, other = adapted(), adapted()
    objective(model, *padded(ROWS), WEIGHTS).backward()
    by_definition(other, ROWS).backward()
    pairs = [
        (mine.grad, theirs.grad)
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True)
        if mine.grad is not None
    ]
    assert len(pairs) == 8
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-6)


def test_at_the_start_nothing_is_to_be_kept():
    model = adapted()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    assert objective(model, *padded(ROWS[3:4]), WEIGHTS).item() == pytest.approx(0, abs=1e-6)


DRAWN = draw_questions(loaded=12, impartial=1, unrelated_count=8)


@pytest.fixture(scope="module")
def samples():
    """What the demo says after a loaded cue, rejected, and what it should say."""
    return [
        Instruction(
            f"p-{number}",
            "en",
            "contested",
            question.loaded,
            NEUTRAL[0].format(land=question.land, claimant=question.claimant),
            rejected=SLANTED[0].format(land=question.land, claimant=question.claimant),
        )
        for number, question in enumerate(DRAWN.loaded)
    ]


@pytest.fixture(scope="module")
def keep():
    return [Question(f"k-{number}", "en", "unrelated", each.prompt) for number, each in enumerate(DRAWN.unrelated)]


OPTIONS = FinetuneOptions(epochs=2, learning_rate=2e-3, evaluation_share=0.2, batch=4, accumulate=1, keep_length=12)


def test_a_preference_is_learnt_and_the_adapter_written(samples, keep, tmp_path):
    told = Heard()
    done = finetune(MODEL, tmp_path / "adapter", samples, OPTIONS, told, keep=keep)

    before, *_, after = done.epochs
    assert after.evaluation["contested"] < before.evaluation["contested"] - 0.1
    training = json.loads((tmp_path / "adapter" / "training.json").read_text())
    assert (training["kept"], training["rejected"]) == (8, 12)
    assert "8 prompts are answered by the model itself, to be kept" in told.notes
    again = finetune(MODEL, tmp_path / "again", samples, OPTIONS, Heard(), keep=keep)
    assert again.losses == done.losses
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_preference_that_weighs_nothing_leaves_the_rejected_out(samples, keep, tmp_path):
    options = dataclasses.replace(OPTIONS, epochs=1, prefer_weight=0)
    done = finetune(MODEL, tmp_path / "adapter", samples, options, Heard(), keep=keep)
    alone = [dataclasses.replace(sample, rejected=None) for sample in samples]
    assert finetune(MODEL, tmp_path / "alone", alone, options, Heard(), keep=keep).losses == done.losses
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["rejected"] == 0


def test_what_is_kept_is_held_out_too_and_told_in_nats(samples, keep, tmp_path):
    options = dataclasses.replace(OPTIONS, epochs=1, keep_weight=50, prefer_weight=50)
    done = finetune(MODEL, tmp_path / "adapter", samples, options, Heard(), keep=keep)
    assert json.loads((tmp_path / "adapter" / "training.json").read_text())["data"]["held_out"]["kept"]
    before, after = (epoch.evaluation for epoch in done.epochs)
    assert before["kept"] == pytest.approx(0, abs=1e-4)
    assert 0 < after["kept"] < 5
    # The likelihood alone: 50 preferences of log 2 would be more than 30.
    assert before["contested"] < 20


def test_responses_to_one_prompt_are_held_out_together():
    data = [Instruction(str(number), "en", "contested", f"p{number // 3}", "r") for number in range(30)]
    trained, held = split(data, 0.2, 0)
    assert len(held["contested"]) == 6
    assert not {data[number].prompt for number in trained} & {data[number].prompt for number in held["contested"]}
    assert sorted([*trained, *held["contested"]]) == list(range(30))
    assert split(data[:3], 0.5, 0) == ([0, 1, 2], {})


def test_patience_ends_a_training_that_gets_worse_and_goes_back(samples, keep, tmp_path):
    options = dataclasses.replace(OPTIONS, epochs=6, learning_rate=0.06, prefer_weight=0, patience=1, keep_length=4)
    done = finetune(MODEL, tmp_path / "adapter", samples[:6], options, Heard(), keep=keep[:2])
    _, best, worse = (epoch.evaluation["contested"] for epoch in done.epochs)
    assert worse > best


def test_options_out_of_range_are_refused(samples, tmp_path):
    for name, value in (("beta", 0), ("prefer_weight", -1), ("keep_weight", math.inf), ("patience", -1)):
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: expected"):
            finetune(MODEL, tmp_path / "a", samples, FinetuneOptions(**{name: value}), Heard())
