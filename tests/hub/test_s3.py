"""SOURCE and OUT in S3, as s3fs speaks to it: against moto's server."""

import json
import signal
import subprocess
import sys

import s3fs
from command_line import run
from hub.edits import OPTIONS, SHARDS, ablate
from hub.object_store import held
from raw_checkpoints import snapshot

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.hub import objects


def weights(content):
    return {name: data for name, data in content.items() if name != "ablation.json"}


def test_from_s3_to_a_folder_and_back(s3, tmp_path):
    result = ablate("s3://bucket/model", "out")
    assert result.exit_code == 0, result.stderr
    expected = snapshot(tmp_path / "expected")
    assert weights(snapshot(tmp_path / "out")) == weights(expected)
    assert run("verify", "s3://bucket/model", "out").exit_code == 0
    result = ablate("local", "s3://bucket/edited")
    assert result.exit_code == 0, result.stderr
    assert held(s3, "bucket/edited") == expected


def test_from_s3_to_s3_resumed(s3, tmp_path, monkeypatch):
    send = objects._Target.send
    left = [1]

    def interrupted(self, path, name):
        if not left:
            raise KeyboardInterrupt
        left.pop()
        return send(self, path, name)

    monkeypatch.setattr(objects._Target, "send", interrupted)
    stopped = ablate("s3://bucket/model", "s3://bucket/edited")
    assert stopped.exit_code == 1
    assert "--resume goes on" in stopped.stderr
    assert not {"config.json", "ablation.json"} & set(held(s3, "bucket/edited"))
    sent = []

    def noted(self, path, name):
        sent.append(name)
        return send(self, path, name)

    monkeypatch.setattr(objects._Target, "send", noted)
    result = ablate("s3://bucket/model", "s3://bucket/edited", "--resume")
    assert result.exit_code == 0, result.stderr
    assert [name for name in sent if name.endswith(".safetensors")] == SHARDS[1:3]
    found = held(s3, "bucket/edited")
    assert weights(found) == weights(snapshot(tmp_path / "expected"))
    assert json.loads(found["ablation.json"])["source"]["name"] == "s3://bucket/model"
    assert "already exists; --overwrite" in ablate("s3://bucket/model", "s3://bucket/edited").stderr
    assert ablate("local", "s3://bucket/edited", "--overwrite").exit_code == 0
    assert held(s3, "bucket/edited") == snapshot(tmp_path / "expected")


KILLED = """
import os, signal, sys
from ablate_shards.cli import main
from ablate_shards.surgery.hub import objects

send, sent = objects._Target.send, []

def killing(self, path, name):
    if sent:
        os.kill(os.getpid(), signal.SIGKILL)
    sent.append(name)
    return send(self, path, name)

objects._Target.send = killing
main(sys.argv[1:])
"""


def test_a_run_that_is_killed_between_shards_goes_on(s3, tmp_path):
    arguments = ["ablate", "s3://bucket/model", "s3://bucket/edited", *OPTIONS, "--quiet"]
    command = [sys.executable, "-c", KILLED, *arguments]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    half = held(s3, "bucket/edited")
    assert any(name.endswith(".safetensors") for name in half)
    assert not {"config.json", "model.safetensors.index.json", "ablation.json"} & set(half)
    assert "is under way or was interrupted" in run("verify", "local", "s3://bucket/edited").stderr
    assert "half made; --resume goes on with it" in ablate("s3://bucket/model", "s3://bucket/edited").stderr
    result = ablate("s3://bucket/model", "s3://bucket/edited", "--resume")
    assert result.exit_code == 0, result.stderr
    assert weights(held(s3, "bucket/edited")) == weights(snapshot(tmp_path / "expected"))
    assert run("verify", "local", "s3://bucket/edited").exit_code == 0


def test_errors_of_s3_in_one_sentence(s3):
    result = ablate("local", "s3://there-is-no-such-bucket/edited")
    assert result.exit_code == 1
    assert "there is no such bucket; make it first" in result.stderr
    assert not s3.exists("there-is-no-such-bucket")
    assert "not found" in run("inspect", "s3://there-is-no-such-bucket/model").stderr
    assert "no such folder" in run("inspect", "s3://bucket/nothing").stderr


def test_verify_reads_both_from_s3_and_names_a_changed_bit(s3, tmp_path):
    assert ablate("s3://bucket/model", "s3://bucket/edited").exit_code == 0
    before = snapshot(tmp_path)
    for source in ("s3://bucket/model", "local"):
        result = run("verify", source, "s3://bucket/edited")
        assert result.exit_code == 0, result.stderr
        assert "s3://bucket/edited is what its receipt says" in result.stdout
    assert snapshot(tmp_path) == before
    tensors = open_checkpoint(tmp_path / "local").tensors
    for name in ("model.layers.1.mlp.down_proj.weight", "model.layers.2.mlp.up_proj.weight"):
        path = f"bucket/edited/{tensors[name].shard}"
        content = s3.cat_file(path)
        changed = bytearray(content)
        changed[tensors[name].start + 1001] ^= 1
        s3.pipe_file(path, bytes(changed))
        found = json.loads(run("verify", "s3://bucket/model", "s3://bucket/edited", "--json").stdout)
        assert [difference["where"] for difference in found["differences"]] == [name]
        s3.pipe_file(path, content)
    s3.rm_file("bucket/edited/ablation.json")
    refused = run("verify", "s3://bucket/model", "s3://bucket/edited")
    assert refused.exit_code == 1
    assert "s3://bucket/edited: holds no ablation.json" in refused.stderr


def test_credentials_that_are_not_there_are_one_sentence(s3, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    for result in (
        run("inspect", "s3://bucket/model"),
        run("verify", "local", "s3://bucket/edited"),
        ablate("local", "s3://bucket/edited", "--quiet"),
    ):
        assert result.exit_code == 1
        assert "without credentials (Unable to locate credentials); set them as for the store's own" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1
