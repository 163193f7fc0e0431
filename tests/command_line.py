"""Runs the command line in this process."""

from click.testing import CliRunner, Result

from ablate_shards.cli import cli


def run(*arguments) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])
