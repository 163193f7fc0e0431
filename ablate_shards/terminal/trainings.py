"""What a training came to, and the curve of its loss."""

import itertools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

__all__ = ["print_training"]

_BARS = "▁▂▃▄▅▆▇█"

_WIDTH = 60


def print_training(done: Any, model: Path) -> None:
    """Prints the losses around every epoch, their curve, and what to do next."""
    kinds = sorted({kind for epoch in done.epochs for kind in epoch.evaluation})
    rows = [["epoch", "training loss", *(f"{kind} held out" for kind in kinds)]]
    for epoch in done.epochs:
        losses = [epoch.training, *(epoch.evaluation.get(kind) for kind in kinds)]
        rows.append([str(epoch.number), *("–" if loss is None else f"{loss:.4f}" for loss in losses)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    steps = f"{len(done.losses)} steps" + (f", {done.resumed} of them before the interruption" if done.resumed else "")
    click.echo(f"{_curve(done.losses)}  training loss from {min(done.losses):.4f} to {max(done.losses):.4f}, {steps}")
    click.echo(f"{done.parameters:,} numbers trained in {done.modules} modules, written to {done.adapter}")
    click.echo(f"merge it with: {shlex.join(['ablate-shards', 'merge', str(model), str(done.adapter), 'OUT'])}")


def _curve(losses: Sequence[float]) -> str:
    """Returns a line of bars, each the mean of as many steps as there must be to fit."""
    count = min(len(losses), _WIDTH)
    edges = [number * len(losses) // count for number in range(count + 1)]
    means = [sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, span = min(means), max(means) - min(means) or 1.0
    return "".join(_BARS[round((mean - low) / span * (len(_BARS) - 1))] for mean in means)
