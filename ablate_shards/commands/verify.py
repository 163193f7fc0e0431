"""``verify``: compares an output with its receipt."""

import dataclasses
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    as_json_flag,
    cache_flag,
    debug_flag,
    print_json,
    quiet_flag,
    resources,
)
from ablate_shards.commands.startup import one_blas_thread
from ablate_shards.names import ADAPTER_RECEIPT_NAME

__all__ = ["verify"]


@click.command()
@click.argument("source", type=SOURCE)
@click.argument("out", type=SOURCE)
@click.option("--adapter", type=PATH, help="For a merge: the adapter, to compute again what it changed.")
@resources
@cache_flag
@as_json_flag
@quiet_flag
@debug_flag
def verify(
    source: Path | str,
    out: Path | str,
    *,
    adapter: Path | None,
    device: str,
    memory: int,
    jobs: int | None,
    cache: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Re-read SOURCE and OUT and compare every byte with what the receipt in OUT says.

    Where OUT is an adapter that `ablate --adapter` made, it is measured again what it does to SOURCE.

    Either may be elsewhere: a repository on the Hub (org/name[@revision], hub:org/name) or a folder
    of an object store, which is read by byte ranges, and nothing of it is kept here. The exit code
    is 1 when anything differs.
    """
    one_blas_thread()
    from ablate_shards.surgery.checkpoint.stores import cached, open_files, open_source
    from ablate_shards.surgery.edit.operation import RunOptions
    from ablate_shards.surgery.verify.proof import verify as verify_checkpoint
    from ablate_shards.terminal.progress import show_progress

    progress = show_progress(quiet=quiet or as_json)
    run = RunOptions(device=device, memory=memory, jobs=jobs)
    checkpoint = open_source(source)
    files = open_files(out)
    for each in (checkpoint.files, files):
        if each.revision:
            progress.note(f"{each.name} is commit {each.revision}")
    if cache:
        checkpoint = cached(checkpoint)
    if isinstance(out, Path) and (out / ADAPTER_RECEIPT_NAME).is_file() and adapter is None:
        _verify_adapter(checkpoint, out, run, progress, as_json=as_json, quiet=quiet)
        return
    with progress:
        verification = verify_checkpoint(checkpoint, files, run, progress, adapter=adapter)
    if as_json:
        print_json(dataclasses.asdict(verification))
    elif verification.differences or not quiet:
        from ablate_shards.terminal.results import print_verification

        print_verification(verification, source, out)
    if verification.differences:
        raise click.exceptions.Exit(1)


def _verify_adapter(checkpoint: Any, folder: Path, run: Any, progress: Any, *, as_json: bool, quiet: bool) -> None:
    from ablate_shards.surgery.verify.adapter_proof import verify_adapter

    with progress:
        verification = verify_adapter(checkpoint, folder, run, progress)
    if as_json:
        print_json(dataclasses.asdict(verification))
    elif verification.differences or not quiet:
        from ablate_shards.terminal.adapters import print_adapter_verification

        print_adapter_verification(verification, folder)
    if verification.differences:
        raise click.exceptions.Exit(1)
