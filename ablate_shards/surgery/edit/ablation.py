"""The ablation as an operation on a checkpoint: its plan, its editor and its receipt."""

import functools
from collections.abc import Mapping

from ablate_shards.errors import ExecuteError
from ablate_shards.names import RECEIPT_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, read_range
from ablate_shards.surgery.dequantise.dequantisation import Dequantisation, identity_of
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.edit.ablation_editor import AblationEditor, CodedResult, TensorResult
from ablate_shards.surgery.edit.operation import Operation, as_it_is
from ablate_shards.surgery.edit.receipt import receipt_text
from ablate_shards.surgery.plan.edits import TensorEdit
from ablate_shards.surgery.plan.plan import Plan
from ablate_shards.surgery.plan.recipe import AblateOptions

__all__ = ["ablation"]

#: How much of an edit rounding may undo.
MOST_UNDONE = 0.01


def ablation(
    checkpoint: Checkpoint,
    plan: Plan,
    directions: Directions,
    options: AblateOptions,
    dequantisation: Dequantisation | None = None,
    *,
    force: bool = False,
) -> Operation[TensorEdit, TensorResult]:
    """Returns the operation that carries out a plan.

    Args:
        checkpoint: What the plan is for: the source, or what it is once some of it is dequantised.
        plan: What to do.
        directions: What it was made from, for the receipt.
        options: How it was made, for the receipt.
        dequantisation: What of the source is dequantised first.
        force: Whether a result is kept in which rounding to the nearest codes undid much of the edit.
    """

    def receipt(source: Checkpoint, results: Mapping[str, TensorResult], arithmetic: Mapping[str, str]) -> str:
        if not force:
            _check_undone(results)
        return receipt_text(source, plan, options, directions, results, arithmetic, dequantisation)

    read = functools.partial(read_range, checkpoint)
    return Operation(
        edits=plan.edits,
        identity={"the plan": plan.sha256()} | identity_of(dequantisation),
        editor=lambda run, stop: AblationEditor(run.device, run.memory, run.jobs, stop, plan.bases, read),
        result=TensorResult.kept,
        receipt_name=RECEIPT_NAME,
        receipt=receipt,
        amend=as_it_is if dequantisation is None else dequantisation.applied,
    )


def _check_undone(results: Mapping[str, TensorResult]) -> None:
    """Refuses a result in which rounding undid more of the edit than anybody would want.

    Raises:
        ExecuteError: It did.
    """
    undone = {
        name: result.undone
        for name, result in results.items()
        if isinstance(result, CodedResult) and result.undone is not None
    }
    worst = max(undone, key=lambda name: undone[name], default="")
    if undone and undone[worst] > MOST_UNDONE:
        raise ExecuteError(
            f"{worst}: the nearest codes undo {undone[worst]:.0%} of the edit, and more than {MOST_UNDONE:.0%} is not "
            "kept; leave --rounding nearest out, or add --force to keep the result for comparison"
        )
