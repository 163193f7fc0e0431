"""What a merge did, as a file beside the weights."""

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate_shards import __version__
from ablate_shards.errors import ExecuteError
from ablate_shards.names import MERGE_RECEIPT_NAME
from ablate_shards.surgery.checkpoint.amended import Amendments
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.files import Files
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.dequantise.dequantisation import Dequantisation
from ablate_shards.surgery.dequantise.found import DequantisedRecord
from ablate_shards.surgery.edit.receipt import (
    copied_files,
    dequantised_of,
    dequantised_record,
    files_record,
    headers_of,
    incomplete,
    read_sealed,
    revision_of,
    seal,
    source_record,
    with_range,
)
from ablate_shards.surgery.merge.adapter import Adapter, read_adapter
from ablate_shards.surgery.merge.editor import MergeResult
from ablate_shards.surgery.merge.plan import MergeEdit, MergePlan, receipts_beside
from ablate_shards.validation import Finite, checked

__all__ = ["MERGE_FORMAT", "MergeReceipt", "merge_receipt_text", "read_merge_receipt"]

MERGE_FORMAT = "ablate-shards.merge/1"


@dataclass(frozen=True, slots=True)
class MergeReceipt:
    """What the receipt of a merge says that can be checked, as read.

    Attributes:
        revision: The commit of the source, None where it has no history.
        shards: Digests of the source's headers, by shard.
        amendments: What was added or changed besides the values of weights.
        copied: The files beside the shards that are the source's, or were but for what was changed in them.
        adapter_sha256: Digest of the adapter.
        scale: What every update was multiplied by, beside the adapter's own scale.
        tensors: The changed tensors, by name.
        results: What it says was measured of them, by name.
        altered: Whether its bytes are not the ones that were written.
        dequantised: The weights that were dequantised first.
    """

    revision: str | None
    shards: Mapping[str, str]
    amendments: Amendments
    copied: tuple[str, ...]
    adapter_sha256: str
    scale: float
    tensors: Mapping[str, TensorInfo]
    results: Mapping[str, MergeResult]
    altered: bool
    dequantised: tuple[DequantisedRecord, ...] = ()


def merge_receipt_text(
    checkpoint: Checkpoint,
    adapter: Adapter,
    plan: MergePlan,
    results: Mapping[str, MergeResult],
    device: Mapping[str, str],
    dequantisation: Dequantisation | None = None,
) -> str:
    """Returns the receipt of a merge as canonical JSON that ends in its own digest.

    It names the receipts that lie beside the base, by digest: what they say is of the base's bytes, and they are not
    carried over.

    Raises:
        ExecuteError: The adapter is no longer the one that was planned with.
    """
    if read_adapter(adapter.path).sha256 != adapter.sha256:
        raise ExecuteError(f"{adapter.path}: changed while it was read; run again when nothing writes to it")
    return seal(
        {
            "format": MERGE_FORMAT,
            "tool": f"ablate-shards {__version__}",
            "source": source_record(checkpoint),
            "base": [
                {"name": name, "sha256": hashlib.sha256(_read(checkpoint, name)).hexdigest()}
                for name in receipts_beside(checkpoint)
            ],
            "adapter": {
                "name": adapter.path.resolve().name,
                "sha256": adapter.sha256,
                **dataclasses.asdict(adapter.config),
            },
            "scale": plan.scale,
            **({"amendments": plan.amendments.as_dict()} if plan.amendments else {}),
            "device": dict(device),
            **dequantised_record(dequantisation),
            "tensors": [_record(edit, results[edit.name]) for edit in plan.edits],
            "files": files_record(checkpoint, dequantisation, plan.amendments.files),
        }
    )


def _read(checkpoint: Checkpoint, name: str) -> bytes:
    return checkpoint.remote.read(name) if checkpoint.remote is not None else (checkpoint.root / name).read_bytes()


def _record(edit: MergeEdit, result: MergeResult) -> dict[str, Any]:
    low_rank = {
        "rank": edit.rank,
        "scale": edit.scale,
        "transposed": edit.transposed,
        "experts": edit.experts,
        "expert": edit.expert,
    }
    return {
        "name": edit.name,
        "shard": edit.shard,
        "dtype": edit.dtype,
        "shape": list(edit.shape),
        "bytes": [edit.start, edit.end],
        "kind": edit.kind,
        "from": list(edit.source),
        **(low_rank if edit.kind == "low-rank" else {}),
        **({"tokens": list(edit.tokens)} if edit.tokens else {}),
        **({"begins_as": edit.begins_as} if edit.begins_as else {}),
        **({"magnitude": edit.magnitude} if edit.magnitude else {}),
        **({"taken": edit.taken} if edit.taken else {}),
        **({"parts": [dataclasses.asdict(part) for part in edit.parts]} if edit.parts else {}),
        **dataclasses.asdict(result),
    }


def read_merge_receipt(folder: Path | Files) -> MergeReceipt:
    """Reads the receipt of a merge, wherever it is.

    Raises:
        VerifyError: There is none, it is of a newer version, or it is not a receipt.
    """
    content, altered = read_sealed(folder, MERGE_RECEIPT_NAME, MERGE_FORMAT)
    try:
        records = content["tensors"]
        tensors = checked([with_range(record) for record in records], tuple[TensorInfo, ...], "tensors")
        results = checked(records, tuple[MergeResult, ...], "tensors")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("records a tensor twice")
        return MergeReceipt(
            revision=revision_of(content),
            shards=headers_of(content),
            amendments=checked(content.get("amendments", {}), Amendments, "amendments"),
            copied=copied_files(content),
            adapter_sha256=checked(content["adapter"]["sha256"], str, "adapter: sha256"),
            scale=checked(content["scale"], Finite, "scale"),
            tensors={tensor.name: tensor for tensor in tensors},
            results={tensor.name: result for tensor, result in zip(tensors, results, strict=True)},
            altered=altered,
            dequantised=dequantised_of(content),
        )
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise incomplete(folder, MERGE_RECEIPT_NAME, error) from error
