"""Verification finds a single changed bit anywhere, and names where it is."""

import copy
import functools
import json
import operator

import pytest
from command_line import run
from raw_checkpoints import flip, write_directions, write_llama

from ablate_shards.errors import VerifyError
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.edit.receipt import read_receipt, seal


@pytest.fixture
def edited(tmp_path):
    source = write_llama(tmp_path / "source")
    directions = write_directions(tmp_path / "d.safetensors")
    out = tmp_path / "out"
    result = run(source, out, "-d", directions, "--preserve", "rows", "--coefficient", 2.5, "--source-layer", 1)
    assert result.exit_code == 0, result.output
    assert run("verify", source, out).exit_code == 0
    return source, out


def receipt_of(out):
    content = json.loads((out / "ablation.json").read_text())
    del content["sha256"]
    return content


def reseal(out, content):
    """Does what a forger does: the digest holds again."""
    (out / "ablation.json").write_text(seal(content))


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
    source, out = edited
    content = receipt_of(out)
    content["tensors"][0]["after"] = content["tensors"][0]["after"] / 3
    reseal(out, content)
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert content["tensors"][0]["name"] in result.stdout
    assert "after" in result.stdout


def test_an_edit_that_the_receipt_hides_is_found(edited):
    source, out = edited
    content = receipt_of(out)
    hidden = content["tensors"].pop()
    reseal(out, content)
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert hidden["name"] in result.stdout


def test_files_missing_and_added(edited):
    source, out = edited
    (out / "tokenizer.json").unlink()
    (out / "notes.txt").write_text("later")
    (out / "report.html").write_text("drawn of it")
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert "tokenizer.json: missing" in result.stdout
    assert "notes.txt was added" in result.stdout
    assert "report.html" not in result.stdout
    (out / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    assert run("verify", source, out).exit_code == 0
    (out / "more.safetensors").write_bytes((out / "model-00001-of-00002.safetensors").read_bytes())
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert "more.safetensors" in result.stdout


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
    [
        ("shape", [1, 1]),
        ("bytes", [0, 10**9]),
        ("axis", -7),
        ("source_layer", 9),
        ("dtype", "I8"),
        ("gain", "none"),
        ("gain", "lm_head.weight"),
        ("references", [9]),
        ("kind", "bias"),
        ("axis", 0),
    ],
)
def test_a_record_that_cannot_be_is_refused(edited, key, value):
    source, out = edited
    content = receipt_of(out)
    content["tensors"][0][key] = value
    reseal(out, content)
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert "does not fit the source" in result.stderr


WRONG = [None, -1, "x", [], {}, [None], True, 1.5, 10**400, float("nan")]


def places(content, at=()):
    """Yields the way to every value, the first of each list."""
    for key in content if isinstance(content, dict) else range(min(len(content), 1)):
        yield (*at, key)
        if isinstance(content[key], dict | list):
            yield from places(content[key], (*at, key))


def test_a_receipt_of_wrong_types_is_refused_in_a_sentence(edited):
    """Whatever stands anywhere in a resealed receipt, it is read, or refused as a receipt."""
    _, out = edited
    whole = receipt_of(out)
    refused, sentences = set(), set()
    for place in places(whole):
        for wrong in WRONG:
            content = copy.deepcopy(whole)
            holder = functools.reduce(operator.getitem, place[:-1], content)
            holder[place[-1]] = wrong
            reseal(out, content)
            try:
                read_receipt(out)
            except VerifyError as error:
                refused.add(place)
                sentences.add(str(error))
    used = ("source", "shards", 0, "name"), ("tensors", 0, "dtype"), ("tensors", 0, "bytes"), ("files", "copied", 0)
    assert refused.issuperset(used)
    assert refused.issuperset(places(whole["tensors"][0], ("tensors", 0)))
    assert all("ablation.json: " in sentence and "\n" not in sentence for sentence in sentences)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        *((("source",), wrong) for wrong in (None, {}, [])),
        (("source", "shards", 0, "name"), ["x"]),
        (("files",), None),
        (("tensors", 0, "bytes"), []),
        (("tensors", 0, "dtype"), ["BF16"]),
        (("tensors", 0, "axis"), None),
        (("tensors", 0, "source_layer"), []),
        (("tensors", 0, "references"), [[]]),
        (("tensors", 0, "coefficient"), True),
        (("tensors", 0, "kind"), {}),
        (("directions", "basis", "1", "shape"), None),
        (("directions", "basis", "1", "shape"), -1),
        (("directions", "basis", "1", "shape"), [1, -1]),
        (("directions", "reference", "1", "float32"), "AADAfw=="),
    ],
)
def test_verify_says_that_a_receipt_of_wrong_types_is_none(edited, place, wrong):
    source, out = edited
    content = receipt_of(out)
    functools.reduce(operator.getitem, place[:-1], content)[place[-1]] = wrong
    reseal(out, content)
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert "ablation.json: not a complete receipt" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_what_is_missing_or_twice_in_a_receipt_is_refused(edited):
    source, out = edited
    whole = receipt_of(out)
    for key in ("source", "tensors", "directions", "files"):
        reseal(out, {name: value for name, value in whole.items() if name != key})
        assert f"not a complete receipt ('{key}')" in run("verify", source, out).stderr
    reseal(out, whole | {"tensors": whole["tensors"] * 2})
    assert "records a tensor twice" in run("verify", source, out).stderr
    for deep in ("[" * 100_000, json.dumps(whole)[:-1] + ', "more": ' + "[" * 500 + "]" * 500 + "}"):
        (out / "ablation.json").write_text(deep)
        result = run("verify", source, out)
        assert result.exit_code == 1
        assert "internal" not in result.output
    reseal(out, whole)
    assert run("verify", source, out).exit_code == 0


def test_a_changed_file_that_the_receipt_hides_is_found(edited):
    source, out = edited
    content = receipt_of(out)
    assert "config.json" in content["files"]["copied"]
    content["files"]["copied"].remove("config.json")
    reseal(out, content)
    differences = json.loads(run("verify", source, out, "--json").stdout)["differences"]
    assert [difference["where"] for difference in differences] == ["ablation.json"]
    flip(out / "config.json", 1)
    differences = json.loads(run("verify", source, out, "--json").stdout)["differences"]
    assert [difference["where"] for difference in differences] == ["ablation.json", "config.json"]


@pytest.mark.parametrize("name", ["more.txt", "../../more.txt"])
def test_a_file_that_the_source_does_not_have_is_not_of_the_receipt(edited, name):
    source, out = edited
    content = receipt_of(out)
    content["files"]["copied"].append(name)
    reseal(out, content)
    result = run("verify", source, out)
    assert result.exit_code == 1
    assert f"says that {name} was copied" in result.stdout


def test_a_file_added_to_the_source_later_is_a_note(edited):
    source, out = edited
    (source / "later.txt").write_text("later")
    result = run("verify", source, out)
    assert result.exit_code == 0
    assert "later.txt was added to the source" in result.stdout


def test_edits_are_counted_whatever_the_threads(edited):
    source, out = edited
    flip(
        out / "model-00001-of-00002.safetensors",
        open_checkpoint(source).tensors["model.layers.0.self_attn.o_proj.weight"].start,
    )
    content = json.loads(run("verify", source, out, "--json", "--jobs", 4).stdout)
    assert (content["edited"], content["identical"]) == (6, 5)
