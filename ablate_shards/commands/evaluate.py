"""``evaluate``: asks a model questions and shows how it answers, beside the model that it was made from."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ablate_shards.commands.options import PATH, as_json_flag, debug_flag, device_flag, print_json, quiet_flag

if TYPE_CHECKING:
    from ablate_shards.layout import Column, Row
    from ablate_shards.surgery.evaluation import Change, Evaluation
    from ablate_shards.surgery.statistics import Ratio

__all__ = ["evaluate"]

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


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--against", type=PATH, metavar="BASE", help="Compare with this checkpoint, or with this earlier evaluation."
)
@click.option("--questions", type=PATH, metavar="FILE", help="Questions, as JSON Lines.  [default: those of tw_civic]")
@click.option(
    "-o", "--out", type=PATH, metavar="FILE", help="Where to write.  [default: MODEL.evaluation.json beside MODEL]"
)
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Most tokens of an answer.")
@click.option("--thinking", is_flag=True, help="Let the model think first, where its chat template has the choice.")
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Questions asked at a time.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="What to compute in; auto: what the weights are stored in, float32 on the CPU.",
)
@device_flag
@click.option("--endpoint", metavar="URL", help="Ask the model at this OpenAI-compatible endpoint, such as vLLM's.")
@click.option("--endpoint-model", metavar="NAME", help="What the endpoint calls it.  [default: the one it serves]")
@click.option("--judge", metavar="URL", help="Have the language model at this endpoint judge the answers too.")
@click.option("--judge-model", metavar="NAME", help="What that endpoint calls it.  [default: the one it serves]")
@click.option(
    "--timeout", type=float, default=120.0, show_default=True, help="Seconds that an endpoint may take for an answer."
)
@click.option(
    "--perplexity/--no-perplexity", default=True, show_default=True, help="Measure how well it predicts plain text."
)
@click.option("--text", type=PATH, metavar="FILE", help="That text.  [default: the neutral text of tw_civic]")
@click.option(
    "--divergence/--no-divergence", default=True, show_default=True, help="Measure how far it moved from a model BASE."
)
@click.option(
    "--reuse", type=PATH, multiple=True, metavar="FILE", help="Take over answers from this evaluation; repeatable."
)
@click.option("--answers", is_flag=True, help="Print every answer.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier evaluation.")
@as_json_flag
@quiet_flag
@debug_flag
def evaluate(
    model: Path,
    *,
    against: Path | None,
    questions: Path | None,
    out: Path | None,
    reuse: tuple[Path, ...],
    answers: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Ask MODEL questions, judge its answers, and measure what else changed.

    MODEL is a checkpoint folder with tokenizer and chat template; with --endpoint a name will do.
    Keys to endpoints are read from ABLATE_SHARDS_API_KEY and ABLATE_SHARDS_JUDGE_API_KEY. Ctrl-C or a
    failure keeps what was answered, and the same command goes on from there.
    """
    from ablate_shards.data.tw_civic import QUESTIONS
    from ablate_shards.progress import show_progress
    from ablate_shards.surgery.evaluate import EvaluateOptions, default_out
    from ablate_shards.surgery.evaluate import evaluate as ask
    from ablate_shards.surgery.evaluation import evaluation_text
    from ablate_shards.surgery.samples import load_questions

    progress = show_progress(quiet=quiet or as_json, counted="questions")
    out = out or default_out(model)
    asked = load_questions(questions or QUESTIONS)
    with progress:
        found = ask(model, asked, EvaluateOptions(reuse=reuse, **settings), progress, against=against, out=out)
    if as_json:
        print_json(json.loads(evaluation_text(found)))
    elif not quiet:
        if answers:
            _print_answers(found)
        _print(found, out)


def _print(found: "Evaluation", out: Path) -> None:
    """Prints ratios and intervals by group, before and after, and what else was measured."""
    from ablate_shards.layout import output, print_key, print_table, say

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
    from ablate_shards.layout import Column, Row, Stack

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


def _print_answers(found: "Evaluation") -> None:
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
