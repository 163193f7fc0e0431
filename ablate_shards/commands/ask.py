"""``ask``: puts questions to a model, and to the one that it was made from, and shows the answers side by side."""

import sys
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import PATH, debug_flag, device_flag
from ablate_shards.errors import UsageError

__all__ = ["ask"]


@click.command()
@click.argument("model", type=PATH)
@click.argument("asked", nargs=-1, metavar="[QUESTION]...")
@click.option("--against", type=PATH, metavar="BASE", help="Ask this checkpoint too, and show its answers beside.")
@click.option("--length", type=click.IntRange(min=1), default=256, show_default=True, help="Most tokens of an answer.")
@click.option("--thinking", is_flag=True, help="Let the model think first, where its chat template has the choice.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="What to compute in; auto: what the weights are stored in, float32 on the CPU.",
)
@device_flag
@click.option("--system", metavar="TEXT", help="System message to every question.")
@click.option(
    "--questions",
    type=PATH,
    metavar="FILE",
    help="Questions whose answers can be judged, as JSON Lines.  [default: those of tw_civic]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a question, each on one line, on stdout.")
@click.option("-q", "--quiet", is_flag=True, help="Print answers and errors only.")
@debug_flag
def ask(
    model: Path,
    asked: tuple[str, ...],
    *,
    against: Path | None,
    questions: Path | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Ask MODEL questions and watch it answer, beside the model it was made from.

    Each QUESTION is asked by itself, and so is each line of stdin where it is piped or a QUESTION is `-`. Without one,
    questions are typed one after another; Ctrl-C ends an answer, Ctrl-D, exit or quit the conversation. An answer to a
    question with a rubric is judged.
    """
    from ablate_shards.data.tw_civic import QUESTIONS
    from ablate_shards.surgery.evaluate.conversation import AskOptions, conversing
    from ablate_shards.surgery.evaluate.conversation import ask as ask_all
    from ablate_shards.surgery.model.samples import load_questions
    from ablate_shards.terminal.conversation import show_conversation, talk

    known = load_questions(questions or QUESTIONS)
    options = AskOptions(**settings)
    typed = not asked and sys.stdin.isatty()
    with show_conversation(as_json=as_json, quiet=quiet, typed=typed) as screen:
        if typed:
            with conversing(model, known, options, screen, against=against) as conversation:
                talk(conversation.ask, screen)
        else:
            ask_all(model, _texts(asked or ("-",)), known, options, screen, against=against)


def _texts(asked: tuple[str, ...]) -> list[str]:
    """Returns the questions, those of stdin in the place of ``-``."""
    texts: list[str] = []
    for word in asked:
        texts += _lines() if word == "-" else [word]
    if not texts:
        raise UsageError("stdin holds no question; expected one a line, or name one after MODEL")
    return texts


def _lines() -> list[str]:
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"stdin: expected text in UTF-8, found another encoding ({error.reason})") from error
    return [line for line in text.split("\n") if line.strip()]
