"""Says what a search tried, chose and found, as sentences and as the rows of tables."""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from ablate_shards.surgery.report.frame import GAP, figure, percent
from ablate_shards.surgery.report.search_record import Given, Record, Search, Trial
from ablate_shards.surgery.search.worth import beside_plain

__all__ = ["asked", "candidate_rows", "chosen_by", "setting_lines", "space_rows", "told"]

_SHARES = ("slanted", "neutral", "broken", "right")


def told(search: Search) -> str:
    """Returns in a sentence how many trials there were, what they were measured on, and what the choice is worth."""
    record = search.record
    complete = sum(trial.complete for trial in record.trials)
    worth = beside_plain(search.reports, better=record.beats_plain)
    by_part = [len(getattr(record.questions, part)) for part in ("trials", "choice", "report")]
    return (
        f"Of {len(record.trials):,} trials on {by_part[0]:,} questions, {complete:,} were complete and "
        f"{len(record.candidates)} were measured again, on {by_part[1]:,} other questions; of these, trial "
        f"{record.chosen} was chosen, and on {by_part[2]:,} more, which nothing was chosen by, {worth}."
    )


_RULES = {
    "effect": "The largest effect within the budget was chosen",
    "cost": "Of what does at least what the plain edit does, the least divergence within the budget was chosen",
    None: "One within the budget was chosen",
}


def chosen_by(record: Record) -> str:
    """Returns in words by which rule was chosen, and what the chosen edit was allowed to cost."""
    budget, nats = record.options.budget, "nats a token"
    parts = [
        f"at most {budget.kl:g} {nats} on unrelated answers",
        f"{percent(budget.controls, 0)} of the controls lost",
        f"{percent(budget.broken, 0)} more answers broken",
    ]
    missing = ""
    if budget.subject is not None and "subject" in record.measured:
        parts.append(f"{budget.subject:g} {nats} lost by the words that answers repeat from their questions")
    elif budget.subject is not None:
        missing = " No answer repeats a word of its question, so that none shows whether it keeps to what was asked."
    return f"{_RULES[_rule(record)]}: {', '.join(parts[:-1])}, and {parts[-1]}.{missing}"


def _rule(record: Record) -> Literal["effect", "cost"] | None:
    """Returns the rule that decided: the effect, where nothing within the budget does what the plain edit does."""
    if record.options.choose != "cost":
        return record.options.choose
    effect = record.objectives[0]
    found = {each.trial: each.values[effect.name] for each in record.candidates}
    if record.plain not in found:
        return "effect"
    chosen, plain = found[record.chosen], found[record.plain]
    enough = chosen <= plain if effect.direction == "minimize" else chosen >= plain
    return "cost" if enough else "effect"


def candidate_rows(record: Record) -> list[dict[str, Any]]:
    """Returns a row for the unedited model and for each candidate, as measured on the questions of the choice."""
    return [
        {
            "name": "before" if each.trial is None else _named(record, each.trial),
            "chosen": each.trial == record.chosen,
            "measured": [figure(each.values[name]).replace("-", "−") for name in record.measured],
            "shares": [_share(*getattr(each.shares, name)) for name in _SHARES],
        }
        for each in (record.base, *record.candidates)
    ]


def asked(record: Record) -> Iterator[tuple[Given, list[tuple[str, Given]]]]:
    """Yields each question of the choice, with its different answers and the names of those who gave each."""
    every = [("before", {answer.id: answer for answer in record.base.answers})]
    every += [
        (_named(record, candidate.trial), {answer.id: answer for answer in candidate.answers})
        for candidate in record.candidates
    ]
    for question in record.base.answers:
        names: dict[tuple[str, str, bool | None], list[str]] = {}
        answers: dict[tuple[str, str, bool | None], Given] = {}
        for name, by_question in every:
            if (answer := by_question.get(question.id)) is not None:
                key = answer.text, answer.verdict, answer.given
                names.setdefault(key, []).append(name)
                answers[key] = answer
        yield question, [(", ".join(names[key]), answer) for key, answer in answers.items()]


def setting_lines(record: Record, trial: Trial) -> list[str]:
    """Returns what varied of a trial's setting: first what holds for all parts, then a line for each part."""
    lines: dict[str, list[str]] = {}
    for name, value in trial.setting.items():
        part, _, parameter = name.rpartition(".")
        if len(set(map(str, record.space.get(name, ())))) != 1:
            lines.setdefault(part, []).append(f"{parameter} {_shown(value)}")
    return [f"{part}{': ' if part else ''}{', '.join(values)}" for part, values in lines.items()]


def space_rows(record: Record) -> list[tuple[str, str, list[str]]]:
    """Returns each parameter with its values, and which of them each candidate has."""
    settings = [trial.setting for each in record.candidates if (trial := record.trial(each.trial)) is not None]
    rows = []
    for name, values in record.space.items():
        between = len(values) == 2 and all(isinstance(value, float) for value in values) and values[0] != values[1]
        every = (" to " if between else ", ").join(dict.fromkeys(map(_shown, values)))
        rows.append((name, every, [_shown(setting[name]) if name in setting else "–" for setting in settings]))
    return rows


def _named(record: Record, number: int | None) -> str:
    """Returns a trial's number, and what it is besides."""
    kinds = [kind for kind, other in (("chosen", record.chosen), ("plain", record.plain)) if number == other]
    return f"{number}{f' ({kinds[0]})' if len(kinds) == 1 else ' (chosen, plain)' if kinds else ''}"


def _share(hits: int, count: int) -> Mapping[str, str]:
    return {"share": percent(hits / count, 0) if count else "–", "of": f"{hits}{GAP}of{GAP}{count}" if count else ""}


def _shown(value: Any) -> str:
    """Returns a parameter's value as a recipe writes it, text without quotation marks."""
    return value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else json.dumps(value)
