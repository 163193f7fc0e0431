"""What is installed: the tag of its wheels, what help imports, and what shells complete."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import BashComplete

from ablate_shards.cli import cli

ROOT = Path(__file__).parents[1]
#: Of what is not Python's own, help needs these alone; what else is imported takes longer than all of it.
FOR_HELP = {"ablate_shards", "click"}
MOST_MODULES = 250


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux-x86_64", "x86_64", "linux_x86_64"),
        ("linux-aarch64", "aarch64", "linux_aarch64"),
        ("win-amd64", "AMD64", "win_amd64"),
        ("macosx-11.0-arm64", "arm64", "macosx_11_0_arm64"),
        # A Python for both machines, where the kernels are compiled for one.
        ("macosx-10.9-universal2", "arm64", "macosx_11_0_arm64"),
        ("macosx-10.13-universal2", "x86_64", "macosx_10_13_x86_64"),
    ],
)
def test_wheels_are_for_the_machine_that_compiled_them(system, machine, expected):
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    assert hook.wheel_tag(system, machine) == f"py3-none-{expected}"


def imported_by(*arguments):
    code = (
        "import json, sys\nbefore = set(sys.modules)\nfrom ablate_shards.cli import main\n"
        "try:\n main(sys.argv[1:])\nexcept SystemExit:\n print(json.dumps(sorted(set(sys.modules) - before)))\n"
    )
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(found.stdout.splitlines()[-1]))


@pytest.mark.parametrize("command", [(), *((name,) for name in sorted(cli.commands))])
def test_help_imports_little(command):
    modules = imported_by(*command, "--help")
    assert {name.partition(".")[0] for name in modules} - sys.stdlib_module_names == FOR_HELP
    rooms = {".".join(name.split(".")[:3]) for name in modules if name.startswith("ablate_shards.surgery.")}
    assert rooms <= {"ablate_shards.surgery.machine"}
    assert len(modules) < MOST_MODULES
    assert not modules & {"asyncio", "http.client", "multiprocessing", "ssl", "unittest"}


def test_a_command_that_runs_imports_more():
    assert {"numpy", "rich"} <= {name.partition(".")[0] for name in imported_by("inspect", str(ROOT), "--json")}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["deq"], {("plain", "dequantise")}),
        (["ablate", "in", "out", "--pres"], {("plain", "--preserve")}),
        # The command that is meant where none is named.
        (["in", "out", "--pres"], {("plain", "--preserve")}),
        (["in", "out", "--preserve", ""], {("plain", name) for name in ("rows", "columns", "none")}),
        (["verify", "mod"], {("file", "mod")}),
        (["in", "out", "-d", "dir"], {("file", "dir")}),
    ],
)
def test_shells_complete_commands_options_and_files(words, expected):
    completion = BashComplete(cli, {}, "ablate-shards", "_ABLATE_SHARDS_COMPLETE")
    found = completion.get_completions(words[:-1], words[-1])
    assert {(item.type, item.value) for item in found} == expected
