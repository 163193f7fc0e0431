"""What a person sees of an adapter that was made of an edit."""

import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate_shards.names import ADAPTER_RECEIPT_NAME
from ablate_shards.surgery.anatomy.architecture import split_layer
from ablate_shards.terminal.tables import Column, Row, by_layer, counted, output, print_table, say

if TYPE_CHECKING:
    from ablate_shards.surgery.extract.plan import AdapterPlan, Module
    from ablate_shards.surgery.extract.receipt import ModuleResult
    from ablate_shards.surgery.merge.adapter import Adapter
    from ablate_shards.surgery.narrow.narrowing import Narrowing
    from ablate_shards.surgery.verify.adapter_proof import AdapterVerification

__all__ = [
    "adapter_inspection",
    "print_adapter",
    "print_adapter_inspection",
    "print_adapter_plan",
    "print_adapter_verification",
    "print_narrowing",
]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

_PLACE = (Column("layer", right=True), Column("modules", wraps=True))
_MEASURED = (
    Column("rank", right=True),
    Column("lacks", right=True),
    Column("component before", right=True, rank=1),
    Column("edit leaves", right=True, rank=2),
    Column("adapter leaves", right=True, rank=1),
    Column("difference", right=True),
)


def print_adapter_plan(plan: "AdapterPlan") -> None:
    """Prints what an adapter would change, a line per layer."""
    screen = output()
    rank = "as it takes" if plan.rank is None else str(plan.rank)
    rows = [
        Row((layer, _names(modules), modules[0].form, rank)) for layer, modules in by_layer(plan.modules, _place_of)
    ]
    print_table(screen, (*_PLACE, Column("form", rank=2), Column("rank", right=True, rank=1)), rows)
    say(screen, f"an adapter would change {counted(len(plan.modules), 'module')}")


def print_adapter(
    plan: "AdapterPlan",
    results: Mapping[str, "ModuleResult"],
    out: Path | str,
    source: str,
    url: str | None = None,
    *,
    directed: bool = True,
) -> None:
    """Prints what was measured of the modules with their updates.

    Args:
        plan: What the adapter holds.
        results: What was measured.
        out: What the user named.
        source: What it is an adapter of.
        url: The commit, where OUT is a repository.
        directed: Whether it was made of an ablation, so that there are directions.
    """
    screen = output()
    rows = []
    for layer, modules in by_layer(plan.modules, _place_of):
        measured = [results[module.path] for module in modules]
        ranks = sorted({result.rank for result in measured})
        cells = [layer, _names(modules), ", ".join(map(str, ranks)), f"{max(each.error for each in measured):.2%}"]
        if directed:
            for name in ("before", "edited", "after", "left"):
                cells.append(f"{max(getattr(each, name) for each in measured):.3%}")
        rows.append(Row(cells))
    print_table(screen, (*_PLACE, *(_MEASURED if directed else _MEASURED[:2])), rows)
    told = "lacks: norm of what the adapter lacks of the change, relative to it"
    if directed:
        told += (
            "; component: share of a weight's norm along the direction, before, after the edit, and with the adapter "
            "added in the weight's own dtype; difference: between the last two, relative to what there was before"
        )
    say(screen, told, "dim")
    worst = max((result.error for result in results.values()), default=0.0)
    say(screen, f"an adapter of {counted(len(plan.modules), 'module')} lacks at most {worst:.2%} of a module's change")
    if url is not None:
        screen.print(f"published at {url}, with its receipt in {ADAPTER_RECEIPT_NAME}", soft_wrap=True)
        return
    screen.print(f"written to {out}, receipt in {out}/{ADAPTER_RECEIPT_NAME}", soft_wrap=True)
    command = shlex.join(["ablate-shards", "verify", source, str(out)])
    screen.print(f"check it with: {command}", soft_wrap=True)


def adapter_inspection(adapter: "Adapter") -> dict[str, Any]:
    """Returns what ``inspect`` shows of an adapter, as JSON types."""
    modules = []
    for update in adapter.updates:
        rank, scale = adapter.scaling(update.module)
        form = "linear" if update.kind == "transposed" else update.kind
        kind = "DoRA" if update.magnitude else update.taken or form
        shapes = [list(adapter.shape(name)) for name in (update.down, update.up)]
        modules.append({"module": update.module, "kind": kind, "rank": rank, "scale": scale, "shapes": shapes})
    return {
        "modules": modules,
        "replaced": sorted(adapter.replaced),
        "tokens": {rows.module: list(rows.tokens) for rows in adapter.token_rows},
        "trained_on": adapter.trained_on[0],
        "extracted": adapter.extracted,
        "notes": list(adapter.notes),
    }


def print_adapter_inspection(adapter: "Adapter") -> None:
    """Prints what an adapter adds to, a line per layer, and what it replaces."""
    screen, found = output(), adapter_inspection(adapter)
    rows = []
    for layer, modules in by_layer(found["modules"], lambda each: (each["module"], each["kind"])):
        ranks, scales = ({each[key] for each in modules} for key in ("rank", "scale"))
        names = Counter(_NUMBER.sub("*", split_layer(each["module"])[1]) for each in modules)
        shown = ", ".join(name if count == 1 else f"{count} x {name}" for name, count in names.items())
        cells = (
            layer,
            shown,
            modules[0]["kind"],
            *(", ".join(f"{each:g}" for each in sorted(of)) for of in (ranks, scales)),
        )
        rows.append(Row(cells))
    print_table(screen, (*_PLACE, Column("kind"), Column("rank", right=True), Column("scale", right=True)), rows)
    if found["replaced"]:
        say(screen, f"replaced as a whole: {', '.join(found['replaced'])}")
    for module, tokens in found["tokens"].items():
        say(screen, f"rows of {module} replaced: {', '.join(map(str, tokens))}")
    for note in found["notes"]:
        say(screen, note)
    if adapter.extracted:
        command = shlex.join(["ablate-shards", "verify", "SOURCE", str(adapter.path)])
        say(screen, f"made by ablate-shards, with its figures in {ADAPTER_RECEIPT_NAME}; check it with: {command}")
    base = f" of {found['trained_on']}" if found["trained_on"] else ""
    say(
        screen,
        f"an adapter{base}: {counted(len(adapter.updates), 'update')}, {counted(len(adapter.tensors), 'tensor')}",
    )


def print_adapter_verification(verification: "AdapterVerification", out: Path) -> None:
    """Prints every difference, or that there is none."""
    screen = output()
    for difference in verification.differences:
        say(screen, f"{difference.where}: {difference.what}")
    if verification.differences:
        say(screen, f"{out} is not what its receipt says: {counted(len(verification.differences), 'difference')}")
        return
    modules = counted(verification.modules, "module")
    how = "measured again with the source" if verification.measured else "with the digests it records"
    say(screen, f"{out} is what its receipt says: {modules} {how}")


def _place_of(module: "Module") -> tuple[str, str]:
    return module.path, module.form


def _names(modules: "Sequence[Module]") -> str:
    return ", ".join(re.sub(r"\.weight$", "", split_layer(module.path)[1]) for module in modules)


def print_narrowing(done: "Narrowing", model: Path) -> None:
    """Prints what a narrowed edit does to the texts that it was made from, a line per module, and what to do next."""
    screen = output()
    columns = (*_PLACE, Column("coefficient", right=True), Column("contested", right=True), Column("kept", right=True))
    rows = [
        Row((layer, split_layer(each.path)[1], f"{each.coefficient:g}", f"{each.contested:.0%}", f"{each.kept:.0%}"))
        for layer, modules in by_layer(done.modules, lambda module: (module.path, ""))
        for each in modules
    ]
    print_table(screen, columns, rows)
    say(
        screen,
        "contested, kept: of what the whole edit changes, how much this one does where contested prompts are answered "
        f"({counted(done.contested, 'token')}) and those to be kept ({counted(done.kept, 'token')}); it was made from "
        "these, so ask other questions with `evaluate`",
        "dim",
    )
    say(screen, f"{counted(len(done.modules), 'module')} of rank {done.rank}, written to {done.adapter}")
    merge = shlex.join(["ablate-shards", "merge", str(model), str(done.adapter), "OUT"])
    say(screen, f"write it into the weights with: {merge} (--scale 2 goes twice as far)")
