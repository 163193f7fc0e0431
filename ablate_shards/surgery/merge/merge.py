"""Merges a LoRA adapter into a checkpoint on its shards: ``W + s·B·A``, and every other byte as it was."""

import dataclasses
import hashlib
import json
import math
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import numpy as np

from ablate_shards import __version__
from ablate_shards.errors import AdapterError, ArchitectureError, ExecuteError, PlanError, UsageError
from ablate_shards.kernels.codecs.plain import STORED, decoded, encode
from ablate_shards.kernels.form import GREATEST
from ablate_shards.kernels.merge.merge_numpy import NumpyMerger, update_norm
from ablate_shards.names import MERGE_RECEIPT_NAME, RECEIPT_NAMES, WEIGHTS_NAME
from ablate_shards.surgery.anatomy.architecture import Anatomy, dissect
from ablate_shards.surgery.checkpoint.checkpoint import ITEM_BYTES, Checkpoint, Files, TensorInfo, files_of
from ablate_shards.surgery.edit.blocks import BlockEditor
from ablate_shards.surgery.edit.execute import Operation
from ablate_shards.surgery.edit.receipt import incomplete, items, load, number, revision_of, seal, source_record, typed
from ablate_shards.surgery.edit.sections import Reader, Section
from ablate_shards.surgery.machine.devices import find_device, torch_dtype
from ablate_shards.surgery.machine.staging import check_out
from ablate_shards.surgery.merge.adapter import Adapter, LowRank, base_digest, read_adapter

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Form
    from ablate_shards.kernels.merge.merge_torch import Merger

__all__ = [
    "MERGE_FORMAT",
    "MergeEdit",
    "MergeEditor",
    "MergePlan",
    "MergeReceipt",
    "MergeResult",
    "Merged",
    "check_merge_out",
    "merging",
    "plan_merge",
    "read_merge_receipt",
]

MERGE_FORMAT = "ablate-shards.merge/1"

_LARGEST_SCALE = 1000
_MOST_CANDIDATES = 6
_WITH_PEFT = "merge it with peft itself"
_WRAPPERS = frozenset({"base_model", "language_model", "model", "transformer"})
#: Elements of a parameter that is replaced or compared, read at a time.
_PIECE = 1 << 18
#: Matrices that a fused stack of experts is stored as, one tensor each, in the order of their rows.
_UNFUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True, slots=True)
class MergeEdit:
    """One tensor to change, and what of the adapter changes it.

    Attributes:
        name: The tensor.
        shard: The shard that holds it.
        dtype: Its safetensors dtype.
        shape: Its shape as stored.
        start: Offset of its first byte in the shard.
        end: Offset one past its last byte.
        kind: ``low-rank`` adds ``s·B·A``, ``bias`` adds ``s`` times a vector, ``replaced`` puts another there.
        source: The adapter's tensors: A and B, or the one that is added or put there.
        rank: Columns of B, of one expert.
        scale: The ``s`` above.
        transposed: Whether the stored weight is ``(B·A)ᵀ`` in shape.
        experts: Experts that A and B are stacked of, 1 for a single matrix.
        expert: The one that this tensor is of, None where it holds all of them.
        rows: The rows of B that this tensor takes, None for all.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    kind: Literal["low-rank", "bias", "replaced"]
    source: tuple[str, ...]
    rank: int | None = None
    scale: float = 1.0
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        adapter_sha256: Digest of the adapter.
        scale: What every update is multiplied by, beside the adapter's own scale.
        edits: The edits, in the order of shards and bytes.
        notes: What the user should know before the run, a line each.
    """

    adapter_sha256: str
    scale: float
    edits: tuple[MergeEdit, ...]
    notes: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON types."""
        return dataclasses.asdict(self)

    def sha256(self) -> str:
        """Returns the digest of the plan's canonical JSON form."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class MergeResult:
    """What was measured of one changed tensor.

    Attributes:
        change: Norm of what was added, relative to the norm of what was there, before rounding; None where
            that was zero.
        blake3: Digest of the tensor's bytes in the output, as re-read from the written file.
    """

    change: float | None
    blake3: str


@dataclass(frozen=True, slots=True)
class Merged:
    """What a merge did.

    Attributes:
        plan: What was planned.
        results: What was measured, by tensor.
    """

    plan: MergePlan
    results: Mapping[str, MergeResult]


@dataclass(frozen=True, slots=True)
class MergeReceipt:
    """What the receipt of a merge says that can be checked, as read.

    Attributes:
        revision: The commit of the source, None where it has no history.
        shards: Digests of the source's headers, by shard.
        copied: The files that were copied beside the shards.
        adapter_sha256: Digest of the adapter.
        scale: What every update was multiplied by, beside the adapter's own scale.
        tensors: The changed tensors, by name.
        results: What it says was measured of them, by name.
        altered: Whether its bytes are not the ones that were written.
    """

    revision: str | None
    shards: Mapping[str, str]
    copied: tuple[str, ...]
    adapter_sha256: str
    scale: float
    tensors: Mapping[str, TensorInfo]
    results: Mapping[str, MergeResult]
    altered: bool


def check_merge_out(checkpoint: Checkpoint, adapter: Path, out: Path, *, overwrite: bool) -> None:
    """Refuses an output folder that would lose something, before anything is read.

    Raises:
        ExecuteError: OUT exists and may not be replaced, or its parent does not exist.
        UsageError: OUT is, or is in, MODEL or ADAPTER or holds it.
    """
    check_out(checkpoint.path, files_of(checkpoint), out, overwrite=overwrite)
    if out.resolve() in (adapter.resolve(), *adapter.resolve().parents):
        raise UsageError(f"{out}: holds ADAPTER, which would be replaced; name another folder")


def merging(checkpoint: Checkpoint, adapter: Adapter, plan: MergePlan) -> Operation[MergeEdit, MergeResult]:
    """Returns the operation that merges an adapter, for whatever carries operations out."""
    return Operation(
        edits=plan.edits,
        identity={"the plan": plan.sha256()},
        editor=lambda run, stop: MergeEditor(run.device, run.memory, run.jobs, stop, adapter),
        result=MergeResult,
        receipt_name=MERGE_RECEIPT_NAME,
        receipt=lambda results, device: _receipt_text(checkpoint, adapter, plan, results, device),
    )


# ------------------------------------------------------------------------------------------- planning


def plan_merge(checkpoint: Checkpoint, adapter: Adapter, scale: float) -> MergePlan:
    """Finds the weight of every tensor of an adapter.

    Args:
        checkpoint: The base.
        adapter: What to merge.
        scale: What every update is multiplied by, beside the adapter's own scale.

    Returns:
        The plan; of the weights, nothing has been read but what tells one base from another.

    Raises:
        AdapterError: A tensor of the adapter matches no weight, or more than one, or not in shape; or the adapter
            was trained on another base.
        PlanError: A weight cannot be edited, or the scale is not a number.
    """
    if not abs(scale) <= _LARGEST_SCALE:
        raise PlanError(f"scale: expected a number from -{_LARGEST_SCALE} to {_LARGEST_SCALE}, found {scale}")
    planner = _Planner(checkpoint, adapter, scale)
    edits = planner.plan()
    order = {shard.name: number for number, shard in enumerate(checkpoint.shards)}
    edits.sort(key=lambda edit: (order[edit.shard], edit.start))
    return MergePlan(adapter.sha256, scale, tuple(edits), tuple(planner.notes))


class _Planner:
    """Finds weights by the names that modules go by in the model that was trained."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, scale: float) -> None:
        self._checkpoint, self._adapter, self._scale = checkpoint, adapter, scale
        self._file = adapter.path / WEIGHTS_NAME
        self._anatomy: Anatomy | None = None
        self.notes: list[str] = []
        try:
            self._anatomy = dissect(checkpoint.tensors, checkpoint.config)
        except ArchitectureError as error:
            self.notes.append(f"names alone say which weights are meant ({error})")
        self._by_core: defaultdict[str, list[str]] = defaultdict(list)
        for name in checkpoint.tensors:
            self._by_core[_core(name)].append(name)

    def plan(self) -> list[MergeEdit]:
        """Returns the edits, each of another tensor, in no order."""
        self._check_base()
        for receipt in _receipts(self._checkpoint):
            self.notes.append(
                f"{receipt} describes the weights of {self._checkpoint.name} and is not carried over; "
                f"{MERGE_RECEIPT_NAME} names it by its digest"
            )
        edits: list[MergeEdit] = []
        modules: defaultdict[str, list[LowRank]] = defaultdict(list)
        for update in self._adapter.updates:
            modules[update.module].append(update)
        for module, updates in modules.items():
            name = self._find(f"{module}.weight")
            if len(updates) == 1 and updates[0].depth == 0 and name is not None:
                edits += self._of_module(updates[0], name)
            else:
                edits += self._of_parameters(module, updates)
        for path, source in self._adapter.replaced.items():
            edits.append(self._replacement(path, source))
        seen: dict[str, MergeEdit] = {}
        for edit in edits:
            if (other := seen.setdefault(edit.name, edit)) is not edit:
                raise AdapterError(
                    f"{self._file}: {other.source[0]} and {edit.source[0]} both change {edit.name}; "
                    "merge them with peft itself"
                )
        if self._anatomy is not None and self._anatomy.tied:
            embedding = {writer.name for writer in self._anatomy.writers if writer.component == "embedding"}
            if embedding & seen.keys():
                self.notes.append("the output head is tied to the token embedding, so both are changed")
        return edits

    def _check_base(self) -> None:
        for path, source in self._adapter.copies.items():
            name = self._need(path, source)
            self._check_shape(source, self._adapter.shape(source), self._checkpoint.tensors[name])
            if self._checkpoint.remote is None and not self._holds(source, self._checkpoint.tensors[name]):
                raise AdapterError(self._other_base(f": its {source} is not {name}"))
        if self._adapter.base is None:
            return
        found = base_digest(self._checkpoint)
        if found is None:
            self.notes.append(f"whether {self._checkpoint.name} is the adapter's base was not checked: it is remote")
        elif found != self._adapter.base:
            raise AdapterError(self._other_base(""))

    def _other_base(self, how: str) -> str:
        return (
            f"{self._adapter.path}: was trained on other weights than those of {self._checkpoint.name}{how}; "
            "merge it into the checkpoint that it was trained on"
        )

    def _holds(self, source: str, tensor: TensorInfo) -> bool:
        """Tells whether a tensor that the adapter carries along equals the base's, in its own precision."""
        path = next(shard.path for shard in self._checkpoint.shards if shard.name == tensor.shard)
        stored, theirs = STORED[tensor.dtype], STORED[self._adapter.tensors[source].dtype]
        item, count = ITEM_BYTES[tensor.dtype], math.prod(tensor.shape)
        with path.open("rb") as file:
            file.seek(tensor.start)
            for first in range(0, count, _PIECE):
                size = min(_PIECE, count - first)
                ours = decoded(np.frombuffer(file.read(size * item), stored), np.float64)
                rounded = np.empty(size, theirs)
                with np.errstate(invalid="ignore"):
                    encode(ours, rounded)
                if not np.array_equal(decoded(rounded, np.float32), self._adapter.read(source, first, size)):
                    return False
        return True

    def _of_module(self, update: LowRank, name: str) -> Iterator[MergeEdit]:
        tensor = self._checkpoint.tensors[name]
        rank, scale = self._scaling(update, update.module, 1)
        outer, inner = self._adapter.shape(update.up)[0], self._adapter.shape(update.down)[1]
        if update.kind == "embedding":
            transposed = True
        elif outer == inner and tensor.shape == (outer, inner):
            transposed = self._stored_as_conv1d(name, default=self._adapter.config["fan_in_fan_out"])
        else:
            transposed = tensor.shape == (inner, outer)
        self._check_shape(update.up, (inner, outer) if transposed else (outer, inner), tensor)
        yield self._edit(name, "low-rank", update.down, update.up, rank=rank, scale=scale, transposed=transposed)
        if update.bias is not None:
            name = self._need(f"{update.module}.bias", update.bias)
            self._check_shape(update.bias, self._adapter.shape(update.bias), self._checkpoint.tensors[name])
            yield self._edit(name, "bias", update.bias, scale=scale)

    def _of_parameters(self, module: str, updates: list[LowRank]) -> Iterator[MergeEdit]:
        """Plans the updates of a module whose parameters were wrapped one by one; shapes tell which is whose."""
        targets = [target.rpartition(".") for target in self._adapter.config["target_parameters"]]
        leaves = [
            leaf
            for parent, _, leaf in targets
            if (module == parent or module.endswith(f".{parent}")) and self._stored(module, leaf)
        ]
        if not leaves:
            raise AdapterError(self._no_match(updates[0].down, f"{module}.weight"))
        for update in updates:
            if update.kind == "embedding" or update.bias is not None:
                raise AdapterError(f"{self._file}: {update.up}: expected a plain update of a parameter; {_WITH_PEFT}")
            fitting = [leaf for leaf in leaves if self._fits(update, module, leaf)]
            if len(fitting) != 1:
                what = f"fits {' and '.join(fitting)}" if fitting else f"fits none of {', '.join(leaves)}"
                raise AdapterError(
                    f"{self._file}: {update.down} of shape {list(self._adapter.shape(update.down))} {what} "
                    f"of {module}, expected exactly one; {_WITH_PEFT}"
                )
            yield from self._of_parameter(update, module, fitting[0])

    def _of_parameter(self, update: LowRank, module: str, leaf: str) -> Iterator[MergeEdit]:
        names = self._stored(module, leaf)
        first = self._checkpoint.tensors[names[0]]
        outer, inner = self._adapter.shape(update.up)[0], self._adapter.shape(update.down)[1]
        if len(names) == 1:
            experts = first.shape[0] if len(first.shape) == 3 else 1
            rank, scale = self._scaling(update, f"{module}.{leaf}", experts)
            transposed = first.shape[-2:] == (inner, outer) and len(first.shape) == 3
            if transposed and inner == outer:
                transposed = self._stored_as_conv1d(names[0], default=None)
            yield self._edit(
                names[0], "low-rank", update.down, update.up,
                rank=rank, scale=scale, transposed=transposed, experts=experts,
            )  # fmt: skip
            return
        parts = len(_UNFUSED[leaf])
        experts = len(names) // parts
        rank, scale = self._scaling(update, f"{module}.{leaf}", experts)
        height = outer // parts
        for place, name in enumerate(names):
            expert, part = divmod(place, parts)
            self._check_shape(update.up, (height, inner), self._checkpoint.tensors[name])
            yield self._edit(
                name, "low-rank", update.down, update.up, rank=rank, scale=scale, experts=experts, expert=expert,
                rows=(part * height, (part + 1) * height),
            )  # fmt: skip

    def _stored(self, module: str, leaf: str) -> list[str]:
        """Returns the tensors that hold a parameter: one, or the matrices of one expert after the other."""
        if (name := self._find(f"{module}.{leaf}")) is not None:
            return [name]
        names: list[str] = []
        while leaf in _UNFUSED:
            found = [
                self._find(f"{module}.{len(names) // len(_UNFUSED[leaf])}.{part}.weight") for part in _UNFUSED[leaf]
            ]
            if None in found:
                break
            names += [name for name in found if name is not None]
        return names

    def _fits(self, update: LowRank, module: str, leaf: str) -> bool:
        names = self._stored(module, leaf)
        shape = self._checkpoint.tensors[names[0]].shape
        wanted = (self._adapter.shape(update.up)[0], self._adapter.shape(update.down)[1])
        if len(names) > 1:
            return (shape[0] * len(_UNFUSED[leaf]), *shape[1:]) == wanted
        return len(shape) in (2, 3) and (shape[-2:] == wanted or (len(shape) == 3 and shape[-2:] == wanted[::-1]))

    def _replacement(self, path: str, source: str) -> MergeEdit:
        name = self._need(path, source)
        self._check_shape(source, self._adapter.shape(source), self._checkpoint.tensors[name])
        return self._edit(name, "replaced", source)

    def _edit(self, name: str, kind: Literal["low-rank", "bias", "replaced"], *source: str, **more: Any) -> MergeEdit:
        tensor = self._checkpoint.tensors[name]
        if tensor.dtype not in ITEM_BYTES:
            raise PlanError(
                f"{name}: expected BF16, F16 or F32, found {tensor.dtype}; convert the checkpoint to one of them"
            )
        return MergeEdit(**dataclasses.asdict(tensor), kind=kind, source=source, **more)

    def _scaling(self, update: LowRank, key: str, experts: int) -> tuple[int, float]:
        rank, scale = self._adapter.scaling(key)
        down, up = self._adapter.shape(update.down), self._adapter.shape(update.up)
        if update.kind == "linear" and (len(down), len(up)) != (2, 2):
            raise AdapterError(
                f"{self._file}: {update.down}: expected 2 dimensions, found {list(down)}; LoRA on convolutions is not "
                f"merged here, {_WITH_PEFT}"
            )
        if (down[0], up[1]) != (rank * experts, rank * experts):
            expected = f"{rank} of {experts} experts" if experts > 1 else f"{rank}"
            raise AdapterError(
                f"{self._file}: {update.down}: expected rank {expected} as the configuration says, "
                f"found {list(down)} and {list(up)}"
            )
        return rank, scale * self._scale

    def _stored_as_conv1d(self, name: str, *, default: bool | None) -> bool:
        """Tells the layout of a square weight by the architecture table: its own, or its neighbours'."""
        if self._anatomy is not None:
            parent = name.removesuffix(".weight").rpartition(".")[0]
            axes = {
                writer.name: writer.axis
                for writer in self._anatomy.writers
                if writer.kind == "weight" and writer.component != "embedding"
            }
            near = {axis for other, axis in axes.items() if other.startswith(f"{parent}.")}
            if name in axes:
                return axes[name] == -1
            if default is None and len(near) == 1:
                return near == {-1}
        if default is None:
            raise AdapterError(
                f"{self._file}: {name} is square, and the architecture table does not tell which of its axes is the "
                f"input; {_WITH_PEFT}"
            )
        return default

    def _check_shape(self, source: str, shape: tuple[int, ...], tensor: TensorInfo) -> None:
        if shape != tensor.shape:
            raise AdapterError(
                f"{self._file}: {source}: expected what fits {tensor.name} of shape {list(tensor.shape)}, "
                f"found what fits {list(shape)}; the adapter is of another model"
            )

    def _need(self, path: str, source: str) -> str:
        if (name := self._find(path)) is None:
            raise AdapterError(self._no_match(source, path))
        return name

    def _no_match(self, source: str, path: str) -> str:
        tied = self._anatomy is not None and self._anatomy.tied and path.startswith("lm_head.")
        why = "whose output head is tied to the token embedding" if tied else "so the adapter is of another model"
        return f"{self._file}: {source} matches no weight of {self._checkpoint.name} ({path}), {why}"

    def _find(self, path: str) -> str | None:
        """Returns the tensor that a parameter of the trained model is stored as.

        The model may hold it under other prefixes than the checkpoint does. Names that are the same without them
        are the same parameter; otherwise only the decoder is searched, never towers or multi-token prediction.

        Raises:
            AdapterError: More than one tensor is meant.
        """
        if path in self._checkpoint.tensors:
            return path
        core = _core(path)
        found = self._by_core.get(core, [])
        if len(found) != 1:
            among = found or [name for name in self._checkpoint.tensors if name.endswith(f".{core}")]
            inside = [name for name in among if name.startswith(self._roots())]
            found = inside if inside or not found else found
        if len(found) > 1:
            shown = ", ".join(found[:_MOST_CANDIDATES])
            raise AdapterError(
                f"{self._file}: {path} may be any of {shown} of {self._checkpoint.name}; expected exactly one"
            )
        return found[0] if found else None

    def _roots(self) -> tuple[str, ...]:
        """Returns what the names of the decoder's tensors start with."""
        if self._anatomy is None:
            return ()
        marks = (
            writer.name.split(f".{writer.layer}.")[0].rpartition(".")[0]
            for writer in self._anatomy.writers
            if writer.layer is not None and not writer.mtp
        )
        return tuple(f"{mark}." if mark else "" for mark in dict.fromkeys(marks))


def _core(name: str) -> str:
    """Returns a name without the prefixes that differ between a model, its text part and its checkpoint."""
    parts = name.split(".")
    while len(parts) > 1 and parts[0] in _WRAPPERS:
        del parts[0]
    return ".".join(parts)


# ------------------------------------------------------------------------------------------- editing


class MergeEditor(BlockEditor[MergeEdit, MergeResult]):
    """Changes tensors by what an adapter says.

    Args:
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        memory: Bytes for all buffers of all jobs together.
        jobs: Tensors, or parts of large ones, changed at a time, one per available core if None.
        stop: Set when the run should end early.
        adapter: What to merge.

    Raises:
        UsageError: There is no such device.
    """

    on_cpu = "numpy"

    def __init__(self, device: str, memory: int, jobs: int | None, stop: threading.Event, adapter: Adapter) -> None:
        found = find_device(device).partition(":")[0]
        without_float64 = found in ("mps", "xpu")
        super().__init__("cpu" if without_float64 else device, memory, jobs, stop)
        if without_float64:
            self.reason = f"arithmetic: {self._form} on cpu (merging needs float64, which not every {found} has)"
        self._adapter = adapter

    def sections(self, edit: MergeEdit) -> Sequence[Section]:
        """Returns a section per matrix, and one for a parameter that is added to or replaced."""
        if edit.kind != "low-rank":
            return [_Exchange(edit, self._adapter)]
        factors = _Factors(edit, self._adapter)
        return [
            _Addition(edit, matrix, factors, form=self._form, device=self._device, room=self._room)
            for matrix in range(edit.experts if edit.expert is None else 1)
        ]

    def result(self, edit: MergeEdit, measured: Sequence[Any], digest: str) -> MergeResult:
        """Returns what was measured of a tensor, from the squared norms of what was added and of what was there."""
        squares, before = (sum(part[side] for part in measured) for side in (0, 1))
        change = math.sqrt(squares / before) if before else None if squares else 0.0
        return MergeResult(change=change, blake3=digest)


class _Factors:
    """The factors of a tensor's matrices, read when the first of them is asked for, once for all threads."""

    def __init__(self, edit: MergeEdit, adapter: Adapter) -> None:
        self._edit, self._adapter = edit, adapter
        self._read: tuple[np.ndarray, np.ndarray] | None = None
        self._reading = threading.Lock()

    def of(self, matrix: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns left ``[rows, r]`` and right ``[r, cols]`` of a matrix, float32."""
        edit = self._edit
        with self._reading:
            if self._read is None:
                down, up = (self._adapter.read(name) for name in edit.source)
                # Experts lie one after the other along the rows of A, and interleaved along the columns of B.
                self._read = down.reshape(edit.experts, -1, down.shape[1]), up.reshape(len(up), -1, edit.experts)
        downs, ups = self._read
        expert = matrix if edit.expert is None else edit.expert
        right, left = downs[expert], ups[:, :, expert]
        if edit.rows is not None:
            left = left[slice(*edit.rows)]
        return (right.T, left.T) if edit.transposed else (left, right)


class _Addition:
    """A matrix that a low-rank update is added to: see ``Section``."""

    gathers = False

    def __init__(
        self, edit: MergeEdit, matrix: int, factors: _Factors, *, form: "Form", device: str, room: int
    ) -> None:
        self._edit, self._matrix, self._factors = edit, matrix, factors
        self._form, self._device, self._room = form, device, room
        rows, cols = edit.shape[-2:]
        self._row_bytes = cols * ITEM_BYTES[edit.dtype]
        self.start = edit.start + matrix * rows * self._row_bytes
        self.end = self.start + rows * self._row_bytes
        self.block = 0
        self._squares = 0.0
        self._merger: Merger | NumpyMerger | None = None

    def gather(self, read: Reader) -> None:
        """Reads the factors."""
        left, right = self._factors.of(self._matrix)
        self._merger = self._new_merger(left, right)
        self._squares = (self._edit.scale * update_norm(left, right)) ** 2
        chunk = self._merger.chunk_rows
        self.block = max(chunk, self._room // max(1, self._row_bytes) // chunk * chunk) * max(1, self._row_bytes)

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Adds the update to a block."""
        merger, dtype = self._gathered(), self._edit.dtype
        shape, start = (-1, self._edit.shape[-1]), (offset - self.start) // self._row_bytes
        if isinstance(merger, NumpyMerger):
            merger.apply(raw.view(STORED[dtype]).reshape(shape), start)
        else:
            import torch

            stored = torch.from_numpy(raw).view(torch_dtype(dtype)).view(shape)
            block = stored.to(self._device)
            merger.apply(block, start)
            if block is not stored:
                stored.copy_(block)
        if merger.overflows:
            _refuse(self._edit, finite=math.isfinite(merger.norm))

    def measure(self, raw: np.ndarray, offset: int) -> None:
        """Does nothing: the norms are known before, and the digest is the caller's."""

    def measured(self) -> tuple[float, float]:
        """Returns the squared norms of the update and of what was there."""
        return self._squares, self._gathered().norm ** 2

    def _new_merger(self, left: np.ndarray, right: np.ndarray) -> "Merger | NumpyMerger":
        edit = self._edit
        if self._form == "numpy":
            return NumpyMerger(left, right, edit.scale, edit.dtype)
        import torch

        from ablate_shards.kernels.merge.merge_torch import Merger

        there = [torch.from_numpy(np.ascontiguousarray(factor)).to(self._device) for factor in (left, right)]
        return Merger(there[0], there[1], edit.scale, torch_dtype(edit.dtype), form=self._form)

    def _gathered(self) -> "Merger | NumpyMerger":
        if self._merger is None:
            raise RuntimeError(f"{self._edit.name}: changed before its factors were read")
        return self._merger


class _Exchange:
    """A parameter that is added to or replaced, piece by piece: see ``Section``."""

    gathers = False

    def __init__(self, edit: MergeEdit, adapter: Adapter) -> None:
        self._edit, self._adapter = edit, adapter
        self.start, self.end = edit.start, edit.end
        self.block = _PIECE * ITEM_BYTES[edit.dtype]
        self._squares = self._before = 0.0

    def gather(self, read: Reader) -> None:
        """Begins anew."""
        self._squares = self._before = 0.0

    def edit(self, raw: np.ndarray, offset: int) -> None:
        """Adds to or replaces a piece."""
        edit, stored = self._edit, raw.view(STORED[self._edit.dtype])
        old = decoded(stored, np.float64)
        first = (offset - edit.start) // stored.itemsize
        given = self._adapter.read(edit.source[0], first, len(stored)).astype(np.float64)
        wanted = old + edit.scale * given if edit.kind == "bias" else given
        if not (np.abs(wanted) <= GREATEST[edit.dtype]).all():
            _refuse(edit, finite=bool(np.isfinite(old).all()))
        self._squares += float(np.square(wanted - old).sum())
        self._before += float(np.square(old).sum())
        encode(wanted, stored)

    def measure(self, raw: np.ndarray, offset: int) -> None:
        """Does nothing: the norms are known before, and the digest is the caller's."""

    def measured(self) -> tuple[float, float]:
        """Returns the squared norms of the change and of what was there."""
        return self._squares, self._before


def _refuse(edit: MergeEdit, *, finite: bool) -> NoReturn:
    if not finite:
        raise ExecuteError(
            f"{edit.name}: holds NaN or infinite values, which nothing can be added to; fetch its shard again"
        )
    raise ExecuteError(
        f"{edit.name}: with the adapter added, values lie beyond what {edit.dtype} can hold; "
        "convert the checkpoint to BF16, or lower --scale"
    )


# ------------------------------------------------------------------------------------------- receipt


def _receipt_text(
    checkpoint: Checkpoint,
    adapter: Adapter,
    plan: MergePlan,
    results: Mapping[str, MergeResult],
    device: Mapping[str, str],
) -> str:
    """Returns the receipt of a merge as canonical JSON that ends in its own digest.

    It names the receipts that lie beside the base, by digest: what they say is of the base's bytes, and they are not
    carried over.

    Raises:
        ExecuteError: The adapter is no longer the one that was planned with.
    """
    if read_adapter(adapter.path).sha256 != adapter.sha256:
        raise ExecuteError(f"{adapter.path}: changed while it was read; run again when it is at rest")
    return seal(
        {
            "format": MERGE_FORMAT,
            "tool": f"ablate-shards {__version__}",
            "source": source_record(checkpoint),
            "base": [
                {"name": name, "sha256": hashlib.sha256(_read(checkpoint, name)).hexdigest()}
                for name in _receipts(checkpoint)
            ],
            "adapter": {"name": adapter.path.resolve().name, "sha256": adapter.sha256, **adapter.config},
            "scale": plan.scale,
            "device": dict(device),
            "tensors": [_record(edit, results[edit.name]) for edit in plan.edits],
            "files": {
                "copied": list(checkpoint.sidecars),
                "left_out": [{"name": name, "reason": reason} for name, reason in checkpoint.left_out],
            },
        }
    )


def _receipts(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the receipts beside a base that was itself edited."""
    return [name for name, _ in checkpoint.left_out if name in RECEIPT_NAMES]


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
        **dataclasses.asdict(result),
    }


def read_merge_receipt(folder: Path | Files) -> MergeReceipt:
    """Reads the receipt of a merge, wherever it is.

    Raises:
        VerifyError: There is none, it is of a newer version, or it is not a receipt.
    """
    content, altered = load(folder, MERGE_RECEIPT_NAME, MERGE_FORMAT)
    try:
        records = content["tensors"]
        tensors = [_tensor(record) for record in records]
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise ValueError("records a tensor twice")
        return MergeReceipt(
            revision=revision_of(content),
            shards={
                typed(entry, "name", str): typed(entry, "header_sha256", str) for entry in content["source"]["shards"]
            },
            copied=items(content["files"], "copied", str),
            adapter_sha256=typed(content["adapter"], "sha256", str),
            scale=number(content, "scale"),
            tensors={tensor.name: tensor for tensor in tensors},
            results={
                tensor.name: MergeResult(
                    change=None if record["change"] is None else number(record, "change"),
                    blake3=typed(record, "blake3", str),
                )
                for tensor, record in zip(tensors, records, strict=True)
            },
            altered=altered,
        )
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise incomplete(folder, MERGE_RECEIPT_NAME, error) from error


def _tensor(record: Mapping[str, Any]) -> TensorInfo:
    start, end = items(record, "bytes", int)
    return TensorInfo(
        name=typed(record, "name", str),
        dtype=typed(record, "dtype", str),
        shape=items(record, "shape", int),
        shard=typed(record, "shard", str),
        start=start,
        end=end,
    )
