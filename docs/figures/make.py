"""Draws the figures of ``docs/math.md`` from the definitions in float64: ``python docs/figures/make.py``."""

from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from ablate_shards.kernels.reference import Preserve, ablate

HERE = Path(__file__).parent
FORMS: tuple[tuple[Preserve, str, str], ...] = (
    ("none", "#666666", "--"),
    ("columns", "#0072b2", "-"),
    ("rows", "#d55e00", "-"),
)
MARKED = (1.0, 2.0, 2.5)


def example(hidden: int = 256, inputs: int = 128, share: float = 0.3) -> tuple[Tensor, Tensor]:
    """Returns a Gaussian weight ``[hidden, inputs]`` with ``share`` of its norm along a direction ``[1, hidden]``.

    The direction's entries are cubes of Gaussian ones, so that a few dimensions hold most of it.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden, inputs, generator=generator, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(1, hidden, generator=generator, dtype=torch.float64) ** 3)
    noise -= direction.mT @ (direction @ noise)
    along = torch.nn.functional.normalize(torch.randn(1, inputs, generator=generator, dtype=torch.float64))
    size = torch.linalg.matrix_norm(noise) * share / (1 - share**2) ** 0.5
    return noise + size * direction.mT @ along, direction


def left(before: Tensor, after: Tensor, direction: Tensor) -> float:
    """Returns the factor that the component along ``direction`` was multiplied by, in least squares."""
    was, now = direction @ before, direction @ after
    return float((was * now).sum() / was.square().sum())


def drift(before: Tensor, after: Tensor, along: int) -> float:
    """Returns the largest relative change of a norm; ``along`` -1 for rows, -2 for columns."""
    was, now = (torch.linalg.vector_norm(matrix, dim=along) for matrix in (before, after))
    return float((now / was - 1).abs().max())


def draw(target: Path) -> None:
    """Writes ``coefficient.svg`` and ``norms.svg`` into ``target``; the same versions write the same bytes."""
    weight, direction = example()
    coefficients = torch.linspace(0, 3, 121).tolist()
    edited = {
        form: [ablate(weight, direction, coefficient=a, preserve=form)[0] for a in coefficients] for form, *_ in FORMS
    }

    figure, axes = _figure(1)
    for form, colour, line in FORMS:
        values = [left(weight, after, direction) for after in edited[form]]
        axes[0].plot(coefficients, values, line, color=colour, label=form)
        marks = [values[coefficients.index(a)] for a in MARKED]
        axes[0].plot(MARKED, marks, "o", color=colour, markersize=4)
    axes[0].axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes[0].set(xlabel="coefficient", ylabel="factor on the component")
    axes[0].legend(title="norms kept", frameon=False)
    _save(figure, target / "coefficient.svg")

    figure, axes = _figure(2)
    for axis, along, name in zip(axes, (-2, -1), ("columns", "rows"), strict=True):
        for form, colour, line in FORMS:
            values = [100 * drift(weight, after, along) for after in edited[form]]
            axis.plot(coefficients, values, line, color=colour, label=form)
        axis.set(title=name, xlabel="coefficient", ylabel="largest change of a norm (%)")
    axes[0].legend(title="norms kept", frameon=False)
    _save(figure, target / "norms.svg")


def _figure(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.6 * count, 3.4), layout="constrained")
    axes = [figure.add_subplot(1, count, number + 1) for number in range(count)]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    with mpl.rc_context({"svg.hashsalt": path.name}):
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    draw(HERE)
