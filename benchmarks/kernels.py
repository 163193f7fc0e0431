"""Times the ablation kernels against a plain copy on the device and two bare forms in float32.

``eager`` is the usual form, the whole tensor at once; ``blocked`` the shortest one that streams over blocks of
rows: no float64 across blocks, no guard against overflow, cancellation or zeros, nothing measured.

Every number is a ratio within one run: the median of several repetitions, the contenders taking turns. A form
whose result does not meet the accuracy promised in ``docs/math.md`` gets no speed.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --shape 4096 14336 --dtype float16 --threads 1
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from ablate_shards.kernels import reference
from ablate_shards.kernels.form import stored_dtype
from ablate_shards.kernels.project import Form, Meter, Preserve, ProjectOptions, Projector, Workspace, choose_form

PRESERVES: tuple[Preserve, ...] = ("rows", "columns", "none")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BLOCK_ELEMENTS = 1 << 22
BARE_ROWS = 128
KEPT = threading.local()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one line per form and norm mode; return 1 when a correctness check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=2, default=(1024, 3584), metavar=("D", "N"))
    parser.add_argument("--axis", type=int, choices=(-2, -1), default=-2, help="where D lies in storage")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--directions", type=int, default=1)
    parser.add_argument("--coefficient", type=float, default=1.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="tensors ablated at a time, one thread each")
    parser.add_argument("--tensors", type=int, default=4, help="tensors that each thread ablates in a repetition")
    parser.add_argument("--repetitions", type=int, default=9)
    given = parser.parse_args(arguments)

    device = torch.device(given.device)
    hidden, features = given.shape
    generator = torch.Generator().manual_seed(0)
    columns = torch.randn(hidden, given.directions, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(columns).Q.mT.contiguous()
    stored = (hidden, features) if given.axis == -2 else (features, hidden)
    weight = (0.02 * torch.randn(stored, generator=generator)).to(DTYPES[given.dtype])
    weights = [weight.to(device)[None].clone() for _ in range(given.threads)]
    scratch = [tensor.clone() for tensor in weights]
    elements = weight.numel() * given.threads * given.tensors
    chosen, reason = choose_form(device, native=True)
    forms: list[Form] = ["torch", chosen] if chosen != "torch" else ["torch"]
    print(f"{list(stored)} {given.dtype} on {device}, {given.threads} at a time; {chosen}: {reason}")
    print(
        f"{'form':8}{'preserve':10}{'G elements/s':>14}{'x eager':>10}{'x blocked':>11}{'x copy':>10}{'meter G/s':>12}"
    )

    failed = False
    torch.set_num_threads(1)
    with ThreadPoolExecutor(given.threads) as pool:

        def everywhere(work: Callable[[Tensor, Tensor], object]) -> Callable[[], None]:
            # A run hands its threads one tensor after another, so the start of a thread counts once for several.
            def repeat(source: Tensor, target: Tensor) -> None:
                for _ in range(given.tensors):
                    work(source, target)

            def run() -> None:
                list(pool.map(repeat, weights, scratch))

            return run

        for preserve in PRESERVES:
            options = ProjectOptions(given.coefficient, preserve, given.axis)
            for form in forms:
                result = weights[0].clone()
                ablate(result, basis, options, form)
                if not is_accurate(result[0].cpu(), weight, basis, options):
                    print(f"{form:8}{preserve:10}  wrong result, no speed")
                    failed = True
                    continue
                contenders: list[Callable[[Tensor, Tensor], object]] = [
                    lambda source, target, form=form, options=options: ablate(  # type: ignore[misc]
                        target, basis, options, form
                    ),
                    lambda source, target, options=options: eager(source, basis, options),  # type: ignore[misc]
                    lambda source, target, options=options: blocked(target, basis, options),  # type: ignore[misc]
                    lambda source, target: target.copy_(source),
                    lambda source, target, form=form, options=options: measure(  # type: ignore[misc]
                        source, basis, options, form
                    ),
                ]
                ours, plain, bare, copy, meter = medians(
                    [everywhere(work) for work in contenders], given.repetitions, device
                )
                print(
                    f"{form:8}{preserve:10}{elements / ours / 1e9:14.2f}{plain / ours:10.1f}{bare / ours:11.2f}"
                    f"{copy / ours:10.3f}{elements / meter / 1e9:12.2f}"
                )
    return int(failed)


def ablate(weight: Tensor, basis: Tensor, options: ProjectOptions, form: Form) -> None:
    """Ablate a weight in place, block by block, as a run does."""
    stored = in_form(weight, form)
    dtype = stored_dtype(stored) or "F32"
    projector = Projector(basis.numpy(), (1, *weight.shape[1:]), dtype, options, workspace(weight.device, form))
    blocks = [(start, stored[:, start : start + size]) for start, size in spans(weight, projector.chunk_rows)]
    step = 0
    while step < projector.passes:
        for start, block in blocks:
            projector.gather(step, block, start)
        step += 1
    for start, block in blocks:
        projector.apply(block, start)


def measure(weight: Tensor, basis: Tensor, options: ProjectOptions, form: Form) -> None:
    """Measure a weight, block by block."""
    stored = in_form(weight, form)
    dtype = stored_dtype(stored) or "F32"
    meter = Meter(basis.numpy(), (1, *weight.shape[1:]), dtype, options, workspace(weight.device, form))
    for start, size in spans(weight, meter.chunk_rows):
        meter.add(stored[:, start : start + size], start)
    meter.result()


def in_form(weight: Tensor, form: Form) -> Tensor | np.ndarray:
    """Return a view of a weight that a form takes."""
    if form != "native":
        return weight
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()


def workspace(device: torch.device, form: Form) -> Workspace:
    """Return this thread's scratch memory."""
    key = f"{device} {form}"
    if not hasattr(KEPT, key):
        setattr(KEPT, key, Workspace(device, form))
    return getattr(KEPT, key)  # type: ignore[no-any-return]


def spans(weight: Tensor, chunk_rows: int) -> list[tuple[int, int]]:
    """Return the start and the length of blocks of whole chunks."""
    rows = max(1, BLOCK_ELEMENTS // weight.shape[2] // chunk_rows) * chunk_rows
    return [(start, rows) for start in range(0, weight.shape[1], rows)]


def eager(weight: Tensor, basis: Tensor, options: ProjectOptions) -> Tensor:
    """Ablate the usual way: the whole tensor in float32, the norms computed before and after."""
    matrix = weight.float() if options.axis == -2 else weight.float().mT
    directions = basis.to(weight.device, torch.float32)
    along = -1 if options.preserve == "rows" else -2
    norms = matrix.norm(dim=along, keepdim=True)
    unit = matrix / norms if options.preserve == "rows" else matrix
    moved = unit - options.coefficient * (directions.mT @ (directions @ unit))
    if options.preserve != "none":
        moved = norms * moved / moved.norm(dim=along, keepdim=True)
    return (moved if options.axis == -2 else moved.mT).to(weight.dtype)


def blocked(weight: Tensor, basis: Tensor, options: ProjectOptions) -> None:
    """Ablate ``[1, rows, cols]`` in place over blocks of rows, in float32 throughout."""
    matrix = weight[0] if options.axis == -2 else weight[0].mT
    alpha, (hidden, features) = options.coefficient, matrix.shape
    directions = basis.to(weight.device, torch.float32)
    scratch = directions.new_empty(BARE_ROWS, features)
    parts = [slice(start, min(start + BARE_ROWS, hidden)) for start in range(0, hidden, BARE_ROWS)]
    ones, norms = directions.new_ones(BARE_ROWS), directions.new_empty(hidden, 1)
    sums, squares = directions.new_zeros(len(basis), features), directions.new_zeros(features)
    for part in parts:
        tile = scratch[: part.stop - part.start].copy_(matrix[part])
        if options.preserve == "rows":
            tile /= torch.linalg.vector_norm(tile, dim=1, keepdim=True, out=norms[part])
        for line, total in zip(directions, sums, strict=True):
            total.addmv_(tile.mT, line[part])
        if options.preserve == "columns":
            squares.addmv_(tile.square_().mT, ones[: len(tile)])
    scale = (squares / (squares - (2 * alpha - alpha**2) * sums.square().sum(dim=0))).sqrt_()
    factors = alpha * sums * scale if options.preserve == "columns" else alpha * sums
    for part in parts:
        tile = scratch[: part.stop - part.start].copy_(matrix[part])
        if options.preserve == "rows":
            tile /= norms[part]
        elif options.preserve == "columns":
            tile *= scale
        for line, factor in zip(directions, factors, strict=True):
            tile.addcmul_(line[part, None], factor, value=-1)
        if options.preserve == "rows":
            tile *= norms[part] / torch.linalg.vector_norm(tile, dim=1, keepdim=True)
        matrix[part].copy_(tile)


def is_accurate(result: Tensor, weight: Tensor, basis: Tensor, options: ProjectOptions) -> bool:
    """Whether a result meets the accuracy that is promised."""
    exact, _ = reference.ablate(
        weight, basis, coefficient=options.coefficient, preserve=options.preserve, axis=options.axis
    )
    if weight.dtype == torch.float32:
        rows = (options.preserve == "rows") == (options.axis == -2)
        norms = torch.linalg.vector_norm(weight.double(), dim=-1 if rows else -2, keepdim=True)
        return bool(((result.double() - exact).abs() <= 1e-6 * norms).all())
    return float((result == reference.round_to(exact, weight.dtype)).double().mean()) >= 0.999


def medians(contenders: list[Callable[[], None]], repetitions: int, device: torch.device) -> list[float]:
    """Return the median seconds of each contender, taking turns, after one round to warm up."""
    times: list[list[float]] = [[] for _ in contenders]
    for repetition in range(repetitions + 1):
        for contender, found in zip(contenders, times, strict=True):
            synchronize(device)
            begin = time.perf_counter()
            contender()
            synchronize(device)
            if repetition:
                found.append(time.perf_counter() - begin)
    return [statistics.median(found) for found in times]


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
