"""Runs the command line, in this process or on a terminal."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator

import pytest
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
    """Returns what it shows in this process where ``stdout`` or ``stderr`` is a terminal; the other goes nowhere."""
    main_end, terminal = os.openpty()
    seen = []
    reader = threading.Thread(target=lambda: seen.extend(_until_closed(main_end)))
    reader.start()
    with (
        pytest.MonkeyPatch.context() as patch,
        open(terminal, "w", encoding="utf-8") as screen,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
    ):
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", str(width))
        patch.setattr(sys, "stdout", nowhere)
        patch.setattr(sys, "stderr", nowhere)
        patch.setattr(sys, stream, screen)
        cli([str(argument) for argument in arguments], standalone_mode=False)
    reader.join()
    os.close(main_end)
    return b"".join(seen)


def _until_closed(main_end: int) -> Iterator[bytes]:
    """Yields what a terminal is given; it is read meanwhile, because it holds little."""
    with contextlib.suppress(OSError):  # at its end
        while data := os.read(main_end, 4096):
            yield data
