"""verify where OUT, or SOURCE, is on the Hub or in an object store: the same findings, and nothing kept here."""

import json
import shutil
import tempfile

import pytest
from command_line import run
from hub.edits import write_model
from hub.hub_server import small_blob
from hub.object_store import fill
from raw_checkpoints import HIDDEN, flip, snapshot, write_adapter, write_llama

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.object_store import UNFINISHED
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.verify import proof as verify

SHARD = "model-00002-of-00002.safetensors"
OUT = "me/edited"
STORE = "memory://bucket/edited"


def found(*arguments):
    """What a verification finds, as JSON."""
    result = run("verify", *arguments, "--json")
    assert result.stdout, result.stderr
    content = json.loads(result.stdout)
    assert result.exit_code == bool(content["differences"])
    return content


@pytest.fixture(scope="module")
def two_shards(tmp_path_factory):
    folder = write_model(tmp_path_factory.mktemp("two-shards"), hidden=64, shards=2)
    write_adapter(folder / "adapter", layers=[1], modules=["mlp.down_proj"], hidden=64)
    return folder


@pytest.fixture
def case(hub, store, two_shards, tmp_path, monkeypatch):
    """A model on the Hub and in a store, and what ablating it gives in all three places."""
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    hub.add("org/model", two_shards / "local")
    if not (two_shards / "out").exists():
        # The commit's hash, which the receipt has, depends on the files alone.
        assert run("ablate", "org/model", two_shards / "out", *options(two_shards)).exit_code == 0
    shutil.copytree(two_shards, tmp_path, dirs_exist_ok=True)
    hub.add(OUT, tmp_path / "out")
    fill(store, "/bucket/edited", tmp_path / "out")
    fill(store, "/bucket/model", tmp_path / "local")
    hub.seen.clear()
    return hub


def options(folder):
    return ["-d", folder / "d.safetensors", "--source-layer", "1"]


def damaged(hub, store, folder):
    """Puts what a folder holds now in the other two places."""
    hub.update(OUT, folder)
    store.rm("/bucket/edited", recursive=True)
    fill(store, "/bucket/edited", folder)


@pytest.mark.parametrize("source", ["org/model", "hub:org/model", "local", "memory://bucket/model"])
@pytest.mark.parametrize("out", [OUT, f"hub:{OUT}", STORE, "out"])
def test_what_is_as_its_receipt_says(case, source, out, tmp_path):
    before = snapshot(tmp_path)
    content = found(source, out)
    assert content == {**found("local", "out"), "identical": 6, "edited": 6, "differences": [], "notes": []}
    assert snapshot(tmp_path) == before


def test_nothing_is_kept_here_and_each_byte_is_asked_for_in_pieces(case, tmp_path, monkeypatch):
    """Neither a file here nor a piece larger than a tensor: both would grow with the shards."""
    hub = case

    def refused(*_, **__):
        raise AssertionError("a file was made")

    for name in ("_CHUNK", "_REMOTE_CHUNK"):
        monkeypatch.setattr(verify, name, 4096)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refused)
    assert found("org/model", OUT)["differences"] == []
    weights = {blob.sha256 for blob in hub.repos[OUT].files().values() if blob.sha256}
    pieces = [seen for seen in hub.requests("GET /blob/") if seen.range and not seen.range.startswith("bytes=0-")]
    assert len(pieces) > 20
    largest = max(tensor.end - tensor.start for tensor in open_checkpoint(tmp_path / "local").tensors.values())
    assert max(seen.sent for seen in pieces) <= largest
    assert all(hub.sent(f"GET /blob/{OUT}/{digest}") > 0 for digest in weights)


def test_a_single_changed_bit_is_named_wherever_it_is(case, store, tmp_path):
    hub, out = case, tmp_path / "out"
    tensors = open_checkpoint(out).tensors
    edited = "model.layers.2.mlp.down_proj.weight"
    kept = "model.layers.2.mlp.up_proj.weight"
    for file, offset, named in (
        (tensors[edited].shard, tensors[edited].start + 2001, edited),
        (tensors[kept].shard, tensors[kept].end - 1, kept),
        (SHARD, 40, "the header"),
        ("config.json", 3, "config.json"),
        ("extra/notes.txt", 0, "extra/notes.txt"),
        ("ablation.json", 700, "ablation.json"),
    ):
        flip(out / file, offset)
        damaged(hub, store, out)
        results = [run("verify", "org/model", place, "--json") for place in ("out", OUT, STORE)]
        assert [result.exit_code for result in results] == [1, 1, 1]
        if results[0].stdout:
            contents = [json.loads(result.stdout) for result in results]
            assert contents[0]["differences"] == contents[1]["differences"] == contents[2]["differences"]
            assert named in [difference["where"] for difference in contents[0]["differences"]]
        else:
            # A receipt that cannot be read any more: the same sentence, but for where.
            places = zip(results, ("out", OUT, STORE), strict=True)
            said = [result.stderr.splitlines()[-1].replace(place, "OUT") for result, place in places]
            assert said[0] == said[1] == said[2]
            assert named in said[0]
        flip(out / file, offset)
    damaged(hub, store, out)
    assert found("org/model", OUT)["differences"] == []


def test_files_missing_cut_and_added(case, store, tmp_path):
    hub, out = case, tmp_path / "out"
    (out / "tokenizer.json").unlink()
    (out / "later.txt").write_text("later")
    (out / "report.html").write_text("drawn of it")
    shutil.copyfile(out / SHARD, out / "more.safetensors")
    (out / SHARD).write_bytes((out / SHARD).read_bytes()[:-1])
    damaged(hub, store, out)
    local = found("org/model", "out")
    assert {difference["where"] for difference in local["differences"]} == {"tokenizer.json", SHARD, "more.safetensors"}
    assert local["notes"] == ["later.txt was added after the edit"]
    for place in (OUT, STORE):
        assert found("org/model", place) == local
    (out / SHARD).unlink()
    damaged(hub, store, out)
    assert {"where": SHARD, "what": "missing"} in found("local", OUT)["differences"]


def test_a_receipt_that_lies_is_found(case, store, tmp_path):
    hub, out = case, tmp_path / "out"
    content = json.loads((out / "ablation.json").read_text())
    del content["sha256"]
    content["tensors"][0]["after"] /= 3
    (out / "ablation.json").write_text(seal(content))
    damaged(hub, store, out)
    for place in (OUT, STORE):
        (difference,) = found("org/model", place)["differences"]
        assert difference["where"] == content["tensors"][0]["name"]
        assert "the receipt records after" in difference["what"]


def test_what_was_published_is_what_its_receipt_says(case, tmp_path):
    """By a push, and from the Hub to the Hub: the card is the repository's own, and said to be."""
    assert run("push", "out", "me/pushed").exit_code == 0
    assert run("ablate", "org/model", "hub:me/transferred", *options(tmp_path)).exit_code == 0
    for repo in ("me/pushed", "me/transferred"):
        content = found("org/model", repo)
        assert content["differences"] == []
        assert content["notes"] == ["README.md is the repository's own, not the source's"]
    # A copy of it in a folder is no worse, but a README without the card's mark is none of a push.
    files = case.repos["me/pushed"].files()
    (tmp_path / "out" / "README.md").write_bytes(files["README.md"].data)
    assert found("org/model", "out")["notes"] == content["notes"]
    (tmp_path / "out" / "README.md").write_text("something else")
    assert [difference["where"] for difference in found("org/model", "out")["differences"]] == ["README.md"]


@pytest.mark.parametrize("out", ["hub:me/new", "memory://bucket/new"])
def test_the_command_that_a_run_ends_with_works(case, tmp_path, out):
    result = run("ablate", "org/model", out, *options(tmp_path))
    assert result.exit_code == 0, result.stderr
    source = f"org/model@{case.repos['org/model'].refs['main']}"
    assert result.stdout.endswith(f"check it with: ablate-shards verify {source} {out}\n")
    assert run("verify", source, out).exit_code == 0


def test_a_revision_stays_what_it_was(case, store, tmp_path):
    first = case.repos[OUT].refs["main"]
    flip(tmp_path / "out" / SHARD, -1)
    damaged(case, store, tmp_path / "out")
    assert found("org/model", OUT)["differences"] != []
    result = run("verify", "org/model", f"hub:{OUT}@{first}")
    assert result.exit_code == 0
    assert f"{OUT}@{first} is commit {first}" in result.stderr
    assert f"{OUT}@{first} is what its receipt says" in result.stdout


def test_a_source_that_has_moved_is_told(case, tmp_path):
    first = case.repos["org/model"].refs["main"]
    other = tmp_path / "local"
    flip(other / SHARD, -1)
    moved = case.update("org/model", other)
    content = found("org/model", OUT)
    assert len(content["differences"]) == 1
    said = f"the receipt is of commit {first}, and this is {moved}: compare it with org/model@{first}"
    assert said in content["notes"]
    assert found("org/model", OUT, "--cache") == content
    assert found(f"org/model@{first}", OUT)["differences"] == []
    case.update("org/model", write_llama(tmp_path / "smaller", hidden=HIDDEN))
    refused = run("verify", "org/model", OUT)
    assert refused.exit_code == 1
    assert f"is not the source that {OUT}/ablation.json names" in refused.stderr
    assert f"compare it with org/model@{first}" in refused.stderr


def test_a_merge(case, tmp_path):
    assert run("merge", "org/model", "adapter", "merged").exit_code == 0
    case.add("me/merged", tmp_path / "merged")
    assert found("org/model", "me/merged", "--adapter", "adapter")["recomputed"]
    assert not found("org/model", "me/merged")["recomputed"]
    name = "model.layers.1.mlp.down_proj.weight"
    tensor = open_checkpoint(tmp_path / "merged").tensors[name]
    flip(tmp_path / "merged" / tensor.shard, tensor.start)
    case.update("me/merged", tmp_path / "merged")
    for more in ([], ["--adapter", "adapter"]):
        (difference,) = found("org/model", "me/merged", *more)["differences"]
        assert difference["where"] == name
    assert "the receipt of an ablation" in run("verify", "org/model", OUT, "--adapter", "adapter").stderr


@pytest.mark.parametrize("place", ["org/model", OUT])
def test_connections_that_break_are_taken_up_where_they_broke(case, place):
    weights = sum(blob.size for blob in case.repos[place].files().values() if blob.sha256)
    case.fault(f"GET /blob/{place}", times=5, cut_after=3000)
    case.fault(f"GET /{place}/resolve", times=2, status=503, headers={"Retry-After": "0"})
    case.fault(f"GET /{place}/resolve", times=2, status=429, headers={"Retry-After": "0"})
    assert found("org/model", OUT)["differences"] == []
    assert any(seen.sent == 3000 for seen in case.requests(f"GET /blob/{place}"))
    # Headers twice at most, edited tensors (small ones here) once or, in OUT, twice.
    assert case.sent(f"GET /blob/{place}") < 2.5 * weights


@pytest.mark.parametrize("place", ["org/model", OUT])
def test_what_cannot_be_read_is_an_error_and_no_difference(case, place):
    (digest,) = {case.repos[place].files()[SHARD].sha256}
    case.fault(f"GET /blob/{place}/{digest}", times=1)  # the header, where it is read
    case.fault(f"GET /blob/{place}/{digest}", times=500, status=503)
    result = run("verify", "org/model", OUT)
    assert result.exit_code == 1
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith(f"error: {place}/{SHARD}: the Hub answered 503")


def test_errors_say_what_and_where(case, store, tmp_path, monkeypatch):
    store.pipe(f"/bucket/half/{UNFINISHED}", b"{}")
    case.add("me/private", tmp_path / "out", private=True)
    case.add("me/gated", tmp_path / "out", gated=True)
    monkeypatch.delenv("HF_TOKEN")
    for out, words in (
        ("me/nothing", "no repository on the Hub that you may read"),
        ("me/private", "no repository on the Hub that you may read"),
        ("me/gated", f"is gated; ask for access at {case.endpoint}/me/gated"),
        (f"{OUT}@nowhere", "there is no revision nowhere"),
        ("org/model", "org/model: holds no ablation.json; only what ablate-shards has made holds one"),
        ("memory://bucket/model", "memory://bucket/model: holds no ablation.json"),
        ("memory://bucket/nothing", "no such folder, or an empty one"),
        ("memory://bucket/half", "a run that makes it is under way or was interrupted"),
        ("nothing", "nothing: holds no ablation.json"),
    ):
        result = run("verify", "local", out, "--quiet")
        assert result.exit_code == 1
        assert words in result.stderr, result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_receipt_of_wrong_types_is_refused_in_a_sentence(case):
    files = case.repos[OUT].files()
    content = json.loads(files["ablation.json"].data)
    for changed in ({"tensors": None}, {"source": {**content["source"], "revision": 3}}, {"files": []}):
        files["ablation.json"] = small_blob(json.dumps(content | changed).encode())
        result = run("verify", "org/model", OUT, "--quiet")
        assert result.exit_code == 1
        assert result.stderr.startswith(f"error: {OUT}/ablation.json: not a complete receipt")
