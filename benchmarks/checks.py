"""Whether a result is right, against the definitions in float64; what is wrong is said, and None means nothing is."""

import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.checkpoints import Layout, read
from benchmarks.processes import TOOL

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["against_exact", "edit", "first_of", "verified"]

#: What is promised of 16-bit weights; docs/math.md.
CORRECTLY_ROUNDED = 0.999


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
        for (name, before), (_, after) in zip(read(source, names), read(out, names), strict=True):
            exact, _ = reference.ablate(before, basis, preserve="rows")
            if fault := against_exact(after, exact):
                return f"{name}: {fault}"
    return None


def first_of(checks: Iterable[Callable[[], str | None]]) -> str | None:
    """Runs checks until one finds something."""
    return next((fault for check in checks if (fault := check()) is not None), None)
