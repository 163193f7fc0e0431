"""The ablation kernels in place on weights in memory, against a copy on the device and the eager float32 form.

A run ablates a pool of different bf16 matrices that no cache holds: on a CPU in blocks, on as many threads as there are
cores, as the command does; on a GPU in whole, where ``project_`` takes all of them at once. Bandwidths count one read
and one write of every byte, so that ``ours/this`` of 1.25 beside the copy means 80 % of what the device can do. Ten
runs must agree to the bit.
"""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from benchmarks import machine
from benchmarks.checks import against_exact, first_of
from benchmarks.harness import Bench, Contender, Race, Sample, case

if TYPE_CHECKING:
    from torch import Tensor

    from ablate_shards.kernels.ablate.options import ProjectOptions
    from ablate_shards.kernels.ablate.project import Preserve
    from ablate_shards.kernels.ablate.resident import InPlaceAblation
    from ablate_shards.kernels.choose import Form

__all__: list[str] = []

REPEATS = 10
COPY = "copy on the device"
IN_USE = "in use"
#: What else the constants of ``resident_triton`` may be, for columns and for rows.
SWEPT: "dict[Preserve, list[dict[str, Any]]]" = {
    "columns": [
        {},
        {"COLUMNS_TILE": (128, 32), "COLUMNS_STEP": 32},
        {"COLUMNS_TILE": (256, 32), "COLUMNS_STEP": 64},
        {"COLUMNS_TILE": (512, 16), "COLUMNS_STEP": 64},
        {"COLUMNS_TILE": (512, 32), "COLUMNS_STEP": 64, "WARPS": 8},
        {"COLUMNS_TILE": (1024, 16), "COLUMNS_STEP": 64, "WARPS": 8},
        {"COLUMNS_TILE": (256, 64), "COLUMNS_STEP": 32, "WARPS": 8},
        {"COLUMNS_REGISTERS": 96},
        {"COLUMNS_REGISTERS": 168},
    ],
    "rows": [
        {},
        {"ROWS_ALONE": 4, "ROWS_SHARED": 4},
        {"ROWS_ALONE": 4, "ROWS_SHARED": 8, "WARPS": 8},
        {"ROWS_WIDTH": 512},
        {"ROWS_WIDTH": 2048, "ROWS_SHARED": 4, "WARPS": 8},
        {"CHUNK": 128},
        {"CHUNK": 32},
    ],
}


@case("kernels", runs=9)
def kernels(bench: Bench) -> None:
    """Ablation kernels on the CPU: bf16 matrices and stacked experts, rows, columns and no norms kept."""
    shapes = [(1, 64, 96), (3, 32, 48)] if bench.tiny else [(1, 1024, 3584), (1, 4096, 4096), (16, 2048, 768)]
    for shape in shapes:
        for preserve in ("rows", "columns", "none"):
            contest(bench, shape, preserve, "cpu", pool_bytes=2**16 if bench.tiny else 2**26)


@case("kernels-gpu", runs=9, gpu=True)
def kernels_on_gpu(bench: Bench) -> None:
    """Triton kernels against the copy bandwidth: bf16 [1024..8192, 2048..28672] and stacked experts."""
    if bench.tiny:
        # Triton interprets its kernels on a CPU under TRITON_INTERPRET=1.
        shapes, device, pool_bytes = [(1, 16, 32), (2, 16, 32)], "cuda" if machine.gpu() else "cpu", 2**10
    else:
        shapes = [(1, hidden, cols) for hidden in (1024, 2048, 4096, 8192) for cols in (2048, 8192, 14336, 28672)]
        shapes.append((64, 2048, 1408))
        device, pool_bytes = "cuda", 2**29
    for preserve in ("columns", "rows"):
        shares = []
        for shape in shapes:
            found = contest_in_place(bench, shape, preserve, device, pool_bytes=pool_bytes)
            if (ratio := found[COPY].ratio) is not None:
                shares.append(1 / ratio)
        if shares:
            bench.note(f"{preserve}: {min(shares):.0%} to {max(shares):.0%} of the copy bandwidth")


@case("sweep-gpu", runs=5, gpu=True)
def sweep_on_gpu(bench: Bench) -> None:
    """Tile sizes, warps and registers of the Triton kernels against the copy bandwidth; those in use come first."""
    if bench.tiny:
        shapes, device, pool_bytes = [(1, 16, 32)], "cuda" if machine.gpu() else "cpu", 2**10
    else:
        shapes = [(1, 1024, 2048), (1, 4096, 14336), (1, 8192, 28672), (64, 2048, 1408)]
        device, pool_bytes = "cuda", 2**29
    for preserve, settings in SWEPT.items():
        for shape in shapes:
            tuned(bench, shape, preserve, device, settings[:2] if bench.tiny else settings, pool_bytes=pool_bytes)


def contest(bench: Bench, shape: tuple[int, int, int], preserve: "Preserve", device: str, *, pool_bytes: int) -> None:
    """Races every form that runs on a CPU against the copy and the eager form.

    Args:
        bench: Takes the table.
        shape: Matrices, residual axis, features.
        preserve: Which norms stay.
        device: Where.
        pool_bytes: The least that the matrices of a run take together.
    """
    from ablate_shards.kernels.choose import choose_form

    chosen = choose_form(device, on_cpu="native")[0]
    threads = os.cpu_count() or 1
    task = Task(shape, preserve, device)
    with Pool(task.weight, threads, pool_bytes) as pool:
        bench.race(
            f"bf16 {task.size}, {preserve}, on {device}, {threads} at a time",
            [
                task.streamed(pool, chosen, chosen, None),
                *([task.streamed(pool, "torch", "torch", chosen)] if chosen != "torch" else []),
                task.eager(pool, chosen),
                Contender(COPY, pool.each(lambda source, target: target.copy_(source)), chosen, moved=pool.moved),
            ],
        )


def contest_in_place(
    bench: Bench, shape: tuple[int, int, int], preserve: "Preserve", device: str, *, pool_bytes: int
) -> Race:
    """Races ``project_`` against the copy, the streamed forms and the eager one; arguments as above."""
    from ablate_shards.kernels.ablate.resident import InPlaceAblation

    ours = "project_"
    task = Task(shape, preserve, device)
    with Pool(task.weight, 1, pool_bytes) as pool:
        ablation = InPlaceAblation(pool.targets, task.basis, task.options, form="triton")
        run = pool.at_once(ablation.launch)
        check = functools.partial(
            first_of, (lambda: pool.repeats(run), lambda: unfinished(ablation), lambda: task.accuracy(pool))
        )
        return bench.race(
            f"bf16 {task.size}, {preserve}, on {device}, {len(pool.targets)} at once",
            [
                Contender(ours, run, None, check, before=pool.restore, moved=pool.moved),
                task.streamed(pool, "triton", "triton, streamed one by one", ours),
                task.streamed(pool, "torch", "torch, streamed one by one", ours),
                task.eager(pool, ours),
                Contender(COPY, pool.at_once(pool.restore), ours, moved=pool.moved),
            ],
        )


def tuned(
    bench: Bench,
    shape: tuple[int, int, int],
    preserve: "Preserve",
    device: str,
    settings: list[dict[str, Any]],
    *,
    pool_bytes: int,
) -> None:
    """Races ``project_`` with one set of constants after the other against the copy; arguments as above."""
    from ablate_shards.kernels.ablate.resident import InPlaceAblation

    task = Task(shape, preserve, device)
    with Pool(task.weight, 1, pool_bytes) as pool:
        contenders = []
        for constants in settings:
            with setting(constants):
                ablation = InPlaceAblation(pool.targets, task.basis, task.options, form="triton")
            run = with_constants(constants, pool.at_once(ablation.launch))
            name = ", ".join(f"{key} {value}" for key, value in constants.items()) or IN_USE
            check = functools.partial(first_of, (functools.partial(unfinished, ablation), lambda: task.accuracy(pool)))
            against = IN_USE if constants else None
            contenders.append(Contender(name, run, against, check, before=pool.restore, moved=pool.moved))
        contenders.append(Contender(COPY, pool.at_once(pool.restore), IN_USE, moved=pool.moved))
        bench.race(f"bf16 {task.size}, {preserve}, on {device}, {len(pool.targets)} at once", contenders)


@contextlib.contextmanager
def setting(constants: Mapping[str, Any]) -> Iterator[None]:
    """Gives the kernels other constants, which they read when they are planned and launched."""
    from ablate_shards.kernels.ablate import resident_triton

    before = {name: getattr(resident_triton, name) for name in constants}
    try:
        for name, value in constants.items():
            setattr(resident_triton, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(resident_triton, name, value)


def with_constants(constants: Mapping[str, Any], run: Callable[[], Sample]) -> Callable[[], Sample]:
    """Returns what runs with these constants."""

    def changed() -> Sample:
        with setting(constants):
            return run()

    return changed


class Task:
    """An ablation of a random bf16 weight along one direction, and its exact result.

    Args:
        shape: Matrices, residual axis, features.
        preserve: Which norms stay.
        device: Where.

    Attributes:
        size: The shape, as a title says it.
        options: The ablation's.
        weight: On the device.
        basis: ``[1, residual axis]`` float64.
    """

    def __init__(self, shape: tuple[int, int, int], preserve: "Preserve", device: str) -> None:
        import torch

        from ablate_shards.kernels import reference
        from ablate_shards.kernels.ablate.options import ProjectOptions

        generator = torch.Generator().manual_seed(0)
        weight = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
        basis = torch.nn.functional.normalize(torch.randn(1, shape[1], generator=generator, dtype=torch.float64))
        self._exact, _ = reference.ablate(weight, basis, preserve=preserve)
        self._directions = basis.to(device)
        self.size = list(shape if shape[0] > 1 else shape[1:])
        self.options = ProjectOptions(1.0, preserve)
        self.weight, self.basis = weight.to(device), basis.numpy()

    def accuracy(self, pool: "Pool") -> str | None:
        """Says whether a result of a run is wrong."""
        import torch

        first, *others = pool.targets
        if not all(torch.equal(first, other) for other in others):
            return "copies of one weight come out different"
        return against_exact(first, self._exact)

    def streamed(self, pool: "Pool", form: "Form", name: str, against: str | None) -> Contender:
        """Streams one matrix after the other through a form."""
        kept = threading.local()
        run = pool.each(lambda _, target: ablate(target, self.basis, self.options, form, kept))
        check = functools.partial(first_of, (lambda: pool.repeats(run), lambda: self.accuracy(pool)))
        return Contender(name, run, against, check, before=pool.restore, moved=pool.moved)

    def eager(self, pool: "Pool", against: str) -> Contender:
        """Follows the definition in float32."""
        from benchmarks.eager import ablated

        def work(source: "Tensor", target: "Tensor") -> None:
            target.copy_(ablated(source, self._directions, preserve=self.options.preserve))

        return Contender("eager float32", pool.each(work), against, lambda: self.accuracy(pool), moved=pool.moved)


def unfinished(ablation: "InPlaceAblation") -> str | None:
    """Says whether the kernels left something to the streamed form, which their time does not hold."""
    count = sum(len(resident.odd()) for resident in ablation.resident)
    return f"{count} matrices were left to the streamed form" if count else None


class Pool:
    """Copies of a weight that are worked on at once by threads, each of which has one torch thread.

    Args:
        weight: On its device.
        threads: How many.
        least: The bytes that all copies together take at least.

    Attributes:
        sources: What is read.
        targets: What is edited in place.
        moved: The bytes of one read and one write of each.
    """

    def __init__(self, weight: "Tensor", threads: int, least: int) -> None:
        count = max(threads, -(-least // weight.nbytes // threads) * threads)
        # Clones in one piece: a copy of all of them is one copy.
        self._source, self._target = (weight.expand(count, *weight.shape).clone() for _ in range(2))
        self.sources, self.targets = list(self._source), list(self._target)
        self.moved = 2 * count * weight.nbytes
        self._threads, self._is_on_gpu = threads, weight.is_cuda
        self._executor = ThreadPoolExecutor(threads)

    def __enter__(self) -> Self:
        """Takes torch's threads away."""
        import torch

        self._torch_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        """Gives them back."""
        import torch

        torch.set_num_threads(self._torch_threads)
        self._executor.shutdown()

    def restore(self) -> None:
        """Makes the targets what they were."""
        self._target.copy_(self._source)

    def at_once(self, work: Callable[[], object]) -> Callable[[], Sample]:
        """Returns what times some work on all targets; on a GPU by its clock, replaying what the work launches."""
        if not self._is_on_gpu:
            return self._timed(work)
        import torch

        replays: list[torch.cuda.CUDAGraph] = []

        def run() -> Sample:
            if not replays:
                # Compiles, which a graph cannot hold.
                work()
                self.restore()
                self._settle()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    work()
                replays.append(graph)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            replays[0].replay()
            end.record()
            end.synchronize()
            return Sample(start.elapsed_time(end) / 1e3)

        return run

    def each(self, work: "Callable[[Tensor, Tensor], object]") -> Callable[[], Sample]:
        """Returns what times some work on every source and its target."""
        everywhere = map if self._threads == 1 else self._executor.map
        return self._timed(lambda: list(everywhere(work, self.sources, self.targets)))

    def repeats(self, run: Callable[[], Sample]) -> str | None:
        """Says in which of ten runs the bits differ from those that the last run left."""
        import torch

        first = [target.clone() for target in self.targets]
        for number in range(2, REPEATS + 1):
            self.restore()
            run()
            if not all(map(torch.equal, first, self.targets)):
                return f"run {number} of {REPEATS} on the same weights gives other bits"
        return None

    def _timed(self, work: Callable[[], object]) -> Callable[[], Sample]:
        def run() -> Sample:
            self._settle()
            start = time.perf_counter()
            work()
            self._settle()
            return Sample(time.perf_counter() - start)

        return run

    def _settle(self) -> None:
        if self._is_on_gpu:
            import torch

            torch.cuda.synchronize()


def ablate(weight: "Tensor", basis: np.ndarray, options: "ProjectOptions", form: "Form", kept: threading.local) -> None:
    """Ablates a weight in place, with scratch memory that each thread keeps from one to the next."""
    from ablate_shards.kernels.ablate.memory import stored_view, stream
    from ablate_shards.kernels.ablate.project import Projector, Workspace

    if not hasattr(kept, "workspace"):
        kept.workspace = Workspace(weight.device, form)
    projector = Projector(basis, (weight.shape[0], weight.shape[1], weight.shape[2]), "BF16", options, kept.workspace)
    stream(projector, stored_view(weight, form), block_rows=weight.shape[1] if weight.is_cuda else None)
