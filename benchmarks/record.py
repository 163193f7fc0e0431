"""What a case leaves as JSON, and what is made of it: the table that a page quotes, and the chart."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases.command import SYNCED, SYNCED_COPY, fit
from benchmarks.harness import Bench, BenchmarkError, Case, Race, cells

__all__ = ["FOLDER", "Result", "as_dict", "draw", "markdown", "read"]

FOLDER = Path(__file__).parent / "results"
FORMAT = "ablate-shards.benchmark/1"
COLOURS = {SYNCED: "#0072b2", SYNCED_COPY: "#d55e00"}


@dataclass(frozen=True, slots=True)
class Result:
    """What a JSON file holds.

    Attributes:
        command: What was typed.
        machine: What the figures depend on.
        races: The tables.
        notes: What was said of them.
    """

    command: str
    machine: Mapping[str, Any]
    races: list[Race]
    notes: list[str]


def as_dict(case: Case, bench: Bench, machine: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what the JSON file of a case holds."""
    return {
        "format": FORMAT,
        "case": case.name,
        "summary": case.summary,
        "command": f"python -m benchmarks {case.name} --runs {bench.runs}",
        "tiny": bench.tiny,
        "machine": machine,
        "tables": [race.as_dict() for race in bench.races],
        "notes": bench.notes,
    }


def read(case: str, folder: Path = FOLDER) -> Result:
    """Reads the result of a case.

    Raises:
        BenchmarkError: There is none, or its sizes were tiny and its times mean nothing.
    """
    path = folder / f"{case}.json"
    if not path.is_file():
        raise BenchmarkError(
            f"{path}: no result of {case}; measure it with `python -m benchmarks {case} --json {folder}`"
        )
    found = json.loads(path.read_text())
    if found["tiny"]:
        raise BenchmarkError(f"{path}: measured at tiny sizes, whose times mean nothing; measure {case} without --tiny")
    return Result(
        found["command"], found["machine"], [Race.from_dict(table) for table in found["tables"]], found["notes"]
    )


def markdown(case: str, folder: Path = FOLDER) -> str:
    """Returns the tables of a case as Markdown, below where and when they were measured.

    The first line is a comment that says what printed it; a test holds a page that quotes it to the JSON file.

    Raises:
        BenchmarkError: As :func:`read`.
    """
    result = read(case, folder)
    lines = [
        f"<!-- python -m benchmarks --quote {case} -->",
        *textwrap.wrap(_provenance(result), 115, break_long_words=False, break_on_hyphens=False),
    ]
    for race in result.races:
        rows = cells(race)
        heads = [name or race.title for name in rows[0]]
        lines += ["", f"| {' | '.join(heads)} |", "| --- " + "| ---: " * (len(heads) - 1) + "|"]
        lines += [f"| {' | '.join(row.values())} |" for row in rows]
    lines += [line for note in result.notes for line in ("", note)]
    return "\n".join(lines)


def draw(target: Path, folder: Path = FOLDER) -> None:
    """Draws time and memory against bytes, ours and ``cp``, from the result of ``scaling``.

    Raises:
        BenchmarkError: As :func:`read`.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    races = read("scaling", folder).races
    figure = Figure(figsize=(9.2, 3.4), layout="constrained")
    times, peaks = figure.subplots(1, 2)
    sizes = [(race.size or 0) / 1e9 for race in races]
    for name, colour in COLOURS.items():
        rows = [race[name] for race in races]
        if not all(row.seconds for row in rows):
            continue
        slope, start = fit(races, name)
        middle = [row.median for row in rows]
        around = [[row.median - min(row.seconds) for row in rows], [max(row.seconds) - row.median for row in rows]]
        times.errorbar(sizes, middle, around, fmt="o", color=colour, markersize=4, capsize=2, label=name)
        times.plot([0, sizes[-1]], [start, start + slope * sizes[-1]], color=colour, linewidth=1)
        peaks.plot(sizes, [(row.peak or 0) / 2**20 for row in rows], "o-", color=colour, markersize=4, label=name)
    times.set(xlabel="checkpoint (GB)", ylabel="time (s)")
    peaks.set(xlabel="checkpoint (GB)", ylabel="peak memory (MiB)")
    for axes in (times, peaks):
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    times.legend(frameon=False)
    with mpl.rc_context({"svg.hashsalt": target.name}):
        figure.savefig(target, format="svg", metadata={"Date": None, "Creator": None})


def _provenance(result: Result) -> str:
    """Returns one sentence about the machine, the versions, the date and the command."""
    machine = result.machine
    packages = machine["packages"]
    parts = [
        *([machine["device"]] if machine["device"] else []),
        f"{machine['cores']} cores of {machine['cpu']}",
        f"{machine['memory_bytes'] / 2**30:.0f} GiB",
        str(machine["file_system"]),
        machine["kernel"],
        f"Python {machine['python']}",
        *(f"{name} {packages[key]}" for key, name in (("numpy", "NumPy"), ("torch", "torch")) if key in packages),
        *([f"triton {packages['triton']}"] if machine["device"] and "triton" in packages else []),
    ]
    commit = f"commit {machine['commit'][:10]}" if machine["commit"] else "no commit"
    changed = " with changes" if machine["dirty"] else ""
    return f"Measured {machine['date']} on {', '.join(parts)}; {commit}{changed}, `{result.command}`."
