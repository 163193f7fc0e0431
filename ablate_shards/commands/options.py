"""The options that several commands share, and how their values are read."""

import functools
import json
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ablate_shards.commands.startup import one_blas_thread
from ablate_shards.terminal.encoding import speaks_unicode

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from ablate_shards.surgery.machine.ranks import WorkerRank

__all__ = [
    "COMMAND",
    "PATH",
    "SOURCE",
    "adapter_rank",
    "answering",
    "as_json_flag",
    "biproject_flag",
    "cache_flag",
    "coefficient_flag",
    "components_flag",
    "debug_flag",
    "device_flag",
    "dtype_flag",
    "engine_flag",
    "estimation",
    "layers_flag",
    "making_adapter",
    "parse_memory",
    "parsed",
    "print_json",
    "print_rank",
    "private_flag",
    "quiet_flag",
    "rank_flags",
    "rank_given",
    "rank_record",
    "ray_workers_flag",
    "recipe_flag",
    "resources",
    "source_layer_flag",
    "sync_flag",
]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_DEVICE = re.compile(r"auto|cpu|mps|xpu|cuda(:\d{1,3})?")


def parsed(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, Any], Any]:
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
    from ablate_shards.surgery.plan.recipe import parse_layers

    return parse_layers(text)


def _parse_components(text: str) -> Any:
    from ablate_shards.surgery.plan.recipe import parse_components

    return parse_components(text)


def _parse_source_layer(text: str) -> Any:
    from ablate_shards.surgery.plan.recipe import parse_source_layer

    return parse_source_layer(text)


def parse_memory(text: str) -> int:
    """Returns the bytes of a size such as 256MB.

    Raises:
        ValueError: It is no size, or a very small one.
    """
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
    from ablate_shards.surgery.plan.recipe import read_recipe

    recipe = read_recipe(path)
    ctx.default_map = {key.replace("-", "_"): value for key, value in recipe.edit_flags.items()}
    return recipe


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Makes one decorator of several options."""

    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _set_debug(ctx: click.Context, _param: click.Parameter, value: Any) -> None:
    ctx.meta["debug"] = ctx.meta.get("debug") or value


class _Source(click.ParamType[Path | str]):
    """A path, a Hub id or a URL; a Path would fold the slashes of a URL into one."""

    name = "path"

    def convert(self, value: Any, _param: click.Parameter | None, _ctx: click.Context | None) -> Path | str:
        return value if "://" in str(value) else Path(value)

    def shell_complete(self, _ctx: click.Context, _param: click.Parameter, incomplete: str) -> "list[CompletionItem]":
        from click.shell_completion import CompletionItem

        return [CompletionItem(incomplete, type="file")]


def _keep_one_blas_thread(_ctx: click.Context, _param: click.Parameter, value: Any) -> Any:
    if value:
        one_blas_thread()
    return value


#: Where a context keeps the words of the command line.
COMMAND = "ablate_shards.command"
PATH = click.Path(path_type=Path)
SOURCE = _Source()
cache_flag = click.option(
    "--cache", is_flag=True, help="Fetch a SOURCE on the Hub to the ordinary cache first, and read it from there."
)
private_flag = click.option("--private", is_flag=True, help="Make a new repository OUT private.")
sync_flag = click.option(
    "--sync/--no-sync",
    default=True,
    show_default=True,
    help="Wait until OUT is on the disk; without, it is as safe from a power failure as a copy by cp.",
)
debug_flag = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    is_eager=True,
    help="Add the traceback to an error.",
)
as_json_flag = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on stdout.")
quiet_flag = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")
recipe_flag = click.option(
    "--recipe",
    type=PATH,
    is_eager=True,
    callback=_load_recipe,
    help="TOML file with the same options as keys; a flag wins.",
)
device_flag = click.option(
    "--device",
    metavar="DEVICE",
    callback=parsed(_parse_device),
    default="auto",
    show_default=True,
    help="auto, cpu, cuda[:N], mps or xpu.",
)
dtype_flag = click.option(
    "--dtype",
    type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
    default="auto",
    show_default=True,
    help="What to compute in; auto: what the weights are stored in, float32 on a CPU without instructions for it.",
)
#: How a model is asked; for what runs one and has it answer.
answering = _options(
    click.option(
        "--length", type=click.IntRange(min=1), default=256, show_default=True, help="Most tokens of an answer."
    ),
    click.option("--thinking", is_flag=True, help="Let the model think first, where its chat template has the choice."),
    click.option(
        "--thoughts",
        type=click.IntRange(min=1),
        default=1024,
        show_default=True,
        help="Most tokens of the thoughts before an answer, with --thinking.",
    ),
    dtype_flag,
    device_flag,
)
#: The options of an adapter's making; products of matrices have a thread per job, which is settled before NumPy comes.
making_adapter = functools.partial(click.option, is_eager=True, callback=_keep_one_blas_thread)
adapter_rank = click.option(
    "--adapter-rank",
    type=click.IntRange(min=1),
    help="Rank of that adapter.  [default: 32, doubled for a module that would lack more than 10 % of its change]",
)
resources = _options(
    device_flag,
    click.option(
        "--memory",
        metavar="SIZE",
        callback=parsed(parse_memory),
        default="256MB",
        show_default=True,
        help="Most that all working buffers take together; at least 8MB.",
    ),
    click.option(
        "--jobs",
        type=click.IntRange(min=1),
        default=None,
        help="Tensors, or parts of large ones, edited at a time.  [default: one per core; 2 on a GPU]",
    ),
)
#: Which of several processes this one is; :func:`rank_given` says what they and the launcher's variables mean.
rank_flags = _options(
    click.option(
        "--worker-rank",
        type=click.IntRange(min=0),
        metavar="I",
        help="Do the share of process I of N, counted from 0; `finish` joins what all of them write.  [default: what "
        "torchrun, SLURM, SkyPilot or Kubernetes says]",
    ),
    click.option(
        "--world-size",
        type=click.IntRange(min=1),
        metavar="N",
        help="How many processes share the work; 1: this one does all of it, whatever a launcher says.",
    ),
)
#: Who runs the models of ``evaluate``, ``capture`` and the trials of ``search``.
engine_flag = click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="Run the model here, or on workers of Ray: of the cluster that RAY_ADDRESS names, else of this machine.",
)
ray_workers_flag = click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Workers of Ray, each with the model in its memory.  [default: one per GPU, without GPUs one per machine]",
)
layers_flag = click.option(
    "--layers",
    metavar="LAYERS",
    callback=parsed(_parse_layers),
    help="Decoder layers to edit, such as 1-23,30.  [default: every layer with a direction, or "
    "all where --source-layer names the only one]",
)
components_flag = click.option(
    "--components",
    metavar="NAMES",
    callback=parsed(_parse_components),
    default="attention,mlp",
    show_default=True,
    help="What to edit: attention (all that mixes tokens), mlp (all that does not), embedding; or of these only "
    "linear-attention, mamba, convolution, cross-attention, shared-experts, experts.",
)
coefficient_flag = click.option(
    "--coefficient",
    type=float,
    default=1.0,
    show_default=True,
    help="How much of the component to subtract: 1 removes it, 2 reflects it.",
)
biproject_flag = click.option(
    "--biproject/--no-biproject",
    default=True,
    show_default=True,
    help="Make the direction orthogonal to the reference means of both layers first.",
)
source_layer_flag = click.option(
    "--source-layer",
    metavar="LAYER",
    callback=parsed(_parse_source_layer),
    default="own",
    show_default=True,
    help="Layer whose direction is removed: own (each layer's), best (by the scores) or a number.",
)
estimation = _options(
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
    click.option(
        "--without",
        type=PATH,
        multiple=True,
        metavar="FILE",
        help="Make each layer's directions orthogonal to those of this directions file; may be repeated.",
    ),
)


def rank_given(worker_rank: int | None, world_size: int | None) -> "WorkerRank | None":
    """Returns which of several processes this one is, None where it is the only one.

    Raises:
        UsageError: The options and variables do not say which.
    """
    from ablate_shards.surgery.machine.ranks import INDEXED_JOB, find_rank

    rank = find_rank(worker_rank, world_size, os.environ)
    unsaid = rank is None and world_size is None and "WORLD_SIZE" not in os.environ
    if unsaid and INDEXED_JOB in os.environ and not click.get_current_context().params.get("quiet"):
        click.echo(
            f"{INDEXED_JOB}={os.environ[INDEXED_JOB]}, but nothing says of how many, so that this pod does all of the "
            "work; to share it, set WORLD_SIZE or add --world-size N",
            err=True,
        )
    return rank


def rank_record(rank: "WorkerRank | None") -> dict[str, int]:
    """Returns what ``--json`` prints of a rank, nothing where there is only one process."""
    return {} if rank is None else {"rank": rank.index, "world_size": rank.count}


def print_rank(rank: "WorkerRank", out: Path | str) -> None:
    """Prints that a rank is complete, and what ends the work of all."""
    click.echo(f"{rank} is complete; once all are: ablate-shards finish {shlex.quote(str(out))}")


def print_json(content: Any) -> None:
    """Prints a result for machines, on stdout."""
    click.echo(json.dumps(content, indent=1, ensure_ascii=not speaks_unicode()))
