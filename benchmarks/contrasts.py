"""What each kind of contrast, source layer and coefficient does to a real model.

``python -m benchmarks.contrasts measure`` edits the model once for each setting below, evaluates every edit on all
questions, and keeps the evaluations, so that it can be interrupted; ``show`` prints the table. Nothing is chosen by it.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from ablate_shards.data import tw_civic
from benchmarks.real import FOLDER, MODELS, VERDICTS, build, with_interval

__all__ = ["RESULT", "SETTINGS", "Setting", "table"]

RESULT = Path(__file__).parent / "results" / "real-contrasts.json"
FORMAT = "ablate-shards.contrasts/1"
#: The layer that all edits take their direction from where it is neither the best nor each layer's own.
ONE = "17"


@dataclass(frozen=True, slots=True)
class Setting:
    """One edit: what differs between the sides of its pairs, where the direction is measured, and how far it goes."""

    contrast: str
    source_layer: str
    coefficient: float

    @property
    def name(self) -> str:
        """What its files are called by."""
        return f"{self.contrast}-{self.source_layer}-{self.coefficient:g}"


def _settings() -> Iterator[Setting]:
    for contrast in ("topic", "answer", "framing"):
        for source_layer in ("own", "best", ONE):
            yield Setting(contrast, source_layer, 1.0)
        for coefficient in (0.5, 1.5, 2.5) if contrast == "topic" else (0.5, 2.5):
            yield Setting(contrast, "own", coefficient)


SETTINGS = tuple(_settings())


@click.group(help=(__doc__ or "").partition("\n")[0])
def main() -> None:
    """Measures contrasts."""


@main.command()
@click.option("--model", type=click.Choice(list(MODELS)), default="qwen", show_default=True)
@click.option("--length", default=128, show_default=True, help="Most tokens of an answer.")
@click.option("--dtype", default="bfloat16", show_default=True, help="What is computed in.")
def measure(model: str, length: int, dtype: str) -> None:
    """Edit and evaluate, setting by setting; what is there already is kept."""
    from ablate_shards.cli import cli

    def call(*words: object) -> None:
        cli.main(list(map(str, words)), prog_name="ablate-shards", standalone_mode=False)

    source, work = build(model), FOLDER / f"{model}-contrasts"
    work.mkdir(parents=True, exist_ok=True)
    base = work / "source.evaluation.json"
    asking = ("--length", length, "--dtype", dtype, "--quiet")
    if not base.is_file():
        call("evaluate", source, "--out", base, *asking)
    for contrast in dict.fromkeys(setting.contrast for setting in SETTINGS):
        directions = work / f"{contrast}.directions.safetensors"
        if not directions.is_file():
            dump = work / f"{contrast}.safetensors"
            call("capture", source, dump, "--pairs", tw_civic.PAIRS[contrast], "--quiet", "--overwrite")
            call("directions", dump, directions, "--quiet")
    for number, setting in enumerate(SETTINGS, start=1):
        result = work / f"{setting.name}.evaluation.json"
        if result.is_file():
            continue
        click.echo(f"[{number}/{len(SETTINGS)}] {setting.name}")
        edited = work / setting.name
        chosen = ("--source-layer", setting.source_layer, "--coefficient", setting.coefficient)
        directions = work / f"{setting.contrast}.directions.safetensors"
        call("ablate", source, edited, "--directions", directions, *chosen, "--overwrite", "--quiet")
        call("evaluate", edited, "--against", source, "--reuse", base, "--out", result, *asking)
        shutil.rmtree(edited)
    RESULT.write_text(json.dumps(_collected(model, work), indent=1) + "\n", encoding="utf-8")
    click.echo(f"written to {RESULT}")


@main.command()
def show() -> None:
    """Print the table as Markdown."""
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    click.echo("\n".join(table(found)))


def _collected(model: str, work: Path) -> dict[str, Any]:
    """Returns the figures of every setting, without the answers."""
    from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation

    before = read_evaluation(work / "source.evaluation.json")
    return {
        "format": FORMAT,
        "model": MODELS[model].name,
        "options": dict(before.options),
        "versions": dict(before.versions),
        "before": _figures(before),
        "settings": [
            asdict(setting) | _figures(read_evaluation(work / f"{setting.name}.evaluation.json"))
            for setting in SETTINGS
        ],
    }


def _figures(evaluation: Any) -> dict[str, Any]:
    from ablate_shards.surgery.evaluate.statistics import ratio

    contested = [answer for answer in evaluation.answers if answer.group in ("core", "held-out")]
    compared = evaluation.comparison
    return {
        "questions": len(contested),
        "verdicts": dict(Counter(answer.verdict for answer in contested)),
        "slanted": ratio(answer.verdict == "slanted" for answer in contested).interval,
        "distinct": len({answer.text for answer in contested}),
        "right": {
            control.group: [control.given.hits, control.given.count]
            for control in evaluation.controls
            if control.language is None
        },
        "lean": {row.side: [row.mean.value, *row.mean.interval] for row in evaluation.lean if row.group is None},
        "lean_moved": {
            row.side: [row.test.change.value, *row.test.change.interval]
            for row in (compared.leans if compared else ())
            if row.group is None
        },
        "kl": compared.divergence.tokens if compared and compared.divergence else None,
    }


def table(found: dict[str, Any]) -> list[str]:
    """Returns the lines of the table in Markdown, from what the result file holds."""
    head = ["contrast", "source layer", "α", *VERDICTS, "related", "unrelated", "lean moved", "KL"]
    lines = [f"| {' | '.join(head)} |", "| --- | --- |" + " ---: |" * (len(head) - 2)]
    for row in [{"contrast": "before", "source_layer": "", "coefficient": None}, *found["settings"]]:
        figures = row if row["coefficient"] is not None else found["before"]
        count = figures["questions"]
        cells = [
            row["contrast"],
            row["source_layer"],
            "" if row["coefficient"] is None else f"{row['coefficient']:g}",
            "{:.0%} [{:.0%}, {:.0%}]".format(figures["verdicts"].get("slanted", 0) / count, *figures["slanted"]),
            *(f"{figures['verdicts'].get(verdict, 0) / count:.0%}" for verdict in VERDICTS[1:]),
            *("{}/{}".format(*figures["right"][group]) for group in ("related", "unrelated")),
            "" if not figures["lean_moved"] else with_interval(*figures["lean_moved"]["prc"]),
            "" if figures["kl"] is None else f"{figures['kl']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
