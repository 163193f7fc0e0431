"""``push``: publishes an edited checkpoint or an adapter on the Hub."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    as_json_flag,
    debug_flag,
    print_json,
    quiet_flag,
    resources,
)

__all__ = ["push"]


@click.command()
@click.argument("out", type=PATH)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of committing to the branch.")
@click.option("--revision", metavar="BRANCH", help="Branch to commit to; made if it does not exist.  [default: main]")
@click.option("--message", metavar="TEXT", help="Summary of the commit.")
@click.option("--base-model", metavar="REPO", help="The base model's repository, where the receipt does not know it.")
@click.option("--card", type=PATH, help="Model card to start from, instead of the repository's own.")
@click.option("--source", type=SOURCE, help="What OUT was made of, to verify OUT with if its receipt is not fresh.")
@click.option("--adapter", type=PATH, help="What was merged into OUT, to verify a merge with.")
@click.option("--replace", is_flag=True, help="Delete weights of REPO that OUT does not have, in the same commit.")
@click.option("--dry-run", is_flag=True, help="List what would be sent, and send nothing.")
@resources
@as_json_flag
@quiet_flag
@debug_flag
def push(
    out: Path,
    repo: str,
    *,
    dry_run: bool,
    device: str,
    memory: int,
    jobs: int | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Publish OUT in the repository REPO on the Hub, with a model card made of its receipts.

    OUT is a folder that `ablate` or `merge` made, or an adapter. It is verified first unless its
    receipt is fresh, sent in one commit, and compared with the Hub's checksums after. The token is
    that of `hf auth login` or HF_TOKEN. A push that was interrupted is resumed by pushing again.
    """
    from ablate_shards.surgery.checkpoint.hub_store import quieten_hub
    from ablate_shards.surgery.checkpoint.stores import hub_repository
    from ablate_shards.surgery.edit.operation import RunOptions
    from ablate_shards.surgery.hub.push import PushOptions, plan_push
    from ablate_shards.surgery.hub.push import push as push_folder
    from ablate_shards.terminal.progress import show_progress

    repo = hub_repository(repo) or repo
    options = PushOptions(**settings)
    progress = show_progress(quiet=quiet or as_json)
    quieten_hub(bars=quiet or as_json or not sys.stderr.isatty())
    if dry_run:
        plan = plan_push(out, repo, options)
        if as_json:
            print_json(dataclasses.asdict(plan))
        elif not quiet:
            from ablate_shards.terminal.results import print_push

            print_push(plan)
        return
    with progress:
        pushed = push_folder(out, repo, options, RunOptions(device=device, memory=memory, jobs=jobs), progress)
    if as_json:
        print_json(dataclasses.asdict(pushed))
    elif not quiet:
        what = f"{out} is at" if pushed.new else f"nothing was sent: {repo} holds all of {out} already, at"
        click.echo(f"{what} {pushed.url}; the checksums of {pushed.files} files agree")
