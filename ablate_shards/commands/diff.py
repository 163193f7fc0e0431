"""``diff``: shows how any two checkpoints differ."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    adapter_rank,
    as_json_flag,
    debug_flag,
    making_adapter,
    parse_memory,
    parsed,
    print_json,
    private_flag,
    quiet_flag,
)
from ablate_shards.commands.output import made
from ablate_shards.errors import UsageError
from ablate_shards.terminal.differences import MOST_ROWS, print_differences

if TYPE_CHECKING:
    from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
    from ablate_shards.surgery.diff.differences import Diff

__all__ = ["diff"]


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
    help="Largest rank that is recognised as low; a difference of a higher one counts as full rank.",
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
@making_adapter("--adapter", type=SOURCE, metavar="OUT", help="Make a LoRA adapter of A that brings it about.")
@adapter_rank
@private_flag
@click.option("--overwrite", is_flag=True, help="Replace an adapter that an earlier run made.")
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
    adapter: Path | str | None,
    adapter_rank: int | None,
    private: bool,
    overwrite: bool,
    exit_code: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Show how checkpoint B differs from checkpoint A, and what kind of edit that is.

    Tensors are matched by name, then by their values. A and B may be sharded, named and typed differently.

    With --adapter, the difference is not shown but put into an adapter, which peft loads on A. Then A and B have to
    hold the same tensors in the same shapes.
    """
    if adapter is not None:
        if directions is not None or report is not None or show or exit_code or show_all:
            raise UsageError(
                "--adapter shows no difference but makes an adapter; leave the options of a comparison out"
            )
        _make_adapter(
            first,
            second,
            adapter,
            adapter_rank,
            memory=memory,
            jobs=jobs,
            overwrite=overwrite,
            private=private,
            as_json=as_json,
            quiet=quiet,
        )
        return
    if adapter_rank is not None or overwrite or private:
        raise UsageError(
            "--adapter-rank, --overwrite and --private are about an adapter; add --adapter OUT, or leave them out"
        )
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
        print_differences(found, most=None if show_all else MOST_ROWS)
    if report is not None:
        _write_page(found, report, directions, show=show, quiet=quiet or as_json)
    if exit_code and not found.same:
        raise click.exceptions.Exit(1)


def _make_adapter(
    first: Path | str,
    second: Path | str,
    out: Path | str,
    rank: int | None,
    *,
    memory: int,
    jobs: int | None,
    overwrite: bool,
    private: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    from ablate_shards.surgery.checkpoint.checkpoint import files_of
    from ablate_shards.surgery.checkpoint.stores import hub_repository
    from ablate_shards.surgery.edit.operation import RunOptions
    from ablate_shards.surgery.extract.changed import difference_receipt, plan_difference_adapter
    from ablate_shards.surgery.hub.adapters import make_adapter
    from ablate_shards.surgery.machine.staging import OutFolder, check_out
    from ablate_shards.terminal.adapters import print_adapter
    from ablate_shards.terminal.progress import show_progress

    one, other = _open(first), _open(second)
    files = [*files_of(one), *files_of(other)]
    place: OutFolder | Path | str = out
    if (repo := hub_repository(out)) is None and isinstance(out, Path):
        place = check_out(one.path, files, out, overwrite=overwrite, inputs=[other.path])
    if private and repo is None:
        raise UsageError(f"--private: {out} is no repository; name one, such as hub:me/adapter")
    progress = show_progress(quiet=quiet or as_json)
    plan = plan_difference_adapter(one, other, rank)
    for note in plan.notes:
        progress.note(note)
    with progress:
        results, url = make_adapter(
            one,
            plan,
            lambda measured: difference_receipt(one, other, measured),
            place,
            RunOptions(memory=memory, jobs=jobs, overwrite=overwrite),
            progress,
            private=private,
        )
    if as_json:
        print_json(made(out, url, results, kind="modules"))
    elif not quiet:
        print_adapter(plan, results, out, one.name, url, directed=False)


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
