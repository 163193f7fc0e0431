"""Finds out what a folder that is to be published holds, and whether its receipt is fresh."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ablate_shards.errors import UsageError
from ablate_shards.names import (
    ADAPTER_RECEIPT_NAME,
    CARD,
    DEQUANTISATION_RECEIPT_NAME,
    MERGE_RECEIPT_NAME,
    RECEIPT_NAME,
    RECEIPT_NAMES,
)
from ablate_shards.surgery.checkpoint.headers import read_header
from ablate_shards.surgery.checkpoint.stores import is_hub_id
from ablate_shards.surgery.edit.dequantise import DequantisationReceipt, read_dequantisation_receipt
from ablate_shards.surgery.edit.receipt import Receipt, read_receipt
from ablate_shards.surgery.hub.card import PublishedKind, read_object
from ablate_shards.surgery.merge.receipt import MergeReceipt, read_merge_receipt
from ablate_shards.surgery.verify.adapter_proof import changed_since

__all__ = ["CARD", "Published", "look_at"]

_ADAPTER = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_NOT_PUBLISHED = re.compile(r"(^|/)(\.(?!gitattributes$)[^/]*|__pycache__|checkpoint-\d+)(/|$)|\.(lock|tmp)$")


@dataclass(frozen=True, slots=True)
class Published:
    """A folder to publish, and what its receipt says.

    Attributes:
        path: The folder.
        kind: What it holds.
        files: What of it is published, without the card.
        base: The base model's repository, if it is known.
        revision: The commit of it that was edited.
        origin: What the receipt says it was made of, where that is on the Hub.
        copied: Files that are the base model's own; a README.md among them is that model's card.
        stale: Why it has to be verified first, None where its receipt is fresh.
    """

    path: Path
    kind: PublishedKind
    files: tuple[str, ...]
    base: str | None
    revision: str | None
    origin: str | None
    copied: tuple[str, ...]
    stale: str | None


#: What a folder holds, and what reads it, by its receipt.
_KINDS: Mapping[str, tuple[PublishedKind, Callable[[Path], Receipt | MergeReceipt | DequantisationReceipt]]] = {
    RECEIPT_NAME: ("ablation", read_receipt),
    MERGE_RECEIPT_NAME: ("merge", read_merge_receipt),
    DEQUANTISATION_RECEIPT_NAME: ("dequantisation", read_dequantisation_receipt),
}


def look_at(folder: Path, base_model: str | None = None) -> Published:
    """Finds out what a folder holds, and why it would have to be verified.

    Args:
        folder: What `ablate`, `merge` or `finetune` made.
        base_model: The base model's repository, where the receipt does not know it.

    Raises:
        HubError: What says what was done is not JSON.
        UsageError: The folder holds nothing that can be published.
        VerifyError: Its receipt cannot be read.
    """
    if not folder.is_dir():
        raise UsageError(f"{folder}: expected a folder that `ablate`, `merge` or `finetune` made, found none")
    names = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file())
    files = tuple(name for name in names if not _NOT_PUBLISHED.search(name) and name != CARD)
    copied: tuple[str, ...] = (CARD,)
    stale = None
    if known_by := next((name for name in RECEIPT_NAMES if name in files), ""):
        kind, read = _KINDS[known_by]
        receipt = read(folder)
        copied = receipt.copied
        stale = f"{folder / known_by} was changed after it was written" if receipt.altered else None
        shards = [name for name in receipt.shards if not receipt.dequantised or (folder / name).exists()]
        stale = stale or _newer(folder, known_by, [*shards, *copied])
    elif _ADAPTER in files:
        if _ADAPTER_WEIGHTS not in files:
            raise UsageError(f"{folder}: has {_ADAPTER}, but no {_ADAPTER_WEIGHTS}; save the adapter as safetensors")
        read_header(folder / _ADAPTER_WEIGHTS)
        kind, known_by = "adapter", _ADAPTER
        if ADAPTER_RECEIPT_NAME in files:
            known_by, stale = ADAPTER_RECEIPT_NAME, changed_since(folder)
    else:
        raise UsageError(
            f"{folder}: holds no {', '.join(RECEIPT_NAMES)} or {_ADAPTER}; name a folder that `ablate`, `merge`, "
            "`dequantise` or `finetune` made"
        )
    base, revision = _origin(folder / known_by)
    return Published(
        path=folder,
        kind=kind,
        files=files,
        base=base_model or base,
        revision=revision,
        origin=f"{base}@{revision}" if base and revision else base,
        copied=copied,
        stale=stale,
    )


def _origin(path: Path) -> tuple[str | None, str | None]:
    """Returns the base model's repository and commit, where a receipt or an adapter's configuration has them."""
    content = read_object(path)
    source = content.get("source")
    if not isinstance(source, dict):
        source = {"name": content.get("base_model_name_or_path"), "revision": content.get("revision")}
    name, revision = str(source.get("name")), source.get("revision")
    if not is_hub_id(name) or Path(name).exists():
        return None, None
    return name, revision if isinstance(revision, str) else None


def _newer(folder: Path, receipt: str, named: list[str]) -> str | None:
    written = (folder / receipt).stat().st_mtime_ns
    for name in named:
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_mtime_ns > written:
            return f"{path} is newer than {receipt}"
    return None
