"""What an evaluation found, as tables and lines."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ablate_shards.surgery.evaluate.evaluation import Evaluation, OutcomeChange
    from ablate_shards.surgery.evaluate.statistics import Mean, Ratio
    from ablate_shards.terminal.tables import Column, Row

__all__ = ["print_answers", "print_evaluation"]

#: Glyph and style of each verdict's part of a bar.
_LOOKS = {
    "slanted": ("█", "yellow"),
    "neutral": ("░", "blue"),
    "deflecting": ("▒", "bright_black"),
    "wrong": ("▓", "magenta"),
    "broken": ("▚", "red"),
    "unclear": ("·", "white"),
}

_VERDICTS: tuple[Any, ...] = tuple(_LOOKS)

_OUTCOMES: tuple[Any, ...] = ("exact", "given")
#: What a table says of the manner of answers, and how it calls it.
_MANNERS = {"broken": "broken", "cut": "cut off", "distinct": "distinct", "detached": "detached"}


def print_evaluation(found: "Evaluation", out: Path) -> None:
    """Prints ratios and intervals by group, before and after, and what else was measured."""
    from ablate_shards.surgery.evaluate.effect import effect
    from ablate_shards.terminal.tables import output, print_key, print_table, say

    screen = output()
    sides = {"before": found.base, "after": found} if found.base else {"": found}
    changes = {
        (change.group, change.outcome): change for change in (found.comparison.changes if found.comparison else ())
    }
    verdicts: Mapping[str, Mapping[Any, Mapping[Any, Ratio]]] = {
        name: {(row.group, row.language): row.verdicts for row in side.rows} for name, side in sides.items()
    }
    controls: Mapping[str, Mapping[Any, Mapping[Any, Ratio]]] = {
        name: {
            (control.group, control.language): {"exact": control.exact, "given": control.given}
            for control in side.controls
        }
        for name, side in sides.items()
    }
    for outcomes, of_sides, looks in (
        (_VERDICTS, verdicts, _LOOKS),
        (_OUTCOMES, controls, {"exact": ("━", "cyan")}),
    ):
        if any(of_sides.values()):
            columns, rows = _table(outcomes, of_sides, changes, looks)
            print_table(screen, columns, rows)
            screen.print()
    if any(verdicts.values()):
        print_key(screen, [(verdict, *look) for verdict, look in _LOOKS.items()])
    screen.print()
    print_table(screen, *_manner_table(sides))
    say(screen, "detached: shares no word of substance with its question", "dim")
    say(screen, "in brackets: 95 % Wilson intervals; p: exact McNemar test on the same questions", "dim")
    for line in _lines(found):
        say(screen, line)
    say(screen, effect(found), "bold")
    screen.print(f"every answer is in {out}", soft_wrap=True)


def _table(
    outcomes: Sequence[Any],
    sides: Mapping[str, Mapping[Any, Mapping[Any, "Ratio"]]],
    changes: Mapping[Any, "OutcomeChange"],
    looks: Mapping[str, tuple[str, str]],
) -> "tuple[list[Column], list[Row]]":
    """Makes a row per group, language and side with a bar of its ratios, and of the paired tests below each group."""
    from ablate_shards.terminal.tables import Column, Row, Stack

    compared = len(sides) > 1
    columns = [
        Column("group"),
        *([Column("")] if compared else []),
        Column("questions", right=True, rank=len(outcomes) + 1),
        *(Column(outcome, right=True, rank=rank, brief=_without_interval) for rank, outcome in enumerate(outcomes)),
        Column("", bar=True),
    ]
    rows = []
    for group, language in next(iter(sides.values())):
        for number, (name, side) in enumerate(sides.items()):
            found = side[group, language]
            label = group if language is None else f"  {language}"
            rows.append(
                Row(
                    (
                        "" if number else label,
                        *([name] if compared else []),
                        str(next(iter(found.values())).count),
                        *(_share(found[outcome]) for outcome in outcomes),
                        Stack([(found[outcome].value, *look) for outcome, look in looks.items()], 1.0),
                    )
                )
            )
        if language is None and compared:
            tests = (f"{changes[group, outcome].test.p:.2g}" for outcome in outcomes)
            rows.append(Row(("", "p", "", *tests, ""), "dim"))
    return columns, rows


def _manner_table(sides: Mapping[str, "Evaluation"]) -> "tuple[list[Column], list[Row]]":
    """Makes a row per group and side: how the questions were answered, whatever was said."""
    from ablate_shards.terminal.tables import Column, Row

    manners = {
        name: {manner.group: manner for manner in side.manners if manner.language is None}
        for name, side in sides.items()
    }
    shown = dict(_MANNERS)
    if any(manner.lost_in_thought.hits for side in manners.values() for manner in side.values()):
        shown["lost_in_thought"] = "lost in thought"
    columns = [
        Column("group"),
        *([Column("")] if len(sides) > 1 else []),
        *(Column(title, right=True, rank=rank, brief=_without_interval) for rank, title in enumerate(shown.values())),
    ]
    rows = []
    for group in next(iter(manners.values())):
        for number, (name, side) in enumerate(manners.items()):
            cells = [_share(getattr(side[group], manner)) for manner in shown]
            rows.append(Row(("" if number else group, *([name] if len(sides) > 1 else []), *cells)))
    return columns, rows


def _without_interval(cell: str) -> str:
    return cell.partition(" [")[0]


def _share(ratio: "Ratio") -> str:
    low, high = ratio.interval
    return f"{ratio.value:.1%} [{100 * low:.0f}–{100 * high:.0f}]"


def _lines(found: "Evaluation") -> list[str]:
    """Returns what was measured beside the ratios, a line each."""
    sides = [found] if found.base is None else [found.base, found]
    lines = [*_whose(sides), *_leaning(found)]
    if any(side.text for side in sides):
        values = [
            "not measured"
            if side.text is None
            else "no numbers"
            if side.text.perplexity is None
            else f"{side.text.perplexity.value:.4g}"
            for side in sides
        ]
        names = sorted({side.text.name for side in sides if side.text})
        lines.append(f"perplexity of {', '.join(names)}: {' → '.join(values)}")
    if found.comparison is not None:
        moved = found.comparison.divergence
        if moved is not None:
            lines.append(
                f"KL(base ‖ model) on {moved.prompts} unrelated prompts: {_nats(moved.first)} at the first token, "
                f"{_nats(moved.tokens)} over all {moved.count} tokens"
            )
        lines += found.comparison.notes
    judgement = found.judgement
    if judgement is not None:
        agreement = judgement.agreement
        lines.append(
            f"judged by {found.judge} as well: "
            + (
                "no verdict that could be read"
                if agreement is None
                else f"{_share(agreement.raw)} agreement with the rules, Cohen's kappa "
                + ("undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}")
            )
            + f", {judgement.unparsable} unparsable"
        )
        for row in judgement.rows:
            if row.language is None:
                shares = (f"{verdict} {_share(row.verdicts[verdict])}" for verdict in _VERDICTS)
                lines.append(f"  {row.group}: {', '.join(shares)}")
    for score in found.tasks if found.comparison is None or not found.comparison.tasks else ():
        low, high = score.interval
        lines.append(f"{score.name}, {score.metric}: {score.value:.3f} [{low:.3f}, {high:.3f}] of {score.count}")
    for change in found.comparison.tasks if found.comparison else ():
        low, high = change.interval
        lines.append(
            f"{change.name}, {change.metric}: {change.before:.3f} → {change.after:.3f}, a difference of "
            f"{change.difference:+.3f} [{low:+.3f}, {high:+.3f}], p = {change.p:.2g}, {change.count} documents"
        )
    return lines


def _whose(sides: Sequence["Evaluation"]) -> list[str]:
    """Says whose claims the slanted answers state, group by group."""
    from ablate_shards.surgery.model.samples import SIDES

    lines = []
    for rows in zip(*([row for row in side.rows if row.language is None] for side in sides), strict=True):
        shares = [
            f"{name} {' → '.join(f'{row.sides[side].value:.0%}' for row in rows)}"
            for side, name in SIDES.items()
            if any(row.sides[side].hits for row in rows)
        ]
        if shares:
            lines.append(f"slanted {rows[0].group} answers state {', '.join(shares)}")
    return lines


def _leaning(found: "Evaluation") -> list[str]:
    """Says how the model leans, against each side, over all questions."""
    from ablate_shards.surgery.model.samples import SIDES

    before = {row.side: row.mean for row in found.base.lean if row.group is None} if found.base else {}
    tests = {
        change.side: change.test
        for change in (found.comparison.leans if found.comparison else ())
        if change.group is None
    }
    lines = []
    for row in found.lean:
        if row.group is not None:
            continue
        was = f"{before[row.side].value:+.2f} → " if row.side in before else ""
        line = f"lean, neutral over {SIDES.get(row.side, row.side)}: {was}{row.mean.value:+.2f}"
        line += f" {_interval(row.mean)} nats per token over {row.mean.count} questions"
        if test := tests.get(row.side):
            line += f"; moved by {test.change.value:+.2f} {_interval(test.change)}, p = {test.p:.2g}"
        lines.append(line)
    return lines


def _interval(found: "Mean") -> str:
    low, high = found.interval
    return f"[{low:+.2f}, {high:+.2f}]"


def _nats(value: float) -> str:
    return "0 nats" if math.isclose(value, 0, abs_tol=1e-12) else f"{value:.3g} nats"


def print_answers(found: "Evaluation") -> None:
    """Prints every question with its answers, before and after."""
    before = {answer.id: answer for answer in found.base.answers} if found.base else {}
    for answer in found.answers:
        click.secho(f"{answer.id} ({answer.group}, {answer.language}): {answer.prompt}", bold=True)
        for name, side in (("before", before.get(answer.id)), ("after" if before else "", answer)):
            if side is not None:
                judged = "" if side.said is None else f", judged {side.judged or 'unparsable'}"
                label = f"{name}: " if name else ""
                whose = f" ({side.side})" if side.side else ""
                cut = "" if side.ended else ", cut off"
                click.secho(f"  {label}{side.verdict}{whose}{judged}{cut}", fg="cyan", nl=False)
                click.secho(f"  {side.because}" if side.because else "", dim=True)
                click.echo("    " + side.text.replace("\n", "\n    "))
    click.echo()
