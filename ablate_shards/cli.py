"""The command line: parses, calls, prints."""

import dataclasses
import json
import re
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ablate_shards import __version__
from ablate_shards.errors import AblateError, UsageError

__all__ = ["cli", "main"]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DEVICE = re.compile(r"auto|cpu|mps|xpu|cuda(:\d{1,3})?")


class _Failure(click.ClickException):
    """One sentence on stderr, and exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


class _WrongUsage(_Failure):
    """One sentence on stderr, and exit code 2."""

    exit_code = 2


class _Commands(click.Group):
    """A group whose default command is ``ablate``, and whose errors are one sentence."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        word = next((arg for arg in args if not arg.startswith("-")), None)
        if args and word not in self.commands and args[0] not in ("-h", "--help", "--version"):
            args = ["ablate", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.exceptions.Exit, click.ClickException, click.Abort):
            raise
        except Exception as error:
            if ctx.meta.get("debug"):
                traceback.print_exc()
            if isinstance(error, AblateError):
                raise (_WrongUsage if isinstance(error, UsageError) else _Failure)(str(error)) from error
            if isinstance(error, OSError):
                where = f"{error.filename}: " if error.filename else ""
                raise _Failure(f"{where}{error.strerror or error}") from error
            raise _Failure(
                f"internal error, please report it with what --debug adds: {type(error).__name__}: {error}"
            ) from error


def _parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
    """Makes an option's callback of a function that raises ValueError."""

    def callback(_ctx: click.Context, _param: click.Parameter, value: str | None) -> Any:
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from error

    return callback


def _parse_layers(text: str) -> Any:
    from ablate_shards.surgery.recipe import parse_layers

    return parse_layers(text)


def _parse_components(text: str) -> Any:
    from ablate_shards.surgery.recipe import parse_components

    return parse_components(text)


def _parse_source_layer(text: str) -> Any:
    from ablate_shards.surgery.recipe import parse_source_layer

    return parse_source_layer(text)


def _parse_memory(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b|)", text.strip().lower())
    memory = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if memory < 8_000_000:
        raise ValueError(f"expected at least 8MB, such as 256MB or 1GiB, found {text!r}")
    return memory


def _parse_device(text: str) -> str:
    if not _DEVICE.fullmatch(text):
        raise ValueError(f"expected auto, cpu, cuda, cuda:N, mps or xpu, found {text!r}")
    return text


def _load_recipe(ctx: click.Context, _param: click.Parameter, path: Path | None) -> Any:
    if path is None:
        return None
    from ablate_shards.surgery.recipe import read_recipe

    recipe = read_recipe(path)
    ctx.default_map = {key.replace("-", "_"): value for key, value in recipe.flags.items()}
    return recipe


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _set_debug(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    ctx.meta["debug"] = ctx.meta.get("debug") or value


_EXISTING = click.Path(path_type=Path)
_debug = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    is_eager=True,
    help="Add the traceback to an error.",
)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
_quiet = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
_recipe = click.option(
    "--recipe",
    type=_EXISTING,
    is_eager=True,
    callback=_load_recipe,
    help="TOML file with the same options as keys; a flag wins.",
)
_resources = _options(
    click.option(
        "--device",
        metavar="DEVICE",
        callback=_parsed(_parse_device),
        default="auto",
        show_default=True,
        help="auto, cpu, cuda[:N], mps or xpu.",
    ),
    click.option(
        "--memory",
        metavar="SIZE",
        callback=_parsed(_parse_memory),
        default="256MB",
        show_default=True,
        help="Most that all working buffers take together; at least 8MB.",
    ),
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=None,
        help="Tensors edited at a time.  [default: one per core; 2 on a GPU]",
    ),
)
_estimation = _options(
    click.option(
        "--estimator",
        type=click.Choice(["mean-difference", "geometric-median", "svd"]),
        default="mean-difference",
        show_default=True,
        help="How a direction is computed from activations.",
    ),
    click.option(
        "--rank",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        help="Directions per layer; more than one needs --estimator svd.",
    ),
    click.option(
        "--winsorize",
        type=float,
        default=None,
        metavar="QUANTILE",
        help="Clip each prompt's activations at this quantile of their magnitudes.",
    ),
)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
    epilog="SOURCE OUT without a command is short for `ablate SOURCE OUT`.",
)
@click.version_option(__version__, message="ablate-shards %(version)s")
@_debug
def cli() -> None:
    """Edit language-model checkpoints as raw safetensors shards, and prove what was edited.

    `ablate-shards SOURCE OUT -a DUMP` removes the direction that an activation dump shows;
    `ablate-shards SOURCE OUT -d FILE` removes one that was computed before.
    """


@cli.command()
@click.argument("source", type=_EXISTING)
@click.argument("out", type=_EXISTING)
@click.option("-d", "--directions", type=_EXISTING, help="Directions file.")
@click.option("-a", "--activations", type=_EXISTING, help="Activation dump to compute the directions from.")
@_estimation
@click.option(
    "--layers",
    metavar="LAYERS",
    callback=_parsed(_parse_layers),
    help="Decoder layers to edit, such as 1-23,30.  [default: every layer with a direction]",
)
@click.option(
    "--components",
    metavar="NAMES",
    callback=_parsed(_parse_components),
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
    callback=_parsed(_parse_source_layer),
    default="best",
    show_default=True,
    help="Layer whose direction is removed: best, own (each layer's) or a number.",
)
@click.option(
    "--mtp",
    type=click.Choice(["keep", "edit"]),
    default="keep",
    show_default=True,
    help="What to do with multi-token-prediction layers.",
)
@_resources
@_recipe
@click.option("--link", is_flag=True, help="Hard-link shards without an edit; they share their bytes with SOURCE.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run.")
@click.option("--overwrite", is_flag=True, help="Replace a folder that an earlier run made.")
@_json
@_quiet
@_debug
def ablate(
    source: Path,
    out: Path,
    *,
    directions: Path | None,
    activations: Path | None,
    estimator: Any,
    rank: int,
    winsorize: float | None,
    recipe: Any,
    device: str,
    memory: int,
    jobs: int | None,
    link: bool,
    dry_run: bool,
    resume: bool,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Remove a direction from the weights of SOURCE and write the edited checkpoint to OUT.

    SOURCE is a .safetensors file or a checkpoint folder; OUT is a folder that appears only when
    complete. Without -d or -a, directions.safetensors or activations.safetensors beside the weights
    is used.
    """
    from ablate_shards import screen
    from ablate_shards.surgery.checkpoint import files_of, open_checkpoint
    from ablate_shards.surgery.directions import EstimatorOptions
    from ablate_shards.surgery.execute import ExecuteOptions, execute
    from ablate_shards.surgery.plan import make_plan, resolve_bases
    from ablate_shards.surgery.recipe import AblateOptions
    from ablate_shards.surgery.staging import check_out

    progress = screen.progress(quiet=quiet or as_json)
    directions, activations = _one_source(directions, activations)
    options = AblateOptions(
        **settings,
        overrides=recipe.overrides if recipe else (),
        targets=recipe.targets if recipe else (),
    )
    run = ExecuteOptions(device=device, memory=memory, jobs=jobs, resume=resume, overwrite=overwrite, link=link)
    checkpoint = open_checkpoint(source)
    if not dry_run:
        check_out(checkpoint.path, files_of(checkpoint), out, overwrite=overwrite)
    estimation = EstimatorOptions(estimator=estimator, rank=rank, winsorize=winsorize)
    found, used = _find_directions(checkpoint, directions, activations, estimation, progress)
    progress.note(f"directions: {used}")
    if options.source_layer == "best":
        progress.note(f"source layer: {found.best_layer()}, the best by its scores")
    plan = make_plan(checkpoint, found, options)
    for note in plan.notes:
        progress.note(note)
    if dry_run:
        resolve_bases(plan.edits, checkpoint, found)
        if as_json:
            _print_json(plan.as_dict())
        elif not quiet:
            screen.print_plan(checkpoint, plan)
        return
    with progress:
        results = execute(checkpoint, plan, found, options, out, run, progress)
    if as_json:
        _print_json(
            {
                "out": str(out),
                "tensors": {name: dataclasses.asdict(result) for name, result in results.items()},
            }
        )
    elif not quiet:
        screen.print_results(checkpoint, plan, results, out)


@cli.command()
@click.argument("source", type=_EXISTING)
@_recipe
@_json
@_debug
def inspect(source: Path, *, recipe: Any, as_json: bool) -> None:
    """Show the tensors of SOURCE, the writers found in it, and what is left out and why."""
    from ablate_shards import screen
    from ablate_shards.errors import ArchitectureError
    from ablate_shards.surgery.architecture import dissect
    from ablate_shards.surgery.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(source)
    unknown = None
    anatomy = None
    try:
        anatomy = dissect(checkpoint.tensors, checkpoint.config, recipe.targets if recipe else ())
    except ArchitectureError as error:
        unknown = error
    if as_json:
        _print_json(screen.inspection(checkpoint, anatomy))
    else:
        screen.print_inspection(checkpoint, anatomy)
    if unknown is not None:
        raise unknown


@cli.command()
@click.argument("dump", type=_EXISTING)
@click.argument("file", type=_EXISTING)
@_estimation
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@_json
@_quiet
@_debug
def directions(
    dump: Path,
    file: Path,
    *,
    estimator: Any,
    rank: int,
    winsorize: float | None,
    overwrite: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Compute directions from the activation DUMP, write them to FILE and show their scores."""
    from ablate_shards import screen
    from ablate_shards.surgery.activations import open_activations
    from ablate_shards.surgery.directions import EstimatorOptions, compute_directions, write_directions

    if file.suffix != ".safetensors":
        raise UsageError(f"{file}: directions are written as safetensors; name a file ending in .safetensors")
    if not file.absolute().parent.is_dir() or file.is_dir():
        raise UsageError(f"{file}: expected a file in a folder that exists; make the folder first, or name another")
    if file.exists() and (not overwrite or file.resolve() in (dump.resolve(), *dump.resolve().glob("*.safetensors"))):
        way_out = "name another file" if overwrite else "--overwrite replaces it"
        raise UsageError(f"{file}: already exists{' and belongs to the dump' if overwrite else ''}; {way_out}")
    progress = screen.progress(quiet=quiet or as_json)
    with progress:
        found = compute_directions(
            open_activations(dump),
            EstimatorOptions(estimator=estimator, rank=rank, winsorize=winsorize),
            progress=progress.count,
        )
    write_directions(found, file)
    if as_json:
        _print_json(screen.scores(found))
    elif not quiet:
        screen.print_scores(found, file)


@cli.command()
@click.argument("source", type=_EXISTING)
@click.argument("out", type=_EXISTING)
@_resources
@_json
@_quiet
@_debug
def verify(source: Path, out: Path, *, device: str, memory: int, jobs: int | None, as_json: bool, quiet: bool) -> None:
    """Re-read SOURCE and OUT and compare every byte with what the receipt in OUT says.

    The exit code is 1 when anything differs.
    """
    from ablate_shards import screen
    from ablate_shards.surgery.checkpoint import open_checkpoint
    from ablate_shards.surgery.execute import ExecuteOptions
    from ablate_shards.surgery.verify import verify as verify_checkpoint

    progress = screen.progress(quiet=quiet or as_json)
    run = ExecuteOptions(device=device, memory=memory, jobs=jobs)
    checkpoint = open_checkpoint(source)
    with progress:
        verification = verify_checkpoint(checkpoint, out, run, progress)
    if as_json:
        _print_json(dataclasses.asdict(verification))
    elif verification.differences or not quiet:
        screen.print_verification(verification, source, out)
    if verification.differences:
        raise click.exceptions.Exit(1)


def _one_source(directions: Path | None, activations: Path | None) -> tuple[Path | None, Path | None]:
    """Lets a flag win over the recipe's key of the other kind, and refuses what would be ignored."""
    context = click.get_current_context()

    def typed(name: str) -> bool:
        return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE

    if directions is not None and activations is not None:
        if typed("directions") == typed("activations"):
            raise UsageError("--directions and --activations say the same thing twice; give one of them")
        directions, activations = (directions, None) if typed("directions") else (None, activations)
    ignored = [name for name in ("estimator", "rank", "winsorize") if typed(name)]
    if directions is not None and ignored:
        raise UsageError(f"--{ignored[0]} is about activations, but {directions} holds directions already; use -a DUMP")
    return directions, activations


def _find_directions(
    checkpoint: Any, directions: Path | None, activations: Path | None, estimation: Any, progress: Any
) -> tuple[Any, Path]:
    from ablate_shards.surgery.activations import open_activations
    from ablate_shards.surgery.directions import compute_directions, read_directions

    if directions is None and activations is None:
        beside = [checkpoint.root / f"{name}.safetensors" for name in ("directions", "activations")]
        directions = beside[0] if beside[0].is_file() else None
        activations = beside[1] if directions is None and beside[1].is_file() else None
    if directions is not None:
        return read_directions(directions), directions
    if activations is not None:
        with progress:
            return compute_directions(open_activations(activations), estimation, progress=progress.count), activations
    raise UsageError(
        f"no directions given, and neither directions.safetensors nor activations.safetensors is in "
        f"{checkpoint.root}; make them with `ablate-shards directions DUMP directions.safetensors` and add "
        "`-d directions.safetensors`, or add the activation dump itself with `-a DUMP`"
    )


def _print_json(content: Any) -> None:
    click.echo(json.dumps(content, indent=1, ensure_ascii=False))


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; ends the process with 0 (done), 1 (failed) or 2 (wrong usage)."""
    cli(args=args, prog_name="ablate-shards")
