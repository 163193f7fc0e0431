"""Writes and reads the receipt: what a run edited, how, and what was measured of it."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablate_shards import __version__
from ablate_shards.errors import VerifyError
from ablate_shards.names import RECEIPT_NAME
from ablate_shards.surgery.anatomy.scales import Scales
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.files import Files, Folder
from ablate_shards.surgery.dequantise.dequantisation import Dequantisation
from ablate_shards.surgery.dequantise.found import DequantisedRecord
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.edit.ablation_editor import CodedResult, TensorResult
from ablate_shards.surgery.plan.edits import TensorEdit, neighbours
from ablate_shards.surgery.plan.plan import Plan
from ablate_shards.surgery.plan.recipe import AblateOptions
from ablate_shards.validation import checked

__all__ = [
    "RECEIPT_FORMAT",
    "Receipt",
    "ablation_record",
    "copied_files",
    "dequantised_of",
    "dequantised_record",
    "directions_of",
    "edit_record",
    "edits_of",
    "files_record",
    "headers_of",
    "incomplete",
    "read_receipt",
    "read_sealed",
    "receipt_text",
    "revision_of",
    "seal",
    "source_record",
    "with_range",
]

RECEIPT_FORMAT = "ablate-shards.receipt/1"


@dataclass(frozen=True, slots=True)
class _ShardRecord:
    name: str
    header_sha256: str


@dataclass(frozen=True, slots=True)
class _ArrayRecord:
    shape: tuple[int, int]
    float32: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a receipt says that can be checked, as read.

    Attributes:
        revision: The commit of the source, None where it has no history.
        shards: Digests of the source's headers, by shard.
        copied: The files that were copied beside the shards.
        edits: The edits it records, one a tensor.
        results: What it says was measured, by tensor.
        directions: The directions and reference means it carries, those that the edits use; no metadata.
        altered: Whether its bytes are not the ones that were written.
        dequantised: The weights that were dequantised first.
    """

    revision: str | None
    shards: Mapping[str, str]
    copied: tuple[str, ...]
    edits: tuple[TensorEdit, ...]
    results: Mapping[str, TensorResult]
    directions: Directions
    altered: bool
    dequantised: tuple[DequantisedRecord, ...] = ()


def receipt_text(
    checkpoint: Checkpoint,
    plan: Plan,
    options: AblateOptions,
    directions: Directions,
    results: Mapping[str, TensorResult],
    device: Mapping[str, str],
    dequantisation: Dequantisation | None = None,
) -> str:
    """Returns the receipt of a run as canonical JSON that ends in its own digest.

    The text depends on what was done alone: no time, no absolute path, nothing of the machine but the
    device and the arithmetic, so that the same inputs give the same bytes.
    """
    content = {
        "format": RECEIPT_FORMAT,
        "tool": f"ablate-shards {__version__}",
        **ablation_record(checkpoint, plan, options, directions),
        "device": dict(device),
        **dequantised_record(dequantisation),
        "tensors": [_record(edit, results[edit.name]) for edit in plan.edits],
        "skipped": [dataclasses.asdict(skip) for skip in plan.skipped],
        **({"absent": [dataclasses.asdict(part) for part in plan.absent]} if plan.absent else {}),
        "files": files_record(checkpoint, dequantisation),
    }
    return seal(content)


def ablation_record(
    checkpoint: Checkpoint, plan: Plan, options: AblateOptions, directions: Directions
) -> dict[str, Any]:
    """Returns what a receipt says of an ablation, whatever was made of it: of what, how and along what."""
    used = {edit.basis for edit in plan.edits}
    return {
        "source": source_record(checkpoint),
        "family": plan.family,
        "hidden_size": plan.hidden_size,
        "recipe": _resolved(options, plan),
        "directions": {
            "sha256": plan.directions_sha256,
            "metadata": dict(directions.metadata),
            "basis": _encode(directions.basis, {layer for key in used for layer in neighbours(key.source_layer)}),
            "reference": _encode(directions.reference, {layer for key in used for layer in key.references}),
        },
    }


def read_receipt(folder: Path | Files) -> Receipt:
    """Reads the receipt of an edited checkpoint, wherever it is.

    Raises:
        VerifyError: There is none, it is of a newer version, or it is not a receipt.
    """
    content, altered = read_sealed(folder, RECEIPT_NAME, RECEIPT_FORMAT)
    try:
        records = content["tensors"]
        edits = edits_of(records, "tensors")
        results = [_result_of(record, f"tensors[{number}]") for number, record in enumerate(records)]
        if len({edit.name for edit in edits}) < len(edits):
            raise ValueError("records a tensor twice")
        return Receipt(
            revision=revision_of(content),
            shards=headers_of(content),
            copied=copied_files(content),
            edits=edits,
            results={edit.name: result for edit, result in zip(edits, results, strict=True)},
            directions=directions_of(content),
            altered=altered,
            dequantised=dequantised_of(content),
        )
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise incomplete(folder, RECEIPT_NAME, error) from error


def edits_of(records: Sequence[Mapping[str, Any]], place: str) -> tuple[TensorEdit, ...]:
    """Returns the edits that a receipt records.

    Raises:
        ValueError: It records none such.
        LookupError: Something is missing.
    """
    return checked([_as_edit(record) for record in records], tuple[TensorEdit, ...], place)


def directions_of(content: Mapping[str, Any]) -> Directions:
    """Returns the directions and reference means that a receipt carries."""
    return Directions(
        basis=_decode(content["directions"]["basis"]),
        reference={layer: array[0] for layer, array in _decode(content["directions"]["reference"]).items()},
    )


def read_sealed(folder: Path | Files, name: str, expected: str) -> tuple[dict[str, Any], bool]:
    """Reads the content of a receipt of a given format, and whether its bytes are not the ones that were written.

    Raises:
        VerifyError: There is none, it is of a newer version, or it is not a receipt.
    """
    files = _files(folder)
    path = files.shown(name)
    if not files.has(name):
        raise VerifyError(f"{files.name}: holds no {name}; only what ablate-shards has made holds one")
    raw = files.read(name)
    try:
        content: dict[str, Any] = json.loads(raw)
        found = content["format"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise VerifyError(f"{path}: not a receipt ({error}); it was changed after it was written") from error
    if found != expected:
        raise VerifyError(f"{path}: expected {expected}, found {found!r}; use the version that wrote it")
    try:
        altered = seal({key: value for key, value in content.items() if key != "sha256"}).encode() != raw
    except (ValueError, RecursionError):
        altered = True
    return content, altered


def incomplete(folder: Path | Files, name: str, error: Exception) -> VerifyError:
    """Returns the error of a receipt in which something is missing or malformed."""
    path = _files(folder).shown(name)
    return VerifyError(f"{path}: not a complete receipt ({error}); it was changed after it was written")


def revision_of(content: Mapping[str, Any]) -> str | None:
    """Returns the commit of the source that a receipt names, None where it names none."""
    source = content["source"]
    return checked(source["revision"], str, "source: revision") if "revision" in source else None


def headers_of(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns the digests of the source's headers that a receipt names, by shard."""
    shards = checked(content["source"]["shards"], tuple[_ShardRecord, ...], "source: shards")
    return {shard.name: shard.header_sha256 for shard in shards}


def copied_files(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns the files that a receipt says were copied beside the shards."""
    return checked(content["files"]["copied"], tuple[str, ...], "files: copied")


def files_record(
    checkpoint: Checkpoint, dequantisation: Dequantisation | None, given: Collection[str] = ()
) -> dict[str, Any]:
    """Returns what a receipt says of the files beside the shards.

    Args:
        checkpoint: The source.
        dequantisation: What of it was dequantised first, None where nothing was.
        given: Files that are not the source's.
    """
    removed = () if dequantisation is None else dequantisation.amendments.removed
    left_out = [*checkpoint.left_out, *((name, "says how weights were quantised") for name in removed)]
    return {
        "copied": [name for name in checkpoint.sidecars if name not in removed and name not in given],
        "left_out": [{"name": name, "reason": reason} for name, reason in left_out],
    }


def dequantised_record(dequantisation: Dequantisation | None) -> dict[str, Any]:
    """Returns what a receipt says of the weights that were dequantised; nothing where none were."""
    if dequantisation is None:
        return {}
    return {"dequantised": [dataclasses.asdict(record) for record in dequantisation.records()]}


def dequantised_of(content: Mapping[str, Any]) -> tuple[DequantisedRecord, ...]:
    """Returns the weights that a receipt says were dequantised."""
    return checked(content.get("dequantised", ()), tuple[DequantisedRecord, ...], "dequantised")


def with_range(record: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Returns a tensor's record with its ``bytes`` as ``start`` and ``end``, as the plan calls them, and with more."""
    start, end = record["bytes"]
    return {**record, "start": start, "end": end, **more}


def _as_edit(record: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tensor's record as the plan has it."""
    if "scales" not in record:
        return with_range(record, basis=record)
    scales = record["scales"]
    more = {"parts": [with_range(part) for part in scales["parts"]]} if "parts" in scales else {}
    return with_range(record, basis=record, scales=with_range(scales, **more))


def _result_of(record: Mapping[str, Any], place: str) -> TensorResult:
    return checked(record, CodedResult if "scales" in record else TensorResult, place)


def source_record(checkpoint: Checkpoint) -> dict[str, Any]:
    """Returns what a receipt says of the source."""
    return {
        **checkpoint.identity,
        "shards": [
            {"name": shard.name, "size": shard.size, "header_sha256": shard.header_sha256}
            for shard in checkpoint.shards
        ],
    }


def seal(content: Mapping[str, Any]) -> str:
    """Returns a receipt's content as canonical JSON that carries its own digest."""
    end = '""\n}'
    body = json.dumps({**content, "sha256": ""}, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{body.removesuffix(end)}"{digest}"\n}}\n'


def _files(folder: Path | Files) -> Files:
    return Folder(folder) if isinstance(folder, Path) else folder


def _resolved(options: AblateOptions, plan: Plan) -> dict[str, Any]:
    layers = sorted({edit.layer for edit in plan.edits if edit.layer is not None and not edit.mtp})
    return {
        "layers": layers,
        "components": list(options.components),
        "coefficient": options.coefficient,
        "preserve": options.preserve,
        "biproject": options.biproject,
        "source-layer": options.source_layer,
        "mtp": options.mtp,
        **({"rounding": options.rounding} if options.rounding != "directed" else {}),
        **({"profile": [dataclasses.asdict(profile) for profile in options.profiles]} if options.profiles else {}),
        "override": [
            {
                **{key: value for key, value in dataclasses.asdict(override).items() if value is not None},
                **({"layers": sorted(override.layers)} if override.layers is not None else {}),
            }
            for override in options.overrides
        ],
        "target": [dataclasses.asdict(target) for target in options.targets],
    }


def edit_record(edit: TensorEdit) -> dict[str, Any]:
    """Returns what a receipt says of an edit, whatever came of it; :func:`edits_of` reads it."""
    record = {
        "name": edit.name,
        "shard": edit.shard,
        "dtype": edit.dtype,
        "shape": list(edit.shape),
        "bytes": [edit.start, edit.end],
        "axis": edit.axis,
        "kind": edit.kind,
        "layer": edit.layer,
        "component": edit.component,
        "mtp": edit.mtp,
        "source_layer": edit.basis.source_layer,
        "references": list(edit.basis.references),
        "gain": edit.basis.gain,
        "gain_offset": edit.basis.gain_offset,
        "coefficient": edit.coefficient,
        "preserve": edit.preserve,
    }
    if edit.scales is not None:
        if edit.rounding != "directed":
            record["rounding"] = edit.rounding
        record |= {"stored_as": edit.scales.form(edit.shape), "scales": _record_scales(edit.scales)}
    return record


def _record(edit: TensorEdit, result: TensorResult) -> dict[str, Any]:
    record, measured = edit_record(edit), dataclasses.asdict(result)
    if measured.get("undone", 0) is None:
        del measured["undone"]
    said = {key: record.pop(key) for key in ("stored_as", "scales") if key in record}
    return record | measured | said


def _record_scales(scales: Scales) -> dict[str, Any]:
    record = _with_bytes(dataclasses.asdict(scales))
    # FP8, row by row, is what is meant where nothing is said.
    usual = {"codes": "E4M3", "order": "rows", "rows": 0}
    parts, said = record.pop("parts"), {key: record.pop(key) for key in usual}
    said = {key: value for key, value in said.items() if value != usual[key]}
    return record | said | ({"parts": [_with_bytes(part) for part in parts]} if parts else {})


def _with_bytes(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record with its ``start`` and ``end`` as ``bytes``: the reverse of :func:`with_range`."""
    start, end = record.pop("start"), record.pop("end")
    return {**record, "bytes": [start, end]}


def _encode(arrays: Mapping[int, np.ndarray], layers: set[int]) -> dict[str, Any]:
    return {
        str(layer): {
            "shape": list(np.atleast_2d(arrays[layer]).shape),
            "float32": base64.b64encode(arrays[layer].astype("<f4").tobytes()).decode(),
        }
        for layer in sorted(layers)
    }


def _decode(entries: Any) -> dict[int, np.ndarray]:
    arrays = {}
    for layer, entry in checked(entries, dict[str, _ArrayRecord], "directions").items():
        array = np.frombuffer(base64.b64decode(entry.float32, validate=True), "<f4")
        rows, columns = entry.shape
        if min(rows, columns) < 1 or rows * columns != array.size or not np.isfinite(array).all():
            raise ValueError(f"layer {layer!r}: expected finite numbers, as many as its shape says")
        arrays[int(layer)] = array.reshape(rows, columns)
    return arrays
