"""An adapter is merged into a quantised base through bfloat16, and never into codes."""

import json
import warnings

import numpy as np
import pytest
import torch
from coded_checkpoints import parts_of, quantisation_as, quantise, save_gpt_oss, store, value_of, write_coded
from command_line import checked
from raw_checkpoints import hidden as hidden_files
from raw_checkpoints import snapshot
from safetensors.torch import load_file, save_file

from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.digest import base_digest
from ablate_shards.surgery.edit.receipt import seal
from benchmarks.codes import measure_update

O_PROJ = "model.layers.0.self_attn.o_proj"


def said(result):
    return " ".join(result.output.split())


def write_adapter(folder, shapes, rank=4, seed=1):
    """A LoRA of modules by their shapes ``(out, in)``, as peft saves it."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        key = f"base_model.model.{module}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.05
        tensors[f"{key}.lora_B.weight"] = torch.randn(rows, rank, generator=generator) * 0.05
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.fixture(params=["int4 in groups of 64, with zero points", "NVFP4 (ModelOpt)", "MXFP8"])
def case(request, tmp_path):
    form = request.param
    source = write_coded(tmp_path / "source", form, hidden=64)
    shapes = {module: tuple(value_of(parts, form).shape) for module, parts in parts_of(source).items()}
    return tmp_path, source, form, write_adapter(tmp_path / "adapter", shapes)


def test_it_is_added_to_what_the_codes_stand_for(case):
    folder, source, form, adapter = case
    before = snapshot(source)
    output = said(checked("merge", source, folder / "adapter", folder / "out", "--dequantise"))
    assert "4 weights in" in output
    assert "nothing is quantised any more" in output
    assert snapshot(source) == before
    found = load_file(folder / "out" / "model-00001-of-00002.safetensors")
    for module, parts in parts_of(source).items():
        down, up = (adapter[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        expected = value_of(parts, form).bfloat16().double() + 2 * up.double() @ down.double()
        off = (found[f"{module}.weight"].double() - expected).abs()
        assert (off <= 2.0**-8 * expected.abs()).all()
    assert "quantization_config" not in json.loads((folder / "out" / "config.json").read_text())
    # The same as one after the other.
    checked("dequantise", source, folder / "plain")
    checked("merge", folder / "plain", folder / "adapter", folder / "twice")
    merged, twice = snapshot(folder / "out"), snapshot(folder / "twice")
    assert merged.pop("merge.json") != twice.pop("merge.json")
    assert merged == twice


def test_verify_decodes_and_adds_again(case):
    folder, source, *_ = case
    out = folder / "out"
    checked("merge", source, folder / "adapter", out, "--dequantise")
    told = said(checked("verify", source, out, "--adapter", folder / "adapter"))
    assert "4 weights decoded from its codes, 4 edited tensors recomputed, 4 to the bit" in told
    assert "4 weights decoded" in said(checked("verify", source, out))
    content = json.loads((out / "merge.json").read_text())
    content["dequantised"].pop()
    del content["sha256"]
    (out / "merge.json").write_text(seal(content))
    checked("verify", source, out, code=1)


def test_an_interrupted_merge_goes_on(case, monkeypatch):
    from ablate_shards.surgery.machine.staging import Staging

    folder, source, *_ = case
    checked("merge", source, folder / "adapter", folder / "whole", "--dequantise")
    record = Staging.record

    def stop(self, shard, content):
        record(self, shard, content)
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "record", stop)
    checked("merge", source, folder / "adapter", folder / "out", "--dequantise", code=1)
    monkeypatch.undo()
    checked("merge", source, folder / "adapter", folder / "out", "--resume", code=1)  # it is another plan
    checked("merge", source, folder / "adapter", folder / "out", "--dequantise", "--resume")
    assert snapshot(folder / "out") == snapshot(folder / "whole")


def test_without_the_flag_it_is_refused_with_the_way_out(case):
    folder, source, *_ = case
    output = said(checked("merge", source, folder / "adapter", folder / "out", code=1))
    assert "model.layers.0.mlp.down_proj.weight" in output
    assert "add --dequantise" in output
    assert not (folder / "out").exists()
    assert hidden_files(folder) == []


def test_a_base_that_is_not_quantised_needs_no_flag(case):
    folder, source, *_ = case
    checked("dequantise", source, folder / "plain")
    output = said(checked("merge", folder / "plain", folder / "adapter", folder / "out", "--dequantise", code=1))
    assert "holds no quantised weights" in output


def test_an_adapter_of_what_is_not_quantised_leaves_the_codes(tmp_path):
    source = save_gpt_oss(tmp_path / "source", hidden=64)
    shape = tuple(load_file(source / "model.safetensors")[f"{O_PROJ}.weight"].shape)
    write_adapter(tmp_path / "adapter", {O_PROJ: shape})
    checked("merge", source, tmp_path / "adapter", tmp_path / "out")
    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    assert {name for name in old if not torch.equal(old[name], new[name])} == {f"{O_PROJ}.weight"}


@pytest.mark.parametrize("names", ["experts.{}.down_proj", "experts.down_projs.{}"])
def test_a_lora_per_expert_is_added_to_what_blocks_of_gpt_oss_stand_for(tmp_path, names):
    source = save_gpt_oss(tmp_path / "source", hidden=64)
    module = f"model.layers.1.mlp.{names.format(2)}"
    adapter = write_adapter(tmp_path / "adapter", {module: (64, 192)})
    told = said(checked("merge", source, tmp_path / "adapter", tmp_path / "out", code=1))
    assert f"is of {module}.weight, which {source} holds as codes" in told
    assert "add --dequantise" in told
    checked("dequantise", source, tmp_path / "plain")
    checked("merge", source, tmp_path / "adapter", tmp_path / "out", "--dequantise")
    old, new = (load_file(folder / "model.safetensors") for folder in (tmp_path / "plain", tmp_path / "out"))
    name = "model.layers.1.mlp.experts.down_proj"
    down, up = (adapter[f"base_model.model.{module}.lora_{part}.weight"].double() for part in "AB")
    expected = old[name].double()
    expected[2] += 2 * (up @ down).T
    assert torch.equal(new.pop(name), expected.bfloat16())
    assert all(torch.equal(new[other], old[other]) for other in new)


def test_blocks_whose_names_were_doubled_are_no_weights(tmp_path):
    source = save_gpt_oss(tmp_path / "source", hidden=64)
    tensors = load_file(source / "model.safetensors")
    doubled = {
        name.replace("_blocks", "_blocks_blocks").replace("proj_scales", "proj_blocks_scales"): values
        for name, values in tensors.items()
    }
    save_file(doubled, source / "model.safetensors", {"format": "pt"})
    for words in (("inspect", source), ("dequantise", source, tmp_path / "out")):
        told = said(checked(*words, code=1))
        assert "down_proj_blocks_blocks: transformers 5.4 saves the blocks" in told
        assert "rename them in model.safetensors" in told
    renamed = {
        name.replace("_blocks_blocks", "_blocks").replace("_blocks_scales", "_scales"): values
        for name, values in doubled.items()
    }
    assert renamed.keys() == tensors.keys()


@pytest.mark.parametrize("form", ["GPTQ int4 in groups of 32, with zero points", "int4 in groups of 32", "MXFP8"])
def test_codes_are_named_as_the_reason_whatever_they_are_called(tmp_path, form):
    source = write_coded(tmp_path / "source", form, hidden=64)
    shapes = {module: tuple(value_of(parts, form).shape) for module, parts in parts_of(source).items()}
    write_adapter(tmp_path / "adapter", shapes)
    told = said(checked("merge", source, tmp_path / "adapter", tmp_path / "out", code=1))
    assert "codes" in told
    assert "add --dequantise" in told
    assert "trained on" not in told


def test_the_digest_of_a_base_is_that_of_what_it_is_dequantised_to(case):
    from ablate_shards.surgery.dequantise import plan_dequantisation

    folder, source, *_ = case
    checkpoint = open_checkpoint(source)
    checked("dequantise", source, folder / "plain")
    view = plan_dequantisation(checkpoint).applied(checkpoint)
    assert base_digest(view) == base_digest(open_checkpoint(folder / "plain"))
    assert base_digest(view) != base_digest(checkpoint)


@pytest.mark.parametrize("form", ["FP8", "int4 in groups of 32"])
def test_the_merged_model_computes_what_the_trained_one_did(tmp_path, form):
    """Trained on the dequantised model, as the documentation has it, and merged into the quantised one."""
    import peft
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "max_position_embeddings": 64}
    source = tmp_path / "source"
    Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, pad_token_id=0, tie_word_embeddings=False)).save_pretrained(source)
    tensors = {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            tensors[name] = weight.bfloat16()
        elif form == "FP8":
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(weight.float(), "block")
        else:
            parts = store(weight.float(), form).items()
            tensors |= {f"{name.removesuffix('.weight')}.{rest}": tensor for rest, (_, tensor) in parts}
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config["quantization_config"] = fp8 if form == "FP8" else quantisation_as(form)
    (source / "config.json").write_text(json.dumps(config))

    checked("dequantise", source, tmp_path / "plain")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], task_type="CAUSAL_LM")
        model = peft.get_peft_model(base, settings)
        with torch.no_grad():
            for parameter in (each for each in model.parameters() if each.requires_grad):
                parameter.add_(0.05 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path / "adapter")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        wanted = model.eval()(ids).logits
        before = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).eval()(ids).logits
    checked("merge", source, tmp_path / "adapter", tmp_path / "out", "--dequantise")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()(ids).logits
    scale = float((wanted - before).norm())
    assert float((merged - wanted).norm()) < 0.1 * scale
    assert np.isfinite(scale)


@pytest.mark.parametrize(("name", "least", "most"), [("bfloat16", 0.98, 1.02), ("FP8", 0.2, 0.6), ("MXFP4", 0, 0.02)])
def test_codes_do_not_take_what_bfloat16_does(name, least, most):
    kept, _ = measure_update(512, 256, 0.01, name)
    assert least <= kept <= most
