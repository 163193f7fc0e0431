"""Merges a LoRA adapter into a checkpoint on its shards: ``W + s·B·A``, and every other byte as it was."""

from ablate_shards.names import MERGE_RECEIPT_NAME
from ablate_shards.surgery.checkpoint.amended import amend
from ablate_shards.surgery.dequantise.dequantisation import Dequantisation, identity_of
from ablate_shards.surgery.edit.operation import Operation, as_it_is
from ablate_shards.surgery.merge.adapter import Adapter
from ablate_shards.surgery.merge.amendments import read_files
from ablate_shards.surgery.merge.editor import MergeEditor, MergeResult
from ablate_shards.surgery.merge.plan import MergeEdit, MergePlan
from ablate_shards.surgery.merge.receipt import merge_receipt_text

__all__ = ["merging"]


def merging(
    adapter: Adapter, plan: MergePlan, dequantisation: Dequantisation | None = None
) -> Operation[MergeEdit, MergeResult]:
    """Returns the operation that merges an adapter as planned.

    Args:
        adapter: What to merge.
        plan: What to do, to the base as it is once some of it is dequantised.
        dequantisation: What of the base is dequantised first.
    """
    dequantised = as_it_is if dequantisation is None else dequantisation.applied
    return Operation(
        edits=plan.edits,
        identity={"the plan": plan.sha256()} | identity_of(dequantisation),
        editor=lambda run, stop: MergeEditor(run.device, run.memory, run.jobs, stop, adapter),
        result=MergeResult,
        receipt_name=MERGE_RECEIPT_NAME,
        receipt=lambda checkpoint, results, arithmetic: merge_receipt_text(
            checkpoint, adapter, plan, results, arithmetic, dequantisation
        ),
        amend=lambda checkpoint: amend(dequantised(checkpoint), plan.amendments, read_files(adapter, plan.amendments)),
    )
