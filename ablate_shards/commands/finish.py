"""``finish``: joins what several ranks made of one output."""

import shlex
import sys
from pathlib import Path

import click

from ablate_shards.commands.options import SOURCE, as_json_flag, debug_flag, print_json, quiet_flag

__all__ = ["finish"]


@click.command()
@click.argument("out", type=SOURCE)
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier run made.")
@as_json_flag
@quiet_flag
@debug_flag
def finish(out: Path | str, *, overwrite: bool, as_json: bool, quiet: bool) -> None:
    """Join what ranks made with --worker-rank and --world-size, and publish it as OUT.

    OUT is the folder, the dump, the repository, or the folder of an object store that all ranks named.
    It gets the bytes and the receipt that one process would have written. Where a rank is not complete,
    or two did not do the same, nothing is published, and the command to run again is printed.
    """
    from ablate_shards.surgery.checkpoint.hub_store import quieten_hub
    from ablate_shards.surgery.checkpoint.stores import hub_repository
    from ablate_shards.surgery.hub.ranks import finish as join_ranks
    from ablate_shards.terminal.progress import show_progress

    if hub_repository(out) is not None:
        quieten_hub(bars=quiet or as_json or not sys.stderr.isatty())
    progress = show_progress(quiet=quiet or as_json)
    with progress:
        finished = join_ranks(out, overwrite=overwrite, progress=progress)
    if as_json:
        print_json({"out": str(out), "holds": finished.holds})
    elif not quiet:
        click.echo(f"{out} is complete, with {finished.holds}")
        click.echo(f"go on with: ablate-shards {shlex.join(finished.next)}")
