"""Contenders that are commands: each run is a process of its own, whose time and peak memory are its own."""

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks.harness import BenchmarkError, Contender, Sample

__all__ = ["EAGER", "TOOL", "Command", "copying", "reading", "remove", "run", "unsynced", "writing"]

TOOL = (sys.executable, "-m", "ablate_shards")
EAGER = (sys.executable, "-P", str(Path(__file__).with_name("eager.py")))
LAUNCH = (sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")))
#: How far from each other two readings of the same peak may lie: the system counts pages in batches.
SLACK = 2**20

Command = Sequence[str | Path]


def run(*commands: Command, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> Sample:
    """Runs commands one after another.

    Args:
        commands: The commands.
        folder: Where they run, this process's folder if None.
        environment: Variables that they have besides this process's.

    Raises:
        BenchmarkError: One failed; it has what the command said.
    """
    words: list[str] = []
    for command in commands:
        words += [*([";"] if words else []), *map(str, command)]
    # A tool that is installed has its byte code: it is kept here too, whatever this shell says.
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    variables |= environment or {}
    done = subprocess.run([*LAUNCH, *words], capture_output=True, text=True, cwd=folder, env=variables)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise BenchmarkError(f"{' ; '.join(' '.join(map(str, command)) for command in commands)} failed: {said}")
    seconds, peak, floor = done.stdout.split()
    return Sample(float(seconds), int(peak), bound=int(peak) <= int(floor) + SLACK)


@functools.cache
def unsynced(command: str) -> tuple[str, ...] | None:
    """Returns the option that makes a command of ours leave the sync out; None where it has none."""
    shown = subprocess.run([*TOOL, command, "--help"], capture_output=True, text=True, check=True)
    return ("--no-sync",) if "--no-sync" in shown.stdout else None


def writing(
    name: str,
    command: Command,
    out: Path,
    *,
    against: str | None = None,
    sync: bool = False,
    check: Callable[[], str | None] = lambda: None,
) -> Contender:
    """Returns a command that writes something, which is removed after each run.

    Args:
        name: What it is called.
        command: The command.
        out: What it writes, a folder or a file.
        against: The contender to compare it with.
        sync: Whether to sync the file system as part of the run.
        check: Says what is wrong with ``out``.
    """
    commands = [command, ["sync", "-f", out.parent]] if sync else [command]
    return Contender(name, lambda: run(*commands), against, check, after=lambda: remove(out))


def copying(source: Path, out: Path, *, against: str, sync: bool) -> Contender:
    """Returns ``cp -r``, with or without a sync of that file system."""
    name = "cp -r, then sync" if sync else "cp -r"
    return writing(name, ["cp", "-r", source, out], out, against=against, sync=sync)


def reading(files: Sequence[Path], *, against: str) -> Contender:
    """Returns reading files once and doing nothing with them."""
    return Contender("reading once (cat)", lambda: run(["cat", *files]), against)


def remove(path: Path) -> None:
    """Removes a folder or a file, and waits until its file system has nothing left to write back."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    settle(path.parent)


def settle(folder: Path) -> None:
    """Waits until a file system has nothing left to write back."""
    subprocess.run(["sync", "-f", folder], check=True)
