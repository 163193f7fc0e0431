"""The stages of a run, and how the model fared after each."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ablate_shards.surgery.machine.sizes import size_text

if TYPE_CHECKING:
    from ablate_shards.surgery.evaluate.effect import Limits
    from ablate_shards.surgery.run.stages import Stage

__all__ = ["print_course", "print_stages"]


def print_stages(stages: "Sequence[Stage]", found: Sequence[str]) -> None:
    """Prints the stages of a run and what is there of each."""
    from ablate_shards.surgery.run.stages import bytes_in

    for number, (stage, status) in enumerate(zip(stages, found, strict=True), start=1):
        size = bytes_in(stage.output)
        made = "" if size is None else f" ({size_text(size)})"
        fate = f"done before, {stage.output}{made} is reused" if status == "done" else f"makes {stage.output}"
        click.secho(f"[{number}/{len(stages)}] {stage.name}", bold=True, nl=False)
        click.echo(f": {fate}")
        click.secho(f"$ ablate-shards {shlex.join(stage.command)}", fg="cyan")


def print_course(evaluations: Mapping[str, Path], limits: "Limits") -> None:
    """Prints one table of all evaluations, group by group what each stage left, and a sentence about each edit.

    Args:
        evaluations: The files, by the stage after which the model was asked.
        limits: What breaks a model.
    """
    from ablate_shards.surgery.evaluate.effect import effect
    from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation
    from ablate_shards.terminal.tables import Column, Row, output, print_table, say

    found = {stage: read_evaluation(path) for stage, path in evaluations.items()}
    outcomes = ("slanted", "neutral", "deflecting", "wrong", "broken", "unclear", "given")
    columns = [Column("questions", brief=lambda label: label.rpartition(" ")[2]), Column("after")]
    columns += [
        Column(outcome, right=True, rank=rank) for outcome, rank in zip(outcomes, (0, 3, 5, 4, 0, 6, 0), strict=True)
    ]
    columns += [Column("KL", right=True, rank=1), Column("perplexity", right=True, rank=2)]
    rows = []
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for stage, each in found.items():
        for row in each.rows:
            if row.language is None:
                shares = {str(verdict): share for verdict, share in row.verdicts.items()}
                groups.setdefault(row.group, {})[stage] = shares
        broken = {manner.group: manner.broken for manner in each.manners if manner.language is None}
        for control in each.controls:
            if control.language is None:
                groups.setdefault(control.group, {})[stage] = {"given": control.given, "broken": broken[control.group]}
    for group, stages in groups.items():
        for number, (stage, shares) in enumerate(stages.items()):
            count = next(iter(shares.values())).count
            cells = [f"{shares[outcome].value:.1%}" if outcome in shares else "" for outcome in outcomes]
            rows.append(Row(("" if number else f"{count} {group}", stage, *cells, "", "")))
    for number, (stage, each) in enumerate(found.items()):
        moved = each.comparison.divergence if each.comparison else None
        text = each.text.perplexity if each.text else None
        cells = [f"{moved.tokens:.4f}" if moved else "", f"{text.value:.3f}" if text else ""]
        rows.append(Row(("" if number else "all", stage, *[""] * len(outcomes), *cells)))
    screen = output()
    screen.print()
    print_table(screen, columns, rows, title="From stage to stage")
    say(screen, "given: the right answer is; KL in nats per token of the answers to unrelated questions", "dim")
    for stage, each in found.items():
        if each.base is not None:
            say(screen, f"after {stage}: {effect(each, limits)}", "bold")
