"""The page on the architecture says what the code is: rooms, layers, paths and functions."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ablate_shards"
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CODE = sorted(set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", TEXT, flags=re.DOTALL))))
PATHS = [word for word in CODE if "/" in word and re.fullmatch(r"[\w/.]+", word)]
#: Room, module and function; a module at the top and its function; a module, its class and a method.
FUNCTIONS = [word for word in CODE if re.fullmatch(r"[a-z_]+(\.\w+)+", word) and not (PACKAGE / word).exists()]
FUNCTIONS = [word for word in FUNCTIONS if not (ROOT / word).exists()]


def rows_of(folder):
    """The sentences of the page about the folders of one folder."""
    return dict(re.findall(rf"^\| `{folder}/(\w+)/` \| (.+) \|$", TEXT, flags=re.MULTILINE))


def sentences_in(folder):
    """The first sentences of the docstrings of its packages."""
    found = {}
    for path in (PACKAGE / folder).glob("*/__init__.py"):
        found[path.parent.name] = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).splitlines()[0]
    return found


def drawn():
    """The blocks of the page that draw layers; what follows two spaces is a remark."""
    blocks = re.findall(r"```text\n(.*?)```", TEXT, flags=re.DOTALL)
    return [[re.split(r"\s{2,}", line)[0] for line in block.splitlines()] for block in blocks]


def names_in(tree):
    """What a module or class defines itself, by name."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def is_defined(word):
    """Whether a module holds a function, class, method or constant of that name."""
    parts = word.split(".")
    for folder in (PACKAGE, PACKAGE / "surgery"):
        for count in range(len(parts) - 1, 0, -1):
            path = folder.joinpath(*parts[:count]).with_suffix(".py")
            if path.is_file():
                node = ast.parse(path.read_text(encoding="utf-8"))
                for name in parts[count:]:
                    node = names_in(node).get(name) if hasattr(node, "body") else None
                    if node is None:
                        return False
                return True
    return False


@pytest.mark.parametrize("folder", ["surgery", "kernels"])
def test_every_room_and_its_sentence_are_on_the_page(folder):
    assert sentences_in(folder)
    assert rows_of(folder) == sentences_in(folder)


def test_the_layers_drawn_are_those_of_the_import_contracts():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = [one for one in project["tool"]["importlinter"]["contracts"] if one["type"] == "layers"]
    assert drawn() == [one["layers"] for one in contracts]


def test_the_rooms_of_the_contract_are_those_that_exist():
    surgery = {name for line in drawn()[1] for name in line.split(" | ")}
    assert surgery == rows_of("surgery").keys()


@pytest.mark.parametrize("path", PATHS)
def test_every_path_exists(path):
    assert (PACKAGE / path).exists() or (ROOT / path).exists()


@pytest.mark.parametrize("word", FUNCTIONS)
def test_every_function_is_where_the_page_says(word):
    assert is_defined(word)


def test_the_page_names_enough_to_be_of_use():
    assert len(FUNCTIONS) > 40
    assert len(PATHS) > 40


@pytest.mark.parametrize("word", ["plan.plan.plan", "checkpoint.headers.Shard.read", "nothing.here", "cli.mean"])
def test_what_is_not_there_is_noticed(word):
    assert not is_defined(word)
