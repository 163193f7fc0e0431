"""Stacks of experts and embeddings as mlx-lm stores them: their codes are edited, and nothing else changes."""

import json

import pytest
import torch
from coded_checkpoints import (
    left,
    options,
    quantisation_as,
    raw_of,
    store,
    value_of,
    write_basis,
    write_tensors,
)
from command_line import checked
from raw_checkpoints import snapshot
from safetensors.torch import load_file, save_file

from ablate_shards.kernels import reference
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint, read_range

HIDDEN, INNER, EXPERTS, VOCABULARY = 256, 192, 3, 77
INT4, INT3, MXFP4, NVFP4 = "MLX int4 in groups of 64", "MLX int3 in groups of 32", "MXFP4 (MLX)", "NVFP4 (MLX)"
SCALED = "NVFP4 (MLX), each expert scaled"
FORMS = (INT4, INT3, MXFP4, "MXFP8 (MLX)", NVFP4, SCALED)
EMBEDDING = "model.embed_tokens"
ALL = ("--components", "attention,mlp,embedding")
KINDS = {"U32": torch.int32, "U8": torch.uint8, "F32": torch.float32, "BF16": torch.bfloat16}


def form_of(form, module):
    """How a module is stored: mlx-lm gives only stacks of experts a scale of their own."""
    return form if form != SCALED or "switch_mlp" in module else NVFP4


def stored(values, form):
    """The parts of a weight, or of a stack of them."""
    if values.dim() == 2:
        return store(values, form)
    if form == SCALED:
        largest = values.abs().amax((1, 2))
        parts = stored(values / (largest / (6 * 448))[:, None, None], NVFP4)
        return {**parts, "global_scale": ("F32", largest)}
    each = [store(one, form) for one in values]
    return {rest: (each[0][rest][0], torch.stack([parts[rest][1] for parts in each])) for rest in each[0]}


def decoded(parts, form):
    """What the parts of :func:`stored` stand for."""
    if parts["weight"].dim() == 2:
        return value_of(parts, form)
    plain = {rest: tensor for rest, tensor in parts.items() if rest != "global_scale"}
    number = range(len(plain["weight"]))
    values = torch.stack([value_of({rest: plain[rest][i] for rest in plain}, form_of(form, "")) for i in number])
    return values * (parts["global_scale"] / (6 * 448))[:, None, None] if form == SCALED else values


def write_moe(folder, form, *, stack="mlp.switch_mlp", model_type="qwen3_moe", vocabulary=VOCABULARY):
    """Writes a mixture of experts as mlx-lm does, its biases beside those of gpt-oss."""
    generator = torch.Generator().manual_seed(7)

    def normal(*size):
        return torch.randn(size, generator=generator) * 0.05

    said = quantisation_as(form_of(form, ""))
    modules = {EMBEDDING: (vocabulary, HIDDEN), "lm_head": (vocabulary, HIDDEN)}
    tensors = {"model.norm.weight": ("BF16", torch.ones(HIDDEN).bfloat16())}
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{norm}.weight"] = ("BF16", torch.ones(HIDDEN).bfloat16())
        modules |= {f"{prefix}self_attn.{part}_proj": (HIDDEN, HIDDEN) for part in "qkvo"}
        modules |= {f"{prefix}{stack}.{part}_proj": (EXPERTS, INNER, HIDDEN) for part in ("gate", "up")}
        modules[f"{prefix}{stack}.down_proj"] = (EXPERTS, HIDDEN, INNER)
        if model_type == "gpt_oss":
            tensors[f"{prefix}{stack}.down_proj.bias"] = ("BF16", normal(EXPERTS, HIDDEN).bfloat16())
        # Routers have settings of their own, which say all that there is to say.
        router = f"{prefix}mlp.{'router' if model_type == 'gpt_oss' else 'gate'}"
        said[router] = {"group_size": 64, "bits": 8}
        for rest, (dtype, tensor) in store(normal(EXPERTS, HIDDEN), "MLX int8 in groups of 64").items():
            tensors[f"{router}.{rest}"] = (dtype, tensor)
    for module, size in modules.items():
        for rest, (dtype, tensor) in stored(normal(*size), form_of(form, module)).items():
            tensors[f"{module}.{rest}"] = (dtype, tensor)
    folder.mkdir()
    ready = {name: (dtype, tuple(tensor.shape), raw_of(tensor)) for name, (dtype, tensor) in tensors.items()}
    write_tensors(folder / "model.safetensors", ready)
    sizes = {"model_type": model_type, "hidden_size": HIDDEN, "num_hidden_layers": 2, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**sizes, "quantization": said}))
    return folder


def parts_of(folder):
    """The parts of every weight of codes, by module and what follows its name."""
    checkpoint = open_checkpoint(folder)
    found = {}
    for name, info in checkpoint.tensors.items():
        module, _, rest = name.rpartition(".")
        tensor = torch.frombuffer(bytearray(read_range(checkpoint, info)), dtype=KINDS[info.dtype])
        found.setdefault(module, {})[rest] = tensor.reshape(info.shape)
    return {
        module: parts
        for module, parts in found.items()
        if "scales" in parts and not module.endswith(("mlp.gate", "mlp.router"))
    }


def values_of(folder, form):
    return {module: decoded(parts, form_of(form, module)) for module, parts in parts_of(folder).items()}


def is_writer(module):
    return module.endswith(("o_proj", "down_proj", "embed_tokens"))


def along(weight, basis, module):
    """The component of a weight along a basis, of the embedding that of its rows; relative to its norm."""
    matrices = [weight.T] if module == EMBEDDING else [weight] if weight.dim() == 2 else list(weight)
    return left(torch.cat(matrices, 1), basis)


def said(*words, code=0):
    return " ".join(checked(*words, code=code).output.split())


@pytest.mark.parametrize("form", FORMS)
def test_only_codes_of_the_writers_change_and_the_direction_is_gone(tmp_path, form):
    source = write_moe(tmp_path / "source", form)
    basis = write_basis(tmp_path, HIDDEN)
    before = snapshot(source)
    assert "5 writers in" in said("inspect", source)
    assert "not edited" not in said("inspect", source)

    checked(source, tmp_path / "out", *options(tmp_path, *ALL))

    assert snapshot(source) == before
    assert snapshot(tmp_path / "out")["config.json"] == before["config.json"]
    old, new = parts_of(source), parts_of(tmp_path / "out")
    for module, parts in old.items():
        differing = {rest for rest in parts if not torch.equal(parts[rest], new[module][rest])}
        assert differing == ({"weight"} if is_writer(module) else set())
    records = {each["name"]: each for each in json.loads((tmp_path / "out" / "ablation.json").read_text())["tensors"]}
    written = values_of(tmp_path / "out", form)
    for module, weight in values_of(source, form).items():
        if is_writer(module):
            share = along(weight, basis, module)
            assert along(written[module], basis, module) < 1e-2 * share
            assert records[f"{module}.weight"]["before"] == pytest.approx(share, rel=1e-3)
            assert records[f"{module}.weight"]["after"] == pytest.approx(
                along(written[module], basis, module), abs=1e-6
            )
            assert records[f"{module}.weight"]["nearest"] > 0.05 * share
    assert "5 edited tensors recomputed, 5 to the bit" in said("verify", source, tmp_path / "out")
    assert "scales equal" in said("diff", source, tmp_path / "out")


@pytest.mark.parametrize("form", [INT4, MXFP4, SCALED])
def test_it_is_dequantised_wholly_or_where_it_is_edited(tmp_path, form):
    source = write_moe(tmp_path / "source", form)
    basis = write_basis(tmp_path, HIDDEN)
    expected = values_of(source, form)

    checked("dequantise", source, tmp_path / "plain")

    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert not any(name.endswith(("scales", "biases", "global_scale")) for name in plain)
    for module, weight in expected.items():
        assert torch.equal(plain[f"{module}.weight"], weight.bfloat16())
    assert "18 weights decoded" in said("verify", source, tmp_path / "plain")
    assert "differences are rounding only" in said("diff", source, tmp_path / "plain")

    checked(source, tmp_path / "out", *options(tmp_path, *ALL, "--dequantise", "writers"))

    # Each stack of MLX is a module of its own: gates stay as they are.
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert {module for module, how in config.items() if how is False} == {*filter(is_writer, expected)}
    written = load_file(tmp_path / "out" / "model.safetensors")
    for module in expected:
        if is_writer(module):
            assert along(written[f"{module}.weight"].float(), basis, module) < 2e-3
        else:
            assert written[f"{module}.weight"].dtype == torch.uint32
    assert "5 to the bit" in said("verify", source, tmp_path / "out")


@pytest.mark.parametrize("form", [MXFP4, INT4, None])
def test_stacks_of_gpt_oss_are_not_transposed_in_mlx_and_have_biases(tmp_path, form):
    source = write_moe(tmp_path / "source", form or INT4, stack="mlp.experts", model_type="gpt_oss")
    basis = write_basis(tmp_path, HIDDEN)
    if form is None:
        checked("dequantise", source, tmp_path / "plain")
        source = tmp_path / "plain"

    checked(source, tmp_path / "out", *options(tmp_path))

    old, new = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    name = "model.layers.1.mlp.experts.down_proj"
    if form is None:
        before, after = (each[f"{name}.weight"].float() for each in (old, new))
    else:
        before, after = (values_of(folder, form)[name] for folder in (source, tmp_path / "out"))
    assert along(after, basis, name) < 1e-2 * along(before, basis, name)
    was, is_now = (float((each[f"{name}.bias"].double() @ basis.T).norm()) for each in (old, new))
    assert is_now < 1e-2 * was


@pytest.mark.parametrize("preserve", ["rows", "columns", "none"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("coefficient", [0, 1, 2])
def test_an_embedding_comes_as_near_as_it_can(tmp_path, preserve, count, coefficient):
    source = write_moe(tmp_path / "source", INT4)
    basis = write_basis(tmp_path, HIDDEN, count)
    more = ["--preserve", preserve, "--coefficient", coefficient, "--components", "embedding"]

    checked(source, tmp_path / "out", *options(tmp_path), *more)

    weight, written = (values_of(folder, INT4)[EMBEDDING] for folder in (source, tmp_path / "out"))
    ideal, _ = reference.ablate(weight.T, basis, preserve=preserve, coefficient=coefficient)
    off = (basis @ (written.T.double() - ideal)).norm() / weight.double().norm()
    assert off < 2e-3 * left(weight.T, basis)
    assert (written.T.double() - ideal).norm() < 0.3 * ideal.norm()
    if coefficient == 0:
        assert torch.equal(written, weight)


def test_blocks_jobs_and_memory_change_no_byte_of_an_embedding(tmp_path, monkeypatch):
    # More rows than are summed together, which the shape alone decides.
    source = write_moe(tmp_path / "source", INT3, vocabulary=1100)
    write_basis(tmp_path, HIDDEN)
    checked(source, tmp_path / "out", *options(tmp_path, *ALL))
    expected = snapshot(tmp_path / "out")
    monkeypatch.setattr("ablate_shards.surgery.edit.ablation_editor._CODES_AT_ONCE", 1)
    monkeypatch.setattr("ablate_shards.surgery.dequantise.decoding.AT_ONCE", 1)
    checked(source, tmp_path / "again", *options(tmp_path, *ALL, "--jobs", 2, "--memory", "8MB"))
    assert snapshot(tmp_path / "again") == expected


def test_the_nearest_codes_of_an_embedding_are_said_to_undo_the_edit(tmp_path):
    source = write_moe(tmp_path / "source", INT4)
    write_basis(tmp_path, HIDDEN)
    words = (source, tmp_path / "out", *options(tmp_path, "--components", "embedding", "--rounding", "nearest"))
    assert "the nearest codes undo" in said(*words, code=1)
    checked(*words, "--force")
    (record,) = json.loads((tmp_path / "out" / "ablation.json").read_text())["tensors"]
    assert record["name"] == f"{EMBEDDING}.weight"
    assert record["undone"] > 0.1
    assert "1 to the bit" in said("verify", source, tmp_path / "out")


def test_an_embedding_with_a_code_or_scale_that_is_nan_is_refused_by_name(tmp_path):
    source = write_moe(tmp_path / "source", "MXFP8 (MLX)")
    write_basis(tmp_path, HIDDEN)
    raw = (source / "model.safetensors").read_bytes()
    codes = raw_of(parts_of(source)[EMBEDDING]["weight"])
    (source / "model.safetensors").write_bytes(raw.replace(codes, b"\xff" * 4 + codes[4:]))
    output = said(source, tmp_path / "out", *options(tmp_path, *ALL), code=1)
    assert f"{EMBEDDING}.weight: holds NaN codes" in output
    assert not (tmp_path / "out").exists()


def test_a_scale_of_an_expert_is_of_nvfp4_alone(tmp_path):
    source = write_moe(tmp_path / "source", SCALED)
    config = json.loads((source / "config.json").read_text())
    config["quantization"] |= {"mode": "mxfp4", "group_size": 32}
    (source / "config.json").write_text(json.dumps(config))
    write_basis(tmp_path, HIDDEN)
    assert "restore the config.json" in said(source, tmp_path / "out", *options(tmp_path), code=1)


@pytest.mark.parametrize(
    ("model_type", "stack"),
    [
        ("mixtral", "block_sparse_moe.switch_mlp"),
        ("lfm2_moe", "feed_forward.switch_mlp"),
        ("jamba", "feed_forward.switch_mlp"),
    ],
)
def test_stacks_lie_where_each_architecture_has_its_experts(tmp_path, model_type, stack):
    source = write_moe(tmp_path / "source", INT4, stack=stack, model_type=model_type)
    writers = json.loads(checked("inspect", source, "--json").output)["writers"]
    found = {writer["name"] for writer in writers if writer["component"] == "mlp"}
    assert found == {f"model.layers.{layer}.{stack}.down_proj.weight" for layer in range(2)}
    write_basis(tmp_path, HIDDEN)
    checked(source, tmp_path / "out", *options(tmp_path, "--components", "routed-experts"))
    assert len(json.loads((tmp_path / "out" / "ablation.json").read_text())["tensors"]) == 2


def test_an_adapter_is_merged_into_what_the_codes_stand_for(tmp_path):
    source = write_moe(tmp_path / "source", INT4)
    module = "model.layers.0.self_attn.o_proj"
    generator = torch.Generator().manual_seed(2)
    down, up = (torch.randn(size, generator=generator) * 0.05 for size in ((4, HIDDEN), (HIDDEN, 4)))
    (tmp_path / "adapter").mkdir()
    key = f"base_model.model.{module}"
    tensors = {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["o_proj"], "bias": "none"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    checked("merge", source, tmp_path / "adapter", tmp_path / "out", "--dequantise")
    found = load_file(tmp_path / "out" / "model.safetensors")[f"{module}.weight"].double()
    expected = values_of(source, INT4)[module].bfloat16().double() + up.double() @ down.double()
    assert ((found - expected).abs() <= 2.0**-8 * expected.abs()).all()


@pytest.mark.parametrize(
    ("model_type", "stack"),
    [("qwen3_moe", "mlp.switch_mlp"), ("mixtral", "block_sparse_moe.switch_mlp"), ("gpt_oss", "mlp.experts")],
)
def test_an_adapter_names_stacks_as_transformers_does(tmp_path, model_type, stack):
    source = write_moe(tmp_path / "source", INT4, stack=stack, model_type=model_type)
    write_basis(tmp_path, HIDDEN)
    checked(source, tmp_path / "adapter", *options(tmp_path, "--adapter", "--components", "routed-experts"))
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_parameters"] == [f"model.layers.{layer}.mlp.experts.down_proj" for layer in range(2)]
