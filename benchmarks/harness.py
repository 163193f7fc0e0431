"""What every case shares: contenders that take turns, checked before they are timed, compared run by run."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

__all__ = [
    "CASES",
    "Bench",
    "BenchmarkError",
    "Case",
    "Contender",
    "Race",
    "Row",
    "Sample",
    "amount",
    "case",
    "cells",
    "mebibytes",
    "race",
    "table",
]


class BenchmarkError(Exception):
    """A benchmark that cannot be run; its text is one sentence."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One timed run.

    Attributes:
        seconds: Wall-clock time.
        peak: Peak resident bytes of the processes that ran; None where no process was started.
        bound: Whether the peak is only known to be no more than that.
        disk: The most bytes of disk that were taken at a time; None where nobody looked.
        fetched: Bytes that were fetched; None where nobody counted.
    """

    seconds: float
    peak: int | None = None
    bound: bool = False
    disk: int | None = None
    fetched: int | None = None


@dataclass(frozen=True, slots=True)
class Contender:
    """Something that is timed.

    Attributes:
        name: What it is called in the table.
        run: Does it once.
        against: The contender whose seconds are divided by this one's.
        check: Says what is wrong with what the last run left; None where nothing is.
        before: Prepares a run; not timed.
        after: Removes what a run left; not timed.
        moved: Bytes read and written in a run, where a bandwidth is wanted.
    """

    name: str
    run: Callable[[], Sample]
    against: str | None = None
    check: Callable[[], str | None] = lambda: None
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None
    moved: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured of one contender.

    Attributes:
        contender: Its name.
        wrong: What its check found; it has no times then.
        seconds: Of every run, in order.
        against: The contender that ``ratio`` compares with.
        ratio: Median over the runs of that one's seconds divided by this one's.
        peak: Largest peak of its processes in bytes.
        bound: Whether that is only known to be no more.
        moved: Bytes read and written in a run.
        disk: Largest peak of its disk in bytes.
        fetched: Most bytes that a run fetched.
    """

    contender: str
    wrong: str | None = None
    seconds: tuple[float, ...] = ()
    against: str | None = None
    ratio: float | None = None
    peak: int | None = None
    bound: bool = False
    moved: int = 0
    disk: int | None = None
    fetched: int | None = None

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)

    @property
    def bandwidth(self) -> float | None:
        """Bytes read and written in a second."""
        return self.moved / self.median if self.moved and self.seconds else None

    def as_dict(self) -> dict[str, Any]:
        """Returns what the JSON file holds of it."""
        timed = bool(self.seconds)
        return {
            "contender": self.contender,
            "wrong": self.wrong,
            "seconds": list(self.seconds),
            "median": self.median if timed else None,
            "least": min(self.seconds) if timed else None,
            "most": max(self.seconds) if timed else None,
            "against": self.against,
            "ratio": self.ratio,
            "peak_bytes": self.peak,
            "peak_is_bound": self.bound,
            "bytes_moved": self.moved or None,
            "bytes_per_second": self.bandwidth,
            "peak_disk_bytes": self.disk,
            "bytes_fetched": self.fetched,
        }

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> "Row":
        """Returns the row that a JSON file holds."""
        return Row(
            found["contender"],
            found["wrong"],
            tuple(found["seconds"]),
            found["against"],
            found["ratio"],
            found["peak_bytes"],
            found["peak_is_bound"],
            found["bytes_moved"] or 0,
            # Older results do not hold these.
            found.get("peak_disk_bytes"),
            found.get("bytes_fetched"),
        )


@dataclass(frozen=True, slots=True)
class Race:
    """One table: contenders over the same data.

    Attributes:
        title: What they ran on.
        rows: One per contender.
        size: The bytes of what they ran on, where time against bytes, or the share that is fetched, is to be shown.
    """

    title: str
    rows: tuple[Row, ...]
    size: int | None = None

    def __getitem__(self, contender: str) -> Row:
        """Returns the row of a contender."""
        return next(row for row in self.rows if row.contender == contender)

    def as_dict(self) -> dict[str, Any]:
        """Returns what the JSON file holds of it."""
        return {"title": self.title, "bytes": self.size, "rows": [row.as_dict() for row in self.rows]}

    @staticmethod
    def from_dict(found: Mapping[str, Any]) -> "Race":
        """Returns the race that a JSON file holds."""
        return Race(found["title"], tuple(map(Row.from_dict, found["rows"])), found["bytes"])


class Bench:
    """One run of a case.

    Args:
        work: An empty folder, removed after the case.
        runs: How often each contender is timed.
        tiny: Whether to take the smallest sizes and no run but those that count, to see that a case runs; its times
            mean nothing.
        show: Takes each table and each note as it comes.

    Attributes:
        races: What was measured so far.
        notes: What was said of it.
    """

    def __init__(self, work: Path, *, runs: int, tiny: bool, show: Callable[[Table | str], object]) -> None:
        self.work, self.runs, self.tiny, self._show = work, runs, tiny, show
        self.races: list[Race] = []
        self.notes: list[str] = []

    def race(self, title: str, contenders: Sequence[Contender], *, size: int | None = None) -> Race:
        """Checks and times contenders over the same data, and shows the table."""
        found = Race(title, race(contenders, self.runs, first_counts=self.tiny), size)
        self.races.append(found)
        self._show(table(found))
        return found

    def note(self, text: str) -> None:
        """Says something of what was measured."""
        self.notes.append(text)
        self._show(text)

    @property
    def is_right(self) -> bool:
        """Whether every check held."""
        return not any(row.wrong for found in self.races for row in found.rows)


@dataclass(frozen=True, slots=True)
class Case:
    """One entry of the registry.

    Attributes:
        name: What it is called on the command line.
        measure: Runs it.
        runs: How often each contender is timed by default.
        gpu: Whether it needs one.
        long: Whether it is left out unless it or everything is asked for.
    """

    name: str
    measure: Callable[[Bench], None]
    runs: int
    gpu: bool
    long: bool

    @property
    def summary(self) -> str:
        """The first line of the function's docstring."""
        return (self.measure.__doc__ or "").strip().partition("\n")[0]


CASES: dict[str, Case] = {}
COLUMNS = ("spread", "ours/this", "bandwidth", "peak memory", "peak disk", "fetched")


def case(
    name: str, *, runs: int = 5, gpu: bool = False, long: bool = False
) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """Registers a function as a case."""

    def register(measure: Callable[[Bench], None]) -> Callable[[Bench], None]:
        CASES[name] = Case(name, measure, runs, gpu, long)
        return measure

    return register


def race(contenders: Sequence[Contender], runs: int, *, first_counts: bool = False) -> tuple[Row, ...]:
    """Runs and checks each contender once, then times those that are right, in turns.

    Every other round goes backwards, so that none always follows the same one. A contender whose check finds
    something is not timed at all, and one that is compared with it gets no ratio.

    Args:
        contenders: What is timed.
        runs: How often each.
        first_counts: Whether the run that is checked is one of them, though nothing has been read or imported before.
    """
    first: dict[str, Sample] = {}
    wrong: dict[str, str | None] = {}
    for contender in contenders:
        contender.before()
        first[contender.name] = contender.run()
        wrong[contender.name] = contender.check()
        contender.after()
    right = [contender for contender in contenders if wrong[contender.name] is None]
    samples = {contender.name: [first[contender.name]] if first_counts else [] for contender in right}
    for number in range(runs - first_counts):
        for contender in right if number % 2 == 0 else reversed(right):
            contender.before()
            samples[contender.name].append(contender.run())
            contender.after()
    return tuple(_row(contender, wrong[contender.name], samples) for contender in contenders)


def _row(contender: Contender, wrong: str | None, samples: Mapping[str, Sequence[Sample]]) -> Row:
    if wrong is not None:
        return Row(contender.name, wrong, against=contender.against)
    own = samples[contender.name]
    ratio = None
    if contender.against is not None and contender.against in samples:
        pairs = zip(samples[contender.against], own, strict=True)
        ratio = statistics.median(theirs.seconds / this.seconds for theirs, this in pairs)
    highest = max(own, key=lambda sample: sample.peak or 0)
    return Row(
        contender.name,
        None,
        tuple(sample.seconds for sample in own),
        contender.against,
        ratio,
        highest.peak,
        highest.bound,
        contender.moved,
        max((sample.disk for sample in own if sample.disk is not None), default=None),
        max((sample.fetched for sample in own if sample.fetched is not None), default=None),
    )


def amount(size: float) -> str:
    """Returns bytes as text, in the unit that suits them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e3:.0f} kB"


def mebibytes(size: int) -> int:
    """Returns bytes in MiB, rounded up."""
    return -(-size // 2**20)


def cells(found: Race) -> list[dict[str, str]]:
    """Returns a table as text: per row, what each column says; a column that says nothing is left out."""
    timed = max((len(row.seconds) for row in found.rows), default=0)
    shown = [_cells(row, f"median of {timed}", found.size) for row in found.rows]
    empty = {name for name in shown[0] if not any(row[name] for row in shown)} - {""}
    return [{name: text for name, text in row.items() if name not in empty} for row in shown]


def table(found: Race) -> Table:
    """Returns a table for a person; a contender whose check failed has the reason and no time."""
    shown = Table(title=found.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    rows = cells(found)
    for name in rows[0]:
        shown.add_column(name, justify="right" if name else "left")
    for row in rows:
        shown.add_row(*row.values())
    return shown


def _cells(row: Row, median: str, size: int | None) -> dict[str, str]:
    if row.wrong is not None:
        return {"": f"{row.contender}: WRONG, no speed: {row.wrong}", **dict.fromkeys((median, *COLUMNS), "")}
    scale, unit, digits = _unit(row.median)
    least, most = (f"{value * scale:.{digits}f}" for value in (min(row.seconds), max(row.seconds)))
    values = (
        f"{least}–{most}",
        "" if row.ratio is None else f"{row.ratio:.2f}",
        "" if row.bandwidth is None else f"{row.bandwidth / 1e9:.3g} GB/s",
        "" if row.peak is None else f"{'< ' if row.bound else ''}{mebibytes(row.peak)} MiB",
        "" if row.disk is None else amount(row.disk),
        "" if row.fetched is None or not size else f"{row.fetched / size:.2f} times",
    )
    return {
        "": row.contender,
        median: f"{row.median * scale:.{digits}f} {unit}",
        **dict(zip(COLUMNS, values, strict=True)),
    }


def _unit(seconds: float) -> tuple[float, str, int]:
    """Returns the factor, the unit and the decimals that suit a time."""
    if seconds >= 0.1:
        return 1, "s", 2 if seconds < 10 else 1
    return (1e3, "ms", 2) if seconds >= 1e-4 else (1e6, "µs", 1)
