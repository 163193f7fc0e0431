"""Verification finds a single changed bit anywhere, and names where it is."""

import json

import pytest
from click.testing import CliRunner
from raw_checkpoints import write_directions, write_llama

from ablate_shards.cli import cli
from ablate_shards.surgery.checkpoint import open_checkpoint


def run(*arguments):
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


@pytest.fixture
def edited(tmp_path):
    source = write_llama(tmp_path / "source")
    directions = write_directions(tmp_path / "d.safetensors")
    out = tmp_path / "out"
    result = run(source, out, "-d", directions, "--preserve", "rows", "--coefficient", 2.5, "--source-layer", 1)
    assert result.exit_code == 0, result.output
    assert run("verify", source, out).exit_code == 0
    return source, out


def flip(path, offset, bit=0):
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1 << bit
    path.write_bytes(raw)


@pytest.mark.parametrize("bit", [0, 6, 7])
def test_every_tensor_is_watched(edited, bit):
    source, out = edited
    for name, tensor in open_checkpoint(source).tensors.items():
        for offset in (tensor.start, (tensor.start + tensor.end) // 2, tensor.end - 1):
            flip(out / tensor.shard, offset, bit)
            result = run("verify", source, out)
            assert result.exit_code == 1
            assert name in result.stdout, result.output
            flip(out / tensor.shard, offset, bit)
    assert run("verify", source, out).exit_code == 0


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json", "extra/notes.txt"])
def test_every_sidecar_is_watched(edited, name):
    source, out = edited
    flip(out / name, 1)
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert name in result.stdout


def test_headers_are_watched(edited):
    source, out = edited
    for shard in open_checkpoint(source).shards:
        for offset in (8, 40):
            flip(out / shard.name, offset)
            result = run("verify", source, out)
            assert result.exit_code == 1
            assert shard.name in result.stdout
            flip(out / shard.name, offset)


def test_every_byte_of_the_receipt_is_watched(edited):
    source, out = edited
    path = out / "ablation.json"
    size = path.stat().st_size
    for offset in range(0, size, size // 60):
        flip(path, offset)
        result = run("verify", source, out)
        assert result.exit_code == 1, offset
        assert "ablation.json" in result.output
        flip(path, offset)
    assert run("verify", source, out).exit_code == 0


def test_a_receipt_that_lies_is_found(edited):
    """A forger who restores the digest still cannot claim another measurement."""
    from ablate_shards.surgery.receipt import read_receipt, seal

    source, out = edited
    content = dict(read_receipt(out).content)
    content["tensors"][0]["after"] = content["tensors"][0]["after"] / 3
    (out / "ablation.json").write_text(seal(content))
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert content["tensors"][0]["name"] in result.stdout
    assert "after" in result.stdout


def test_an_edit_that_the_receipt_hides_is_found(edited):
    from ablate_shards.surgery.receipt import read_receipt, seal

    source, out = edited
    content = dict(read_receipt(out).content)
    hidden = content["tensors"].pop()
    (out / "ablation.json").write_text(seal(content))
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert hidden["name"] in result.stdout


def test_files_missing_and_added(edited):
    source, out = edited
    (out / "tokenizer.json").unlink()
    (out / "report.html").write_text("later")
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert "tokenizer.json: missing" in result.stdout
    assert "report.html was added" in result.stdout
    (out / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert run("verify", source, out).exit_code == 0
    (out / "more.safetensors").write_bytes((out / "model-00001-of-00002.safetensors").read_bytes())
    assert run("verify", source, out).exit_code == 1


def test_truncated_shard(edited):
    source, out = edited
    path = out / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert path.name in result.stdout


def test_without_a_receipt_or_with_a_newer_one(edited, tmp_path):
    source, out = edited
    receipt = json.loads((out / "ablation.json").read_text())
    (out / "ablation.json").write_text(json.dumps(receipt | {"format": "ablate-shards.receipt/9"}))
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert "receipt/9" in result.output
    assert "ablation.json" in run("verify", source, tmp_path / "nothing").output


def test_another_source_is_refused(edited, tmp_path):
    _, out = edited
    other = write_llama(tmp_path / "other", layers=2)
    result = run("verify", other, out)
    assert result.exit_code == 1
    assert "is not the source" in result.output


def test_json(edited):
    source, out = edited
    content = json.loads(run("verify", source, out, "--json").stdout)
    assert content["differences"] == []
    assert content["edited"] == content["identical"] == 6
    flip(out / "config.json", 1)
    content = json.loads(run("verify", source, out, "--json").stdout)
    assert [difference["where"] for difference in content["differences"]] == ["config.json"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("shape", [1, 1]), ("bytes", [0, 10**9]), ("axis", -7), ("source_layer", 9), ("dtype", "I8"), ("gain", "none")],
)
def test_a_record_that_cannot_be_is_refused(edited, key, value):
    from ablate_shards.surgery.receipt import read_receipt, seal

    source, out = edited
    content = dict(read_receipt(out).content)
    content["tensors"][0][key] = value
    (out / "ablation.json").write_text(seal(content))
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert "does not fit the source" in result.stderr
