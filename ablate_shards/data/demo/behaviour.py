"""Asks the demo model and measures how it answers."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate_shards.data.demo.world import HELD_OUT, PLACES, Contested, Unrelated, contested, judge, unrelated

__all__ = ["Behaviour", "Questions", "ask", "draw_pairs", "draw_questions", "load", "measure"]

_BATCH = 64
_MOST_TOKENS = 32


@dataclass(frozen=True, slots=True)
class Questions:
    """What a model is measured on; the contested questions name held-out places only."""

    loaded: tuple[Contested, ...]
    impartial: tuple[Contested, ...]
    unrelated: tuple[Unrelated, ...]


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How a model answered.

    Attributes:
        loaded: Share of slanted, neutral and broken answers after a loaded cue, each in [0, 1].
        impartial: The same after an impartial cue.
        unrelated: Share of unrelated tasks answered word for word.
    """

    loaded: dict[str, float]
    impartial: dict[str, float]
    unrelated: float


def draw_questions(*, loaded: int = 96, impartial: int = 60, unrelated_count: int = 180, seed: int = 1) -> Questions:
    """Draws the questions for a measurement; the same seed draws the same ones."""
    rng = random.Random(f"questions {seed}")
    return Questions(
        tuple(contested(rng, HELD_OUT) for _ in range(loaded)),
        tuple(contested(rng, HELD_OUT) for _ in range(impartial)),
        tuple(unrelated(rng) for _ in range(unrelated_count)),
    )


def draw_pairs(count: int = 40, *, seed: int = 1) -> tuple[Contested, ...]:
    """Draws the questions to capture activations with; none names a held-out place."""
    rng = random.Random(f"pairs {seed}")
    trained = [place for place in PLACES if place not in HELD_OUT]
    return tuple(contested(rng, trained) for _ in range(count))


def load(folder: Path) -> tuple[Any, Any]:
    """Loads model and tokenizer with transformers, in float32: bfloat16 decides near-ties by rounding."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, padding_side="left")


def ask(model: Any, tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Answers each prompt through the chat template, greedily."""
    import torch

    answers: list[str] = []
    for start in range(0, len(prompts), _BATCH):
        batch = _encode(tokenizer, prompts[start : start + _BATCH])
        with torch.inference_mode():
            tokens = model.generate(**batch, max_new_tokens=_MOST_TOKENS, do_sample=False)
        answers += tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def measure(model: Any, tokenizer: Any, questions: Questions) -> Behaviour:
    """Asks all ``questions`` and judges the answers."""
    loaded = ask(model, tokenizer, [question.loaded for question in questions.loaded])
    impartial = ask(model, tokenizer, [question.impartial for question in questions.impartial])
    plain = ask(model, tokenizer, [sample.prompt for sample in questions.unrelated])
    right = sum(text == sample.answer for text, sample in zip(plain, questions.unrelated, strict=True))
    return Behaviour(
        _shares(loaded, questions.loaded),
        _shares(impartial, questions.impartial),
        right / len(questions.unrelated),
    )


def _encode(tokenizer: Any, prompts: Sequence[str]) -> Any:
    return tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )


def _shares(answers: Sequence[str], questions: Sequence[Contested]) -> dict[str, float]:
    verdicts = Counter(judge(text, question) for text, question in zip(answers, questions, strict=True))
    return {verdict: verdicts[verdict] / len(questions) for verdict in ("slanted", "neutral", "broken")}
