"""``ablate``: removes a direction from a checkpoint."""

from pathlib import Path
from typing import Any

import click

from ablate_shards.commands.options import (
    PATH,
    SOURCE,
    adapter_rank,
    biproject_flag,
    coefficient_flag,
    components_flag,
    estimation,
    layers_flag,
    making_adapter,
    print_json,
    recipe_flag,
    source_layer_flag,
)
from ablate_shards.commands.output import OutputOptions, made, output_options
from ablate_shards.commands.startup import one_blas_thread
from ablate_shards.errors import UsageError

__all__ = ["ablate"]


def _before_numpy(_ctx: click.Context, _param: click.Parameter, activations: Path | None) -> Path | None:
    if activations is None:
        one_blas_thread()
    return activations


@click.command()
@click.argument("source", type=SOURCE)
@click.argument("out", type=SOURCE)
@click.option("-d", "--directions", type=PATH, help="Directions file.")
@click.option(
    "-a",
    "--activations",
    type=PATH,
    is_eager=True,  # other options import NumPy to be parsed
    callback=_before_numpy,
    help="Activation dump to compute the directions from.",
)
@estimation
@layers_flag
@components_flag
@coefficient_flag
@click.option(
    "--preserve",
    type=click.Choice(["rows", "columns", "none"]),
    default="rows",
    show_default=True,
    help="The norms to keep.",
)
@biproject_flag
@source_layer_flag
@click.option(
    "--mtp",
    type=click.Choice(["keep", "edit"]),
    default="keep",
    show_default=True,
    help="What to do with multi-token-prediction layers.",
)
@click.option(
    "--dequantise",
    type=click.Choice(["writers", "all"]),
    default=None,
    help="Write quantised weights in bfloat16: those that are edited (of experts, all of their layer), or all.  "
    "[default: none, codes stay codes]",
)
@click.option(
    "--rounding",
    type=click.Choice(["directed", "nearest"]),
    default="directed",
    show_default=True,
    help="How codes of quantised weights are chosen: directed, so that rounding does not undo the edit; nearest, to "
    "see what that undoes.",
)
@click.option("--force", is_flag=True, help="Keep a result of which --rounding nearest undoes more than 1 %.")
@recipe_flag
@making_adapter("--adapter", is_flag=True, help="Make OUT a LoRA adapter that does what the edit does.")
@adapter_rank
@output_options
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
    dequantise: Any,
    force: bool,
    recipe: Any,
    adapter: bool,
    adapter_rank: int | None,
    output: OutputOptions,
    **settings: Any,
) -> None:
    """Remove a direction from the weights of SOURCE and write the edited checkpoint to OUT.

    SOURCE is a .safetensors file, a checkpoint folder, a Hub id org/name[@revision] or a URL that
    fsspec reads; OUT is a folder that appears only when complete, a repository hub:org/name that
    gets one commit, or a folder of an object store such as s3://bucket/name. Without -d or -a,
    directions.safetensors or activations.safetensors beside the weights is used.

    With --adapter, OUT is a folder or a repository that peft loads as an adapter of SOURCE, and no weight is written.
    """
    from ablate_shards.surgery.directions.estimate import EstimatorOptions
    from ablate_shards.surgery.edit.ablation import ablation
    from ablate_shards.surgery.plan.plan import make_plan
    from ablate_shards.surgery.plan.recipe import AblateOptions

    if adapter_rank is not None and not adapter:
        raise UsageError("--adapter-rank is the rank of an adapter; add --adapter, or leave it out")
    if adapter:
        output.check_for_adapter(out)
        if dequantise is not None or settings["rounding"] != "directed":
            raise UsageError(
                "--adapter writes no weight, so none is dequantised or rounded to codes; leave out --dequantise and "
                "--rounding"
            )
    progress = output.show_progress()
    directions, activations = _one_source(directions, activations)
    prepared = output.prepare(source, out, (directions, activations, *without), progress)
    checkpoint = prepared.checkpoint
    estimation = EstimatorOptions(estimator=estimator, rank=rank, winsorize=winsorize)
    source_layer = settings["source_layer"]
    found, used = _find_directions(checkpoint, directions, activations, estimation, without, progress, source_layer)
    progress.note(f"directions: {used}")
    options = AblateOptions(
        **settings,
        profiles=recipe.profiles if recipe else (),
        overrides=recipe.overrides if recipe else (),
        targets=recipe.targets if recipe else (),
    )
    dequantisation = _dequantisation(checkpoint, found, options, dequantise)
    if dequantisation is not None:
        checkpoint = dequantisation.applied(checkpoint)
        for note in dequantisation.notes:
            progress.note(note)
    plan = make_plan(checkpoint, found, options)
    for note in plan.notes:
        progress.note(note)
    if adapter:
        _make_adapter(prepared, plan, found, options, adapter_rank, out, output, progress)
        return
    if output.dry_run:
        if output.as_json:
            from ablate_shards.surgery.edit.receipt import dequantised_record

            print_json({**plan.as_dict(), **dequantised_record(dequantisation)})
        elif not output.quiet:
            from ablate_shards.terminal.results import print_plan

            print_plan(checkpoint, plan, dequantisation)
        return
    with progress:
        results, url = prepared.perform(
            ablation(checkpoint, plan, found, options, dequantisation, force=force), progress
        )
    if (worker := prepared.run.rank) is not None:
        output.print_part(worker, out, results)
    elif output.as_json:
        print_json(made(out, url, results))
    elif not output.quiet:
        from ablate_shards.terminal.results import print_results

        print_results(checkpoint, plan, results, out, url, dequantisation)


def _dequantisation(checkpoint: Any, directions: Any, options: Any, which: Any) -> Any:
    """Returns what is dequantised before the edit, None where nothing is."""
    from ablate_shards.surgery.dequantise.dequantisation import plan_dequantisation
    from ablate_shards.surgery.plan.plan import make_plan

    if which is None:
        return None
    if which == "all":
        return plan_dequantisation(checkpoint)
    edits = make_plan(checkpoint, directions, options).edits
    names = [edit.name for edit in edits if edit.scales is not None]
    if not names:
        raise UsageError(
            f"--dequantise writers: none of the weights that would be edited in {checkpoint.name} is quantised; leave "
            "it out, or name all"
        )
    return plan_dequantisation(checkpoint, names)


def _make_adapter(
    prepared: Any,
    plan: Any,
    directions: Any,
    options: Any,
    rank: int | None,
    out: Path | str,
    output: OutputOptions,
    progress: Any,
) -> None:
    from ablate_shards.surgery.extract.ablated import ablation_receipt, plan_ablation_adapter
    from ablate_shards.terminal.adapters import print_adapter, print_adapter_plan

    checkpoint = prepared.source()
    adapter = plan_ablation_adapter(checkpoint, plan, options, rank)
    for note in adapter.notes:
        progress.note(note)
    if output.dry_run:
        if output.as_json:
            print_json(adapter.as_dict())
        elif not output.quiet:
            print_adapter_plan(adapter)
        return
    with progress:
        results, url = prepared.make_adapter(
            adapter, lambda measured: ablation_receipt(checkpoint, plan, options, directions, measured), progress
        )
    if output.as_json:
        print_json(made(out, url, results, kind="modules"))
    elif not output.quiet:
        source = "@".join(part for part in checkpoint.origin or (checkpoint.name,) if part)
        print_adapter(adapter, results, out, source, url)


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
    layer: Any,
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
        return read_directions(directions, layer if isinstance(layer, int) else None), directions
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
