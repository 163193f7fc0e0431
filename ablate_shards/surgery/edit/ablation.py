"""The ablation as an operation on a checkpoint: its plan, its editor and its receipt."""

import functools

from ablate_shards.names import RECEIPT_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_range
from ablate_shards.surgery.dequantise.dequantisation import Dequantisation, identity_of
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.edit.ablation_editor import AblationEditor, TensorResult
from ablate_shards.surgery.edit.operation import Operation, as_it_is
from ablate_shards.surgery.edit.receipt import receipt_text
from ablate_shards.surgery.plan.edits import TensorEdit
from ablate_shards.surgery.plan.plan import Plan
from ablate_shards.surgery.plan.recipe import AblateOptions

__all__ = ["ablation"]


def ablation(
    checkpoint: Checkpoint,
    plan: Plan,
    directions: Directions,
    options: AblateOptions,
    dequantisation: Dequantisation | None = None,
) -> Operation[TensorEdit, TensorResult]:
    """Returns the operation that carries out a plan.

    Args:
        checkpoint: What the plan is for: the source, or what it is once some of it is dequantised.
        plan: What to do.
        directions: What it was made from, for the receipt.
        options: How it was made, for the receipt.
        dequantisation: What of the source is dequantised first.
    """
    read = functools.partial(read_range, checkpoint)
    return Operation(
        edits=plan.edits,
        identity={"the plan": plan.sha256()} | identity_of(dequantisation),
        editor=lambda run, stop: AblationEditor(run.device, run.memory, run.jobs, stop, plan.bases, read),
        result=TensorResult.kept,
        receipt_name=RECEIPT_NAME,
        receipt=lambda checkpoint, results, arithmetic: receipt_text(
            checkpoint, plan, options, directions, results, arithmetic, dequantisation
        ),
        amend=as_it_is if dequantisation is None else dequantisation.applied,
    )
