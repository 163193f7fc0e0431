"""What was put into an adapter and what was measured of it, as a file beside its weights."""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ablate_shards import __version__
from ablate_shards.names import CONFIG_NAME, WEIGHTS_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.digest import SOURCE_WEIGHTS, base_digest
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.extract.plan import AdapterPlan
from ablate_shards.validation import Finite

if TYPE_CHECKING:
    from ablate_shards.kernels.lowrank.approximate import Merged

__all__ = ["ADAPTER_FORMAT", "Describe", "Made", "ModuleResult", "adapter_receipt_text"]

ADAPTER_FORMAT = "ablate-shards.adapter/1"


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What was measured of one module with its update, once both are as they are stored.

    Attributes:
        rank: Columns of B, of one expert.
        error: Norm of what the update lacks of the edit's difference, relative to the difference.
        before: Relative component along the directions, ‖RW‖/‖W‖, in the source.
        edited: The same of what the edit makes of it, before any rounding.
        after: The same of W + B·A in the dtype of the weight; of codes, of the values that they stand for.
        left: What of the component the edit takes away and the update does not, ‖R(W + B·A − W')‖/‖RW‖.
    """

    rank: int
    error: Finite
    before: Finite
    edited: Finite
    after: Finite
    left: Finite

    @classmethod
    def of(cls, rank: int, measured: "Sequence[Merged]") -> "ModuleResult":
        """Returns what was measured of several matrices together."""
        sums = [math.fsum(values) for values in zip(*measured, strict=True)]
        total, along, edited, edited_along, merged, merged_along, left, energy, missing = sums

        def relative(part: float, whole: float) -> float:
            return math.sqrt(part / whole) if whole > 0 else 0.0

        return cls(
            rank=rank,
            error=relative(missing, energy),
            before=relative(along, total),
            edited=relative(edited_along, edited),
            after=relative(merged_along, merged),
            left=relative(left, along),
        )


@dataclass(frozen=True, slots=True)
class Made:
    """An adapter as it was made.

    Attributes:
        plan: What it holds.
        results: What was measured of its modules, by their paths.
        files: The SHA-256 of its files, by name.
    """

    plan: AdapterPlan
    results: Mapping[str, ModuleResult]
    files: Mapping[str, str]

    @classmethod
    def of(cls, folder: Path, plan: AdapterPlan, results: Mapping[str, ModuleResult]) -> "Made":
        """Takes the digests of the files in a folder."""
        return cls(plan, results, {name: digest_of(folder / name) for name in (CONFIG_NAME, WEIGHTS_NAME)})


Describe: TypeAlias = Callable[[Made], str]
"""Returns the receipt of an adapter."""


def digest_of(path: Path) -> str:
    """Returns the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adapter_receipt_text(made: Made, source: Checkpoint, origin: Mapping[str, Any]) -> str:
    """Returns the receipt of an adapter as canonical JSON that ends in its own digest.

    Args:
        made: The adapter.
        source: What it is an adapter of.
        origin: What it does to that.
    """
    weights = base_digest(source)
    return seal(
        {
            "format": ADAPTER_FORMAT,
            "tool": f"ablate-shards {__version__}",
            **origin,
            **({} if weights is None else {SOURCE_WEIGHTS: weights}),
            "modules": [
                {
                    "path": module.path,
                    "form": module.form,
                    "tensors": [
                        {"name": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                        for change in module.changes
                        for tensor in change.tensors
                    ],
                    **({"bias": module.bias.name} if module.bias else {}),
                    **asdict(made.results[module.path]),
                }
                for module in made.plan.modules
            ],
            "left_out": [{"name": skip.name, "reason": skip.reason} for skip in made.plan.left_out],
            "files": dict(made.files),
        }
    )
