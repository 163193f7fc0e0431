"""Ranks that make a repository: one process's bytes in one commit, and nothing on the main branch before `finish`."""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from command_line import run
from hub.edits import SHARDS, ablate
from hub.hub_server import small_blob
from hub.object_store import fill
from raw_checkpoints import hidden, write_adapter, write_directions, write_llama

from ablate_shards.surgery.checkpoint.object_store import UNFINISHED
from ablate_shards.surgery.hub import branch
from ablate_shards.surgery.hub.branch import BRANCH
from ablate_shards.surgery.machine.ranks import deal

OUT = "hub:me/edited"
COMMIT = "POST /api/models/me/edited/commit/"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(branch, "_TURN", (0.01, 0.02))


def part(source, index, count, *more):
    return ablate(source, OUT, "--worker-rank", index, "--world-size", count, *more)


def all_parts(source, count, *more):
    for index in reversed(range(count)):
        made = part(source, index, count, *more)
        assert made.exit_code == 0, made.stderr


def published(hub, repo="me/edited"):
    """Returns the files of a repository, but with its name out of the card."""
    files = {name: blob.data or blob.sha256 for name, blob in hub.repos[repo].files().items()}
    if "README.md" in files:
        files["README.md"] = files["README.md"].replace(repo.encode(), b"IT")
    return files


def is_empty(hub):
    return list(hub.repos["me/edited"].files()) == [".gitattributes"]


def assert_finished(hub):
    """It is what one process makes, in one commit, and nothing is left of the parts."""
    repo = hub.repos["me/edited"]
    assert published(hub) == published(hub, "you/edited")
    assert repo.messages.count("Edited with ablate-shards") == 1
    assert list(repo.refs) == ["main"]


def plain(source, *more):
    made = ablate(source, "hub:you/edited", *more)
    assert made.exit_code == 0, made.stderr


@pytest.mark.parametrize(
    ("source", "count"), [("org/model", 2), ("org/model", 7), ("local", 3), ("memory://bucket/model", 2)]
)
def test_any_number_makes_what_one_makes(on_hub, store, source, count):
    hub, folder = on_hub
    fill(store, "/bucket/model", folder / "local")
    plain(source, "--private")
    for index in reversed(range(count)):
        made = part(source, index, count, "--private")
        assert made.exit_code == 0, made.stderr
        assert f"rank {index} of {count} is complete; once all are: ablate-shards finish hub:me/edited" in made.stdout
        assert is_empty(hub)
    assert hidden(folder) == []
    assert "it was complete already" in part(source, 0, count).stderr
    finished = run("finish", OUT)
    assert finished.exit_code == 0, finished.stderr
    assert "hub:me/edited is complete, with ablation.json" in finished.stdout
    assert f"published at {hub.endpoint}/me/edited/commit/{hub.repos['me/edited'].refs['main']}" in finished.stderr
    assert_finished(hub)
    assert hub.repos["me/edited"].private
    assert run("verify", source, OUT).exit_code == 0


def test_nothing_of_a_shard_passes_through_finish(on_hub):
    hub, _ = on_hub
    all_parts("org/model", 2)
    hub.seen.clear()
    assert run("finish", OUT).exit_code == 0
    assert not hub.requests("PUT ")
    assert not hub.requests("GET /blob/")
    assert len(hub.requests(f"{COMMIT}main")) == 1


def test_merging_is_shared_too(on_hub):
    hub, folder = on_hub
    adapter = write_adapter(folder / "other", layers=range(2), hidden=128)
    assert run("merge", "org/model", adapter, "hub:you/edited").exit_code == 0
    for index in range(2):
        ranks = ("--worker-rank", index, "--world-size", 2)
        assert run("merge", "org/model", adapter, OUT, *ranks).exit_code == 0
    assert run("finish", OUT).exit_code == 0
    assert published(hub) == published(hub, "you/edited")


def test_through_xet(on_hub, monkeypatch):
    from huggingface_hub import constants

    hub, folder = on_hub
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_store = folder / "xet"
    hub.xet_store.mkdir()
    plain("local")
    # More ranks than shards, so that some have none to send.
    all_parts("local", 6)
    assert run("finish", OUT).exit_code == 0
    assert published(hub) == published(hub, "you/edited")


def with_two_edits(folder):
    """Returns the rank of two that has two of the three shards with edits, and what it sends first and last."""
    before, after = (
        {path.name: path.read_bytes() for path in (folder / name).glob("*.safetensors")}
        for name in ("local", "ablated")
    )
    work = {name: len(before[name]) for name in SHARDS}
    edited = [name for name in SHARDS if before[name] != after[name]]
    for edit in json.loads((folder / "ablated" / "ablation.json").read_text())["tensors"]:
        work[edit["shard"]] += edit["bytes"][1] - edit["bytes"][0]
    shares = [[name for name in edited if name in share] for share in deal(work, 2)]
    rank = max(range(2), key=lambda rank: len(shares[rank]))
    first, last = shares[rank]
    return rank, first, last


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_rank_that_was_stopped_sends_what_its_branch_lacks(on_hub, tmp_path, monkeypatch, elsewhere):
    """Here its own ledger tells, and on another machine what it committed last."""
    hub, folder = on_hub
    plain("org/model")
    rank, first, last = with_two_edits(folder)
    monkeypatch.setattr(branch, "_COMMITS_EVERY", 0.0)
    hub.fault("PUT ", times=1)  # arrives
    hub.fault("PUT ", times=1, status=403)
    stopped = part("org/model", rank, 2)
    assert stopped.exit_code == 1
    assert "the token may not write to this repository" in stopped.stderr
    repo = hub.repos["me/edited"]
    own = {name for name in repo.files(BRANCH) if name.startswith(f"{rank}-of-2/")}
    assert own == {f"{rank}-of-2/{name}" for name in (first, UNFINISHED)}
    assert is_empty(hub)
    assert f"no rank is complete in me/edited@{BRANCH}; run each" in run("finish", OUT).stderr
    if elsewhere:
        (tmp_path / "elsewhere").mkdir()
        shutil.copy(folder / "d.safetensors", tmp_path / "elsewhere")
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert part("org/model", 1 - rank, 2).exit_code == 0
    refused = run("finish", OUT)
    assert (
        f"hub:me/edited: rank {rank} of 2 is not complete; run `ablate-shards ablate org/model {OUT}" in refused.stderr
    )
    source = hub.repos["org/model"].files()
    hub.seen.clear()
    again = shlex.split(re.search(r"run `ablate-shards (.+?)`", refused.stderr)[1])
    assert run(*again).exit_code == 0
    assert len(hub.requests("PUT ")) == 1
    assert hub.sent(f"GET /blob/.*{source[first].sha256}") <= 100_000  # its header
    assert hub.sent(f"GET /blob/.*{source[last].sha256}") > 100_000
    assert UNFINISHED not in " ".join(repo.files(BRANCH))
    assert run("finish", OUT).exit_code == 0
    assert_finished(hub)


def test_commits_of_unfinished_parts_are_few(on_hub, monkeypatch):
    hub, folder = on_hub
    all_parts("org/model", 2)
    assert len(hub.requests(COMMIT)) == 2
    # One that the Hub does not take now is no reason to end.
    hub.repos.pop("me/edited")
    monkeypatch.setattr(branch, "_COMMITS_EVERY", 0.0)
    rank, _, _ = with_two_edits(folder)
    for status in (429, 409):
        hub.fault(COMMIT, times=1, status=status, headers={"Retry-After": "60"})
    made = part("org/model", rank, 2)
    assert made.exit_code == 0, made.stderr
    assert made.stderr.count("still refuses; wait some minutes and run again; so what has arrived will be") == 1
    assert len(hub.requests(COMMIT)) == 5
    assert hub.repos["me/edited"].messages.count(f"Part of rank {rank} of 2") == 1


@pytest.mark.parametrize("different", ["plan", "source", "number"])
@pytest.mark.parametrize("complete", [True, False])
def test_ranks_that_do_not_do_the_same(on_hub, monkeypatch, different, complete):
    hub, folder = on_hub
    if not complete:
        monkeypatch.setattr(branch, "_COMMITS_EVERY", 0.0)
        rank, _, _ = with_two_edits(folder)
        hub.fault("PUT ", times=1)
        hub.fault("PUT ", times=1, status=403)
        assert part("org/model", rank, 2).exit_code == 1
        for path in folder.glob(".hub-*"):  # on another machine
            shutil.rmtree(path, ignore_errors=True)
    else:
        rank = 0
        assert part("org/model", rank, 2).exit_code == 0
    source, count, more = "org/model", 2, ()
    if different == "plan":
        more, words = ("--coefficient", "2"), "the plan"
    elif different == "number":
        count, words = 3, "the number of ranks"
    else:
        write_llama(folder / "other", seed=5, hidden=128, shards=4)
        hub.add("org/other", folder / "other")
        source, words = "org/other", "the source"
    refused = part(source, 1 if complete else rank, count, *more)
    if complete:
        assert refused.exit_code == 1
        assert f"rank 0 of 2 is of another run, which differs in {words};" in refused.stderr
    elif different != "number":
        assert refused.exit_code == 1
        assert f"cannot be resumed, because {words} changed since the interrupted run; --overwrite" in refused.stderr
    assert refused.stderr.count("error:") <= 1
    all_parts(source, count, *more, "--overwrite")
    assert run("finish", OUT).exit_code == 0
    plain(source, *more)
    assert_finished(hub)


@pytest.mark.parametrize(
    "text", [b"{}", b"[]", b"{", b'{"identity": {}, "sent": {"x": 1}}', b'{"identity": 3, "sent": {}}']
)
def test_a_ledger_that_no_rank_wrote(on_hub, text):
    hub, _ = on_hub
    plain("org/model")
    assert part("org/model", 1, 2).exit_code == 0
    repo = hub.repos["me/edited"]
    repo.commit(BRANCH, repo.files(BRANCH) | {f"0-of-2/{UNFINISHED}": small_blob(text), "0-of-2/x": small_blob(b"")})
    refused = part("org/model", 0, 2)
    assert refused.exit_code == 1
    assert f"@{BRANCH}/0-of-2/{UNFINISHED}: is not what an interrupted rank wrote; --overwrite" in refused.stderr
    assert part("org/model", 0, 2, "--overwrite").exit_code == 0
    assert run("finish", OUT).exit_code == 0
    assert_finished(hub)


@pytest.mark.parametrize("elsewhere", [True, False])
def test_what_another_arithmetic_computed_is_made_again_when_asked(on_hub, monkeypatch, elsewhere):
    hub, folder = on_hub
    plain("org/model")
    rank, _, _ = with_two_edits(folder)
    monkeypatch.setattr(branch, "_COMMITS_EVERY", 0.0)
    with monkeypatch.context() as patch:
        identity = "ablate_shards.surgery.edit.blocks.BlockEditor.identity"
        patch.setattr(identity, lambda self: {"device": "cuda", "form": "triton"})
        hub.fault("PUT ", times=1)
        hub.fault("PUT ", times=1, status=403)
        assert part("org/model", rank, 2).exit_code == 1
    if elsewhere:
        for path in folder.glob(".hub-*"):
            shutil.rmtree(path, ignore_errors=True)
    assert "because the device and the form changed" in part("org/model", rank, 2).stderr
    all_parts("org/model", 2, "--overwrite")
    assert run("finish", OUT).exit_code == 0
    assert_finished(hub)


def test_parts_that_do_not_fit_are_not_joined(on_hub, monkeypatch):
    hub, _ = on_hub
    assert part("org/model", 0, 2).exit_code == 0
    monkeypatch.setattr("ablate_shards.surgery.edit.blocks.BlockEditor.identity", lambda self: {"device": "cuda"})
    assert part("org/model", 1, 2).exit_code == 0
    assert 'they differ in "device" in the receipt;' in run("finish", OUT).stderr
    assert is_empty(hub)


def test_parts_that_were_changed_are_not_joined(on_hub):
    hub, _ = on_hub
    all_parts("org/model", 2)
    repo = hub.repos["me/edited"]
    files = dict(repo.files(BRANCH))
    name = next(name for name in files if name.startswith("1-of-2/") and name.endswith(".safetensors"))
    repo.commit(BRANCH, {path: blob for path, blob in files.items() if path != name})
    assert f"me/edited@{BRANCH}/{name}: is gone, although its rank is complete" in run("finish", OUT).stderr
    assert is_empty(hub)
    files["1-of-2/ablation.json"] = small_blob(files["1-of-2/ablation.json"].data.replace(b'"rank": 1', b'"rank": 0'))
    repo.commit(BRANCH, files)
    assert "was changed after it was written; remove me/edited@" in run("finish", OUT).stderr
    assert is_empty(hub)


@pytest.mark.parametrize("status", [409, 412, 503])
def test_commits_wait_for_their_turn(on_hub, status):
    hub, _ = on_hub
    plain("org/model")
    hub.fault("POST /api/models/me/edited/branch/", times=1, status=409)
    hub.fault(COMMIT, times=2 if status == 503 else 9, status=status)
    all_parts("org/model", 2)
    hub.fault("DELETE /api/models/me/edited/branch/", times=1, status=status)
    assert run("finish", OUT).exit_code == 0
    assert_finished(hub)


def test_a_turn_that_never_comes(on_hub, monkeypatch):
    hub, _ = on_hub
    monkeypatch.setattr(branch, "_LONGEST_TURN", 0.0)
    hub.fault(COMMIT, times=1, status=409)
    refused = part("org/model", 0, 2)
    assert refused.exit_code == 1
    assert "someone else has committed meanwhile, so nothing was committed; run again" in refused.stderr
    assert part("org/model", 0, 2).exit_code == 0


@pytest.mark.parametrize("stopped", ["before the commit", "after the commit", "lost answer"])
def test_finish_goes_on_where_it_was_stopped(on_hub, monkeypatch, stopped):
    hub, _ = on_hub
    plain("org/model")
    all_parts("org/model", 2)
    place = "commit" if stopped.startswith("before") else "delete_branch"
    with monkeypatch.context() as patch:
        if stopped == "lost answer":
            hub.fault(f"{COMMIT}main", times=1, cut_after=3)
        else:
            patch.setattr(branch, place, lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
            assert run("finish", OUT).exit_code == 1
            assert is_empty(hub) == (place == "commit")
    again = run("finish", OUT)
    assert again.exit_code == 0, again.stderr
    assert_finished(hub)


def test_a_repository_that_holds_weights_is_replaced_when_asked(on_hub):
    hub, folder = on_hub
    write_llama(folder / "old", shards=1)
    (folder / "old" / "extra" / "merge.json").write_text("{}")
    hub.add("me/edited", folder / "old")
    before = hub.repos["me/edited"].files()
    refused = part("org/model", 0, 2)
    assert "holds weights already (model-00001-of-00001.safetensors); --overwrite replaces them" in refused.stderr
    assert list(hub.repos["me/edited"].refs) == ["main"]
    all_parts("org/model", 2, "--overwrite")
    assert "holds weights already" in run("finish", OUT).stderr
    assert hub.repos["me/edited"].files() == before
    assert run("finish", OUT, "--overwrite").exit_code == 0
    files = hub.repos["me/edited"].files()
    assert sorted(name for name in files if name.endswith(".safetensors")) == SHARDS
    assert run("verify", "org/model", OUT).exit_code == 0


def test_a_commit_by_someone_else_is_not_overwritten(on_hub, monkeypatch):
    hub, folder = on_hub
    all_parts("org/model", 2)
    publish = branch.commit

    def late(*arguments):
        hub.update("me/edited", folder / "local")
        return publish(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(branch, "commit", late)
        assert "someone else has committed meanwhile" in run("finish", OUT).stderr
    assert hub.repos["me/edited"].files()[SHARDS[0]].data == (folder / "local" / SHARDS[0]).read_bytes()
    assert BRANCH in hub.repos["me/edited"].refs


@pytest.mark.parametrize("source", ["org/model", "local"])
def test_what_the_hub_will_not_copy_passes_through_the_rank(on_hub, source):
    hub, _ = on_hub
    plain(source)
    hub.fault("POST .*/lfs-files/duplicate", times=9, status=403)
    all_parts(source, 3)
    assert run("finish", OUT).exit_code == 0
    assert_finished(hub)


def test_what_cannot_be_written(on_hub, monkeypatch):
    hub, _ = on_hub
    assert "no rank is complete in" in run("finish", "hub:me/nothing").stderr
    assert "me/nothing" not in hub.repos
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert "the token may not write to this repository" in part("org/model", 0, 2).stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "a token is needed to write" in part("org/model", 0, 2).stderr
    assert "a token is needed to write" in run("finish", OUT).stderr


#: A rank that soon asks again where others commit.
RANK = """
import sys
from ablate_shards.cli import main
from ablate_shards.surgery.hub import branch

branch._TURN = (0.05, 0.2)
main(sys.argv[1:])
"""

#: A rank that tells when it has committed a shard, and then waits to be killed.
HELD_UP = """
import sys, time
from pathlib import Path
from ablate_shards.cli import main
from ablate_shards.surgery.checkpoint.hub_store import HubStore
from ablate_shards.surgery.hub import branch

branch._TURN, branch._COMMITS_EVERY = (0.05, 0.2), 0.0
keep = branch._PartOnBranch.keep

def holding(self, ledger):
    while not HubStore(self.repo, branch.BRANCH).below(self.folder[:-1]).entries:  # others may commit
        keep(self, ledger)
    Path(sys.argv[1]).touch()
    time.sleep(600)

branch._PartOnBranch.keep = holding
main(sys.argv[2:])
"""


def test_six_ranks_at_once_two_of_them_killed(on_hub):
    """As six machines would, where the Hub takes one commit at a time."""
    hub, folder = on_hub
    source = write_llama(folder / "source", layers=6, shards=18, hidden=64)
    write_directions(folder / "six.safetensors", layers=6, hidden=64)
    words = ["ablate", "source", OUT, "-d", "six.safetensors", "--source-layer", "1", "--quiet"]
    assert run(*words[:2], "hub:you/edited", *words[3:]).exit_code == 0
    hub.commit_takes = 0.2
    killed = (1, 4)

    def start(rank, *how):
        (folder / f"machine-{rank}").mkdir(exist_ok=True)
        for name in ("source", "six.safetensors"):
            with contextlib.suppress(FileExistsError):
                (folder / f"machine-{rank}" / name).symlink_to(folder / name)
        return subprocess.Popen(
            [sys.executable, *how, *words, "--worker-rank", str(rank), "--world-size", "6"],
            cwd=folder / f"machine-{rank}",
            env=os.environ | hub.environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    marks = {rank: folder / f"mark-{rank}" for rank in killed}
    ranks = {
        rank: start(rank, "-c", HELD_UP, str(marks[rank])) if rank in killed else start(rank, "-c", RANK)
        for rank in range(6)
    }
    deadline = time.monotonic() + 120
    while not all(mark.exists() for mark in marks.values()):
        assert time.monotonic() < deadline
        assert all(ranks[rank].poll() is None for rank in killed), [ranks[r].communicate() for r in killed]
        time.sleep(0.05)
    for rank, process in ranks.items():
        if rank in killed:
            process.kill()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (-signal.SIGKILL if rank in killed else 0), errors
        shutil.rmtree(folder / f"machine-{rank}")
    assert is_empty(hub)
    assert "ranks 1, 4 of 6 are not complete; run `ablate-shards" in run("finish", OUT).stderr
    hub.seen.clear()
    for process in [start(rank, "-c", RANK) for rank in killed]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    # Three shards each, one of which had been committed.
    assert len(hub.requests("PUT ")) == 4
    assert is_empty(hub)
    finished = run("finish", OUT)
    assert finished.exit_code == 0, finished.stderr
    assert_finished(hub)
    assert run("verify", source, OUT).exit_code == 0
