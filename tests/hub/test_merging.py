"""A merge whose OUT is a repository or an object store: the same files as in a folder, and the same guarantees."""

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from command_line import checked, run
from hub.edits import SHARDS, write_model_adapter
from hub.object_store import fill, held
from raw_checkpoints import flip, snapshot
from safetensors.torch import load_file, save_file

from ablate_shards.surgery.checkpoint.object_store import UNFINISHED

STORE = "memory://bucket/merged"


@pytest.fixture
def case(on_hub, store, made):
    """The model in a folder, on the Hub and in a store, and what merging into the Hub's gives in a folder."""
    fill(store, "/bucket/model", made / "local")
    return on_hub


def merge(source, out, *more, adapter="adapter"):
    return run("merge", source, adapter, out, *more)


def assert_published(hub, folder):
    found = {name: blob.data for name, blob in hub.repos["me/merged"].files().items()}
    expected = snapshot(folder / "merged")
    card = found.pop("README.md").decode()
    del expected["README.md"], found[".gitattributes"]
    assert found == expected
    assert found[SHARDS[0]] != (folder / "local" / SHARDS[0]).read_bytes()
    return card


def test_into_a_repository(case):
    hub, folder = case
    result = merge("org/model", "hub:me/merged", "--private")
    assert result.exit_code == 0, result.stderr
    card = assert_published(hub, folder)
    assert "base_model: org/model" in card
    assert "license: mit" in card
    repo = hub.repos["me/merged"]
    assert repo.private
    assert len(repo.commits) == 2
    assert f"published at {hub.endpoint}/me/merged/commit/{repo.refs['main']}, with its receipt in merge.json" in (
        result.stdout
    )
    local, expected = snapshot(folder / "local"), snapshot(folder / "merged")
    changed = [name for name in SHARDS if local[name] != expected[name]]
    assert 0 < len(changed) < len(SHARDS)
    assert len(hub.requests("PUT ")) == len(changed)
    # Nothing is gathered, so each pass asks for each byte once.
    size = sum(len(local[name]) for name in changed)
    assert 2 * size <= hub.sent("GET /blob/") <= 2 * size + len(SHARDS) * (100_000 + 512)
    assert run("verify", "org/model", folder / "merged", "--adapter", "adapter").exit_code == 0


def test_an_upload_that_fails_is_resumed(case):
    hub, folder = case
    hub.fault("PUT ", times=1)
    hub.fault("PUT ", times=1, status=403)
    result = merge("org/model", "hub:me/merged")
    assert result.exit_code == 1
    assert "the token may not write to this repository" in result.stderr
    assert "--resume goes on" in result.stderr
    assert list(hub.repos["me/merged"].files()) == [".gitattributes"]
    other = merge("org/model", "hub:me/merged", "--resume", "--scale", "0.5")
    assert "cannot be resumed, because the plan changed" in other.stderr
    sent = {seen.path for seen in hub.requests("PUT ")}
    hub.seen.clear()
    assert merge("org/model", "hub:me/merged", "--resume").exit_code == 0
    assert len(sent & {seen.path for seen in hub.requests("PUT ")}) == 1
    assert_published(hub, folder)


@pytest.mark.parametrize("source", ["local", "memory://bucket/model", "org/model"])
def test_into_an_object_store(case, store, source):
    _, folder = case
    result = merge(source, STORE)
    assert result.exit_code == 0, result.stderr
    found, expected = held(store, "/bucket/merged"), snapshot(folder / "merged")
    receipts = [json.loads(files.pop("merge.json")) for files in (found, expected)]
    assert found == expected
    assert receipts[0]["tensors"] == receipts[1]["tensors"]
    assert f"written to {STORE}" in result.stdout
    assert run("inspect", STORE).exit_code == 0


@contextmanager
def refusing_the_third(store, monkeypatch):
    """A store that takes two shards and not the third."""
    put = type(store).put_file

    def put_file(self, local, path, **settings):
        if SHARDS[2] in path:
            raise PermissionError("not yours")
        return put(self, local, path, **settings)

    with monkeypatch.context() as patched:
        patched.setattr(type(store), "put_file", put_file)
        yield


def test_an_interrupted_store_is_resumed(case, store, monkeypatch):
    _, folder = case
    with refusing_the_third(store, monkeypatch):
        assert "--resume goes on" in merge("local", STORE).stderr
    assert set(held(store, "/bucket/merged")) == {UNFINISHED, *SHARDS[:2]}
    assert "half made; --resume goes on with it" in merge("local", STORE).stderr
    assert merge("local", STORE, "--resume").exit_code == 0
    found, expected = held(store, "/bucket/merged"), snapshot(folder / "merged")
    assert [found[name] for name in SHARDS] == [expected[name] for name in SHARDS]
    assert "already exists; --overwrite replaces it" in merge("local", STORE).stderr


def test_errors_before_the_run_write_nothing_anywhere(case, store):
    hub, folder = case
    write_model_adapter(folder / "other", hidden=64)
    before = sorted(store.store)
    for out, more, words in (
        ("hub:nothing", [], "expected a repository such as hub:me/model-edited"),
        ("hub:me/merged", ["--cache"], "--link and --cache are for an OUT that is a folder on this machine"),
        (STORE, ["--link"], "--link and --cache are for an OUT that is a folder on this machine"),
        (STORE, ["--private"], "is no repository; name one"),
        ("out", ["--private"], "is no repository; name one"),
        ("memory://bucket/model", [], "may not be the same or lie inside each other"),
    ):
        result = merge("memory://bucket/model" if out.endswith("model") else "local", out, *more)
        assert result.exit_code == 2
        assert words in result.stderr, result.stderr
    for out in ("hub:me/merged", STORE):
        assert merge("local", out, "--dry-run").exit_code == 0
        result = merge("local", out, adapter="other")
        assert result.exit_code == 1
        assert "expected what fits" in result.stderr
    hub.seen.clear()
    for more in (["--dry-run"], ["--scale", "nan"]):
        assert merge("org/model", "hub:me/merged", *more).exit_code in (0, 1)
    assert 0 < hub.sent("GET") <= 2 * (len(SHARDS) + 1) * 100_000
    assert "me/merged" not in hub.repos
    assert not hub.requests("POST")
    assert sorted(store.store) == before
    assert not (folder / "out").exists()


def test_the_result_as_json(case):
    hub, _ = case
    found = json.loads(merge("org/model", "hub:me/merged", "--json").stdout)
    assert found["out"].startswith(f"{hub.endpoint}/me/merged/commit/")
    assert len(found["tensors"]) == 4
    assert json.loads(merge("local", STORE, "--json").stdout)["out"] == STORE


# -------------------------------------------------------------- headers that are not the source's


@pytest.fixture
def grown(case):
    """The model on the Hub and in a store, and in ``merged`` what an adapter with two more tokens makes of it."""
    hub, folder = case
    weights = folder / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(5)
    more = {
        f"base_model.model.{name}.weight": torch.randn(50, 128, generator=generator)
        for name in ("model.embed_tokens", "lm_head")
    }
    save_file(load_file(weights) | more, weights)
    (folder / "adapter" / "tokenizer.json").write_text('{"new": 1}')
    shutil.rmtree(folder / "merged")
    checked("merge", "org/model", "adapter", "merged")
    return hub, folder


def assert_grown(found, folder):
    """Asserts that files are those that the same merge makes in a folder, whose source may go by another name."""
    expected = snapshot(folder / "merged")
    receipts = [json.loads(files.pop("merge.json")) for files in (found, expected)]
    assert [receipt["amendments"] for receipt in receipts] == [receipts[0]["amendments"]] * 2
    assert receipts[0]["tensors"] == receipts[1]["tensors"]
    assert found == expected
    assert json.loads(found["config.json"])["vocab_size"] == 50
    assert found["tokenizer.json"] == b'{"new": 1}'
    before = snapshot(folder / "local")
    changed = [name for name in SHARDS if len(found[name]) != len(before[name])]
    assert changed == [SHARDS[0], SHARDS[-1]]


@pytest.mark.parametrize("source", ["local", "memory://bucket/model", "org/model"])
def test_a_grown_vocabulary_into_an_object_store(grown, store, source):
    _, folder = grown
    result = merge(source, STORE)
    assert result.exit_code == 0, result.stderr
    assert_grown(held(store, "/bucket/merged"), folder)
    assert run("verify", source, STORE, "--adapter", "adapter").exit_code == 0
    name = f"/bucket/merged/{SHARDS[-1]}"
    raw = bytearray(store.cat_file(name))
    raw[-3] ^= 1
    store.pipe(name, bytes(raw))
    result = run("verify", source, STORE)
    assert result.exit_code == 1
    assert "lm_head.weight" in result.stdout


@pytest.mark.parametrize("source", ["local", "memory://bucket/model", "org/model"])
@pytest.mark.parametrize("copies", [True, False])
def test_a_grown_vocabulary_into_a_repository(grown, source, copies):
    hub, folder = grown
    if not copies:
        hub.fault("POST .*/lfs-files/duplicate", status=403)
    result = merge(source, "hub:me/merged")
    assert result.exit_code == 0, result.stderr
    found = {name: blob.data for name, blob in hub.repos["me/merged"].files().items()}
    found.pop(".gitattributes")
    found["README.md"] = snapshot(folder / "merged")["README.md"]
    assert_grown(found, folder)
    assert run("verify", source, "me/merged", "--adapter", "adapter").exit_code == 0


def test_a_grown_vocabulary_from_elsewhere_into_a_folder(grown):
    _, folder = grown
    for number, source in enumerate(("memory://bucket/model", "org/model", "local")):
        checked("merge", source, "adapter", f"again{number}")
        assert_grown(snapshot(folder / f"again{number}"), folder)
        checked("verify", source, f"again{number}")
    flip(folder / "again0" / SHARDS[0], 20)
    assert "the header: differs" in checked("verify", "memory://bucket/model", "again0", code=1).stdout


def test_an_interrupted_store_with_a_grown_vocabulary_is_resumed(grown, store, monkeypatch):
    _, folder = grown
    with refusing_the_third(store, monkeypatch):
        assert "--resume goes on" in merge("org/model", STORE).stderr
    assert set(held(store, "/bucket/merged")) == {UNFINISHED, *SHARDS[:2]}
    assert merge("org/model", STORE, "--resume").exit_code == 0
    assert_grown(held(store, "/bucket/merged"), folder)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"base_model_name_or_path": "org/other"}, "was trained on org/other, not on org/model"),
        ({"revision": "0" * 40}, f"was trained on commit {'0' * 40} of org/model, not on "),
        ({"revision": "main"}, None),
        ({"base_model_name_or_path": "ORG/Model"}, None),
        ({"base_model_name_or_path": "/home/me/model"}, None),
    ],
)
def test_another_base_than_the_adapter_names_is_noted(case, tmp_path, said, expected):
    shutil.copytree("adapter", tmp_path / "named")
    config = tmp_path / "named" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    result = merge("org/model", tmp_path / "noted", adapter=tmp_path / "named")
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stderr.split())
    assert ("the adapter says" in shown) == (expected is not None)
    assert expected is None or expected in shown
