"""Decides which weights are dequantised and what else of a checkpoint changes with them, and shows it as it then is."""

import dataclasses
import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from ablate_shards.errors import PlanError
from ablate_shards.surgery.anatomy.scales import method_of, quantisation_of
from ablate_shards.surgery.checkpoint.amended import Amendments, NewTensor, amend
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.dequantise.configuration import exempting, without_quantisation
from ablate_shards.surgery.dequantise.decoding import Kept
from ablate_shards.surgery.dequantise.found import (
    DequantisedRecord,
    QuantisedWeight,
    find_quantised,
    left_without_weights,
    modules_and_experts,
    names_of_codes,
    with_their_experts,
)
from ablate_shards.surgery.dequantise.values import Values

__all__ = ["Dequantisation", "identity_of", "plan_dequantisation"]


@dataclass(frozen=True, slots=True)
class Dequantisation:
    """What is dequantised of a checkpoint.

    Attributes:
        weights: The weights, in the order of the checkpoint's tensors.
        whole: Whether nothing stays quantised.
        amendments: What changes with them.
        contents: The contents of files that change.
        notes: What the user should know before the run, a line each.
    """

    weights: tuple[QuantisedWeight, ...]
    whole: bool
    amendments: Amendments
    contents: Mapping[str, bytes] = field(repr=False)
    notes: tuple[str, ...] = ()

    def applied(self, checkpoint: Checkpoint) -> Checkpoint:
        """Returns the checkpoint with these weights in bfloat16; they are computed when they are read."""
        kept = Kept()
        computed = {weight.name: Values(checkpoint, weight, kept) for weight in self.weights}
        return amend(checkpoint, self.amendments, self.contents, computed)

    def records(self) -> tuple[DequantisedRecord, ...]:
        """Returns what a receipt says of the weights."""
        return tuple(weight.record for weight in self.weights)

    def as_dict(self) -> dict[str, Any]:
        """Returns what is done as JSON types."""
        return {
            "tensors": [dataclasses.asdict(record) for record in self.records()],
            "whole": self.whole,
            "config": dict(self.amendments.config),
            "unset": list(self.amendments.unset),
            "dropped": list(self.amendments.dropped),
        }

    def sha256(self) -> str:
        """Returns the digest of the records."""
        return hashlib.sha256(
            json.dumps([dataclasses.asdict(record) for record in self.records()]).encode()
        ).hexdigest()


def identity_of(dequantisation: Dequantisation | None) -> dict[str, str]:
    """Returns what must be equal for an interrupted run to be resumed: nothing where nothing is dequantised."""
    return {} if dequantisation is None else {"the weights to dequantise": dequantisation.sha256()}


def plan_dequantisation(checkpoint: Checkpoint, names: Collection[str] | None = None) -> Dequantisation:
    """Decides what to dequantise; of weights nothing has been read but the shapes that packed ones state.

    Args:
        checkpoint: The source.
        names: The tensors of codes to dequantise, with which all the experts of a layer go; all of them if None.

    Raises:
        ArchitectureError: A weight is in a format that is not decoded here, or its parts do not fit.
        PlanError: Nothing is quantised, or there is no configuration to change.
        UsageError: One of the names holds no codes.
    """
    chosen = None if names is None else with_their_experts(checkpoint, names)
    weights = find_quantised(checkpoint, chosen)
    whole = chosen is None or chosen == names_of_codes(checkpoint)
    dropped = [part for weight in weights for part in weight.parts if part != weight.name]
    if whole:
        dropped += left_without_weights(checkpoint, weights)
    if not weights:
        dtypes = ", ".join(sorted({tensor.dtype for tensor in checkpoint.tensors.values()}))
        raise PlanError(
            f"{checkpoint.name}: holds no quantised weights (its tensors are {dtypes}), so there is nothing to "
            "dequantise; use it as it is"
        )
    if whole:
        changes = without_quantisation(checkpoint)
    else:
        together = method_of(quantisation_of(checkpoint.config)) not in ("mlx", "auto-round")
        changes = exempting(checkpoint, *modules_and_experts(weights, together=together))
    amendments = Amendments(
        tensors=tuple(NewTensor(weight.name, weight.codes.shard, "BF16", weight.shape) for weight in weights),
        config=changes.config,
        files={name: hashlib.sha256(content).hexdigest() for name, content in changes.contents.items()},
        dropped=tuple(dropped),
        unset=tuple(changes.unset),
        removed=tuple(changes.removed),
    )
    return Dequantisation(tuple(weights), whole, amendments, changes.contents, () if whole else _notes(checkpoint))


def _notes(checkpoint: Checkpoint) -> tuple[str, ...]:
    config = quantisation_of(checkpoint.config)
    if isinstance(config, Mapping) and config.get("quant_method") == "mxfp4":
        return ("the experts of some layers stay in MXFP4: transformers loads that, vLLM takes all layers or none",)
    return ()
