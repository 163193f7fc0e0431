"""Compares any two checkpoints tensor by tensor, streamed, and says in words what kind of edit lies between them."""

import filecmp
import json
import math
import os
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from ablate_shards.errors import ArchitectureError, DirectionsError
from ablate_shards.surgery.anatomy.architecture import Anatomy, Writer, dissect, split_layer
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_vector
from ablate_shards.surgery.checkpoint.headers import TensorInfo, read_header
from ablate_shards.surgery.diff.differences import (
    Ablation,
    Alignment,
    Diff,
    Fusion,
    Kind,
    TensorDiff,
    common_ending,
    leaf,
)
from ablate_shards.surgery.diff.verdict import describe
from ablate_shards.surgery.directions.directions import Directions, apply_gain, biproject
from ablate_shards.surgery.machine.devices import cores
from ablate_shards.surgery.machine.files import pread_into
from ablate_shards.surgery.machine.progress import Progress

if TYPE_CHECKING:
    import torch

    from ablate_shards.kernels.measure.sketch import Blocks, Change

__all__ = ["DiffOptions", "diff"]

_CHUNK = 1 << 20
_BLOCK = 1 << 18
_LONGEST_ROW = 1 << 22
_LEAST_SIDE = 8
_LEAST_RANK = 8
_SKETCH_BYTES = 10
_LEAST_MEMORY_PER_JOB = 64_000_000
_RUNS, _RUN = 4, 256
_ALIKE = 0.9
_FEW = 1e-3
_ABLATION = 0.9
_SHOWN = 8
#: Unit in the last place of a float dtype: relative to the power of two below a value, and at least.
_UNITS = {
    "F64": (2.0**-52, 2.0**-149),
    "F32": (2.0**-23, 2.0**-149),
    "BF16": (2.0**-7, 2.0**-133),
    "F16": (2.0**-10, 2.0**-24),
    "F8_E4M3": (2.0**-3, 2.0**-9),
    "F8_E5M2": (2.0**-2, 2.0**-16),
}
_TORCH_NAMES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_COMPONENTS = (
    ("attention", re.compile(r"attn|attention")),
    ("mlp", re.compile(r"mlp|experts?\b|ffn|feed_forward|block_sparse_moe|fc[12]\b")),
    ("norm", re.compile(r"norm|(?:^|\.)ln_")),
    ("embedding", re.compile(r"embed|wte|wpe")),
    ("head", re.compile(r"lm_head|embed_out")),
)
_HEAD_PARTS = {"model", "layers", "h", "blocks", "block", "language_model", "transformer"}
_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class DiffOptions:
    """How to compare.

    Attributes:
        memory: Bytes that all working buffers may take together.
        jobs: Tensors compared at a time, one per available core if None.
        rank: The largest rank that is recognised as low; a difference of a higher one counts as full rank.
    """

    memory: int = 256_000_000
    jobs: int | None = None
    rank: int = 32


def diff(
    first: Checkpoint,
    second: Checkpoint,
    options: DiffOptions,
    progress: Progress,
    directions: Directions | None = None,
) -> Diff:
    """Compares two checkpoints; neither is held in memory, and no model is built.

    Tensors are matched by name, then by shape and values. Equal bytes are found by comparing bytes; only what
    differs is decoded. Experts of a stack are measured one by one.

    Args:
        first: The checkpoint to start from.
        second: The checkpoint to compare with it.
        options: How to compare.
        progress: Receives how many bytes of each have been compared.
        directions: Directions that changes are compared with.

    Returns:
        The differences, tensors in the order of the first checkpoint.

    Raises:
        DirectionsError: The directions are not as long as the hidden size.
        ExecuteError: A shard was cut short meanwhile.
    """
    anatomy = _anatomy(first)
    if directions is not None and anatomy is not None and directions.hidden_size != anatomy.hidden_size:
        raise DirectionsError(
            f"the directions have {directions.hidden_size} entries, but the hidden size of {first.path} is "
            f"{anatomy.hidden_size}; give directions of this model"
        )
    with _Comparer(first, second, anatomy, options, progress) as comparer:
        found = comparer.compare(directions)
    found = replace(found, metadata=_metadata(first, second), files=_files(first, second))
    return replace(found, verdict=describe(found))


@dataclass(frozen=True, slots=True)
class _Found:
    """A difference, and the directions it lies along: ``[k, d]`` by axis, best first."""

    tensor: TensorDiff
    bases: tuple["torch.Tensor", ...] = ()


class _Comparer:
    """Compares tensor after tensor in threads of its own."""

    def __init__(
        self, first: Checkpoint, second: Checkpoint, anatomy: Anatomy | None, options: DiffOptions, progress: Progress
    ) -> None:
        self._first, self._second, self._anatomy, self._progress = first, second, anatomy, progress
        self._jobs = max(1, min(options.jobs or cores(), options.memory // _LEAST_MEMORY_PER_JOB))
        self._room = options.memory // self._jobs
        self._rank = options.rank
        self._writers = {writer.name: writer for writer in anatomy.writers} if anatomy else {}
        self._places = _Places(first, anatomy)
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._single = False

    def __enter__(self) -> Self:
        self._files = tuple(
            {shard.name: self._stack.enter_context(shard.path.open("rb")).fileno() for shard in checkpoint.shards}
            for checkpoint in (self._first, self._second)
        )
        self._inodes = tuple(
            {name: (stat.st_dev, stat.st_ino) for name, file in files.items() for stat in [os.fstat(file)]}
            for files in self._files
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def compare(self, directions: Directions | None) -> Diff:
        """Returns what differs in the tensors, without the verdict."""
        pairs, lost, added = self._match()
        fused = [*self._fuse(lost, added, split=False), *self._fuse(added, lost, split=True)]
        self._progress.begin(sum(ours.end - ours.start for ours, _ in pairs))
        compass = _Compass(self._first, directions) if directions is not None else None
        tensors, first_basis = [], None
        equal = 0
        pool = ThreadPoolExecutor(self._jobs)
        try:
            for found in pool.map(lambda pair: self._compare(*pair), pairs):
                tensor = found.tensor
                if tensor.kind == "equal" and tensor.name == tensor.new_name:
                    equal += 1
                    continue
                if tensor.ablation is not None:
                    first_basis = found.bases[0] if first_basis is None else first_basis
                    cosine = _cosine(found.bases[0].numpy(), first_basis.numpy())
                    tensor = replace(tensor, ablation=replace(tensor.ablation, same_direction=cosine))
                if compass is not None:
                    bases = [basis.numpy() for basis in found.bases]
                    alignment = compass.align(bases, tensor.layer, self._writers.get(tensor.name))
                    tensor = replace(tensor, alignment=alignment)
                tensors.append(tensor)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return Diff(
            first=str(self._first.path),
            second=str(self._second.path),
            family=self._anatomy.family if self._anatomy else None,
            equal=equal,
            tensors=tuple(tensors),
            lost=tuple(tensor.name for tensor in lost),
            added=tuple(tensor.name for tensor in added),
            fused=tuple(fused),
            metadata=(),
            files=(),
        )

    # ------------------------------------------------------------------------------------ which is which

    def _match(self) -> tuple[list[tuple[TensorInfo, TensorInfo]], list[TensorInfo], list[TensorInfo]]:
        """Pairs tensors by name, then what is left by shape and values; returns pairs, lost and added ones."""
        ours, theirs = self._first.tensors, self._second.tensors
        partner = {name: theirs[name] for name in ours if name in theirs}
        lost = [tensor for name, tensor in ours.items() if name not in theirs]
        added = [tensor for name, tensor in theirs.items() if name not in ours]
        groups: dict[tuple[int, ...], tuple[list[TensorInfo], list[TensorInfo]]] = defaultdict(lambda: ([], []))
        for side, tensors in enumerate((lost, added)):
            for tensor in tensors:
                if math.prod(tensor.shape):
                    groups[tensor.shape][side].append(tensor)
        for olds, news in groups.values():
            if olds and news:
                partner |= self._renamed(olds, news)
        taken = {tensor.name for tensor in partner.values()}
        pairs = [(tensor, partner[name]) for name, tensor in ours.items() if name in partner]
        return (
            pairs,
            [tensor for tensor in lost if tensor.name not in partner],
            [tensor for tensor in added if tensor.name not in taken],
        )

    def _renamed(self, olds: Sequence[TensorInfo], news: Sequence[TensorInfo]) -> dict[str, TensorInfo]:
        """Pairs tensors of one shape whose values agree, those whose names end alike first."""
        samples = tuple(
            _unit(np.stack([self._sample(side, tensor) for tensor in tensors]))
            for side, tensors in enumerate((olds, news))
        )
        likely = []
        for start in range(0, len(olds), 256):
            cosines = samples[0][start : start + 256] @ samples[1].T
            for row, column in np.argwhere(cosines > _ALIKE):
                old, new = olds[start + int(row)], news[int(column)]
                ending = common_ending(old.name, new.name)
                # Gains and biases are alike everywhere, so that only the name can tell them apart.
                if len(old.shape) > 1 or ending > 1:
                    likely.append((-round(float(cosines[row, column]), 2), -ending, start + int(row), int(column)))
        likely.sort(key=(lambda item: item) if len(olds[0].shape) > 1 else (lambda item: (item[1], item[0], *item[2:])))
        found: dict[str, TensorInfo] = {}
        taken: set[int] = set()
        for _, _, row, column in likely:
            if olds[row].name not in found and column not in taken:
                found[olds[row].name] = news[column]
                taken.add(column)
        return found

    def _sample(self, side: int, tensor: TensorInfo) -> np.ndarray:
        """Reads a few runs of values, spread over a tensor."""
        count = math.prod(tensor.shape)
        width = (tensor.end - tensor.start) // count if count else 1
        starts = sorted({max(0, (count - _RUN) * step // (_RUNS - 1)) for step in range(_RUNS)})
        values = [
            self._values(side, tensor, tensor.start + start * width, min(_RUN, count - start) * width)
            for start in starts
        ]
        return np.concatenate(values)

    def _values(self, side: int, tensor: TensorInfo, offset: int, size: int) -> np.ndarray:
        raw = bytearray(size)
        pread_into(self._files[side][tensor.shard], memoryview(raw), offset)
        if tensor.dtype not in _UNITS:
            return np.frombuffer(raw, np.uint8).astype(np.float64)
        values: np.ndarray = np.nan_to_num(_typed(raw, tensor.dtype).double().numpy(), posinf=0, neginf=0)
        return values

    def _fuse(self, parts: list[TensorInfo], wholes: list[TensorInfo], *, split: bool) -> Iterator[Fusion]:
        """Finds tensors whose bytes are those of others, one after the other, and strikes both off the lists."""
        inner, outer = (1, 0) if split else (0, 1)
        heads: dict[tuple[str, bytes], list[TensorInfo]] = defaultdict(list)
        for part in parts:
            if part.end - part.start >= _RUN:
                heads[part.dtype, self._head(inner, part, part.start)].append(part)
        for whole in list(wholes):
            position = whole.start
            chosen: dict[str, TensorInfo] = {}
            while heads and position < whole.end:
                fitting = (
                    part
                    for part in heads.get((whole.dtype, self._head(outer, whole, position)), ())
                    if part.name not in chosen and part.end - part.start <= whole.end - position
                )
                if (found := next(fitting, None)) is None:
                    break
                chosen[found.name] = found
                position += found.end - found.start
            if position < whole.end or len(chosen) < 2:
                continue
            equal, position = 0, whole.start
            for part in chosen.values():
                size = part.end - part.start
                starts = (position, part.start) if split else (part.start, position)
                shards = (whole.shard, part.shard) if split else (part.shard, whole.shard)
                equal += self._same_bytes(shards, starts, size)
                position += size
            parts[:] = [part for part in parts if part.name not in chosen]
            wholes.remove(whole)
            yield Fusion(whole.name, tuple(chosen), split, equal)

    def _head(self, side: int, tensor: TensorInfo, offset: int) -> bytes:
        raw = bytearray(min(_RUN, tensor.end - offset))
        pread_into(self._files[side][tensor.shard], memoryview(raw), offset)
        return bytes(raw)

    # ------------------------------------------------------------------------------------ what differs

    def _compare(self, ours: TensorInfo, theirs: TensorInfo) -> _Found:
        place, layer, component = self._places.of(ours.name)
        blank = TensorDiff(
            name=ours.name,
            new_name=theirs.name,
            dtype=ours.dtype,
            new_dtype=theirs.dtype,
            shape=ours.shape,
            new_shape=theirs.shape,
            place=place,
            layer=layer,
            component=component,
            writer=ours.name in self._writers if self._anatomy else None,
            kind="equal",
            elements=math.prod(ours.shape),
        )
        size = ours.end - ours.start
        shards, starts = (ours.shard, theirs.shard), (ours.start, theirs.start)
        if ours.dtype == theirs.dtype and size == theirs.end - theirs.start and self._same_bytes(shards, starts, size):
            self._progress.advance(size)
            return _Found(blank if ours.shape == theirs.shape else replace(blank, kind="reshaped"))
        try:
            if ours.shape != theirs.shape:
                return _Found(replace(blank, kind=self._reshaped(ours, theirs)))
            if ours.dtype not in _UNITS or theirs.dtype not in _UNITS:
                return _Found(self._compare_raw(blank, ours, theirs))
            return self._compare_values(blank, ours, theirs)
        finally:
            self._progress.advance(size)

    def _same_bytes(self, shards: tuple[str, str], starts: tuple[int, int], size: int) -> bool:
        inodes = (self._inodes[0][shards[0]], self._inodes[1][shards[1]])
        if inodes[0] == inodes[1] and starts[0] == starts[1]:
            return True
        files = self._files[0][shards[0]], self._files[1][shards[1]]
        length = min(_CHUNK, size)
        buffers = tuple(np.empty(length, np.uint8) for _ in files)
        for done in range(0, size, _CHUNK):
            count = min(_CHUNK, size - done)
            for file, start, buffer in zip(files, starts, buffers, strict=True):
                pread_into(file, buffer[:count].data, start + done)
            if not _equal(buffers[0][:count], buffers[1][:count]):
                return False
        return True

    def _reshaped(self, ours: TensorInfo, theirs: TensorInfo) -> Kind:
        """Distinguishes a transposed matrix, and added or dropped rows, from any other change of shape."""
        if len(ours.shape) != 2 or ours.dtype != theirs.dtype or ours.dtype not in _UNITS:
            return "other shape"
        width = (ours.end - ours.start) // max(math.prod(ours.shape), 1)
        if ours.shape == theirs.shape[::-1] and width:
            few = min(_LEAST_SIDE, theirs.shape[0])
            wanted = self._values(1, theirs, theirs.start, few * theirs.shape[1] * width).reshape(few, -1)
            step = max(1, _BLOCK // ours.shape[1])
            for row in range(0, ours.shape[0], step):
                count = min(step, ours.shape[0] - row)
                start = ours.start + row * ours.shape[1] * width
                block = self._values(0, ours, start, count * ours.shape[1] * width).reshape(count, -1)
                if not np.array_equal(block[:, :few].T, wanted[:, row : row + count]):
                    return "other shape"
            return "transposed"
        if ours.shape[1] == theirs.shape[1]:
            size = min(ours.end - ours.start, theirs.end - theirs.start)
            if self._same_bytes((ours.shard, theirs.shard), (ours.start, theirs.start), size):
                return "resized"
        return "other shape"

    def _compare_raw(self, blank: TensorDiff, ours: TensorInfo, theirs: TensorInfo) -> TensorDiff:
        """Counts the values that differ of a dtype that is not decoded."""
        if ours.dtype != theirs.dtype:
            return replace(blank, kind="raw", changed=blank.elements)
        size = ours.end - ours.start
        width = max(1, size // max(blank.elements, 1))
        changed, step = 0, _CHUNK // width * width
        for done in range(0, size, step):
            raw = tuple(np.empty(min(step, size - done), np.uint8) for _ in range(2))
            for side, tensor in enumerate((ours, theirs)):
                pread_into(self._files[side][tensor.shard], raw[side].data, tensor.start + done)
            changed += int((raw[0] != raw[1]).reshape(-1, width).any(axis=1).sum())
        return replace(blank, kind="raw", changed=changed)

    def _compare_values(self, blank: TensorDiff, ours: TensorInfo, theirs: TensorInfo) -> _Found:
        from ablate_shards.kernels.measure.sketch import Unit, compare_matrix, compare_vector

        self._one_thread_each()
        unit = Unit(*np.maximum(_UNITS[ours.dtype], _UNITS[theirs.dtype]).tolist())
        count, rows, columns = _matrices(ours.shape)
        if not rows:
            blocks = self._blocks(ours, theirs, 0, (1, blank.elements))
            return _describe(blank, [compare_vector(blocks, unit)])
        changes = []
        most = max(_LEAST_RANK, min(self._rank, self._room // (_SKETCH_BYTES * (rows + columns)) - _LEAST_RANK))
        for number in range(count):
            first = number * rows * columns
            if count > 1 and ours.dtype == theirs.dtype:
                size = (ours.end - ours.start) // count
                starts = (ours.start + number * size, theirs.start + number * size)
                if self._same_bytes((ours.shard, theirs.shard), starts, size):
                    continue
            blocks = self._blocks(ours, theirs, first, (rows, columns))
            changes.append(compare_matrix(blocks, (rows, columns), unit, most))
        return _describe(blank, changes, count)

    def _one_thread_each(self) -> None:
        """Keeps torch to one thread per tensor once something differs; where nothing does, it is never loaded."""
        from ablate_shards.kernels.choose import one_thread

        with self._lock:
            if not self._single:
                self._single = True
                self._stack.enter_context(one_thread("torch"))

    def _blocks(self, ours: TensorInfo, theirs: TensorInfo, first: int, shape: tuple[int, int]) -> "Blocks":
        """Returns what yields a matrix by row blocks, from memory after the first time if it fits."""
        rows, columns = shape
        flat = rows == 1
        total = rows * columns
        step = _BLOCK if flat else max(1, _BLOCK // columns) * columns

        def read() -> Iterator[tuple[int, "torch.Tensor", "torch.Tensor"]]:
            for start in range(0, total, step):
                size = min(step, total - start)
                old, new = (self._read(side, tensor, first + start, size) for side, tensor in enumerate((ours, theirs)))
                added = new.sub_(old).float()
                old = old.float()
                yield (
                    start // columns,
                    old if flat else old.view(-1, columns),
                    added if flat else added.view(-1, columns),
                )

        if 8 * total > self._room // 2:
            return read
        kept: list[tuple[int, torch.Tensor, torch.Tensor]] = []

        def recall() -> Iterator[tuple[int, "torch.Tensor", "torch.Tensor"]]:
            if kept:
                yield from kept
                return
            found = []
            for block in read():
                found.append(block)
                yield block
            kept.extend(found)

        return recall

    def _read(self, side: int, tensor: TensorInfo, first: int, count: int) -> "torch.Tensor":
        import torch

        width = (tensor.end - tensor.start) // math.prod(tensor.shape)
        raw = torch.empty(count * width, dtype=torch.uint8)
        pread_into(self._files[side][tensor.shard], raw.numpy().data, tensor.start + first * width)
        typed = raw.view(getattr(torch, _TORCH_NAMES[tensor.dtype]))
        return typed if tensor.dtype == "F64" else typed.to(torch.float32)


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Returns how many matrices a tensor holds and their sides; no rows where it is a vector or too thin."""
    if len(shape) == 3 and min(shape[1:]) >= _LEAST_SIDE:
        count, rows, columns = shape
    elif len(shape) > 1:
        count, rows, columns = 1, shape[0], math.prod(shape[1:])
    else:
        return 1, 0, 0
    if not count or min(rows, columns) < _LEAST_SIDE or columns > _LONGEST_ROW:
        return 1, 0, 0
    return count, rows, columns


def _describe(blank: TensorDiff, changes: Sequence["Change"], count: int = 1) -> _Found:
    """Pools the changes of a tensor's matrices."""
    total = replace(
        blank,
        changed=sum(change.changed for change in changes),
        beyond=sum(change.beyond for change in changes),
        units=max(change.units for change in changes),
        largest=max(change.largest for change in changes),
        nonfinite=sum(change.nonfinite for change in changes),
    )
    energy = sum(change.energy for change in changes)
    before = sum(change.before for change in changes)
    total = replace(total, relative=math.sqrt(energy / before) if before else None)
    if total.nonfinite:
        return _Found(replace(total, kind="non-finite"))
    if not energy:
        return _Found(replace(total, kind="retyped" if blank.dtype != blank.new_dtype else "rounding"))
    moved = [change for change in changes if change.energy and change.fit is not None]
    few = total.changed <= max(4, _FEW * total.elements)
    if not moved:
        kind: Kind = "rounding" if not total.beyond else "sparse" if few and total.elements > 64 else "vector"
        return _Found(replace(total, kind=kind))
    fits = [change.fit for change in moved if change.fit is not None]
    loudest = max(moved, key=lambda change: change.energy)
    fit = loudest.fit
    if fit is None:
        return _Found(total)
    full = any(other.form == "full" for other in fits)
    rank = max(other.rank for other in fits)
    after = sum(other.energy for other in fits)
    length = min(_SHOWN, *(len(other.values) for other in fits))
    shares = np.sum([other.values[:length].square().numpy() for other in fits], axis=0) / (after or 1.0)
    forms = {other.form for other in fits}
    total = replace(
        total,
        form=None if full else "plain" if forms == {"plain"} else next(iter(sorted(forms - {"plain"}))),
        rank=rank,
        stable_rank=fit.energy / float(fit.values[0].square()) if float(fit.values[0]) else None,
        values=tuple(fit.values[:_SHOWN].tolist()),
        shares=tuple(shares.tolist()) if after else (),
        row_drift=max(change.row_drift or 0.0 for change in moved),
        column_drift=max(change.column_drift or 0.0 for change in moved),
        kept=tuple(
            name
            for name, keeps in (
                ("rows", all(change.rows_kept for change in moved)),
                ("columns", all(change.columns_kept for change in moved)),
            )
            if keeps
        ),
    )
    structured = not full and rank > 0 and sum(total.shares) > 0.5
    if not total.beyond and (blank.dtype != blank.new_dtype or not structured):
        return _Found(replace(total, kind="rounding"))
    if few:
        return _Found(replace(total, kind="sparse"))
    if full:
        return _Found(
            replace(total, kind="full-rank"), (fit.left[:, :1].T.contiguous(), fit.right[:, :1].T.contiguous())
        )
    if not rank:
        return _Found(replace(total, kind="rounding" if total.form == "plain" else "scaled"))
    projections = [change.projection for change in moved if change.projection is not None]
    best = loudest.projection
    if (
        best is not None
        and len(projections) == len([other for other in fits if other.rank])
        and all(other.axis == best.axis and other.cosine > _ABLATION for other in projections)
    ):
        weights = [change.energy for change in moved if change.projection is not None]
        coefficient = float(np.average([other.coefficient for other in projections], weights=weights))
        ablation = Ablation(best.axis, coefficient, min(other.cosine for other in projections), 1.0)
        return _Found(replace(total, kind="ablation", ablation=ablation), (best.basis,))
    return _Found(replace(total, kind="low-rank"), (fit.left[:, :1].T.contiguous(), fit.right[:, :1].T.contiguous()))


# ---------------------------------------------------------------------------------------- names and directions


class _Places:
    """Finds where in the model a tensor lies, from its name."""

    def __init__(self, checkpoint: Checkpoint, anatomy: Anatomy | None) -> None:
        heads = Counter(_head_of(name) for name in checkpoint.tensors if split_layer(name)[0] is not None)
        known = {_head_of(writer.name) for writer in anatomy.writers if not writer.mtp} if anatomy else set()
        self._decoders = (known & set(heads)) or {head for head, _ in heads.most_common(1)}
        self._components = {writer.name: str(writer.component) for writer in anatomy.writers} if anatomy else {}

    def of(self, name: str) -> tuple[str, int | None, str]:
        """Returns the place as shown, the decoder layer and the component."""
        layer, inner = split_layer(name)
        component = self._components.get(name) or next(
            (what for what, pattern in _COMPONENTS if pattern.search(inner)), leaf(name)
        )
        head = _head_of(name)
        if layer is not None and head in self._decoders:
            return str(layer), layer, component
        parts = [part for part in (head if layer is not None else name).split(".") if part not in _HEAD_PARTS]
        tower = next((part for part in parts if part in ("mtp", "visual") or "tower" in part or "vision" in part), None)
        if layer is None:
            return tower or "–", None, component
        return f"{tower or '.'.join(parts) or head} {layer}", None, component


def _head_of(name: str) -> str:
    """Returns what stands before the layer's number; the whole name outside of layers."""
    layer, inner = split_layer(name)
    return name if layer is None else name.removesuffix(f".{layer}.{inner}")


class _Compass:
    """Compares directions of differences with given ones, as they are and as an ablation would use them."""

    def __init__(self, checkpoint: Checkpoint, directions: Directions) -> None:
        self._checkpoint, self._directions = checkpoint, directions
        self._bases: dict[tuple[int, int | None, str | None], np.ndarray | None] = {}

    def align(self, bases: Sequence[np.ndarray], layer: int | None, writer: Writer | None) -> Alignment | None:
        """Returns the best fit of either side of a difference that is as long as a direction."""
        fitting = [basis for basis in bases if basis.shape[1] == self._directions.hidden_size]
        found = {
            (source, target is not None): cosine
            for basis in fitting
            for source in self._directions.layers
            for target in dict.fromkeys((None, layer))
            if (given := self._basis(source, target, writer)) is not None
            for cosine in [_cosine(basis, given)]
        }
        if not found:
            return None
        (best_layer, biprojected), best = max(found.items(), key=lambda item: (item[1], item[0]))
        own = [cosine for (source, _), cosine in found.items() if source == layer]
        return Alignment(max(own, default=None), best_layer, best, biprojected)

    def _basis(self, source: int, target: int | None, writer: Writer | None) -> np.ndarray | None:
        key = (source, target, writer.gain if writer else None)
        if key not in self._bases:
            basis = self._directions.basis[source].astype(np.float64)
            references = self._directions.reference
            try:
                if target is not None:
                    if source not in references or target not in references:
                        raise DirectionsError("no reference mean")
                    basis, _ = biproject(basis, [references[source], references[target]])
                if writer is not None and writer.gain is not None:
                    gain = read_vector(self._checkpoint, self._checkpoint.tensors[writer.gain])
                    basis = apply_gain(basis, gain + writer.gain_offset)
                self._bases[key] = basis
            except DirectionsError:
                self._bases[key] = None
        return self._bases[key]


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Returns the mean cosine of the principal angles between two spaces, zero where their lengths differ."""
    if one.shape[1] != other.shape[1]:
        return 0.0
    return min(1.0, float(np.linalg.norm(one @ other.T)) / math.sqrt(min(len(one), len(other))))


def _unit(samples: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(samples, axis=1, keepdims=True)
    # Two tensors of zeros are alike, too.
    return np.where(norms > 0, samples / np.where(norms > 0, norms, 1), 1 / math.sqrt(samples.shape[1]))


def _typed(raw: bytearray, dtype: str) -> "torch.Tensor":
    import torch

    return torch.frombuffer(raw, dtype=getattr(torch, _TORCH_NAMES[dtype]))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    whole = len(one) // 8 * 8
    return np.array_equal(one[:whole].view(np.uint64), other[:whole].view(np.uint64)) and np.array_equal(
        one[whole:], other[whole:]
    )


def _anatomy(checkpoint: Checkpoint) -> Anatomy | None:
    try:
        return dissect(checkpoint.tensors, checkpoint.config)
    except ArchitectureError:
        return None


# ---------------------------------------------------------------------------------------- beside the weights


def _metadata(first: Checkpoint, second: Checkpoint) -> tuple[str, ...]:
    ours, theirs = (
        {key: value for shard in checkpoint.shards for key, value in read_header(shard.path)[1].items()}
        for checkpoint in (first, second)
    )
    lines = [f"header metadata: {line}" for line in _changes(ours, theirs)]
    if len(first.shards) != len(second.shards):
        lines.append(f"sharding: {len(first.shards)} files, then {len(second.shards)}")
    return tuple(lines)


def _files(first: Checkpoint, second: Checkpoint) -> tuple[str, ...]:
    """Compares everything beside the weights; a single file has nothing beside it."""
    if not (first.path.is_dir() and second.path.is_dir()):
        return ()
    lines = []
    ours, theirs = (
        {name for name in checkpoint.sidecars if not name.endswith(_INDEX)} for checkpoint in (first, second)
    )
    for name in sorted(ours | theirs):
        if name not in theirs:
            lines.append(f"{name}: lost")
        elif name not in ours:
            lines.append(f"{name}: added")
        elif not filecmp.cmp(first.root / name, second.root / name, shallow=False):
            lines += [f"{name}: {line}" for line in _file_changes(first.root / name, second.root / name)]
    left_out = [{name for name, _ in checkpoint.left_out} for checkpoint in (first, second)]
    lines += [f"{name}: lost (not compared)" for name in sorted(left_out[0] - left_out[1])]
    lines += [f"{name}: added (not compared)" for name in sorted(left_out[1] - left_out[0])]
    return tuple(lines)


def _file_changes(one: Path, other: Path) -> list[str]:
    if one.suffix == ".json" and max(one.stat().st_size, other.stat().st_size) < _CHUNK:
        try:
            ours, theirs = (json.loads(path.read_bytes()) for path in (one, other))
        except (ValueError, RecursionError):
            return ["differs"]
        if isinstance(ours, dict) and isinstance(theirs, dict):
            return _changes(_flat(ours), _flat(theirs)) or ["differs in layout only"]
    return ["differs"]


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return found


def _changes(ours: Mapping[str, str], theirs: Mapping[str, str]) -> list[str]:
    lines = []
    for key in dict.fromkeys([*ours, *theirs]):
        if key not in theirs:
            lines.append(f"{key} lost (was {_short(ours[key])})")
        elif key not in ours:
            lines.append(f"{key} added ({_short(theirs[key])})")
        elif ours[key] != theirs[key]:
            lines.append(f"{key} {_short(ours[key])} → {_short(theirs[key])}")
    return lines


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
