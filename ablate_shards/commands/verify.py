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
    rank_flags,
    rank_given,
    resources,
)
from ablate_shards.commands.startup import one_blas_thread
from ablate_shards.errors import UsageError
from ablate_shards.names import ADAPTER_RECEIPT_NAME

__all__ = ["verify"]


@click.command()
@click.argument("source", type=SOURCE)
@click.argument("out", type=SOURCE)
@click.option("--adapter", type=PATH, help="For a merge: the adapter, to compute again what it changed.")
@click.option(
    "--run",
    "prompts",
    type=PATH,
    help="Text with a prompt a line: run both on them as well, and show what layers still add along the directions.",
)
@resources
@rank_flags
@cache_flag
@as_json_flag
@quiet_flag
@debug_flag
def verify(
    source: Path | str,
    out: Path | str,
    *,
    adapter: Path | None,
    prompts: Path | None,
    device: str,
    memory: int,
    jobs: int | None,
    worker_rank: int | None,
    world_size: int | None,
    cache: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Re-read SOURCE and OUT and compare every byte with what the receipt in OUT says.

    Where OUT is an adapter that `ablate --adapter` made, it is measured again what it does to SOURCE.

    With --run, an ablation is shown on the model as well as on the bytes: transformers runs SOURCE and OUT on the
    same texts, which shows what each edited layer adds along the directions before and after, and how far the
    predictions moved.

    Either may be elsewhere: a repository on the Hub (org/name[@revision], hub:org/name) or a folder
    of an object store, which is read by byte ranges, and nothing of it is kept here. The exit code
    is 1 when anything differs.

    With --worker-rank and --world-size, a process compares its share of the shards, and rank 0 the
    files beside them too; OUT is what its receipt says if the exit code of all ranks is 0.
    """
    one_blas_thread()
    from ablate_shards.surgery.checkpoint.stores import cached, open_files, open_source
    from ablate_shards.surgery.edit.operation import RunOptions
    from ablate_shards.surgery.verify.proof import verify as verify_checkpoint
    from ablate_shards.terminal.progress import show_progress

    progress = show_progress(quiet=quiet or as_json)
    texts = None if prompts is None else _texts(prompts, source, out, adapter)
    rank = rank_given(worker_rank, world_size)
    is_adapter = isinstance(out, Path) and (out / ADAPTER_RECEIPT_NAME).is_file() and adapter is None
    if rank is not None and (is_adapter or texts is not None):
        what = "an adapter is verified" if is_adapter else "--run runs the models"
        raise UsageError(f"{what} by one process, and this is {rank} ({rank.said_by}); add --world-size 1")
    run = RunOptions(device=device, memory=memory, jobs=jobs, rank=rank)
    checkpoint = open_source(source)
    files = open_files(out)
    for each in (checkpoint.files, files):
        if each.revision:
            progress.note(f"{each.name} is commit {each.revision}")
    if cache:
        checkpoint = cached(checkpoint)
    if is_adapter:
        _verify_adapter(checkpoint, Path(out), run, progress, as_json=as_json, quiet=quiet)
        return
    with progress:
        verification = verify_checkpoint(checkpoint, files, run, progress, adapter=adapter)
    shown = None if texts is None or verification.differences else _run(checkpoint, Path(out), texts, device)
    if as_json:
        print_json(dataclasses.asdict(verification) | ({} if shown is None else {"run": dataclasses.asdict(shown)}))
    elif verification.differences or not quiet:
        from ablate_shards.terminal.results import print_run, print_verification

        print_verification(verification, source, out if rank is None else f"the share of {rank} in {out}")
        if shown is not None:
            print_run(shown)
    if verification.differences:
        raise click.exceptions.Exit(1)


def _texts(prompts: Path, source: Path | str, out: Path | str, adapter: Path | None) -> list[str]:
    """Returns the prompts to run, where source and output can be run."""
    from ablate_shards.names import RECEIPT_NAME
    from ablate_shards.surgery.verify.run_proof import read_prompts

    if adapter is not None or not all(isinstance(each, Path) and each.is_dir() for each in (source, out)):
        raise UsageError("--run runs the folders of an ablation and its source on this machine; name two such folders")
    if not (Path(out) / RECEIPT_NAME).is_file():
        raise UsageError(f"--run shows what an ablation did, and {out} holds no {RECEIPT_NAME}; leave it out")
    return read_prompts(prompts)


def _run(checkpoint: Any, out: Path, texts: list[str], device: str) -> Any:
    from ablate_shards.surgery.edit.receipt import read_receipt
    from ablate_shards.surgery.verify.run_proof import prove_by_running

    return prove_by_running(checkpoint, out, read_receipt(out), texts, device=device)


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
