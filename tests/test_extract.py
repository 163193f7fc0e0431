"""Adapters made of edits: peft loads them on the source, and they do what the edit does."""

import json
import re
import shutil
import warnings

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from coded_checkpoints import FORMS, read_tensors, write_coded, write_fp8
from command_line import checked
from raw_checkpoints import HIDDEN, hidden, snapshot, write_adapter, write_directions, write_llama
from safetensors.numpy import load_file, save_file
from tiny_models import HIDDEN as TINY_HIDDEN
from tiny_models import TINY_MODELS, capture_stream, save_tiny_model

from ablate_shards.kernels import reference
from ablate_shards.surgery.checkpoint.stores import open_source
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.extract import extraction
from ablate_shards.surgery.extract.receipt import digest_of
from ablate_shards.surgery.plan.plan import make_plan
from ablate_shards.surgery.plan.recipe import AblateOptions

TOKENS = torch.arange(3, 27)[None]


def tiny_directions(folder, tiny):
    """Writes directions for the layers of a tiny model."""
    text = tiny.settings.get("text_config", tiny.settings)
    layers = text.get("num_hidden_layers") or text.get("n_layer") or len(text.get("layers_block_type", ()))
    return write_directions(folder / "directions.safetensors", layers=layers, hidden=TINY_HIDDEN)


def adapted(tiny, base, adapter):
    """Returns a tiny model with an adapter as peft applies it, and what peft warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(tiny.load(base), adapter)
    return model, [str(each.message) for each in caught]


def with_tensors_of(edited, source, names):
    """Puts tensors of the source back into an edited checkpoint of one shard."""
    tensors = load_file(edited / "model.safetensors")
    kept = load_file(source / "model.safetensors")
    save_file(tensors | {name: kept[name] for name in names}, edited / "model.safetensors", metadata={"format": "pt"})


def left_out(adapter):
    """Returns what the receipt of an adapter says is not in it: tensors and reasons."""
    return {skip["name"]: skip["reason"] for skip in json.loads((adapter / "adapter.json").read_text())["left_out"]}


@pytest.mark.parametrize("name", sorted(TINY_MODELS))
@pytest.mark.parametrize("preserve", ["none", "rows"])
def test_peft_does_with_the_adapter_what_the_edit_does(tmp_path, name, preserve):
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    words = ["-d", tiny_directions(tmp_path, tiny), "--no-biproject", "--components", "attention,mlp,embedding"]
    words += ["--preserve", preserve, "--coefficient", "0.9", "--quiet"]
    checked("ablate", base, tmp_path / "edited", *words)
    full = [] if preserve == "none" else ["--adapter-rank", TINY_HIDDEN]
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter", *full)
    model, said = adapted(tiny, base, tmp_path / "adapter")
    assert not [text for text in said if "missing adapter keys" in text or "target_" in text]
    missing = left_out(tmp_path / "adapter")
    with_tensors_of(tmp_path / "edited", base, [name for name, why in missing.items() if "tied to" not in why])
    wanted, source = capture_stream(tiny.load(tmp_path / "edited")), capture_stream(tiny.load(base))
    found = capture_stream(model.get_base_model())
    for edited, plain, with_adapter in zip(wanted, source, found, strict=True):
        assert (edited - plain).norm() > 1e-3 * edited.norm()
        torch.testing.assert_close(with_adapter, edited, rtol=1e-4, atol=1e-4 * float(edited.abs().max()))


def test_a_checkpoint_without_the_prefix_of_its_model_is_adapted_in_that_model(tmp_path):
    tiny = TINY_MODELS["gpt2"]
    base = save_tiny_model(tiny, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    bare = {name.removeprefix("transformer."): values for name, values in tensors.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    words = ["-d", tiny_directions(tmp_path, tiny), "--preserve", "none", "--quiet"]
    checked("ablate", base, tmp_path / "edited", *words)
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter")
    model, said = adapted(tiny, base, tmp_path / "adapter")
    assert not [text for text in said if "missing adapter keys" in text]
    wanted = capture_stream(tiny.load(tmp_path / "edited"))
    for found, edited in zip(capture_stream(model.get_base_model()), wanted, strict=True):
        torch.testing.assert_close(found, edited, rtol=1e-4, atol=1e-4 * float(edited.abs().max()))


# ------------------------------------------------------------------------------------------- rank and measurements


@pytest.fixture
def base(tmp_path):
    return write_llama(tmp_path / "base")


def edit_of(tmp_path, *words):
    return ["-d", write_directions(tmp_path / "directions.safetensors"), *words, "--quiet"]


def receipt_of(adapter):
    return json.loads((adapter / "adapter.json").read_text())


def update_of(adapter, path):
    """Returns B·A of a linear module, float64."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{path}.lora_{factor}.weight"].astype(np.float64) for factor in "AB")
    return up @ down


@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("coefficient", [1.0, 2.5])
def test_the_component_is_the_edits_and_the_rest_is_the_best_of_its_rank(tmp_path, base, rank, coefficient):
    words = edit_of(tmp_path, "--coefficient", coefficient)
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter", "--adapter-rank", rank)
    receipt = receipt_of(tmp_path / "adapter")
    options = AblateOptions(coefficient=coefficient)
    plan = make_plan(open_source(base), read_directions(tmp_path / "directions.safetensors"), options)
    weights = read_tensors(base)
    records = {record["tensors"][0]["name"]: record for record in receipt["modules"]}
    for edit in plan.edits:
        basis, weight = torch.from_numpy(plan.bases[edit.basis]), weights[edit.name].double()
        edited, _ = reference.ablate(weight, basis, coefficient=coefficient, preserve=edit.preserve)
        change, record = edited - weight, records[edit.name]
        update = torch.from_numpy(update_of(tmp_path / "adapter", record["path"]))
        torch.testing.assert_close(basis @ update, basis @ change, rtol=1e-4, atol=1e-5 * float(change.norm()))
        rest = change - basis.T @ (basis @ change)
        values = torch.linalg.svdvals(rest)
        best = float(values[rank - 1 :].square().sum().sqrt() / change.norm())
        found = float((change - update).norm() / change.norm())
        assert best - 1e-6 <= found <= 1.05 * best + 1e-5
        assert record["error"] == pytest.approx(found, rel=1e-3, abs=1e-5)
        assert record["before"] == pytest.approx(float((basis @ weight).norm() / weight.norm()), rel=1e-5)
        assert record["edited"] == pytest.approx(float((basis @ edited).norm() / edited.norm()), rel=1e-3, abs=1e-6)
        merged = (weight + update).bfloat16().double()
        assert record["after"] == pytest.approx(float((basis @ merged).norm() / merged.norm()), rel=1e-3, abs=1e-6)
        assert record["left"] < 0.01


def test_without_kept_norms_the_rank_is_that_of_the_directions(tmp_path, base):
    words = ["-d", write_directions(tmp_path / "directions.safetensors", rank=2), "--preserve", "none", "--quiet"]
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (2, 2, {})
    assert all(record["error"] < 1e-4 and record["rank"] == 2 for record in receipt_of(tmp_path / "adapter")["modules"])
    said = checked("ablate", base, tmp_path / "a", *words, "--adapter", "--adapter-rank", 1, code=2).output
    assert "there are 2 directions per layer" in said


def test_the_rank_grows_until_the_limit_holds(tmp_path, base, monkeypatch):
    monkeypatch.setattr(extraction, "RANK", 2)
    checked("ablate", base, tmp_path / "adapter", *edit_of(tmp_path, "--coefficient", 2), "--adapter")
    modules = receipt_of(tmp_path / "adapter")["modules"]
    assert max(record["rank"] for record in modules) > 2
    assert all(record["error"] <= extraction.LIMIT for record in modules)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    for record in modules:
        pattern = [rank for key, rank in config["rank_pattern"].items() if re.fullmatch(key, record["path"])]
        assert (pattern or [config["r"]]) == [record["rank"]]


def test_merging_the_adapter_gives_the_edit(tmp_path, base):
    words = edit_of(tmp_path, "--preserve", "columns")
    checked("ablate", base, tmp_path / "edited", *words)
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter", "--adapter-rank", HIDDEN)
    checked("merge", base, tmp_path / "adapter", tmp_path / "merged", "--quiet")
    edited, merged = read_tensors(tmp_path / "edited"), read_tensors(tmp_path / "merged")
    for name, tensor in edited.items():
        assert float((merged[name] != tensor).double().mean()) < 1e-3


def test_codes_give_an_adapter_of_what_they_stand_for(tmp_path):
    base = write_fp8(tmp_path / "base")
    hidden_size = json.loads((base / "config.json").read_text())["hidden_size"]
    directions = write_directions(tmp_path / "directions.safetensors", layers=2, hidden=hidden_size)
    words = ["-d", directions, "--no-biproject", "--preserve", "none", "--quiet"]
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter")
    records = receipt_of(tmp_path / "adapter")["modules"]
    assert records
    assert all(record["before"] > 1e-2 and record["after"] < 1e-6 and record["error"] < 1e-4 for record in records)
    assert "measured again" in checked("verify", base, tmp_path / "adapter").output


# ------------------------------------------------------------------------------------------- the folder


def test_jobs_memory_and_runs_do_not_change_a_byte(tmp_path, base):
    words = edit_of(tmp_path)
    checked("ablate", base, tmp_path / "one", *words, "--adapter", "--jobs", 1)
    checked("ablate", base, tmp_path / "two", *words, "--adapter", "--jobs", 3, "--memory", "8MB")
    assert snapshot(tmp_path / "one") == snapshot(tmp_path / "two")
    assert set(snapshot(tmp_path / "one")) == {"adapter.json", "adapter_config.json", "adapter_model.safetensors"}


def test_a_dry_run_writes_nothing_and_json_has_the_figures(tmp_path, base):
    words = edit_of(tmp_path)[:-1]
    shown = checked("ablate", base, tmp_path / "adapter", *words, "--adapter", "--dry-run").output
    assert "an adapter would change 6 modules" in shown
    plan = json.loads(checked("ablate", base, tmp_path / "adapter", *words, "--adapter", "--dry-run", "--json").stdout)
    assert len(plan["modules"]) == 6
    assert not (tmp_path / "adapter").exists()
    found = json.loads(checked("ablate", base, tmp_path / "adapter", *words, "--adapter", "--json").stdout)
    assert {"rank", "error", "before", "edited", "after", "left"} == set(next(iter(found["modules"].values())))
    assert "lacks at most" in checked("ablate", base, tmp_path / "b", *words, "--adapter").output


def test_only_a_folder_that_a_run_made_is_replaced(tmp_path, base):
    words = edit_of(tmp_path)
    out = tmp_path / "adapter"
    checked("ablate", base, out, *words, "--adapter")
    before = snapshot(out)
    assert "already exists" in checked("ablate", base, out, *words, "--adapter", code=1).output
    checked("ablate", base, out, *words, "--adapter", "--overwrite", "--preserve", "none")
    assert snapshot(out) != before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("mine")
    assert (
        "not replaced" in checked("ablate", base, tmp_path / "mine", *words, "--adapter", "--overwrite", code=1).output
    )


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_run_that_ends_early_leaves_nothing(tmp_path, base, monkeypatch, error):
    def fail(*_, **__):
        raise error

    words = edit_of(tmp_path)
    monkeypatch.setattr(extraction, "write_safetensors", fail)
    shown = checked("ablate", base, tmp_path / "adapter", *words, "--adapter", code=1).output
    assert "nothing was written" in shown
    assert not (tmp_path / "adapter").exists()
    assert not hidden(tmp_path)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["out", "--adapter-rank", 4], "add --adapter"),
        (["out", "--adapter", "--link"], "--link"),
        (["out", "--adapter", "--device", "cuda"], "computed on the CPU"),
    ],
)
def test_what_says_nothing_about_an_adapter_is_refused(tmp_path, base, words, said):
    out, *rest = words
    assert said in checked("ablate", base, tmp_path / out, *edit_of(tmp_path), *rest, code=2).output


# ------------------------------------------------------------------------------------------- what is left out


def test_what_an_adapter_cannot_carry_is_named(tmp_path):
    tiny = TINY_MODELS["gpt-oss"]
    base = save_tiny_model(tiny, tmp_path / "base")
    words = ["-d", tiny_directions(tmp_path, tiny), "--no-biproject"]
    said = " ".join(checked("ablate", base, tmp_path / "adapter", *words, "--adapter").output.split())
    assert (
        "not in the adapter: 2 x model.layers.*.mlp.experts.down_proj_bias: peft carries the biases of linear" in said
    )


@pytest.mark.parametrize(("name", "way"), [("gpt2", "added"), ("qwen3", "replaced")])
def test_biases_are_carried(tmp_path, name, way):
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    checked("ablate", base, tmp_path / "adapter", "-d", tiny_directions(tmp_path, tiny), "--adapter", "--quiet")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["lora_bias"], config["bias"]) == ((True, "none") if way == "added" else (False, "lora_only"))
    assert not left_out(tmp_path / "adapter")


def test_a_head_that_is_tied_changes_with_the_embedding(tmp_path):
    tiny = TINY_MODELS["qwen2"]
    base = save_tiny_model(tiny, tmp_path / "base")
    words = ["-d", tiny_directions(tmp_path, tiny), "--components", "embedding", "--preserve", "none", "--quiet"]
    checked("ablate", base, tmp_path / "edited", *words)
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter")
    model, said = adapted(tiny, base, tmp_path / "adapter")
    assert not [text for text in said if "tied" in text or "missing" in text]
    with torch.no_grad():
        found, wanted = model(input_ids=TOKENS).logits, tiny.load(tmp_path / "edited")(input_ids=TOKENS).logits
        plain = tiny.load(base)(input_ids=TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert float((plain - wanted).norm()) > 1e-2 * float(wanted.norm())


def test_a_head_that_peft_does_not_tie_is_named(tmp_path):
    tiny = TINY_MODELS["gpt2"]
    base = save_tiny_model(tiny, tmp_path / "base")
    words = ["-d", tiny_directions(tmp_path, tiny), "--components", "embedding", "--quiet"]
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter")
    assert left_out(tmp_path / "adapter") == {
        "the output head": "tied to transformer.wte, and peft ties adapters of embed_tokens only"
    }


# ------------------------------------------------------------------------------------------- verify


def test_verify_measures_again_and_finds_what_was_changed(tmp_path, base):
    out = tmp_path / "adapter"
    checked("ablate", base, out, *edit_of(tmp_path), "--adapter")
    assert "6 modules measured again" in checked("verify", base, out).output
    tensors = load_file(out / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: tensors[name] * 1.01}, out / "adapter_model.safetensors")
    shown = checked("verify", base, out, code=1).output
    assert "another digest" in shown
    assert "but the receipt says" in shown
    receipt = receipt_of(out)
    receipt["files"]["adapter_model.safetensors"] = digest_of(out / "adapter_model.safetensors")
    (out / "adapter.json").write_text(seal({key: value for key, value in receipt.items() if key != "sha256"}))
    shown = checked("verify", base, out, code=1).output
    assert "another digest" not in shown
    assert "but the receipt says" in shown


def test_verify_refuses_another_source_and_a_broken_receipt(tmp_path, base):
    out = tmp_path / "adapter"
    checked("ablate", base, out, *edit_of(tmp_path), "--adapter")
    other = write_llama(tmp_path / "other", shards=1)
    assert "is not the source" in checked("verify", other, out, code=1).output
    receipt = receipt_of(out)
    del receipt["edits"]
    (out / "adapter.json").write_text(json.dumps(receipt))
    assert "not a complete receipt" in checked("verify", base, out, code=1).output


def test_a_fine_tune_with_the_same_headers_is_another_source(tmp_path):
    out, base, other = tmp_path / "adapter", write_llama(tmp_path / "base"), write_llama(tmp_path / "other", seed=1)
    checked("ablate", base, out, *edit_of(tmp_path), "--adapter")
    checked("diff", base, other, "--adapter", tmp_path / "found")
    for made in (out, tmp_path / "found"):
        assert "is what its receipt says" in checked("verify", base, made).output
        said = " ".join(checked("verify", other, made, code=1).output.split())
        assert "other: is not the source that" in said
        assert "name the checkpoint that the adapter was made of" in said
        told = " ".join(checked("merge", other, made, tmp_path / f"{made.name}-other").output.split())
        assert f"made of other weights than those of {other}" in told
        told = " ".join(checked("merge", base, made, tmp_path / f"{made.name}-base").output.split())
        assert "other weights" not in told


def test_an_adapter_that_was_changed_is_merged_with_a_note(tmp_path, base):
    out = tmp_path / "adapter"
    checked("ablate", base, out, *edit_of(tmp_path), "--adapter")
    tensors = load_file(out / "adapter_model.safetensors")
    save_file({name: values * 2 for name, values in tensors.items()}, out / "adapter_model.safetensors")
    told = " ".join(checked("merge", base, out, tmp_path / "merged").output.split())
    assert "was changed after adapter.json was written" in told


def test_values_that_cannot_be_measured_are_refused(tmp_path):
    base = save_tiny_model(TINY_MODELS["llama"], tmp_path / "base")
    tensors, name = load_file(base / "model.safetensors"), "model.layers.1.mlp.down_proj.weight"
    tensors[name][3, 4] = 3e38
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    words = ["-d", tiny_directions(tmp_path, TINY_MODELS["llama"]), "--no-biproject", "--adapter"]
    said = " ".join(checked("ablate", base, tmp_path / "adapter", *words, code=1).output.split())
    assert "model.layers.1.mlp.down_proj: holds values so large" in said
    assert not (tmp_path / "adapter").exists()


def test_what_is_about_models_says_what_an_adapter_is(tmp_path, base):
    out, prompts = tmp_path / "adapter", tmp_path / "prompts"
    prompts.write_text("hello")
    checked("ablate", base, out, *edit_of(tmp_path), "--adapter")
    for words, code, expected in (
        (("verify", base, out, "--adapter", out), 2, "holds an adapter itself; leave it out"),
        (
            ("evaluate", out, "-o", tmp_path / "e.json", "--device", "cpu"),
            1,
            "with `ablate-shards merge MODEL ADAPTER OUT`",
        ),
        (("report", out), 1, "holds an adapter, whose figures are in adapter.json"),
        (("inspect", out), 0, "an adapter: 6 updates, 12 tensors"),
        (("inspect", out), 0, f"check it with: ablate-shards verify SOURCE {out}"),
        (("inspect", out, "--derive"), 1, "holds an adapter, not a model"),
        (("diff", base, out), 1, "holds an adapter, not a model"),
    ):
        assert expected in " ".join(checked(*words, code=code).output.split()), words


# ------------------------------------------------------------------------------------------- of two checkpoints


def perturbed(base, out, *, kept=("norm", "ln_")):
    """Copies a tiny model with noise on every weight but those whose names hold a word."""
    shutil.copytree(base, out)
    rng = np.random.default_rng(7)
    tensors = load_file(out / "model.safetensors")
    for name, values in tensors.items():
        if not any(word in name for word in kept):
            tensors[name] = values + 0.05 * rng.standard_normal(values.shape).astype(np.float32)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "qwen2",
        "qwen3-moe-fused",
        "mixtral-fused",
        "gpt-oss",
        "gpt2",
        "gemma2",
        "phi",
        "deepseek-v3-fused",
        "qwen3-moe",
        "mixtral",
        "olmoe",
        "deepseek-v2",
        "deepseek-v3",
        "glm4-moe",
        "qwen2-moe",
        "qwen3-next",
        "lfm2-moe",
        "jamba",
        "nemotron-h",
        "qwen3.5-moe",
        "granite-hybrid-moe",
        "llama4",
    ],
)
def test_peft_makes_the_second_checkpoint_of_the_first(tmp_path, name):
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    other = perturbed(base, tmp_path / "other", kept=("norm", "ln_", "sinks", "correction_bias"))
    checked("diff", base, other, "--adapter", tmp_path / "adapter", "--adapter-rank", 128, "--quiet")
    model, said = adapted(tiny, base, tmp_path / "adapter")
    assert not [text for text in said if "missing adapter keys" in text]
    with_tensors_of(other, base, [name for name, why in left_out(tmp_path / "adapter").items() if "tied to" not in why])
    wanted, source = capture_stream(tiny.load(other)), capture_stream(tiny.load(base))
    for found, second, first in zip(capture_stream(model.get_base_model()), wanted, source, strict=True):
        assert (second - first).norm() > 1e-2 * second.norm()
        torch.testing.assert_close(found, second, rtol=1e-4, atol=1e-3 * float(second.abs().max()))
    assert "with the digests it records" in checked("verify", base, tmp_path / "adapter").output


@pytest.mark.parametrize("kind", ["gate_proj", "up_proj", "down_proj"])
def test_experts_that_do_not_differ_are_carried_along(tmp_path, kind):
    """transformers makes one parameter of all experts, so that one that differs takes the others with it."""
    tiny = TINY_MODELS["qwen3-moe"]
    base = save_tiny_model(tiny, tmp_path / "base")
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    name = f"model.layers.1.mlp.experts.2.{kind}.weight"
    noise = np.random.default_rng(7).standard_normal(tensors[name].shape).astype(np.float32)
    save_file(tensors | {name: tensors[name] + noise}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    checked("diff", base, tmp_path / "other", "--adapter", tmp_path / "adapter", "--adapter-rank", 32, "--quiet")
    [record] = receipt_of(tmp_path / "adapter")["modules"]
    assert len(record["tensors"]) == (4 if kind == "down_proj" else 8)
    model, said = adapted(tiny, base, tmp_path / "adapter")
    assert not [text for text in said if "missing adapter keys" in text]
    with torch.no_grad():
        found, wanted = model(input_ids=TOKENS).logits, tiny.load(tmp_path / "other")(input_ids=TOKENS).logits
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3)
    checked("merge", base, tmp_path / "adapter", tmp_path / "merged", "--quiet")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    np.testing.assert_allclose(merged[name], tensors[name] + noise, atol=1e-5)
    others = [each for each in tensors if each != name]
    assert all(np.allclose(merged[each], tensors[each], atol=1e-6) for each in others)


def dropped(word):
    return lambda tensors: {name: values for name, values in tensors.items() if word not in name}


def head_stored(tensors):
    return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}


def with_buffers(tensors):
    return tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}


DISPENSABLE = {
    "no multi-token prediction": ("qwen3.5", dropped("mtp."), "first checkpoint holds it, and it is no part of"),
    "no layer of its own for it": ("deepseek-v3", dropped("model.layers.3."), "and it is no part of the decoder"),
    "no vision tower": ("qwen3.5", dropped("visual"), "and it is no part of the decoder"),
    "a tied head stored too": ("qwen2", head_stored, "second checkpoint holds it, a copy of the embedding"),
    "buffers": ("llama", with_buffers, "and loaders compute it"),
}


@pytest.mark.parametrize("case", DISPENSABLE)
def test_what_the_decoder_does_without_may_be_in_one_of_two_checkpoints(tmp_path, case):
    name, change, reason = DISPENSABLE[case]
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    shutil.copytree(base, tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    changed = next(
        each
        for each in tensors
        if each.endswith("layers.1.self_attn.o_proj.weight") or "1.linear_attn.out_proj" in each
    )
    noise = np.random.default_rng(7).standard_normal(tensors[changed].shape).astype(np.float32)
    other = change(tensors | {changed: tensors[changed] + noise})
    save_file(other, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    checked("diff", base, tmp_path / "other", "--adapter", tmp_path / "adapter", "--adapter-rank", 32, "--quiet")
    receipt = receipt_of(tmp_path / "adapter")
    assert [record["tensors"][0]["name"] for record in receipt["modules"]] == [changed]
    assert receipt["left_out"]
    assert all(reason in skip["reason"] for skip in receipt["left_out"])
    assert str(tmp_path) not in json.dumps(receipt)


def test_codes_outside_of_the_decoder_may_have_their_scales_in_one_of_two_checkpoints(tmp_path):
    base = save_tiny_model(TINY_MODELS["qwen3.5"], tmp_path / "base")
    shutil.copytree(base, tmp_path / "other")
    tensors = safetensors.torch.load_file(base / "model.safetensors")
    coded = "model.visual.blocks.0.attn.proj.weight"
    tensors[coded] = tensors[coded].to(torch.float8_e4m3fn)
    changed = next(each for each in tensors if each.endswith("layers.1.mlp.down_proj.weight"))
    for folder, more in ((base, {f"{coded}_scale_inv": torch.ones(1, 1)}), (tmp_path / "other", {})):
        file, moved = folder / "model.safetensors", tensors[changed] + (0 if more else 1)
        safetensors.torch.save_file(tensors | {changed: moved} | more, file, metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(config))
    checked("diff", base, tmp_path / "other", "--adapter", tmp_path / "adapter", "--quiet")
    assert [record["tensors"][0]["name"] for record in receipt_of(tmp_path / "adapter")["modules"]] == [changed]
    assert "are not both read" in left_out(tmp_path / "adapter")[coded]


def test_extracting_undoes_a_merge(tmp_path):
    base = write_llama(tmp_path / "base", dtype="F32")
    adapter = write_adapter(tmp_path / "adapter", layers=range(3), rank=4)
    checked("merge", base, adapter, tmp_path / "merged", "--quiet")
    shown = checked("diff", base, tmp_path / "merged", "--adapter", tmp_path / "found", "--adapter-rank", 4).output
    assert "an adapter of 6 modules lacks at most 0.00% of a module's change" in shown
    for path in [record["path"] for record in receipt_of(tmp_path / "found")["modules"]]:
        wanted = 2 * update_of(adapter, path)
        np.testing.assert_allclose(update_of(tmp_path / "found", path), wanted, atol=1e-4 * np.abs(wanted).max())


def test_an_edit_is_extracted_from_what_it_made(tmp_path, base):
    words = ["-d", write_directions(tmp_path / "directions.safetensors"), "--preserve", "none", "--quiet"]
    checked("ablate", base, tmp_path / "edited", *words)
    checked("diff", base, tmp_path / "edited", "--adapter", tmp_path / "adapter", "--adapter-rank", 1, "--quiet")
    assert all(0 < record["error"] < 0.1 for record in receipt_of(tmp_path / "adapter")["modules"])


def test_what_two_checkpoints_cannot_give_is_refused(tmp_path, base):
    out = tmp_path / "adapter"
    assert "holds the same weights as" in checked("diff", base, base, "--adapter", out, code=1).output
    other = write_llama(tmp_path / "deeper", layers=4)
    assert "lacks model.layers.3." in checked("diff", base, other, "--adapter", out, code=1).output
    other = write_llama(tmp_path / "wider", hidden=2 * HIDDEN)
    assert "an adapter changes no shape" in checked("diff", base, other, "--adapter", out, code=1).output
    assert "add --adapter OUT" in checked("diff", base, other, "--adapter-rank", 4, code=2).output
    assert "shows no difference" in checked("diff", base, other, "--adapter", out, "--all", code=2).output
    assert not out.exists()


@pytest.mark.parametrize("form", FORMS)
def test_packed_codes_give_an_adapter_under_the_names_of_the_model(tmp_path, form):
    base = write_coded(tmp_path / "base", form)
    directions = write_directions(tmp_path / "directions.safetensors", layers=2, hidden=256)
    words = ["-d", directions, "--no-biproject", "--preserve", "columns", "--quiet"]
    checked("ablate", base, tmp_path / "adapter", *words, "--adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    places = [f"model.layers.{layer}.{name}" for layer in range(2) for name in ("mlp.down_proj", "self_attn.o_proj")]
    assert config["target_modules"] == places
    assert all(record["left"] < 1e-4 for record in receipt_of(tmp_path / "adapter")["modules"])
