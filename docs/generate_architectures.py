"""Writes the tables of ``docs/architectures.md`` from those of the code: ``python docs/generate_architectures.py``."""

from collections.abc import Iterable
from pathlib import Path

from ablate_shards.surgery.anatomy.families import FAMILIES, Layout, Module
from ablate_shards.surgery.anatomy.gains import factors_of, is_centred
from ablate_shards.surgery.anatomy.unsupported import REASONS

TARGET = Path(__file__).with_name("architectures.md")
_BEGIN, _END = "<!-- generated: {} -->", "<!-- end: {} -->"


def families_table() -> str:
    """Returns a row for each family, one that stores what an earlier one stores as a reference to it."""
    first: dict[Layout, str] = {}
    lines = [
        "| Family | `model_type` | attention | mlp | embedding | post-norm gain |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for family in FAMILIES:
        kinds = ", ".join(f"`{kind}`" for kind in family.model_types)
        for layout, name in zip(family.layouts, (family.name, f"{family.name}, other names"), strict=False):
            bare = Layout(layout.attention, layout.mlp, layout.embedding)
            cells = [f"as {first[bare]}"] * 3 + [""] if bare in first else _cells(layout)
            first.setdefault(bare, name)
            lines.append(f"| {name} | {kinds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(layout: Layout) -> list[str]:
    gains = dict.fromkeys(module.gain for module in (*layout.attention, *layout.mlp, *layout.embedding) if module.gain)
    refused = [
        f"with `{key}`{'' if value is True else f' = {str(value).lower()}'}: refused, {why}"
        for key, value, why in layout.refused
    ]
    parts = [_modules(layout.attention), _modules(layout.mlp), _modules(layout.embedding, embed=True)]
    return [*parts, "; ".join([", ".join(map(_gain, gains)), *refused]).strip("; ")]


def _modules(modules: Iterable[Module], *, embed: bool = False) -> str:
    return ", ".join(_module(module, embeds=embed) for module in modules)


def _module(module: Module, *, embeds: bool) -> str:
    axis = {"either": " *in* or not", "in": "" if embeds else " *in*"}.get(module.axis, "")
    unless = f" (where there is no `{module.unless}`)" if module.unless else ""
    return f"{'fused ' if module.fused else ''}`{module.path.replace('#', 'N')}`{axis}{unless}"


def _gain(gain: str) -> str:
    offset, name = ("1 + ", gain[4:]) if gain.startswith("1 + ") else ("", gain)
    return " or ".join("none" if one == "none" else offset + _product(one) for one in name.split(" | "))


def _product(gain: str) -> str:
    return ("centred " if is_centred(gain) else "") + " times ".join(f"`{name}`" for name in factors_of(gain))


def reasons_table() -> str:
    """Returns a row for each reason why an architecture is not in the table."""
    lines = ["| why | `model_type` |", "| --- | --- |"]
    lines += [f"| {why} | {', '.join(f'`{kind}`' for kind in kinds)} |" for why, kinds in REASONS]
    return "\n".join(lines)


def page() -> str:
    """Returns the page with its tables as the code has them."""
    text = TARGET.read_text(encoding="utf-8")
    for name, table in (("families", families_table()), ("reasons", reasons_table())):
        begin, end = _BEGIN.format(name), _END.format(name)
        before, _, rest = text.partition(begin)
        _, _, after = rest.partition(end)
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
