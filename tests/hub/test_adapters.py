"""Adapters made straight into a repository: one commit with a card, or nothing."""

import json

import pytest
from command_line import run
from hub.edits import write_model
from raw_checkpoints import HIDDEN, hidden, snapshot

from ablate_shards.errors import HubError
from ablate_shards.surgery.hub import push as pushing


@pytest.fixture
def source(hub, tmp_path, monkeypatch):
    """A model on the Hub, directions of it here, and a token that may write."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    made = write_model(tmp_path, hidden=HIDDEN, shards=2)
    hub.add("org/model", made / "local")
    return made


def words(source, out, *more):
    return ("ablate", "org/model", out, "-d", source / "d.safetensors", "--source-layer", "1", "--adapter", *more)


def contents(hub, repo="me/adapter"):
    return {name: blob.data for name, blob in hub.repos[repo].files("main").items() if name != ".gitattributes"}


def test_an_adapter_is_one_commit_of_what_a_folder_would_hold(hub, source, tmp_path):
    here = run(*words(source, tmp_path / "here"))
    assert here.exit_code == 0, here.stderr
    result = run(*words(source, "hub:me/adapter", "--private"))
    assert result.exit_code == 0, result.stderr
    found = contents(hub)
    card = found.pop("README.md").decode()
    assert found == snapshot(tmp_path / "here")
    repo = hub.repos["me/adapter"]
    assert repo.private
    assert len(repo.commits) == 2  # the empty one that makes the repository, and ours
    assert "base_model: org/model" in card
    assert "base_model_relation: adapter" in card
    assert "published at " in result.stdout
    assert "ablate-shards verify" not in result.stdout
    assert not [name for name in hidden(tmp_path) if "hub-me" in name]


def test_json_names_the_commit(hub, source):
    result = run(*words(source, "hub:me/adapter", "--json"))
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert "me/adapter/commit/" in said["out"]
    assert said["modules"]


def test_a_difference_is_made_into_a_repository_too(hub, source, tmp_path):
    edited = run("ablate", source / "local", tmp_path / "edited", "-d", source / "d.safetensors", "--source-layer", "1")
    assert edited.exit_code == 0, edited.stderr
    result = run("diff", source / "local", tmp_path / "edited", "--adapter", "hub:me/adapter", "--adapter-rank", "4")
    assert result.exit_code == 0, result.stderr
    assert contents(hub).keys() == {"README.md", "adapter.json", "adapter_config.json", "adapter_model.safetensors"}
    refused = run("diff", source / "local", tmp_path / "edited", "--adapter", tmp_path / "here", "--private")
    assert refused.exit_code == 2
    assert "is no repository" in refused.stderr
    assert run("diff", source / "local", tmp_path / "edited", "--private").exit_code == 2


def test_an_adapter_that_is_there_is_replaced_only_if_that_is_said(hub, source):
    assert run(*words(source, "hub:me/adapter")).exit_code == 0
    again = run(*words(source, "hub:me/adapter", "--preserve", "none"))
    assert again.exit_code == 1
    assert "holds an adapter already; --overwrite replaces it" in " ".join(again.stderr.split())
    before = contents(hub)
    assert run(*words(source, "hub:me/adapter", "--preserve", "none", "--overwrite")).exit_code == 0
    assert contents(hub)["adapter_model.safetensors"] != before["adapter_model.safetensors"]


def test_an_adapter_is_never_put_beside_a_model(hub, source, tmp_path):
    hub.add("me/adapter", source / "local")
    result = run(*words(source, "hub:me/adapter", "--overwrite"))
    assert result.exit_code == 1
    assert "adds an adapter that lies beside a model whenever it loads that" in " ".join(result.stderr.split())
    assert run(*words(source, tmp_path / "here")).exit_code == 0
    pushed = run("push", tmp_path / "here", "me/adapter")
    assert pushed.exit_code == 1
    assert "name another repository" in " ".join(pushed.stderr.split())
    assert "adapter_config.json" not in contents(hub)


def test_what_cannot_be_sent_is_kept(hub, source, tmp_path, monkeypatch):
    def refusing(*_, **__):
        raise HubError("me/adapter: the upload failed")

    monkeypatch.setattr(pushing, "push", refusing)
    result = run(*words(source, "hub:me/adapter"))
    assert result.exit_code == 1
    said = " ".join(result.stderr.split())
    assert "the adapter is kept, send it with `ablate-shards push " in said
    [name] = [name for name in hidden(tmp_path) if name.startswith(".hub-me--adapter-")]
    assert (tmp_path / name / "adapter" / "adapter.json").is_file()
    monkeypatch.undo()


def test_a_run_without_a_token_computes_nothing(hub, source, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    result = run(*words(source, "hub:me/adapter"))
    assert result.exit_code == 1
    assert "a token is needed to write" in result.stderr
    assert not [name for name in hidden(source) if "hub-me" in name]


def test_an_object_store_is_no_place_for_an_adapter(hub, source):
    result = run(*words(source, "memory://bucket/adapter"))
    assert result.exit_code == 2
    assert "in a folder of this machine or in a repository" in " ".join(result.stderr.split())
