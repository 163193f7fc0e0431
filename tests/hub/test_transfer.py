"""Hub to Hub: no more than a shard on this disk, one commit, and what is not edited copied by the Hub itself."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from command_line import run
from hub.edits import OPTIONS, SHARDS, ablate
from hub.hub_server import Fault
from hub.object_store import fill
from raw_checkpoints import hidden, snapshot, write_llama, write_shard
from starlette.responses import JSONResponse

from ablate_shards.surgery.checkpoint import remote
from ablate_shards.surgery.hub import transfer


def assert_published(hub, folder, *, same_receipt=True):
    files = hub.repos["me/edited"].files()
    found = {name: blob.data for name, blob in files.items()}
    expected = snapshot(folder / "ablated")
    card = found.pop("README.md").decode()
    expected.pop("README.md")
    found.pop(".gitattributes", None)
    if not same_receipt:
        found.pop("ablation.json")
        expected.pop("ablation.json")
    assert found == expected
    return card


def edited_shards(folder):
    local, expected = snapshot(folder / "local"), snapshot(folder / "ablated")
    return [name for name in SHARDS if local[name] != expected[name]]


def test_the_repository_is_what_a_push_of_the_folder_would_be(on_hub):
    hub, folder = on_hub
    result = ablate("org/model", "hub:me/edited", "--private")
    assert result.exit_code == 0, result.stderr
    card = assert_published(hub, folder)
    assert "license: mit" in card
    assert "base_model: org/model" in card
    assert "# Base" not in card
    repo = hub.repos["me/edited"]
    assert repo.private
    assert len(repo.commits) == 2
    assert f"published at {hub.endpoint}/me/edited/commit/{repo.refs['main']}" in result.stdout
    assert hidden(folder) == []


def test_what_is_not_edited_is_neither_fetched_nor_sent(on_hub):
    hub, folder = on_hub
    assert ablate("org/model", "hub:me/edited").exit_code == 0
    (duplicated,) = hub.requests("POST /api/models/org/model/lfs-files/duplicate")
    assert duplicated
    files = hub.repos["org/model"].files()
    edited = edited_shards(folder)
    assert 0 < len(edited) < len(SHARDS)
    for name in SHARDS:
        fetched = hub.sent(f"GET /blob/.*{files[name].sha256}")
        assert (fetched > 100_000) == (name in edited)
    assert len(hub.requests("PUT ")) == len(edited)


def on_disk(folder):
    """Returns how many bytes of disk the files below a folder take."""
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


WITH_SMALL_FILES = """
import pathlib, resource, signal, sys
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.edit.ablation import ablation
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.hub.push import PushOptions
from ablate_shards.surgery.plan.plan import make_plan
from ablate_shards.surgery.plan.recipe import AblateOptions
from ablate_shards.surgery.checkpoint.stores import open_source
from ablate_shards.surgery.hub.transfer import perform_on_hub

class Quiet:
    def begin(self, total): pass
    def advance(self, count): pass
    def note(self, text): pass

checkpoint = open_source("org/model")
directions = read_directions(pathlib.Path("d.safetensors"))
options = AblateOptions(layers=frozenset({0, 1}), source_layer=1)
operation = ablation(checkpoint, make_plan(checkpoint, directions, options), directions, options)
limit = int(sys.argv[1])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
perform_on_hub(checkpoint, operation, "me/edited", PushOptions(), RunOptions(), Quiet())
"""


@pytest.mark.parametrize("multipart", [False, True])
def test_nothing_of_a_shard_is_on_any_disk(on_hub, multipart):
    """The system itself refuses larger files, wherever they are, and few of what is allowed is there while sending."""
    hub, folder = on_hub
    limit = 16384
    smallest = min(path.stat().st_size for path in (folder / "local").glob("*.safetensors"))
    assert smallest > 4 * limit
    if multipart:
        hub.multipart_above, hub.part_size = 0, 50_000
    for name in ("home", "temporary"):
        (folder / name).mkdir()
    present = []
    hub.watch = lambda line: present.append(on_disk(folder)) if line.startswith("PUT ") else None
    before = on_disk(folder)
    environment = {
        **os.environ,
        **hub.environment,
        "HF_HOME": str(folder / "home"),
        "HOME": str(folder / "home"),
        "TMPDIR": str(folder / "temporary"),
    }
    command = [sys.executable, "-c", WITH_SMALL_FILES, str(limit)]
    by_xet = subprocess.run(
        command, cwd=folder, env=environment | {"HF_HUB_DISABLE_XET": "0"}, capture_output=True, text=True
    )
    assert "File too large" in by_xet.stderr
    shutil.rmtree(folder / ".hub-me--edited.ablate-staging")
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(present) >= 2
    assert max(present) - before <= 2 * limit
    assert_published(hub, folder)


def test_through_xet_one_shard_at_a_time_is_on_this_disk(on_hub, monkeypatch):
    from huggingface_hub import constants

    hub, folder = on_hub
    edited = edited_shards(folder)
    assert ablate("org/model", "hub:me/edited").exit_code == 0
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_store = folder / "xet"
    hub.xet_store.mkdir()
    present = []
    send = transfer.Ledger.send

    def measured(self, addition):
        present.append(len(list(self.staging.folder.glob("*.safetensors"))))
        send(self, addition)

    monkeypatch.setattr(transfer.Ledger, "send", measured)
    assert ablate("org/model", "hub:me/by-xet", "--quiet").exit_code == 0
    assert present == [1] * len(edited)
    assert len(edited) > 1
    found, expected = (hub.repos[name].files() for name in ("me/by-xet", "me/edited"))
    assert {name: found[name].sha256 for name in SHARDS} == {name: expected[name].sha256 for name in SHARDS}
    # Where a shard has no room on the disk, it goes through LFS.
    monkeypatch.setattr(transfer.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    hub.seen.clear()
    result = ablate("org/model", "hub:me/by-lfs")
    assert result.exit_code == 0, result.stderr
    assert "so shards go through LFS" in result.stderr
    assert len(hub.requests("PUT ")) == len(edited)
    assert {name: hub.repos["me/by-lfs"].files()[name].sha256 for name in SHARDS} == {
        name: expected[name].sha256 for name in SHARDS
    }


@pytest.mark.parametrize("multipart", [False, True])
def test_each_pass_asks_for_each_byte_once_and_what_is_sent_again_for_its_own(on_hub, multipart):
    hub, folder = on_hub
    sizes = [(folder / "local" / name).stat().st_size for name in edited_shards(folder)]
    again = max(sizes)
    hub.fault("PUT ", times=1, status=503)
    if multipart:
        hub.multipart_above, hub.part_size = 0, 100_000
        hub.faults.clear()
        hub.fault("PUT /part/.*/2$", times=1, status=503)
        again = 2 * hub.part_size
    assert ablate("org/model", "hub:me/edited").exit_code == 0
    assert_published(hub, folder)
    headers = len(SHARDS) * 100_000
    assert 2 * sum(sizes) <= hub.sent("GET /blob/") <= 2 * sum(sizes) + headers + again


def test_a_local_source(on_hub):
    hub, folder = on_hub
    assert ablate(folder / "local", "hub:me/edited").exit_code == 0
    assert_published(hub, folder, same_receipt=False)


def test_what_the_hub_has_already_is_not_sent(on_hub):
    """Another run has sent the same bytes, and nothing here knows of it."""
    hub, folder = on_hub
    assert ablate("org/model", "hub:me/edited").exit_code == 0
    repo = hub.repos["me/edited"]
    repo.refs["main"] = next(iter(repo.commits))
    hub.seen.clear()
    assert ablate("org/model", "hub:me/edited").exit_code == 0
    assert not hub.requests("PUT ")
    assert_published(hub, folder)


def test_a_shard_that_arrives_altered_is_fetched_again_and_then_refused(on_hub):
    hub, folder = on_hub
    name = edited_shards(folder)[0]
    sha = hub.repos["org/model"].files()[name].sha256
    hub.fault(f"GET /blob/.*{sha}", times=1)  # the header
    hub.fault(f"GET /blob/.*{sha}", times=1, flip=True)
    assert ablate("org/model", "hub:me/edited").exit_code == 0
    assert_published(hub, folder)
    hub.fault(f"GET /blob/.*{sha}", times=1)
    hub.fault(f"GET /blob/.*{sha}", times=2, flip=True)
    result = ablate("org/model", "hub:me/other")
    assert result.exit_code == 1
    assert f"org/model/{name}: arrived twice with the wrong sha256 digest" in result.stderr
    assert list(hub.repos["me/other"].files()) == [".gitattributes"]


@pytest.mark.parametrize("believes", [True, False])
def test_bytes_that_differ_between_the_passes_are_not_committed(on_hub, believes):
    """Altered on the way to be sent, after their digest was found: the Hub is told another digest than it gets."""
    hub, folder = on_hub
    name = edited_shards(folder)[0]
    sha = hub.repos["org/model"].files()[name].sha256
    hub.believes = believes
    hub.fault(f"GET /blob/.*{sha}", times=3)  # the header, the first pass, the first bytes
    hub.fault(f"GET /blob/.*{sha}", times=1, flip=True)
    result = ablate("org/model", "hub:me/edited")
    assert result.exit_code == 1
    assert f"{name} was not the same when it was read again to be sent" in result.stderr
    assert list(hub.repos["me/edited"].files()) == [".gitattributes"]
    if believes:
        hub.repos["me/edited"].stored.clear()
    assert ablate("org/model", "hub:me/edited", "--resume").exit_code == 0
    assert_published(hub, folder)


def test_a_killed_run_shows_nothing_and_goes_on_with_what_was_sent(on_hub):
    hub, folder = on_hub
    hub.fault("POST .*/commit/", times=1, pause=3, status=503)
    environment = os.environ | hub.environment
    command = [sys.executable, "-m", "ablate_shards", "ablate", "org/model", "hub:me/edited", *OPTIONS]
    child = subprocess.Popen([str(word) for word in command], cwd=folder, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not hub.requests("POST .*/commit/"):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(hub.repos["me/edited"].files()) == [".gitattributes"]
    refused = ablate("org/model", "hub:me/edited")
    assert "--resume goes on with it" in refused.stderr
    hub.seen.clear()
    assert ablate("org/model", "hub:me/edited", "--resume").exit_code == 0
    assert not hub.requests("PUT ")
    assert hub.sent("GET /blob/") <= 4 * 100_000
    assert_published(hub, folder)
    assert hidden(folder) == []


def test_an_upload_that_fails_is_resumed(on_hub):
    hub, folder = on_hub
    hub.fault("PUT ", times=1)
    hub.fault("PUT ", times=1, status=403)
    result = ablate("org/model", "hub:me/edited")
    assert result.exit_code == 1
    assert "the token may not write to this repository" in result.stderr
    assert "--resume goes on" in result.stderr
    assert list(hub.repos["me/edited"].files()) == [".gitattributes"]
    assert len(hub.requests("PUT ")) == 2
    hub.seen.clear()
    assert ablate("org/model", "hub:me/edited", "--resume").exit_code == 0
    assert_published(hub, folder)
    # One shard had arrived, of one the digest was known, and for the third both passes were still to come.
    _, known, unknown = ((folder / "local" / name).stat().st_size for name in edited_shards(folder))
    assert hub.sent("GET /blob/") <= known + 2 * unknown + (len(SHARDS) + 2) * 100_000


def test_a_repository_that_holds_weights_is_replaced_when_asked(on_hub):
    hub, folder = on_hub
    old = folder / "old"
    write_llama(old, shards=1)
    hub.add("me/edited", old)
    before = hub.repos["me/edited"].refs["main"]
    result = ablate("org/model", "hub:me/edited")
    assert result.exit_code == 1
    assert "holds weights already (model-00001-of-00001.safetensors); --overwrite replaces them" in result.stderr
    assert hub.repos["me/edited"].refs["main"] == before
    assert ablate("org/model", "hub:me/edited", "--overwrite").exit_code == 0
    names = [name for name in hub.repos["me/edited"].files() if name.endswith(".safetensors")]
    assert sorted(names) == SHARDS


def test_a_commit_by_someone_else_is_not_overwritten(on_hub, monkeypatch):
    hub, folder = on_hub
    publish = transfer.commit

    def late(*arguments):
        hub.update("me/edited", folder / "local")
        return publish(*arguments)

    monkeypatch.setattr(transfer, "commit", late)
    result = ablate("org/model", "hub:me/edited")
    assert result.exit_code == 1
    assert "someone else has committed meanwhile" in result.stderr
    assert hub.repos["me/edited"].files()[SHARDS[0]].data == (folder / "local" / SHARDS[0]).read_bytes()


@pytest.mark.parametrize("refusal", ["forbidden", "not there", "failed"])
def test_what_the_hub_will_not_copy_passes_through_here(on_hub, refusal):
    hub, folder = on_hub
    if refusal == "failed":
        files = hub.repos["org/model"].commits.values()
        answer = JSONResponse({"failed": [{"sha256": next(iter(files))[SHARDS[0]].sha256, "error": "no"}]})
        hub.faults.append(Fault("POST .*/lfs-files/duplicate", 1, lambda: answer))
    else:
        hub.fault("POST .*/lfs-files/duplicate", status=403 if refusal == "forbidden" else 404)
    result = ablate("org/model", "hub:me/edited")
    assert result.exit_code == 0, result.stderr
    assert result.stderr.count("so they pass through here") == 1
    assert_published(hub, folder)
    assert len(hub.requests("PUT ")) == len(SHARDS)
    assert hidden(folder) == []


@pytest.mark.parametrize("source", ["org/model", "memory://bucket/model"])
def test_what_may_not_fit_into_memory_is_sent_as_a_shard_is(on_hub, store, monkeypatch, source):
    """A large file beside the shards that the Hub does not copy by itself."""
    hub, folder = on_hub
    monkeypatch.setattr(transfer, "_LARGE", 10_000)
    write_shard(folder / "local" / "extra" / "more.safetensors", {"tower": np.ones((200, 200))})
    content = (folder / "local" / "extra" / "more.safetensors").read_bytes()
    hub.update("org/model", folder / "local")
    fill(store, "/bucket/model", folder / "local")
    hub.fault("POST .*/lfs-files/duplicate", status=403)
    read = remote.RemoteFiles.read_range
    asked = []

    def noted(self, file, start, end):
        asked.append(file)
        return read(self, file, start, end)

    monkeypatch.setattr(remote.RemoteFiles, "read_range", noted)
    result = ablate(source, "hub:me/edited")
    assert result.exit_code == 0, result.stderr
    files = hub.repos["me/edited"].files()
    assert files["extra/more.safetensors"].data == content
    assert {name: files[name].data for name in SHARDS} == {
        name: data for name, data in snapshot(folder / "ablated").items() if name in SHARDS
    }
    assert "tokenizer.json" in asked
    assert "extra/more.safetensors" not in asked


def test_what_passes_through_here_is_resumed(on_hub):
    hub, folder = on_hub
    hub.fault("POST .*/lfs-files/duplicate", times=2, status=403)
    edited = len(edited_shards(folder))
    hub.fault("POST .*/commit/", status=403)
    refused = ablate("org/model", "hub:me/edited")
    assert refused.exit_code == 1
    assert "may not write" in refused.stderr
    assert list(hub.repos["me/edited"].files()) == [".gitattributes"]
    assert len(hub.requests("PUT ")) == len(SHARDS) > edited
    hub.seen.clear()
    assert ablate("org/model", "hub:me/edited", "--resume").exit_code == 0
    assert not hub.requests("PUT ")
    assert_published(hub, folder)


def test_a_dry_run_and_bad_plans_touch_no_repository(on_hub):
    hub, folder = on_hub
    assert ablate("org/model", "hub:me/edited", "--dry-run").exit_code == 0
    assert run("ablate", "org/model", "hub:me/edited", "-d", folder / "d.safetensors", "--layers", "9").exit_code == 1
    assert "me/edited" not in hub.repos
    assert not hub.requests("POST")


def test_wrong_usage(on_hub, monkeypatch):
    _, folder = on_hub
    for out, more, words in (
        ("hub:nothing", [], "expected a repository such as hub:me/model-edited"),
        ("hub:me/edited@main", [], "expected a repository such as hub:me/model-edited"),
        ("hub:me/edited", ["--cache"], "--link and --cache are for an OUT that is a folder on this machine"),
        (folder / "out", ["--private"], "is no repository; name one"),
        ("hub:org/Model", ["--overwrite"], "OUT and SOURCE may not be the same repository"),
    ):
        result = ablate("org/model", out, *more)
        assert result.exit_code == 2
        assert words in result.stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "a token is needed to write" in ablate("org/model", "hub:me/edited").stderr


def test_the_result_as_json(on_hub):
    hub, _ = on_hub
    found = json.loads(ablate("org/model", "hub:me/edited", "--json").stdout)
    assert re.fullmatch(rf"{hub.endpoint}/me/edited/commit/[0-9a-f]{{40}}", found["out"])
    assert len(found["tensors"]) == 4
