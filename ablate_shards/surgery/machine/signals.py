"""Signals: SIGTERM ends a run as Ctrl-C does, and neither interrupts a step that cannot be undone."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

__all__ = ["end_if_asked", "sigterm_as_interrupt"]

#: That somebody asked the run to end: what is raised for it in a callback of a library may get lost there.
_asked = threading.Event()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delays Ctrl-C and SIGTERM until a short step that cannot be undone has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Makes SIGTERM end the main thread as Ctrl-C does, which no library takes for an error of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Not where it is ignored, as in what a shell runs in the background.
    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _interrupt):
        numbers.append(signal.SIGINT)
    before = [(number, signal.signal(number, _interrupt)) for number in numbers]
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before:
            signal.signal(number, handler)


def end_if_asked() -> None:
    """Ends a run that was asked to end, wherever that was lost; for loops that wait on a library.

    Raises:
        KeyboardInterrupt: It was.
    """
    if _asked.is_set():
        raise KeyboardInterrupt


def _interrupt(number: int, frame: FrameType | None) -> None:
    _asked.set()
    signal.default_int_handler(number, frame)
