"""``search``: finds the edit of a model, and hands it over as a recipe."""

import json
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    as_json_flag,
    debug_flag,
    dtype_flag,
    engine_flag,
    estimation,
    parsed,
    print_json,
    quiet_flag,
    resources,
)
from ablate_shards.errors import UsageError

__all__ = ["search"]


def _load_space(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Any:
    """Reads a recipe, whose ``[search]`` gives the flags that the user does not."""
    if path is None:
        return None
    from ablate_shards.surgery.plan.recipe import read_recipe

    recipe = read_recipe(path)
    ctx.default_map = {key.replace("-", "_"): value for key, value in recipe.tables.get("search", {}).items()}
    return recipe


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _space(text: str) -> dict[str, Any]:
    space = json.loads(text)
    if not isinstance(space, dict):
        raise ValueError(f"expected a JSON object, found {text}")
    return space


@click.command()
@click.argument("model", type=PATH)
@click.argument("out", type=PATH, metavar="OUT.toml")
@click.option("-d", "--directions", type=PATH, multiple=True, metavar="FILE", help="Directions file; repeatable.")
@click.option("-a", "--activations", type=PATH, multiple=True, metavar="DUMP", help="Activation dump; repeatable.")
@estimation
@click.option(
    "--questions",
    type=PATH,
    multiple=True,
    metavar="FILE",
    help="Questions to try and choose by; repeatable.  [default: those of tw_civic for development]",
)
@click.option(
    "--report-questions",
    type=PATH,
    metavar="FILE",
    help="Questions to report on.  [default: two of five of --questions, without these those of tw_civic]",
)
@click.option("--trials", type=click.IntRange(min=1), default=100, show_default=True, help="How many edits to try.")
@click.option("--timeout", type=float, metavar="MINUTES", help="Begin no further trial after this time.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of what is tried.")
@click.option(
    "--objective",
    "objectives",
    metavar="NAMES",
    callback=parsed(_names),
    default="lean,kl",
    show_default=True,
    help="What trials are judged by, the effect first: lean, kl, subject, former, a verdict, or your own module:name.",
)
@click.option(
    "--kl", type=float, default=0.05, show_default=True, help="Most nats a token that unrelated answers may move by."
)
@click.option(
    "--controls", type=float, default=0.1, show_default=True, help="Most controls that may turn wrong, as a share."
)
@click.option(
    "--broken", type=float, default=0.1, show_default=True, help="Most answers that may become broken, as a share."
)
@click.option(
    "--subject",
    type=float,
    default=0.25,
    show_default=True,
    help="Most nats a token that words lose which answers repeat from their questions, of trials too.",
)
@click.option("--limit", type=float, default=0.5, show_default=True, help="Divergence above which a trial ends early.")
@click.option(
    "--choose",
    type=click.Choice(["effect", "cost"]),
    default="effect",
    show_default=True,
    help="What is chosen within these: the largest effect, or the least KL of what has the plain edit's effect.",
)
@click.option("--front", type=click.IntRange(min=1), default=6, show_default=True, help="Best trials to choose from.")
@click.option(
    "--length",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Most tokens of an answer of the choice.",
)
@click.option("--batch", type=click.IntRange(min=1), default=16, show_default=True, help="Questions asked at a time.")
@dtype_flag
@resources
@engine_flag
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Models to try edits on at a time.  [default: 1; with --engine ray one per GPU, without GPUs one per machine]",
)
@click.option(
    "--recipe",
    type=PATH,
    is_eager=True,
    callback=_load_space,
    help="TOML file with a table [search]: these options as keys, and the space.",
)
@click.option(
    "--space",
    metavar="JSON",
    callback=parsed(_space),
    help='What may vary, as in the recipe\'s [search.space], such as \'{"source": "own"}\'.',
)
@click.option("--dry-run", is_flag=True, help="Print the space and try nothing.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier recipe; trials of the same search are kept.")
@as_json_flag
@quiet_flag
@debug_flag
def search(
    model: Path,
    out: Path,
    *,
    directions: tuple[Path, ...],
    activations: tuple[Path, ...],
    estimator: Any,
    rank: int,
    winsorize: float | None,
    without: tuple[Path, ...],
    questions: tuple[Path, ...],
    report_questions: Path | None,
    kl: float,
    controls: float,
    broken: float,
    subject: float,
    batch: int,
    recipe: Any,
    space: dict[str, Any] | None,
    dry_run: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Find the edit of MODEL that removes most at least cost, and write it to OUT.toml as a recipe.

    Edits are tried on the model in memory, measured, and taken back; no checkpoint is written. What
    is tried, what is chosen and what is reported are measured on questions of their own. Ctrl-C
    keeps all finished trials, and the same command goes on.
    """
    from ablate_shards.data.tw_civic import DEVELOPMENT, QUESTIONS
    from ablate_shards.surgery.directions.estimate import EstimatorOptions
    from ablate_shards.surgery.model.samples import load_questions
    from ablate_shards.surgery.search.choice import Budget, OverBudgetError
    from ablate_shards.surgery.search.files import places_of, record_of, write_found
    from ablate_shards.surgery.search.objectives import Asking
    from ablate_shards.surgery.search.questions import deal
    from ablate_shards.surgery.search.search import SearchOptions, prepare_job
    from ablate_shards.surgery.search.search import search as run_search
    from ablate_shards.terminal.searches import SearchScreen, print_candidates, print_found, print_space

    if not directions and not activations:
        raise UsageError("no directions given; name directions with -d FILE, or activation dumps with -a DUMP")
    places = places_of(out, overwrite=overwrite)
    options = SearchOptions(
        budget=Budget(kl=kl, controls=controls, broken=broken, subject=subject),
        asking=Asking(batch=batch),
        overwrite=overwrite,
        **settings,
    )
    files = questions or (DEVELOPMENT,)
    reported = report_questions if questions else report_questions or QUESTIONS
    parts = deal(
        [question for file in files for question in load_questions(file)],
        load_questions(reported) if reported else (),
    )
    with SearchScreen(options, quiet=quiet or as_json) as progress:
        estimation = EstimatorOptions(estimator=estimator, rank=rank, winsorize=winsorize)
        read = _read_directions(directions, activations, estimation, progress)
        job = prepare_job(
            model,
            read,
            _read_directions(without, (), estimation, progress),
            parts,
            space if space is not None else recipe.space if recipe else {},
            options,
            places.journal,
        )
        if dry_run:
            print_space([(name, json.dumps(values)) for name, values in job.space.as_dict().items()])
            return
        try:
            found = run_search(job, progress)
        except OverBudgetError as error:
            if not (quiet or as_json):
                print_candidates(error.candidates, error.effect, "The best trials, on questions of the choice")
            raise
    write_found(found, places, (reported,) if reported else files)
    if as_json:
        print_json(record_of(found, places))
    elif not quiet:
        print_found(found, places)


def _read_directions(
    files: tuple[Path, ...], dumps: tuple[Path, ...], estimation: Any, progress: Any
) -> dict[str, Any]:
    """Reads directions, or computes them, by the names of their files."""
    from ablate_shards.surgery.directions.activations import open_activations
    from ablate_shards.surgery.directions.estimate import compute_directions
    from ablate_shards.surgery.directions.formats import read_directions
    from ablate_shards.surgery.search.contrasts import named

    found = {}
    for name, path in named((*files, *dumps)).items():
        if path in files:
            found[name] = read_directions(path)
        else:
            found[name] = compute_directions(open_activations(path), estimation, progress=progress.count)
        progress.note(f"{name}: {path}")
    return found
