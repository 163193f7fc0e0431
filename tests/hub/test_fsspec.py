"""SOURCE in an object store, through fsspec: the same bytes as from a folder, by byte ranges."""

import json

import pytest
from command_line import run
from hub.edits import SHARDS, ablate
from raw_checkpoints import snapshot

from ablate_shards.surgery.checkpoint import object_store, remote


def weights(folder):
    return {name: data for name, data in snapshot(folder).items() if name != "ablation.json"}


def test_the_same_bytes_as_from_a_folder(in_store, made, tmp_path):
    result = ablate("memory://bucket/model", "out")
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "out") == weights(made / "expected")
    source = json.loads((tmp_path / "out" / "ablation.json").read_text())["source"]
    assert source["name"] == "memory://bucket/model"
    assert "revision" not in source
    assert run("verify", "memory://bucket/model", "out").exit_code == 0
    assert run("verify", made / "local", "out").exit_code == 0


def test_inspect_reads_headers_alone(in_store, monkeypatch):
    read = []
    cat = type(in_store).cat_file

    def counted(self, path, start=None, end=None, **settings):
        read.append(end - start)
        return cat(self, path, start=start, end=end, **settings)

    monkeypatch.setattr(type(in_store), "cat_file", counted)
    assert run("inspect", "memory://bucket/model").exit_code == 0
    assert 0 < sum(read) <= (len(SHARDS) + 1) * 100_000


def test_errors_that_pass_are_waited_for_and_others_told(in_store, made, tmp_path, monkeypatch):
    cat = type(in_store).cat_file
    faults = [ConnectionResetError("reset"), TimeoutError("slow")]

    def failing(self, path, **settings):
        if faults and "00002" in path:
            raise faults.pop()
        return cat(self, path, **settings)

    monkeypatch.setattr(type(in_store), "cat_file", failing)
    assert ablate("memory://bucket/model", "out").exit_code == 0
    assert faults == []
    assert weights(tmp_path / "out") == weights(made / "expected")
    faults.append(PermissionError("not yours"))
    result = ablate("memory://bucket/model", "other")
    assert result.exit_code == 1
    assert "may not be read (not yours); check the credentials" in result.stderr


@pytest.mark.parametrize("out", ["out", "memory://bucket/out"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_source_that_changes_under_the_run_is_refused(in_store, made, tmp_path, monkeypatch, out, how):
    """The last shard is written anew, or removed, once it has been read."""
    name = sorted(path for path in in_store.find("/bucket/model") if path.endswith(".safetensors"))[-1]
    size = in_store.info(name)["size"]
    cat = type(in_store).cat_file

    def then_changed(self, path, start=None, end=None, **settings):
        data = cat(self, path, start=start, end=end, **settings)
        if path == name and end == size:
            self.rm_file(name)
            if how == "changed":
                self.pipe_file(name, bytes(size))
        return data

    assert run("inspect", "memory://bucket/model").exit_code == 0
    monkeypatch.setattr(remote, "_FIRST_READ", 1000)
    monkeypatch.setattr(type(in_store), "cat_file", then_changed)
    result = ablate("memory://bucket/model", out, "--layers", "0-2")
    assert result.exit_code == 1
    assert "memory://bucket/model: changed while it was read; run again when nothing writes to it" in result.stderr
    assert not (tmp_path / "out").exists()
    assert in_store.find("/bucket/out") == []


def test_an_interrupted_run_is_resumed_by_byte_range(in_store, made, tmp_path, monkeypatch):
    cat = type(in_store).cat_file
    asked = []

    def failing(self, path, start=None, end=None, **settings):
        if "00002-of" in path:
            asked.append(start)
            # The first time it is the header that is looked for.
            if not healed and start >= 40_000 and start in asked[:-1]:
                raise PermissionError("not yours any more")
        return cat(self, path, start=start, end=end, **settings)

    healed = False
    monkeypatch.setattr(object_store, "_CHUNK", 1000)
    monkeypatch.setattr(type(in_store), "cat_file", failing)
    result = ablate("memory://bucket/model", "out")
    assert result.exit_code == 1
    assert "may not be read (not yours any more)" in result.stderr
    assert "--resume goes on" in result.stderr
    healed, stopped = True, asked[-1]
    assert stopped > 0
    asked.clear()
    assert ablate("memory://bucket/model", "out", "--resume").exit_code == 0
    assert stopped in asked
    assert weights(tmp_path / "out") == weights(made / "expected")


def test_names_that_are_none(in_store):
    for source, words in {
        "memory://bucket/nothing": "no such folder, or an empty one",
        "memory://bucket/model/config.json": "is a file; name the folder",
        "nowhere://bucket/model": "fsspec knows no nowhere://",
    }.items():
        result = run("inspect", source)
        assert result.exit_code in (1, 2)
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_package_that_is_missing_is_named(in_store, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    result = run("inspect", "s3://bucket/model")
    assert result.exit_code == 2
    assert "fsspec needs another package for s3:// (Install s3fs to access S3); `pip install" in result.stderr
    assert "ablate-shards[s3]" in result.stderr
