"""An ablation as an adapter: what each edit of its plan changes."""

import functools
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ablate_shards.surgery.anatomy.architecture import dissect
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_range, read_vector
from ablate_shards.surgery.checkpoint.headers import TensorInfo
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.edit.receipt import ablation_record, edit_record
from ablate_shards.surgery.extract.matrices import AblatedMatrix, Pair, ReadInto, StoredMatrix, count_matrices
from ablate_shards.surgery.extract.plan import AdapterPlan, Change, make_adapter_plan
from ablate_shards.surgery.extract.receipt import Made, adapter_receipt_text
from ablate_shards.surgery.plan.edits import BasisKey, TensorEdit
from ablate_shards.surgery.plan.plan import Plan
from ablate_shards.surgery.plan.recipe import AblateOptions

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Workspace

__all__ = ["ablation_receipt", "plan_ablation_adapter", "plan_of_edits"]


def plan_ablation_adapter(
    checkpoint: Checkpoint, plan: Plan, options: AblateOptions, rank: int | None = None
) -> AdapterPlan:
    """Returns which modules an adapter changes that does what an ablation does.

    Args:
        checkpoint: The source.
        plan: The ablation.
        options: How it was planned.
        rank: The rank of the adapter, None for the one that is enough.

    Raises:
        PlanError: There is nothing that an adapter could carry.
        UsageError: The rank is less than that of the directions.
    """
    tied = dissect(checkpoint.tensors, checkpoint.config, options.targets).tied
    return plan_of_edits(checkpoint, plan.edits, plan.bases, plan.family, rank, tied=tied)


def plan_of_edits(
    checkpoint: Checkpoint,
    edits: Iterable[TensorEdit],
    bases: Mapping[BasisKey, np.ndarray],
    family: str,
    rank: int | None,
    *,
    tied: bool,
) -> AdapterPlan:
    """Returns which modules an adapter changes that does what the edits of an ablation do.

    Args:
        checkpoint: The source.
        edits: The edits.
        bases: What they remove, ``[k, d]`` float64, orthonormal rows.
        family: The architecture the table recognised.
        rank: The rank of the adapter, None for the one that is enough.
        tied: Whether the output head is tied to the token embedding.

    Raises:
        PlanError: There is nothing that an adapter could carry.
        UsageError: The rank is less than that of the directions.
    """
    return make_adapter_plan(checkpoint, list(_changes(checkpoint, edits, bases)), family, rank, tied=tied)


def ablation_receipt(
    checkpoint: Checkpoint, plan: Plan, options: AblateOptions, directions: Directions, made: Made
) -> str:
    """Returns the receipt of an adapter that does what an ablation does."""
    origin = {
        "made_from": "ablation",
        **ablation_record(checkpoint, plan, options, directions),
        "tied": made.plan.tied,
        "edits": [edit_record(edit) for edit in plan.edits],
    }
    return adapter_receipt_text(made, checkpoint, origin)


def _changes(
    checkpoint: Checkpoint, edits: Iterable[TensorEdit], bases: Mapping[BasisKey, np.ndarray]
) -> Iterator[Change]:
    scales = functools.partial(read_range, checkpoint)
    for edit in edits:
        basis = bases[edit.basis]
        place = TensorInfo(edit.name, edit.dtype, edit.shape, edit.shard, edit.start, edit.end)
        if edit.kind == "bias":
            vector = functools.partial(_bias, checkpoint, edit, basis)
            yield Change(place, "bias", edit.axis, vector=vector, mtp=edit.mtp)
            continue
        yield Change(
            place,
            "weight",
            edit.axis,
            matrices=count_matrices(edit, edit.scales),
            open=functools.partial(_open, edit, basis, scales),
            basis=basis,
            exact=len(basis) if edit.preserve == "none" else None,
            scales=edit.scales,
            mtp=edit.mtp,
        )


def _open(
    edit: TensorEdit, basis: np.ndarray, scales: Any, read: ReadInto, number: int, workspace: "Workspace"
) -> Pair:
    stored = StoredMatrix(edit, edit.scales, number, read, scales)
    return AblatedMatrix(stored, edit, number, basis, workspace)


def _bias(checkpoint: Checkpoint, edit: TensorEdit, basis: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    bias = read_vector(checkpoint, TensorInfo(edit.name, edit.dtype, edit.shape, edit.shard, edit.start, edit.end))
    return bias, bias - edit.coefficient * (basis.T @ (basis @ bias))
