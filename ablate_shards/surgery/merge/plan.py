"""Which tensors an adapter changes, and by which of its factors."""

import dataclasses
import hashlib
import itertools
import json
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from ablate_shards.errors import AdapterError, ArchitectureError, PlanError
from ablate_shards.kernels.codecs.plain import STORED, decoded, encode
from ablate_shards.kernels.merge.taken import Taken
from ablate_shards.names import ADAPTER_RECEIPT_NAME, MERGE_RECEIPT_NAME, RECEIPT_NAMES
from ablate_shards.surgery.anatomy.architecture import Anatomy, dissect
from ablate_shards.surgery.anatomy.scales import ending_of, is_codes, plain_name_of, quantisation_of
from ablate_shards.surgery.checkpoint.amended import Amendments, amend
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.digest import base_digest
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES, TensorInfo
from ablate_shards.surgery.merge.adapter import Adapter, LowRank, TokenRows
from ablate_shards.surgery.merge.amendments import find_amendments, read_pieces
from ablate_shards.surgery.merge.names import Names

__all__ = ["MergeEdit", "MergePart", "MergePlan", "plan_merge", "receipts_beside"]

Kind = Literal["low-rank", "parts", "bias", "replaced", "rows"]

_LARGEST_SCALE = 1000

_WITH_PEFT = "merge it with peft itself"

#: Matrices that a fused stack of experts is stored as, one tensor each, in the order of their rows: as most call them
#: and as Mixtral does.
_UNFUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "up_proj": (("up_proj",),),
    "down_proj": (("down_proj",), ("w2",)),
}
#: Modules that a checkpoint may store as the rows of one, in their order.
_FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
#: A matrix of one expert: ``experts.3.down_proj``, or ``experts.down_projs.3``.
_OF_EXPERT = re.compile(
    r"(?P<stack>.+\.experts)\.(?:(?P<expert>\d{1,5})\.(?P<leaf>[^.]+)|(?P<listed>[^.]+_proj)s\.(?P<place>\d{1,5}))"
)
#: Rows of the table whose stacks hold gate and up in turns; in all others one follows the other.
_INTERLEAVED = frozenset({"gpt-oss"})


@dataclass(frozen=True, slots=True)
class MergePart:
    """A part of a tensor that an update of its own is added to.

    Attributes:
        rows: The rows, counted through all matrices of a stack.
        source: The adapter's A and B.
        rank: Columns of B.
        scale: The ``s`` of ``s·B·A``.
        columns: The columns of these rows: the first, one past the last, and the step; None for all.
        transposed: Whether the stored part is ``(B·A)ᵀ`` in shape.
    """

    rows: tuple[int, int]
    source: tuple[str, str]
    rank: int
    scale: float
    columns: tuple[int, int, int] | None = None
    transposed: bool = False


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
        kind: ``low-rank`` adds ``s·B·A``, ``parts`` does so to some of its rows each, ``bias`` adds ``s`` times a
            vector, ``replaced`` puts another there, ``rows`` puts other rows there for some tokens.
        source: The adapter's tensors: A and B, or the one that is added or put there.
        rank: Columns of B, of one expert.
        scale: The ``s`` above.
        transposed: Whether the stored weight is ``(B·A)ᵀ`` in shape.
        experts: Experts that A and B are stacked of, 1 for a single matrix.
        expert: The one that this tensor is of, None where it holds all of them.
        rows: The rows of the update that this tensor takes, None for all.
        parts: The parts that are changed, in the order of their rows.
        tokens: The rows that are replaced, in the order in which the adapter holds them.
        begins_as: The adapter's tensor that stands in the weight's place before, because it holds rows for new tokens.
        magnitude: The adapter's norms that rows, or columns where it is transposed, are given after the update, as
            DoRA does.
        taken: What of the weight is taken out before the update, as the training did.
    """

    name: str
    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    kind: Kind
    source: tuple[str, ...]
    rank: int | None = None
    scale: float = 1.0
    transposed: bool = False
    experts: int = 1
    expert: int | None = None
    rows: tuple[int, int] | None = None
    parts: tuple[MergePart, ...] = ()
    tokens: tuple[int, ...] = ()
    begins_as: str | None = None
    magnitude: str | None = None
    taken: Taken | None = None


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge will do.

    Attributes:
        adapter_sha256: Digest of the adapter.
        scale: What every update is multiplied by, beside the adapter's own scale.
        edits: The edits, in the order of shards and bytes.
        notes: What the user should know before the run, a line each.
        amendments: What is added or changed besides the values of weights; the edits are of the base with it.
    """

    adapter_sha256: str
    scale: float
    edits: tuple[MergeEdit, ...]
    notes: tuple[str, ...]
    amendments: Amendments

    def as_dict(self) -> dict[str, Any]:
        """Returns the plan as JSON types."""
        content = dataclasses.asdict(self)
        for edit in content["edits"]:
            for key in ("parts", "tokens", "begins_as", "magnitude", "taken"):
                if not edit[key]:
                    del edit[key]
        return content

    def amended(self, checkpoint: Checkpoint) -> Checkpoint:
        """Returns the base as the edits find it, without the files that come with the adapter."""
        return amend(checkpoint, self.amendments)

    def sha256(self) -> str:
        """Returns the digest of the plan's canonical JSON form."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()


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
        PlanError: A weight cannot be edited, the configuration that has to change is not there, or the scale is not a
            number.
    """
    if not abs(scale) <= _LARGEST_SCALE:
        raise PlanError(f"scale: expected a number from -{_LARGEST_SCALE} to {_LARGEST_SCALE}, found {scale}")
    planner = _Planner(checkpoint, adapter, scale)
    edits = planner.plan()
    order = {shard.name: number for number, shard in enumerate(checkpoint.shards)}
    edits.sort(key=lambda edit: (order[edit.shard], edit.start))
    return MergePlan(adapter.sha256, scale, tuple(edits), tuple(planner.notes), planner.found.amendments)


class _Place(NamedTuple):
    """A matrix of one expert among those of all.

    Attributes:
        stack: The module that holds all of them.
        expert: The expert.
        part: Which of the matrices it is that lie beside each other in one parameter.
        parts: How many these are.
    """

    stack: str
    expert: int
    part: int
    parts: int


class _Planner:
    """Finds weights by the names that modules go by in the model that was trained."""

    def __init__(self, checkpoint: Checkpoint, adapter: Adapter, scale: float) -> None:
        self._source, self._scale = checkpoint, scale
        self._file = adapter.path / adapter.weights
        self._anatomy: Anatomy | None = None
        self.notes = list(adapter.notes)
        try:
            self._anatomy = dissect(checkpoint.tensors, checkpoint.config)
        except ArchitectureError as error:
            self.notes.append(f"names alone say which weights are meant ({error})")
        self._stacks: dict[tuple[str, str], list[str]] = {}
        self.found = find_amendments(
            checkpoint, adapter, self._anatomy, Names(checkpoint, self._anatomy, self._file).find
        )
        self.notes += self.found.notes
        self._adapter = _without(adapter, self.found.same)
        self._checkpoint = amend(checkpoint, self.found.amendments)
        self._find = Names(self._checkpoint, self._anatomy, self._file).find

    def plan(self) -> list[MergeEdit]:
        """Returns the edits, each of another tensor, in no order."""
        self._check_base()
        for receipt in receipts_beside(self._source):
            self.notes.append(
                f"{receipt} describes the weights of {self._checkpoint.name} and is not carried over; "
                f"{MERGE_RECEIPT_NAME} names it by its digest"
            )
        edits: list[MergeEdit] = []
        modules: defaultdict[str, list[LowRank]] = defaultdict(list)
        for update in self._adapter.updates:
            modules[update.module].append(update)
        parts: defaultdict[str, list[MergePart]] = defaultdict(list)
        for module, updates in modules.items():
            name = self._find(f"{module}.weight")
            plain = len(updates) == 1 and updates[0].depth == 0
            if plain and name is not None:
                edits += self._of_module(updates[0], name)
            elif plain and (place := self._place_in_fused(updates[0])) is not None:
                parts[place[0]].append(place[1])
            elif plain and (names := self._split(module)):
                edits += self._of_split(updates[0], names)
            else:
                edits += self._of_parameters(module, updates)
        edits += [self._of_parts(name, found) for name, found in parts.items()]
        edits += [self._replacement(path, source) for path, source in self._adapter.replaced.items()]
        edits += [self._of_tokens(rows) for rows in self._adapter.token_rows]
        seen: dict[str, MergeEdit] = {}
        for edit in edits:
            if (other := seen.setdefault(edit.name, edit)) is not edit:
                raise AdapterError(
                    f"{self._file}: {other.source[0]} and {edit.source[0]} both change {edit.name}; "
                    "merge them with peft itself"
                )
        # Weights that have rows for new tokens, and are not changed besides.
        for name, source in self.found.begins_as.items():
            if name not in seen:
                seen[name] = self._replacement(name, source)
        return [*seen.values(), *self._of_tied_head(seen)]

    def _of_tied_head(self, edits: Mapping[str, MergeEdit]) -> Iterator[MergeEdit]:
        """Yields the edit of a head that is stored although it is tied: that of the embedding, whose bytes it has."""
        if self.found.tied is not None:
            head, embedding = self.found.tied
            if embedding in edits:
                yield dataclasses.replace(edits[embedding], **dataclasses.asdict(self._checkpoint.tensors[head]))

    def _check_base(self) -> None:
        begun = {self._find(f"{update.module}.weight") for update in self._adapter.updates if update.taken}
        if self.found.parted and begun & self.found.begins_as.keys():
            begun |= self.found.begins_as.keys()  # peft takes it out of the weight that both were
        for path, source in self._adapter.copies.items():
            name = self._need(path, source)
            self._check_shape(source, self._adapter.shape(source), self._checkpoint.tensors[name])
            # What the training left of the base after a part was taken out of it is not the base's.
            if (
                self._source.remote is None
                and path not in begun
                and not self._holds(source, self._checkpoint.tensors[name])
            ):
                raise AdapterError(self._other_base(f": its {source} is not {name}"))
        self._note_origin()
        made_of, base = self._adapter.made_of, self._adapter.base
        # What is dequantised on the way has other bytes, and what it was made of may be the codes.
        plain = self._source.view is None
        if made_of is not None and plain and base_digest(self._source) not in (None, made_of):
            self.notes.append(
                f"{ADAPTER_RECEIPT_NAME} says that the adapter was made of other weights than those of "
                f"{self._checkpoint.name}; what is measured there holds for those"
            )
        if base is None:
            return
        found = base_digest(self._source)
        if found is None:
            self.notes.append(f"whether {self._checkpoint.name} is the adapter's base was not checked: it is remote")
        elif found != self._adapter.base:
            raise AdapterError(self._other_base(""))

    def _note_origin(self) -> None:
        """Notes where the base is from another repository or commit than the adapter says; that may be meant."""
        repo, commit = self._source.origin or (None, None)
        said, revision = self._adapter.trained_on
        if repo is None or said is None:
            return
        if repo.lower() != said.lower():
            self.notes.append(f"the adapter says that it was trained on {said}, not on {repo}")
        elif commit is not None and revision is not None and commit != revision:
            self.notes.append(f"the adapter says that it was trained on commit {revision} of {repo}, not on {commit}")

    def _other_base(self, how: str) -> str:
        return (
            f"{self._adapter.path}: was trained on other weights than those of {self._checkpoint.name}{how}; "
            "merge it into the checkpoint that it was trained on"
        )

    def _holds(self, source: str, tensor: TensorInfo) -> bool:
        """Returns whether a tensor that was saved with the adapter equals the base's, in its own precision.

        Rows for new tokens are not the base's.
        """
        theirs = STORED.get(self._adapter.tensors[source].dtype, np.float32)  # F64 is read as float32
        new = {each.name: each.begins_as or "" for each in self.found.amendments.tensors}
        known = self._source.tensors.get(new.get(tensor.name, tensor.name), tensor)
        count = min(math.prod(known.shape), math.prod(tensor.shape))
        for first, stored in read_pieces(self._checkpoint, tensor, count):
            rounded = np.empty(len(stored), theirs)
            with np.errstate(invalid="ignore"):
                encode(decoded(stored, np.float64), rounded)
            if not np.array_equal(decoded(rounded, np.float32), self._adapter.read(source, first, len(stored))):
                return False
        return True

    def _of_module(self, update: LowRank, name: str) -> Iterator[MergeEdit]:
        tensor = self._checkpoint.tensors[name]
        rank, scale = self._scaling(update, update.module, 1)
        outer, inner = self._adapter.shape(update.up)[0], self._adapter.shape(update.down)[1]
        if update.kind != "linear":
            transposed = True
        elif outer == inner and tensor.shape == (outer, inner):
            transposed = self._stored_as_conv1d(name, default=self._adapter.config.fan_in_fan_out)
        else:
            transposed = tensor.shape == (inner, outer)
        if self._adapter.config.use_qalora and not transposed and inner < tensor.shape[-1]:
            raise AdapterError(
                f"{self._file}: {update.down}: is of groups of inputs, as QALoRA trains on GPTQ codes, which not even "
                "peft merges; load it with peft beside the base instead"
            )
        self._check_shape(update.up, (inner, outer) if transposed else (outer, inner), tensor)
        if update.magnitude is not None:
            self._check_magnitude(update.magnitude, tensor, transposed=transposed)
        taken, begins_as = update.taken, {}
        if taken is not None and (copy := self._adapter.copies.get(f"{update.module}.weight")):
            # It is saved with what is left of the base.
            taken, begins_as = None, {"begins_as": copy}
        if taken is not None:
            self._check_taken(tensor, rank)
        yield self._edit(
            name, "low-rank", update.down, update.up,
            rank=rank, scale=scale, transposed=transposed, magnitude=update.magnitude, taken=taken,
            **begins_as,
        )  # fmt: skip
        if update.bias is not None:
            name = self._need(f"{update.module}.bias", update.bias)
            self._check_shape(update.bias, self._adapter.shape(update.bias), self._checkpoint.tensors[name])
            yield self._edit(name, "bias", update.bias, scale=scale)

    def _check_magnitude(self, magnitude: str, tensor: TensorInfo, *, transposed: bool) -> None:
        """Refuses norms that do not fit."""
        outputs = tensor.shape[-1 if transposed else 0]
        if self._adapter.shape(magnitude) != (outputs,):
            raise AdapterError(
                f"{self._file}: {magnitude}: expected a norm for each of the {outputs} "
                f"{'columns' if transposed else 'rows'} of {tensor.name} of shape {list(tensor.shape)}, found "
                f"{list(self._adapter.shape(magnitude))}; merge the adapter into the model that it was trained on"
            )
        if self._scale != 1:
            raise PlanError(
                f"scale: {tensor.name} is given the norms that DoRA has learned, which no scale applies to; leave "
                "--scale out"
            )

    def _check_taken(self, tensor: TensorInfo, rank: int) -> None:
        """Refuses what cannot be taken out of a weight."""
        if rank > min(tensor.shape):
            raise AdapterError(
                f"{self._file}: rank {rank} is more than {tensor.name} of shape {list(tensor.shape)} has to take out; "
                "merge the adapter into the model that it was trained on"
            )
        if self._scale != 1:
            raise PlanError(
                f"scale: the training took a part out of {tensor.name}, which the adapter at scale 1 gives back "
                "changed; leave --scale out"
            )

    def _place_in_fused(self, update: LowRank) -> tuple[str, MergePart] | None:
        """Returns the tensor that holds a module's weight among others, and the part that it is of it."""
        if found := _OF_EXPERT.fullmatch(update.module):
            leaf, expert = found["leaf"] or found["listed"], int(found["expert"] or found["place"])
            for fused, leaves in _UNFUSED.items():
                order = next((names for names in (*leaves, (fused,)) if leaf in names), None)
                if order and (name := self._find(f"{found['stack']}.{fused}")) is not None:
                    place = _Place(found["stack"], expert, order.index(leaf), len(order))
                    return name, self._part_of_stack(update, name, place)
        parent, _, leaf = update.module.rpartition(".")
        for fused, names in _FUSED.items():
            if leaf in names and (name := self._find(f"{parent}.{fused}.weight")) is not None:
                height, rows = self._wanted(update)[0], self._checkpoint.tensors[name].shape[0]
                keys = height if leaf != "q_proj" else (rows - height) // 2
                starts = {
                    "q_proj": 0,
                    "k_proj": rows - 2 * keys,
                    "v_proj": rows - keys,
                    "gate_proj": 0,
                    "up_proj": height,
                }
                if fused == "gate_up_proj":
                    self._check_shape(update.up, (2 * height, self._wanted(update)[1]), self._checkpoint.tensors[name])
                return name, self._part(update, starts[leaf], name)
        return None

    def _part_of_stack(self, update: LowRank, name: str, place: "_Place") -> MergePart:
        """Returns the part of a stack ``[E, out, in]`` or ``[E, in, out]`` that a matrix of one expert is."""
        if not update.plain:
            raise AdapterError(
                f"{self._file}: {update.up}: {name} stacks all experts, and only plain updates fit it, without bias, "
                "DoRA or a part that was taken out; merge it into a checkpoint with a tensor per expert"
            )
        tensor = self._checkpoint.tensors[name]
        outer, inner = self._wanted(update)
        wanted = (outer * place.parts, inner)
        transposed = tensor.shape[1:] == wanted[::-1]
        if transposed and tensor.shape[1:] == wanted:
            transposed = self._stores_input_first(update, name, place.stack)
        self._check_shape(update.up, (tensor.shape[0], *(wanted[::-1] if transposed else wanted)), tensor)
        if place.expert >= tensor.shape[0]:
            raise AdapterError(
                f"{self._file}: {update.down} is of expert {place.expert}, and {name} of {list(tensor.shape)} has "
                f"{tensor.shape[0]}; merge it into the checkpoint that it was trained on"
            )
        family = None if self._anatomy is None else self._anatomy.family
        alternating = place.parts > 1 and family in _INTERLEAVED
        if place.parts > 1 and (alternating if not transposed else family is None):
            raise AdapterError(
                f"{self._file}: {update.down} is of a part of {name}, and which rows or columns of its matrices are "
                "those of gate_proj, and which of up_proj, is not known of this architecture; merge it into a "
                "checkpoint with a tensor per expert"
            )
        if not transposed:
            return self._part(update, (place.expert * place.parts + place.part) * outer, name)
        part = self._part(update, place.expert * inner, name, transposed=True)
        if place.parts == 1:
            return part
        columns = (place.part * outer, (place.part + 1) * outer, 1)
        return dataclasses.replace(part, columns=(place.part, wanted[0], place.parts) if alternating else columns)

    def _stores_input_first(self, update: LowRank, name: str, stack: str) -> bool:
        """Tells whether a stack of square matrices is ``[E, in, out]``, by the other one or by the architecture.

        Where both gate and up lie in the experts' first matrix, it and the second one cannot both be square.
        """
        first, second = (self._find(f"{stack}.{each}") for each in ("gate_up_proj", "down_proj"))
        if first is not None and second is not None and name in (first, second):
            (*_, rows, columns), (*_, outer, inner) = (self._checkpoint.tensors[each].shape for each in (first, second))
            ways = (rows, columns) == (2 * inner, outer), (columns, rows) == (2 * outer, inner)
            if ways[0] != ways[1]:
                return ways[1]
        axes = {writer.name: writer.axis for writer in self._anatomy.writers} if self._anatomy else {}
        if second not in axes:
            raise AdapterError(
                f"{self._file}: {update.down}: whether {name} of shape {list(self._checkpoint.tensors[name].shape)} is "
                "[E, out, in] or [E, in, out] is told neither by shapes nor by what is known of this architecture; "
                "merge it into a checkpoint with a tensor per expert"
            )
        return axes[second] == -1

    def _part(self, update: LowRank, start: int, name: str, *, transposed: bool = False) -> MergePart:
        """Returns the part of a fused tensor that begins at a row."""
        if not update.plain:
            raise AdapterError(
                f"{self._file}: {update.up}: {name} is fused, and only plain updates fit it; {_WITH_PEFT}"
            )
        rank, scale = self._scaling(update, update.module, 1)
        outer, inner = self._wanted(update)
        shape = self._checkpoint.tensors[name].shape
        height = inner if transposed else outer
        if start < 0 or start + height > math.prod(shape[:-1]) or (inner != shape[-1] and not transposed):
            raise AdapterError(
                f"{self._file}: {update.up}: expected rows of {name} of shape {list(shape)}, found [{outer}, {inner}] "
                f"from row {start} on; merge it into the checkpoint that it was trained on"
            )
        return MergePart((start, start + height), (update.down, update.up), rank, scale, transposed=transposed)

    def _of_parts(self, name: str, parts: list[MergePart]) -> MergeEdit:
        """Plans the updates of a tensor's parts, none of which may overlap."""
        parts.sort(key=lambda part: (part.rows, part.columns or (0, 0, 1)))
        width = self._checkpoint.tensors[name].shape[-1]
        for one, other in itertools.pairwise(parts):
            same = one.rows == other.rows
            if (_columns_of(one, width) & _columns_of(other, width)) if same else one.rows[1] > other.rows[0]:
                raise AdapterError(
                    f"{self._file}: {one.source[0]} and {other.source[0]} change the same part of {name}; {_WITH_PEFT}"
                )
        sources = (source for part in parts for source in part.source)
        return self._edit(name, "parts", *sources, parts=tuple(parts))

    def _split(self, module: str) -> list[str]:
        """Returns the tensors that hold the rows of a fused module, in their order; none where one is missing."""
        parent, _, leaf = module.rpartition(".")
        found = [self._find(f"{parent}.{part}.weight") for part in _FUSED.get(leaf, ())]
        return [] if None in found else [name for name in found if name is not None]

    def _of_split(self, update: LowRank, names: list[str]) -> Iterator[MergeEdit]:
        """Plans the update of a fused module whose rows the checkpoint holds as several tensors."""
        if not update.plain:
            raise AdapterError(f"{self._file}: {update.up}: expected a plain update of {names[0]}; {_WITH_PEFT}")
        rank, scale = self._scaling(update, update.module, 1)
        tensors = [self._checkpoint.tensors[name] for name in names]
        rows = [0, *itertools.accumulate(tensor.shape[0] for tensor in tensors)]
        for tensor, first, last in zip(tensors, rows, rows[1:], strict=False):
            self._check_shape(
                update.up, self._wanted(update), dataclasses.replace(tensor, shape=(rows[-1], tensor.shape[1]))
            )
            yield self._edit(
                tensor.name, "low-rank", update.down, update.up, rank=rank, scale=scale, rows=(first, last)
            )

    def _of_parameters(self, module: str, updates: list[LowRank]) -> Iterator[MergeEdit]:
        """Plans the updates of a module whose parameters were wrapped one by one; shapes tell which is whose."""
        targets = sorted(self._adapter.config.target_parameters)
        if not targets and module.endswith(".experts"):
            targets = ["gate_up_proj" if self._stored(module, "gate_up_proj") else "up_proj", "down_proj"]
        named = dict.fromkeys(target.rpartition(".")[2] for target in targets)
        leaves = [
            leaf
            for leaf in named
            if any(f".{module}.{leaf}".endswith(f".{target}") for target in targets) and self._stored(module, leaf)
        ]
        if not leaves:
            raise AdapterError(self._no_match(updates[0].down, f"{module}.weight"))
        found: list[tuple[LowRank, str]] = []
        for update in updates:
            if not update.plain:
                raise AdapterError(f"{self._file}: {update.up}: expected a plain update of a parameter; {_WITH_PEFT}")
            fitting = [leaf for leaf in leaves if self._fits(update, module, leaf)]
            if len(fitting) > 1 and not self._square(update):
                # Experts without a gate: what one is from left to right, the other is from right to left.
                way = -1 if self._reads_input_first(update, module, fitting[0]) else 1
                fitting = [leaf for leaf in fitting if self._shape_of(module, leaf)[::way] == self._wanted(update)]
            if len(fitting) != 1:
                what = f"fits {' and '.join(fitting)}" if fitting else f"fits none of {', '.join(leaves)}"
                raise AdapterError(
                    f"{self._file}: {update.down} of shape {list(self._adapter.shape(update.down))} {what} "
                    f"of {module}, expected exactly one; {_WITH_PEFT}"
                )
            found.append((update, fitting[0]))
        # Whatever is read from left to right or from right to left is so for all parameters of a module.
        ways = {
            self._wanted(update) != self._shape_of(module, leaf) for update, leaf in found if not self._square(update)
        }
        for update, leaf in found:
            transposed = next(iter(ways)) if len(ways) == 1 else self._wanted(update) != self._shape_of(module, leaf)
            if self._square(update) and not ways:
                transposed = self._reads_input_first(update, module, leaf)
            yield from self._of_parameter(update, module, leaf, transposed=transposed)

    def _reads_input_first(self, update: LowRank, module: str, leaf: str) -> bool:
        """Tells whether an adapter of experts ``[E, d1, d2]`` takes their first axis for the input, if shapes do not.

        peft before 0.19.1 takes every stack for ``[E, in, out]``, except that 0.19.0 has it the wrong way round for
        modules that transformers marks as transposed. From 0.19.1 on, those that it marks are ``[E, in, out]`` and all
        others ``[E, out, in]``; in versions of transformers that mark none, gpt-oss is one of the others.
        """
        name = self._stored(module, leaf)[0]
        if len(self._stored(module, leaf)) == 1 and len(self._checkpoint.tensors[name].shape) == 2:
            return False
        if self._adapter.stacked(update.down):
            return self._stores_input_first(update, name, module)
        family = None if self._anatomy is None else self._anatomy.family
        marked = None if family in (None, "Aria", "gpt-oss") else False
        if (first := _takes_input_first(self._adapter.peft_version, marked=marked)) is None:
            version = self._adapter.peft_version
            raise AdapterError(
                f"{self._file}: {update.down}: which axis of {name} is the input is not told by shapes, and depends on "
                f"the versions of peft ({version or 'not given'}) and transformers that the adapter was trained with; "
                f"{_WITH_PEFT}, in those versions"
            )
        return first

    def _wanted(self, update: LowRank) -> tuple[int, int]:
        return self._adapter.shape(update.up)[0], self._adapter.shape(update.down)[1]

    def _square(self, update: LowRank) -> bool:
        outer, inner = self._wanted(update)
        return outer == inner

    def _shape_of(self, module: str, leaf: str) -> tuple[int, ...]:
        """Returns the shape that one expert has where all are one parameter."""
        names = self._stored(module, leaf)
        shape = self._checkpoint.tensors[names[0]].shape
        return shape[-2:] if len(names) == 1 else (shape[0] * _parts_of(leaf), *shape[1:])

    def _of_parameter(self, update: LowRank, module: str, leaf: str, *, transposed: bool) -> Iterator[MergeEdit]:
        names = self._stored(module, leaf)
        first = self._checkpoint.tensors[names[0]]
        if len(names) == 1:
            experts = first.shape[0] if len(first.shape) == 3 else 1
            rank, scale = self._scaling(update, f"{module}.{leaf}", experts)
            yield self._edit(
                names[0], "low-rank", update.down, update.up,
                rank=rank, scale=scale, transposed=transposed, experts=experts,
            )  # fmt: skip
            return
        parts = _parts_of(leaf)
        experts = len(names) // parts
        rank, scale = self._scaling(update, f"{module}.{leaf}", experts)
        height = first.shape[0]
        for place, name in enumerate(names):
            expert, part = divmod(place, parts)
            self._check_shape(update.up, first.shape, self._checkpoint.tensors[name])
            yield self._edit(
                name, "low-rank", update.down, update.up, rank=rank, scale=scale, experts=experts, expert=expert,
                rows=(part * height, (part + 1) * height), transposed=transposed,
            )  # fmt: skip

    def _stored(self, module: str, leaf: str) -> list[str]:
        """Returns the tensors that hold a parameter: one, or the matrices of one expert after the other."""
        if (module, leaf) not in self._stacks:
            one = self._find(f"{module}.{leaf}")
            self._stacks[module, leaf] = [one] if one is not None else self._unfused(module, leaf)
        return self._stacks[module, leaf]

    def _unfused(self, module: str, leaf: str) -> list[str]:
        for parts in _UNFUSED.get(leaf, ()):
            names: list[str] = []
            for expert in itertools.count():
                found = [self._find(f"{module}.{expert}.{part}.weight") for part in parts]
                if None in found:
                    break
                names += [name for name in found if name is not None]
            if names:
                return names
        return []

    def _fits(self, update: LowRank, module: str, leaf: str) -> bool:
        names = self._stored(module, leaf)
        dimensions = len(self._checkpoint.tensors[names[0]].shape)
        shape, wanted = self._shape_of(module, leaf), self._wanted(update)
        stacked = len(names) > 1 or dimensions == 3
        return dimensions in (2, 3) and (shape == wanted or (stacked and shape == wanted[::-1]))

    def _replacement(self, path: str, source: str) -> MergeEdit:
        name = self._need(path, source)
        self._check_shape(source, self._adapter.shape(source), self._checkpoint.tensors[name])
        return self._edit(name, "replaced", source)

    def _of_tokens(self, rows: TokenRows) -> MergeEdit:
        name = self._need(f"{rows.module}.weight", rows.rows)
        tensor = self._checkpoint.tensors[name]
        self._check_shape(rows.rows, (tensor.shape[0], self._adapter.shape(rows.rows)[1]), tensor)
        if (last := max(rows.tokens)) >= tensor.shape[0]:
            raise AdapterError(
                f"{self._file}: {rows.rows}: trained token {last}, and {name} has {tensor.shape[0]} rows; save the "
                "adapter again with save_embedding_layers=True, which saves the others"
            )
        return self._edit(name, "rows", rows.rows, tokens=rows.tokens)

    def _edit(self, name: str, kind: Kind, *source: str, **more: Any) -> MergeEdit:
        tensor = self._checkpoint.tensors[name]
        self._check_dtype(tensor)
        if kind != "replaced":
            more.setdefault("begins_as", self.found.begins_as.get(name))
        return MergeEdit(**dataclasses.asdict(tensor), kind=kind, source=source, **more)

    def _scaling(self, update: LowRank, key: str, experts: int) -> tuple[int, float]:
        rank, scale = self._adapter.scaling(key)
        down, up = self._adapter.shape(update.down), self._adapter.shape(update.up)
        if update.kind != "embedding" and (len(down), len(up)) != (2, 2):
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

    def _stored_as_conv1d(self, name: str, *, default: bool) -> bool:
        """Tells the layout of a square weight by the architecture table."""
        if self._anatomy is not None:
            axes = {
                writer.name: writer.axis
                for writer in self._anatomy.writers
                if writer.kind == "weight" and writer.component != "embedding"
            }
            if name in axes:
                return axes[name] == -1
            # As of its neighbours; peft does not take the adapter's word for it either.
            return any(axis == -1 for name, axis in axes.items() if len(self._source.tensors[name].shape) == 2)
        return default

    def _check_dtype(self, tensor: TensorInfo) -> None:
        if tensor.dtype in ITEM_BYTES:
            return
        way_out = (
            "convert the checkpoint to one of them"
            if quantisation_of(self._source.config) is None
            else "its codes cannot take what an adapter adds, so add --dequantise"
        )
        raise PlanError(f"{tensor.name}: expected BF16, F16 or F32, found {tensor.dtype}; {way_out}")

    def _check_shape(self, source: str, shape: tuple[int, ...], tensor: TensorInfo) -> None:
        self._check_dtype(tensor)
        if shape != tensor.shape:
            raise AdapterError(
                f"{self._file}: {source}: expected what fits {tensor.name} of shape {list(tensor.shape)}, "
                f"found what fits {list(shape)}; merge the adapter into the model that it was trained on"
            )

    def _need(self, path: str, source: str) -> str:
        if (name := self._find(path)) is None:
            raise AdapterError(self._no_match(source, path))
        return name

    def _no_match(self, source: str, path: str) -> str:
        if self._is_codes(path):
            return (
                f"{self._file}: {source} is of {path}, which {self._checkpoint.name} holds as codes that cannot take "
                "what an adapter adds; add --dequantise"
            )
        if path.startswith("v_head."):
            return (
                f"{self._file}: {source} is of a value head, which scores answers while a model is trained and is no "
                "part of a checkpoint; take it out of the adapter"
            )
        expert = _OF_EXPERT.fullmatch(path.rpartition(".")[0])
        if expert and any(self._find(f"{expert['stack']}.{fused}") for fused in _UNFUSED):
            return (
                f"{self._file}: {source} is saved whole for one expert, and {self._checkpoint.name} holds its experts "
                f"in stacks, of which only what a LoRA adds is merged expert by expert; {_WITH_PEFT}"
            )
        return (
            f"{self._file}: {source} matches no weight of {self._checkpoint.name} ({path}); merge it into the model "
            f"that it was trained on, or if that is this one, {_WITH_PEFT}"
        )

    def _is_codes(self, path: str) -> bool:
        """Tells whether a weight, or what holds it among others, would be there if nothing were quantised."""
        plain = {
            plain_name_of(name): tensor
            for name, tensor in self._checkpoint.tensors.items()
            if is_codes(tensor, ending_of(name))
        }
        find = Names(dataclasses.replace(self._checkpoint, tensors=plain), self._anatomy, self._file).find
        module = path.removesuffix(".weight")
        parent, _, leaf = module.rpartition(".")
        names = [path, *(f"{parent}.{part}.weight" for part in _FUSED.get(leaf, ()))]
        names += [f"{parent}.{fused}.weight" for fused, leaves in _FUSED.items() if leaf in leaves]
        stack = found["stack"] if (found := _OF_EXPERT.fullmatch(module)) else module
        for fused, parts in _UNFUSED.items():
            names += [f"{stack}.{fused}", *(f"{stack}.0.{leaves[0]}.weight" for leaves in parts)]
        return any(find(name) is not None for name in names)


def _without(adapter: Adapter, sources: Collection[str]) -> Adapter:
    """Returns an adapter without some of its tensors."""
    return dataclasses.replace(
        adapter,
        updates=tuple(update for update in adapter.updates if update.down not in sources),
        replaced={path: source for path, source in adapter.replaced.items() if source not in sources},
        copies={path: source for path, source in adapter.copies.items() if source not in sources},
        token_rows=tuple(rows for rows in adapter.token_rows if rows.rows not in sources),
    )


def _columns_of(part: MergePart, width: int) -> set[int]:
    return set(range(*(part.columns or (0, width, 1))))


def _parts_of(leaf: str) -> int:
    """Returns how many matrices of an expert a fused parameter holds."""
    return len(_UNFUSED[leaf][0])


def _takes_input_first(version: str | None, *, marked: bool | None) -> bool | None:
    """Returns whether peft takes the first axis of a stacked parameter for the input; None where that is not known.

    Args:
        version: The version of peft.
        marked: Whether transformers marks the module as transposed, None where that depends on its version.
    """
    found = re.match(r"(\d+)\.(\d+)\.(\d+)(\.dev)?", version or "")
    if found is None:
        return None
    number = (int(found[1]), int(found[2]), int(found[3]))
    if found[4] and number in ((0, 19, 0), (0, 19, 1)):
        return None
    if number < (0, 19, 0):
        return True
    if marked is None:
        return None
    return not marked if number == (0, 19, 0) else marked


#: Elements of a parameter that is replaced, read at a time.
PIECE_ELEMENTS = 1 << 18


def receipts_beside(checkpoint: Checkpoint) -> list[str]:
    """Returns the names of the receipts beside a base that was itself edited."""
    return [name for name, _ in checkpoint.left_out if name in RECEIPT_NAMES]
