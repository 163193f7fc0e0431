"""``diff``: shows how any two checkpoints differ."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    as_json_flag,
    debug_flag,
    parse_memory,
    parsed,
    print_json,
    quiet_flag,
)
from ablate_shards.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
    from ablate_shards.surgery.diff.differences import Diff, TensorDiff

__all__ = ["diff"]

_MOST_ROWS = 60
_MOST_LINES = 8


@click.command()
@click.argument("first", metavar="A", type=SOURCE)
@click.argument("second", metavar="B", type=SOURCE)
@click.option(
    "-d",
    "--directions",
    type=PATH,
    help="Say how well the changes fit these directions, as `directions` writes them.",
)
@click.option(
    "--rank",
    type=click.IntRange(1, 512),
    default=32,
    show_default=True,
    help="Largest rank of a difference that is told from full rank.",
)
@click.option(
    "--memory",
    metavar="SIZE",
    callback=parsed(parse_memory),
    default="256MB",
    show_default=True,
    help="Most that all working buffers take together; at least 8MB.",
)
@click.option(
    "--jobs", type=click.IntRange(min=1), default=None, help="Tensors compared at a time.  [default: one per core]"
)
@click.option("--all", "show_all", is_flag=True, help="Print every row and every name, however many there are.")
@click.option("--report", type=PATH, metavar="FOLDER", help="Write diff.html and its plots there too.")
@click.option("--open", "show", is_flag=True, help="Open that page in the browser.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 if anything differs, as `git diff --exit-code` does.")
@as_json_flag
@quiet_flag
@debug_flag
def diff(
    first: Path | str,
    second: Path | str,
    *,
    directions: Path | None,
    rank: int,
    memory: int,
    jobs: int | None,
    show_all: bool,
    report: Path | None,
    show: bool,
    exit_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show how checkpoint B differs from checkpoint A, and what kind of edit that is.

    Tensors are matched by name, then by their values. A and B may be sharded, named and typed differently.
    """
    from ablate_shards.surgery.diff.survey import DiffOptions
    from ablate_shards.surgery.diff.survey import diff as compare
    from ablate_shards.surgery.directions.formats import read_directions
    from ablate_shards.terminal.progress import show_progress

    if show and report is None:
        raise UsageError("--open shows a page, which --report FOLDER writes; give both")
    progress = show_progress(quiet=quiet or as_json)
    given = read_directions(directions) if directions else None
    one, other = _open(first), _open(second)
    with progress:
        found = compare(one, other, DiffOptions(memory=memory, jobs=jobs, rank=rank), progress, given)
    if as_json:
        print_json(dataclasses.asdict(found))
    elif not quiet:
        _show(found, most=None if show_all else _MOST_ROWS)
    if report is not None:
        _write_page(found, report, directions, show=show, quiet=quiet or as_json)
    if exit_code and not found.same:
        raise click.exceptions.Exit(1)


def _write_page(found: "Diff", folder: Path, directions: Path | None, *, show: bool, quiet: bool) -> None:
    from ablate_shards.surgery.report.document import report_comparison

    made = report_comparison(found, folder, directions)
    if not quiet:
        for _, reason in made.missing:
            click.echo(reason, err=True)
        plots = f", {len(made.plots)} plots to {made.plots[0].parent}" if made.plots else ""
        click.echo(f"written to {made.page}{plots}")
    if show:
        click.launch(made.page.resolve().as_uri())


def _open(source: Path | str) -> "Checkpoint":
    from ablate_shards.surgery.checkpoint.stores import cached, open_source

    checkpoint = open_source(source)
    return checkpoint if checkpoint.remote is None else cached(checkpoint)


def _show(found: "Diff", most: int | None) -> None:
    from ablate_shards.terminal.tables import output, say

    screen = output()
    _print_table(screen, [tensor for tensor in found.tensors if tensor.changed or tensor.nonfinite], most)
    lines = None if most is None else _MOST_LINES
    for title, names in (
        ("only in A", found.lost),
        ("only in B", found.added),
        ("renamed", [f"{item.name} → {item.new_name}" for item in found.tensors if item.name != item.new_name]),
        ("of another shape", [_shapes(tensor) for tensor in found.tensors if tensor.shape != tensor.new_shape]),
        ("joined", [f"{item.whole} = {', '.join(item.parts)}" for item in found.fused if not item.split]),
        ("split", [f"{item.whole} = {', '.join(item.parts)}" for item in found.fused if item.split]),
        ("metadata", found.metadata),
        ("files", found.files),
    ):
        _print_list(screen, title, names, lines)
    tensors = found.equal + len(found.tensors)
    say(screen, f"{tensors} tensor{'' if tensors == 1 else 's'} in both, {found.equal} of them equal to the byte")
    for line in found.verdict:
        say(screen, line, "bold")


def _print_table(screen: "Console", tensors: Sequence["TensorDiff"], most: int | None) -> None:
    """Prints a line per layer, component and kind of change: the biggest changes, in the order of the layers."""
    from ablate_shards.terminal.tables import Column, Row, bar, print_table, say

    groups: dict[tuple[str, str, str], list[TensorDiff]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.place, tensor.component, tensor.kind].append(tensor)
    if not groups:
        return
    ranked = sorted(groups, key=lambda group: -max(map(_size, groups[group])))
    shown = sorted(ranked[:most], key=lambda group: _in_order(groups[group][0]))
    largest = max(map(_size, tensors))
    aligned = any(tensor.alignment for tensor in tensors)
    described = [column for column in _COLUMNS if aligned or not column.aligned]
    columns = [Column(each.name, right=each.right, rank=each.rank, wraps=not each.right) for each in described]
    columns.insert(_BAR_PLACE, Column("", rank=1, bar=True))
    rows = []
    for group in (groups[place] for place in shown):
        cells = [each.cell(group) for each in described]
        rows.append(Row([*cells[:_BAR_PLACE], bar(_size(_loudest(group)), largest), *cells[_BAR_PLACE:]]))
    print_table(screen, columns, rows)
    if most is not None and len(ranked) > most:
        say(screen, f"and {len(ranked) - most} smaller ones; --all shows them")
    say(
        screen,
        "relative size: norm of the difference, and the bar; energy: share of the first singular value, scales undone; "
        "coefficient: of the ablation that explains it",
        "dim",
    )


def _in_order(tensor: "TensorDiff") -> tuple[bool, int, str, str, str]:
    return (tensor.layer is None, tensor.layer or 0, tensor.place, tensor.component, tensor.kind)


class _Column(NamedTuple):
    """A column of the table, what it says of some tensors, and its rank where the screen is too narrow for all.

    An aligned one speaks of given directions.
    """

    name: str
    cell: Callable[[Sequence["TensorDiff"]], str]
    rank: int = 0
    right: bool = True
    aligned: bool = False


def _size(tensor: "TensorDiff") -> float:
    return tensor.relative if tensor.relative is not None else float(tensor.changed > 0)


def _loudest(group: Sequence["TensorDiff"]) -> "TensorDiff":
    return max(group, key=_size)


def _relative(group: Sequence["TensorDiff"]) -> str:
    relative = _loudest(group).relative
    return "–" if relative is None else f"{relative:.2%}"


def _changed(group: Sequence["TensorDiff"]) -> str:
    return f"{sum(tensor.changed for tensor in group) / max(1, sum(tensor.elements for tensor in group)):.0%}"


def _energy(group: Sequence["TensorDiff"]) -> str:
    shares = _loudest(group).shares
    return f"{shares[0]:.0%}" if shares else "–"


def _coefficient(group: Sequence["TensorDiff"]) -> str:
    found = [tensor.ablation.coefficient for tensor in group if tensor.ablation]
    return f"{max(found, key=abs):.2f}" if found else "–"


def _rank(group: Sequence["TensorDiff"]) -> str:
    tensor = _loudest(group)
    if tensor.rank is None:
        return "–"
    if tensor.form is None:
        return f">{tensor.rank}"
    return f"{tensor.rank}" if tensor.form == "plain" else f"{tensor.rank} + {tensor.form}"


def _best_direction(group: Sequence["TensorDiff"]) -> str:
    alignment = _loudest(group).alignment
    return "–" if alignment is None else f"{alignment.best_cosine:.2f} layer {alignment.best_layer}"


def _own_direction(group: Sequence["TensorDiff"]) -> str:
    alignment = _loudest(group).alignment
    return "–" if alignment is None or alignment.cosine is None else f"{alignment.cosine:.2f}"


def _shapes(tensor: "TensorDiff") -> str:
    return f"{tensor.name}: {list(tensor.shape)} → {list(tensor.new_shape)} ({tensor.kind})"


def _leaves(group: Sequence["TensorDiff"]) -> str:
    """Returns the modules of some tensors, with how many there are of each."""
    counts = Counter(_leaf(tensor.name) for tensor in group)
    return ", ".join(leaf if count == 1 else f"{count} x {leaf}" for leaf, count in counts.items())


def _leaf(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def _print_list(screen: "Console", title: str, lines: Sequence[str], most: int | None) -> None:
    for line in lines[:most]:
        screen.print(f"{title}: {line}", soft_wrap=True)
    if most is not None and len(lines) > most:
        screen.print(f"{title}: and {len(lines) - most} more; --all shows them", soft_wrap=True)


#: The bar stands after so many columns.
_BAR_PLACE = 3
_COLUMNS = (
    _Column("layer", lambda group: group[0].place),
    _Column("component", lambda group: group[0].component, right=False),
    _Column("relative size", _relative),
    _Column("change", lambda group: group[0].kind, 2, right=False),
    _Column("tensors", _leaves, 3, right=False),
    _Column("rank", _rank, 4),
    _Column("closest direction", _best_direction, 5, aligned=True),
    _Column("coefficient", _coefficient, 6),
    _Column("its own", _own_direction, 7, aligned=True),
    _Column("energy", _energy, 8),
    _Column("values", _changed, 9),
    _Column("largest change", lambda group: f"{max(tensor.largest for tensor in group):.2g}", 10),
    _Column("norms kept", lambda group: ", ".join(_loudest(group).kept) or "–", 11, right=False),
)
