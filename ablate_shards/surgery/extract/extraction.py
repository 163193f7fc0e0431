"""Makes an adapter folder as planned: the factors of one module after the other, then the folder in one step."""

import contextlib
import functools
import json
import math
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from ablate_shards.errors import ExecuteError, Interrupted
from ablate_shards.names import ADAPTER_RECEIPT_NAME, CONFIG_NAME, WEIGHTS_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.edit.operation import RunOptions, check_unchanged
from ablate_shards.surgery.extract.matrices import Pair
from ablate_shards.surgery.extract.plan import LIMIT, MOST_RANK, RANK, AdapterPlan, Biases, Change, Module
from ablate_shards.surgery.extract.receipt import Made, ModuleResult
from ablate_shards.surgery.machine.files import pread_into, write_safetensors, write_whole
from ablate_shards.surgery.machine.progress import Progress
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt, uninterrupted
from ablate_shards.surgery.machine.staging import OutFolder, Staging, locked
from ablate_shards.surgery.machine.system import cores
from ablate_shards.surgery.plan.edits import Edit

if TYPE_CHECKING:
    from ablate_shards.kernels.ablate.project import Workspace
    from ablate_shards.kernels.lowrank.approximate import LowRank, Merged
    from ablate_shards.surgery.extract.receipt import Describe

__all__ = [
    "Matrices",
    "Source",
    "Stopped",
    "extract_adapter",
    "factors_of",
    "jobs_of",
    "measured_with",
    "room_of",
    "workspace_on_cpu",
]

_CHUNK = 8 << 20
#: Bytes that a job takes for each row and column of a matrix and each column of its sketch.
_SKETCH_BYTES = 4 * 8
_SPOOL = ".factors"


class Stopped(Exception):  # noqa: N818 - not an error: it ends a worker whose run has ended elsewhere
    """Ends a worker whose run has failed or been interrupted elsewhere."""


class Source:
    """The bytes of a checkpoint's tensors; those of one that is elsewhere are fetched once, module by module.

    Args:
        checkpoint: The checkpoint.
        stop: Set when the run should end early.
        folder: Where what is fetched is kept for as long as it is needed.
    """

    def __init__(self, checkpoint: Checkpoint, stop: threading.Event, folder: Path | None = None) -> None:
        self._checkpoint, self._stop, self._folder = checkpoint, stop, folder
        self._fetched: dict[str, IO[bytes]] = {}

    def read(self, tensor: Edit, data: memoryview, offset: int) -> None:
        """Fills a buffer from an offset of the shard that holds a tensor.

        Raises:
            Stopped: The run has ended elsewhere.
        """
        if self._stop.is_set():
            raise Stopped
        if self._folder is None or self._checkpoint.fetched(tensor.shard) is None:
            self._checkpoint.files.read_into(tensor.shard, data, offset, self._stop)
            return
        if tensor.name not in self._fetched:
            self._fetched[tensor.name] = self._fetch(tensor, self._folder)
        pread_into(self._fetched[tensor.name].fileno(), data, offset - tensor.start)

    def release(self, module: Module) -> None:
        """Drops what was fetched of a module."""
        for change in module.changes:
            for tensor in change.tensors:
                if (file := self._fetched.pop(tensor.name, None)) is not None:
                    file.close()

    def _fetch(self, tensor: Edit, folder: Path) -> IO[bytes]:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed when its module is done
        for first in range(tensor.start, tensor.end, _CHUNK):
            piece = bytearray(min(_CHUNK, tensor.end - first))
            self._checkpoint.files.read_into(tensor.shard, memoryview(piece), first, self._stop)
            file.write(piece)
        file.flush()
        return file


@dataclass(frozen=True, slots=True)
class _Factors:
    """The factors of one module as peft stores them, float32, and what was measured of it."""

    tensors: Mapping[str, np.ndarray]
    result: ModuleResult


def extract_adapter(
    checkpoint: Checkpoint,
    plan: AdapterPlan,
    describe: "Describe",
    out: OutFolder,
    run: RunOptions,
    progress: Progress,
) -> dict[str, ModuleResult]:
    """Makes an adapter that does to a checkpoint what an edit does; OUT appears complete or not at all.

    Args:
        checkpoint: The source, never opened for writing.
        plan: What the adapter holds.
        describe: Returns the text of the receipt.
        out: The folder to make.
        run: How to run; computed on the CPU whatever the device.
        progress: Receives how far the run has come.

    Returns:
        What was measured of each module, by its path.

    Raises:
        ExecuteError: A matrix cannot be edited, the source changed meanwhile, or OUT is in the way.
        Interrupted: Ctrl-C or SIGTERM; nothing is left of the run.
    """
    staging: Staging | None = None
    with sigterm_as_interrupt(), locked(out.path):
        try:
            identity = {"the plan": plan.sha256(), "the source": checkpoint.fingerprint}
            staging = Staging.open(out.path, identity, None, resume=run.resume, overwrite=out.overwrite, sync=run.sync)
            results = _write_weights(checkpoint, plan, staging.folder, run, progress)
            check_unchanged(checkpoint)
            config = plan.config(checkpoint, {path: result.rank for path, result in results.items()})
            text = json.dumps(config, indent=1, sort_keys=True, ensure_ascii=False)
            write_whole(staging.folder / CONFIG_NAME, [f"{text}\n".encode()])
            receipt = describe(Made.of(staging.folder, plan, results))
            write_whole(staging.folder / ADAPTER_RECEIPT_NAME, [receipt.encode()])
            with uninterrupted():
                staging.publish()
        except BaseException as error:
            if staging is not None:
                staging.discard()
            if isinstance(error, KeyboardInterrupt | Interrupted):
                raise Interrupted(f"{out.path}: interrupted; nothing was written") from error
            if isinstance(error, OSError):
                reason = f"{error.filename or out.path}: {error.strerror or error}; nothing was written"
                raise ExecuteError(reason) from error
            raise
    return results


def _write_weights(
    checkpoint: Checkpoint, plan: AdapterPlan, folder: Path, run: RunOptions, progress: Progress
) -> dict[str, ModuleResult]:
    """Writes the factors of every module into one file, in the order of the plan, and returns what was measured."""
    results: dict[str, ModuleResult] = {}
    stored: dict[str, tuple[str, tuple[int, ...], int]] = {}
    spool = folder / _SPOOL
    with spool.open("wb") as file:
        for module, factors in _compute_all(checkpoint, plan, folder, run, progress):
            results[module.path] = factors.result
            for name, values in factors.tensors.items():
                stored[name] = ("F32", values.shape, values.nbytes)
                file.write(np.ascontiguousarray(values, "<f4").data)
    with spool.open("rb") as file:
        pieces = iter(lambda: file.read(_CHUNK), b"")
        write_safetensors(folder / WEIGHTS_NAME, stored, {"format": "pt"}, pieces)
    spool.unlink()
    return results


def _compute_all(
    checkpoint: Checkpoint, plan: AdapterPlan, folder: Path, run: RunOptions, progress: Progress
) -> Iterator[tuple[Module, _Factors]]:
    """Yields the factors of every module, in order, from several threads."""
    stop = threading.Event()
    source = Source(checkpoint, stop, folder)
    local = threading.local()
    progress.begin(sum(change.size for each in plan.modules for change in each.changes))

    def compute(module: Module) -> _Factors:
        if not hasattr(local, "matrices"):
            local.matrices = Matrices(source, workspace_on_cpu(), room_of(plan, run))
        try:
            return _compute(module, plan.rank, local.matrices, biases=plan.biases, tied=plan.keeps_ties)
        finally:
            source.release(module)
            progress.advance(sum(change.size for change in module.changes))

    with ThreadPoolExecutor(jobs_of(plan, run)) as pool, contextlib.ExitStack() as cleanup:
        cleanup.callback(pool.shutdown, wait=False, cancel_futures=True)
        cleanup.callback(stop.set)
        yield from zip(plan.modules, pool.map(compute, plan.modules), strict=True)


def jobs_of(plan: AdapterPlan, run: RunOptions) -> int:
    """Returns how many modules are computed at a time: as many as the memory allows."""
    sides = max(
        sum(sum(tensor.shape[-2:]) for tensor in change.tensors) for module in plan.modules for change in module.changes
    )
    each = _SKETCH_BYTES * sides * (plan.rank or RANK)
    return max(1, min(run.jobs or cores(), run.memory // max(1, each)))


def room_of(plan: AdapterPlan, run: RunOptions) -> int:
    """Returns how many bytes of blocks a job may keep."""
    return run.memory // (2 * jobs_of(plan, run))


def workspace_on_cpu() -> "Workspace":
    """Returns where one thread computes."""
    from ablate_shards.kernels.ablate.project import Workspace
    from ablate_shards.kernels.choose import choose_form

    return Workspace("cpu", choose_form("cpu", on_cpu="native")[0], chunks_at_once=1)


def _compute(module: Module, rank: int | None, matrices: "Matrices", *, biases: Biases, tied: bool) -> _Factors:
    """Approximates a module's matrices, with so many columns as the limit needs where no rank is given."""
    tried = rank or RANK
    if (exact := module.changes[0].exact) is not None:
        tried = exact
    while True:
        found = [matrices.approximate(change, number, tried) for change, number in _matrices(module)]
        width = max(each.up.shape[1] for each in found)
        energy = math.fsum(each.energy for each in found)
        missing = math.fsum(each.missing for each in found)
        enough = missing <= LIMIT**2 * energy or width < tried or tried >= MOST_RANK
        if rank is not None or exact is not None or enough:
            break
        tried *= 2
    ups = np.stack([_padded(each.up, width, 1) for each in found]).astype(np.float32)
    downs = np.stack([_padded(each.down, width, 0) for each in found]).astype(np.float32)
    result = measured_with(module, ups, downs, matrices)
    if not all(math.isfinite(value) for value in astuple(result)):
        raise ExecuteError(
            f"{module.path}: holds values so large that what an adapter adds to them cannot be measured; fetch the "
            "shard of its weight again"
        )
    if module.swapped:
        ups, downs = downs.transpose(0, 2, 1), ups.transpose(0, 2, 1)
    tensors = _named(module, ups, downs)
    if tied and module.ties:
        # The head is the embedding's transpose, and so are its factors.
        tensors |= {
            "base_model.model.lm_head.lora_A.weight": ups[0].T,
            "base_model.model.lm_head.lora_B.weight": downs[0].T,
        }
    if module.bias is not None and module.bias.vector is not None:
        before, after = module.bias.vector()
        name, values = ("lora_B.bias", after - before) if biases == "added" else ("base_layer.bias", after)
        tensors[f"{module.prefix}{name}"] = values.astype(np.float32)
    return _Factors(tensors, result)


def measured_with(module: Module, ups: np.ndarray, downs: np.ndarray, matrices: "Matrices") -> ModuleResult:
    """Returns what is measured of a module with factors as they are stored.

    Args:
        module: The module.
        ups: B of each of its matrices, ``[E, d, r]`` float32.
        downs: A of each, ``[E, r, n]`` float32.
        matrices: Opens its matrices.

    Raises:
        ExecuteError: A matrix cannot be edited.
    """
    measured = [
        matrices.measure(change, number, (ups[place], downs[place]))
        for place, (change, number) in enumerate(_matrices(module))
    ]
    return ModuleResult.of(ups.shape[2], measured)


def _matrices(module: Module) -> Iterator[tuple[Change, int]]:
    for change in module.changes:
        for number in range(change.matrices):
            yield change, number


class Matrices:
    """Opens the matrices of modules for one thread; the last one stays open, since it is often needed again.

    Args:
        source: Their bytes.
        workspace: Where to compute.
        room: Bytes of a matrix before and after that may stay in memory.
    """

    def __init__(self, source: Source, workspace: "Workspace", room: int) -> None:
        self._source, self._workspace, self._room = source, workspace, room
        self._last: tuple[str, int] | None = None
        self._open: Pair

    def approximate(self, change: Change, number: int, rank: int) -> "LowRank":
        """Returns the update of a rank that comes closest to a matrix's difference."""
        from ablate_shards.kernels.lowrank.approximate import approximate

        pair, shape = self._pair(change, number)
        return approximate(pair, shape, change.axis, change.basis, rank)

    def measure(self, change: Change, number: int, update: tuple[np.ndarray, np.ndarray]) -> "Merged":
        """Returns what is measured of a matrix with an update, in the dtype that it is stored in."""
        from ablate_shards.kernels.lowrank.approximate import measure

        pair, shape = self._pair(change, number)
        basis = np.empty((0, shape[0])) if change.basis is None else change.basis
        dtype = change.tensor.dtype if change.scales is None else "F32"
        return measure(pair, shape, change.axis, basis, update, functools.partial(_rounded, dtype))

    def _pair(self, change: Change, number: int) -> tuple[Pair, tuple[int, int]]:
        """Returns a matrix before and after, and its ``d`` and ``n``."""
        if self._last != (change.name, number):
            self._open = change.open(self._source.read, number, self._workspace)
            self._open.room = self._room
            self._last = change.name, number
        rows, cols = self._open.rows, self._open.cols
        return self._open, (rows, cols) if change.axis == -2 else (cols, rows)


def _rounded(dtype: str, values: np.ndarray) -> np.ndarray:
    """Returns float32 values as a dtype stores them."""
    from ablate_shards.kernels.codecs.plain import decoded, round_to_bfloat16

    if dtype == "BF16":
        return decoded(round_to_bfloat16(values), np.float32)
    with np.errstate(over="ignore"):
        return values if dtype == "F32" else values.astype(np.float16).astype(np.float32)


def _padded(factor: np.ndarray, width: int, axis: int) -> np.ndarray:
    """Returns a factor with zeros up to a width, which the matrices of a stack have in common."""
    missing = width - factor.shape[axis]
    return np.pad(factor, [(0, missing if each == axis else 0) for each in range(2)]) if missing else factor


def _named(module: Module, ups: np.ndarray, downs: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the factors ``[E, out, r]`` and ``[E, r, in]`` of a module by the names that peft gives them."""
    if module.form == "embedding":
        return {f"{module.prefix}lora_embedding_A": downs[0], f"{module.prefix}lora_embedding_B": ups[0]}
    # Of a stack, A is that of one expert after the other, and B has the experts side by side in each column.
    return {
        f"{module.prefix}lora_A.weight": downs.reshape(-1, downs.shape[2]),
        f"{module.prefix}lora_B.weight": ups.transpose(1, 2, 0).reshape(ups.shape[1], -1),
    }


def factors_of(module: Module, read: Callable[[str], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the factors ``[E, d, r]`` and ``[E, r, n]`` of a module, of what an adapter holds of it.

    Args:
        module: The module.
        read: Returns one of the adapter's tensors by its name.
    """
    if module.form == "embedding":
        return read(f"{module.prefix}lora_embedding_B")[None], read(f"{module.prefix}lora_embedding_A")[None]
    down, up = (read(f"{module.prefix}lora_{factor}.weight") for factor in "AB")
    ups = up.reshape(len(up), -1, module.matrices).transpose(2, 0, 1)
    downs = down.reshape(module.matrices, -1, down.shape[1])
    return (downs.transpose(0, 2, 1), ups.transpose(0, 2, 1)) if module.swapped else (ups, downs)
