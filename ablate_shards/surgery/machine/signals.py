"""Signals: SIGTERM ends a run as Ctrl-C does, and neither interrupts a step that cannot be undone."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

__all__ = ["end_with_parent", "sigterm_as_interrupt", "uninterrupted"]


def end_with_parent() -> None:
    """Ends this process by SIGTERM once the one that started it by ``multiprocessing`` is gone, perhaps killed."""
    import multiprocessing

    if (parent := multiprocessing.parent_process()) is None:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


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
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
