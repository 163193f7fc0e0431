"""Every command and option has help, and the reference and the recipe's keys say the same."""

import importlib.util
import tomllib
from pathlib import Path

import pytest

from ablate_shards.cli import cli
from ablate_shards.surgery.plan.recipe import TABLES, read_recipe

DOCS = Path(__file__).parents[1] / "docs"
NO_KEY = {"recipe", "json", "quiet", "debug", "help", "adapter", "adapter-rank", "worker-rank", "world-size"}
SPECIFICATION = importlib.util.spec_from_file_location("generate_cli", DOCS / "generate_cli.py")
GENERATE = importlib.util.module_from_spec(SPECIFICATION)
SPECIFICATION.loader.exec_module(GENERATE)
FED = GENERATE.FED
ARCHITECTURES = importlib.util.spec_from_file_location("generate_architectures", DOCS / "generate_architectures.py")
TABLES_OF = importlib.util.module_from_spec(ARCHITECTURES)
ARCHITECTURES.loader.exec_module(TABLES_OF)


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
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == GENERATE.reference(), "run: python docs/generate_cli.py"
    keys = (DOCS / "recipe-keys.md").read_text(encoding="utf-8")
    assert keys == GENERATE.recipe_reference(), "run: python docs/generate_cli.py"
    assert keys.count("| `") == sum(map(len, TABLES.values()))


def test_the_tables_of_architectures_are_up_to_date():
    page = (DOCS / "architectures.md").read_text(encoding="utf-8")
    assert page == TABLES_OF.page(), "run: python docs/generate_architectures.py"
    assert page.count("\n| BioGPT |") == page.count("`bert-generation`") == 1


#: What only a recipe can say.
LIMITS = {"broken", "controls", "kl", "distinct", "detached"}
#: What a recipe cannot say: where a stage reads and writes, how its results are shown, and what [ablate] has said.
STAGE = {
    "dequantise",
    "private",
    "model",
    "dump",
    "file",
    "adapter",
    "source",
    "out",
    "against",
    "reuse",
    "fresh",
    "answers",
}
RUN = {"dry-run", "resume", "overwrite", "push", "link", "sync", "cache", "jobs", "memory", "device"}


@pytest.mark.parametrize("table", TABLES)
def test_every_key_is_a_flag_of_a_command_that_the_table_feeds(table):
    flags = {name for command in FED[table] for name in long_names(cli.commands[command])}
    assert flags >= TABLES[table].keys() - LIMITS


def test_every_flag_has_a_recipe_key():
    edit = set().union(*(TABLES[table] for table in ("source", "directions", "ablate")))
    assert set(long_names(cli.commands["ablate"])) - NO_KEY <= edit
    for table in ("directions", "lora", "evaluate", "publish"):
        flags = {name for command in FED[table] for name in long_names(cli.commands[command]) if command != "ablate"}
        assert flags - NO_KEY - STAGE - RUN <= TABLES[table].keys()


def test_the_documented_recipe_is_read_whole(tmp_path):
    text = "\n".join(
        line.removeprefix("    ")
        for line in (DOCS / "recipe.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("    ")
    )
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    recipe = read_recipe(path)
    apart = {"override", "profile", "target"}
    documented = {table: set(entries) - apart for table, entries in tomllib.loads(text).items()}
    assert documented == {table: set(entries) for table, entries in recipe.tables.items()}
    missing = {(table, key) for table, keys in TABLES.items() for key in keys.keys() - documented[table]}
    assert {key for _, key in missing} == {"directions", "activations", "dry-run", "resume", "overwrite"}
    assert len(recipe.overrides) == len(recipe.profiles) == len(recipe.targets) == 1
