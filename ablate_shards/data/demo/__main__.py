"""Runs a whole recipe on the demo model: ``python -m ablate_shards.data.demo [--work DIR]``."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from ablate_shards.data.demo import MODEL, RECIPE
from ablate_shards.data.demo.samples import write_samples
from ablate_shards.errors import UsageError
from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation

__all__ = ["main", "prepare_demo"]

_MARKER = ".ablate-shards-demo"
_SHOWN = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo; the process ends with the exit code of the command that failed, if one did."""
    parser = argparse.ArgumentParser(
        prog="python -m ablate_shards.data.demo", description="Run a whole recipe on the demo model."
    )
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder to work in; replaces a former demo (default: demo)"
    )
    work = parser.parse_args(arguments).work
    try:
        prepare_demo(work)
    except UsageError as error:
        parser.error(str(error))
    _run(work)


def prepare_demo(work: Path) -> None:
    """Puts the demo model, its samples and its recipe into ``work`` and removes what a former demo made.

    Raises:
        UsageError: ``work`` holds something, and is not a former demo.
    """
    if work.exists() and not work.is_dir():
        raise UsageError(f"{work}: is a file; name a folder with --work")
    if work.is_dir() and any(work.iterdir()) and not (work / _MARKER).is_file():
        raise UsageError(f"{work}: is not empty and not a former demo; name another folder with --work")
    work.mkdir(parents=True, exist_ok=True)
    (work / _MARKER).touch()
    for made in ("source", "stages", "result"):
        shutil.rmtree(work / made, ignore_errors=True)
    shutil.copytree(MODEL, work / "source")
    shutil.copy(RECIPE, work)
    write_samples(work)


def _run(work: Path) -> None:
    console = Console(highlight=False, soft_wrap=True)
    source, result, stages = work / "source", work / "result", work / "stages"
    console.print(
        f"[bold]The demo model is in {escape(str(source))}.[/] It answers questions about invented places, and "
        "after a loaded cue it states a contested claim as settled fact.",
    )
    _command(console, "inspect", source)
    _command(console, "run", work / RECIPE.name)
    _command(console, "verify", stages / "ablated", result, "--adapter", stages / "adapter")

    before, after = (read_evaluation(stages / f"{name}.evaluation.json") for name in ("source", "result"))
    console.print("\n[bold]The same questions before and after, about places no contested question was trained on[/]")
    for was, now in list(zip(before.answers, after.answers, strict=True))[:_SHOWN]:
        console.print(
            f"\n{escape(was.prompt)}\n  [red]before[/]  {escape(was.text)}\n  [green]after[/]   {escape(now.text)}"
        )


def _command(console: Console, *arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold cyan]$ {escape(shlex.join(['ablate-shards', *words]))}[/]")
    console.file.flush()
    # On a model this small, threads wait for each other longer than they compute.
    done = subprocess.run(
        [sys.executable, "-m", "ablate_shards", *words], check=False, env={"OMP_NUM_THREADS": "1", **os.environ}
    )
    if done.returncode:
        raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
