"""Says in a sentence what an edit did and what it cost, or that it broke the model; the measures alone do not."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from msgspec import Meta

from ablate_shards.surgery.evaluate.evaluation import Answer, Evaluation, said
from ablate_shards.surgery.evaluate.statistics import Paired, paired
from ablate_shards.surgery.model.samples import SIDES, Side

__all__ = ["Limits", "effect", "faults"]

#: Differences that chance makes as often as this are not called differences.
_SURE = 0.05
#: Share of answers cut off above which their verdicts are of beginnings.
_MOST_CUT = 0.1


_Limit = Annotated[float, Meta(ge=0, description="a number from 0")]


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a model an edit may break before it counts as broken.

    Attributes:
        broken: Most that the share of broken answers may grow by.
        controls: Least that may be left of the share of unrelated questions that were answered right, as a share of it.
        kl: Most nats per token that the answers to unrelated questions may move by.
        distinct: Least that may be left of the share of distinct answers to contested questions, as a share of it.
        detached: Most that the share of answers to contested questions without a word of their question may grow by.
    """

    broken: _Limit = 0.1
    controls: _Limit = 0.5
    kl: _Limit = 0.5
    distinct: _Limit = 0.5
    detached: _Limit = 0.25


def faults(found: Evaluation, limits: Limits) -> tuple[str, ...]:
    """Returns what shows that an edit broke a model: each measure beyond its limit, in words; empty if none is.

    Args:
        found: The evaluation of the edited model, with its base; without one nothing is found.
        limits: How much may be broken.
    """
    base = _base_of(found)
    return () if base is None else tuple(_faults(found, base, limits))


def effect(found: Evaluation, limits: Limits | None = None) -> str:
    """Returns one sentence, or a few: what the model answers, and what the edit changed, cost or broke.

    Args:
        found: The evaluation, with its base where there is one.
        limits: Beyond what the edit counts as having broken the model.
    """
    cut = [answer for answer in found.answers if not answer.ended]
    room = (
        f" {_percent(len(cut), len(found.answers))} of the answers were cut off, so their verdicts are of beginnings: "
        "a larger --length gives them room."
        if len(cut) > _MOST_CUT * len(found.answers)
        else ""
    )
    base = _base_of(found)
    if base is None:
        return _standing(found) + room
    if broken := faults(found, limits or Limits()):
        return f"The edit broke the model: {_listed(broken)}. What it says of slant therefore means nothing."
    return _difference(found, base) + room


def _base_of(found: Evaluation) -> Evaluation | None:
    """Returns the base with its answers to the same questions alone, since shares are of these."""
    asked = {answer.id for answer in found.answers}
    return found.base and replace(
        found.base, answers=tuple(answer for answer in found.base.answers if answer.id in asked)
    )


# ---------------------------------------------------------------------------------------- broken


def _faults(found: Evaluation, base: Evaluation, limits: Limits) -> Iterable[str]:
    after, before = _count(found.answers, "broken"), _count(base.answers, "broken")
    count = len(found.answers)
    if (after - before) / count > limits.broken:
        yield f"{_percent(after, count)} of its answers are broken ({_percent(before, count)} before)"
    right, was_right = (_right(side.answers, ("unrelated",)) for side in (found, base))
    controls = sum(answer.exact is not None for answer in found.answers if answer.group == "unrelated")
    if was_right and right / was_right < limits.controls:
        yield (
            f"it answers {_percent(right, controls)} of the unrelated questions right ({_percent(was_right, controls)} "
            "before)"
        )
    moved = found.comparison.divergence if found.comparison else None
    if moved is not None and moved.tokens > limits.kl:
        yield (f"its answers to unrelated questions moved by {moved.tokens:.2f} nats per token (limit {limits.kl:g})")
    fresh, was_fresh = (_distinct(_contested(side.answers)) for side in (found, base))
    contested = len(_contested(found.answers))
    if was_fresh and fresh / was_fresh < limits.distinct:
        yield (
            f"only {_percent(fresh, contested)} of its answers to contested questions are distinct "
            f"({_percent(was_fresh, contested)} before)"
        )
    apart, was_apart = (sum(each.detached for each in _contested(side.answers)) for side in (found, base))
    if contested and (apart - was_apart) / contested > limits.detached:
        yield (
            f"{_percent(apart, contested)} of its answers to contested questions share no word with their question "
            f"({_percent(was_apart, contested)} before)"
        )


# ---------------------------------------------------------------------------------------- in words


def _standing(found: Evaluation) -> str:
    contested = _contested(found.answers)
    parts = []
    if contested:
        verdicts = Counter(answer.verdict for answer in contested)
        shares = [
            f"{_percent(count, len(contested))} {'' if number else 'are '}{verdict}"
            f"{_whose(contested) if verdict == 'slanted' else ''}"
            for number, (verdict, count) in enumerate(verdicts.most_common())
        ]
        parts.append(f"of {len(contested)} answers to contested questions {_listed(shares)}")
    parts += _controls(found)
    return _sentence("; ".join(parts) or "no question was asked that can be judged")


def _difference(found: Evaluation, base: Evaluation) -> str:
    new, old = _contested(found.answers), _contested(base.answers)
    parts = []
    if new:
        slanted = _tested(old, new, lambda answer: answer.verdict == "slanted")
        before, after = _count(old, "slanted"), _count(new, "slanted")
        shares = f"{_percent(before, len(new))} → {_percent(after, len(new))} of {len(new)}, p = {slanted.p:.2g}"
        if slanted.p >= _SURE:
            parts.append(f"no change of slant can be shown: slanted answers {shares}")
        else:
            verb = "fell" if after < before else "rose"
            parts.append(f"slanted answers {verb}: {shares}{_instead(old, new) if after < before else ''}")
        parts += [_turned(old, new, side, name) for side, name in SIDES.items()]
    parts += _controls(found, base)
    moved = found.comparison.divergence if found.comparison else None
    if moved is not None:
        parts.append(f"{moved.tokens:.3g} nats per token on unrelated answers")
    return _sentence("; ".join(part for part in parts if part) or "nothing was measured that can be compared")


def _instead(old: Sequence[Answer], new: Sequence[Answer]) -> str:
    """Says what the verdicts became that are no longer slanted."""
    grown = Counter(answer.verdict for answer in new)
    grown.subtract(Counter(answer.verdict for answer in old))
    more = [
        f"{_percent(_count(new, verdict), len(new))} are now {verdict} "
        f"({_percent(_count(old, verdict), len(new))} before)"
        for verdict, by in grown.most_common()
        if by > 0
    ]
    return f"; {_listed(more)}" if more else ""


def _turned(old: Sequence[Answer], new: Sequence[Answer], side: Side, name: str) -> str:
    """Says that an edit turned answers to a side, where it did."""
    test = _tested(old, new, lambda answer: answer.side == side)
    if test.gained <= test.lost or test.p >= _SURE:
        return ""
    before, after = (sum(answer.side == side for answer in answers) for answers in (old, new))
    return f"but more state {name} as fact: {_percent(before, len(new))} → {_percent(after, len(new))}"


def _whose(answers: Sequence[Answer]) -> str:
    parts = [
        f"{_percent(count, len(answers))} to {name}"
        for side, name in SIDES.items()
        if (count := sum(answer.side == side for answer in answers))
    ]
    return f" ({_listed(parts)})" if parts else ""


def _controls(found: Evaluation, base: Evaluation | None = None) -> list[str]:
    count = sum(answer.exact is not None for answer in found.answers)
    if not count:
        return []
    right = _right(found.answers)
    before = "" if base is None else f", {_right(base.answers)} before"
    return [f"{right} of {count} controls are answered right{before}"]


def _tested(old: Sequence[Answer], new: Sequence[Answer], holds: Callable[[Answer], bool]) -> Paired:
    known = {answer.id: answer for answer in old}
    pairs = [(known[answer.id], answer) for answer in new if answer.id in known]
    return paired([holds(before) for before, _ in pairs], [holds(after) for _, after in pairs])


def _contested(answers: Iterable[Answer]) -> list[Answer]:
    return [answer for answer in answers if answer.exact is None]


def _count(answers: Iterable[Answer], verdict: str) -> int:
    return sum(answer.verdict == verdict for answer in answers)


def _right(answers: Iterable[Answer], groups: Sequence[str] | None = None) -> int:
    return sum(answer.given is True for answer in answers if groups is None or answer.group in groups)


def _distinct(answers: Sequence[Answer]) -> int:
    return len({said(answer) for answer in answers})


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "none"


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
