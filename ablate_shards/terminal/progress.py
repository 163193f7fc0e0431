"""How far a command has come, on stderr; nothing of it is imported where nothing is shown."""

from typing import TYPE_CHECKING, Any, Protocol, Self

from ablate_shards.surgery.machine.sizes import size_text

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

__all__ = ["ScreenProgress", "show_progress"]

_WIDE, _MOST_BAR = 80, 40


class ScreenProgress(Protocol):
    """Shows how far a command has come, on stderr."""

    def __enter__(self) -> Self:
        """Starts showing."""

    def __exit__(self, *_: object) -> None:
        """Leaves the screen as it should stay."""

    def begin(self, total: int) -> None:
        """Starts counting towards a total of bytes."""

    def advance(self, count: int) -> None:
        """Counts more bytes."""

    def count(self, done: int, total: int) -> None:
        """Shows how many of how many are done: layers, or whatever the bar was made to count."""

    def note(self, text: str) -> None:
        """Shows one line."""


def show_progress(*, quiet: bool, counted: str = "layers") -> ScreenProgress:
    """Returns a bar for a terminal, plain lines for anything else, silence where quiet.

    Args:
        quiet: Whether to show nothing.
        counted: What a bar without bytes counts.
    """
    if quiet:
        return _Silence()
    from rich.console import Console

    console = Console(stderr=True)
    return _Bar(console, counted) if console.is_terminal else _Lines(console)


class _Silence:
    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass

    def count(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class _Lines(_Silence):
    def __init__(self, console: "Console") -> None:
        self._console = console
        self._total, self._done, self._shown = 0, 0, 0

    def begin(self, total: int) -> None:
        self._total, self._done, self._shown = total, 0, 0

    def advance(self, count: int) -> None:
        self._done += count
        quarter = 4 * self._done // self._total if self._total else 0
        if quarter > self._shown:
            self._shown = quarter
            self.note(f"{25 * quarter} % of {size_text(self._total)}")

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class _Bar(_Silence):
    _task: "TaskID"

    def __init__(self, console: "Console", counted: str) -> None:
        self._console = console
        self._counted = counted
        self._progress: Progress | None = None

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def begin(self, total: int) -> None:
        from rich.progress import DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (DownloadColumn(), TimeRemainingColumn(), TransferSpeedColumn())
        self._show("bytes", total, *columns[: self._console.width // 20])

    def advance(self, count: int) -> None:
        progress = self._progress
        if progress is not None:
            progress.advance(self._task, count)
            if progress.finished:
                # What follows may be an upload, with bars of its own.
                progress.stop()
                self._progress = None

    def count(self, done: int, total: int) -> None:
        from rich.progress import TextColumn, TimeRemainingColumn

        if self._progress is None:
            self._show(self._counted, total, TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _show(self, what: str, total: int, *columns: Any) -> None:
        from rich.progress import BarColumn, Progress, TextColumn

        bar = BarColumn(None if self._console.width < _WIDE else _MOST_BAR)
        self._progress = Progress(TextColumn(what), bar, *columns, console=self._console, transient=True)
        self._task = self._progress.add_task(what, total=total)
        self._progress.start()
