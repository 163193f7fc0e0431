"""What a person sees: a bar on a terminal, plain lines elsewhere, nothing when asked for nothing."""

import json

import pytest
from command_line import on_terminal, run
from raw_checkpoints import write_directions, write_dump, write_llama

from ablate_shards.terminal.progress import show_progress


@pytest.fixture
def case(tmp_path):
    source = write_llama(tmp_path / "source")
    directions = write_directions(tmp_path / "d.safetensors")
    return [source, tmp_path / "out", "-d", directions, "--source-layer", "1"]


def test_a_terminal_gets_a_bar_that_leaves_nothing_behind(case):
    seen = on_terminal("stderr", *case, width=100)
    assert b"bytes" in seen
    assert b"\x1b[" in seen
    assert b"% of" not in seen


def test_a_file_gets_plain_lines(case):
    result = run(*case)
    assert "\x1b" not in result.output
    assert "100 % of" in result.stderr
    assert "100 % of" not in result.stdout
    assert "component before" in result.stdout


def test_quiet_says_nothing_unless_it_fails(case):
    assert run(*case, "--quiet").output == ""
    again = run(*case, "--quiet")
    assert again.exit_code == 1
    assert again.stderr.startswith("error: ")
    assert again.stdout == ""


def test_json_is_all_there_is_on_stdout(case, tmp_path):
    result = run(*case, "--json")
    assert set(json.loads(result.stdout)["tensors"]) == {
        f"model.layers.{layer}.{part}.weight" for layer in range(3) for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    dump = write_dump(tmp_path / "a.safetensors")
    found = run("directions", dump, tmp_path / "new.safetensors", "--json")
    content = json.loads(found.stdout)
    assert content["best_layer"] in [row["layer"] for row in content["layers"]]


def test_scores_are_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    dump = write_dump(tmp_path / "a.safetensors")
    result = run("directions", dump, tmp_path / "new.safetensors")
    for heading in ("layer", "cosine", "signal to noise", "purity", "auc", "split half", "best layer"):
        assert heading in result.stdout
    best = json.loads(run("directions", dump, tmp_path / "other.safetensors", "--json").stdout)["best_layer"]
    assert f"best layer: {best}; written to {tmp_path / 'new.safetensors'}" in result.stdout
    assert (tmp_path / "new.safetensors").read_bytes() == (tmp_path / "other.safetensors").read_bytes()
    again = run("directions", dump, tmp_path / "new.safetensors")
    assert again.exit_code == 2
    assert "--overwrite" in again.stderr


def test_inspect_shows_what_it_can_of_an_unknown_architecture(tmp_path):
    source = write_llama(tmp_path / "source")
    (source / "config.json").write_text('{"model_type": "novel"}')
    result = run("inspect", source)
    assert result.exit_code == 1
    assert "30 tensors (30 BF16)" in result.stdout
    assert "[[ablate.target]]" in result.stderr


def test_debug_adds_the_traceback(case, tmp_path):
    arguments = [tmp_path / "nothing", *case[1:]]
    assert "Traceback" not in run(*arguments).output
    assert "Traceback" in run(*arguments, "--debug").output


def test_usage_errors_exit_with_2(case):
    for extra in (
        ["--layers", "x"],
        ["--memory", "1KB"],
        ["--device", "tpu"],
        ["--jobs", "0"],
        ["--nonsense"],
        ["--coefficient", "nan"],
        ["--coefficient", "1e300"],
        ["--recipe", "."],
    ):
        assert run(*case, *extra).exit_code == 2, extra
    assert run(*case, "--device", "cuda:99").exit_code == 2


def test_directions_never_replace_their_dump(tmp_path):
    dump = write_dump(tmp_path / "a.safetensors")
    before = dump.read_bytes()
    for file in (dump, tmp_path / "d.npz", tmp_path / "none" / "d.safetensors", tmp_path):
        result = run("directions", dump, file, "--overwrite")
        assert result.exit_code == 2, file
    assert dump.read_bytes() == before


def test_a_bar_that_is_full_makes_room(monkeypatch, capsys):
    """For what follows, such as an upload with bars of its own; and it can begin again."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    with show_progress(quiet=False) as bar:
        for total in (10, 20):
            bar.begin(total)
            bar.advance(total - 1)
            assert bar._progress is not None
            bar.advance(1)
            assert bar._progress is None
            bar.advance(1)
    assert "10/10 bytes" in capsys.readouterr().err
