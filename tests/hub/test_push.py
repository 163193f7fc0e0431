"""push: one commit, verified before and checked after, and a sentence for whatever is in the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from hub.edits import write_model
from raw_checkpoints import HIDDEN, snapshot, write_adapter, write_directions, write_llama, write_shard

BASE_CARD = "---\nlicense: apache-2.0\nlanguage: [en, zh]\npipeline_tag: text-generation\n---\n\n# Base\n"


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("two-shards"), hidden=HIDDEN, shards=2, card=BASE_CARD)


@pytest.fixture
def out(hub, two_shards, tmp_path, monkeypatch):
    """An edited checkpoint whose source is on the Hub, and a token that may write."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.add("org/model", two_shards / "local")
    if not (two_shards / "out").exists():
        # The commit's hash, which the receipt has, depends on the files alone.
        options = ("-d", two_shards / "d.safetensors", "--source-layer", "1")
        assert run("ablate", "org/model", two_shards / "out", *options).exit_code == 0
    shutil.copytree(two_shards, tmp_path, dirs_exist_ok=True)
    hub.seen.clear()
    return tmp_path / "out"


def contents(hub, repo="me/edited", revision="main"):
    return {name: blob.data for name, blob in hub.repos[repo].files(revision).items()}


def assert_published(hub, out, repo="me/edited", revision="main"):
    found = contents(hub, repo, revision)
    card = found.pop("README.md").decode()
    found.pop(".gitattributes", None)
    expected = snapshot(out)
    expected.pop("README.md", None)
    assert found == expected
    return card


def test_a_push_is_one_commit_of_exactly_the_folder(hub, out):
    result = run("push", out, "me/edited", "--private")
    assert result.exit_code == 0, result.stderr
    card = assert_published(hub, out)
    repo = hub.repos["me/edited"]
    assert repo.private
    assert len(repo.commits) == 2  # the empty one that makes the repository, and ours
    assert "base_model: org/model" in card
    assert "license: apache-2.0" in card
    assert f"is at {hub.endpoint}/me/edited/commit/" in result.stdout
    # A fresh receipt needs no second look at the source.
    assert not hub.requests("GET /blob/org/model")


def test_a_second_push_sends_nothing_and_a_new_file_goes_alone(hub, out):
    assert run("push", out, "me/edited").exit_code == 0
    before = len(hub.repos["me/edited"].commits)
    hub.seen.clear()
    again = run("push", out, "hub:me/edited")
    assert again.exit_code == 0
    assert again.stdout.startswith(f"nothing was sent: me/edited holds all of {out} already, at {hub.endpoint}/")
    assert len(hub.repos["me/edited"].commits) == before
    assert not hub.requests("PUT")
    assert not json.loads(run("push", out, "me/edited", "--json").stdout)["new"]
    assert run("push", out, "me/edited", "--quiet").output == ""
    (out / "notes.md").write_text("new")
    assert json.loads(run("push", out, "me/edited", "--json").stdout)["new"]
    assert not hub.requests("PUT")
    assert contents(hub)["notes.md"] == b"new"


def test_multipart_uploads(hub, out):
    hub.multipart_above, hub.part_size = 1000, 7000
    assert run("push", out, "me/edited").exit_code == 0
    assert len(hub.requests("PUT /part/")) > 4
    assert_published(hub, out)


def test_xet_uploads(hub, out, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet_store = tmp_path / "xet"
    hub.xet_store.mkdir()
    result = run("push", out, "me/edited", "--quiet")
    assert result.exit_code == 0, result.stderr
    assert hub.requests("GET .*/xet-write-token/")
    assert not hub.requests("PUT")
    files = hub.repos["me/edited"].files()
    assert all(files[path.name].size == path.stat().st_size for path in out.glob("*.safetensors"))


def test_a_pull_request_leaves_the_branch_alone(hub, out):
    hub.add("org/theirs", out)
    before = hub.repos["org/theirs"].refs["main"]
    result = run("push", out, "org/theirs", "--create-pr", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["url"].endswith("/discussions/1")
    assert hub.repos["org/theirs"].refs["main"] == before
    assert_published(hub, out, "org/theirs", "refs/pr/1")
    # And the pull request can be pushed to again.
    (out / "notes.md").write_text("more")
    assert run("push", out, "org/theirs", "--revision", "refs/pr/1", "--message", "Again").exit_code == 0
    assert hub.repos["org/theirs"].messages[-1] == "Again"
    assert contents(hub, "org/theirs", "refs/pr/1")["notes.md"] == b"more"
    assert hub.repos["org/theirs"].refs["main"] == before
    assert run("verify", "org/model", "org/theirs@refs/pr/1").exit_code == 0


def test_a_branch_is_made(hub, out):
    assert run("push", out, "me/edited", "--revision", "half/strength").exit_code == 0
    assert_published(hub, out, revision="half/strength")
    assert list(contents(hub)) == [".gitattributes"]


def test_a_dry_run_lists_and_writes_nothing(hub, out):
    hub.add("me/edited", out)
    (out / "notes.md").write_text("new\n")
    (out / "tokenizer.json").write_text("{ }")
    before = hub.repos["me/edited"].refs["main"]
    listed = json.loads(run("push", out, "me/edited", "--dry-run", "--json").stdout)
    states = {file["name"]: file["state"] for file in listed["files"]}
    sizes = {file["name"]: file["size"] for file in listed["files"]}
    assert sizes == {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*.*")} | {
        "README.md": len(listed["card"].encode())
    }
    assert states["notes.md"] == "new"
    assert states["tokenizer.json"] == states["README.md"] == "changed"
    assert states["model-00001-of-00002.safetensors"] == states["ablation.json"] == "same"
    assert hub.repos["me/edited"].refs["main"] == before
    shown = run("push", out, "me/edited", "--dry-run").stdout
    assert "me/edited exists: 3 files of" in shown
    assert "tokenizer.json is newer than ablation.json, so it would be verified first" in shown
    assert run("push", out, "me/other", "--dry-run").exit_code == 0
    assert "me/other" not in hub.repos
    # Nothing but a question about the card.
    assert {seen.path for seen in hub.requests("POST")} == {"/api/validate-yaml"}


def test_what_is_not_fresh_is_verified_against_the_source(hub, out):
    shard = out / "model-00001-of-00002.safetensors"
    later = time.time() + 5
    os.utime(shard, (later, later))
    result = run("push", out, "me/edited")
    assert result.exit_code == 0, result.stderr
    assert "is newer than ablation.json, so it is verified first" in result.stderr
    assert hub.requests("GET /blob/org/model")


def test_what_is_not_as_the_receipt_says_is_not_sent(hub, out):
    shard = out / "model-00001-of-00002.safetensors"
    with shard.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\1")
    os.utime(shard, (time.time() + 5, time.time() + 5))
    result = run("push", out, "me/edited")
    assert result.exit_code == 1
    assert "is not what its receipt says" in result.stderr
    assert "nothing was sent" in result.stderr
    assert "me/edited" not in hub.repos


def test_a_local_source_has_to_be_named(hub, out, tmp_path):
    made = tmp_path / "made"
    assert (
        run("ablate", tmp_path / "local", made, "-d", tmp_path / "d.safetensors", "--source-layer", "1").exit_code == 0
    )
    os.utime(made / "tokenizer.json", (time.time() + 5, time.time() + 5))
    result = run("push", made, "me/edited")
    assert result.exit_code == 1
    assert "add --source with what" in result.stderr
    assert run("push", made, "me/edited", "--source", tmp_path / "local", "--base-model", "org/model").exit_code == 0
    assert "base_model: org/model" in assert_published(hub, made)


def test_stale_weights_are_deleted_when_asked(hub, out, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    write_shard(old / "model.safetensors", {})
    (old / "kept.txt").write_text("kept")
    hub.add("me/edited", old)
    result = run("push", out, "me/edited")
    assert result.exit_code == 1
    assert "has model.safetensors, which" in result.stderr
    assert len(hub.repos["me/edited"].commits) == 1
    assert run("push", out, "me/edited", "--replace").exit_code == 0
    found = contents(hub)
    assert "model.safetensors" not in found
    assert found["kept.txt"] == b"kept"
    assert len(hub.repos["me/edited"].commits) == 2


def test_the_base_is_not_replaced_by_its_own_edit(hub, out):
    before = dict(hub.repos["org/model"].refs)
    for more in ([], ["--dry-run"]):
        result = run("push", out, "org/model", *more)
        assert result.exit_code == 2
        assert "is what" in result.stderr
        assert "was made of, and would be replaced" in result.stderr
    assert hub.repos["org/model"].refs == before
    assert run("push", out, "org/model", "--revision", "edited").exit_code == 0
    assert hub.repos["org/model"].refs["main"] == before["main"]
    assert contents(hub, "org/model", "edited").keys() >= snapshot(out).keys()


def test_private_does_not_pretend_to_hide(hub, out):
    hub.add("me/edited", out)
    result = run("push", out, "me/edited", "--private")
    assert result.exit_code == 1
    assert "exists and is public, so --private would not hide" in result.stderr


def test_permissions_are_explained(hub, out, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    refused = run("push", out, "me/edited").stderr
    assert "the token may not write to this repository" in refused
    assert "give it write access to the repositories of me at https://huggingface.co/settings/tokens" in refused
    assert "hf_reader" not in refused
    monkeypatch.setenv("HF_TOKEN", "hf_unknown")
    assert "the Hub refuses the token; make one at" in run("push", out, "me/edited").stderr
    monkeypatch.delenv("HF_TOKEN")
    assert "a token is needed to write; log in with `hf auth login` or set HF_TOKEN" in run("push", out, "me/e").stderr
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.fault("POST /api/repos/create", status=404)
    assert (
        "nothing on the Hub that you may write; check the name, or log in" in run("push", out, "nobody/edited").stderr
    )
    assert set(hub.repos) == {"org/model"}


ROUTES = (
    "POST /api/repos/create",
    "POST /api/validate-yaml",
    "POST .*/preupload/",
    "POST .*/batch",
    "PUT ",
    "POST .*/verify$",
    "POST .*/commit/",
    "GET .*/tree/",
)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("route", ROUTES)
def test_a_busy_hub_is_waited_for(hub, out, route, status):
    seconds = "1" if "preupload" in route else "0"
    hub.fault(route, status=status, headers={"Retry-After": seconds})
    start = time.monotonic()
    result = run("push", out, "me/edited")
    assert result.exit_code == 0, result.stderr
    assert time.monotonic() - start >= int(seconds)
    assert_published(hub, out)
    assert len(hub.repos["me/edited"].commits) == 2


@pytest.mark.parametrize("route", ROUTES)
def test_a_connection_that_breaks_is_made_again(hub, out, route):
    hub.fault(route, hang_up=True)
    result = run("push", out, "me/edited")
    assert result.exit_code == 0, result.stderr
    assert_published(hub, out)
    assert len(hub.repos["me/edited"].commits) == 2


def test_a_connection_that_breaks_in_the_middle_of_an_upload(hub, out):
    """Far into a file, when what the sockets hold is full."""
    hub.add("org/model", out.parent / "local")
    wide = out.parent / "wide"
    write_llama(out.parent / "wide_source", layers=2, hidden=1024, shards=1)
    write_directions(out.parent / "wide_d.safetensors", layers=2, hidden=1024)
    options = ("-d", out.parent / "wide_d.safetensors", "--source-layer", "1")
    assert run("ablate", out.parent / "wide_source", wide, *options).exit_code == 0
    hub.fault("PUT ", times=2, hang_up=True)
    result = run("push", wide, "me/edited")
    assert result.exit_code == 0, result.stderr
    assert len(hub.requests("PUT ")) == 3
    assert_published(hub, wide)


def test_what_arrives_with_a_wrong_checksum_is_refused_and_pushed_again(hub, out):
    hub.fault("PUT ", garble=True)
    refused = run("push", out, "me/edited")
    assert refused.exit_code == 1
    assert refused.stderr.splitlines()[-1].startswith("error: me/edited: the Hub answered 400 (checksum mismatch)")
    assert list(contents(hub)) == [".gitattributes"]
    assert run("push", out, "me/edited").exit_code == 0
    assert_published(hub, out)


def test_a_killed_push_shows_nothing_and_is_resumed(hub, out):
    hub.fault("POST .*/commit/", pause=3, status=503)
    environment = os.environ | hub.environment
    command = [sys.executable, "-m", "ablate_shards", "push", str(out), "me/edited"]
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not hub.requests("POST .*/commit/"):
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert list(contents(hub)) == [".gitattributes"]
    assert len(hub.requests("PUT ")) == 2
    hub.seen.clear()
    assert run("push", out, "me/edited").exit_code == 0
    assert not hub.requests("PUT ")
    assert_published(hub, out)


def test_a_lost_answer_makes_no_second_commit(hub, out):
    hub.fault("POST .*/commit/", cut_after=5)
    result = run("push", out, "me/edited")
    assert result.exit_code == 0, result.stderr
    assert_published(hub, out)
    assert len(hub.repos["me/edited"].commits) == 2


def test_a_commit_by_someone_else_meanwhile_is_not_overwritten(hub, out, tmp_path, monkeypatch):
    from huggingface_hub import HfApi

    hub.add("me/edited", out)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "README.md").write_text("theirs")
    send = HfApi.create_commit

    def late(*arguments, **settings):
        hub.update("me/edited", theirs)
        return send(*arguments, **settings)

    monkeypatch.setattr(HfApi, "create_commit", late)
    result = run("push", out, "me/edited")
    assert result.exit_code == 1
    assert "someone else has committed meanwhile, so nothing was committed; run again" in result.stderr
    assert contents(hub)["README.md"] == b"theirs"


def test_an_interrupted_push_is_resumed_without_sending_twice(hub, out):
    hub.fault("POST .*/commit/", times=50, status=500)
    result = run("push", out, "me/edited")
    assert result.exit_code == 1
    assert "the Hub answered 500" in result.stderr
    assert list(contents(hub)) == [".gitattributes"]
    hub.faults.clear()
    hub.seen.clear()
    assert run("push", out, "me/edited").exit_code == 0
    assert not hub.requests("PUT")
    assert_published(hub, out)


def test_a_card_that_the_hub_refuses_stops_the_push_before_anything_is_made(hub, out, tmp_path):
    bad = tmp_path / "bad.md"
    bad.write_text("---\nlicense: nonsense\nlanguage: zh-Hant\n---\n# Mine\n")
    for more in ([], ["--dry-run"]):
        result = run("push", out, "me/edited", "--card", bad, *more)
        assert result.exit_code == 1
        assert "the Hub refuses the metadata of the card (\"license\" must be one of a list, found 'nonsense'" in (
            result.stderr
        )
        assert "from another card with --card" in result.stderr
    assert set(hub.repos) == {"org/model"}
    bad.write_text("---\nlicense: mit\n---\n# Mine\n")
    assert run("push", out, "me/edited", "--card", bad).exit_code == 0
    assert "# Mine" in assert_published(hub, out)
    assert hub.requests("POST /api/validate-yaml")


def test_what_arrived_otherwise_is_told(hub, out, monkeypatch):
    assert run("push", out, "me/edited").exit_code == 0
    hub.repos["me/edited"].files()["tokenizer.json"].oid = "0" * 40
    # The client may believe that all is as it should be: the checksums do not.
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "create_commit", lambda self, *_, **__: _Info(hub))
    result = run("push", out, "me/edited")
    assert result.exit_code == 1
    assert "me/edited: tokenizer.json did not arrive as in" in result.stderr


class _Info:
    def __init__(self, hub):
        self.oid, self.pr_url, self.commit_url = hub.repos["me/edited"].refs["main"], None, "url"


def test_only_what_was_made_is_published(hub, out):
    for name in (".env", ".cache/token", "__pycache__/a.pyc", "checkpoint-10/optimizer.pt", "x.lock"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("secret")
    assert run("push", out, "me/edited").exit_code == 0
    assert not any(b"secret" in data for data in contents(hub).values())


def test_folders_of_something_else_are_refused(hub, out, tmp_path):
    for folder in (tmp_path / "nothing", tmp_path / "local"):
        result = run("push", folder, "me/edited")
        assert result.exit_code == 2
    assert "holds no ablation.json, merge.json, dequantisation.json or adapter_config.json" in result.stderr
    assert "expected a repository such as me/my-model" in run("push", out, "just-a-name").stderr
    receipt = out / "ablation.json"
    receipt.write_text("{}")
    assert run("push", out, "me/edited").exit_code == 1


def test_an_adapter(hub, tmp_path, out):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "org/model", "r": 16})
    )
    write_shard(adapter / "adapter_model.safetensors", {})
    (adapter / "training.json").write_text(
        json.dumps({"format": "ablate-shards.training/1", "options": {"rank": 16, "epochs": 3}, "loss": [1.5] * 40})
    )
    (adapter / "README.md").write_text("---\nlibrary_name: peft\n---\n[More Information Needed]\n")
    result = run("push", adapter, "me/adapter")
    assert result.exit_code == 0, result.stderr
    card = assert_published(hub, adapter, "me/adapter")
    for words in (
        "library_name: peft",
        "base_model: org/model",
        "base_model_relation: adapter",
        "license: apache-2.0",
        "| options rank | 16 |",
        'AutoPeftModelForCausalLM.from_pretrained("me/adapter")',
        "vllm serve org/model --enable-lora --lora-modules adapter=me/adapter",
    ):
        assert words in card
    assert "More Information Needed" not in card
    (adapter / "adapter_model.safetensors").write_bytes(b"junk")
    assert "not a valid safetensors file" in run("push", adapter, "me/adapter").stderr


def test_the_adapter_of_an_edit(hub, two_shards, out, tmp_path):
    words = ("-d", two_shards / "d.safetensors", "--source-layer", "1", "--adapter", "--quiet")
    adapter, local = tmp_path / "adapter", tmp_path / "of-local"
    assert run("ablate", "org/model", adapter, *words).exit_code == 0
    assert run("ablate", two_shards / "local", local, *words).exit_code == 0
    # What is read from the Hub by ranges gives the same factors.
    name = "adapter_model.safetensors"
    assert (adapter / name).read_bytes() == (local / name).read_bytes()
    result = run("push", adapter, "me/adapter")
    assert result.exit_code == 0, result.stderr
    card = assert_published(hub, adapter, "me/adapter")
    for words in (
        "base_model: org/model",
        "base_model_relation: adapter",
        "- directional-ablation",
        "| what the adapter lacks of a module's change, at most |",
        "| with the adapter, at most |",
        "`ablate-shards verify org/model@",
        'AutoPeftModelForCausalLM.from_pretrained("me/adapter")',
    ):
        assert words in card
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 1}))
    result = run("push", adapter, "me/adapter")
    assert result.exit_code == 1
    assert "adapter_config.json was changed after it was made, so it is verified first" in result.stderr
    assert "is not what its receipt says" in result.stderr


def test_an_existing_card_keeps_what_people_wrote(hub, out):
    assert run("push", out, "me/edited").exit_code == 0
    files = hub.repos["me/edited"].files()
    card = files["README.md"].data.decode()
    theirs = (
        card.replace("# edited", "# Edited, by us").replace("license: apache-2.0", "license: mit")
        + "\nOur last word.\n"
    )
    theirs = theirs.replace("vllm serve", "VANDALISED")
    from hub.hub_server import small_blob

    files["README.md"] = small_blob(theirs.encode())
    assert run("push", out, "me/edited").exit_code == 0
    kept = assert_published(hub, out)
    for words in ("# Edited, by us", "license: mit", "Our last word.", "vllm serve"):
        assert words in kept
    assert "VANDALISED" not in kept
    assert kept.count("ablate-shards: what follows is generated") == 1


def test_the_token_of_a_login_is_used(hub, out, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("hf_writer\n")
    assert run("push", out, "me/edited").exit_code == 0
    assert_published(hub, out)


def test_a_merge_is_verified_with_its_adapter(hub, out, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", layers=[0], modules=["mlp.down_proj"], rank=2)
    merged = tmp_path / "merged"
    assert run("merge", "org/model", adapter, merged).exit_code == 0
    os.utime(merged / "config.json", (time.time() + 5, time.time() + 5))
    result = run("push", merged, "me/merged", "--adapter", adapter, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["verified"]
    card = assert_published(hub, merged, "me/merged")
    for words in ("base_model: org/model", "- lora-merged", "| adapter r | 2 |", "## The merge"):
        assert words in card
    (adapter / "adapter_model.safetensors").write_bytes((out.parent / "d.safetensors").read_bytes())
    (merged / "notes.md").write_text("new")
    refused = run("push", merged, "me/merged", "--adapter", adapter)
    assert refused.exit_code == 1
    assert "notes.md" not in contents(hub, "me/merged")


def test_the_token_is_in_no_file_and_no_output(hub, out):
    result = run("push", out, "me/edited", "--debug")
    assert result.exit_code == 0
    assert "hf_writer" not in result.output
    assert not any(b"hf_writer" in (data or b"") for data in contents(hub).values())
    assert not any(b"hf_writer" in data for data in snapshot(Path.cwd()).values())
    for fault in ({"status": 403}, {"status": 500, "times": 50}):
        hub.fault("POST .*/commit/", **fault)
        (out / "notes.md").write_text(str(fault))
        refused = run("push", out, "me/edited", "--debug")
        assert refused.exit_code == 1, refused.output
        assert "Traceback" in refused.output
        assert "hf_writer" not in refused.output
    # The store of large files, another origin, is never sent the token.
    assert not any(seen.authorized for seen in hub.seen if seen.port == hub.store_port)
