"""Writes the report of a run or of a comparison: one HTML page, and its charts as SVG and PNG."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate_shards.errors import ReportError
from ablate_shards.names import PLOTS_NAME, REPORT_NAME
from ablate_shards.surgery.diff.differences import Diff
from ablate_shards.surgery.machine.files import write_whole
from ablate_shards.surgery.report.charts import chart_data
from ablate_shards.surgery.report.comparison import comparison_data, render_comparison
from ablate_shards.surgery.report.findings import ReportOptions, gather
from ablate_shards.surgery.report.page import render
from ablate_shards.surgery.report.plots import PLOT_NAMES, draw_charts

__all__ = ["COMPARISON_NAME", "Report", "ReportOptions", "report", "report_comparison"]

COMPARISON_NAME = "diff.html"


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
        out: A folder that ablate, merge or run made, or the one that search wrote to.
        options: Where else to look.

    Raises:
        ReportError: OUT holds no receipt and no search that can be read, a place that was named is not there, or
            jinja2 is not installed.
        EvaluateError: An evaluation that was named cannot be read.
    """
    found = gather(out, options or ReportOptions())
    data = chart_data(found)
    return _write_all(out, REPORT_NAME, render(found, data), data, found.missing)


def report_comparison(found: Diff, folder: Path, directions: Path | None = None) -> Report:
    """Writes ``diff.html`` and ``plots/`` into a folder, which is made if it is not there.

    Args:
        found: In what two checkpoints differ.
        folder: Where to write.
        directions: The file of the directions that changes were compared with.

    Raises:
        ReportError: The folder cannot be made, or jinja2 is not installed.
    """
    data = comparison_data(found)
    page = render_comparison(found, data, directions)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ReportError(f"{folder}: {error.strerror}; name a folder for the page") from error
    return _write_all(folder, COMPARISON_NAME, page, data, {})


def _write_all(folder: Path, name: str, text: str, data: Mapping[str, Any], missing: Mapping[str, str]) -> Report:
    """Writes a page and its charts."""
    page, missing = folder / name, dict(missing)
    # Names and answers may hold half of a surrogate pair, which UTF-8 has no bytes for.
    write_whole(page, [text.encode("utf-8", "replace")])
    try:
        drawn = draw_charts(data)
    except ImportError:
        drawn = {}
        missing["plots"] = "Charts as SVG and PNG need matplotlib: pip install 'ablate-shards[report]'"
    folder /= PLOTS_NAME
    if drawn:
        folder.mkdir(exist_ok=True)
    for plot in PLOT_NAMES:
        if plot in drawn:
            write_whole(folder / plot, [drawn[plot]])
        elif drawn:
            (folder / plot).unlink(missing_ok=True)
    return Report(page, tuple(folder / plot for plot in PLOT_NAMES if plot in drawn), tuple(missing.items()))
