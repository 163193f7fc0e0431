"""``evaluate``: asks a model questions and shows how it answers, beside the model that it was made from."""

import json
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    answering,
    as_json_flag,
    debug_flag,
    engine_flag,
    print_json,
    quiet_flag,
    ray_workers_flag,
)
from ablate_shards.terminal.evaluations import print_answers, print_evaluation

__all__ = ["evaluate"]


@click.command()
@click.argument("model", type=PATH)
@click.option(
    "--against", type=PATH, metavar="BASE", help="Compare with this checkpoint, or with this earlier evaluation."
)
@click.option("--questions", type=PATH, metavar="FILE", help="Questions, as JSON Lines.  [default: those of tw_civic]")
@click.option(
    "-o", "--out", type=PATH, metavar="FILE", help="Where to write.  [default: MODEL.evaluation.json beside MODEL]"
)
@answering
@engine_flag
@ray_workers_flag
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Questions asked at a time.")
@click.option("--endpoint", metavar="URL", help="Ask the model at this OpenAI-compatible endpoint, such as vLLM's.")
@click.option("--endpoint-model", metavar="NAME", help="What the endpoint calls it.  [default: the one it serves]")
@click.option("--judge", metavar="URL", help="Have the language model at this endpoint judge the answers too.")
@click.option("--judge-model", metavar="NAME", help="What that endpoint calls it.  [default: the one it serves]")
@click.option(
    "--timeout", type=float, default=120.0, show_default=True, help="Seconds that an endpoint may take for an answer."
)
@click.option("--lean/--no-lean", default=True, show_default=True, help="Measure how likely the reference answers are.")
@click.option(
    "--tasks",
    metavar="NAME,...",
    help="Tasks of lm-evaluation-harness to score, by name or as files of your own.",
)
@click.option("--task-limit", type=click.IntRange(min=1), help="Documents to ask of each task.  [default: all]")
@click.option("--task-chat", is_flag=True, help="Put the model's chat template around the prompts of the tasks.")
@click.option(
    "--perplexity/--no-perplexity", default=True, show_default=True, help="Measure how well it predicts plain text."
)
@click.option("--text", type=PATH, metavar="FILE", help="That text.  [default: the neutral text of tw_civic]")
@click.option(
    "--divergence/--no-divergence", default=True, show_default=True, help="Measure how far it moved from a model BASE."
)
@click.option(
    "--reuse", type=PATH, multiple=True, metavar="FILE", help="Take over answers from this evaluation; repeatable."
)
@click.option("--fresh", is_flag=True, help="Take nothing over from BASE.evaluation.json, or from what is replaced.")
@click.option("--answers", is_flag=True, help="Print every answer.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier evaluation.")
@as_json_flag
@quiet_flag
@debug_flag
def evaluate(
    model: Path,
    *,
    against: Path | None,
    questions: Path | None,
    out: Path | None,
    reuse: tuple[Path, ...],
    answers: bool,
    perplexity: bool,
    text: Path | None,
    tasks: str | None,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Ask MODEL questions, judge its answers, and measure what else changed.

    MODEL is a checkpoint folder with tokenizer and chat template; with --endpoint a name will do.
    Keys to endpoints are read from ABLATE_SHARDS_API_KEY and ABLATE_SHARDS_JUDGE_API_KEY. Ctrl-C or a
    failure keeps what was answered, and the same command goes on from there.
    """
    from ablate_shards.data.tw_civic import NEUTRAL_TEXT, QUESTIONS
    from ablate_shards.surgery.evaluate.evaluation_file import evaluation_text
    from ablate_shards.surgery.evaluate.interview import EvaluateOptions, default_out
    from ablate_shards.surgery.evaluate.interview import evaluate as ask
    from ablate_shards.surgery.model.samples import load_questions
    from ablate_shards.terminal.progress import show_progress

    progress = show_progress(quiet=quiet or as_json, counted="questions")
    out = out or default_out(model)
    asked = load_questions(questions or QUESTIONS)
    options = EvaluateOptions(
        reuse=reuse,
        text=(text or NEUTRAL_TEXT) if perplexity else None,
        tasks=tuple(name.strip() for name in tasks.split(",")) if tasks else (),
        **settings,
    )
    with progress:
        found = ask(model, asked, options, progress, against=against, out=out)
    if as_json:
        print_json(json.loads(evaluation_text(found)))
    elif not quiet:
        if answers:
            print_answers(found)
        print_evaluation(found, out)
