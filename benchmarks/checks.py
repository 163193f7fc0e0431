"""Whether a result is right, against the definitions in float64; what is wrong is said, and None means nothing is."""

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.checkpoints import SCALED, Layout, read, scales_of
from benchmarks.processes import TOOL

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["against_exact", "edit", "first_of", "verified"]

#: What is promised of 16-bit weights; docs/math.md.
CORRECTLY_ROUNDED = 0.999
#: What is promised of codes, relative to the component before.
ALONG = 1e-3


def against_exact(found: "Tensor", exact: "Tensor") -> str | None:
    """Compares a 16-bit result with the exact values ``exact``, float64."""
    from ablate_shards.kernels import reference

    share = float((found.cpu() == reference.round_to(exact, found.dtype)).double().mean())
    if share >= CORRECTLY_ROUNDED:
        return None
    return f"{1 - share:.2%} of the elements are not the correctly rounded ones"


def verified(source: Path, out: Path, *flags: str) -> str | None:
    """Runs ``verify``, which reads every byte of both."""
    done = subprocess.run([*TOOL, "verify", source, out, *flags], capture_output=True, text=True)
    if done.returncode == 0:
        return None
    return (done.stderr or done.stdout).strip().splitlines()[-1]


def edit(layout: Layout, source: Path, directions: Path, source_layer: int, out: Path) -> str | None:
    """Compares the writers of the first and the last layer with their biprojected ablation, norms of rows kept."""
    import torch
    from safetensors.torch import load_file

    from ablate_shards.kernels import reference

    given = {name: tensor.double() for name, tensor in load_file(directions).items()}
    for layer in (0, layout.layers - 1):
        means = [given[f"reference.layers.{number}"] for number in {source_layer, layer}]
        span = torch.linalg.qr(torch.stack(means).mT).Q
        direction = given[f"direction.layers.{source_layer}"][0]
        for _ in range(2):
            direction = direction - span @ (span.mT @ direction)
        basis = (direction / direction.norm())[None]
        names = layout.writers(layer)
        scales = [scales_of(name) for name in names] if layout.coded else []
        blocks = [blocks for _, blocks in read(source, scales)]
        for number, ((name, before), (_, after)) in enumerate(zip(read(source, names), read(out, names), strict=True)):
            if layout.coded:
                before, after = (_decoded(codes, blocks[number]) for codes in (before, after))
            exact, _ = reference.ablate(before, basis, preserve="rows")
            fault = _along(before, after, exact, basis) if layout.coded else against_exact(after, exact)
            if fault:
                return f"{name}: {fault}"
    return None


def _decoded(codes: "Tensor", scales: "Tensor") -> "Tensor":
    """Returns what FP8 codes stand for."""
    rows, columns = codes.shape[-2:]
    wide = scales.repeat_interleave(SCALED, -2).repeat_interleave(SCALED, -1)[..., :rows, :columns]
    return codes.float() * wide


def _along(before: "Tensor", after: "Tensor", exact: "Tensor", basis: "Tensor") -> str | None:
    """Compares the component along a basis with that of the exact edit."""
    off = float((basis @ (after.double() - exact)).norm() / (basis @ before.double()).norm())
    return None if off <= ALONG else f"{off:.1e} of the component is not what it should be"


def first_of(checks: Iterable[Callable[[], str | None]]) -> str | None:
    """Runs checks until one finds something."""
    return next((fault for check in checks if (fault := check()) is not None), None)
