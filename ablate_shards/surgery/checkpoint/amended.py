"""A checkpoint as it is with tensors added, resized or dropped and its configuration changed, before any edit.

Whatever copies, edits, sends or verifies an output starts from a checkpoint and reads its files by byte ranges. An
amended one is read in the same way: its changed files are put together from spans of the source's files, from bytes of
their own and from what is computed, when they are read.
"""

import dataclasses
import hashlib
import json
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablate_shards.errors import CheckpointError, HubError
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, index_of, read_config
from ablate_shards.surgery.checkpoint.files import Files, Remote
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES, Shard, TensorInfo

__all__ = ["Amendments", "Fill", "NewTensor", "amend"]

CONFIG = "config.json"
_CHUNK = 1 << 20
#: What is computed is asked for in larger pieces, because each may begin and end within a row.
_COMPUTED_CHUNK = 8 << 20

Fill = Callable[[memoryview, int], None]
"""Fills a buffer with a tensor's bytes from an offset in it; several threads may call it."""


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor that the source does not hold, or not in this dtype and shape.

    Attributes:
        name: The tensor; one of the source's is replaced.
        shard: The shard of the source that holds it.
        dtype: Its safetensors dtype.
        shape: Its shape.
        begins_as: The source's tensor that its bytes are those of, as far as both go; what is left is zero.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    begins_as: str | None = None


@dataclass(frozen=True, slots=True)
class Amendments:
    """What of an output is not the source's, besides the values of weights.

    Attributes:
        tensors: The tensors that are added or resized.
        config: What is set in ``config.json``: values by keys, those of nested objects joined by dots.
        files: The SHA-256 of files that come from elsewhere, by name.
        dropped: The tensors that are not there any more. A shard that is left without one goes where there is an
            index, without which loaders count the shards.
        unset: What ``config.json`` no longer says: keys as above.
        removed: The files beside the shards that are not there any more.
    """

    tensors: tuple[NewTensor, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def names(self) -> list[str]:
        """Returns what is added or changed: tensors, then files."""
        config = [CONFIG] if self.config or self.unset else []
        return [*(tensor.name for tensor in self.tensors), *config, *self.files]

    def as_dict(self) -> dict[str, Any]:
        """Returns them as JSON types; what is taken away is in it where anything is."""
        content = dataclasses.asdict(self)
        return {key: value for key, value in content.items() if value or key in ("tensors", "config", "files")}

    def __bool__(self) -> bool:
        return any((self.tensors, self.config, self.files, self.dropped, self.unset, self.removed))


@dataclass(frozen=True, slots=True)
class _Span:
    """Bytes of a changed file.

    Attributes:
        start: Offset of the first.
        end: Offset one past the last.
        origin: The bytes themselves, the file of the source that holds them, or what computes them; None for zeros.
        offset: Where they begin in that file, or in what is computed.
    """

    start: int
    end: int
    origin: bytes | str | Fill | None
    offset: int = 0


def amend(
    checkpoint: Checkpoint,
    amendments: Amendments,
    contents: Mapping[str, bytes] | None = None,
    computed: Mapping[str, Fill] | None = None,
) -> Checkpoint:
    """Returns a checkpoint with changes to what it holds; no weight has been read.

    Args:
        checkpoint: The source, which may be amended itself.
        amendments: The changes.
        contents: The files that come from elsewhere. Without them, the result has no files of these names.
        computed: What computes the bytes of tensors that are added or resized, by name.

    Raises:
        CheckpointError: They do not fit the checkpoint.
    """
    if not amendments:
        return checkpoint
    made = dict(contents or {})
    new: defaultdict[str, list[NewTensor]] = defaultdict(list)
    for tensor in amendments.tensors:
        new[tensor.shard].append(tensor)
    if missing := new.keys() - {shard.name for shard in checkpoint.shards}:
        raise CheckpointError(f"{checkpoint.name}: holds no shard {min(missing)} to add tensors to")
    if missing := {*amendments.dropped} - checkpoint.tensors.keys():
        raise CheckpointError(f"{checkpoint.name}: holds no {min(missing)} to drop")
    index = index_of(checkpoint)
    changed = {*new, *(checkpoint.tensors[name].shard for name in amendments.dropped)}
    shards, spans = [], {}
    for shard in checkpoint.shards:
        if shard.name in changed:
            shard, spans[shard.name] = _lay_out(checkpoint, shard, new[shard.name], amendments, computed or {})
            if index is not None and not shard.tensors:
                del spans[shard.name]
                continue
        shards.append(shard)
    if amendments.config or amendments.unset:
        if checkpoint.config is None or CONFIG not in checkpoint.sidecars:
            told = ", ".join([*amendments.config, *amendments.unset])
            raise CheckpointError(f"{checkpoint.name}: holds no {CONFIG}, in which {told} is set")
        config = _configured(json.loads(checkpoint.files.read(CONFIG)), amendments.config, amendments.unset)
        made[CONFIG] = _json(config)
    tensors = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    if (amendments.tensors or amendments.dropped) and index is not None:
        made[index] = _reindexed(checkpoint, index, amendments, tensors)
    spans |= {name: (_Span(0, len(content), content),) for name, content in made.items()}
    gone = {*amendments.removed, *(shard.name for shard in checkpoint.shards)} - {shard.name for shard in shards}
    view = _AmendedFiles(checkpoint.files, checkpoint.view or checkpoint.remote, spans, gone)
    kept = {name for name in checkpoint.sidecars if name not in amendments.files and name not in gone}
    return dataclasses.replace(
        checkpoint,
        shards=tuple(shards),
        tensors=tensors,
        config=read_config(view) if made.keys() & {CONFIG, *amendments.files} or gone else checkpoint.config,
        sidecars=tuple(sorted(kept | made.keys())),
        remote=None if checkpoint.remote is None else view,
        amended=(checkpoint.amended | spans.keys()) - gone,
        view=view,
    )


def _lay_out(
    checkpoint: Checkpoint,
    shard: Shard,
    new: Iterable[NewTensor],
    amendments: Amendments,
    computed: Mapping[str, Fill],
) -> tuple[Shard, tuple[_Span, ...]]:
    """Returns a shard with tensors added, resized or dropped, and where its bytes come from."""
    dropped = frozenset(amendments.dropped)
    placed = {tensor.name: tensor for tensor in shard.tensors if tensor.name not in dropped}
    origins: dict[str, TensorInfo | None] = dict(placed)
    for tensor in new:
        origin = None if tensor.begins_as is None else checkpoint.tensors.get(tensor.begins_as)
        other = checkpoint.tensors.get(tensor.name)
        if (tensor.begins_as is not None and origin is None) or (other is not None and other.shard != shard.name):
            raise CheckpointError(f"{shard.name}: {tensor.name} does not fit what {checkpoint.name} holds")
        if tensor.dtype not in ITEM_BYTES or (origin is not None and origin.dtype != tensor.dtype):
            raise CheckpointError(f"{tensor.name}: expected BF16, F16 or F32 as in the source, found {tensor.dtype}")
        if tensor.name == "__metadata__" or min(tensor.shape, default=0) < 0:
            raise CheckpointError(f"{tensor.name} of shape {list(tensor.shape)}: is no tensor")
        size = math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        placed[tensor.name] = TensorInfo(tensor.name, tensor.dtype, tensor.shape, shard.name, 0, size)
        origins[tensor.name] = origin
    # As the safetensors library orders them, so that every tensor is aligned: those of wide elements first.
    ordered = sorted(placed.values(), key=lambda tensor: -(tensor.end - tensor.start) / max(1, math.prod(tensor.shape)))
    metadata = checkpoint.files.header(shard.name)[1]
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for info in ordered:
        end = position + info.end - info.start
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    raw = len(text).to_bytes(8, "little") + text
    spans, tensors, position = [_Span(0, len(raw), raw)], [], len(raw)
    for info in ordered:
        origin, end = origins[info.name], position + info.end - info.start
        tensors.append(dataclasses.replace(info, start=position, end=end))
        if info.name in computed:
            spans.append(_Span(position, end, computed[info.name]))
            position = end
            continue
        filled = position if origin is None else min(end, position + origin.end - origin.start)
        if origin is not None:
            spans.append(_Span(position, filled, origin.shard, origin.start))
        spans.append(_Span(filled, end, None))
        position = end
    laid_out = Shard(shard.name, shard.path, position, hashlib.sha256(raw).hexdigest(), tuple(tensors))
    return laid_out, tuple(_joined(spans))


def _joined(spans: Iterable[_Span]) -> list[_Span]:
    """Returns spans without empty ones, and with those that follow each other in their file as one."""
    joined: list[_Span] = []
    for span in spans:
        last = joined[-1] if joined else None
        follows = last is not None and span.offset == last.offset + last.end - last.start
        if last is not None and follows and isinstance(span.origin, str) and span.origin == last.origin:
            joined[-1] = dataclasses.replace(last, end=span.end)
        elif span.start < span.end:
            joined.append(span)
    return joined


def _configured(config: Mapping[str, Any], changes: Mapping[str, Any], unset: Iterable[str] = ()) -> dict[str, Any]:
    """Returns a configuration with values set by keys that are joined by dots, and others taken out."""
    changed = dict(config)
    for path in unset:
        key, _, rest = path.partition(".")
        if rest:
            changed[key] = _configured(changed[key], {}, [rest])
        else:
            changed.pop(key, None)
    for path, value in changes.items():
        key, _, rest = path.partition(".")
        inner = changed.get(key)
        changed[key] = _configured(inner if isinstance(inner, Mapping) else {}, {rest: value}) if rest else value
    return changed


def _reindexed(checkpoint: Checkpoint, index: str, amendments: Amendments, tensors: Mapping[str, TensorInfo]) -> bytes:
    """Returns the text of the index with tensors added, resized or dropped."""
    new, dropped = amendments.tensors, amendments.dropped
    content = json.loads(checkpoint.files.read(index))
    content["weight_map"] = {name: shard for name, shard in content["weight_map"].items() if name not in {*dropped}}
    content["weight_map"] |= {tensor.name: tensor.shard for tensor in new}
    metadata = content.get("metadata")
    if dropped and isinstance(metadata, dict) and isinstance(metadata.get("total_parameters"), int):
        # Of codes that are packed, shapes tell nothing.
        metadata["total_parameters"] = sum(math.prod(tensor.shape) for tensor in tensors.values())
    replaced = [tensor.name for tensor in new if tensor.name in checkpoint.tensors and tensor.name not in dropped]
    before = [checkpoint.tensors[name] for name in (*replaced, *dropped)]
    after = [tensors[tensor.name] for tensor in new]
    for key, measure in (
        ("total_size", lambda tensor: tensor.end - tensor.start),
        ("total_parameters", lambda tensor: 0 if dropped else math.prod(tensor.shape)),
    ):
        if isinstance(metadata, dict) and isinstance(metadata.get(key), int):
            metadata[key] += sum(map(measure, after)) - sum(map(measure, before))
    return _json(content)


def _json(content: Any) -> bytes:
    """Returns JSON as transformers writes it, keys in their order."""
    return f"{json.dumps(content, indent=2, ensure_ascii=False)}\n".encode()


class _AmendedFiles:
    """The files of a checkpoint, some of them changed; what :class:`Remote` asks of a file that is not on this disk.

    Args:
        base: The source's files.
        remote: The same, where they are not on this machine.
        spans: What the changed files are made of.
        gone: Files that are not there any more.
    """

    def __init__(
        self, base: Files, remote: Remote | None, spans: Mapping[str, tuple[_Span, ...]], gone: Set[str]
    ) -> None:
        self._base, self._remote, self._spans, self._gone = base, remote, spans, gone

    @property
    def name(self) -> str:
        """What messages call the folder."""
        return self._base.name

    @property
    def revision(self) -> str | None:
        """The commit that the source's files are of."""
        return self._base.revision

    def now(self) -> Remote:
        """Returns the source's files as they are now."""
        return self._there().now()

    def walk(self) -> Iterable[tuple[str, str | None]]:
        """Yields every file, with a reason where it is passed over."""
        yield from ((name, why) for name, why in self._base.walk() if name not in self._gone)
        yield from ((name, None) for name in sorted(self._spans) if not self._base.has(name))

    def names(self) -> Iterable[str]:
        """Returns every file, sorted."""
        return sorted({*self._base.names(), *self._spans} - self._gone)

    def shown(self, file: str) -> str:
        """Returns what messages call a file."""
        return self._base.shown(file)

    def has(self, file: str) -> bool:
        """Returns whether there is such a file."""
        return file in self._spans or (file not in self._gone and self._base.has(file))

    def size(self, file: str) -> int:
        """Returns a file's size in bytes."""
        return self._spans[file][-1].end if file in self._spans else self._base.size(file)

    def stamp(self, file: str) -> str:
        """Returns what tells one state of the source's file from another."""
        return self._base.stamp(file)

    def read(self, file: str) -> bytes:
        """Returns a small file's content."""
        return self.read_range(file, 0, self.size(file)) if file in self._spans else self._base.read(file)

    def header(self, file: str) -> tuple[Shard, Mapping[str, str]]:
        """Returns what the header of a file of the source says."""
        return self._base.header(file)

    def read_range(self, file: str, start: int, end: int) -> bytes:
        """Returns some bytes of a file."""
        return b"".join(self.stream(file, start, end, threading.Event()))

    def read_into(self, file: str, data: memoryview, offset: int, stop: threading.Event) -> None:
        """Fills a buffer from an offset of a file; several threads may call it."""
        if file not in self._spans:
            self._base.read_into(file, data, offset, stop)
            return
        for span, first, last in self._overlapping(file, offset, offset + len(data)):
            part = data[first - offset : last - offset]
            at = span.offset + first - span.start
            if isinstance(span.origin, str):
                self._base.read_into(span.origin, part, at, stop)
            elif callable(span.origin):
                span.origin(part, at)
            else:
                part[:] = bytes(len(part)) if span.origin is None else span.origin[at : at + len(part)]

    def stream(self, file: str, start: int, end: int, stop: threading.Event) -> Iterator[bytes]:
        """Yields some bytes of a file as they come."""
        if file not in self._spans:
            if self._remote is not None:
                yield from self._remote.stream(file, start, end, stop)
            else:
                yield from self._pieces(file, start, end, _CHUNK, stop)
            return
        for span, first, last in self._overlapping(file, start, end):
            if isinstance(span.origin, str) and self._remote is not None:
                at = span.offset + first - span.start
                yield from self._remote.stream(span.origin, at, at + last - first, stop)
            else:
                yield from self._pieces(file, first, last, _COMPUTED_CHUNK if callable(span.origin) else _CHUNK, stop)

    def _pieces(self, file: str, start: int, end: int, size: int, stop: threading.Event) -> Iterator[bytes]:
        for offset in range(start, end, size):
            data = bytearray(min(size, end - offset))
            self.read_into(file, memoryview(data), offset, stop)
            yield bytes(data)

    def digest(self, file: str) -> tuple["hashlib._Hash", str | None]:
        """Returns what to feed a file's bytes to, and the digest they then have to have, None for a changed file."""
        return (hashlib.sha256(), None) if file in self._spans else self._there().digest(file)

    def altered(self, file: str, found: str) -> HubError:
        """Returns the error of a file that came with the wrong digest twice."""
        return self._there().altered(file, found)

    def fetch(
        self,
        file: str,
        path: Path,
        *,
        stop: threading.Event,
        advance: Callable[[int], None],
        edited: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Makes a local file equal to one of these; a changed file from its beginning, whatever is there."""
        if file not in self._spans:
            self._there().fetch(file, path, stop=stop, advance=advance, edited=edited)
            return
        with path.open("r+b" if path.exists() else "w+b", buffering=0) as target:
            target.truncate(0)
            for data in self.stream(file, 0, self.size(file), stop):
                target.write(data)
                advance(len(data))

    def _overlapping(self, file: str, start: int, end: int) -> Iterator[tuple[_Span, int, int]]:
        for span in self._spans[file]:
            if span.start < end and start < span.end:
                yield span, max(start, span.start), min(end, span.end)

    def _there(self) -> Remote:
        if self._remote is None:
            raise RuntimeError(f"{self.name}: is on this machine, where files are opened")
        return self._remote
