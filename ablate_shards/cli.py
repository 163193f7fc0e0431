"""The command line: its commands, and how their errors are shown."""

import os
import traceback
from collections.abc import Sequence
from typing import Any

import click

from ablate_shards import __version__
from ablate_shards.commands.ablate import ablate
from ablate_shards.commands.ask import ask
from ablate_shards.commands.capture import capture
from ablate_shards.commands.dequantise import dequantise
from ablate_shards.commands.diff import diff
from ablate_shards.commands.directions import directions
from ablate_shards.commands.evaluate import evaluate
from ablate_shards.commands.finetune import finetune
from ablate_shards.commands.finish import finish
from ablate_shards.commands.inspect import inspect
from ablate_shards.commands.merge import merge
from ablate_shards.commands.narrow import narrow
from ablate_shards.commands.options import COMMAND, debug_flag
from ablate_shards.commands.push import push
from ablate_shards.commands.report import report
from ablate_shards.commands.run import run
from ablate_shards.commands.search import search
from ablate_shards.commands.startup import collect_garbage_less_often
from ablate_shards.commands.verify import verify
from ablate_shards.errors import AblateError, UsageError
from ablate_shards.terminal.encoding import replace_unencodable

__all__ = ["cli", "main"]


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
        ctx.meta[COMMAND] = tuple(args)
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


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    no_args_is_help=True,
    epilog="SOURCE OUT without a command is short for `ablate SOURCE OUT`.",
)
@click.version_option(__version__, message="ablate-shards %(version)s")
@debug_flag
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Edit language-model checkpoints as raw safetensors shards, and prove what was edited.

    `ablate-shards SOURCE OUT -a DUMP` removes the direction that an activation dump shows;
    `ablate-shards SOURCE OUT -d FILE` removes one that was computed before.
    """
    if os.environ.get("NO_COLOR"):
        ctx.color = False


for command in (
    ablate,
    ask,
    capture,
    dequantise,
    diff,
    directions,
    evaluate,
    finetune,
    finish,
    inspect,
    merge,
    narrow,
    push,
    report,
    run,
    search,
    verify,
):
    cli.add_command(command)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; ends the process with 0 (done), 1 (failed) or 2 (wrong usage)."""
    collect_garbage_less_often()
    replace_unencodable()
    cli(args=args, prog_name="ablate-shards")
