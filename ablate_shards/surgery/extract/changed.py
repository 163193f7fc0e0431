"""What lies between two checkpoints as an adapter of the first: the inverse of a merge."""

import functools
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from ablate_shards.errors import ArchitectureError, PlanError
from ablate_shards.surgery.anatomy.architecture import Anatomy, dissect, head_of, split_layer
from ablate_shards.surgery.anatomy.scales import Scales, ending_of, is_codes, quantisation_of
from ablate_shards.surgery.anatomy.tied import stored_head
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_range, read_vector, same_tensor
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES, TensorInfo
from ablate_shards.surgery.dequantise.decoding import read_scales
from ablate_shards.surgery.edit.receipt import source_record
from ablate_shards.surgery.extract.matrices import ChangedMatrix, Pair, ReadInto, StoredMatrix, count_matrices
from ablate_shards.surgery.extract.modules import ModuleNames
from ablate_shards.surgery.extract.plan import AdapterPlan, Change, make_adapter_plan
from ablate_shards.surgery.extract.receipt import Made, adapter_receipt_text
from ablate_shards.surgery.plan.edits import Edit, Skip

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Workspace

__all__ = ["difference_receipt", "plan_difference_adapter"]

_EXPERTS, _COMPUTED = ".experts.", ".rotary_emb.inv_freq"
#: Families whose linear weights, and those whose stacks of experts, are stored as ``[in, out]``.
_CONV1D, _MARKED = frozenset({"GPT-2"}), frozenset({"Aria", "gpt-oss"})
_MOST_NAMES = 3


def plan_difference_adapter(first: Checkpoint, second: Checkpoint, rank: int | None = None) -> AdapterPlan:
    """Returns which modules an adapter changes that makes of one checkpoint what another is.

    Args:
        first: What the adapter is for; on this machine.
        second: What it makes of it; on this machine, of the same tensors in the same shapes.
        rank: The rank of the adapter, None for the one that is enough.

    Raises:
        PlanError: The checkpoints do not hold the same tensors in the same shapes, they do not differ, or in nothing
            that an adapter could carry.
    """
    anatomy = _anatomy_of(first)
    family = None if anatomy is None else anatomy.family
    left_out = _left_behind(first, second)
    differences = _Differences(first, second, family)
    changes: list[Change] = []
    for tensor in differences.found():
        found = differences.of(tensor)
        if isinstance(found, Change):
            changes.append(found)
        else:
            left_out.append(Skip(tensor.name, None, None, found))
    if not changes and not left_out:
        raise PlanError(f"{second.name}: holds the same weights as {first.name}, so that there is nothing to extract")
    tied = anatomy is not None and anatomy.tied and head_of(first.tensors) is None
    return make_adapter_plan(first, changes, family, rank, tied=tied, left_out=left_out)


def difference_receipt(first: Checkpoint, second: Checkpoint, made: Made) -> str:
    """Returns the receipt of an adapter that makes of one checkpoint what another is."""
    origin = {"made_from": "difference", "source": source_record(first), "other": source_record(second)}
    return adapter_receipt_text(made, first, origin)


def _anatomy_of(checkpoint: Checkpoint) -> Anatomy | None:
    try:
        return dissect(checkpoint.tensors, checkpoint.config)
    except ArchitectureError:
        return None


def _left_behind(first: Checkpoint, second: Checkpoint) -> list[Skip]:
    """Returns what only one of the checkpoints holds and the decoder does without.

    Raises:
        PlanError: One of them lacks a part of the decoder, or a tensor has another shape.
    """
    left: list[Skip] = []
    for one, other, which in ((first, second, "first"), (second, first, "second")):
        reasons = _why_dispensable(one, [name for name in one.tensors if name not in other.tensors])
        if lacking := [name for name, reason in reasons.items() if reason is None]:
            raise PlanError(
                f"{other.name}: lacks {_names(lacking)}, which {one.name} holds, and an adapter neither adds nor "
                "removes tensors; compare two checkpoints of the same model, in the same form"
            )
        left += [
            Skip(name, None, None, f"only the {which} checkpoint holds it, {reason}")
            for name, reason in reasons.items()
        ]
    for name, tensor in first.tensors.items():
        if name in second.tensors and tensor.shape != second.tensors[name].shape:
            raise PlanError(
                f"{name}: is {list(tensor.shape)} in {first.name} and {list(second.tensors[name].shape)} in "
                f"{second.name}, and an adapter changes no shape; compare two checkpoints of the same model"
            )
    return left


def _why_dispensable(one: Checkpoint, alone: Sequence[str]) -> dict[str, str | None]:
    """Returns why a decoder does without each of some tensors, None where it does not."""
    reasons = {name: "and loaders compute it" if name.endswith(_COMPUTED) else None for name in alone}
    anatomy = _anatomy_of(one) if alone else None
    if anatomy is None:
        return reasons
    names, head = ModuleNames(one.tensors, one.config, anatomy.family), head_of(one.tensors)
    predicting = {writer.layer for writer in anatomy.writers if writer.mtp}
    for name in (name for name, reason in reasons.items() if reason is None):
        if not names.holds(name) or split_layer(name)[0] in predicting:
            reasons[name] = "and it is no part of the decoder"
        elif name == head and (stored := stored_head(one, anatomy)) is not None and stored.embedding is not None:
            reasons[name] = "a copy of the embedding that it is tied to"
    return reasons


class _Differences:
    """Finds what of a tensor differs, and how an adapter changes it."""

    def __init__(self, first: Checkpoint, second: Checkpoint, family: str | None) -> None:
        self._first, self._second, self._family = first, second, family
        self._names = ModuleNames(first.tensors, first.config, family)
        self._scales = tuple(_scales_of(checkpoint) for checkpoint in (first, second))
        self._beside = {part.name for scales in self._scales[0].values() for part in (scales, *scales.parts)}

    def found(self) -> list[TensorInfo]:
        """Returns the tensors that differ, and all experts of those that the model makes one parameter of."""
        tensors = [
            tensor
            for name, tensor in self._first.tensors.items()
            if name not in self._beside and name in self._second.tensors
        ]
        places = {tensor.name: self._names.place(tensor) for tensor in tensors}
        differing = {tensor.name for tensor in tensors if self._differs(tensor)}
        stacks = {place.path for name in differing if (place := places[name]) is not None and place.expert is not None}
        return [
            tensor
            for tensor in tensors
            if tensor.name in differing or ((place := places[tensor.name]) is not None and place.path in stacks)
        ]

    def of(self, tensor: TensorInfo) -> Change | str:
        """Returns what an adapter changes of a tensor that differs, or why it does not."""
        other, scales = self._second.tensors[tensor.name], self._scales[0].get(tensor.name)
        coded = scales is not None and tensor.name in self._scales[1]
        if not coded and not {tensor.dtype, other.dtype} <= ITEM_BYTES.keys():
            return f"{tensor.dtype} and {other.dtype} are not both read; convert them to BF16, F16 or F32"
        if not self._names.holds(tensor.name):
            return "lies outside of the decoder"
        if tensor.name.endswith("bias") and len(tensor.shape) == 1:
            vector = functools.partial(_vectors, self._first, self._second, tensor, other)
            return Change(tensor, "bias", -1, vector=vector)
        if tensor.name.endswith("bias"):
            return "peft carries the biases of linear modules only"
        if len(tensor.shape) < 2:
            return "is a vector, to which LoRA adds nothing"
        stacked = len(tensor.shape) == 3 and (coded or _EXPERTS in tensor.name)
        if (len(tensor.shape) > 2 and not stacked and not coded) or 0 in tensor.shape:
            return "is no matrix, nor a stack of those of experts"
        place = self._names.place(tensor)
        if place is None:
            return "is a part of what transformers makes one parameter of"
        alone = place.form == "parameter" and place.expert is None and not stacked
        if alone and not place.path.endswith(".weight"):
            return "is a parameter beside other weights of its module, which peft would wrap as one"
        axis = -1 if place.form == "embedding" else -2
        if not coded and self._family in (_MARKED if stacked else _CONV1D) and place.path != "lm_head":
            axis = -1
        return Change(
            tensor,
            "weight",
            axis,
            matrices=count_matrices(tensor, scales if coded else None),
            open=functools.partial(self._open, tensor, other),
            scales=scales if coded else None,
        )

    def _open(self, tensor: TensorInfo, other: TensorInfo, read: ReadInto, number: int, workspace: "Workspace") -> Pair:
        del workspace
        one = StoredMatrix(
            tensor, self._scales[0].get(tensor.name), number, read, functools.partial(read_range, self._first)
        )
        two = StoredMatrix(
            other, self._scales[1].get(tensor.name), number, self._read, functools.partial(read_range, self._second)
        )
        return ChangedMatrix(one, two, tensor.name)

    def _read(self, tensor: Edit, data: memoryview, offset: int) -> None:
        self._second.files.read_into(tensor.shard, data, offset, threading.Event())

    def _differs(self, tensor: TensorInfo) -> bool:
        """Compares a tensor, and what says what its codes mean."""
        parts = [tensor]
        if (scales := self._scales[0].get(tensor.name)) is not None:
            parts += [scales, *scales.parts]
        first, second = self._first, self._second
        return not all(
            part.name in second.tensors
            and same_tensor(first, first.tensors[part.name], second, second.tensors[part.name])
            for part in parts
        )


def _scales_of(checkpoint: Checkpoint) -> Mapping[str, Scales]:
    """Returns the scales of every weight of codes that can be read."""
    config, found = quantisation_of(checkpoint.config), {}
    for name, tensor in checkpoint.tensors.items():
        if is_codes(tensor, ending_of(name)) and tensor.dtype not in ITEM_BYTES:
            try:
                found[name] = read_scales(tensor, checkpoint.tensors, config, functools.partial(read_range, checkpoint))
            except ArchitectureError:
                continue
    return found


def _vectors(
    first: Checkpoint, second: Checkpoint, tensor: TensorInfo, other: TensorInfo
) -> tuple[np.ndarray, np.ndarray]:
    return read_vector(first, tensor), read_vector(second, other)


def _names(names: list[str]) -> str:
    rest = len(names) - _MOST_NAMES
    return ", ".join(names[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")
