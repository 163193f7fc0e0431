"""What an evaluation found, as tables and lines."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from ablate_shards.surgery.evaluate.evaluation import Change, Evaluation
    from ablate_shards.surgery.evaluate.statistics import Ratio
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


def print_evaluation(found: "Evaluation", out: Path) -> None:
    """Prints ratios and intervals by group, before and after, and what else was measured."""
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
    say(screen, "in brackets: 95 % Wilson intervals; p: exact McNemar test on the same questions", "dim")
    for line in _lines(found):
        say(screen, line)
    screen.print(f"every answer is in {out}", soft_wrap=True)


def _table(
    outcomes: Sequence[Any],
    sides: Mapping[str, Mapping[Any, Mapping[Any, "Ratio"]]],
    changes: Mapping[Any, "Change"],
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


def _without_interval(cell: str) -> str:
    return cell.partition(" [")[0]


def _share(ratio: "Ratio") -> str:
    low, high = ratio.interval
    return f"{ratio.value:.1%} [{100 * low:.0f}–{100 * high:.0f}]"


def _lines(found: "Evaluation") -> list[str]:
    """Returns what was measured beside the ratios, a line each."""
    lines = []
    sides = [found] if found.base is None else [found.base, found]
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
    cut = sum(not answer.ended for answer in found.answers)
    if cut:
        lines.append(f"{cut} of {len(found.answers)} answers were cut off; --length gives them more room")
    return lines


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
                click.secho(f"  {label}{side.verdict}{judged}", fg="cyan")
                click.echo("    " + side.text.replace("\n", "\n    "))
    click.echo()
