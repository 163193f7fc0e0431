"""Runs the command line, in this process or on a terminal."""

import os
import subprocess
import sys

from click.testing import CliRunner, Result

from ablate_shards.cli import cli


def run(*arguments, **settings) -> Result:
    """Runs it in this process; the settings are those of click's runner."""
    return CliRunner().invoke(cli, [str(argument) for argument in arguments], **settings)


def checked(*arguments, code=0) -> Result:
    """Runs it in this process, and asserts that it ends with an exit code."""
    result = run(*arguments)
    assert result.exit_code == code, result.output
    return result


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
