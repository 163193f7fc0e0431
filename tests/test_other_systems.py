"""The core works on systems that lack what Linux has, and what differs between them is in one module."""

import ast
import os
import subprocess
import sys
from pathlib import Path, PureWindowsPath
from types import ModuleType

import other_system
import pytest
from command_line import checked
from raw_checkpoints import snapshot, write_directions, write_llama

import ablate_shards
from ablate_shards.errors import ExecuteError
from ablate_shards.surgery.checkpoint import files
from ablate_shards.surgery.machine import system
from ablate_shards.surgery.machine.staging import locked

PACKAGE = Path(ablate_shards.__file__).parent
SYSTEM = Path(system.__file__)
CORE = {
    "tests/test_main_job.py": "",
    "tests/test_execute.py": "",
    # What is left out kills processes or changes files that are open, as no Windows would let it.
    "tests/test_interruption.py": "not killed and not without_locks",
    "tests/test_activations.py": "not what_fits and not nothing_else",
}


@pytest.mark.parametrize("suite", CORE)
def test_the_core_where_all_of_it_is_missing(suite, tmp_path):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "other_system", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += [suite, "-k", CORE[suite], "--basetemp", str(tmp_path / "temp")]
    paths = os.pathsep.join([str(PACKAGE.parent), str(PACKAGE.parent / "tests")])
    environment = os.environ | {"PYTHONPATH": paths}
    found = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True, env=environment)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr


def without_fcntl(patch):
    console = ModuleType("msvcrt")
    console.LK_NBLCK, console.locking = 2, other_system.locking
    patch.setattr(system, "_fcntl", None)
    patch.setattr(system, "_msvcrt", console)


def of_os(*names):
    def take_away(patch):
        for name in names:
            patch.delattr(os, name)

    return take_away


def of_c(*names):
    def take_away(patch):
        for name in names:
            patch.setattr(system, f"_{name}", None)

    return take_away


MISSING = {
    "fcntl": without_fcntl,
    "preadv and pwrite": of_os("preadv", "pwrite"),
    "posix_fallocate": of_os("posix_fallocate"),
    "copy_file_range": of_os("copy_file_range"),
    "copy_file_range, preadv and pwrite": of_os("copy_file_range", "preadv", "pwrite"),
    "sched_getaffinity": of_os("sched_getaffinity"),
    "folders that can be opened": of_os("O_DIRECTORY"),
    "sync_file_range and renameat2": of_c("sync_file_range", "renameat2"),
}


@pytest.mark.parametrize("missing", MISSING)
def test_the_same_bytes_where_one_of_it_is_missing(missing, tmp_path, monkeypatch):
    source, directions = write_llama(tmp_path / "source"), write_directions(tmp_path / "d.safetensors")
    arguments = ("-d", directions, "--source-layer", 1, "--jobs", 3)
    checked(source, tmp_path / "expected", *arguments)
    MISSING[missing](monkeypatch)
    (tmp_path / "out").mkdir()
    checked(source, tmp_path / "out", *arguments)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "expected")
    checked("verify", source, tmp_path / "out")
    checked(source, tmp_path / "out", *arguments, "--coefficient", 2, "--overwrite")
    assert snapshot(tmp_path / "out") != snapshot(tmp_path / "expected")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("take_away", [lambda patch: None, without_fcntl], ids=["flock", "locking"])
def test_a_lock_keeps_others_out_and_leaves_nothing(take_away, tmp_path, monkeypatch):
    take_away(monkeypatch)
    with locked(tmp_path / "out"), pytest.raises(ExecuteError, match="another run"), locked(tmp_path / "out"):
        pass
    with locked(tmp_path / "out"):
        assert len(list(tmp_path.iterdir())) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_takes_the_name_of_an_empty_one_only(tmp_path, monkeypatch):
    for name in ("new", "empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "file").touch()
    monkeypatch.setattr(os, "replace", other_system.rename)
    with pytest.raises(OSError, match="not empty"):
        system.name_folder(tmp_path / "new", tmp_path / "full")
    system.name_folder(tmp_path / "new", tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "full"}


@pytest.mark.parametrize("name", ["C:/model.safetensors", "C:model.safetensors", "a\\..\\..\\model.safetensors"])
def test_names_that_leave_the_folder_on_windows(name, monkeypatch):
    assert not files.leaves_folder("part/model.safetensors")
    monkeypatch.setattr(files, "PurePath", PureWindowsPath)
    assert files.leaves_folder(name)
    assert not files.leaves_folder("part/model.safetensors")


def test_what_differs_between_systems_is_in_one_module():
    """No other module needs a module, a function or a signal that some system lacks."""
    lacking = {"os": other_system.OF_OS, "mmap": other_system.OF_MMAP, "signal": other_system.SIGNALS}
    found = []
    for path in sorted(set(PACKAGE.rglob("*.py")) - {SYSTEM}):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                names += [node.attr] if node.attr in lacking.get(node.value.id, ()) else []
            else:
                names = [name for name in names if name in (*other_system.MODULES, "msvcrt", "winreg")]
            found += [f"{path.name}: {name}" for name in names]
    assert not found


def test_that_module_needs_what_others_lack():
    """So that the test above can fail."""
    text = SYSTEM.read_text(encoding="utf-8")
    assert sum(f"os.{name}" in text for name in other_system.OF_OS) >= 4
