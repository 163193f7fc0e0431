"""Writes the report of a run: one HTML page beside the receipt, and its charts as SVG and PNG."""

import os
from dataclasses import dataclass
from pathlib import Path

from ablate_shards.surgery.charts import chart_data
from ablate_shards.surgery.checkpoint import PLOTS_NAME, REPORT_NAME
from ablate_shards.surgery.findings import ReportOptions, gather
from ablate_shards.surgery.page import render
from ablate_shards.surgery.plots import PLOT_NAMES, draw
from ablate_shards.surgery.staging import fsync_folder

__all__ = ["Report", "ReportOptions", "report"]


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Attributes:
        page: The HTML page.
        plots: The static charts.
        missing: Parts that were not found, each with the reason.
    """

    page: Path
    plots: tuple[Path, ...]
    missing: tuple[tuple[str, str], ...]


def report(out: Path, options: ReportOptions | None = None) -> Report:
    """Writes ``report.html`` and ``plots/`` into OUT; the same findings give the same bytes.

    Every file appears complete or not at all. Charts of an earlier report that have nothing to show any more are
    removed.

    Args:
        out: A folder that ablate, merge or run made.
        options: Where else to look.

    Raises:
        ReportError: OUT holds no receipt, or a place that was named is not there.
        EvaluateError: An evaluation that was named cannot be read.
    """
    found = gather(out, options or ReportOptions())
    missing, data = dict(found.missing), chart_data(found)
    page = out / REPORT_NAME
    # Names and answers may hold half of a surrogate pair, which UTF-8 has no bytes for.
    _write(page, render(found, data).encode("utf-8", "replace"))
    try:
        drawn = draw(data)
    except ImportError:
        drawn = {}
        missing["plots"] = "Charts as SVG and PNG need matplotlib: pip install 'ablate-shards[report]'"
    folder = out / PLOTS_NAME
    if drawn:
        folder.mkdir(exist_ok=True)
    for name in PLOT_NAMES:
        if name in drawn:
            _write(folder / name, drawn[name])
        elif drawn:
            (folder / name).unlink(missing_ok=True)
    return Report(page, tuple(folder / name for name in PLOT_NAMES if name in drawn), tuple(missing.items()))


def _write(path: Path, content: bytes) -> None:
    """Writes a file beside its place, and puts it there when it is complete."""
    staged = path.with_name(f".{path.name}.partial")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)
    fsync_folder(path.parent)
