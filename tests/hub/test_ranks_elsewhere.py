"""Ranks that make a folder of an object store: one process's bytes, and nothing of its name before `finish`."""

import re
import shlex
import subprocess
import sys
import time

import pytest
from command_line import run
from hub.edits import SHARDS, ablate
from hub.object_store import held
from raw_checkpoints import snapshot, write_directions, write_llama

from ablate_shards.surgery.checkpoint.object_store import UNFINISHED
from ablate_shards.surgery.hub import objects

OUT = "memory://bucket/edited"


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def part(source, index, count, *more):
    return ablate(source, OUT, "--worker-rank", index, "--world-size", count, *more)


def names_in(store, place):
    return {path.rpartition("/")[2] for path in store.find(place)}


@pytest.mark.parametrize(("place", "count"), [("folder", 3), ("store", 2), ("store", 6)])
def test_any_number_makes_the_same_bytes(in_store, made, tmp_path, place, count):
    source = made / "local" if place == "folder" else "memory://bucket/model"
    assert ablate(source, "memory://bucket/plain").exit_code == 0
    for index in range(count):
        result = part(source, index, count)
        assert result.exit_code == 0, result.stderr
        assert held(in_store, "/bucket/edited") == {}
    assert "ranks make" not in run("inspect", "memory://bucket/plain").stderr
    result = run("finish", OUT)
    assert result.exit_code == 0, result.stderr
    assert held(in_store, "/bucket/edited") == held(in_store, "/bucket/plain")
    assert in_store.find("/bucket/.edited.ablate-ranks") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors"]
    assert run("verify", source, OUT).exit_code == 0


def test_what_tells_of_a_checkpoint_comes_last(in_store, made, monkeypatch):
    for index in range(2):
        assert part(made / "local", index, 2).exit_code == 0
    order = []
    for name in ("pipe_file", "cp_file"):
        call = getattr(type(in_store), name)

        def noted(self, *arguments, _call=call, _name=name, **settings):
            order.append(arguments[0 if _name == "pipe_file" else 1].rpartition("/")[2])
            return _call(self, *arguments, **settings)

        monkeypatch.setattr(type(in_store), name, noted)
    assert run("finish", OUT).exit_code == 0
    written = [name for name in order if name != UNFINISHED]
    assert order[0] == UNFINISHED
    assert set(written[-3:-1]) == {"config.json", "model.safetensors.index.json"}
    assert written[-1] == "ablation.json"


def test_finish_goes_on_where_it_was_stopped(in_store, made, monkeypatch):
    for index in range(2):
        assert part(made / "local", index, 2).exit_code == 0
    copy, copied = objects._Target.copy, []

    def stopping(self, source, name, size):
        if name == SHARDS[2]:
            raise KeyboardInterrupt
        copied.append(name)
        return copy(self, source, name, size)

    monkeypatch.setattr(objects._Target, "copy", stopping)
    stopped = run("finish", OUT)
    assert stopped.exit_code == 1
    assert "interrupted; finish again to go on" in stopped.stderr
    assert (
        not {"config.json", "model.safetensors.index.json", "ablation.json"} & held(in_store, "/bucket/edited").keys()
    )
    assert "is under way or was interrupted" in run("inspect", OUT).stderr
    before = set(copied)

    def noted(self, source, name, size):
        copied.append(name)
        return copy(self, source, name, size)

    copied.clear()
    monkeypatch.setattr(objects._Target, "copy", noted)
    assert run("finish", OUT).exit_code == 0
    assert not before & set(copied)
    assert held(in_store, "/bucket/edited") == snapshot(made / "expected")


def test_only_whole_and_fitting_parts_are_joined(in_store, made, monkeypatch):
    assert part(made / "local", 0, 2).exit_code == 0
    send = objects._Target.send

    def failing(self, path, name):
        if name == "ablation.json":
            raise KeyboardInterrupt
        return send(self, path, name)

    with monkeypatch.context() as patch:
        patch.setattr(objects._Target, "send", failing)
        assert part(made / "local", 1, 2).exit_code == 1
    in_store.pipe("/bucket/.edited.ablate-ranks/1-of-2/ablation.json", b"{}")
    refused = run("finish", OUT)
    assert "rank 1 of 2 is not complete; run `ablate-shards ablate" in refused.stderr
    assert "which differs in the plan;" in part(made / "local", 1, 2, "--coefficient", "2").stderr
    assert part(made / "local", 1, 2).exit_code == 0
    shard = next(path for path in in_store.find("/bucket/.edited.ablate-ranks/1-of-2") if path.endswith("safetensors"))
    content = in_store.cat_file(shard)
    in_store.pipe(shard, content[:-1])
    assert f"has {len(content) - 1} bytes, expected {len(content)}" in run("finish", OUT).stderr
    in_store.rm_file(shard)
    assert "is gone, although its rank is complete" in run("finish", OUT).stderr
    assert held(in_store, "/bucket/edited") == {}
    in_store.pipe(shard, content)
    assert run("finish", OUT).exit_code == 0
    assert held(in_store, "/bucket/edited") == snapshot(made / "expected")


def test_what_another_arithmetic_computed_is_made_again_when_asked(in_store, made, monkeypatch):
    with monkeypatch.context() as patch:
        identity = "ablate_shards.surgery.edit.blocks.BlockEditor.identity"
        patch.setattr(identity, lambda self: {"device": "cuda", "form": "triton"})
        patch.setattr(objects, "check_unchanged", lambda _: (_ for _ in ()).throw(OSError))
        assert part(made / "local", 0, 2).exit_code == 1
    assert "because the device and the form changed" in part(made / "local", 0, 2).stderr
    for index in range(2):
        assert part(made / "local", index, 2, "--overwrite").exit_code == 0
    assert run("finish", OUT).exit_code == 0
    assert held(in_store, "/bucket/edited") == snapshot(made / "expected")


def test_what_ranks_made_again_replaces_a_damaged_output_of_the_same_receipt(in_store, made):
    for index in range(2):
        assert part(made / "local", index, 2).exit_code == 0
    assert run("finish", OUT).exit_code == 0
    in_store.pipe("/bucket/edited/tokenizer.json", b"damaged")
    for index in range(2):
        assert part(made / "local", index, 2, "--overwrite").exit_code == 0
    assert run("finish", OUT, "--overwrite").exit_code == 0
    assert held(in_store, "/bucket/edited") == snapshot(made / "expected")
    assert in_store.find("/bucket/.edited.ablate-ranks") == []


@pytest.mark.parametrize("removed", [0, 3, 9, 10, 11])
def test_finish_that_had_only_to_tidy_up_tidies_up(in_store, made, monkeypatch, removed):
    for index in range(3):
        assert part(made / "local", index, 3).exit_code == 0
    remove, left = type(in_store).rm_file, [removed]

    def stopping(self, path):
        if "ablate-ranks" in path:
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
        return remove(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(type(in_store), "rm_file", stopping)
        assert run("finish", OUT).exit_code == 1
    rest = [
        path.removeprefix("/bucket/.edited.ablate-ranks/") for path in in_store.find("/bucket/.edited.ablate-ranks")
    ]
    assert rest
    assert held(in_store, "/bucket/edited") == snapshot(made / "expected")
    again = run("finish", OUT)
    assert again.exit_code == 0, (rest, again.stderr)
    assert in_store.find("/bucket/.edited.ablate-ranks") == []
    assert held(in_store, "/bucket/edited") == snapshot(made / "expected")


def test_ranks_that_are_missing_are_not_taken_for_removed(in_store, made):
    for index in range(2):
        assert part(made / "local", index, 2).exit_code == 0
    assert run("finish", OUT).exit_code == 0
    assert part(made / "local", 0, 2, "--overwrite").exit_code == 0
    assert "rank 1 of 2 is not complete" in run("finish", OUT).stderr
    assert in_store.find("/bucket/.edited.ablate-ranks") != []


def test_what_is_in_the_way_stays(in_store, made):
    in_store.pipe("/bucket/edited/thesis.txt", b"mine")
    refused = part(made / "local", 0, 2)
    assert refused.exit_code == 1
    assert "so it is not replaced; name another folder" in refused.stderr
    in_store.rm("/bucket/edited", recursive=True)
    inside = ablate("memory://bucket/model", "memory://bucket/model", "--worker-rank", "0", "--world-size", "2")
    assert "may not be the same or lie inside each other" in inside.stderr
    assert ablate(made / "local", OUT, "--coefficient", "2").exit_code == 0
    before = held(in_store, "/bucket/edited")
    assert "already exists; --overwrite replaces it" in part(made / "local", 0, 2).stderr
    for index in range(2):
        assert part(made / "local", index, 2, "--overwrite").exit_code == 0
    assert "already exists; --overwrite replaces it" in run("finish", OUT).stderr
    assert held(in_store, "/bucket/edited") == before
    in_store.pipe("/bucket/edited/extra.txt", b"of the old one")
    assert run("finish", OUT, "--overwrite").exit_code == 0
    assert held(in_store, "/bucket/edited") == snapshot(made / "expected")


def test_ranks_agree_on_a_commit_of_the_hub(on_hub):
    hub, folder = on_hub
    assert ablate("org/model", "out", "--worker-rank", "0", "--world-size", "2", "--cache").exit_code == 0
    # Fetched at another time, or not at all, the files of a commit are the same.
    assert ablate("org/model", "out", "--worker-rank", "1", "--world-size", "2").exit_code == 0
    assert run("finish", "out").exit_code == 0
    assert snapshot(folder / "out") == snapshot(folder / "ablated")
    assert ablate("org/model", "out", "--worker-rank", "0", "--world-size", "2", "--overwrite").exit_code == 0
    write_llama(folder / "other", seed=5, hidden=128, shards=4)
    hub.add("org/model", folder / "other")
    refused = ablate("org/model", "out", "--worker-rank", "1", "--world-size", "2", "--overwrite")
    assert refused.exit_code == 0
    assert "rank 0 of 2 is not complete" in run("finish", "out", "--overwrite").stderr


#: A rank that tells when it has sent a shard, and then waits to be killed.
HELD_UP = """
import sys, time
from pathlib import Path
from ablate_shards.cli import main
from ablate_shards.surgery.hub import objects

keep = objects._Journal.keep

def holding(self, target):
    keep(self, target)
    if self.sent:
        Path(sys.argv[1]).touch()
        time.sleep(600)

objects._Journal.keep = holding
main(sys.argv[2:])
"""


def test_eight_ranks_three_of_them_killed(s3, tmp_path):
    """As eight machines would: every rank a process of its own, in S3 all that they share."""
    source = write_llama(tmp_path / "source", layers=9, shards=24, hidden=64)
    write_directions(tmp_path / "nine.safetensors", layers=9, hidden=64)
    words = ["ablate", "source", "s3://bucket/edited", "-d", "nine.safetensors", "--source-layer", "1", "--quiet"]
    assert run(*words[:2], "s3://bucket/plain", *words[3:]).exit_code == 0
    killed = (1, 4, 6)

    def start(rank, *how):
        numbers = ["--worker-rank", str(rank), "--world-size", "8"]
        return subprocess.Popen([sys.executable, *how, *words, *numbers], stderr=subprocess.PIPE, text=True)

    marks = {rank: tmp_path / f"mark-{rank}" for rank in killed}
    ranks = {
        rank: start(rank, "-c", HELD_UP, str(marks[rank])) if rank in killed else start(rank, "-m", "ablate_shards")
        for rank in range(8)
    }
    deadline = time.monotonic() + 120
    while not all(mark.exists() for mark in marks.values()):
        assert all(ranks[rank].poll() is None for rank in killed), [ranks[r].communicate() for r in killed]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for rank, process in ranks.items():
        if rank in killed:
            process.kill()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (-9 if rank in killed else 0), errors
    assert held(s3, "bucket/edited") == {}
    refused = run("finish", "s3://bucket/edited")
    assert refused.exit_code == 1
    assert "s3://bucket/edited: ranks 1, 4, 6 of 8 are not complete; run `ablate-shards" in refused.stderr
    command = shlex.split(re.search(r"run `ablate-shards (.+?)`", refused.stderr)[1])
    assert command == [*words, "--worker-rank", "1", "--world-size", "8"]
    half = {
        path: s3.info(path)["LastModified"] for path in s3.find("bucket/.edited.ablate-ranks") if "safetens" in path
    }
    for process in [start(rank, "-m", "ablate_shards") for rank in killed]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert {path: s3.info(path)["LastModified"] for path in half} == half  # what had arrived was not sent again
    assert held(s3, "bucket/edited") == {}
    finished = run("finish", "s3://bucket/edited")
    assert finished.exit_code == 0, finished.stderr
    assert held(s3, "bucket/edited") == held(s3, "bucket/plain")
    assert s3.find("bucket/.edited.ablate-ranks") == []
    assert run("verify", source, "s3://bucket/edited").exit_code == 0
