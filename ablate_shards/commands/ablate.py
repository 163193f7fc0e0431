"""``ablate``: removes a direction from a checkpoint."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    as_json_flag,
    cache_flag,
    debug_flag,
    estimation,
    parsed,
    print_json,
    private_flag,
    quiet_flag,
    recipe_flag,
    resources,
    sync_flag,
)
from ablate_shards.commands.startup import one_blas_thread
from ablate_shards.errors import UsageError

__all__ = ["ablate"]


def _parse_layers(text: str) -> Any:
    from ablate_shards.surgery.plan.recipe import parse_layers

    return parse_layers(text)


def _parse_components(text: str) -> Any:
    from ablate_shards.surgery.plan.recipe import parse_components

    return parse_components(text)


def _parse_source_layer(text: str) -> Any:
    from ablate_shards.surgery.plan.recipe import parse_source_layer

    return parse_source_layer(text)


@click.command()
@click.argument("source", type=SOURCE)
@click.argument("out", type=SOURCE)
@click.option("-d", "--directions", type=PATH, help="Directions file.")
@click.option("-a", "--activations", type=PATH, help="Activation dump to compute the directions from.")
@estimation
@click.option(
    "--layers",
    metavar="LAYERS",
    callback=parsed(_parse_layers),
    help="Decoder layers to edit, such as 1-23,30.  [default: every layer with a direction]",
)
@click.option(
    "--components",
    metavar="NAMES",
    callback=parsed(_parse_components),
    default="attention,mlp",
    show_default=True,
    help="What to edit: attention, mlp, embedding.",
)
@click.option(
    "--coefficient",
    type=float,
    default=1.0,
    show_default=True,
    help="How much of the component to subtract: 1 removes it, 2 reflects it.",
)
@click.option(
    "--preserve",
    type=click.Choice(["rows", "columns", "none"]),
    default="rows",
    show_default=True,
    help="The norms to keep.",
)
@click.option(
    "--biproject/--no-biproject",
    default=True,
    show_default=True,
    help="Make the direction orthogonal to the reference means of both layers first.",
)
@click.option(
    "--source-layer",
    metavar="LAYER",
    callback=parsed(_parse_source_layer),
    default="own",
    show_default=True,
    help="Layer whose direction is removed: own (each layer's), best (by the scores) or a number.",
)
@click.option(
    "--mtp",
    type=click.Choice(["keep", "edit"]),
    default="keep",
    show_default=True,
    help="What to do with multi-token-prediction layers.",
)
@resources
@recipe_flag
@cache_flag
@private_flag
@click.option("--link", is_flag=True, help="Hard-link shards without an edit; they share their bytes with SOURCE.")
@sync_flag
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier run made.")
@as_json_flag
@quiet_flag
@debug_flag
def ablate(
    source: Path | str,
    out: Path | str,
    *,
    directions: Path | None,
    activations: Path | None,
    estimator: Any,
    rank: int,
    winsorize: float | None,
    without: tuple[Path, ...],
    recipe: Any,
    device: str,
    memory: int,
    jobs: int | None,
    cache: bool,
    private: bool,
    link: bool,
    sync: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Remove a direction from the weights of SOURCE and write the edited checkpoint to OUT.

    SOURCE is a .safetensors file, a checkpoint folder, a Hub id org/name[@revision] or a URL that
    fsspec reads; OUT is a folder that appears only when complete, a repository hub:org/name that
    gets one commit, or a folder of an object store such as s3://bucket/name. Without -d or -a,
    directions.safetensors or activations.safetensors beside the weights is used.
    """
    if activations is None:
        one_blas_thread()
    from ablate_shards.surgery.checkpoint.checkpoint import files_of
    from ablate_shards.surgery.checkpoint.hub_store import quieten_hub
    from ablate_shards.surgery.checkpoint.stores import cached, hub_repository, open_source
    from ablate_shards.surgery.directions.estimate import EstimatorOptions
    from ablate_shards.surgery.edit.ablation import ablation
    from ablate_shards.surgery.edit.execute import ExecuteOptions
    from ablate_shards.surgery.hub.outputs import carry_out, check_options, is_folder
    from ablate_shards.surgery.machine.staging import check_out
    from ablate_shards.surgery.plan.bases import resolve_bases
    from ablate_shards.surgery.plan.plan import make_plan
    from ablate_shards.surgery.plan.recipe import AblateOptions
    from ablate_shards.terminal.progress import show_progress

    progress = show_progress(quiet=quiet or as_json)
    directions, activations = _one_source(directions, activations)
    options = AblateOptions(
        **settings,
        overrides=recipe.overrides if recipe else (),
        targets=recipe.targets if recipe else (),
    )
    run = ExecuteOptions(
        device=device, memory=memory, jobs=jobs, resume=resume, overwrite=overwrite, link=link, sync=sync
    )
    checkpoint = open_source(source)
    check_options(checkpoint, out, link=link, cache=cache, private=private)
    if checkpoint.remote is not None and checkpoint.remote.revision:
        progress.note(f"{checkpoint.name} is commit {checkpoint.remote.revision}")
    if cache or hub_repository(out) is not None:
        quieten_hub(bars=quiet or as_json or not sys.stderr.isatty())
    if not dry_run and is_folder(out):
        check_out(checkpoint.path, files_of(checkpoint), out, overwrite=overwrite)
    estimation = EstimatorOptions(estimator=estimator, rank=rank, winsorize=winsorize)
    found, used = _find_directions(checkpoint, directions, activations, estimation, without, progress)
    progress.note(f"directions: {used}")
    plan = make_plan(checkpoint, found, options)
    # Without scores no edit is left to the best layer, or there would be no plan.
    if options.source_layer == "best" and found.scores:
        progress.note(f"source layer: {found.best_layer()}, the best by its scores")
    for note in plan.notes:
        progress.note(note)
    if dry_run:
        resolve_bases(plan.edits, checkpoint, found)
        if as_json:
            print_json(plan.as_dict())
        elif not quiet:
            from ablate_shards.terminal.results import print_plan

            print_plan(checkpoint, plan)
        return
    if cache:
        checkpoint = cached(checkpoint)
    with progress:
        operation = ablation(checkpoint, plan, found, options)
        results, url = carry_out(checkpoint, operation, out, run, progress, private=private)
    if as_json:
        print_json(
            {
                "out": url or str(out),
                "tensors": {name: dataclasses.asdict(result) for name, result in results.items()},
            }
        )
    elif not quiet:
        from ablate_shards.terminal.results import print_results

        print_results(checkpoint, plan, results, out, url)


def _one_source(directions: Path | None, activations: Path | None) -> tuple[Path | None, Path | None]:
    """Lets a flag win over the recipe's key of the other kind, and refuses what would be ignored."""
    context = click.get_current_context()

    def typed(name: str) -> bool:
        return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    if directions is not None and activations is not None:
        if typed("directions") == typed("activations"):
            raise UsageError("--directions and --activations both name the directions; give one of them")
        directions, activations = (directions, None) if typed("directions") else (None, activations)
    ignored = [name for name in ("estimator", "rank", "winsorize", "without") if typed(name)]
    if directions is not None and ignored:
        raise UsageError(f"--{ignored[0]} is about activations, but {directions} holds directions already; use -a DUMP")
    return directions, activations


def _find_directions(
    checkpoint: Any,
    directions: Path | None,
    activations: Path | None,
    estimation: Any,
    without: tuple[Path, ...],
    progress: Any,
) -> tuple[Any, Path]:
    from ablate_shards.surgery.directions.activations import open_activations
    from ablate_shards.surgery.directions.estimate import compute_directions
    from ablate_shards.surgery.directions.formats import read_directions
    from ablate_shards.surgery.directions.without import read_without

    if directions is None and activations is None and checkpoint.remote is None:
        beside = [checkpoint.root / f"{name}.safetensors" for name in ("directions", "activations")]
        directions = beside[0] if beside[0].is_file() else None
        activations = beside[1] if directions is None and beside[1].is_file() else None
        if directions is not None and without:
            raise UsageError(f"--without is about activations, but {directions} holds directions already; use -a DUMP")
    if directions is not None:
        return read_directions(directions), directions
    if activations is not None:
        dump = open_activations(activations)
        other = read_without(without, dump)
        with progress:
            return compute_directions(dump, estimation, without=other, progress=progress.count), activations
    here = f", and neither directions.safetensors nor activations.safetensors is in {checkpoint.root}"
    raise UsageError(
        f"no directions given{here if checkpoint.remote is None else ''}; make them with "
        "`ablate-shards directions DUMP directions.safetensors` and add "
        "`-d directions.safetensors`, or add the activation dump itself with `-a DUMP`"
    )
