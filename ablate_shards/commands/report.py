"""``report``: makes a page of what a run did."""

from pathlib import Path

import click

from ablate_shards.commands.options import PATH, as_json_flag, debug_flag, print_json, quiet_flag

__all__ = ["report"]


@click.command()
@click.argument("out", type=PATH)
@click.option("--work", type=PATH, help="Folder in which `run` kept what its stages made.  [default: found beside OUT]")
@click.option(
    "--evaluation",
    "evaluations",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Evaluation to show, from before to after; repeatable.  [default: those found beside OUT]",
)
@click.option("--open", "show", is_flag=True, help="Open the page in the browser.")
@as_json_flag
@quiet_flag
@debug_flag
def report(
    out: Path, *, work: Path | None, evaluations: tuple[Path, ...], show: bool, as_json: bool, quiet: bool
) -> None:
    """Write OUT/report.html about what was done to OUT: one page that needs no network, and OUT/plots beside it.

    OUT is a folder that `ablate`, `merge` or `run` made, or the one that `search` wrote to. The page shows
    what is there and says what is missing; without matplotlib there are no static plots.
    """
    from ablate_shards.surgery.report.document import ReportOptions
    from ablate_shards.surgery.report.document import report as write

    made = write(out, ReportOptions(work=work, evaluations=evaluations))
    if as_json:
        print_json({"page": str(made.page), "plots": list(map(str, made.plots)), "missing": dict(made.missing)})
    elif not quiet:
        for part, reason in made.missing:
            click.echo(f"{part} is missing: {reason}", err=True)
        plots = f", {len(made.plots)} plots to {made.plots[0].parent}" if made.plots else ""
        click.echo(f"written to {made.page}{plots}")
    if show:
        click.launch(made.page.resolve().as_uri())
