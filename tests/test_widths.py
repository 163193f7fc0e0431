"""What the commands draw: tables and bars that fit every screen, without colour, Unicode or a terminal too."""

import io
import json
import os
import re
import subprocess
import sys

import pytest
from command_line import checked, on_terminal, run
from raw_checkpoints import write_dump, write_llama
from report_runs import evaluation
from rich.cells import cell_len
from rich.console import Console

from ablate_shards.terminal.tables import Column, Row, Stack, bar, print_table

WIDTHS = (40, 60, 80, 120, 200)
COMMANDS = ("inspect", "directions", "evaluate", "diff")
#: What must be there whatever the width, and how a line that is not part of a table begins.
ALWAYS = {
    "inspect": ("layer", "attention", "mlp", "o_proj", "down_proj"),
    "directions": ("layer", "noise", "auc", "best"),
    "evaluate": ("group", "slanted", "core", "before", "after", "87.5%", "12.5%"),
    "diff": ("layer", "component", "size", "attention", "mlp"),
}
PROSE = re.compile(
    r"^(embedding:|Llama:|3 tensors|image or|not |a wider|higher|the bar is|best layer|in brackets|perplexity|KL|every"
    r"|detached:|slanted [a-z-]+ answers|lean,|colours, acc:|[A-Z][a-z]+ answers fell:"
    r"|relative size:|files:|\d+ tensors in both|rank-\d|\d+ difference)"
)
TWICE = """
import sys
from ablate_shards.cli import cli
from ablate_shards.terminal.encoding import replace_unencodable

replace_unencodable()
cli(sys.argv[1:], standalone_mode=False)
print(end="\\0")
cli([*sys.argv[1:], "--json"], standalone_mode=False)
"""
BLOCKS = re.compile("[█▉▊▋▌▍▎▏▓▒░]")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    write_llama(place / "source")
    write_dump(place / "dump.safetensors")
    for words in (
        ["directions", place / "dump.safetensors", place / "d.safetensors", "-q"],
        [place / "source", place / "out", "-d", place / "d.safetensors", "--source-layer", "1", "-q"],
    ):
        checked(*words)
    return place


@pytest.fixture
def ask(monkeypatch):
    """Stands in for the two models of an evaluation."""
    found = evaluation("result", 2, 18, evaluation("source", 14, 20))
    monkeypatch.setattr("ablate_shards.surgery.evaluate.interview.evaluate", lambda *_, **__: found)


def words_for(place, command):
    return {
        "inspect": ["inspect", place / "source"],
        "directions": ["directions", place / "dump.safetensors", place / "again.safetensors", "--overwrite"],
        "evaluate": ["evaluate", place / "out", "--against", place / "source", "--out", place / "e.json"],
        "diff": ["diff", place / "source", place / "out", "-d", place / "d.safetensors"],
    }[command]


def shown_by(place, command, *more):
    return checked(*words_for(place, command), *more).stdout


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("command", COMMANDS)
def test_tables_and_bars_fit_every_width(place, ask, monkeypatch, command, width):
    monkeypatch.setenv("COLUMNS", str(width))
    shown = shown_by(place, command)
    table = [line for line in shown.splitlines() if not PROSE.match(line)]
    assert max(map(cell_len, table)) <= width
    assert "…" not in shown
    for words in ALWAYS[command]:
        assert words in shown
    assert BLOCKS.search(shown)
    assert "\x1b" not in shown, "a file gets no colours"


@pytest.mark.parametrize("command", COMMANDS)
def test_what_does_not_fit_is_named_and_wide_screens_have_it_all(place, ask, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "40")
    narrow = shown_by(place, command)
    monkeypatch.setenv("COLUMNS", "200")
    wide = shown_by(place, command)
    assert "a wider screen" not in wide
    left = re.findall(r"a wider screen also shows: (.*)", narrow)
    assert left or command == "inspect"
    for name in ", ".join(left).split(", ") if left else ():
        assert name in wide.splitlines()[0] or name in wide
    biggest = max(len(re.findall(BLOCKS, line)) for line in wide.splitlines())
    assert biggest > max(len(re.findall(BLOCKS, line)) for line in narrow.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_colours_only_where_they_are_wanted(place, ask, monkeypatch, command):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colour = re.compile(r"\x1b\[[\d;]*3\d")
    assert colour.search(shown_by(place, command))
    monkeypatch.setenv("NO_COLOR", "1")
    assert not colour.search(shown_by(place, command))


def test_without_colour_click_is_silent_too(place, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    found = evaluation("result", 2, 18, evaluation("source", 14, 20))
    monkeypatch.setattr("ablate_shards.surgery.evaluate.interview.evaluate", lambda *_, **__: found)
    words = [*words_for(place, "evaluate"), "--answers"]
    assert "\x1b" not in run(*words, color=True).stdout.split("group")[0]
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b[36m" in run(*words, color=True).stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_json_holds_what_is_drawn(place, ask, command):
    content = json.loads(shown_by(place, command, "--json"))
    expected = {
        "inspect": {"family", "hidden_size", "layers", "tied", "notes", "writers", "left_out", "dtypes", "bytes"},
        "directions": {"rank", "sha256", "best_layer", "layers"},
        "evaluate": {"results", "controls", "comparison", "base", "answers", "perplexity"},
        "diff": {"tensors", "lost", "added", "fused", "metadata", "files", "verdict", "equal"},
    }
    assert expected[command] <= set(content)
    rows = {"inspect": "writers", "directions": "layers", "evaluate": "answers", "diff": "tensors"}[command]
    needed = {
        "inspect": {"name", "layer", "component", "bytes"},
        "directions": {"layer", "signal_to_noise", "auc", "purity", "cosine", "split_half", "contrast"},
        "evaluate": {"id", "group", "text", "verdict"},
        "diff": {
            "place",
            "component",
            "relative",
            "kind",
            "rank",
            "shares",
            "alignment",
            "ablation",
            "largest",
            "kept",
        },
    }
    assert content[rows]
    assert all(needed[command] <= set(row) for row in content[rows])


@pytest.mark.parametrize("command", ["inspect", "directions", "diff"])
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf_8_gets_what_it_can_show(place, command, encoding):
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "120"}
    words = [sys.executable, "-c", TWICE, *map(str, words_for(place, command))]
    done = subprocess.run(words, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    shown, as_json = done.stdout.decode(encoding).split("\0")
    assert "##" in shown
    assert "\\u" not in shown
    assert max(map(len, (line for line in shown.splitlines() if not PROSE.match(line)))) <= 120
    assert as_json.isascii()
    assert json.loads(as_json)


@pytest.mark.parametrize("command", ["inspect", "directions", "diff"])
def test_a_narrow_terminal_breaks_sentences_between_words(place, command):
    seen = on_terminal("stdout", *words_for(place, command), width=40)
    assert b"\x1b[" in seen
    plain = re.sub(r"\x1b\[[\d;]*m", "", seen.decode())
    # Names of files stay whole, to be copied.
    lines = [line for line in plain.splitlines() if "/" not in line and not line.startswith("files: ")]
    assert max(map(cell_len, lines)) <= 40


def drawn(width, columns, rows):
    file = io.StringIO()
    print_table(Console(file=file, width=width), columns, rows)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_columns_go_in_the_order_of_their_ranks():
    columns = (Column("name"), Column("second", rank=2), Column("first", rank=1), Column("", bar=True))
    rows = [Row(("one", "22222222", "11111111", bar(1, 2))), Row(("two", "2", "1", bar(2, 2)))]
    assert drawn(60, columns, rows)[0].split() == ["name", "second", "first"]
    assert drawn(25, columns, rows)[0].split() == ["name", "first"]
    assert drawn(25, columns, rows)[-1] == "a wider screen also shows: second"
    assert drawn(14, columns, rows)[0].split() == ["name"]
    assert [line.count("█") for line in drawn(14, columns, rows)[1:3]] == [4, 8]


def test_cells_are_shortened_before_columns_go_and_never_cut():
    columns = (Column("tensors", wraps=True, brief=lambda cell: cell.rpartition(".")[2]), Column("size", rank=1))
    rows = [Row(("model.layers.0.mlp.down_proj", "98.3 kB"))]
    assert drawn(40, columns, rows)[1].split() == ["model.layers.0.mlp.down_proj", "98.3", "kB"]
    assert drawn(20, columns, rows)[1].split() == ["down_proj", "98.3", "kB"]
    assert drawn(10, columns, rows)[1].split() == ["down_proj"]
    assert "".join(drawn(5, columns, rows)[2:4]).startswith("down_proj"), "folded at last, and all of it there"


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ((0.5, 0.5), "aaaaabbbbb"),
        ((0.999, 0.001), "aaaaaaaaab"),
        ((0.001, 0.999), "abbbbbbbbb"),
        ((0.0, 1.0), "bbbbbbbbbb"),
        ((0.2, 0.0), "aa"),
        ((0.0, 0.0), ""),
    ],
)
def test_the_parts_of_a_bar_add_up_and_none_is_lost(parts, expected):
    file = io.StringIO()
    stack = Stack([(amount, glyph, "") for amount, glyph in zip(parts, "ab", strict=True)], 1.0)
    Console(file=file, width=10).print(stack)
    assert file.getvalue().strip() == expected


def test_nothing_and_less_than_nothing_have_no_bar():
    assert bar(None, 1) == bar(0, 1) == bar(-1, 1) == bar(float("nan"), 1) == bar(1, 0) == ""
