"""Narrowing: what rows are left, that the adapter does it and no more, and what is refused."""

import json
import signal

import numpy as np
import pytest
import torch
from command_line import checked, run
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from progress import Heard
from raw_checkpoints import flip, write_directions
from safetensors.numpy import load_file
from tiny_models import TINY_MODELS, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.samples import write_samples
from ablate_shards.errors import ExecuteError, Interrupted, PlanError
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.model.samples import load_pairs, load_questions
from ablate_shards.surgery.narrow import narrowing as narrowing_module
from ablate_shards.surgery.narrow.narrowing import NarrowOptions, narrow
from ablate_shards.surgery.narrow.rows import Inputs, narrow_rows
from ablate_shards.surgery.plan.plan import make_plan
from ablate_shards.surgery.plan.recipe import AblateOptions

OPTIONS = NarrowOptions(length=8, dtype="float32")


def inputs_of(seed, count=12, width=20, contested=6):
    rng = np.random.default_rng(seed)
    kept = rng.standard_normal((count, width))
    return rng, rng.standard_normal((contested, width)) * 3, kept.T @ kept / count


# ---------------------------------------------------------------------------------------- the rows


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rank=st.integers(1, 6), rows=st.integers(1, 3))
def test_rows_are_projected_along_generalised_eigenvectors(seed, rank, rows):
    rng, contested, kept = inputs_of(seed)
    before = rng.standard_normal((rows, 20))
    found = narrow_rows(before, Inputs(contested, kept), rank)
    # By definition: whiten with the damped moment, take the largest eigenvectors there, go back.
    damped = kept + 0.01 * np.trace(kept) / 20 * np.eye(20)
    root = np.linalg.cholesky(damped)
    white = contested @ np.linalg.inv(root).T
    basis = np.linalg.svd(white)[2][:rank]
    np.testing.assert_allclose(found.rows, before @ root @ basis.T @ basis @ np.linalg.inv(root), rtol=1e-6, atol=1e-8)
    for share, moment in ((found.contested, contested.T @ contested), (found.kept, kept)):
        wanted = np.sqrt(np.trace(found.rows @ moment @ found.rows.T) / np.trace(before @ moment @ before.T))
        assert share == pytest.approx(wanted, rel=1e-6)


def test_as_many_directions_as_contested_inputs_change_nothing_for_those():
    rng, contested, kept = inputs_of(0)
    before = rng.standard_normal((1, 20))
    found = narrow_rows(before, Inputs(contested, kept), 50)
    np.testing.assert_allclose(contested @ found.rows.T, contested @ before.T, rtol=1e-7)
    assert found.contested == pytest.approx(1)
    assert found.kept < 1


def test_inputs_apart_are_told_apart():
    rng = np.random.default_rng(0)
    contested, kept = np.zeros((8, 20)), np.zeros((30, 20))
    contested[:, :10], kept[:, 10:] = rng.standard_normal((8, 10)), rng.standard_normal((30, 10))
    contested[:, 10:] = kept[:8, 10:]
    found = narrow_rows(rng.standard_normal((1, 20)), Inputs(contested, kept.T @ kept / 30), 8)
    assert found.kept < 0.2 < 0.5 < found.contested


@pytest.mark.parametrize("nothing", ["contested", "kept", "both"])
def test_inputs_that_are_nothing(nothing):
    rng, contested, kept = inputs_of(1)
    if nothing != "kept":
        contested = contested * 0
    if nothing != "contested":
        kept = kept * 0
    found = narrow_rows(rng.standard_normal((1, 20)), Inputs(contested, kept), 4)
    assert np.isfinite(found.rows).all()
    assert (found.rows == 0).all() == (nothing != "kept")


# ---------------------------------------------------------------------------------------- the adapter


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The demo's samples and directions, and prompts to be kept."""
    folder = tmp_path_factory.mktemp("world")
    write_samples(folder)
    checked("capture", MODEL, folder / "dump.safetensors", "--pairs", folder / "pairs.jsonl", "--dtype", "float32")
    checked("directions", folder / "dump.safetensors", folder / "d.safetensors")
    questions = [json.loads(line) for line in (folder / "questions.jsonl").read_text(encoding="utf-8").splitlines()]
    controls = [question for question in questions if question["group"] == "unrelated"]
    for name, part in (("keep", controls[::2]), ("asked", controls[1::2])):
        lines = [json.dumps({"id": each["id"], "language": "en", "prompt": each["prompt"]}) for each in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def arguments(world, adapter, *more):
    files = ("-d", world / "d.safetensors", "--pairs", world / "pairs.jsonl", "--keep", world / "keep.jsonl")
    return ("narrow", MODEL, adapter, *files, "--length", 8, "--dtype", "float32", *more)


@pytest.fixture(scope="module")
def made(world):
    result = checked(*arguments(world, world / "adapter", "--coefficient", 1.25))
    return world / "adapter", result


def test_the_adapter_removes_what_contested_inputs_have_of_the_direction(made, world):
    adapter, result = made
    told = json.loads((adapter / "narrowing.json").read_text(encoding="utf-8"))
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert {name.split(".lora_")[0].removeprefix("base_model.model.") for name in tensors} == {
        module["path"] for module in told["modules"]
    }
    network = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    directions = read_directions(world / "d.safetensors")
    for module in told["modules"]:
        name = f"base_model.model.{module['path']}.lora"
        down, up = tensors[f"{name}_A.weight"], tensors[f"{name}_B.weight"]
        basis = directions.basis[int(module["path"].split(".layers.")[1].split(".")[0])]
        # Biprojected, so nearly the direction itself, times the coefficient, away from the stream.
        assert abs(up[:, 0] @ basis[0]) / np.linalg.norm(up) > 0.5
        assert np.linalg.norm(up) == pytest.approx(1.25, rel=1e-5)
        whole = (up.T / -1.25) @ network.get_submodule(module["path"]).weight.detach().numpy()
        assert np.linalg.norm(down) < 3 * np.linalg.norm(whole)
        assert 0 < module["kept"] < module["contested"] < 1.1
    assert "of rank 1, written to" in result.stdout
    assert "ablate-shards merge" in result.stdout


def moved(base, model, prompts):
    """KL of the first token of an answer, nats, mean over prompts."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    found = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        given = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            before, after = (each(**given).logits[0, -1].log_softmax(-1) for each in (base, model))
        found.append(float((before.exp() * (before - after)).sum()))
    return np.mean(found)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft is behind
def test_merged_it_moves_contested_answers_and_spares_others(made, world):
    adapter, _ = made
    plain = ("--preserve", "none", "--coefficient", 1.25, "-d", world / "d.safetensors")
    checked("ablate", MODEL, world / "plain", *plain)
    checked("merge", MODEL, adapter, world / "merged")
    checked("verify", MODEL, world / "merged", "--adapter", adapter)
    base, ablated, narrowed = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (MODEL, world / "plain", world / "merged")
    )
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        stored, before = narrowed(ids).logits, base(ids).logits
        # peft loads it as it is; the merge differs by the rounding of bfloat16.
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), adapter)
        assert (adapted(ids).logits - stored).norm() < 0.3 * (before - stored).norm()
    contested = [pair.positive.prompt for pair in load_pairs(world / "pairs.jsonl")]
    asked = [question.prompt for question in load_questions(world / "asked.jsonl")]
    assert moved(base, narrowed, contested) > 0.5 * moved(base, ablated, contested) > 0.1
    assert moved(base, narrowed, asked) < 0.5 * moved(base, ablated, asked)


def test_the_same_inputs_give_the_same_bytes(made, world, tmp_path):
    adapter, _ = made
    again = checked(*arguments(world, tmp_path / "again", "--coefficient", 1.25, "--json"))
    for path in adapter.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    content = json.loads(again.stdout)
    assert content["adapter"] == str(tmp_path / "again")
    assert content["rank"] == 1


def test_what_does_not_fit_at_once_is_read_again(world, tmp_path, monkeypatch, made):
    adapter, _ = made
    monkeypatch.setattr(narrowing_module, "_ROOM", 1)
    checked(*arguments(world, tmp_path / "small", "--coefficient", 1.25))
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "small", adapter))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_a_merge_knows_the_checkpoint_that_it_was_made_for(made, world, tmp_path):
    adapter, _ = made
    for path in MODEL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    flip(tmp_path / "model.safetensors", -1)
    refused = run("merge", tmp_path, adapter, world / "other")
    assert refused.exit_code == 1
    assert "was trained on other weights" in refused.stderr


# ---------------------------------------------------------------------------------------- what is refused


def planned(folder, components):
    checkpoint = open_checkpoint(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    write_directions(folder / "d", layers=network.config.num_hidden_layers, hidden=network.config.hidden_size)
    options = AblateOptions(preserve="none", components=components)
    return checkpoint, make_plan(checkpoint, read_directions(folder / "d"), options), network


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3-moe", "qwen3-moe-fused"])
def test_writers_are_modules_whatever_they_are_called(tmp_path, name):
    components = ("attention",) if "moe" in name else ("attention", "mlp")
    checkpoint, plan, network = planned(save_tiny_model(TINY_MODELS[name], tmp_path / name), components)
    writers = narrowing_module._writers(checkpoint, plan, network)
    assert {writer.edit.name for writer in writers} == {edit.name for edit in plan.edits if edit.kind == "weight"}
    for writer in writers:
        assert writer.weight.shape[0] == network.config.hidden_size
        rows = writer.basis @ writer.weight.double().numpy()
        x = torch.randn(3, writer.width)
        bias = writer.linear.bias if writer.linear.bias is not None else 0
        made = (writer.linear(x) - bias).detach().double().numpy()
        np.testing.assert_allclose(made @ writer.basis.T, x.double().numpy() @ rows.T, atol=1e-4)


@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-fused"])
def test_routed_experts_are_refused(tmp_path, name):
    checkpoint, plan, network = planned(save_tiny_model(TINY_MODELS[name], tmp_path / name), ("mlp",))
    with pytest.raises(PlanError, match=r"experts\..*down_proj.*: is no linear module.*leave it out with --components"):
        narrowing_module._writers(checkpoint, plan, network)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--input-rank", 0), "--input-rank: expected at least 1, found 0"),
        (("--components", "embedding"), "is no linear module of the model"),
        (("--layers", "99"), "--layers names layer 99"),
    ],
)
def test_what_cannot_be_narrowed(world, tmp_path, more, words):
    refused = run(*arguments(world, tmp_path / "adapter", *more))
    assert refused.exit_code in (1, 2)
    assert words in refused.stderr
    assert refused.stderr.count("error:") == 1
    assert not (tmp_path / "adapter").exists()


def test_a_prompt_that_is_contested_and_kept(world, tmp_path):
    pair = json.loads((world / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[0])
    side = pair["positive"]
    prompt = side if isinstance(side, str) else side["prompt"]
    (tmp_path / "keep.jsonl").write_text(json.dumps({"id": "a", "language": "en", "prompt": prompt}), encoding="utf-8")
    refused = run(*arguments(world, tmp_path / "adapter", "--keep", tmp_path / "keep.jsonl"))
    assert "cannot be contested and kept; remove it from one" in refused.stderr


def test_what_is_in_the_way_stays(made, world):
    adapter, _ = made
    refused = run(*arguments(world, adapter))
    assert refused.exit_code == 1
    assert "already exists; --overwrite replaces it" in refused.stderr
    before = (adapter / "narrowing.json").read_bytes()
    checked(*arguments(world, adapter, "--overwrite", "--layers", "1-3"))
    assert (adapter / "narrowing.json").read_bytes() != before


def made_by(world, adapter, heard):
    return narrow(
        MODEL,
        adapter,
        read_directions(world / "d.safetensors"),
        load_pairs(world / "pairs.jsonl"),
        load_questions(world / "keep.jsonl"),
        AblateOptions(),
        OPTIONS,
        heard,
    )


def test_sigterm_leaves_nothing(world, tmp_path):
    class Ending(Heard):
        def count(self, done, total):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="nothing was written"):
        made_by(world, tmp_path / "adapter", Ending())
    assert not (tmp_path / "adapter").exists()


def test_a_full_disk_leaves_nothing(world, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(narrowing_module, "write_whole", full)
    with pytest.raises(ExecuteError, match="No space left on device; nothing was written"):
        made_by(world, tmp_path / "adapter", Heard())
    assert not any(tmp_path.iterdir())
