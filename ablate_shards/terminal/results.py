"""What a person sees of a result: tables on stdout."""

import dataclasses
import re
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from ablate_shards.errors import DirectionsError
from ablate_shards.names import DEQUANTISATION_RECEIPT_NAME, MERGE_RECEIPT_NAME, RECEIPT_NAME
from ablate_shards.surgery.anatomy.absent import Absent
from ablate_shards.surgery.anatomy.architecture import Anatomy, Writer, split_layer
from ablate_shards.surgery.anatomy.gains import with_names
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.directions.directions import Directions, score_row, score_table
from ablate_shards.surgery.machine.sizes import size_text
from ablate_shards.surgery.plan.edits import Edit, TensorEdit
from ablate_shards.surgery.plan.plan import Plan
from ablate_shards.surgery.plan.recipe import layer_ranges
from ablate_shards.terminal.tables import (
    NO_LAYER,
    Column,
    Row,
    Stack,
    bar,
    by_layer,
    counted,
    output,
    print_key,
    print_table,
    say,
)

if TYPE_CHECKING:
    # Only for types: most commands need none of these rooms.
    from ablate_shards.surgery.dequantise.dequantisation import Dequantisation
    from ablate_shards.surgery.directions.compare import DirectionsComparison
    from ablate_shards.surgery.edit.ablation_editor import TensorResult
    from ablate_shards.surgery.hub.push import PushPlan
    from ablate_shards.surgery.merge.editor import MergeResult
    from ablate_shards.surgery.merge.plan import MergeEdit, MergePlan
    from ablate_shards.surgery.verify.proof import Verification
    from ablate_shards.surgery.verify.run_proof import RunProof

__all__ = [
    "inspection",
    "print_comparison",
    "print_dequantisation",
    "print_dequantisation_plan",
    "print_inspection",
    "print_merge",
    "print_merge_plan",
    "print_plan",
    "print_push",
    "print_results",
    "print_run",
    "print_scores",
    "print_verification",
    "scores",
]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MOST_NAMES = 12
_WIDE = 80
#: Glyph and style of the bytes of each part of a layer.
_PARTS = {"attention": ("█", "cyan"), "mlp": ("▓", "blue")}
#: The columns of scores in their order, and which are left out first where a screen is narrow.
_SCORES = (("signal_to_noise", 0), ("auc", 1), ("purity", 2), ("cosine", 3), ("split_half", 4), ("contrast", 5))
#: The norm that is left of a direction, where others were taken out.
_LEFT = ("left", 1)
#: The columns of a comparison, as above.
_COMPARED = (("auc", 0), ("signal_to_noise", 1), ("split_half", 2), ("purity", 3))


def print_plan(checkpoint: Checkpoint, plan: Plan, dequantisation: "Dequantisation | None" = None) -> None:
    """Prints what a run would edit, a line per layer and component, and what it would leave."""
    screen = output()
    columns = (
        _LAYER,
        Column("component"),
        _TENSORS,
        Column("axis", rank=4),
        Column("source layer", right=True, rank=1),
        Column("coefficient", right=True, rank=2),
        Column("preserve", rank=3),
        Column("bytes", right=True, rank=5),
    )
    rows = [
        Row(
            (
                _layer_name(edits[0]),
                edits[0].component,
                _short_names([edit.name for edit in edits]),
                "out" if edits[0].axis == -2 else "in",
                str(edits[0].basis.source_layer),
                f"{edits[0].coefficient:g}",
                edits[0].preserve,
                size_text(sum(edit.end - edit.start for edit in edits)),
            )
        )
        for edits in _by_layer(plan.edits)
    ]
    print_table(screen, columns, rows)
    say(screen, _share(checkpoint, plan, "would be edited"))
    for form, count in Counter(edit.scales.format for edit in plan.edits if edit.scales).items():
        say(screen, f"{counted(count, 'tensor')} in {form}: codes would be edited, scales would stay")
    if any(edit.rounding == "nearest" for edit in plan.edits):
        say(screen, "codes would be the nearest ones, which undo some of the edit or all")
    if dequantisation is not None:
        _print_dequantised(screen, dequantisation, planned=True)
    _print_left_out(screen, plan, checkpoint)


def print_results(
    checkpoint: Checkpoint,
    plan: Plan,
    results: Mapping[str, "TensorResult"],
    out: Path | str,
    url: str | None,
    dequantisation: "Dequantisation | None" = None,
) -> None:
    """Prints what was measured of the edited tensors, as re-read from the written files.

    Args:
        checkpoint: The source.
        plan: What was done.
        results: What was measured.
        out: What the user named.
        url: The commit, where that is a repository.
        dequantisation: What was dequantised before the edit.
    """
    screen = output()
    coded = any(edit.scales is not None for edit in plan.edits)
    columns = (
        _LAYER,
        Column("component"),
        _TENSORS,
        Column("component before", right=True),
        Column("after", right=True),
        *(_ROUNDING if coded else ()),
        Column("norm drift", right=True, rank=1),
        Column("degenerate", right=True, rank=2),
    )
    rows = []
    for edits in _by_layer(plan.edits):
        measured = [results[edit.name] for edit in edits]
        drifts = [result.norm_drift for result in measured if result.norm_drift is not None]
        cells = (
            _layer_name(edits[0]),
            edits[0].component,
            _short_names([edit.name for edit in edits]),
            f"{max(result.before for result in measured):.3%}",
            f"{max(result.after for result in measured):.3%}",
            *(_rounding(measured) if coded else ()),
            f"{max(drifts):.3%}" if drifts else "–",
            str(sum(result.degenerate for result in measured)),
        )
        rows.append(Row(cells))
    print_table(screen, columns, rows)
    say(
        screen,
        "component: share of a weight's norm along the direction; norm drift: largest change of a kept norm; "
        "degenerate: vectors too parallel to the direction to keep their norm",
        "dim",
    )
    if coded:
        say(
            screen,
            "by nearest: what the codes nearest to the edited weight would have left; rounding: difference between the "
            "codes and that weight, relative to its norm",
            "dim",
        )
    _print_undone(screen, results.values())
    if dequantisation is not None:
        _print_dequantised(screen, dequantisation, planned=False)
    besides = "all else" if dequantisation is not None else "every other byte"
    say(screen, f"{_share(checkpoint, plan, 'edited')}; {besides} is the source's")
    _print_absent(screen, plan.absent)
    if plan.skipped:
        say(screen, f"{counted(len(plan.skipped), 'other writer')} left as they are; the receipt says why")
    _print_where(screen, checkpoint, out, url, RECEIPT_NAME)


def _print_undone(screen: Console, results: "Iterable[TensorResult]") -> None:
    """Says what the nearest codes undid, where these were chosen."""
    from ablate_shards.surgery.edit.ablation_editor import CodedResult

    undone = [each.undone for each in results if isinstance(each, CodedResult) and each.undone is not None]
    if undone:
        say(screen, f"the nearest codes undo {min(undone):.1%} to {max(undone):.1%} of the edit of a weight")


def _rounding(results: "Sequence[TensorResult]") -> tuple[str, str]:
    """Returns what the nearest codes would have left at most, and the largest error of rounding, where there is one."""
    from ablate_shards.surgery.edit.ablation_editor import CodedResult

    coded = [result for result in results if isinstance(result, CodedResult)]
    if not coded:
        return "–", "–"
    return f"{max(result.nearest for result in coded):.3%}", f"{max(result.error for result in coded):.3%}"


def _print_where(
    screen: Console, checkpoint: Checkpoint, out: Path | str, url: str | None, receipt: str, more: Sequence[str] = ()
) -> None:
    """Says where the result is, and how to check it."""
    place = (
        f"published at {url}, with its receipt in {receipt}" if url else f"written to {out}, receipt in {out}/{receipt}"
    )
    _print_line(screen, place)
    source = "@".join(part for part in checkpoint.origin or (checkpoint.name,) if part)
    command = shlex.join(["ablate-shards", "verify", source, str(out), *more])
    _print_line(screen, f"check it with: {command}")


def print_dequantisation_plan(checkpoint: Checkpoint, dequantisation: "Dequantisation") -> None:
    """Prints what a dequantisation would change, and how large the result would be."""
    screen = output()
    _print_dequantised(screen, dequantisation, planned=True)
    _print_sizes(screen, checkpoint, dequantisation)
    for name, reason in checkpoint.left_out:
        say(screen, f"not carried over: {name} ({reason})")


def print_dequantisation(
    checkpoint: Checkpoint, dequantisation: "Dequantisation", out: Path | str, url: str | None
) -> None:
    """Prints what a dequantisation changed; see :func:`print_results`."""
    screen = output()
    _print_dequantised(screen, dequantisation, planned=False)
    _print_sizes(screen, checkpoint, dequantisation)
    say(screen, "every other byte is the source's")
    _print_where(screen, checkpoint, out, url, DEQUANTISATION_RECEIPT_NAME)


def _print_dequantised(screen: Console, dequantisation: "Dequantisation", *, planned: bool) -> None:
    """Prints how many weights of each format are dequantised, and what of the configuration changes with them."""
    for form, count in Counter(record.stored_as for record in dequantisation.records()).items():
        say(screen, f"{counted(count, 'weight')} in {form} {'would be ' if planned else ''}written in bfloat16")
    changes = dequantisation.amendments
    if not dequantisation.whole:
        places = ", ".join([*changes.config, *changes.files])
        say(screen, f"the rest stays quantised; {places} {'would say' if planned else 'says'} what is not")
        return
    gone = ", ".join([*changes.unset, *changes.removed])
    gone = f": {gone} {'would go' if planned else 'went'}" if gone else ""
    say(screen, f"nothing {'would be' if planned else 'is'} quantised any more{gone}")


def _print_sizes(screen: Console, checkpoint: Checkpoint, dequantisation: "Dequantisation") -> None:
    before, after = (
        sum(shard.size for shard in each.shards) for each in (checkpoint, dequantisation.applied(checkpoint))
    )
    say(screen, f"{size_text(before)} of shards before, {size_text(after)} after")


def print_merge_plan(checkpoint: Checkpoint, plan: "MergePlan", dequantisation: "Dequantisation | None" = None) -> None:
    """Prints what a merge would change, a line per layer and kind of change."""
    screen = output()
    rows = [
        Row((layer, edits[0].kind, *_merge_cells(edits), size_text(sum(edit.end - edit.start for edit in edits))))
        for layer, edits in by_layer(plan.edits, lambda edit: (edit.name, edit.kind))
    ]
    print_table(screen, (*_MERGED, Column("bytes", right=True, rank=3)), rows)
    if dequantisation is not None:
        _print_dequantised(screen, dequantisation, planned=True)
    say(screen, f"{_share_of(plan.amended(checkpoint), plan.edits)} would be changed")
    for name, reason in checkpoint.left_out:
        say(screen, f"not carried over: {name} ({reason})")


def print_merge(
    checkpoint: Checkpoint,
    plan: "MergePlan",
    results: Mapping[str, "MergeResult"],
    adapter: Path,
    out: Path | str,
    url: str | None,
    dequantisation: "Dequantisation | None" = None,
) -> None:
    """Prints what a merge changed, and by how much; see :func:`print_results`."""
    screen = output()
    rows = []
    for layer, edits in by_layer(plan.edits, lambda edit: (edit.name, edit.kind)):
        changes = [results[edit.name].change for edit in edits]
        known = [change for change in changes if change is not None]
        rows.append(Row((layer, edits[0].kind, *_merge_cells(edits), f"{max(known):.3%}" if known else "–")))
    print_table(screen, (*_MERGED, Column("largest change", right=True)), rows)
    say(screen, "change: norm of what was added, relative to the norm of the weight", "dim")
    if not any(result.change is None or result.change for result in results.values()):
        why = (
            "--scale is 0" if not plan.scale else "each update is zero, as of one that was saved before it was trained"
        )
        say(screen, f"{adapter} adds nothing: {why}")
    amended = ", ".join(plan.amendments.names())
    if dequantisation is not None:
        _print_dequantised(screen, dequantisation, planned=False)
    kept = "every other byte" if dequantisation is None else "all else"
    kept = f"added or changed besides: {amended}; all else" if amended else kept
    say(screen, f"{_share_of(plan.amended(checkpoint), plan.edits)} changed; {kept} is the source's")
    _print_where(screen, checkpoint, out, url, MERGE_RECEIPT_NAME, ("--adapter", str(adapter)))


def print_inspection(checkpoint: Checkpoint, anatomy: Anatomy | None) -> None:
    """Prints layers and the writers found in each, what is left out and why, sizes and dtypes."""
    screen = output()
    if anatomy is not None:
        _print_writers(screen, checkpoint, anatomy)
    summary = inspection(checkpoint, anatomy)
    dtypes = ", ".join(f"{count} {dtype}" for dtype, count in summary["dtypes"].items())
    say(
        screen,
        f"{summary['family'] or 'unknown architecture'}: {counted(len(checkpoint.shards), 'shard')}, "
        f"{counted(len(checkpoint.tensors), 'tensor')} ({dtypes}), {size_text(summary['bytes'])}",
    )
    for name, reason in checkpoint.left_out:
        say(screen, f"not carried over: {name} ({reason})")


def _print_writers(screen: Console, checkpoint: Checkpoint, anatomy: Anatomy) -> None:
    """Prints the writers of each layer with a bar of their bytes, and what share of the checkpoint they are."""
    cells: dict[tuple[str, str], list[str]] = defaultdict(list)
    sizes: Counter[tuple[str, str]] = Counter()
    for writer in anatomy.writers:
        place = _layer_name(writer), writer.component
        cells[place].append(writer.name)
        tensor = checkpoint.tensors[writer.name]
        sizes[place] += tensor.end - tensor.start
    layers = [*map(str, anatomy.layers), *(row for row, component in cells if component != "embedding")]
    most = max((sum(sizes[layer, part] for part in _PARTS) for layer in layers), default=0)
    rows = [
        Row(
            (
                layer,
                *(_short_names(cells[layer, part]) or "none" for part in _PARTS),
                size_text(sum(sizes[layer, part] for part in _PARTS)),
                Stack([(sizes[layer, part], *look) for part, look in _PARTS.items()], most),
            )
        )
        for layer in dict.fromkeys(layers)
    ]
    columns = (
        _LAYER,
        *(Column(part, wraps=True, brief=_leaves_of) for part in _PARTS),
        Column("bytes", right=True, rank=1),
        Column("", rank=2, bar=True),
    )
    print_table(screen, columns, rows)
    whole = sum(tensor.end - tensor.start for tensor in checkpoint.tensors.values())
    shares = {
        part: sum(size for (_, component), size in sizes.items() if component == part) / whole if whole else 0.0
        for part in (*_PARTS, "embedding")
    }
    shares["rest"] = max(0.0, 1 - sum(shares.values()))
    looks = {**_PARTS, "embedding": ("▒", "green"), "rest": ("░", "bright_black")}
    screen.print(Stack([(share, *looks[part]) for part, share in shares.items()], 1.0), width=min(screen.width, _WIDE))
    print_key(screen, [(f"{part} {share:.1%}", *looks[part]) for part, share in shares.items()])
    if gains := sorted({with_names(writer.gain, _short_name) for writer in anatomy.writers if writer.gain}):
        say(screen, f"post-norm gains taken into account: {', '.join(gains)}")
    forms = Counter(form for writer in anatomy.writers if (form := _form_of(writer, checkpoint)))
    for form, count in forms.items():
        say(screen, f"{counted(count, 'writer')} in {form}: codes are edited, scales stay")
    tied = " (tied to the output head)" if anatomy.tied else ""
    say(screen, f"embedding: {_short_names(cells[NO_LAYER, 'embedding']) or 'none'}{tied}")
    for note in anatomy.notes:
        say(screen, note)
    _print_absent(screen, anatomy.absent)
    for part in anatomy.missing:
        say(screen, f"layer {part.layer}: its {part.component} writer is missing: {part.reason}")
    _print_reasons(screen, ((item.name, item.reason) for item in anatomy.left_out))


def _form_of(writer: Writer, checkpoint: Checkpoint) -> str | None:
    """Returns how a writer's codes are stored, None where it holds plain numbers."""
    return writer.scales.form(checkpoint.tensors[writer.name].shape) if writer.scales else None


def inspection(checkpoint: Checkpoint, anatomy: Anatomy | None) -> dict[str, Any]:
    """Returns what ``inspect`` shows, as JSON types."""

    def describe(tensor: TensorInfo) -> dict[str, Any]:
        return {"dtype": tensor.dtype, "shape": list(tensor.shape), "bytes": tensor.end - tensor.start}

    found = anatomy.writers if anatomy else ()
    left_out = anatomy.left_out if anatomy else ()
    return {
        "family": anatomy.family if anatomy else None,
        "hidden_size": anatomy.hidden_size if anatomy else None,
        "layers": list(anatomy.layers) if anatomy else [],
        "tied": anatomy.tied if anatomy else None,
        "notes": list(anatomy.notes) if anatomy else [],
        "shards": [{"name": shard.name, "bytes": shard.size} for shard in checkpoint.shards],
        "tensors": len(checkpoint.tensors),
        "bytes": sum(shard.size for shard in checkpoint.shards),
        "dtypes": dict(Counter(tensor.dtype for tensor in checkpoint.tensors.values()).most_common()),
        "writers": [
            {
                "name": writer.name,
                "layer": writer.layer,
                "component": writer.component,
                "axis": writer.axis,
                "kind": writer.kind,
                "gain": writer.gain,
                "mtp": writer.mtp,
                **describe(checkpoint.tensors[writer.name]),
                **({"stored_as": _form_of(writer, checkpoint), "scales": writer.scales.name} if writer.scales else {}),
            }
            for writer in found
        ],
        "left_out": [{"name": item.name, "reason": item.reason} for item in left_out],
        "absent": [dataclasses.asdict(part) for part in (anatomy.absent if anatomy else ())],
        "missing": [dataclasses.asdict(part) for part in (anatomy.missing if anatomy else ())],
        "sidecars": list(checkpoint.sidecars),
        "files_left_out": [{"name": name, "reason": reason} for name, reason in checkpoint.left_out],
    }


def print_scores(directions: Directions, file: Path) -> None:
    """Prints the score table of directions that were just written."""
    screen = output()
    best = _best_layer(directions)
    scored = score_table(directions)
    columns = (*_SCORES, *([_LEFT] if any(_LEFT[0] in row for row in scored) else []))
    most = max((row["signal_to_noise"] or 0.0 for row in scored), default=0.0)
    rows = [
        Row(
            (
                str(row["layer"]),
                *(_score(row[column]) for column, _ in _SCORES[:1]),
                bar(row["signal_to_noise"], most, "green" if row["layer"] == best else "cyan"),
                *(_score(row[column]) for column, _ in columns[1:]),
                "best" if row["layer"] == best else "",
            ),
            "bold" if row["layer"] == best else "",
        )
        for row in scored
    ]
    headings = [Column(column.replace("_", " "), right=True, rank=rank) for column, rank in columns]
    print_table(screen, (_LAYER, headings[0], Column("", bar=True), *headings[1:], Column("")), rows)
    say(screen, "the bar is the signal to noise; higher is better, except for the cosine, that of the two means", "dim")
    if len(columns) > len(_SCORES):
        say(screen, "left: of each direction without those of --without; all scores are of what is left", "dim")
    known = f"best layer: {best}" if best is not None else "the best layer is not known, choose it with --source-layer"
    _print_line(screen, f"{known}; written to {file}")


def print_comparison(comparison: "DirectionsComparison") -> None:
    """Prints how the directions of several dumps score at their best layers, how far they agree, and which is taken."""
    screen = output()
    rows = [score_row(candidate.best) if candidate.best is not None else {} for candidate in comparison.candidates]
    most = max((row.get("auc") or 0.0 for row in rows), default=0.0)
    columns = [*_COMPARED, *([_LEFT] if any(_LEFT[0] in row for row in rows) else [])]
    print_table(
        screen,
        (
            _DUMP,
            Column("best layer", right=True),
            *(Column(name.replace("_", " "), right=True, rank=rank) for name, rank in columns[:1]),
            Column("", bar=True),
            *(Column(name.replace("_", " "), right=True, rank=rank) for name, rank in columns[1:]),
            Column(""),
        ),
        [
            Row(
                (
                    candidate.name,
                    str(row.get("layer", NO_LAYER)),
                    _score(row.get("auc")),
                    bar(row.get("auc"), most, "green" if candidate is comparison.taken else "cyan"),
                    *(_score(row.get(name)) for name, _ in columns[1:]),
                    "best" if candidate is comparison.taken else "",
                ),
                "bold" if candidate is comparison.taken else "",
            )
            for candidate, row in zip(comparison.candidates, rows, strict=True)
        ],
    )
    say(screen, "each dump's scores at its own best layer; the bar is the held-out AUC", "dim")
    print_table(
        screen,
        (
            _DUMP,
            Column("and", wraps=True),
            Column("cosine", right=True),
            Column("at layer", right=True, rank=1),
            Column("cosine there", right=True, rank=1),
        ),
        [
            Row(
                (
                    agreement.first,
                    agreement.second,
                    _score(agreement.median),
                    NO_LAYER if agreement.layer is None else str(agreement.layer),
                    _score(agreement.at_layer),
                )
            )
            for agreement in comparison.agreements
        ],
    )
    several = ", of several the largest principal cosine" if comparison.directions.rank > 1 else ""
    say(screen, f"cosine: of the directions of two dumps{several}, median over the layers", "dim")
    say(
        screen,
        f"{comparison.taken.name} is taken: {comparison.reason}. Where the agreement is low, the kinds find different "
        "things, and removing what one finds leaves what the others find.",
    )


def _score(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _best_layer(directions: Directions) -> int | None:
    try:
        return directions.best_layer()
    except DirectionsError:
        return None


def scores(directions: Directions, comparison: "DirectionsComparison | None" = None) -> dict[str, Any]:
    """Returns what ``directions`` shows, as JSON types; of a comparison, also every layer of every dump."""
    compared: dict[str, Any] = {}
    if comparison is not None:
        compared = comparison.as_dict()
        for row, candidate in zip(compared["dumps"], comparison.candidates, strict=True):
            row["path"] = str(candidate.path)
            row["layers"] = score_table(candidate.directions)
    return {
        **compared,
        "sha256": directions.sha256(),
        "rank": directions.rank,
        "best_layer": _best_layer(directions),
        "layers": [dict(row) for row in score_table(directions)],
    }


def print_push(plan: "PushPlan") -> None:
    """Prints what a push would send, and what of it the repository has already."""
    screen = output()
    rows = [Row((file.name, size_text(file.size), file.state)) for file in plan.files]
    rows += [Row((name, "–", "would be deleted")) for name in plan.deleted]
    print_table(screen, (Column("file"), Column("size", right=True), Column("on the Hub")), rows)
    sent = [file for file in plan.files if file.state != "same"]
    say(
        screen,
        f"{plan.repo} {'exists' if plan.exists else 'would be made'}: {counted(len(sent), 'file')} of "
        f"{len(plan.files)} would be sent, {size_text(sum(file.size for file in sent))}",
    )
    if plan.unverified is not None:
        say(screen, f"{plan.unverified}, so it would be verified first")


def print_run(run: "RunProof") -> None:
    """Prints what running the source and the output showed."""
    screen = output()
    columns = (
        Column("layer", right=True),
        Column("adds before", right=True),
        Column("after", right=True),
        Column("stream before", right=True),
        Column("after", right=True),
    )
    rows = [Row([str(each.layer), *(f"{share:.2%}" for share in dataclasses.astuple(each)[1:])]) for each in run.layers]
    print_table(screen, columns, rows)
    say(
        screen,
        "share of the length of what a layer adds, and of the stream after it, along what was removed from the layer; "
        "mean over tokens",
        "dim",
    )
    say(
        screen,
        f"KL {run.divergence:.4f} nats a token over {counted(run.tokens, 'token')} of {counted(run.prompts, 'prompt')}",
    )


def print_verification(verification: "Verification", source: Path | str, out: Path | str) -> None:
    """Prints every difference, or that there is none."""
    screen = output()
    for difference in verification.differences:
        say(screen, f"{difference.where}: {difference.what}")
    for note in verification.notes:
        say(screen, note)
    if verification.differences:
        say(screen, f"{out} is not what its receipt says: {counted(len(verification.differences), 'difference')}")
        return
    equal = f"{out} is what its receipt says: {size_text(verification.untouched_bytes)} equal {source}"
    if verification.dequantised:
        equal += f", with {counted(verification.dequantised, 'weight')} decoded from its codes"
    if verification.dequantised and not verification.edited:
        say(screen, equal)
        return
    edited = counted(verification.edited, "edited tensor")
    if not verification.recomputed:
        say(screen, f"{equal}, {edited} with the digests it records; --adapter computes them again")
        return
    rounded = verification.edited - verification.identical
    say(
        screen,
        f"{equal}, {edited} recomputed, {verification.identical} to the bit"
        + (f" and {rounded} to rounding" if rounded else ""),
    )


def _share(checkpoint: Checkpoint, plan: Plan, what: str) -> str:
    return f"{plan.family}: {_share_of(checkpoint, plan.edits)} {what}"


def _share_of(checkpoint: Checkpoint, edits: Sequence[Edit]) -> str:
    edited = sum(edit.end - edit.start for edit in edits)
    whole = sum(shard.size for shard in checkpoint.shards)
    return f"{len(edits)} of {len(checkpoint.tensors)} tensors ({size_text(edited)} of {size_text(whole)})"


def _merge_cells(edits: "Sequence[MergeEdit]") -> tuple[str, str, str]:
    """Returns the tensors, ranks and scales of edits of one layer and kind."""
    each = [part for edit in edits for part in edit.parts or (edit,)]
    ranks = sorted({part.rank for part in each if part.rank is not None})
    scales = [] if edits[0].kind in ("replaced", "rows") else sorted({part.scale for part in each})
    return (
        _short_names(edit.name for edit in edits),
        ", ".join(map(str, ranks)) or "–",
        ", ".join(f"{scale:g}" for scale in scales) or "–",
    )


def _print_absent(screen: Console, parts: Iterable[Absent]) -> None:
    """Says which layers have no attention or no MLP, a line per part, with what tells of the first."""
    layers: dict[str, list[Absent]] = defaultdict(list)
    for part in parts:
        layers[part.component].append(part)
    for component, members in layers.items():
        noun = "layer" if len(members) == 1 else "layers"
        numbers = layer_ranges(part.layer for part in members)
        more = ", and so on" if len({part.reason for part in members}) > 1 else ""
        say(screen, f"no {component} in {noun} {numbers} ({members[0].reason}{more})")


def _print_left_out(screen: Console, plan: Plan, checkpoint: Checkpoint) -> None:
    _print_absent(screen, plan.absent)
    _print_reasons(screen, ((skip.name, skip.reason) for skip in plan.skipped))
    for name, reason in checkpoint.left_out:
        say(screen, f"not carried over: {name} ({reason})")


def _print_reasons(screen: Console, reasons: Iterable[tuple[str, str]]) -> None:
    names: dict[str, list[str]] = defaultdict(list)
    for name, reason in reasons:
        names[reason].append(name)
    for reason, members in names.items():
        say(screen, f"not edited: {_fold(map(_numbers_folded, members))} ({reason})")


def _by_layer(edits: Sequence[TensorEdit]) -> list[list[TensorEdit]]:
    groups: dict[tuple[bool, int, str], list[TensorEdit]] = defaultdict(list)
    for edit in edits:
        key = (edit.mtp, -1 if edit.layer is None else edit.layer, edit.component)
        groups[key].append(edit)
    return [groups[key] for key in sorted(groups)]


def _layer_name(item: TensorEdit | Writer) -> str:
    layer = NO_LAYER if item.layer is None else str(item.layer)
    return f"mtp {layer}" if item.mtp else layer


def _short_names(names: Iterable[str]) -> str:
    """Returns names within their layer, such as ``128 x mlp.experts.*.down_proj``."""
    return _fold(_numbers_folded(split_layer(name)[1]) for name in names)


def _short_name(name: str) -> str:
    return _short_names([name])


def _leaves_of(names: str) -> str:
    """Returns names as ``_short_names`` makes them without the modules that lead to them."""
    return ", ".join(re.sub(r"\S+\.(?=[^.\s])", "", name) for name in names.split(", "))


def _print_line(screen: Console, text: str) -> None:
    """Prints a line that is to be copied: the terminal may break it, this does not."""
    screen.print(text, soft_wrap=True)


def _fold(names: Iterable[str]) -> str:
    """Returns each name once, with its count, and no more of them than fit."""
    counts = Counter(names)
    shown = [name if count == 1 else f"{count} x {name}" for name, count in counts.items()]
    rest = len(shown) - _MOST_NAMES
    return ", ".join(shown[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _numbers_folded(name: str) -> str:
    return _NUMBER.sub("*", name).removesuffix(".weight")


_LAYER = Column("layer", right=True)
_DUMP = Column("dump", wraps=True)
_TENSORS = Column("tensors", wraps=True, brief=_leaves_of)
_ROUNDING = (Column("by nearest", right=True, rank=3), Column("rounding", right=True, rank=4))
_MERGED = (
    _LAYER,
    Column("change"),
    _TENSORS,
    Column("rank", right=True, rank=1),
    Column("scale", right=True, rank=2),
)
