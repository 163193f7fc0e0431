"""What is said of one model in memory: its answers judged, and how likely it finds given ones."""

import math
import re
import unicodedata
from collections.abc import Sequence

from ablate_shards.surgery.evaluate.answers import Prompt, Speaker
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.evaluation import Answer, Lean
from ablate_shards.surgery.evaluate.judge.rubric import correct, judge, shares_content
from ablate_shards.surgery.evaluate.likelihood import Forced, log_likelihoods
from ablate_shards.surgery.evaluate.thoughts import without_thoughts
from ablate_shards.surgery.model.samples import Question

__all__ = ["bare_words", "forced_answer", "forced_answers", "is_control", "judged", "measure_leans"]


def judged(question: Question, reply: Reply) -> Answer:
    """Returns what a model said to a question, judged by the rules."""
    parted = without_thoughts(reply.text)
    control = is_control(question)
    ruling = judge(parted.answer, question)
    return Answer(
        id=question.id,
        language=question.language,
        group=question.group,
        prompt=question.prompt,
        system=question.system,
        text=parted.answer,
        raw=None if reply.text == parted.answer else reply.text,
        ended=reply.ended,
        verdict=ruling.verdict,
        side=ruling.side,
        because=ruling.because,
        detached=not shares_content(parted.answer, question),
        accepted=question.answers,
        exact=bare_words(parted.answer) in map(bare_words, question.answers) if control else None,
        given=correct(parted.answer, question) if control else None,
    )


def is_control(question: Question) -> bool:
    """Returns whether a question has right answers, whatever one thinks of the contested matter."""
    return question.group in ("related", "unrelated") and bool(question.answers)


def bare_words(text: str) -> str:
    """Returns a text without what an exact match does not mind: case, width, spaces and final punctuation."""
    return re.sub(r"[\s.。!?…]+$", "", " ".join(unicodedata.normalize("NFKC", text).casefold().split()))


def measure_leans(
    speaker: Speaker,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    *,
    batch: int,
    tokens: int | None = None,
) -> tuple[Lean, ...]:
    """Measures how likely a model finds the reference answers of each question that has them.

    Args:
        speaker: The model.
        questions: The questions.
        prompts: The same as the model sees them.
        batch: How many answers are computed at a time.
        tokens: Most tokens of an answer, its first ones; all if None.
    """
    close = speaker.encode("</think>\n\n")
    forced, places = [], []
    for question, prompt in zip(questions, prompts, strict=True):
        before = (*prompt.tokens, *close) if prompt.thinks else prompt.tokens
        for side, texts in question.references.items():
            for text in texts:
                forced.append(Forced(before, speaker.encode(text)[:tokens], ended=True))
                places.append((question, side))
    found: dict[str, dict[str, list[float | None]]] = {}
    for (question, side), value in zip(places, log_likelihoods(speaker, forced, batch=batch), strict=True):
        found.setdefault(question.id, {}).setdefault(side, []).append(value)
    leans = []
    for question in questions:
        values = {side: _mean(each) for side, each in found.get(question.id, {}).items()}
        neutral = values.pop("neutral", None)
        slanted = {side: value for side, value in values.items() if value is not None}
        if neutral is not None and slanted:
            leans.append(Lean(question.id, question.language, question.group, neutral, slanted))
    return tuple(leans)


def forced_answer(speaker: Speaker, question: Question, reply: Reply, *, thinking: bool) -> Forced:
    """Returns a question with a model's own answer as the response, as far as the model reads."""
    prompt = speaker.prompt(question, thinking=thinking)
    said = reply.text.removeprefix("<think>") if prompt.thinks else reply.text
    response = speaker.encode(said)
    if speaker.most is not None:
        response = response[: speaker.most - len(prompt.tokens)]
    return Forced(prompt.tokens, response, reply.ended)


def forced_answers(
    speaker: Speaker, questions: Sequence[Question], replies: Sequence[Reply], *, thinking: bool
) -> list[Forced]:
    """Returns the unrelated questions with a model's own answers as responses."""
    return [
        forced_answer(speaker, question, reply, thinking=thinking)
        for question, reply in zip(questions, replies, strict=True)
        if question.group == "unrelated"
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    """Returns the mean, None if one of them is no number."""
    numbers = [value for value in values if value is not None]
    return math.fsum(numbers) / len(numbers) if len(numbers) == len(values) else None
