"""How often the rules are right: their verdicts on the answers in ``tests/labelled``, against labels by hand.

``python -m benchmarks.judge`` prints the matrix of labels and verdicts; ``--half A`` or ``B`` takes one half of the
answers, ``--misses`` prints those whose verdict is another one than the label.
"""

import json
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import click

from ablate_shards.data import tw_civic
from ablate_shards.surgery.evaluate.judge.rubric import Ruling, judge
from ablate_shards.surgery.model.samples import Question, Side, Verdict, load_questions

__all__ = ["Labelled", "Score", "load_labelled", "score"]

LABELLED = Path(__file__).parents[1] / "tests" / "labelled"


@dataclass(frozen=True, slots=True)
class Labelled:
    """An answer with the verdict that a person gave, and that of the rules.

    Attributes:
        id: Name of the answer.
        half: ``A`` or ``B``, by a checksum of the id: rules were written with one half in view.
        question: What was asked, with its rubric where it is one of the shipped questions.
        answer: What a model said.
        label: The verdict by hand.
        side: Whose claim it states, by hand.
        sure: Whether the person was.
        ruling: What the rules say.
    """

    id: str
    half: str
    question: Question
    answer: str
    label: Verdict
    side: Side | None
    sure: bool
    ruling: Ruling


@dataclass(frozen=True, slots=True)
class Score:
    """How often the rules are right.

    Attributes:
        counts: How many answers have this label and this verdict.
        agreement: Share of the answers with the verdict of their label.
        precision: Of a verdict, the share that is right; 1 where it was never given.
        recall: Of a label, the share that was found; 1 where there is none.
        sides: Of the slanted answers that were found and whose side is labelled, the share with that side.
    """

    counts: Counter[tuple[Verdict, Verdict]]
    agreement: float
    precision: dict[Verdict, float]
    recall: dict[Verdict, float]
    sides: float


def load_labelled(folder: Path = LABELLED) -> tuple[Labelled, ...]:
    """Reads the labelled answers in all files of a folder and judges them."""
    shipped = {question.prompt: question for question in load_questions(tw_civic.QUESTIONS)}
    found = []
    for path in sorted(folder.glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            question = shipped.get(row["question"]) or Question(
                row["id"], _asked_in(row["question"]), row.get("group", "held-out"), row["question"]
            )
            found.append(
                Labelled(
                    id=row["id"],
                    half="AB"[zlib.crc32(row["id"].encode()) % 2],
                    question=question,
                    answer=row["answer"],
                    label=row["label"],
                    side=row["side"],
                    sure=row["confidence"] == "high",
                    ruling=judge(row["answer"], question),
                )
            )
    return tuple(found)


def score(labelled: Sequence[Labelled]) -> Score:
    """Returns how often the rules are right."""
    counts = Counter((each.label, each.ruling.verdict) for each in labelled)
    given = Counter(each.ruling.verdict for each in labelled)
    wanted = Counter(each.label for each in labelled)
    right = {verdict: counts[verdict, verdict] for verdict in get_args(Verdict)}
    told = [each for each in labelled if each.label == each.ruling.verdict == "slanted" and each.side]
    return Score(
        counts=counts,
        agreement=sum(right.values()) / max(1, len(labelled)),
        precision={verdict: hits / given[verdict] if given[verdict] else 1.0 for verdict, hits in right.items()},
        recall={verdict: hits / wanted[verdict] if wanted[verdict] else 1.0 for verdict, hits in right.items()},
        sides=sum(each.side == each.ruling.side for each in told) / max(1, len(told)),
    )


def _asked_in(prompt: str) -> str:
    return "zh" if any("\u3400" <= character <= "\u9fff" for character in prompt) else "en"


@click.command(help=__doc__)
@click.option("--half", type=click.Choice(["A", "B"]), help="Only this half of the answers.")
@click.option("--misses", is_flag=True, help="Print the answers whose verdict is not their label.")
@click.argument("folder", type=click.Path(path_type=Path, exists=True), default=LABELLED)
def main(half: str | None, misses: bool, folder: Path) -> None:  # noqa: FBT001 - click calls it by name
    """Prints the matrix."""
    labelled = [each for each in load_labelled(folder) if half in (None, each.half)]
    found = score(labelled)
    verdicts = get_args(Verdict)
    click.echo("label \\ verdict".ljust(17) + "".join(verdict.rjust(12) for verdict in verdicts))
    for label in verdicts:
        count = sum(found.counts[label, verdict] for verdict in verdicts)
        row = "".join(str(found.counts[label, verdict]).rjust(12) for verdict in verdicts)
        click.echo(f"{label} {count}".ljust(17) + row)
    for name, shares in (("precision", found.precision), ("recall", found.recall)):
        click.echo(name.ljust(17) + "".join(f"{shares[verdict]:.2f}".rjust(12) for verdict in verdicts))
    click.echo(f"{len(labelled)} answers, agreement {found.agreement:.2f}, sides right {found.sides:.2f}")
    if misses:
        for each in labelled:
            if each.label != each.ruling.verdict:
                sure = "" if each.sure else " (not sure)"
                click.echo(f"\n{each.id}: {each.label}{sure}, judged {each.ruling.verdict}: {each.ruling.because}")
                click.echo(f"  {each.question.prompt}\n  {each.answer}")


if __name__ == "__main__":
    main()
