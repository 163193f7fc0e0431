"""OUT in an object store: the same bytes as in a folder, and nothing that could be taken for complete before it is."""

import json

import pytest
from coded_checkpoints import write_fp8
from command_line import run
from hub.edits import SHARDS, ablate
from hub.object_store import held
from raw_checkpoints import snapshot

from ablate_shards.surgery.checkpoint.object_store import UNFINISHED
from ablate_shards.surgery.hub import objects

OUT = "memory://bucket/edited"
FOUND_FIRST = ("config.json", "model.safetensors.index.json", "ablation.json")


def assert_complete(store, made, *, receipt=True):
    found, expected = held(store, "/bucket/edited"), snapshot(made / "expected")
    if not receipt:
        del found["ablation.json"], expected["ablation.json"]
    assert found == expected


def failing(monkeypatch, store, what, error):
    """Makes one upload of a file fail, for good."""
    put = type(store).put_file

    def put_file(self, local, path, **settings):
        if what in path:
            raise error
        return put(self, local, path, **settings)

    monkeypatch.setattr(type(store), "put_file", put_file)
    return lambda: monkeypatch.setattr(type(store), "put_file", put)


@pytest.mark.parametrize("source", ["folder", "store"])
def test_the_same_bytes_as_in_a_folder(in_store, made, tmp_path, source):
    result = ablate(made / "local" if source == "folder" else "memory://bucket/model", OUT)
    assert result.exit_code == 0, result.stderr
    assert_complete(in_store, made, receipt=source == "folder")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["d.safetensors"]
    assert snapshot(made / "local") == held(in_store, "/bucket/model")
    # What was written can be read.
    assert run("inspect", OUT).exit_code == 0


def test_a_dequantised_checkpoint_is_the_one_in_a_folder(in_store, tmp_path):
    source = write_fp8(tmp_path / "source")
    for out in (tmp_path / "expected", "memory://bucket/plain"):
        assert run("dequantise", str(source), str(out)).exit_code == 0
    assert held(in_store, "/bucket/plain") == snapshot(tmp_path / "expected")
    assert run("verify", str(source), "memory://bucket/plain").exit_code == 0


def test_what_tells_of_a_checkpoint_comes_last(in_store, made, monkeypatch):
    order = []
    for name in ("put_file", "pipe_file", "cp_file", "rm_file"):
        call = getattr(type(in_store), name)

        def noted(self, *arguments, _call=call, _name=name, **settings):
            path = arguments[0 if _name in ("pipe_file", "rm_file") else 1]
            order.append((_name, path.rpartition("/")[2]))
            return _call(self, *arguments, **settings)

        monkeypatch.setattr(type(in_store), name, noted)
    assert ablate("memory://bucket/model", OUT).exit_code == 0
    written = [name for call, name in order if call in ("put_file", "cp_file") and name != UNFINISHED]
    assert set(written[:4]) == set(SHARDS)
    assert set(written[-3:]) == set(FOUND_FIRST)
    assert written[-1] == "ablation.json"
    assert order[-1] == ("rm_file", UNFINISHED)
    # What has no edit the store copies by itself.
    copied = [name for call, name in order if call == "cp_file"]
    assert 0 < len(copied) < 4
    assert all((made / "local" / name).read_bytes() == (made / "expected" / name).read_bytes() for name in copied)


def test_one_shard_at_a_time_is_on_this_disk(in_store, made, monkeypatch):
    present = []
    send = objects._Target.send

    def measured(self, path, name):
        present.append(len(list(path.parent.glob("*.safetensors"))))
        return send(self, path, name)

    monkeypatch.setattr(objects._Target, "send", measured)
    assert ablate(made / "local", OUT).exit_code == 0
    assert max(present) == 1


def test_an_interrupted_run_is_resumed_with_what_arrived(in_store, made, monkeypatch):
    healed = failing(monkeypatch, in_store, SHARDS[2], PermissionError("not yours"))
    result = ablate(made / "local", OUT)
    assert result.exit_code == 1
    assert f"{OUT}: may not be written (not yours); check the credentials" in result.stderr
    assert "--resume goes on" in result.stderr
    assert set(held(in_store, "/bucket/edited")) == {UNFINISHED, *SHARDS[:2]}
    healed()
    assert "half made; --resume goes on with it" in ablate(made / "local", OUT).stderr
    assert "is under way or was interrupted" in run("inspect", OUT).stderr
    changed = ablate(made / "local", OUT, "--resume", "--coefficient", "0.5")
    assert "cannot be resumed, because the plan changed" in changed.stderr
    # What another has written over meanwhile is made again.
    in_store.pipe(f"/bucket/edited/{SHARDS[1]}", b"something else")
    sent = []
    send = objects._Target.send

    def noted(self, path, name):
        sent.append(name)
        return send(self, path, name)

    monkeypatch.setattr(objects._Target, "send", noted)
    result = ablate(made / "local", OUT, "--resume")
    assert result.exit_code == 0, result.stderr
    assert [name for name in sent if name in SHARDS] == SHARDS[1:]
    assert_complete(in_store, made)


def test_ctrl_c_is_resumed_and_a_torn_journal_told(in_store, made, monkeypatch):
    healed = failing(monkeypatch, in_store, SHARDS[1], KeyboardInterrupt())
    result = ablate(made / "local", OUT)
    assert result.exit_code == 1
    assert "interrupted; what is complete is kept in" in result.stderr
    healed()
    in_store.pipe(f"/bucket/edited/{UNFINISHED}", b"{}")
    torn = ablate(made / "local", OUT, "--resume")
    assert "is not what an interrupted run wrote; --overwrite starts again" in torn.stderr
    assert ablate(made / "local", OUT, "--overwrite").exit_code == 0
    assert_complete(in_store, made)


def test_only_what_a_run_has_made_is_replaced(in_store, made, monkeypatch):
    in_store.pipe("/bucket/edited/thesis.txt", b"mine")
    for more in ([], ["--overwrite"], ["--resume"]):
        refused = ablate(made / "local", OUT, *more)
        assert "holds no ablation.json or merge.json or dequantisation.json, so it is not replaced" in refused.stderr
    assert held(in_store, "/bucket/edited") == {"thesis.txt": b"mine"}
    in_store.rm("/bucket/edited", recursive=True)
    write = ablate(made / "local", OUT, "--coefficient", "0.5")
    assert write.exit_code == 0
    in_store.pipe("/bucket/edited/extra.txt", b"of the old one")
    before = held(in_store, "/bucket/edited")
    assert "already exists; --overwrite replaces it" in ablate(made / "local", OUT).stderr
    assert held(in_store, "/bucket/edited") == before
    healed = failing(monkeypatch, in_store, SHARDS[0], PermissionError("not yours"))
    assert ablate(made / "local", OUT, "--overwrite").exit_code == 1
    # The old one is not to be taken for complete either.
    assert not set(FOUND_FIRST) & set(held(in_store, "/bucket/edited"))
    healed()
    assert ablate(made / "local", OUT, "--resume").exit_code == 0
    assert_complete(in_store, made)


def test_an_error_that_stays_leaves_nothing(in_store, made, monkeypatch):
    def broken(*_):
        raise objects.ExecuteError("no good")

    monkeypatch.setattr(objects, "check_unchanged", broken)
    assert "no good" in ablate(made / "local", OUT).stderr
    assert held(in_store, "/bucket/edited") == {}


def test_errors_that_pass_are_waited_for(in_store, made, monkeypatch):
    faults = [ConnectionResetError("reset"), TimeoutError("slow")]
    put = type(in_store).put_file

    def put_file(self, local, path, **settings):
        if faults and SHARDS[1] in path:
            raise faults.pop()
        return put(self, local, path, **settings)

    monkeypatch.setattr(type(in_store), "put_file", put_file)
    assert ablate(made / "local", OUT).exit_code == 0
    assert faults == []
    assert_complete(in_store, made)


def test_wrong_usage_and_dry_runs_write_nothing(in_store, made):
    before = json.dumps(sorted(in_store.store))
    assert ablate(made / "local", OUT, "--dry-run").exit_code == 0
    for source, out, more, words in (
        ("memory://bucket/model", "memory://bucket/model", [], "may not be the same or lie inside each other"),
        ("memory://bucket/model", "memory://bucket/model/edited", [], "may not be the same or lie inside each other"),
        ("memory://bucket/model", "memory://bucket", ["--overwrite"], "may not be the same or lie inside each other"),
        (made / "local", "memory://bucket/model/config.json", [], "is a file; name a folder"),
        (made / "local", "file:///tmp/out", [], "is a folder here; name it without file://"),
        (made / "local", "hf://me/edited", [], "name it as hub:org/name"),
        (made / "local", "nowhere://bucket/out", [], "fsspec knows no nowhere://"),
        (made / "local", OUT, ["--link"], "--link and --cache are for an OUT that is a folder on this machine"),
        (made / "local", OUT, ["--private"], "is no repository; name one"),
    ):
        result = ablate(source, out, *more)
        assert result.exit_code in (1, 2)
        assert words in result.stderr, result.stderr
    assert json.dumps(sorted(in_store.store)) == before
