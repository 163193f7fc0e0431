"""Draws the charts of the report as SVG and PNG, for papers and model cards."""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["PLOT_NAMES", "draw_charts"]

_INK, _SOFT, _GRID = "#20242a", "#5b626c", "#e4e1da"
_BLUE, _ORANGE, _PURPLE, _GREY = "#1c5f94", "#e0813f", "#a873b3", "#b3b5b8"
_VERDICTS = {
    "slanted": _ORANGE,
    "neutral": "#5fa2d0",
    "deflecting": _GREY,
    "wrong": _PURPLE,
    "broken": "#a81e3c",
    "unclear": "#e2dfd8",
}
#: Hatch and edge that mark two verdicts without colour: broken is striped, unclear is an outline.
_FORMS = {"broken": ("/////", "white"), "unclear": ("", "#5b626c")}
#: How a trial is marked, the later over the earlier; each kind has a form of its own.
_TRIALS: Mapping[str, Mapping[str, Any]] = {
    "trial": {"color": _GREY, "marker": "o", "markersize": 4, "linestyle": ""},
    "front": {"color": _BLUE, "marker": "D", "markersize": 5, "linewidth": 1.3},
    "plain": {"color": _INK, "marker": "s", "markersize": 7, "linestyle": "", "fillstyle": "none"},
    "chosen": {"color": _ORANGE, "marker": "*", "markersize": 13, "linestyle": "", "markeredgecolor": "white"},
}
_RAMP = ("#f1efea", "#14507f")
_STYLE: Mapping[str, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.labelcolor": _SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 200,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "svg.hashsalt": "ablate-shards",
    "text.color": _INK,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
}
_METADATA: Mapping[str, Mapping[str, None]] = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}


def draw_charts(data: Mapping[str, Any]) -> dict[str, bytes]:
    """Returns the charts that there are data for, by file name.

    Args:
        data: What the charts show, as ``chart_data`` gives it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    files = {}
    style: Any = dict(_STYLE)
    with rc_context(style):
        for name, (key, chart) in _CHARTS.items():
            if not data.get(key):
                continue
            figure = Figure()
            chart(figure, data)
            for suffix, metadata in _METADATA.items():
                file = io.BytesIO()
                figure.savefig(file, format=suffix, metadata=dict(metadata))
                files[f"{name}.{suffix}"] = file.getvalue()
    return files


def _quality(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    figure.set_size_inches(7, 4.4)
    titles = {
        "signal": "Signal to noise",
        "auc": "Held-out AUC",
        "purity": "Purity",
        "cosine": "1 − cosine of the means",
    }
    for axes, (key, title) in zip(figure.subplots(2, 2).flat, titles.items(), strict=True):
        rows = [(row["layer"], row[key]) for row in data["quality"] if row[key] is not None]
        if key == "cosine":
            rows = [(layer, max(1e-9, 1 - value)) for layer, value in rows]
            axes.set_yscale("log")
        elif key == "purity":
            axes.set_ylim(0, 1.05)
        axes.plot(
            *zip(*rows, strict=True) if rows else ((), ()), color=_BLUE, marker="o", markersize=2.5, linewidth=1.3
        )
        if data["best"] is not None:
            axes.axvline(data["best"], color=_GREY, linewidth=0.8)
        axes.set_title(title)
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _cosines(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    figure.set_size_inches(4.6, 4)
    layers = data["cosines"]["layers"]
    axes = figure.subplots()
    axes.grid(visible=False)
    colours = LinearSegmentedColormap.from_list("cosine", [_ORANGE, *_RAMP])
    image = axes.imshow(np.array(data["cosines"]["values"]), cmap=colours, vmin=-1, vmax=1)
    _label_layers(axes, layers)
    axes.set_yticks(axes.get_xticks(), [label.get_text() for label in axes.get_xticklabels()])
    axes.set_ylabel("layer")
    axes.set_title("Cosine between the directions")
    figure.colorbar(image, shrink=0.8).outline.set_visible(False)


def _projection(figure: "Figure", data: Mapping[str, Any]) -> None:
    figure.set_size_inches(4.6, 3.8)
    layers = data["projection"]
    shown = next((each for each in layers if each["layer"] == data.get("best")), layers[-1])
    axes = figure.subplots()
    for label, colour, marker in (("positive", _ORANGE, "o"), ("negative", _VERDICTS["neutral"], "D")):
        across, up = zip(*shown[label], strict=True)
        axes.scatter(across, up, s=16, color=colour, marker=marker, linewidths=0, alpha=0.85, label=label)
    axes.set_title(f"Prompts at layer {shown['layer']}")
    axes.set_xlabel("along the direction")
    axes.set_ylabel("principal component of the rest")
    axes.legend()


def _edits(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import PercentFormatter

    layers = sorted({cell["layer"] for cell in data["edits"]})
    components = _components(data)
    figure.set_size_inches(max(4.5, min(11, 1.8 + 0.35 * len(layers))), 1.1 + 0.6 * len(components))
    most = max(max(cell["before"], cell["after"]) for cell in data["edits"]) or 1.0
    colours = LinearSegmentedColormap.from_list("share", _RAMP)
    every = figure.subplots(2, 1, sharex=True)
    for axes, when in zip(every, ("before", "after"), strict=True):
        values = np.full((len(components), len(layers)), np.nan)
        for cell in data["edits"]:
            values[components.index(cell["component"]), layers.index(cell["layer"])] = cell[when]
        axes.grid(visible=False)
        image = axes.imshow(values, cmap=colours, vmin=0, vmax=most, aspect="auto")
        axes.set_yticks(range(len(components)), components)
        axes.set_title(f"Share along the direction, {when}")
    _label_layers(every[1], layers)
    figure.colorbar(image, ax=every, format=PercentFormatter(1)).outline.set_visible(False)


def _drift(figure: "Figure", data: Mapping[str, Any]) -> None:
    rows = [cell for cell in data["edits"] if cell["drift"] is not None]
    axes = _per_layer(figure, rows, "drift", _components(data), "component")
    axes.set_title("Largest relative change of a kept norm")


def _updates(figure: "Figure", data: Mapping[str, Any]) -> None:
    rows = [{**row, "kind": row["name"].split(".")[0]} for row in data["updates"]]
    axes = _per_layer(figure, rows, "change", sorted({row["kind"] for row in rows}), "kind")
    axes.set_title("Size of the LoRA update, relative to the weight")


def _verdicts(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.ticker import PercentFormatter

    rows = sorted(data["verdicts"], key=lambda row: -row["order"])
    groups = list(dict.fromkeys(row["group"] for row in data["verdicts"]))
    figure.set_size_inches(7, 0.9 + 0.32 * len(rows))
    every = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for axes, group in zip(every, groups, strict=True):
        inside = [row for row in rows if row["group"] == group]
        starts = np.zeros(len(inside))
        for verdict, colour in _VERDICTS.items():
            hatch, edge = _FORMS.get(verdict, ("", "white"))
            shares = np.array([row[verdict][0] / row[verdict][1] for row in inside])
            axes.barh(
                [row["stage"] for row in inside],
                shares,
                left=starts,
                color=colour,
                label=verdict,
                height=0.7,
                hatch=hatch,
                edgecolor=edge,
                linewidth=np.where(shares, 0.6, 0),
            )
            starts += shares
        axes.set_title(group)
        axes.set_xlim(0, 1)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    handles, labels = every[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6)


def _bias(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.ticker import PercentFormatter

    rows = sorted(data["verdicts"], key=lambda row: (row["group"] != "core", row["group"], row["order"]))[::-1]
    figure.set_size_inches(6, 0.8 + 0.28 * len(rows))
    axes = figure.subplots()
    for place, row in enumerate(rows):
        low, high = row["interval"]
        axes.plot([low, high], [place, place], color=_ORANGE, linewidth=2, solid_capstyle="round")
        axes.plot([row["slanted"][0] / row["slanted"][1]], [place], color=_ORANGE, marker="o", markersize=6)
        # No slant in answers that are none is no success.
        if row["broken"][0]:
            share = row["broken"][0] / row["broken"][1]
            axes.plot([share], [place], color=_VERDICTS["broken"], marker="x", markersize=7, markeredgewidth=2)
            axes.annotate("broken", (share, place), (0, 6), textcoords="offset points", ha="center", fontsize=7)
    axes.set_yticks(range(len(rows)), [f"{row['group']}, {row['stage']}" for row in rows])
    axes.set_xlim(-0.02, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_title("Slanted answers, with 95 % intervals")


def _losses(figure: "Figure", data: Mapping[str, Any]) -> None:
    figure.set_size_inches(5.5, 3)
    axes = figure.subplots()
    losses = data["losses"]
    if losses["steps"]:
        axes.plot(*zip(*losses["steps"], strict=True), color=_GREY, linewidth=1, label="training")
    kinds = sorted({row["kind"] for row in losses["held_out"]})
    for kind, colour in zip(kinds, (_ORANGE, _BLUE, _PURPLE, _INK), strict=False):
        points = [(row["epoch"], row["loss"]) for row in losses["held_out"] if row["kind"] == kind]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3.5, label=f"{kind}, held out")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch")
    axes.set_title("Loss")
    if losses["steps"] or kinds:
        axes.legend()


def _changes(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.ticker import PercentFormatter

    layers = sorted({cell["layer"] for cell in data["changes"]})
    components = sorted({cell["component"] for cell in data["changes"]})
    figure.set_size_inches(max(4.5, min(11, 1.8 + 0.35 * len(layers))), 0.9 + 0.4 * len(components))
    values = np.full((len(components), len(layers)), np.nan)
    for cell in data["changes"]:
        values[components.index(cell["component"]), layers.index(cell["layer"])] = cell["relative"]
    axes = figure.subplots()
    axes.grid(visible=False)
    image = axes.imshow(
        values, cmap=LinearSegmentedColormap.from_list("share", _RAMP), vmin=0, vmax=np.nanmax(values), aspect="auto"
    )
    axes.set_yticks(range(len(components)), components)
    axes.set_title("Relative size of the difference")
    _label_layers(axes, layers)
    figure.colorbar(image, format=PercentFormatter(1)).outline.set_visible(False)


def _spectra(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure.set_size_inches(5.5, 3)
    axes = figure.subplots()
    for row in data["spectra"]:
        places = range(1, len(row["shares"]) + 1)
        axes.plot(
            places, np.maximum(row["shares"], 1e-6), color=_BLUE, alpha=0.4, linewidth=1, marker="o", markersize=2
        )
    axes.set_yscale("log")
    axes.set_ylim(min(0.01, axes.get_ylim()[0]), 1.3)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("singular value of the difference")
    axes.set_title("Share of the energy, scales undone")


def _fits(figure: "Figure", data: Mapping[str, Any]) -> None:
    axes = _per_layer(figure, data["fits"], "cosine", sorted({row["which"] for row in data["fits"]}), "which")
    axes.yaxis.set_major_formatter("{x:.1f}")
    axes.set_ylim(-0.02, 1.05)
    axes.set_title("Cosine of the differences with the given directions")


def _search_front(figure: "Figure", data: Mapping[str, Any]) -> None:
    for axes, search in _per_search(figure, data, 3.6):
        front = search["front"]
        placed = [trial for trial in front["trials"] if trial["complete"]]
        least = -np.inf if front["least"] is None else front["least"]
        if front["least"] is not None:
            axes.set_xscale("log")
        for kind, style in _TRIALS.items():
            trials = [trial for trial in placed if kind == "trial" or trial[kind]]
            points = sorted((max(trial["x"], least), trial["y"]) for trial in trials)
            if points:
                axes.plot(*zip(*points, strict=True), label=kind, **style)
        if front["up"]["base"] is not None:
            axes.axhline(front["up"]["base"], color=_GREY, linewidth=0.8, linestyle=":", label="unedited model")
        if front["budget"] is not None:
            axes.axvline(max(front["budget"], least), color=_GREY, linewidth=0.8, label="budget")
        if len(placed) < len(front["trials"]):
            # What was not measured stands at the edge.
            most = max((trial["x"] for trial in front["trials"] if trial["x"] is not None), default=1)
            ends = [most if trial["x"] is None else trial["x"] for trial in front["trials"] if not trial["complete"]]
            low = [axes.get_ylim()[0]] * len(ends)
            axes.plot([max(end, least) for end in ends], low, label="incomplete", color=_GREY, marker="x", linestyle="")
        axes.set_title(f"Trials of {search['name']}")
        axes.set_xlabel(_aim(front["across"]) if front["across"] else "trial")
        axes.set_ylabel(_aim(front["up"]))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)


def _aim(objective: Mapping[str, str]) -> str:
    return f"{objective['name']} ({'less' if objective['direction'] == 'minimize' else 'more'} is better)"


def _search_importance(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.ticker import PercentFormatter

    every = data["importance"]
    figure.set_size_inches(4.2 * len(every), 0.9 + 0.2 * max(len(each["bars"]) for each in every))
    for axes, each in zip(figure.subplots(1, len(every), squeeze=False)[0], every, strict=True):
        bars = each["bars"][::-1]
        axes.barh([bar["parameter"] for bar in bars], [bar["share"] for bar in bars], color=_BLUE, height=0.7)
        axes.grid(visible=False, axis="y")
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(f"What {each['objective']} depends on, {each['name']}")


def _search_depth(figure: "Figure", data: Mapping[str, Any]) -> None:
    from matplotlib.ticker import MaxNLocator

    for axes, search in _per_search(figure, data, 2.8):
        parts = list(dict.fromkeys(row["part"] for row in search["depth"]))
        for number, (part, colour) in enumerate(zip(parts, _cycle(len(parts)), strict=True)):
            rows = [row for row in search["depth"] if row["part"] == part]
            layers, marker = [row["layer"] for row in rows], "oDs^vP"[number % 6]
            axes.plot(layers, [row["chosen"] for row in rows], color=colour, marker=marker, markersize=3.5, label=part)
            if rows[0]["plain"] is not None:
                axes.plot(layers, [row["plain"] for row in rows], color=colour, linewidth=1, linestyle="--", alpha=0.5)
        axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.set_xlabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(f"Coefficient by layer, {search['name']}; dashed: the plain edit")
        if parts:
            axes.legend()


def _per_search(figure: "Figure", data: Mapping[str, Any], height: float) -> Iterator[tuple["Axes", Mapping[str, Any]]]:
    """Yields each search with axes of its own, one above the other."""
    searches = data["searches"]
    figure.set_size_inches(6.5, height * len(searches) + 0.6)
    yield from zip(figure.subplots(len(searches), 1, squeeze=False)[:, 0], searches, strict=True)


def _per_layer(
    figure: "Figure", rows: Sequence[Mapping[str, Any]], key: str, kinds: Sequence[str], group: str
) -> "Axes":
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    figure.set_size_inches(6.5, 2.8)
    axes = figure.subplots()
    for number, (kind, colour) in enumerate(zip(kinds, _cycle(len(kinds)), strict=True)):
        points = [(row["layer"], row[key]) for row in rows if row[group] == kind]
        if points:
            across, up = zip(*points, strict=True)
            axes.scatter(across, up, s=18, color=colour, marker="oDs^vP"[number % 6], linewidths=0, label=kind)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    if rows:
        axes.legend()
    return axes


def _label_layers(axes: "Axes", layers: Sequence[int]) -> None:
    step = -(-len(layers) // 24)
    axes.set_xticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    axes.set_xlabel("layer")


def _components(data: Mapping[str, Any]) -> list[str]:
    return sorted({cell["component"] for cell in data["edits"]})


def _cycle(count: int) -> list[str]:
    colours = ("#5fa2d0", _ORANGE, _PURPLE, _GREY, _BLUE, _INK)
    return [colours[index % len(colours)] for index in range(count)]


_CHARTS: Mapping[str, tuple[str, Callable[["Figure", Mapping[str, Any]], None]]] = {
    "direction": ("quality", _quality),
    "cosines": ("cosines", _cosines),
    "projection": ("projection", _projection),
    "edits": ("edits", _edits),
    "norm_drift": ("edits", _drift),
    "updates": ("updates", _updates),
    "losses": ("losses", _losses),
    "verdicts": ("verdicts", _verdicts),
    "bias": ("verdicts", _bias),
    "changes": ("changes", _changes),
    "spectra": ("spectra", _spectra),
    "fits": ("fits", _fits),
    "search_front": ("searches", _search_front),
    "search_importance": ("importance", _search_importance),
    "search_depth": ("searches", _search_depth),
}
PLOT_NAMES = tuple(f"{name}.{suffix}" for name in _CHARTS for suffix in _METADATA)
