"""A run that is killed, stopped or refused leaves the source intact and OUT absent, and can go on."""

import errno
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from command_line import run
from raw_checkpoints import hidden, snapshot, write_directions, write_llama

from ablate_shards.surgery.edit.shard_writer import ShardWriter
from ablate_shards.surgery.machine.staging import Staging, locked


@pytest.fixture
def case(tmp_path):
    source = write_llama(tmp_path / "source", layers=6, shards=4, hidden=64)
    directions = write_directions(tmp_path / "d.safetensors", layers=6, hidden=64)
    arguments = [source, tmp_path / "out", "-d", directions, "--source-layer", "2"]
    whole = run(source, tmp_path / "whole", *arguments[2:])
    assert whole.exit_code == 0, whole.output
    return tmp_path, arguments


def stop_after(monkeypatch, shards, error):
    record = Staging.record

    def recording(self, shard, content):
        record(self, shard, content)
        if len(self.done) == shards:
            raise error

    monkeypatch.setattr(Staging, "record", recording)


@pytest.mark.parametrize("shards", [1, 2, 3, 4])
def test_resume_gives_the_same_bytes(case, monkeypatch, shards):
    folder, arguments = case
    before = snapshot(folder / "source")
    stop_after(monkeypatch, shards, KeyboardInterrupt())
    stopped = run(*arguments)
    assert stopped.exit_code == 1
    assert "--resume" in stopped.output
    assert not (folder / "out").exists()
    monkeypatch.undo()
    resumed = run(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    assert snapshot(folder / "source") == before
    assert hidden(folder) == []


def test_a_complete_shard_is_not_edited_again(case, monkeypatch):
    folder, arguments = case
    stop_after(monkeypatch, 3, KeyboardInterrupt())
    run(*arguments)
    monkeypatch.undo()
    staged = folder / ".out.ablate-staging"
    times = {path.name: path.stat().st_mtime_ns for path in staged.glob("*.safetensors")}
    stop_after(monkeypatch, 4, KeyboardInterrupt())
    run(*arguments, "--resume")
    after = {path.name: path.stat().st_mtime_ns for path in staged.glob("*.safetensors")}
    assert sum(times[name] == after[name] for name in times) == 3


def test_resume_with_nothing_staged_starts(case):
    folder, arguments = case
    assert run(*arguments, "--resume").exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_resume_refuses_another_plan_and_another_source(case, monkeypatch):
    folder, arguments = case
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    run(*arguments)
    monkeypatch.undo()
    other = run(*arguments, "--resume", "--coefficient", "2")
    assert other.exit_code == 1
    assert "the plan changed" in other.output
    again = run(*arguments)
    assert again.exit_code == 1
    assert "--resume" in again.output
    os.utime(folder / "source" / "tokenizer.json", ns=(1, 1))
    changed = run(*arguments, "--resume")
    assert "the source changed" in changed.output
    assert (folder / ".out.ablate-staging").is_dir()
    assert run(*arguments, "--overwrite").exit_code == 0
    assert hidden(folder) == []


def test_a_torn_journal_line_is_done_again(case, monkeypatch):
    folder, arguments = case
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    run(*arguments)
    monkeypatch.undo()
    journal = folder / ".out.ablate-staging" / ".journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    stop_after(monkeypatch, 3, KeyboardInterrupt())
    run(*arguments, "--resume")
    monkeypatch.undo()
    assert run(*arguments, "--resume").exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_a_failing_disk_keeps_what_is_complete(case, monkeypatch):
    folder, arguments = case
    stop_after(monkeypatch, 2, OSError(28, "No space left on device"))
    failed = run(*arguments)
    assert failed.exit_code == 1
    assert "No space left" in failed.output
    monkeypatch.undo()
    assert run(*arguments, "--resume").exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_a_source_that_changes_meanwhile_is_noticed(case, monkeypatch):
    folder, arguments = case
    finish = ShardWriter.finish

    def touching(self, work):
        os.utime(folder / "source" / "config.json", ns=(1, 1))
        return finish(self, work)

    monkeypatch.setattr(ShardWriter, "finish", touching)
    result = run(*arguments)
    assert result.exit_code == 1
    assert "changed while it was read" in result.output
    assert not (folder / "out").exists()


def test_two_runs_into_one_folder(case):
    folder, arguments = case
    with locked(folder / "out"):
        blocked = run(*arguments)
    assert blocked.exit_code == 1
    assert "another run" in blocked.output
    assert run(*arguments).exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EIO])
def test_a_file_system_without_locks(case, monkeypatch, code):
    import fcntl  # which not every system has that the rest of this file is run on

    folder, arguments = case

    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    result = run(*arguments)
    if code == errno.EIO:
        assert result.exit_code == 1
        assert "Input/output error" in result.stderr
        return
    assert result.exit_code == 0, result.stderr
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    assert hidden(folder) == []


def test_a_lock_left_by_a_killed_run_blocks_nobody(case):
    folder, arguments = case
    code = (
        "import os, signal, sys; from pathlib import Path; from ablate_shards.surgery.machine.staging import locked\n"
        "with locked(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, folder / "out"], check=False)
    assert (folder / ".out.ablate-lock").exists()
    assert run(*arguments).exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")
    assert hidden(folder) == []


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_signals_leave_a_resumable_state_and_say_so(case, kind):
    folder, arguments = case
    slow = (
        "import signal, time, sys; from ablate_shards.surgery.edit import ablation_editor as editor\n"
        "from ablate_shards.cli import main\n"
        "edit = editor.AblationEditor.edit\n"
        "def slowly(*a, **k):\n time.sleep(0.2)\n return edit(*a, **k)\n"
        # A shell that starts the tests in the background has them ignore it.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "editor.AblationEditor.edit = slowly\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", slow, *map(str, arguments)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    journal = folder / ".out.ablate-staging" / ".journal.jsonl"
    deadline = time.monotonic() + 60
    while not (journal.exists() and '"shard"' in journal.read_text()):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "--resume" in errors
    assert "Traceback" not in errors
    assert not (folder / "out").exists()
    assert run(*arguments, "--resume").exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_killed_at_any_moment(case):
    """SIGKILL at random moments of one run, then a resumed one: absent or complete, never between."""
    folder, arguments = case
    before = snapshot(folder / "source")
    whole = snapshot(folder / "whole")
    command = [sys.executable, "-m", "ablate_shards", *map(str, arguments)]
    start = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    duration = time.monotonic() - start
    moments = random.Random(0)
    for _ in range(6):
        subprocess.run(["rm", "-rf", folder / "out"], check=True)
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.3, 1.0) * duration)
        process.kill()
        process.wait()
        if (folder / "out").exists():
            assert snapshot(folder / "out") == whole
        else:
            resumed = run(*arguments, "--resume")
            assert resumed.exit_code == 0, resumed.output
            assert snapshot(folder / "out") == whole
        assert snapshot(folder / "source") == before


def test_a_staged_shard_that_is_gone_is_made_again(case, monkeypatch):
    folder, arguments = case
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    run(*arguments)
    monkeypatch.undo()
    staged = folder / ".out.ablate-staging"
    sorted(staged.glob("*.safetensors"))[0].unlink()
    shard = sorted(staged.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert run(*arguments, "--resume").exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_what_appears_at_out_meanwhile_is_not_lost(case, monkeypatch):
    folder, arguments = case
    publish = Staging.publish

    def late(self):
        (folder / "out").mkdir()
        (folder / "out" / "precious.txt").write_text("years of work")
        publish(self)

    monkeypatch.setattr(Staging, "publish", late)
    taken = run(*arguments)
    assert taken.exit_code == 1
    assert "appeared during the run" in taken.stderr
    assert snapshot(folder / "out") == {"precious.txt": b"years of work"}
    monkeypatch.undo()
    (folder / "out" / "precious.txt").unlink()
    assert run(*arguments, "--resume").exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_resume_and_overwrite_start_again_where_resuming_cannot_be(case, monkeypatch):
    folder, arguments = case
    stop_after(monkeypatch, 2, KeyboardInterrupt())
    run(*arguments)
    monkeypatch.undo()
    other = ("--coefficient", "2")
    assert "cannot be resumed" in run(*arguments, *other, "--resume").stderr
    assert run(*arguments, *other, "--resume", "--overwrite").exit_code == 0
    source, _, *options = arguments
    assert run(source, folder / "fresh", *options, *other).exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "fresh") != snapshot(folder / "whole")
    assert hidden(folder) == []


def test_any_failure_leaves_nothing_behind(case, monkeypatch):
    folder, arguments = case

    def failing(*_):
        raise MemoryError("no memory")

    monkeypatch.setattr("ablate_shards.surgery.edit.ablation_editor.AblationEditor.edit", failing)
    assert run(*arguments).exit_code == 1
    assert hidden(folder) == []
    assert not (folder / "out").exists()
