"""Ends a run after an edit that broke the model, before more is built on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablate_shards.errors import GateError, RecipeError
from ablate_shards.surgery.evaluate.effect import Limits, effect, faults
from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation
from ablate_shards.surgery.run.stages import Stage
from ablate_shards.validation import checked

__all__ = ["check_gate", "read_limits"]

#: What to change, by the stage that broke the model.
_REMEDIES = {
    "ablate": "lower the coefficient, edit fewer layers, or take the directions from another contrast",
    "finetune": "train for fewer epochs, at a lower learning rate, or on more general samples",
}


def read_limits(table: Mapping[str, Any], path: Path) -> Limits:
    """Returns the limits that a recipe's ``[gate]`` sets, the usual ones where it says nothing.

    Raises:
        RecipeError: A limit is no number, or a negative one.
    """
    try:
        return checked(table, Limits)
    except ValueError as error:
        raise RecipeError(f"{path}: [gate] {error}") from error


def check_gate(stage: Stage, limits: Limits) -> None:
    """Reads what an evaluation found of an edit.

    Raises:
        GateError: The edit broke the model.
        EvaluateError: The evaluation cannot be read.
    """
    if stage.gated is None:
        return
    found = read_evaluation(stage.output)
    if faults(found, limits):
        raise GateError(
            f"{stage.gated}: {effect(found, limits)} To go on, {_REMEDIES[stage.gated]}; --no-gate goes on all the same"
        )
