"""Measures again what an adapter that was made of an edit does to its source, and compares it with the receipt."""

import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablate_shards.errors import AblateError, AdapterError, HubError, VerifyError
from ablate_shards.names import ADAPTER_RECEIPT_NAME, CONFIG_NAME, WEIGHTS_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.checkpoint.digest import SOURCE_WEIGHTS, base_digest
from ablate_shards.surgery.checkpoint.files import Folder
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.edit.receipt import directions_of, edits_of, headers_of, incomplete, read_sealed
from ablate_shards.surgery.extract.ablated import plan_of_edits
from ablate_shards.surgery.extract.extraction import (
    Matrices,
    Source,
    factors_of,
    jobs_of,
    measured_with,
    room_of,
    workspace_on_cpu,
)
from ablate_shards.surgery.extract.plan import AdapterPlan, Module
from ablate_shards.surgery.extract.receipt import ADAPTER_FORMAT, ModuleResult, digest_of
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.merge.adapter import read_adapter
from ablate_shards.surgery.plan.bases import resolve_bases
from ablate_shards.surgery.verify.proof import Difference
from ablate_shards.validation import checked

__all__ = ["AdapterVerification", "changed_since", "verify_adapter"]

#: By how much a measurement may differ, relative to it and at least: another library sums in another order.
_RELATIVE, _LEAST = 1e-4, 1e-6


@dataclass(frozen=True, slots=True)
class AdapterVerification:
    """What a verification of an adapter found.

    Attributes:
        differences: Everything that is not as the receipt says; empty if all is well.
        modules: Modules that the adapter changes.
        measured: Whether they were measured again with the source, or only compared with the receipt's digests.
    """

    differences: tuple[Difference, ...]
    modules: int
    measured: bool


def verify_adapter(checkpoint: Checkpoint, folder: Path, run: RunOptions, progress: Progress) -> AdapterVerification:
    """Compares an adapter with its receipt and with what it does to its source.

    The receipt holds the edits and the directions, so that every module is measured again: its component before,
    after the edit and with the adapter, and what of the edit the adapter lacks. Of an adapter that was made of two
    checkpoints only the digests are compared.

    Args:
        checkpoint: The source.
        folder: The adapter.
        run: In how much memory and how many threads.
        progress: Receives how far it has come.

    Raises:
        VerifyError: There is no receipt, or it is not of this source.
    """
    content, altered = read_sealed(folder, ADAPTER_RECEIPT_NAME, ADAPTER_FORMAT)
    try:
        shards = headers_of(content)
        recorded = _recorded(content)
        files = checked(content["files"], dict[str, str], "files")
        plan = _plan(checkpoint, content) if content["made_from"] == "ablation" and _same(checkpoint, shards) else None
    except (LookupError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise incomplete(Folder(folder), ADAPTER_RECEIPT_NAME, error) from error
    said = content.get(SOURCE_WEIGHTS)
    if not _same(checkpoint, shards) or (said is not None and base_digest(checkpoint) not in (None, said)):
        raise VerifyError(
            f"{checkpoint.name}: is not the source that {folder / ADAPTER_RECEIPT_NAME} names; name the checkpoint "
            "that the adapter was made of"
        )
    differences = [Difference(name, what) for name, what in _changed(folder, altered=altered, files=files)]
    if plan is not None:
        if {module.path for module in plan.modules} != recorded.keys():
            raise VerifyError(
                f"{folder / ADAPTER_RECEIPT_NAME}: does not record the modules that its edits change; it was changed "
                "after it was written"
            )
        differences += _measure_again(checkpoint, folder, plan, recorded, run, progress)
    return AdapterVerification(tuple(differences), len(recorded), measured=plan is not None)


def changed_since(folder: Path) -> str | None:
    """Returns what of an adapter was changed after it was made, None where nothing was.

    Raises:
        VerifyError: There is no receipt, or a file that it names is missing.
    """
    content, altered = read_sealed(folder, ADAPTER_RECEIPT_NAME, ADAPTER_FORMAT)
    try:
        files = checked(content["files"], dict[str, str], "files")
    except (LookupError, TypeError, ValueError) as error:
        raise incomplete(Folder(folder), ADAPTER_RECEIPT_NAME, error) from error
    name = next((name for name, _ in _changed(folder, altered=altered, files=files)), None)
    return None if name is None else f"{folder / name} was changed after it was made"


def _changed(folder: Path, *, altered: bool, files: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yields the files of an adapter that are not as they were made, and what tells."""
    if altered:
        yield ADAPTER_RECEIPT_NAME, "changed after it was written (its digest does not hold)"
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (folder / name).is_file():
            raise VerifyError(f"{folder / name}: missing, although {ADAPTER_RECEIPT_NAME} names it; make it again")
        if files.get(name) != digest_of(folder / name):
            yield name, "the receipt records another digest of its bytes"


def _same(checkpoint: Checkpoint, shards: Mapping[str, str]) -> bool:
    return shards == {shard.name: shard.header_sha256 for shard in checkpoint.shards}


def _recorded(content: Mapping[str, Any]) -> dict[str, ModuleResult]:
    modules = content["modules"]
    results = checked(modules, tuple[ModuleResult, ...], "modules")
    return {str(module["path"]): result for module, result in zip(modules, results, strict=True)}


def _plan(checkpoint: Checkpoint, content: Mapping[str, Any]) -> AdapterPlan:
    edits = edits_of(content["edits"], "edits")
    for edit in edits:
        known = checkpoint.tensors.get(edit.name)
        if known is None or (known.shard, known.start, known.end) != (edit.shard, edit.start, edit.end):
            raise ValueError(f"{edit.name} does not lie in the source where it says")
    bases = resolve_bases(edits, checkpoint, directions_of(content))
    return plan_of_edits(checkpoint, edits, bases, str(content["family"]), None, tied=content["tied"] is True)


def _measure_again(
    checkpoint: Checkpoint,
    folder: Path,
    plan: AdapterPlan,
    recorded: Mapping[str, ModuleResult],
    run: RunOptions,
    progress: Progress,
) -> list[Difference]:
    adapter = read_adapter(folder)
    stop, local = threading.Event(), threading.local()
    source = Source(checkpoint, stop)
    progress.begin(sum(change.size for each in plan.modules for change in each.changes))

    def compare(module: Module) -> Difference | None:
        if not hasattr(local, "matrices"):
            local.matrices = Matrices(source, workspace_on_cpu(), room_of(plan, run))
        try:
            ups, downs = factors_of(module, adapter.read)
            found = measured_with(module, ups, downs, local.matrices)
        except KeyError as error:
            return Difference(module.path, f"the adapter lacks its tensor {error.args[0]}")
        except (HubError, AdapterError):
            raise
        except (AblateError, ValueError) as error:
            return Difference(module.path, str(error))
        finally:
            progress.advance(sum(change.size for change in module.changes))
        return _difference(module.path, recorded[module.path], found)

    try:
        with ThreadPoolExecutor(jobs_of(plan, run)) as pool:
            return [found for found in pool.map(compare, plan.modules) if found is not None]
    finally:
        stop.set()


def _difference(path: str, recorded: ModuleResult, found: ModuleResult) -> Difference | None:
    said, measured = asdict(recorded), asdict(found)
    for name, value in measured.items():
        if not np.isclose(value, said[name], rtol=_RELATIVE, atol=_LEAST):
            return Difference(path, f"{name} is {value:.6g}, but the receipt says {said[name]:.6g}")
    return None
