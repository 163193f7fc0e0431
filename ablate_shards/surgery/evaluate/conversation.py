"""Asks one model or two a person's own questions, one by one, and judges the answers to those that are known."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Protocol

from ablate_shards.errors import EvaluateError, Interrupted, UsageError
from ablate_shards.surgery.evaluate.answers import Dtype, Remedies, Speaker, speaking
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.judge.rubric import Ruling, correct, judge
from ablate_shards.surgery.evaluate.measures import bare_words
from ablate_shards.surgery.evaluate.thoughts import without_thoughts
from ablate_shards.surgery.machine.devices import resolve_device
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.model.loading import (
    answering_dtype,
    check_packages,
    free_memory,
    open_folder,
    read_config,
    weight_bytes,
)
from ablate_shards.surgery.model.samples import Question

__all__ = ["AskOptions", "Conversation", "Exchange", "Hearer", "Said", "Setting", "ask", "conversing"]

Role = Literal["base", "model"]

#: The rest is for what a model keeps of the chat, and for what loading takes on top.
_SHARE_OF_FREE = 0.8
_REMEDIES = Remedies("--length", "--dtype bfloat16")


@dataclass(frozen=True, slots=True)
class AskOptions:
    """How to ask.

    Attributes:
        length: Most tokens of an answer.
        thinking: Let the model think first, where its chat template offers the choice.
        thoughts: Most tokens of the thoughts before an answer.
        dtype: What to compute in; ``auto``: what is stored, but float32 on a CPU without instructions for it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        system: The system message; if None, that of a known question.
    """

    length: int = 256
    thinking: bool = False
    thoughts: int = 1024
    dtype: Dtype = "auto"
    device: str = "auto"
    system: str | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """Which models answer, and how.

    Attributes:
        model: The model's name.
        base: The name of the model that it was made from, if that is asked too.
        dtype: What they compute in.
        device: Where.
        together: Whether all of them are in memory at once; if not, the base answers every question first.
    """

    model: str
    base: str | None
    dtype: str
    device: str
    together: bool = True


@dataclass(frozen=True, slots=True)
class Said:
    """An answer, or what there is of it so far.

    Attributes:
        text: The answer without the thoughts.
        thoughts: What the model thought aloud, None if nothing.
        finished: Whether nothing more will come.
        ended: Whether the model ended it by itself.
        ruling: The verdict on it, once it is finished and if the question is known.
        given: Whether it gives an accepted answer, None where the question has none.
    """

    text: str
    thoughts: str | None = None
    finished: bool = False
    ended: bool = False
    ruling: Ruling | None = None
    given: bool | None = None


@dataclass(frozen=True, slots=True)
class Exchange:
    """A question and what was said to it so far.

    Attributes:
        question: As it is asked.
        known: The question with a rubric that has the same words, None if there is none.
        base: The answer of the model before, None if it was not asked (yet).
        model: The answer of the model, None if it was not asked yet.
    """

    question: Question
    known: Question | None
    base: Said | None = None
    model: Said | None = None


class Hearer(Protocol):
    """Receives the answers of a conversation as they are made."""

    def loading(self, name: str) -> None:
        """Says that a model is being loaded."""

    def ready(self, setting: Setting) -> None:
        """Says that the first model is loaded, once in a conversation."""

    def speaking(self, exchange: Exchange) -> None:
        """Tells an answer so far: when a model is asked, and after every token."""

    def half(self, exchange: Exchange) -> None:
        """Says that the base has answered, and that the model will be asked later."""

    def answered(self, exchange: Exchange) -> None:
        """Says that all answers to a question are there."""


class Conversation:
    """Models in memory that are asked one question after another, each by itself."""

    def __init__(
        self, speakers: Mapping[Role, Speaker], known: Sequence[Question], options: AskOptions, hearer: Hearer
    ) -> None:
        self._speakers = speakers
        self._known = _by_words(known)
        self._options = options
        self._hearer = hearer
        self._count = 0

    def ask(self, text: str) -> Exchange:
        """Asks every model, the base first.

        Raises:
            EvaluateError: The question is longer than a model reads, its template refuses it, or a model fails.
            UsageError: The question is no text.
        """
        self._count += 1
        exchange = _exchange(text, self._count, self._known, self._options)
        for side, speaker in self._speakers.items():
            exchange = _answered(speaker, side, exchange, self._options, self._hearer)
        self._hearer.answered(exchange)
        return exchange


def ask(
    model: Path,
    texts: Sequence[str],
    known: Sequence[Question],
    options: AskOptions,
    hearer: Hearer,
    *,
    against: Path | None = None,
) -> list[Exchange]:
    """Asks all questions, each by itself and with the likeliest token at each step, as ``evaluate`` does one at a time.

    Both models are in memory where they fit; where not, the base answers all questions before the model is loaded.

    Args:
        model: A checkpoint folder with tokenizer and chat template.
        texts: What to ask.
        known: The questions whose answers can be judged, known by their words.
        options: How.
        hearer: Receives every answer as it is made.
        against: The model that it was made from, to be asked the same.

    Raises:
        EvaluateError: A model cannot be used, or a question cannot be asked.
        CheckpointError: A checkpoint is malformed.
        UsageError: An option's value or a question cannot be used.
        Interrupted: Ctrl-C.
    """
    by_words = _by_words(known)
    exchanges = [_exchange(text, number, by_words, options) for number, text in enumerate(texts, start=1)]
    try:
        crowded = _crowded(model, against, options)
        if against is None or crowded is None:
            with _together(model, known, options, hearer, against) as conversation:
                return [conversation.ask(text) for text in texts]
        return _in_turn(model, against, exchanges, options, hearer)
    except KeyboardInterrupt as error:
        raise Interrupted(f"{model}: interrupted") from error


@contextlib.contextmanager
def conversing(
    model: Path, known: Sequence[Question], options: AskOptions, hearer: Hearer, *, against: Path | None = None
) -> Iterator[Conversation]:
    """Holds the models in memory for questions that are not known beforehand; see ``ask``.

    Raises:
        EvaluateError: A model cannot be used, or the two do not fit into memory together.
        CheckpointError: A checkpoint is malformed.
        UsageError: An option's value cannot be used.
        Interrupted: Ctrl-C while they are loaded.
    """
    if crowded := _crowded(model, against, options):
        raise EvaluateError(crowded)
    try:
        with _together(model, known, options, hearer, against) as conversation:
            yield conversation
    except KeyboardInterrupt as error:
        raise Interrupted(f"{model}: interrupted") from error


@contextlib.contextmanager
def _together(
    model: Path, known: Sequence[Question], options: AskOptions, hearer: Hearer, against: Path | None
) -> Iterator[Conversation]:
    folders: dict[Role, Path] = {"model": model} if against is None else {"base": against, "model": model}
    speakers: dict[Role, Speaker] = {}
    with contextlib.ExitStack() as stack:
        for side, folder in folders.items():
            hearer.loading(_name(folder))
            speakers[side] = stack.enter_context(_speaking(folder, options))
        hearer.ready(_setting(model, against, list(speakers.values())))
        yield Conversation(speakers, known, options, hearer)


def _in_turn(
    model: Path, against: Path, exchanges: Sequence[Exchange], options: AskOptions, hearer: Hearer
) -> list[Exchange]:
    """Asks the base everything, lets go of it, and asks the model."""
    hearer.loading(_name(against))
    halves = []
    with _speaking(against, options) as speaker:
        hearer.ready(replace(_setting(model, against, [speaker]), together=False))
        for exchange in exchanges:
            halves.append(_answered(speaker, "base", exchange, options, hearer))
            hearer.half(halves[-1])
    hearer.loading(_name(model))
    whole = []
    with _speaking(model, options) as speaker:
        for exchange in halves:
            whole.append(_answered(speaker, "model", exchange, options, hearer))
            hearer.answered(whole[-1])
    return whole


def _answered(speaker: Speaker, side: Role, exchange: Exchange, options: AskOptions, hearer: Hearer) -> Exchange:
    prompt = speaker.prompt(exchange.question, thinking=options.thinking)
    thoughts = options.thoughts if options.thinking else 0

    def said(answer: Said) -> Exchange:
        return replace(exchange, base=answer) if side == "base" else replace(exchange, model=answer)

    def heard(reply: Reply) -> None:
        parted = without_thoughts(reply.text)
        hearer.speaking(said(Said(parted.answer, parted.thoughts)))

    hearer.speaking(said(Said("")))
    return said(_judged(speaker.stream(prompt, heard, tokens=options.length, thoughts=thoughts), exchange.known))


def _judged(reply: Reply, known: Question | None) -> Said:
    parted = without_thoughts(reply.text)
    answer = Said(parted.answer, parted.thoughts, finished=True, ended=reply.ended)
    if known is None:
        return answer
    given = correct(parted.answer, known) if known.answers else None
    return replace(answer, ruling=judge(parted.answer, known), given=given)


# ---------------------------------------------------------------------------------------- questions


def _exchange(text: str, number: int, known: Mapping[str, Question], options: AskOptions) -> Exchange:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"question {number}: expected text in UTF-8, found {text[:20]!a}") from error
    if not text.strip():
        raise UsageError(f"question {number}: expected text, found none")
    found = known.get(bare_words(text))
    if found is None:
        return Exchange(Question(str(number), "und", "held-out", text.strip(), options.system), None)
    return Exchange(replace(found, prompt=text.strip(), system=options.system or found.system), found)


def _by_words(questions: Sequence[Question]) -> dict[str, Question]:
    """Returns the questions by their words, the first of several with the same ones."""
    return {bare_words(question.prompt): question for question in reversed(questions)}


# ---------------------------------------------------------------------------------------- models


def _speaking(folder: Path, options: AskOptions) -> contextlib.AbstractContextManager[Speaker]:
    return speaking(folder, dtype=options.dtype, device=options.device, remedies=_REMEDIES)


def _name(folder: Path) -> str:
    return folder.resolve().name


def _setting(model: Path, against: Path | None, speakers: Sequence[Speaker]) -> Setting:
    dtypes = dict.fromkeys(str(speaker.network.dtype).removeprefix("torch.") for speaker in speakers)
    return Setting(
        _name(model),
        None if against is None else _name(against),
        " and ".join(dtypes),
        str(speakers[0].device),
    )


def _crowded(model: Path, against: Path | None, options: AskOptions) -> str | None:
    """Returns the sentence that says why both models do not fit into memory together, None where they do.

    Raises:
        EvaluateError: A model cannot be used.
        UsageError: There is no such device, or the base is the model itself.
    """
    checkpoint = open_folder(model, EvaluateError)
    if against is not None and against.resolve() == model.resolve():
        raise UsageError(f"{against}: is MODEL itself; name the model that it was made from")
    base = None if against is None else open_folder(against, EvaluateError)
    check_packages("ask runs the model with transformers", "transformers", "accelerate", error=EvaluateError)
    device = resolve_device(options.device)
    if base is None:
        return None
    dtype = answering_dtype(options.dtype, read_config(model, EvaluateError), device)
    sizes = [weight_bytes(each, dtype) for each in (base, checkpoint)]
    free = free_memory(device)
    if sum(sizes) <= _SHARE_OF_FREE * free:
        return None
    smaller = "use --dtype bfloat16, " if dtype == "float32" else ""
    return (
        f"{against} takes {size_text(sizes[0])} and {model} {size_text(sizes[1])} in memory, too much together for the "
        f"{size_text(free)} that are free on {device}; {smaller}leave out --against, or name the questions in the "
        "command, so that one model can answer them after the other"
    )
