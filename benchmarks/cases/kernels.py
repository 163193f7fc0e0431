"""The ablation kernels in place on weights in memory, against a copy on the device and the eager float32 form.

A run ablates a pool of different bf16 matrices that no cache holds, in whole on a GPU, in blocks on as many CPU
threads as there are cores, as the command does. Bandwidths count one read and one write of every byte, so that
``ours/this`` of 1.25 beside the copy means 80 % of what the device can do. Ten runs must agree to the bit.
"""

import functools
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Self, get_args

import numpy as np

from benchmarks import machine
from benchmarks.checks import against_exact, first_of
from benchmarks.harness import Bench, Contender, Race, Sample, case

if TYPE_CHECKING:
    from torch import Tensor

    from ablate_shards.kernels.project import Form, Preserve, ProjectOptions

__all__: list[str] = []

REPEATS = 10
COPY = "copy on the device"
#: What the command hands to a kernel at a time on a CPU.
BLOCK_ELEMENTS = 1 << 22


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
            found = contest(bench, shape, preserve, device, pool_bytes=pool_bytes, form="triton")
            if (ratio := found[COPY].ratio) is not None:
                shares.append(1 / ratio)
        if shares:
            bench.note(f"{preserve}: {min(shares):.0%} to {max(shares):.0%} of the copy bandwidth")


def contest(
    bench: Bench,
    shape: tuple[int, int, int],
    preserve: "Preserve",
    device: str,
    *,
    pool_bytes: int,
    form: "Form | None" = None,
) -> Race:
    """Races every form that runs on a device against the copy and the eager form.

    Args:
        bench: Takes the table.
        shape: Matrices, residual axis, features.
        preserve: Which norms stay.
        device: Where.
        pool_bytes: The least that the matrices of a run take together.
        form: The form that the others are compared with; None takes the one that the command takes.
    """
    import torch

    from ablate_shards.kernels import reference
    from ablate_shards.kernels.project import Form, ProjectOptions, choose_form
    from benchmarks.eager import ablated

    chosen = form or choose_form(device, on_cpu="native")[0]
    options = ProjectOptions(1.0, preserve)
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(shape, generator=generator)).bfloat16()
    basis = torch.nn.functional.normalize(torch.randn(1, shape[1], generator=generator, dtype=torch.float64))
    exact, _ = reference.ablate(weight, basis, preserve=preserve)
    directions = basis.to(device)
    threads = (os.cpu_count() or 1) if device == "cpu" and chosen != "triton" else 1
    pool = Pool(weight.to(device), threads, pool_bytes)

    def accuracy() -> str | None:
        return against_exact(pool.targets[0], exact)

    def ours(name: "Form", against: str | None) -> Contender:
        kept = threading.local()
        run = pool.each(lambda _, target: ablate(target, basis.numpy(), options, name, kept))
        check = functools.partial(first_of, (lambda: pool.repeats(run), accuracy))
        return Contender(name, run, against, check, before=pool.restore, moved=pool.moved)

    def eager(source: "Tensor", target: "Tensor") -> None:
        target.data = ablated(source, directions, preserve=preserve)

    with pool:
        return bench.race(
            f"bf16 {list(shape if shape[0] > 1 else shape[1:])}, {preserve}, on {device}, {threads} at a time",
            [
                ours(chosen, None),
                *(ours(name, chosen) for name in get_args(Form) if runs_on(name, device) and name != chosen),
                Contender("eager float32", pool.each(eager), chosen, accuracy, moved=pool.moved),
                Contender(COPY, pool.each(lambda source, target: target.copy_(source)), chosen, moved=pool.moved),
            ],
        )


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
        self.sources = [weight.clone() for _ in range(count)]
        self.targets = [weight.clone() for _ in range(count)]
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
        for source, target in zip(self.sources, self.targets, strict=True):
            target.copy_(source)

    def each(self, work: "Callable[[Tensor, Tensor], object]") -> Callable[[], Sample]:
        """Returns what times some work on every source and its target."""
        everywhere = map if self._threads == 1 else self._executor.map

        def run() -> Sample:
            self._settle()
            start = time.perf_counter()
            list(everywhere(work, self.sources, self.targets))
            self._settle()
            return Sample(time.perf_counter() - start)

        return run

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

    def _settle(self) -> None:
        if self._is_on_gpu:
            import torch

            torch.cuda.synchronize()


def runs_on(form: "Form", device: str) -> bool:
    """Whether a form runs on a device: torch's everywhere, Triton's on a GPU, the native one on a CPU."""
    return form == "torch" or (form not in ("reference", "numpy") and (form == "triton") == (device != "cpu"))


def ablate(weight: "Tensor", basis: np.ndarray, options: "ProjectOptions", form: "Form", kept: threading.local) -> None:
    """Ablates a weight in place, with scratch memory that each thread keeps from one to the next."""
    import torch

    from ablate_shards.kernels.project import Projector, Workspace

    if not hasattr(kept, "workspace"):
        kept.workspace = Workspace(weight.device, form)
    projector = Projector(basis, (weight.shape[0], weight.shape[1], weight.shape[2]), "BF16", options, kept.workspace)
    stored = weight if form in ("torch", "triton") else weight.view(torch.uint16).numpy()
    rows = weight.shape[1]
    if not weight.is_cuda:
        rows = max(1, BLOCK_ELEMENTS // weight[:, 0].numel() // projector.chunk_rows) * projector.chunk_rows
    blocks = [(start, stored[:, start : start + rows]) for start in range(0, weight.shape[1], rows)]
    step = 0
    while step < projector.passes:
        for start, block in blocks:
            projector.gather(step, block, start)
        step += 1
    for start, block in blocks:
        projector.apply(block, start)
