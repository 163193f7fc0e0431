"""How tables, bars and sentences fit a screen of any width, with or without colour and Unicode."""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from rich.bar import Bar
from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ablate_shards.surgery.anatomy.architecture import split_layer

__all__ = [
    "NO_LAYER",
    "Column",
    "Row",
    "Stack",
    "bar",
    "by_layer",
    "counted",
    "output",
    "print_key",
    "print_table",
    "say",
]

_Item = TypeVar("_Item")

#: Stands for what is in no decoder layer.
NO_LAYER = "–"
_FILE_WIDTH = 160
_GAP = 2
_LEAST_BAR, _FAIR_BAR, _MOST_BAR = 6, 14, 40


def output() -> Console:
    """Returns stdout, as wide as the terminal or ``COLUMNS`` says; a file is wide."""
    found = Console(markup=False, highlight=False)
    if not found.is_terminal and not os.environ.get("COLUMNS"):
        found.width = _FILE_WIDTH
    return found


def say(screen: Console, text: str, style: str = "") -> None:
    """Prints a sentence: broken between words on a terminal, on one line of its own in a file."""
    screen.print(text, style=style, soft_wrap=not screen.is_terminal)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    Attributes:
        name: Its heading.
        right: Whether it is set flush right.
        rank: Where a screen is too narrow, the column of the highest rank is left out first; one of rank 0 stays.
        wraps: Whether its cells may be broken between words.
        brief: Makes a shorter cell, for a narrow screen.
        bar: Whether its cells are bars, which take the room that is left.
    """

    name: str
    right: bool = False
    rank: int = 0
    wraps: bool = False
    brief: Callable[[str], str] | None = None
    bar: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row, a bar or nothing among them, and a style for all."""

    cells: Sequence[str | RenderableType]
    style: str = ""


@dataclass(frozen=True, slots=True)
class Stack:
    """A bar of several parts, each with a glyph of its own, so that it can be read without colour.

    Attributes:
        parts: Amount, glyph and style of each.
        whole: What the full width stands for; every part that is not nothing is shown, however small.
    """

    parts: Sequence[tuple[float, str, str]]
    whole: float

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """Yields the bar, as wide as there is room."""
        total = sum(amount for amount, *_ in self.parts)
        shown = [part for part in self.parts if part[0] > 0]
        length = min(options.max_width, max(len(shown), round(options.max_width * total / (self.whole or 1))))
        text, done, start = Text(no_wrap=True), 0.0, 0
        for left, (amount, glyph, style) in zip(range(len(shown) - 1, -1, -1), shown, strict=True):
            done += amount
            end = max(start + 1, min(round(length * done / total), length - left))
            text.append(glyph * (end - start), style)
            start = end
        yield text


def bar(value: float | None, most: float, style: str = "cyan") -> RenderableType:
    """Returns a bar from nothing to ``value`` on a scale that ends at ``most``."""
    if value is None or not value > 0 or not most > 0:
        return ""
    return Bar(most, 0, value, color=style)


def print_key(screen: Console, entries: Sequence[tuple[str, str, str]]) -> None:
    """Prints what the parts of a bar stand for: name, glyph and style of each."""
    screen.print(Columns([Text.assemble((glyph, style), f" {name}") for name, glyph, style in entries], padding=(0, 2)))


def print_table(screen: Console, columns: Sequence[Column], rows: Sequence[Row], *, title: str | None = None) -> None:
    """Prints a table that fits; columns for which the screen is too narrow are named below it."""
    shown, cells, widths = _fit(columns, [row.cells for row in rows], screen.width)
    table = Table(
        box=None, header_style="bold", pad_edge=False, padding=(0, _GAP, 0, 0), title=title, title_justify="left"
    )
    for place, width in zip(shown, widths, strict=True):
        column = columns[place]
        table.add_column(column.name, justify="right" if column.right else "left", width=width, overflow="fold")
    for row, texts in zip(rows, cells, strict=True):
        table.add_row(*(texts[place] for place in shown), style=row.style or None)
    screen.print(table)
    if left := [column.name for place, column in enumerate(columns) if place not in shown and column.name]:
        say(screen, f"a wider screen also shows: {', '.join(left)}", "dim")


def _fit(
    columns: Sequence[Column], rows: Sequence[Sequence[str | RenderableType]], width: int
) -> tuple[list[int], Sequence[Sequence[str | RenderableType]], list[int]]:
    """Returns the columns that fit, the cells as they are shown, and the width of each column."""
    shown = [place for place, column in enumerate(columns) if not column.bar or any(row[place] != "" for row in rows)]
    brief = False
    while True:
        least = {place: _least(columns[place], [row[place] for row in rows]) for place in shown}
        room = width - _GAP * (len(shown) - 1) - sum(least.values())
        last = max(shown, key=lambda place: columns[place].rank)
        if room >= 0 or (brief and not columns[last].rank):
            break
        if brief:
            shown.remove(last)
        else:
            brief, rows = True, [[_shortened(*pair) for pair in zip(columns, row, strict=True)] for row in rows]
    wanted = {place: _most(columns[place], [row[place] for row in rows]) for place in shown}
    widths = dict(least)
    # Room goes to whole names first, then to bars long enough to differ, to headings on one line, and to longer bars.
    for only, most in (("wraps", None), ("bar", _FAIR_BAR), ("", None), ("bar", _MOST_BAR)):
        for place in shown:
            if not only or getattr(columns[place], only):
                limit = wanted[place] if most is None else most
                more = min(room, limit - widths[place]) if room > 0 else 0
                if more > 0:
                    widths[place] += more
                    room -= more
    return shown, rows, [widths[place] for place in shown]


def _shortened(column: Column, cell: str | RenderableType) -> str | RenderableType:
    return column.brief(cell) if column.brief and isinstance(cell, str) else cell


def _least(column: Column, cells: Sequence[str | RenderableType]) -> int:
    if column.bar:
        return _LEAST_BAR
    texts = [cell for cell in cells if isinstance(cell, str)]
    parts = [word for text in texts for word in text.split()] if column.wraps else texts
    return max(map(cell_len, [*column.name.split(), *parts]), default=1)


def _most(column: Column, cells: Sequence[str | RenderableType]) -> int:
    if column.bar:
        return _FAIR_BAR
    return max(map(cell_len, [column.name, *(cell for cell in cells if isinstance(cell, str))]))


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def by_layer(items: Iterable[_Item], place: Callable[[_Item], tuple[str, str]]) -> list[tuple[str, list[_Item]]]:
    """Returns items by decoder layer and kind, those outside of layers first, with what to call the layer.

    Args:
        items: What is shown.
        place: Returns the name of a tensor or module, and the kind.
    """
    groups: dict[tuple[int, str], list[_Item]] = defaultdict(list)
    for item in items:
        name, kind = place(item)
        layer = split_layer(name)[0]
        groups[-1 if layer is None else layer, kind].append(item)
    return [(NO_LAYER if layer < 0 else str(layer), groups[layer, kind]) for layer, kind in sorted(groups)]
