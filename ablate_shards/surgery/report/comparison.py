"""Renders the difference of two checkpoints as one HTML page that needs nothing else."""

import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ablate_shards import __version__
from ablate_shards.surgery.diff.differences import Diff, TensorDiff, leaf
from ablate_shards.surgery.report.frame import fill

__all__ = ["comparison_data", "render_comparison"]

_MOST_ROWS = 1_500
_MOST_NAMES = 500
_MOST_SPECTRA = 200


def comparison_data(found: Diff) -> dict[str, Any]:
    """Returns what the charts are drawn from, in JSON types; a chart without data has no key."""
    data: dict[str, Any] = {}
    cells: dict[tuple[int, str], list[TensorDiff]] = defaultdict(list)
    for tensor in found.tensors:
        if tensor.layer is not None and tensor.relative:
            cells[tensor.layer, tensor.component].append(tensor)
    if cells:
        data["changes"] = [
            {
                "layer": layer,
                "component": component,
                "names": ", ".join(dict.fromkeys(leaf(tensor.name) for tensor in tensors)),
                "count": len(tensors),
                "relative": _short(largest.relative),
                "kind": largest.kind,
                "rank": "" if largest.rank is None else f"{'> ' if largest.form is None else ''}{largest.rank}",
            }
            for (layer, component), tensors in sorted(cells.items())
            for largest in [max(tensors, key=_size)]
        ]
    telling = sorted((tensor for tensor in found.tensors if tensor.shares), key=_size, reverse=True)
    if telling:
        data["spectra"] = [
            {"name": tensor.name, "shares": [_short(share) for share in tensor.shares]}
            for tensor in telling[:_MOST_SPECTRA]
        ]
    if fits := list(_fits(found)):
        data["fits"] = fits
    return data


def render_comparison(found: Diff, data: Mapping[str, Any], directions: Path | None = None) -> str:
    """Returns the page; the same findings give the same text.

    Args:
        found: In what two checkpoints differ.
        data: What its charts show.
        directions: The file of the directions that changes were compared with.

    Raises:
        ReportError: jinja2 is not installed.
    """
    changed = sorted(
        (tensor for tensor in found.tensors if tensor.changed or tensor.nonfinite), key=_size, reverse=True
    )
    given = ["-d", str(directions)] if directions else []
    return fill(
        "diff.html.jinja",
        data,
        eyebrow="ablate-shards diff",
        title=f"{_called(found.first)} → {_called(found.second)}",
        found=found,
        figures=list(_figures(found, changed)),
        rows=changed[:_MOST_ROWS],
        left=max(0, len(changed) - _MOST_ROWS),
        lists=[
            (title, items[:_MOST_NAMES], max(0, len(items) - _MOST_NAMES)) for title, items in _lists(found) if items
        ],
        facts=[
            ("A", found.first),
            ("B", found.second),
            ("architecture", found.family or "unknown"),
            *([("directions", str(directions))] if directions else []),
            ("compared by", f"ablate-shards {__version__}"),
        ],
        command=shlex.join(["ablate-shards", "diff", found.first, found.second, *given]),
        **{f"data_{key}": key in data for key in ("changes", "spectra", "fits")},
    )


def _figures(found: Diff, changed: list[TensorDiff]) -> Iterator[tuple[str, str, str]]:
    both = found.equal + len(found.tensors)
    rounded = sum(tensor.kind == "rounding" for tensor in changed)
    yield "Tensors in both", f"{both:,}", f"{found.equal:,} equal to the byte"
    yield "Edited", f"{len(changed) - rounded:,}", f"{rounded:,} more differ by rounding only"
    renamed = sum(tensor.name != tensor.new_name for tensor in found.tensors)
    retyped = sum(tensor.dtype != tensor.new_dtype for tensor in found.tensors)
    yield "Renamed", f"{renamed:,}", f"{retyped:,} of another type"
    yield (
        "Only on one side",
        f"{len(found.lost) + len(found.added):,}",
        f"{len(found.lost):,} in A, {len(found.added):,} in B",
    )


def _lists(found: Diff) -> Iterator[tuple[str, list[str]]]:
    yield "Only in A", list(found.lost)
    yield "Only in B", list(found.added)
    yield "Renamed", [f"{item.name} → {item.new_name}" for item in found.tensors if item.name != item.new_name]
    yield (
        "Of another type",
        [f"{item.name}: {item.dtype} → {item.new_dtype}" for item in found.tensors if item.dtype != item.new_dtype],
    )
    yield (
        "Of another shape",
        [
            f"{item.name}: {list(item.shape)} → {list(item.new_shape)} ({item.kind})"
            for item in found.tensors
            if item.shape != item.new_shape
        ],
    )
    yield "Joined", [f"{item.whole} = {', '.join(item.parts)}" for item in found.fused if not item.split]
    yield "Split", [f"{item.whole} = {', '.join(item.parts)}" for item in found.fused if item.split]
    yield "Metadata and shards", list(found.metadata)
    yield "Files", list(found.files)


def _fits(found: Diff) -> Iterator[dict[str, Any]]:
    for tensor in found.tensors:
        fit = tensor.alignment
        if fit is None or tensor.layer is None:
            continue
        common = {"name": tensor.name, "layer": tensor.layer}
        yield {**common, "which": "closest direction", "of": fit.best_layer, "cosine": _short(fit.best_cosine)}
        if fit.cosine is not None:
            yield {**common, "which": "its own layer's", "of": None, "cosine": _short(fit.cosine)}


def _called(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2] or path


def _size(tensor: TensorDiff) -> float:
    return tensor.relative or 0.0


def _short(value: float | None) -> float:
    return float(f"{value or 0.0:.4g}")
