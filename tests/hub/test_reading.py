"""SOURCE on the Hub: planned from headers, streamed once, resumed, checked, and the same bytes as from a folder."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import run
from hub.edits import write_model
from raw_checkpoints import hidden, snapshot, write_llama

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory):
    """A model in a folder, and what ablating all of it gives."""
    folder = write_model(tmp_path_factory.mktemp("three-shards"), shards=3)
    assert run("ablate", folder / "local", folder / "expected", *options(folder)).exit_code == 0
    return folder


@pytest.fixture
def case(hub, three_shards, tmp_path):
    """The same, and the model on the Hub."""
    shutil.copytree(three_shards, tmp_path, dirs_exist_ok=True)
    hub.add("org/model", tmp_path / "local")
    return hub, tmp_path


def options(folder, *more):
    return ["-d", folder / "d.safetensors", "--source-layer", "1", *more]


def ablate(folder, *more, source="org/model"):
    return run("ablate", source, folder / "out", *options(folder, *more))


def assert_as_expected(folder, source=("org/model", None)):
    """OUT equals what the local folder gives, but for where the receipt says it is from."""
    found, expected = snapshot(folder / "out"), snapshot(folder / "expected")
    receipt, local = json.loads(found.pop("ablation.json")), json.loads(expected.pop("ablation.json"))
    assert found == expected
    assert receipt["source"]["name"] == source[0]
    assert len(receipt["source"].pop("revision")) == 40
    for each in (receipt, local):
        del each["sha256"], each["source"]["name"]
    assert receipt == local


def test_the_same_bytes_as_from_a_folder_each_fetched_once(case):
    hub, folder = case
    result = ablate(folder)
    assert result.exit_code == 0, result.stderr
    assert_as_expected(folder)
    weights = sum(path.stat().st_size for path in (folder / "local").glob("*.safetensors"))
    fetched = hub.sent("GET /blob/")
    assert weights <= fetched <= weights + 3 * 100_000
    assert not (folder / "cache").exists()
    assert f"org/model is commit {hub.repos['org/model'].refs['main']}" in result.stderr
    assert hidden(folder) == []


def test_plans_inspections_and_errors_cost_kilobytes(case):
    hub, folder = case
    weights = sum(path.stat().st_size for path in (folder / "local").glob("*.safetensors"))
    for arguments in (
        ["inspect", "org/model"],
        ["ablate", "org/model", folder / "out", *options(folder, "--dry-run")],
        ["ablate", "org/model", folder / "out", *options(folder, "--layers", "7")],
        ["ablate", "org/model", folder / "expected", *options(folder)],
    ):
        hub.seen.clear()
        result = run(*arguments)
        assert result.exit_code in (0, 1)
        assert 0 < hub.sent("GET") <= 4 * 100_000 < weights
    assert not (folder / "out").exists()


def test_what_inspect_shows_is_what_it_shows_of_the_folder(case):
    _, folder = case
    theirs = json.loads(run("inspect", "org/model", "--json").stdout)
    ours = json.loads(run("inspect", folder / "local", "--json").stdout)
    assert theirs == ours


def test_a_local_path_wins_unless_the_hub_is_named(case):
    hub, folder = case
    write_llama(folder / "org" / "model", layers=2, hidden=64)
    assert ablate(folder, source="hub:org/model").exit_code == 0
    assert_as_expected(folder)
    hub.seen.clear()
    shown = json.loads(run("inspect", "org/model", "--json").stdout)
    assert shown["hidden_size"] == 64
    assert hub.seen == []


def test_a_url_of_the_hub_is_its_repository_and_nothing_else(case):
    hub, _ = case
    assert run("inspect", "hf://org/model@main", "--json").stdout == run("inspect", "org/model", "--json").stdout
    hub.seen.clear()
    for url in ("hf://org/model/folder", "hf://datasets/org/model", "hf://model"):
        result = run("inspect", url)
        assert result.exit_code == 2
        assert f"{url}: expected a model repository, such as org/name or hf://org/name@revision" in result.stderr
    assert hub.seen == []


def test_a_revision_is_pinned_at_the_start(case):
    hub, folder = case
    first = hub.repos["org/model"].refs["main"]
    other = write_llama(folder / "other", layers=3, hidden=128, shards=3, seed=5)
    hub.repos["org/model"].refs["refs/pr/1"] = hub.update("org/model", other)
    # The branch moves on while the run is under way: after the listing, before the first shard.
    assert run("inspect", "org/model@refs/pr/1").exit_code == 0
    result = ablate(folder, source=f"org/model@{first}")
    assert result.exit_code == 0, result.stderr
    assert_as_expected(folder)
    assert all(first in seen.path for seen in hub.requests("GET /org/model/resolve")[-6:])


def test_resuming_after_the_revision_moved_is_refused_and_the_commit_goes_on(case):
    hub, folder = case
    first = hub.repos["org/model"].refs["main"]
    hub.fault(f"GET .*/resolve/.*{SHARD}", times=1)  # the header
    hub.fault(f"GET .*/resolve/.*{SHARD}", times=20, status=503)
    assert ablate(folder).exit_code == 1
    hub.faults.clear()
    hub.update("org/model", write_llama(folder / "other", layers=3, hidden=128, shards=3, seed=5))
    refused = ablate(folder, "--resume")
    assert refused.exit_code == 1
    assert "because the source changed since the interrupted run" in refused.stderr
    assert ablate(folder, "--resume", source=f"org/model@{first}").exit_code == 0
    assert_as_expected(folder)


def test_a_cut_connection_goes_on_by_byte_range(case):
    hub, folder = case
    hub.fault("GET /blob/", times=3)  # headers
    hub.fault("GET /blob/", times=4, cut_after=100_000)
    result = ablate(folder)
    assert result.exit_code == 0, result.stderr
    assert_as_expected(folder)
    ranges = [int(seen.range.removeprefix("bytes=").split("-")[0]) for seen in hub.requests("GET /blob/")]
    assert any(start > 0 for start in ranges)
    weights = sum(path.stat().st_size for path in (folder / "local").glob("*.safetensors"))
    assert hub.sent("GET /blob/") <= weights + 3 * 100_000


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_hub_is_waited_for_as_long_as_it_asks(case, status):
    hub, folder = case
    hub.fault("GET /api/models/org/model/revision|GET /api/models/org/model$", status=status)
    hub.fault("GET .*/tree/", status=status, headers={"Retry-After": "1"})
    hub.fault(f"GET .*/resolve/.*{SHARD}", times=2, status=status, headers={"Retry-After": "0"})
    start = time.monotonic()
    assert ablate(folder).exit_code == 0
    assert time.monotonic() - start >= 1
    assert_as_expected(folder)


def test_a_hub_that_stays_busy_leaves_what_can_be_resumed(case):
    hub, folder = case
    hub.fault(f"GET .*/resolve/.*{SHARD}", times=1)  # the header
    hub.fault(f"GET .*/resolve/.*{SHARD}", times=50, status=503)
    result = ablate(folder)
    assert result.exit_code == 1
    assert "the Hub answered 503" in result.stderr
    assert "--resume goes on" in result.stderr
    assert len(result.stderr.strip().splitlines()[-1]) < 400
    assert not (folder / "out").exists()
    hub.faults.clear()
    hub.seen.clear()
    assert ablate(folder, "--resume").exit_code == 0
    assert_as_expected(folder)
    # What had arrived is not fetched again but for its header.
    first = sum(seen.sent for seen in hub.requests("GET /blob/"))
    weights = sum(path.stat().st_size for path in (folder / "local").glob("*.safetensors"))
    assert first < weights


def test_a_wrong_checksum_is_fetched_again_and_then_refused(case):
    hub, folder = case
    sha = hub.repos["org/model"].files()[SHARD].sha256
    hub.fault(f"GET /blob/.*{sha}", times=1)  # the header
    hub.fault(f"GET /blob/.*{sha}", times=1, flip=True)
    assert ablate(folder).exit_code == 0
    assert_as_expected(folder)
    shutil.rmtree(folder / "out")
    hub.fault(f"GET /blob/.*{sha}", times=1)
    hub.fault(f"GET /blob/.*{sha}", times=2, flip=True)
    result = ablate(folder)
    assert result.exit_code == 1
    assert f"org/model/{SHARD}: arrived twice with the wrong sha256 digest" in result.stderr
    assert not (folder / "out").exists()


def test_small_files_are_checked_as_well(case):
    hub, folder = case
    hub.fault("GET /org/model/resolve/.*/tokenizer.json", times=2, flip=True)
    result = ablate(folder)
    assert result.exit_code == 1
    assert "tokenizer.json: arrived twice with the wrong git digest" in result.stderr


def test_a_killed_run_goes_on_where_it_was(case):
    """Killed with one shard complete and another half there; the edits of a third may have begun."""
    hub, folder = case
    hub.fault(f"GET .*/resolve/.*{SHARD}", times=1)
    hub.fault(f"GET .*/resolve/.*{SHARD}", times=1, pause=5)
    environment = os.environ | hub.environment
    command = [sys.executable, "-m", "ablate_shards", "ablate", "org/model", "out", "-d", "d.safetensors"]
    child = subprocess.Popen([*command, "--source-layer", "1", "--quiet"], cwd=folder, env=environment)
    journal = folder / ".out.ablate-staging" / ".journal.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and '"shard"' in journal.read_text()):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    hub.faults.clear()
    third = folder / ".out.ablate-staging" / "model-00003-of-00003.safetensors"
    if third.stat().st_size == (folder / "local" / third.name).stat().st_size:
        with third.open("r+b") as file:  # as if the kill had come in the middle of an edit
            file.seek(-2000, os.SEEK_END)
            file.write(bytes(100))
    assert ablate(folder, "--resume").exit_code == 0
    assert_as_expected(folder)


def test_the_beginning_of_an_edit_is_fetched_again_alone(case, monkeypatch):
    hub, folder = case

    def fails(*_):
        raise OSError(errno.EIO, "the disk is gone")

    from ablate_shards.surgery.machine import staging

    with monkeypatch.context() as patched:
        patched.setattr(staging.Staging, "record", fails)
        assert "the disk is gone" in ablate(folder).stderr
    first = "model-00001-of-00003.safetensors"
    edited = (folder / ".out.ablate-staging" / first).read_bytes()
    assert edited == (folder / "expected" / first).read_bytes() != (folder / "local" / first).read_bytes()
    hub.seen.clear()
    assert run("ablate", "org/model", folder / "out", *options(folder, "--resume")).exit_code == 0
    assert_as_expected(folder)
    assert hub.sent(f"GET /blob/.*{hub.repos['org/model'].files()[first].sha256}") < len(edited)


def test_verify_streams_the_source_and_finds_a_difference(case):
    hub, folder = case
    assert ablate(folder).exit_code == 0
    hub.seen.clear()
    result = run("verify", "org/model", folder / "out")
    assert result.exit_code == 0, result.stdout
    assert hub.sent("GET /blob/") > 0
    assert not (folder / "cache").exists()
    assert hidden(folder) == []
    assert run("verify", folder / "local", folder / "out").exit_code == 0
    with (folder / "out" / SHARD).open("r+b") as file:
        file.seek(-3, os.SEEK_END)
        file.write(b"\1")
    assert run("verify", "org/model", folder / "out").exit_code == 1


def test_cache_uses_the_ordinary_cache(case):
    hub, folder = case
    result = ablate(folder, "--cache")
    assert result.exit_code == 0, result.stderr
    assert_as_expected(folder)
    snapshots = list((folder / "cache" / "models--org--model" / "snapshots").iterdir())
    assert [path.name for path in snapshots] == [hub.repos["org/model"].refs["main"]]
    assert not (snapshots[0] / "pytorch_model.bin").exists()
    hub.seen.clear()
    shutil.rmtree(folder / "out")
    assert ablate(folder, "--cache").exit_code == 0
    assert hub.sent("GET /blob/") <= 3 * 100_000


def test_a_full_disk_under_the_cache_is_one_sentence_and_then_gone_on_with(case, monkeypatch):
    _, folder = case

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "cache"))

    with monkeypatch.context() as patched:
        patched.setattr("huggingface_hub.file_download.http_get", full)
        result = ablate(folder, "--cache")
    assert result.exit_code == 1
    assert result.stderr.strip().endswith("cache: No space left on device")
    assert not (folder / "out").exists()
    assert ablate(folder, "--cache").exit_code == 0
    assert_as_expected(folder)


def test_errors_say_who_may_read_and_how_to_log_in(case, monkeypatch):
    hub, folder = case
    for repo_id, settings in (("org/private", {"private": True}), ("org/gated", {"gated": True})):
        hub.add(repo_id, folder / "local", **settings)
    for name, words in {
        "org/nothing": "no repository on the Hub that you may read, nor a file or folder here; check the name, or",
        "org/private": "no repository on the Hub that you may read",
        "org/gated": f"is gated; ask for access at {hub.endpoint}/org/gated",
        "org/model@nowhere": "there is no revision nowhere",
    }.items():
        result = run("inspect", name)
        assert result.exit_code == 1
        assert words in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert run("inspect", "org/private").exit_code == 0
    assert "is gated" in run("inspect", "org/gated").stderr
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    assert run("inspect", "org/gated").exit_code == 0
    hub.fault(
        "GET /api/models/org/model",
        status=401,
        headers={"X-Error-Message": "Invalid credentials in Authorization header"},
    )
    assert "the Hub refuses the token; make one at" in run("inspect", "org/model").stderr
    hub.fault("GET /api/models/org/model", status=403)
    refused = run("inspect", "org/model").stderr
    assert "the token may not read this repository" in refused
    assert "give it read access to the repositories of org at https://huggingface.co/settings/tokens" in refused


def test_neither_a_path_nor_on_the_hub_is_one_sentence(case, monkeypatch):
    from huggingface_hub import constants

    _, folder = case
    assert "no such file or folder" in run("inspect", folder / "nothing").stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, so the Hub is not asked" in run("inspect", "org/nothing").stderr
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    result = run("inspect", "org/model")
    assert "the Hub cannot be reached or breaks off (ConnectError)" in result.stderr


def test_the_token_is_sent_to_the_hub_alone_and_shown_nowhere(case, monkeypatch):
    hub, folder = case
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    result = ablate(folder, "--debug")
    assert result.exit_code == 0, result.stderr
    assert hub.requests("GET /org/model/resolve")
    assert all(seen.authorized == (seen.port == hub.hub_port) for seen in hub.seen)
    assert "hf_reader" not in result.output
    assert not any(b"hf_reader" in data for data in snapshot(folder / "out").values())


def test_a_listing_that_leaves_the_folder_is_refused(case):
    hub, folder = case
    files = hub.repos["org/model"].files()
    files["../escape.txt"] = files["tokenizer.json"]
    result = ablate(folder)
    assert result.exit_code == 1
    assert "lists '../escape.txt', which leaves the folder" in result.stderr


def test_malformed_weights_are_refused_from_their_headers(case):
    hub, folder = case
    good = (folder / "local" / SHARD).read_bytes()
    for raw in (b"", b"\xff" * 64, good[:-1], (200 << 20).to_bytes(8, "little") + b"{}" + bytes(100)):
        (folder / "local" / SHARD).write_bytes(raw)
        hub.update("org/model", folder / "local")
        result = ablate(folder)
        assert result.exit_code == 1
        assert f"org/model/{SHARD}: not a valid safetensors file" in result.stderr


def test_link_needs_files_here(case):
    _, folder = case
    assert "org/model is not on this machine" in ablate(folder, "--link").stderr
    assert (
        "--cache is for sources on the Hub"
        in run("ablate", folder / "local", folder / "out", *options(folder, "--cache")).stderr
    )
