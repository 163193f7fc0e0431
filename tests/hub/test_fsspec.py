"""SOURCE in an object store, through fsspec: the same bytes as from a folder, by byte ranges."""

import json

import pytest
from command_line import run
from hub.object_store import fill
from raw_checkpoints import snapshot, write_directions, write_llama

from ablate_shards.surgery.checkpoint import object_store, remote


@pytest.fixture
def case(store, tmp_path, monkeypatch):
    """A model in a store of its own, and what ablating it gives."""
    monkeypatch.chdir(tmp_path)
    fill(store, "/bucket/model", write_llama(tmp_path / "local", hidden=128))
    write_directions(tmp_path / "d.safetensors", hidden=128)
    assert ablate(tmp_path / "local", "expected").exit_code == 0
    return store


def ablate(source, out, *more):
    return run("ablate", source, out, "-d", "d.safetensors", "--source-layer", "1", *more)


def weights(folder):
    return {name: data for name, data in snapshot(folder).items() if name != "ablation.json"}


def test_the_same_bytes_as_from_a_folder(case, tmp_path):
    result = ablate("memory://bucket/model", "out")
    assert result.exit_code == 0, result.stderr
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    source = json.loads((tmp_path / "out" / "ablation.json").read_text())["source"]
    assert source["name"] == "memory://bucket/model"
    assert "revision" not in source
    assert run("verify", "memory://bucket/model", "out").exit_code == 0
    assert run("verify", "local", "out").exit_code == 0


def test_inspect_reads_headers_alone(case, monkeypatch):
    read = []
    cat = type(case).cat_file

    def counted(self, path, start=None, end=None, **settings):
        read.append(end - start)
        return cat(self, path, start=start, end=end, **settings)

    monkeypatch.setattr(type(case), "cat_file", counted)
    assert run("inspect", "memory://bucket/model").exit_code == 0
    assert 0 < sum(read) <= 4 * 100_000


def test_errors_that_pass_are_waited_for_and_others_told(case, tmp_path, monkeypatch):
    cat = type(case).cat_file
    faults = [ConnectionResetError("reset"), TimeoutError("slow")]

    def failing(self, path, **settings):
        if faults and "00002" in path:
            raise faults.pop()
        return cat(self, path, **settings)

    monkeypatch.setattr(type(case), "cat_file", failing)
    assert ablate("memory://bucket/model", "out").exit_code == 0
    assert faults == []
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")
    faults.append(PermissionError("not yours"))
    result = ablate("memory://bucket/model", "other")
    assert result.exit_code == 1
    assert "may not be read (not yours); check the credentials" in result.stderr


@pytest.mark.parametrize("out", ["out", "memory://bucket/out"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_a_source_that_changes_under_the_run_is_refused(case, tmp_path, monkeypatch, out, how):
    """The last shard is written anew, or removed, once it has been read."""
    name = sorted(path for path in case.find("/bucket/model") if path.endswith(".safetensors"))[-1]
    size = case.info(name)["size"]
    cat = type(case).cat_file

    def then_changed(self, path, start=None, end=None, **settings):
        data = cat(self, path, start=start, end=end, **settings)
        if path == name and end == size:
            self.rm_file(name)
            if how == "changed":
                self.pipe_file(name, bytes(size))
        return data

    assert run("inspect", "memory://bucket/model").exit_code == 0
    monkeypatch.setattr(remote, "_FIRST_READ", 1000)
    monkeypatch.setattr(type(case), "cat_file", then_changed)
    result = ablate("memory://bucket/model", out)
    assert result.exit_code == 1
    assert "memory://bucket/model: changed while it was read; run again when nothing writes to it" in result.stderr
    assert not (tmp_path / "out").exists()
    assert case.find("/bucket/out") == []


def test_an_interrupted_run_is_resumed_by_byte_range(case, tmp_path, monkeypatch):
    cat = type(case).cat_file
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
    monkeypatch.setattr(type(case), "cat_file", failing)
    result = ablate("memory://bucket/model", "out")
    assert result.exit_code == 1
    assert "may not be read (not yours any more)" in result.stderr
    assert "--resume goes on" in result.stderr
    healed, stopped = True, asked[-1]
    assert stopped > 0
    asked.clear()
    assert ablate("memory://bucket/model", "out", "--resume").exit_code == 0
    assert stopped in asked
    assert weights(tmp_path / "out") == weights(tmp_path / "expected")


def test_names_that_are_none(case):
    for source, words in {
        "memory://bucket/nothing": "no such folder, or an empty one",
        "memory://bucket/model/config.json": "is a file; name the folder",
        "nowhere://bucket/model": "fsspec knows no nowhere://",
    }.items():
        result = run("inspect", source)
        assert result.exit_code in (1, 2)
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_package_that_is_missing_is_named(case, monkeypatch):
    def missing(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.core.url_to_fs", missing)
    result = run("inspect", "s3://bucket/model")
    assert result.exit_code == 2
    assert "fsspec needs another package for s3:// (Install s3fs to access S3); `pip install" in result.stderr
    assert "ablate-shards[s3]" in result.stderr
