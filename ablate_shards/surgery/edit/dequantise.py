"""The dequantisation of a checkpoint as an operation of its own: nothing is edited beside it."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate_shards import __version__
from ablate_shards.names import DEQUANTISATION_RECEIPT_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.files import Files
from ablate_shards.surgery.dequantise.dequantisation import Dequantisation, identity_of
from ablate_shards.surgery.dequantise.found import DequantisedRecord
from ablate_shards.surgery.edit.blocks import BlockEditor
from ablate_shards.surgery.edit.operation import Operation, RunOptions
from ablate_shards.surgery.edit.receipt import (
    copied_files,
    dequantised_of,
    dequantised_record,
    files_record,
    headers_of,
    incomplete,
    read_sealed,
    revision_of,
    seal,
    source_record,
)
from ablate_shards.surgery.edit.sections import Section
from ablate_shards.surgery.plan.edits import Edit

__all__ = ["DequantisationReceipt", "NothingEdited", "Unedited", "dequantising", "read_dequantisation_receipt"]

DEQUANTISATION_FORMAT = "ablate-shards.dequantisation/1"


@dataclass(frozen=True, slots=True)
class NothingEdited:
    """What would be measured of an edited tensor."""


class Unedited(BlockEditor[Edit, NothingEdited]):
    """The editor of an operation without edits.

    Args:
        run: How to run.
        stop: Set when the run should end early.
    """

    on_cpu = "numpy"

    def __init__(self, run: RunOptions, stop: threading.Event) -> None:
        # Codes are decoded on the CPU wherever they are edited.
        super().__init__("cpu", run.memory, run.jobs, stop)

    def sections(self, edit: Edit) -> Sequence[Section]:
        """Returns none."""
        return ()

    def result(self, edit: Edit, measured: Sequence[Any], digest: str) -> NothingEdited:
        """Returns nothing."""
        return NothingEdited()


@dataclass(frozen=True, slots=True)
class DequantisationReceipt:
    """What the receipt of a dequantisation says that can be checked, as read.

    Attributes:
        revision: The commit of the source, None where it has no history.
        shards: Digests of the source's headers, by shard.
        copied: The files beside the shards that are the source's, or were but for what was changed in them.
        dequantised: The weights.
        altered: Whether its bytes are not the ones that were written.
    """

    revision: str | None
    shards: Mapping[str, str]
    copied: tuple[str, ...]
    dequantised: tuple[DequantisedRecord, ...]
    altered: bool


def dequantising(dequantisation: Dequantisation) -> Operation[Edit, NothingEdited]:
    """Returns the operation that dequantises a checkpoint as planned."""
    return Operation(
        edits=(),
        identity=identity_of(dequantisation),
        editor=Unedited,
        result=NothingEdited,
        receipt_name=DEQUANTISATION_RECEIPT_NAME,
        receipt=lambda checkpoint, _, arithmetic: _receipt_text(checkpoint, dequantisation, arithmetic),
        amend=dequantisation.applied,
    )


def _receipt_text(checkpoint: Checkpoint, dequantisation: Dequantisation, device: Mapping[str, str]) -> str:
    return seal(
        {
            "format": DEQUANTISATION_FORMAT,
            "tool": f"ablate-shards {__version__}",
            "source": source_record(checkpoint),
            "device": dict(device),
            **dequantised_record(dequantisation),
            "files": files_record(checkpoint, dequantisation),
        }
    )


def read_dequantisation_receipt(folder: Path | Files) -> DequantisationReceipt:
    """Reads the receipt of a dequantisation, wherever it is.

    Raises:
        VerifyError: There is none, it is of a newer version, or it is not a receipt.
    """
    content, altered = read_sealed(folder, DEQUANTISATION_RECEIPT_NAME, DEQUANTISATION_FORMAT)
    try:
        return DequantisationReceipt(
            revision=revision_of(content),
            shards=headers_of(content),
            copied=copied_files(content),
            dequantised=dequantised_of(content),
            altered=altered,
        )
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise incomplete(folder, DEQUANTISATION_RECEIPT_NAME, error) from error
