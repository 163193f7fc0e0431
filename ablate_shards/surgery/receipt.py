"""Writes and reads the receipt: what a run edited, how, and what was measured of it."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablate_shards import __version__
from ablate_shards.errors import VerifyError
from ablate_shards.surgery.checkpoint import RECEIPT_NAME, Checkpoint
from ablate_shards.surgery.directions import Directions
from ablate_shards.surgery.plan import BasisKey, Plan, TensorEdit
from ablate_shards.surgery.recipe import AblateOptions

__all__ = ["FORMAT", "Receipt", "TensorResult", "read_receipt", "receipt_text", "seal"]

FORMAT = "ablate-shards.receipt/1"


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What was measured of one edited tensor, as re-read from the written file.

    Attributes:
        before: Relative component along the basis, ‖RW‖/‖W‖, in the source.
        after: The same in the output.
        norm_drift: Largest relative change of a preserved norm; None where none is preserved.
        degenerate: Vectors whose component was removed without rescaling.
        sha256: Digest of the tensor's bytes in the output.
    """

    before: float
    after: float
    norm_drift: float | None
    degenerate: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Receipt:
    """A receipt as read.

    Attributes:
        content: The whole receipt as JSON types.
        edits: The edits it records.
        results: What it says was measured, by tensor.
        directions: The directions it carries, those that the edits use.
        altered: Whether its bytes are not the ones that were written.
    """

    content: Mapping[str, Any]
    edits: tuple[TensorEdit, ...]
    results: Mapping[str, TensorResult]
    directions: Directions
    altered: bool


def receipt_text(
    checkpoint: Checkpoint,
    plan: Plan,
    options: AblateOptions,
    directions: Directions,
    results: Mapping[str, TensorResult],
    device: Mapping[str, str],
) -> str:
    """Returns the receipt of a run as canonical JSON that ends in its own digest.

    The text depends on what was done alone: no time, no absolute path, nothing of the machine but the
    device and the arithmetic, so that the same inputs give the same bytes.
    """
    used = {edit.basis for edit in plan.edits}
    content = {
        "format": FORMAT,
        "tool": f"ablate-shards {__version__}",
        "source": {
            "name": checkpoint.path.resolve().name,
            "shards": [
                {"name": shard.name, "size": shard.size, "header_sha256": shard.header_sha256}
                for shard in checkpoint.shards
            ],
        },
        "family": plan.family,
        "hidden_size": plan.hidden_size,
        "recipe": _resolved(options, plan),
        "directions": {
            "sha256": plan.directions_sha256,
            "metadata": dict(directions.metadata),
            "basis": _encode(directions.basis, {key.source_layer for key in used}),
            "reference": _encode(directions.reference, {layer for key in used for layer in key.references}),
        },
        "device": dict(device),
        "tensors": [_record(edit, results[edit.name]) for edit in plan.edits],
        "skipped": [dataclasses.asdict(skip) for skip in plan.skipped],
        "files": {
            "copied": list(checkpoint.sidecars),
            "left_out": [{"name": name, "reason": reason} for name, reason in checkpoint.left_out],
        },
    }
    return seal(content)


def read_receipt(folder: Path) -> Receipt:
    """Reads the receipt of an edited checkpoint.

    Raises:
        VerifyError: There is none, it is of a newer version, or it is not a receipt.
    """
    path = folder / RECEIPT_NAME
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise VerifyError(f"{folder}: holds no {RECEIPT_NAME}; only folders made by ablate-shards have one") from error
    try:
        content = json.loads(raw)
        found = content["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise VerifyError(f"{path}: not a receipt ({error}); it was changed after it was written") from error
    if found != FORMAT:
        raise VerifyError(f"{path}: expected {FORMAT}, found {found}; use the version that wrote it")
    try:
        edits = tuple(_edit(record) for record in content["tensors"])
        results = {
            record["name"]: TensorResult(
                **{field.name: record[field.name] for field in dataclasses.fields(TensorResult)}
            )
            for record in content["tensors"]
        }
        directions = Directions(
            basis=_decode(content["directions"]["basis"]),
            reference={layer: array[0] for layer, array in _decode(content["directions"]["reference"]).items()},
            scores={},
            metadata=content["directions"]["metadata"],
        )
        digest = content.pop("sha256")
        altered = seal(content).encode() != raw or not isinstance(digest, str)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerifyError(f"{path}: not a complete receipt ({error}); it was changed after it was written") from error
    return Receipt(content, edits, results, directions, altered)


def seal(content: Mapping[str, Any]) -> str:
    """Returns a receipt's content as canonical JSON that carries its own digest."""
    body = json.dumps({**content, "sha256": ""}, indent=1, ensure_ascii=False)
    digest = hashlib.sha256(body.encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=1, ensure_ascii=False) + "\n"


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
        "override": [
            {
                **{key: value for key, value in dataclasses.asdict(override).items() if value is not None},
                **({"layers": sorted(override.layers)} if override.layers is not None else {}),
            }
            for override in options.overrides
        ],
        "target": [dataclasses.asdict(target) for target in options.targets],
    }


def _record(edit: TensorEdit, result: TensorResult) -> dict[str, Any]:
    return {
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
        **dataclasses.asdict(result),
    }


def _edit(record: Mapping[str, Any]) -> TensorEdit:
    return TensorEdit(
        name=record["name"],
        shard=record["shard"],
        dtype=record["dtype"],
        shape=tuple(record["shape"]),
        start=record["bytes"][0],
        end=record["bytes"][1],
        axis=record["axis"],
        kind=record["kind"],
        layer=record["layer"],
        component=record["component"],
        mtp=record["mtp"],
        coefficient=record["coefficient"],
        preserve=record["preserve"],
        basis=BasisKey(
            source_layer=record["source_layer"],
            references=tuple(record["references"]),
            gain=record["gain"],
            gain_offset=record["gain_offset"],
        ),
    )


def _encode(arrays: Mapping[int, np.ndarray], layers: set[int]) -> dict[str, Any]:
    return {
        str(layer): {
            "shape": list(np.atleast_2d(arrays[layer]).shape),
            "float32": base64.b64encode(arrays[layer].astype("<f4").tobytes()).decode(),
        }
        for layer in sorted(layers)
    }


def _decode(entries: Mapping[str, Any]) -> dict[int, np.ndarray]:
    return {
        int(layer): np.frombuffer(base64.b64decode(entry["float32"], validate=True), "<f4").reshape(entry["shape"])
        for layer, entry in entries.items()
    }
