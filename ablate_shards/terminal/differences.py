"""What lies between two checkpoints, as tables and lines."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

    from ablate_shards.surgery.diff.differences import Diff, TensorDiff

__all__ = ["MOST_ROWS", "print_differences"]

MOST_ROWS = 60
_MOST_LINES = 8


def print_differences(found: "Diff", most: int | None) -> None:
    """Prints the tensors that differ, ``most`` of them unless None, and what lies between the checkpoints in words."""
    from ablate_shards.terminal.tables import output, say

    screen = output()
    _print_changes(screen, [tensor for tensor in found.tensors if tensor.changed or tensor.nonfinite], most)
    lines = None if most is None else _MOST_LINES
    for title, names in (
        ("only in A", found.lost),
        ("only in B", found.added),
        ("renamed", [f"{item.name} → {item.new_name}" for item in found.tensors if item.name != item.new_name]),
        ("of another shape", [_shapes(tensor) for tensor in found.tensors if tensor.shape != tensor.new_shape]),
        ("joined", [f"{item.whole} = {', '.join(item.parts)}" for item in found.fused if not item.split]),
        ("split", [f"{item.whole} = {', '.join(item.parts)}" for item in found.fused if item.split]),
        ("metadata", found.metadata),
        ("files", found.files),
    ):
        _print_list(screen, title, names, lines)
    tensors = found.equal + len(found.tensors)
    say(screen, f"{tensors} tensor{'' if tensors == 1 else 's'} in both, {found.equal} of them equal to the byte")
    for line in found.verdict:
        say(screen, line, "bold")


def _print_changes(screen: "Console", tensors: Sequence["TensorDiff"], most: int | None) -> None:
    """Prints a line per layer, component and kind of change: the biggest changes, in the order of the layers."""
    from ablate_shards.terminal.tables import Column, Row, bar, print_table, say

    groups: dict[tuple[str, str, str], list[TensorDiff]] = defaultdict(list)
    for tensor in tensors:
        groups[tensor.place, tensor.component, tensor.kind].append(tensor)
    if not groups:
        return
    ranked = sorted(groups, key=lambda group: -max(map(_size, groups[group])))
    shown = sorted(ranked[:most], key=lambda group: _in_order(groups[group][0]))
    largest = max(map(_size, tensors))
    aligned = any(tensor.alignment for tensor in tensors)
    described = [column for column in _COLUMNS if aligned or not column.aligned]
    columns = [Column(each.name, right=each.right, rank=each.rank, wraps=not each.right) for each in described]
    columns.insert(_BAR_PLACE, Column("", rank=1, bar=True))
    rows = []
    for group in (groups[place] for place in shown):
        cells = [each.cell(group) for each in described]
        rows.append(Row([*cells[:_BAR_PLACE], bar(_size(_loudest(group)), largest), *cells[_BAR_PLACE:]]))
    print_table(screen, columns, rows)
    if most is not None and len(ranked) > most:
        say(screen, f"and {len(ranked) - most} smaller ones; --all shows them")
    say(
        screen,
        "relative size: norm of the difference, and the bar; energy: share of the first singular value, scales undone; "
        "coefficient: of the ablation that explains it",
        "dim",
    )


def _in_order(tensor: "TensorDiff") -> tuple[bool, int, str, str, str]:
    return (tensor.layer is None, tensor.layer or 0, tensor.place, tensor.component, tensor.kind)


class _DiffColumn(NamedTuple):
    """A column of the table, what it says of some tensors, and its rank where the screen is too narrow for all.

    An aligned one speaks of given directions.
    """

    name: str
    cell: Callable[[Sequence["TensorDiff"]], str]
    rank: int = 0
    right: bool = True
    aligned: bool = False


def _size(tensor: "TensorDiff") -> float:
    return tensor.relative if tensor.relative is not None else float(tensor.changed > 0)


def _loudest(group: Sequence["TensorDiff"]) -> "TensorDiff":
    return max(group, key=_size)


def _relative(group: Sequence["TensorDiff"]) -> str:
    relative = _loudest(group).relative
    return "–" if relative is None else f"{relative:.2%}"


def _changed(group: Sequence["TensorDiff"]) -> str:
    return f"{sum(tensor.changed for tensor in group) / max(1, sum(tensor.elements for tensor in group)):.0%}"


def _energy(group: Sequence["TensorDiff"]) -> str:
    shares = _loudest(group).shares
    return f"{shares[0]:.0%}" if shares else "–"


def _coefficient(group: Sequence["TensorDiff"]) -> str:
    found = [tensor.ablation.coefficient for tensor in group if tensor.ablation]
    return f"{max(found, key=abs):.2f}" if found else "–"


def _rank(group: Sequence["TensorDiff"]) -> str:
    tensor = _loudest(group)
    if tensor.rank is None:
        return "–"
    if tensor.form is None:
        return f">{tensor.rank}"
    return f"{tensor.rank}" if tensor.form == "plain" else f"{tensor.rank} + {tensor.form}"


def _best_direction(group: Sequence["TensorDiff"]) -> str:
    alignment = _loudest(group).alignment
    return "–" if alignment is None else f"{alignment.best_cosine:.2f} layer {alignment.best_layer}"


def _own_direction(group: Sequence["TensorDiff"]) -> str:
    alignment = _loudest(group).alignment
    return "–" if alignment is None or alignment.cosine is None else f"{alignment.cosine:.2f}"


def _shapes(tensor: "TensorDiff") -> str:
    return f"{tensor.name}: {list(tensor.shape)} → {list(tensor.new_shape)} ({tensor.kind})"


def _modules(group: Sequence["TensorDiff"]) -> str:
    """Returns the modules of some tensors, with how many there are of each."""
    counts = Counter(_module(tensor.name) for tensor in group)
    return ", ".join(module if count == 1 else f"{count} x {module}" for module, count in counts.items())


def _module(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    return ".".join(parts[-2:]) if parts[-1] == "bias" else parts[-1]


def _print_list(screen: "Console", title: str, lines: Sequence[str], most: int | None) -> None:
    for line in lines[:most]:
        screen.print(f"{title}: {line}", soft_wrap=True)
    if most is not None and len(lines) > most:
        screen.print(f"{title}: and {len(lines) - most} more; --all shows them", soft_wrap=True)


#: How many columns stand before the bar.
_BAR_PLACE = 3

_COLUMNS = (
    _DiffColumn("layer", lambda group: group[0].place),
    _DiffColumn("component", lambda group: group[0].component, right=False),
    _DiffColumn("relative size", _relative),
    _DiffColumn("change", lambda group: group[0].kind, 2, right=False),
    _DiffColumn("tensors", _modules, 3, right=False),
    _DiffColumn("rank", _rank, 4),
    _DiffColumn("closest direction", _best_direction, 5, aligned=True),
    _DiffColumn("coefficient", _coefficient, 6),
    _DiffColumn("its own", _own_direction, 7, aligned=True),
    _DiffColumn("energy", _energy, 8),
    _DiffColumn("values", _changed, 9),
    _DiffColumn("largest change", lambda group: f"{max(tensor.largest for tensor in group):.2g}", 10),
    _DiffColumn("norms kept", lambda group: ", ".join(_loudest(group).kept) or "–", 11, right=False),
)
