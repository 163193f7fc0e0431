"""Every command and option has help, and the reference and the recipe's keys say the same."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

from ablate_shards.cli import cli
from ablate_shards.surgery.recipe import TABLES, read_recipe

DOCS = Path(__file__).parents[1] / "docs"
NO_KEY = {"recipe", "json", "quiet", "debug", "help"}


def long_names(command):
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            yield parameter.name
        else:
            yield next(name for name in parameter.opts if name.startswith("--")).removeprefix("--")


@pytest.mark.parametrize("name", cli.commands)
def test_everything_has_help(name):
    command = cli.commands[name]
    assert command.help
    for parameter in command.params:
        if parameter.param_type_name == "option":
            assert parameter.help, parameter.name


def test_the_reference_is_up_to_date():
    specification = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == module.reference(), "run: python docs/generate_cli.py"


def test_every_flag_has_a_recipe_key():
    keys = set().union(*TABLES.values())
    assert keys == set(long_names(cli.commands["ablate"])) - NO_KEY


def test_the_documented_recipe_is_read_whole(tmp_path):
    text = "\n".join(
        line.removeprefix("    ")
        for line in (DOCS / "recipe.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("    ")
    )
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    recipe = read_recipe(path)
    documented = {key for table in ("source", "directions", "ablate") for key in tomllib.loads(text)[table]}
    assert documented - {"override", "target"} == set(recipe.flags)
    assert set().union(*TABLES.values()) - set(recipe.flags) == {
        "directions",
        "dry-run",
        "resume",
        "overwrite",
    }
    assert len(recipe.overrides) == len(recipe.targets) == 1
