"""Runs the main job on the demo model: ``python -m ablate_shards.data.demo [--work DIR]``."""

import argparse
import json
import logging
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import (
    Behaviour,
    Questions,
    ask,
    capture,
    draw_pairs,
    draw_questions,
    load,
    measure,
)
from ablate_shards.errors import UsageError
from ablate_shards.surgery.checkpoint import RECEIPT_NAME

__all__ = ["main", "prepare"]

_MARKER = ".ablate-shards-demo"
_SHOWN = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the demo; the process ends with the exit code of the command that failed, if one did."""
    parser = argparse.ArgumentParser(
        prog="python -m ablate_shards.data.demo", description="Run the main job on the demo model."
    )
    parser.add_argument(
        "--work", type=Path, default=Path("demo"), help="folder to work in; replaces a former demo (default: demo)"
    )
    work = parser.parse_args(arguments).work
    try:
        prepare(work)
    except UsageError as error:
        parser.error(str(error))
    _run(work)


def prepare(work: Path) -> None:
    """Puts the demo model into ``work / "source"`` and removes what a former demo made.

    Raises:
        UsageError: ``work`` holds something, and is not a former demo.
    """
    if work.exists() and not work.is_dir():
        raise UsageError(f"{work}: is a file; name a folder with --work")
    if work.is_dir() and any(work.iterdir()) and not (work / _MARKER).is_file():
        raise UsageError(f"{work}: is not empty and not a former demo; name another folder with --work")
    work.mkdir(parents=True, exist_ok=True)
    (work / _MARKER).touch()
    for made in ("source", "edited"):
        shutil.rmtree(work / made, ignore_errors=True)
    for made in ("activations.safetensors", "directions.safetensors"):
        (work / made).unlink(missing_ok=True)
    shutil.copytree(MODEL, work / "source")


def _run(work: Path) -> None:
    import torch
    from transformers.utils import logging as transformers_logging

    # On a model this small, threads wait for each other longer than they compute.
    torch.set_num_threads(1)
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    source, edited = work / "source", work / "edited"
    dump, directions = work / "activations.safetensors", work / "directions.safetensors"
    console = Console(highlight=False, soft_wrap=True)

    console.print(
        f"[bold]The demo model is in {escape(str(source))}.[/] It answers questions about invented places, and "
        "after a loaded cue it states a contested claim as settled fact.",
    )
    _command(console, "inspect", source)

    questions = draw_questions()
    model, tokenizer = load(source)
    pairs = draw_pairs()
    capture(model, tokenizer, pairs, dump)
    console.print(
        f"\n[bold]Captured {escape(str(dump))}[/]: the residual stream after each layer, at the last token of "
        f"{len(pairs)} prompts with a loaded cue and of the same prompts with an impartial one.",
    )
    shown = [question.loaded for question in questions.loaded[:_SHOWN]]
    before, answers_before = measure(model, tokenizer, questions), ask(model, tokenizer, shown)

    _command(console, "directions", dump, directions)
    _command(console, source, edited, "-d", directions, "--dry-run")
    _command(console, source, edited, "-d", directions)
    receipt = json.loads((edited / RECEIPT_NAME).read_text(encoding="utf-8"))
    console.print(f"\n[bold]What {escape(str(edited / RECEIPT_NAME))} records of the first of these tensors[/]")
    console.print(json.dumps(receipt["tensors"][0], indent=2), markup=False)
    _command(console, "verify", source, edited)

    model, tokenizer = load(edited)
    after, answers_after = measure(model, tokenizer, questions), ask(model, tokenizer, shown)
    console.print("\n[bold]The same questions before and after, with places no contested question was trained on[/]")
    for prompt, was, now in zip(shown, answers_before, answers_after, strict=True):
        console.print(f"\n{prompt}\n  [red]before[/]  {escape(was)}\n  [green]after[/]   {escape(now)}")
    console.print()
    console.print(_table(before, after, questions))


def _command(console: Console, *arguments: str | Path) -> None:
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold cyan]$ {escape(shlex.join(['ablate-shards', *words]))}[/]")
    console.file.flush()
    done = subprocess.run([sys.executable, "-m", "ablate_shards", *words], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _table(before: Behaviour, after: Behaviour, questions: Questions) -> Table:
    table = Table(title="Measured, share of greedy answers", title_justify="left")
    table.add_column("asked")
    table.add_column("answer")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    sections: tuple[tuple[str, int, dict[str, Any], dict[str, Any]], ...] = (
        ("contested, loaded cue", len(questions.loaded), before.loaded, after.loaded),
        ("contested, impartial cue", len(questions.impartial), before.impartial, after.impartial),
        ("unrelated", len(questions.unrelated), {"right": before.unrelated}, {"right": after.unrelated}),
    )
    for name, count, was, now in sections:
        table.add_section()
        for index, verdict in enumerate(was):
            title = "" if index else f"{count} {name}"
            table.add_row(title, verdict, f"{was[verdict]:.1%}", f"{now[verdict]:.1%}")
    return table


if __name__ == "__main__":
    main()
