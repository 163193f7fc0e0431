"""Merging on shards: equal to peft's own merge, every other byte kept, resumable, verified, refused by name."""

import hashlib
import json
import shutil
import time
import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from blake3 import blake3
from command_line import checked
from raw_checkpoints import decode, snapshot, tensor_bytes, write_directions, write_llama
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, TINY_MODELS, save_tiny_model, train_at_random

from ablate_shards.kernels import reference
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.digest import base_digest
from ablate_shards.surgery.edit import blocks as editor
from ablate_shards.surgery.edit.receipt import seal
from ablate_shards.surgery.machine.staging import Staging
from ablate_shards.surgery.merge.adapter import Adapter

ROOT = "base_model.model."


def write_adapter(folder, tensors, **config):
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    return folder


def factors(module, outer, inner, rank=4, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{ROOT}{module}.lora_A.weight": torch.randn(rank, inner, generator=generator).to(dtype) * 0.2,
        f"{ROOT}{module}.lora_B.weight": torch.randn(outer, rank, generator=generator).to(dtype) * 0.2,
    }


def llama_adapter(folder, *, layers=3, hidden=HIDDEN, **more):
    tensors = {}
    inner = hidden * 2 + 8
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        tensors |= factors(f"{prefix}self_attn.q_proj", hidden, hidden, seed=layer)
        tensors |= factors(f"{prefix}mlp.down_proj", hidden, inner, seed=layer + 10, dtype=torch.bfloat16)
    return write_adapter(folder, tensors, **more)


@pytest.fixture
def base(tmp_path):
    return write_llama(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path):
    return llama_adapter(tmp_path / "adapter")


# ------------------------------------------------------------------------------------------- peft


def merge_by_peft(name, folder, settings):
    """Saves a model, an adapter of random values and peft's own merge of the two; returns the merged tensors."""
    import peft

    tiny = TINY_MODELS[name]
    model_folder, adapter_folder = folder / "model", folder / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_tiny_model(tiny, model_folder)
        model = peft.get_peft_model(tiny.load(model_folder), peft.LoraConfig(**settings))
        train_at_random(model, 0.2)
        model.save_pretrained(adapter_folder)
        merged = model.merge_and_unload()
        merged.save_pretrained(folder / "by_peft", save_original_format=tiny.native)
    return load_file(folder / "by_peft" / "model.safetensors")


LINEAR = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
BY_PEFT = {
    "plain": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": LINEAR}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 6,
            "target_modules": LINEAR,
            "use_rslora": True,
            "rank_pattern": {r"layers\.1\.mlp\.up_proj": 2, "q_proj": 3},
            "alpha_pattern": {"^model.layers.0.self_attn.o_proj": 5},
        },
    ),
    "DoRA": ("llama", {"r": 4, "target_modules": [*LINEAR, "lm_head"], "use_dora": True, "use_rslora": True}),
    "biases": ("llama", {"r": 4, "target_modules": LINEAR, "lora_bias": True}),
    "trained biases": ("qwen2", {"r": 4, "target_modules": ["q_proj"], "bias": "lora_only"}),
    "conv1d and whole modules": (
        "gpt2",
        {"r": 4, "target_modules": ["c_attn", "c_proj", "wpe"], "fan_in_fan_out": True, "modules_to_save": ["ln_f"]},
    ),
    "vision, linear attention and prediction": ("qwen3.5", {"r": 4, "target_modules": [*LINEAR, "out_proj", "qkv"]}),
    "two towers of the same names": ("llava", {"r": 4, "target_modules": LINEAR}),
    "experts of their own": (
        "qwen3-moe",
        {"r": 2, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "fused experts": (
        "qwen3-moe-fused",
        {
            "r": 2,
            "target_modules": [],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
            "alpha_pattern": {r"experts\.down_proj": 5},
        },
    ),
    "transposed experts": ("gpt-oss", {"r": 2, "target_modules": [], "target_parameters": ["experts.down_proj"]}),
}


@pytest.mark.parametrize("case", BY_PEFT)
def test_the_result_is_that_of_peft(tmp_path, case):
    name, settings = BY_PEFT[case]
    expected = merge_by_peft(name, tmp_path, settings)
    out = tmp_path / "out"
    checked("merge", tmp_path / "model", tmp_path / "adapter", out)
    before, after = load_file(tmp_path / "model" / "model.safetensors"), load_file(out / "model.safetensors")
    receipt = json.loads((out / "merge.json").read_text())
    changed = {record["name"] for record in receipt["tensors"]}

    assert before.keys() == after.keys()
    assert before.keys() >= expected.keys()
    for tensor, values in after.items():
        if tensor in changed:
            torch.testing.assert_close(values, expected[tensor], rtol=1e-5, atol=1e-6)
            assert not torch.allclose(values, before[tensor], atol=1e-3)
        else:
            assert torch.equal(values, before[tensor])
            # What peft loses is what no transformers class loads.
            assert tensor in TINY_MODELS[name].extra or torch.equal(values, expected[tensor])
    assert not any(tensor.startswith("mtp.") for tensor in changed)
    checked("verify", tmp_path / "model", out, "--adapter", tmp_path / "adapter")


# ------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_accuracy_against_float64(tmp_path, dtype):
    base = write_llama(tmp_path / "base", hidden=96, layers=2, dtype=dtype)
    adapter = llama_adapter(tmp_path / "adapter", hidden=96, layers=2, use_rslora=True)
    out = tmp_path / "out"
    checked("merge", base, adapter, out, "--scale", "0.5")

    given, merged = tensor_bytes(base), tensor_bytes(out)
    values = load_file(adapter / "adapter_model.safetensors")
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    wrong = elements = 0
    for name, tensor in open_checkpoint(base).tensors.items():
        stem = ROOT + name.removesuffix(".weight")
        if f"{stem}.lora_A.weight" not in values:
            assert given[name] == merged[name]
            continue
        weight = torch.from_numpy(decode(given[name], dtype, tensor.shape))
        actual = torch.from_numpy(decode(merged[name], dtype, tensor.shape))
        up, down = values[f"{stem}.lora_B.weight"], values[f"{stem}.lora_A.weight"]
        exact = reference.merge(weight, up, down, 0.5 * 8 / 2)
        rounded = reference.round_to(exact, kind).double()
        assert not torch.equal(weight, actual)
        wrong, elements = wrong + int((rounded != actual).sum()), elements + rounded.numel()
        unit = torch.finfo(kind).eps * torch.maximum(weight.abs(), exact.abs())
        assert ((actual - exact).abs() <= unit).all()
    assert elements == 2 * (96 * 96 + 96 * 200)
    assert wrong <= 1e-3 * elements


def test_every_other_byte_stays(tmp_path, base, adapter):
    before = snapshot(base)
    out = tmp_path / "out"
    result = checked("merge", base, adapter, out)
    after = snapshot(out)

    assert snapshot(base) == before
    assert set(after) == (set(before) - {"pytorch_model.bin"}) | {"merge.json"}
    for name in before.keys() & after.keys():
        if name.endswith(".safetensors"):
            header = 8 + int.from_bytes(before[name][:8], "little")
            assert after[name][:header] == before[name][:header]
        else:
            assert after[name] == before[name]
    ours, theirs = tensor_bytes(out), tensor_bytes(base)
    changed = {name for name in theirs if ours[name] != theirs[name]}
    modules = ("self_attn.q_proj", "mlp.down_proj")
    assert changed == {f"model.layers.{layer}.{module}.weight" for layer in range(3) for module in modules}

    receipt = json.loads((out / "merge.json").read_text())
    assert {record["name"] for record in receipt["tensors"]} == changed
    record = receipt["tensors"][0]
    assert record["blake3"] == blake3(ours[record["name"]]).hexdigest()
    assert (record["rank"], record["scale"]) == (4, 2.0)
    weight, moved = (decode(raw[record["name"]], "BF16", record["shape"]) for raw in (theirs, ours))
    assert record["change"] == pytest.approx(np.linalg.norm(moved - weight) / np.linalg.norm(weight), rel=1e-2)
    assert "6 of 30 tensors" in result.output
    assert str(tmp_path) not in (out / "merge.json").read_text()


def test_jobs_and_memory_do_not_change_a_byte(tmp_path, base, adapter):
    wide = write_llama(tmp_path / "wide", hidden=512, layers=1, shards=1, dtype="F32")
    adapter = llama_adapter(tmp_path / "wide_adapter", hidden=512, layers=1)
    outs = []
    for number, more in enumerate([(), ("--jobs", 1, "--memory", "8MB"), ("--jobs", 3, "--memory", "64MB")]):
        out = tmp_path / f"out{number}"
        checked("merge", wide, adapter, out, *more)
        outs.append(snapshot(out))
    assert outs[0] == outs[1] == outs[2]


def test_threads_that_share_a_fused_tensor_share_its_factors(tmp_path, monkeypatch):
    merge_by_peft("qwen3-moe-fused", tmp_path, BY_PEFT["fused experts"][1])
    source, adapter = tmp_path / "model", tmp_path / "adapter"
    checked("merge", source, adapter, tmp_path / "alone", "--jobs", 1)
    reads = Counter()
    read = Adapter.read

    def slowly(self, name, *more):
        reads[name] += 1
        time.sleep(0.01)
        return read(self, name, *more)

    monkeypatch.setattr(Adapter, "read", slowly)
    monkeypatch.setattr(editor, "_PORTION", 1)
    checked("merge", source, adapter, tmp_path / "out", "--jobs", 4)
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "alone")
    assert reads
    assert set(reads.values()) == {1}


def test_a_scale_of_zero_and_an_untrained_adapter_change_nothing(tmp_path, base, adapter):
    assert "adds nothing: --scale is 0" in checked("merge", base, adapter, tmp_path / "out", "--scale", 0).output
    assert tensor_bytes(tmp_path / "out") == tensor_bytes(base)
    untrained = load_file(adapter / "adapter_model.safetensors")
    untrained = {name: value * 0 if "lora_B" in name else value for name, value in untrained.items()}
    result = checked("merge", base, write_adapter(tmp_path / "untrained", untrained), tmp_path / "other")
    assert "saved before it was trained" in result.output
    assert tensor_bytes(tmp_path / "other") == tensor_bytes(base)


def test_a_parameter_that_is_replaced_keeps_the_dtype_of_the_base(tmp_path, base):
    head = torch.randn(48, HIDDEN, generator=torch.Generator().manual_seed(5))
    adapter = write_adapter(tmp_path / "adapter", {f"{ROOT}lm_head.weight": head}, modules_to_save=["lm_head"])
    checked("merge", base, adapter, tmp_path / "out", "--scale", "3")
    raw = tensor_bytes(tmp_path / "out")["lm_head.weight"]
    assert torch.equal(torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(48, HIDDEN), head.bfloat16())


def test_the_names_of_another_wrapping_are_found(tmp_path, base):
    tensors = factors("model.language_model.layers.1.self_attn.q_proj", HIDDEN, HIDDEN)
    checked("merge", base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "out")
    ours, theirs = tensor_bytes(tmp_path / "out"), tensor_bytes(base)
    assert [name for name in ours if ours[name] != theirs[name]] == ["model.layers.1.self_attn.q_proj.weight"]


# ------------------------------------------------------------------------------------------- the command


def test_a_dry_run_and_json(tmp_path, base, adapter):
    shown = checked("merge", base, adapter, tmp_path / "out", "--dry-run")
    assert "would be changed" in shown.output
    assert not (tmp_path / "out").exists()
    plan = json.loads(checked("merge", base, adapter, tmp_path / "out", "--dry-run", "--json").stdout)
    assert len(plan["edits"]) == 6
    results = json.loads(checked("merge", base, adapter, tmp_path / "out", "--json").stdout)
    assert results["tensors"].keys() == {edit["name"] for edit in plan["edits"]}


@pytest.mark.parametrize("shards", [1, 2])
def test_an_interrupted_merge_goes_on(tmp_path, base, adapter, monkeypatch, shards):
    out = tmp_path / "out"
    checked("merge", base, adapter, tmp_path / "whole")
    record = Staging.record

    def recording(self, shard, content):
        record(self, shard, content)
        if len(self.done) == shards:
            raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "record", recording)
    assert "--resume" in checked("merge", base, adapter, out, code=1).output
    assert not out.exists()
    monkeypatch.undo()
    assert "the plan changed" in checked("merge", base, adapter, out, "--resume", "--scale", 2, code=1).output
    checked("merge", base, adapter, out, "--resume")
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_only_a_folder_that_a_run_made_is_replaced(tmp_path, base, adapter):
    out = tmp_path / "out"
    checked("merge", base, adapter, out)
    assert "--overwrite" in checked("merge", base, adapter, out, code=1).output
    checked("merge", base, adapter, out, "--overwrite", "--scale", 2)
    shutil.copytree(adapter, out / "adapter")
    held = checked("merge", base, out / "adapter", out, "--overwrite", code=2)
    assert f"holds {out / 'adapter'}, which would be replaced" in held.output
    assert "is not replaced" in checked("merge", base, adapter, adapter, "--overwrite", code=1).output
    assert (adapter / "adapter_config.json").is_file()
    checked("ablate", base, out, "-d", write_directions(tmp_path / "d.safetensors"), "--source-layer", 1, "--overwrite")
    assert not (out / "merge.json").exists()


def test_the_receipt_of_an_ablated_base_is_named_and_not_carried_over(tmp_path, base, adapter):
    ablated, out = tmp_path / "ablated", tmp_path / "out"
    checked("ablate", base, ablated, "-d", write_directions(tmp_path / "d.safetensors"), "--source-layer", 1)
    result = checked("merge", ablated, adapter, out)
    assert "ablation.json describes the weights of" in result.output
    assert not (out / "ablation.json").exists()
    digest = hashlib.sha256((ablated / "ablation.json").read_bytes()).hexdigest()
    assert json.loads((out / "merge.json").read_text())["base"] == [{"name": "ablation.json", "sha256": digest}]
    checked("verify", ablated, out, "--adapter", adapter)
    assert "differs from the source" in checked("verify", base, out, code=1).output


# ------------------------------------------------------------------------------------------- verify


def change_receipt(out, change):
    content = json.loads((out / "merge.json").read_text())
    change(content)
    content.pop("sha256")
    (out / "merge.json").write_text(seal(content))


def test_verify_finds_what_was_changed_since(tmp_path, base, adapter):
    out = tmp_path / "out"
    checked("merge", base, adapter, out)
    assert "the digests it records" in checked("verify", base, out).output
    assert "6 edited tensors recomputed, 6 to the bit" in checked("verify", base, out, "--adapter", adapter).output
    tensors = open_checkpoint(out).tensors
    path = {name: out / tensors[name].shard for name in tensors}
    for name, said in (
        ("model.layers.0.self_attn.q_proj.weight", "another digest"),
        ("model.layers.0.self_attn.k_proj.weight", "was not edited"),
    ):
        kept = path[name].read_bytes()
        with path[name].open("r+b") as file:
            file.seek(tensors[name].start + 5)
            file.write(bytes([kept[tensors[name].start + 5] ^ 0x40]))
        found = checked("verify", base, out, code=1).output
        assert name in found
        assert said in found
        assert name in checked("verify", base, out, "--adapter", adapter, code=1).output
        path[name].write_bytes(kept)
    checked("verify", base, out)


def test_verify_with_the_adapter_sees_through_a_forged_receipt(tmp_path, base, adapter):
    out, other = tmp_path / "out", tmp_path / "other"
    checked("merge", base, adapter, out)
    checked("merge", base, adapter, other, "--scale", 2)
    for shard in open_checkpoint(out).shards:
        shutil.copy(other / shard.name, shard.path)
    digests = {record["name"]: record for record in json.loads((other / "merge.json").read_text())["tensors"]}

    def forge(content):
        content["tensors"] = [{**record, "blake3": digests[record["name"]]["blake3"]} for record in content["tensors"]]

    change_receipt(out, forge)
    checked("verify", base, out)
    assert "but the edit gives" in checked("verify", base, out, "--adapter", adapter, code=1).output


def test_verify_refuses_what_does_not_belong_together(tmp_path, base, adapter):
    out = tmp_path / "out"
    checked("merge", base, adapter, out)
    another = llama_adapter(tmp_path / "another", lora_alpha=9)
    assert "is not the adapter" in checked("verify", base, out, "--adapter", another, code=1).output
    foreign = write_llama(tmp_path / "foreign", hidden=64)
    assert "is not the source" in checked("verify", foreign, out, code=1).output
    (out / "ablation.json").write_text("{}")
    assert "holds both" in checked("verify", base, out, code=1).output
    (out / "ablation.json").unlink()
    change_receipt(out, lambda content: content["tensors"].pop())
    assert "does not record what" in checked("verify", base, out, "--adapter", adapter, code=1).output
    change_receipt(out, lambda content: content["tensors"][0].update(shape=[1, 2]))
    assert "does not fit the source" in checked("verify", base, out, code=1).output
    change_receipt(out, lambda content: content.update(tensors=[{}]))
    assert "not a complete receipt" in checked("verify", base, out, code=1).output


# ------------------------------------------------------------------------------------------- refusals


def refusal(tmp_path, base, tensors, **config):
    adapter = write_adapter(tmp_path / "adapter", tensors, **config)
    result = checked("merge", base, adapter, tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    return result.output


def test_what_matches_no_weight_is_named(tmp_path, base):
    known = factors("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN)
    lost = "model.layers.7.self_attn.q_proj"
    said = refusal(tmp_path, base, known | factors(lost, HIDDEN, HIDDEN))
    assert f"{ROOT}{lost}.lora_A.weight matches no weight" in said
    for more in (
        {f"{ROOT}model.layers.0.extra.weight": torch.ones(3)},
        {f"{ROOT}model.layers.0.self_attn.q_proj.lora_B.bias": torch.ones(HIDDEN)},
    ):
        said = refusal(tmp_path, base, known | more)
        assert f"{next(iter(more))} matches no weight" in said


def test_what_does_not_fit_is_named(tmp_path, base):
    module = "model.layers.0.self_attn.k_proj"
    assert f"of shape [16, {HIDDEN}]" in refusal(tmp_path, base, factors(module, 20, HIDDEN))
    assert "expected rank 4" in refusal(tmp_path, base, factors(module, 16, HIDDEN, rank=3))
    pattern = {"k_proj": 3}
    assert "expected rank 3" in refusal(tmp_path, base, factors(module, 16, HIDDEN), rank_pattern=pattern)
    head = {f"{ROOT}lm_head.weight": torch.ones(50, HIDDEN)}
    said = refusal(tmp_path, base, head)
    assert "was trained with 50 tokens" in said
    assert "has 48; the rows of model.embed_tokens.weight for the others are not in it" in said
    wide = {f"{ROOT}lm_head.weight": torch.ones(48, HIDDEN + 1)}
    assert "lm_head.weight of shape [48, 32]" in refusal(tmp_path, base, wide)


def test_an_ambiguous_name_lists_the_candidates(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    weight = torch.randn(HIDDEN, HIDDEN)
    names = [f"{prefix}layers.0.self_attn.q_proj.weight" for prefix in ("model.", "language_model.")]
    save_file({name: weight.clone() for name in names}, folder / "model.safetensors")
    said = refusal(tmp_path, folder, factors("transformer.layers.0.self_attn.q_proj", HIDDEN, HIDDEN))
    assert all(name in said for name in names)


def test_two_changes_of_one_weight_are_refused(tmp_path, base):
    twice = factors("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN) | factors(
        "language_model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN
    )
    assert "both change model.layers.0.self_attn.q_proj.weight" in refusal(tmp_path, base, twice)


def test_another_base_is_refused(tmp_path, base, adapter):
    digest = base_digest(open_checkpoint(base))
    (adapter / "training.json").write_text(json.dumps({"base": {"sha256": digest}}))
    checked("merge", base, adapter, tmp_path / "out")
    edited = tmp_path / "edited"
    checked("ablate", base, edited, "-d", write_directions(tmp_path / "d.safetensors"), "--source-layer", 1)
    said = checked("merge", edited, adapter, tmp_path / "other", code=1).output
    assert "was trained on other weights" in said
    assert not (tmp_path / "other").exists()


def test_a_copy_of_another_embedding_is_refused(tmp_path, base):
    embedding = torch.from_numpy(
        decode(tensor_bytes(base)["model.embed_tokens.weight"], "BF16", (48, HIDDEN)).astype(np.float32)
    )
    name = f"{ROOT}model.embed_tokens"
    tensors = {
        f"{name}.lora_embedding_A": torch.randn(4, 48),
        f"{name}.lora_embedding_B": torch.randn(HIDDEN, 4),
        f"{name}.base_layer.weight": embedding.clone(),
    }
    checked("merge", base, write_adapter(tmp_path / "adapter", tensors), tmp_path / "good")
    tensors[f"{name}.base_layer.weight"][3, 4] += 1
    assert "was trained on other weights" in refusal(tmp_path, base, tensors)


def test_values_that_cannot_be_are_refused(tmp_path):
    base = write_llama(tmp_path / "base", dtype="F16")
    tensors = factors("model.layers.0.self_attn.q_proj", HIDDEN, HIDDEN)
    large = {name: value * 1e4 for name, value in tensors.items()}
    assert "beyond what F16 can hold" in refusal(tmp_path, base, large)
    broken = {name: value * torch.nan for name, value in tensors.items()}
    assert "holds NaN or infinite values; train it again" in refusal(tmp_path, base, broken)
    checkpoint = open_checkpoint(base)
    tensor = checkpoint.tensors["model.layers.0.self_attn.q_proj.weight"]
    with (base / tensor.shard).open("r+b") as file:
        file.seek(tensor.start)
        file.write(b"\xff\x7f")
    assert "q_proj.weight: holds NaN or infinite values, which" in refusal(tmp_path, base, tensors)


def test_an_adapter_that_changes_meanwhile_is_refused(tmp_path, base, adapter, monkeypatch):
    record = Staging.record

    def recording(self, shard, content):
        record(self, shard, content)
        llama_adapter(adapter, lora_alpha=9)

    monkeypatch.setattr(Staging, "record", recording)
    assert "changed while it was read" in checked("merge", base, adapter, tmp_path / "out", code=1).output
    assert not (tmp_path / "out").exists()


def dora_adapter(folder, module="model.layers.0.mlp.down_proj", outer=HIDDEN, inner=2 * HIDDEN + 8, norms=None):
    norms = torch.linspace(0.5, 2, outer) if norms is None else norms
    tensors = factors(module, outer, inner) | {f"{ROOT}{module}.lora_magnitude_vector": norms}
    return write_adapter(folder, tensors, use_dora=True)


def test_dora_gives_rows_the_norms_that_it_has_learned(tmp_path, base):
    name = "model.layers.0.mlp.down_proj.weight"
    dora_adapter(tmp_path / "adapter")
    checked("merge", base, tmp_path / "adapter", tmp_path / "out")
    checked("verify", base, tmp_path / "out", "--adapter", tmp_path / "adapter")
    checked("merge", base, tmp_path / "adapter", tmp_path / "again", "--jobs", "1", "--memory", "8MB")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "again")
    shape = open_checkpoint(base).tensors[name].shape
    before, after = (decode(tensor_bytes(folder)[name], "BF16", shape) for folder in (base, tmp_path / "out"))
    down, up = (factors("x", *shape)[f"{ROOT}x.lora_{which}.weight"].double().numpy() for which in "AB")
    moved = before.astype(np.float64) + 2 * up @ down
    wanted = np.linspace(0.5, 2, HIDDEN)[:, None] * moved / np.linalg.norm(moved, axis=1, keepdims=True)
    rounded = torch.from_numpy(wanted).bfloat16().double().numpy()
    assert np.mean(after != rounded) <= 1e-3
    assert np.abs(after - wanted).max() <= np.abs(wanted).max() * 2**-8
    assert np.linalg.norm(after - before) > 0.1 * np.linalg.norm(before)


def test_what_of_dora_is_not_merged_is_refused(tmp_path, base):
    def said(*more, **settings):
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        dora_adapter(tmp_path / "adapter", **settings)
        result = checked("merge", base, tmp_path / "adapter", tmp_path / "out", *more, code=1)
        return " ".join(result.output.split())

    assert "no scale applies to; leave --scale out" in said("--scale", "0.5")
    assert "expected a norm for each of the 32 rows of" in said(norms=torch.ones(3))
    module = f"{ROOT}model.layers.0.mlp.down_proj"
    write_adapter(tmp_path / "lacking", factors(module.removeprefix(ROOT), HIDDEN, 2 * HIDDEN + 8), use_dora=True)
    assert "because use_dora is set" in checked("merge", base, tmp_path / "lacking", tmp_path / "out", code=1).output


@pytest.mark.parametrize("scale", ["nan", "inf", "1e9"])
def test_a_scale_that_is_no_number_is_refused(tmp_path, base, adapter, scale):
    assert (
        "scale: expected a number" in checked("merge", base, adapter, tmp_path / "out", "--scale", scale, code=1).output
    )
