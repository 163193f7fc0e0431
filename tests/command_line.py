"""Runs the command line, in this process or on a terminal."""

import os
import subprocess
import sys

from click.testing import CliRunner, Result

from ablate_shards.cli import cli


def run(*arguments) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def on_terminal(stream: str, *arguments, width: int) -> bytes:
    """Returns what it shows where ``stdout`` or ``stderr`` is a terminal; the other goes nowhere."""
    main_end, terminal = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "ablate_shards", *map(str, arguments)],
        **{"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: terminal},
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(width)},
    )
    os.close(terminal)
    seen = b""
    while True:
        try:
            seen += os.read(main_end, 4096)
        except OSError:  # the terminal is closed when the process ends
            break
    os.close(main_end)
    assert process.wait() == 0
    return seen
