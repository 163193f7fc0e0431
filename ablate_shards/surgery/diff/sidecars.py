"""In what checkpoints differ beside the values of their weights: header metadata, sharding and the other files."""

import filecmp
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.headers import read_header

__all__ = ["compare_files", "compare_metadata"]

_INDEX = ".safetensors.index.json"
#: JSON of more bytes is not compared key by key.
_MOST_JSON = 1 << 20
_MOST_SHOWN = 60


def compare_metadata(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    """Says in what the headers' metadata and the sharding differ, a line each."""
    ours, theirs = (
        {key: value for shard in checkpoint.shards for key, value in read_header(shard.path)[1].items()}
        for checkpoint in (first, second)
    )
    for line in _compare_entries(ours, theirs):
        yield f"header metadata: {line}"
    if len(first.shards) != len(second.shards):
        yield f"sharding: {len(first.shards)} files, then {len(second.shards)}"


def compare_files(first: Checkpoint, second: Checkpoint) -> Iterator[str]:
    """Says in what the files beside the weights differ, a line each; a single file has nothing beside it."""
    if not (first.path.is_dir() and second.path.is_dir()):
        return
    ours, theirs = (
        {name for name in checkpoint.sidecars if not name.endswith(_INDEX)} for checkpoint in (first, second)
    )
    for name in sorted(ours | theirs):
        if name not in theirs:
            yield f"{name}: lost"
        elif name not in ours:
            yield f"{name}: added"
        elif not filecmp.cmp(first.root / name, second.root / name, shallow=False):
            for line in _compare_contents(first.root / name, second.root / name):
                yield f"{name}: {line}"
    ours, theirs = ({name for name, _ in checkpoint.left_out} for checkpoint in (first, second))
    for name in sorted(ours - theirs):
        yield f"{name}: lost (not compared)"
    for name in sorted(theirs - ours):
        yield f"{name}: added (not compared)"


def _compare_contents(one: Path, other: Path) -> list[str]:
    """Says in what two files of different bytes differ, key by key where both hold a JSON object."""
    if one.suffix == ".json" and max(one.stat().st_size, other.stat().st_size) < _MOST_JSON:
        try:
            ours, theirs = (json.loads(path.read_bytes()) for path in (one, other))
            if isinstance(ours, dict) and isinstance(theirs, dict):
                return list(_compare_entries(_flat(ours), _flat(theirs))) or ["differs in layout only"]
        except (ValueError, RecursionError):
            pass
    return ["differs"]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns every value as JSON by its path of keys."""
    found: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return found


def _compare_entries(ours: Mapping[str, str], theirs: Mapping[str, str]) -> Iterator[str]:
    for key in dict.fromkeys([*ours, *theirs]):
        if key not in theirs:
            yield f"{key} lost (was {_short(ours[key])})"
        elif key not in ours:
            yield f"{key} added ({_short(theirs[key])})"
        elif ours[key] != theirs[key]:
            yield f"{key} {_short(ours[key])} → {_short(theirs[key])}"


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[: _MOST_SHOWN - 3]}..."
