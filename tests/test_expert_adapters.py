"""Adapters of experts: however an adapter and a checkpoint hold them, the logits are those that peft computes."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from command_line import checked
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, save_tiny_adapter, save_tiny_model, train_at_random

from ablate_shards.surgery.merge.editor import MergeEditor

TOKENS = torch.arange(3, 27)[None]
WEIGHTS = "adapter_model.safetensors"


def logits(tiny, folder, adapter=None):
    """Returns what transformers computes, with an adapter as peft applies it."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny.load(folder)
        if adapter is not None:
            model = peft.PeftModel.from_pretrained(model, adapter)
        return model(input_ids=TOKENS).logits


def changed(name, **settings):
    """Returns a tiny model with other settings."""
    tiny = TINY_MODELS[name]
    return dataclasses.replace(tiny, settings=tiny.settings | settings)


def rewritten(adapter, tensors=None, **config):
    """Changes an adapter's configuration, None to leave a key out, and its tensors."""
    settings = json.loads((adapter / "adapter_config.json").read_text()) | config
    kept = {key: value for key, value in settings.items() if value is not None}
    (adapter / "adapter_config.json").write_text(json.dumps(kept))
    if tensors is not None:
        save_file({name: value.contiguous() for name, value in tensors.items()}, adapter / "adapter_model.safetensors")
    return adapter


def the_other_way_round(adapter, experts):
    """Returns the tensors of an adapter of stacked experts with input and output exchanged."""
    found = load_file(adapter / "adapter_model.safetensors")
    swapped = {}
    for name in found:
        if "lora_A" not in name or ".experts." not in name:
            continue
        up = name.replace("lora_A", "lora_B")
        down, rows = found[name], found[up]
        downs, ups = down.reshape(experts, -1, down.shape[1]), rows.reshape(len(rows), -1, experts)
        swapped[name] = ups.permute(2, 1, 0).reshape(-1, len(rows))
        swapped[up] = downs.permute(2, 1, 0).reshape(down.shape[1], -1)
    return swapped


# ------------------------------------------------------------------------------------------- layouts of peft

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
#: Which of a stack's axes is the input, by the version of peft: model, square parameter, versions and whether the
#: adapter is the other way round than one of today's.
LAYOUTS = [
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.21.2", False),
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.19.1", False),
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.19.0", True),
    ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "0.18.2.dev0@abcdef", True),
    ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, "0.20.0", False),
    ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, "0.18.1", True),
    ("qwen3-moe-fused", {"moe_intermediate_size": 32}, DOWN, "0.17.0", True),
    ("gpt-oss", {"intermediate_size": 32}, DOWN, "0.18.0", False),
]


@pytest.mark.parametrize(("name", "settings", "target", "version", "exchanged"), LAYOUTS)
def test_the_version_of_peft_tells_the_layout_of_square_experts(tmp_path, name, settings, target, version, exchanged):
    tiny = changed(name, **settings)
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(
        tiny, base, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=[target]
    )
    expected = logits(tiny, base, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    if exchanged:
        tensors |= the_other_way_round(adapter, 4)
    rewritten(adapter, tensors, peft_version=version)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)
    checked("verify", base, tmp_path / "out", "--adapter", adapter)


@pytest.mark.parametrize(
    ("name", "settings", "target", "version"),
    [
        ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, None),
        ("qwen3-moe-fused", {"moe_intermediate_size": 16}, GATE_UP, "0.19.1.dev0"),
        ("qwen3-moe", {"moe_intermediate_size": 16}, GATE_UP, "of my own"),
        ("gpt-oss", {"intermediate_size": 32}, DOWN, "0.21.2"),
    ],
)
def test_a_layout_that_cannot_be_told_is_refused(tmp_path, name, settings, target, version):
    tiny = changed(name, **settings)
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=2, target_modules=[], target_parameters=[target])
    rewritten(adapter, peft_version=version)
    said = " ".join(checked("merge", base, adapter, tmp_path / "out", code=1).output.split())
    assert f"versions of peft ({version or 'not given'}) and transformers" in said
    assert "merge it with peft itself, in those versions" in said


@pytest.mark.parametrize("exchanged", [False, True])
def test_parameters_of_the_same_module_tell_the_layout_where_the_version_does_not(tmp_path, exchanged):
    tiny = changed("qwen3-moe-fused", moe_intermediate_size=16)
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(
        tiny, base, tmp_path / "adapter", r=2, target_modules=[], target_parameters=[GATE_UP, DOWN]
    )
    expected = logits(tiny, base, adapter)
    rewritten(adapter, the_other_way_round(adapter, 4) if exchanged else None, peft_version=None)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------- today's own names

LINEAR = ["q_proj", "gate_proj", "up_proj", "down_proj"]
MIXTRAL = ["q_proj", "w1", "w2", "w3"]
TODAY = [
    ("qwen3-moe", LINEAR),
    ("qwen3-moe", "all-linear"),
    ("qwen3-moe-fused", LINEAR),
    ("mixtral", MIXTRAL),
    ("mixtral", "all-linear"),
    ("mixtral-fused", MIXTRAL),
    ("olmoe", LINEAR),
    ("deepseek-v3", LINEAR),
    ("glm4-moe", LINEAR),
    ("qwen3.5-moe", LINEAR),
]


@pytest.mark.parametrize(("name", "modules"), TODAY)
def test_what_peft_makes_of_the_usual_targets(tmp_path, name, modules):
    tiny = TINY_MODELS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", r=2, lora_alpha=6, target_modules=modules)
    if name != "qwen3.5-moe":
        parameters = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
        assert {"gate_up_proj", "down_proj"} <= set(parameters)
    expected = logits(tiny, base, adapter)
    assert (expected - logits(tiny, base)).abs().max() > 0.1
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-3)


# ------------------------------------------------------------------------------------------- fused and split


def write_split(folder, modules, *, rank=2, **config):
    """Writes an adapter with a LoRA per module, from names to their output and input sizes."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for module, (outer, inner) in modules.items():
        for factor, shape in (("lora_A", (rank, inner)), ("lora_B", (outer, rank))):
            values = torch.randn(shape, generator=generator) * 0.2
            tensors[f"base_model.model.{module}.{factor}.weight"] = values
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = sorted({module.rpartition(".")[2] for module in modules})
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 6, "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def of_experts(tiny, names, *, layers, experts=range(4)):
    """Returns the sizes of the expert modules of a tiny model, as transformers 4 called them."""
    inner = tiny.settings.get("moe_intermediate_size", tiny.settings["intermediate_size"])
    parent, *leaves = names
    return {
        f"model.layers.{layer}.{parent}.experts.{expert}.{leaf}": (32, inner)
        if leaf in ("down_proj", "w2")
        else (inner, 32)
        for layer in layers
        for expert in experts
        for leaf in leaves
    }


EXPERTS = {"qwen3-moe": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}


@pytest.mark.parametrize("form", ["", "-fused"])
@pytest.mark.parametrize("name", EXPERTS)
def test_a_lora_per_expert_is_merged_into_stacked_experts(tmp_path, name, form):
    tiny = TINY_MODELS[name + form]
    base = save_tiny_model(tiny, tmp_path / "base")
    layers = (1,) if tiny.settings.get("mlp_only_layers") else (0, 1)
    adapter = write_split(tmp_path / "adapter", of_experts(tiny, EXPERTS[name], layers=layers))
    expected = logits(tiny, base, adapter)
    assert (expected - logits(tiny, base)).abs().max() > 0.1
    said = checked("merge", base, adapter, tmp_path / "out").output
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-3)
    assert "rank" in said
    assert "to the bit" in checked("verify", base, tmp_path / "out", "--adapter", adapter).output


def test_experts_without_a_lora_keep_their_bytes(tmp_path):
    tiny = TINY_MODELS["qwen3-moe-fused"]
    base = save_tiny_model(tiny, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors[name][0] = -0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    modules = of_experts(tiny, ("mlp", "up_proj"), layers=(0,), experts=(1, 3))
    adapter = write_split(tmp_path / "adapter", modules, alpha_pattern={r"experts\.3\.up_proj": 2})
    checked("merge", base, adapter, tmp_path / "out", "--jobs", 2)
    after, factors = load_file(tmp_path / "out" / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    wanted = tensors[name].double()
    for expert, scale in ((1, 3), (3, 1)):
        stem = f"base_model.model.model.layers.0.mlp.experts.{expert}.up_proj"
        down, up = (factors[f"{stem}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
        wanted[expert, 24:] += scale * up @ down
    assert torch.equal(after[name], wanted.float())
    assert torch.equal(after[name].signbit(), wanted.signbit())
    assert all(torch.equal(after[other], tensors[other]) for other in tensors if other != name)
    record = json.loads((tmp_path / "out" / "merge.json").read_text())["tensors"]
    assert [part["rows"] for part in record[0]["parts"]] == [[72, 96], [168, 192]]


@pytest.mark.parametrize(
    "modules", [("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("v_proj", "up_proj"), ("k_proj",)]
)
def test_separate_projections_are_merged_into_fused_ones_and_the_other_way_round(tmp_path, modules):
    fused = TINY_MODELS["phi3"]
    base = save_tiny_model(fused, tmp_path / "base")
    starts = {"q_proj": 0, "k_proj": 32, "v_proj": 48, "gate_proj": 0, "up_proj": 48}
    sizes = {"q_proj": 32, "k_proj": 16, "v_proj": 16, "gate_proj": 48, "up_proj": 48}
    parents = {leaf: "self_attn" if leaf in ("q_proj", "k_proj", "v_proj") else "mlp" for leaf in sizes}
    names = {f"model.layers.{layer}.{parents[leaf]}.{leaf}": (sizes[leaf], 32) for layer in (0, 1) for leaf in modules}
    adapter = write_split(tmp_path / "adapter", names)
    wanted, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name in names:
        parent, _, leaf = name.rpartition(".")
        whole = f"{parent}.{'qkv_proj' if parents[leaf] == 'self_attn' else 'gate_up_proj'}.weight"
        down, up = (factors[f"base_model.model.{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        wanted[whole][starts[leaf] : starts[leaf] + sizes[leaf]] += 3 * (up @ down)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), wanted)


def test_fused_projections_are_merged_into_separate_ones(tmp_path):
    tiny = TINY_MODELS["mistral"]
    base = save_tiny_model(tiny, tmp_path / "base")
    names = {"model.layers.1.self_attn.qkv_proj": (64, 32), "model.layers.0.mlp.gate_up_proj": (96, 32)}
    adapter = write_split(tmp_path / "adapter", names)
    wanted, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for name, leaves in zip(names, (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")), strict=True):
        down, up = (factors[f"base_model.model.{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        parts = [f"{name.rpartition('.')[0]}.{leaf}.weight" for leaf in leaves]
        for part, change in zip(parts, (3 * (up @ down)).split([len(wanted[part]) for part in parts]), strict=True):
            wanted[part] += change
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), wanted)


GATE, UP = slice(None, None, 2), slice(1, None, 2)
#: Names of the modules of an expert as trainers split a stack, their parameter, and which of its columns they are.
AS_ROWS = {
    "gpt-oss as unsloth": ("experts.gate_up_projs.{}", "experts.down_projs.{}"),
    "gpt-oss": ("experts.{}.gate_proj", "experts.{}.up_proj", "experts.{}.down_proj"),
    "llama4": ("experts.{}.gate_proj", "experts.{}.up_proj", "experts.{}.down_proj"),
    "llama4 gate and up together": ("experts.{}.gate_up_proj", "experts.{}.down_proj"),
}


def columns_of(case, leaf, width):
    """Returns the outputs of a stack's matrices that a module of an expert has."""
    if leaf == "gate_proj":
        return GATE if case.startswith("gpt-oss") else slice(0, width // 2)
    if leaf == "up_proj":
        return UP if case.startswith("gpt-oss") else slice(width // 2, None)
    return slice(None)


def split_experts(model, case, experts, *, skip=()):
    """Puts a linear module for each matrix of an expert into a model; it computes with what they make of a one."""
    for parent in [module for _, module in model.named_modules() if hasattr(module, "experts")]:
        stacks, linears = parent.experts, {}
        for expert in experts:
            for path in AS_ROWS[case]:
                *above, last = path.format(expert).split(".")[1:]
                leaf = path.replace(".{}", "").rpartition(".")[2].replace("projs", "proj")
                if leaf in skip:
                    continue
                name = "down_proj" if leaf == "down_proj" else "gate_up_proj"
                matrix = getattr(stacks, name)[expert].detach().T
                rows = columns_of(case, leaf, len(matrix))
                linear = torch.nn.Linear(matrix.shape[1], len(matrix[rows]), bias=False)
                linear.weight.data = matrix[rows].clone()
                owner = stacks
                for part in above:
                    if not hasattr(owner, part):
                        owner.add_module(part, torch.nn.Module())
                    owner = getattr(owner, part)
                owner.add_module(last, linear)
                linears[owner, last] = name, expert, rows

        def fill(module, _, linears=linears):
            with torch.no_grad():
                for (owner, last), (name, expert, rows) in linears.items():
                    linear = getattr(owner, last)
                    getattr(module, name)[expert][:, rows] = linear(torch.eye(linear.in_features))

        stacks.register_forward_pre_hook(fill)


def trained_on_split(tiny, base, adapter, case, experts, skip=()):
    """Saves an adapter that peft made of modules of single experts, and returns the logits with it."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        network = tiny.load(base)
        split_experts(network, case, experts, skip=skip)
        settings = peft.LoraConfig(r=2, lora_alpha=6, target_modules=r".*experts\.(\d+\.\w+|\w+_projs\.\d+)")
        model = peft.get_peft_model(network, settings).eval()
        train_at_random(model, 0.2)
        model.save_pretrained(adapter)
        return model(input_ids=TOKENS).logits


#: The inner size makes the first matrix square, or the second one, or neither; the hidden size is 32.
@pytest.mark.parametrize("inner", [16, 32, 48])
@pytest.mark.parametrize("case", AS_ROWS)
def test_what_peft_trains_on_single_experts_is_merged_into_their_stack(tmp_path, case, inner):
    tiny = changed(case.split()[0], intermediate_size=inner)
    base = save_tiny_model(tiny, tmp_path / "base")
    expected = trained_on_split(tiny, base, tmp_path / "adapter", case, (0, 1, 3))
    assert (expected - logits(tiny, base)).abs().max() > 0.1
    checked("merge", base, tmp_path / "adapter", tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-3)
    said = checked("verify", base, tmp_path / "out", "--adapter", tmp_path / "adapter").output
    assert "to the bit" in said


@pytest.mark.parametrize("inner", [16, 24, 32])
@pytest.mark.parametrize("names", [("{}.gate_up_proj", "{}.down_proj"), ("gate_up_projs.{}", "down_projs.{}")])
def test_gate_and_up_of_an_expert_together_are_merged_into_a_stack(tmp_path, names, inner):
    tiny = changed("qwen3-moe-fused", moe_intermediate_size=inner)
    base = save_tiny_model(tiny, tmp_path / "base")
    stem, sizes = "model.layers.0.mlp.experts", ((2 * inner, 32), (32, inner))
    modules = {f"{stem}.{name.format(2)}": size for name, size in zip(names, sizes, strict=True)}
    adapter = write_split(tmp_path / "adapter", modules)
    wanted, factors = load_file(base / "model.safetensors"), load_file(adapter / WEIGHTS)
    for module, whole in zip(modules, ("gate_up_proj", "down_proj"), strict=True):
        down, up = (factors[f"base_model.model.{module}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        wanted[f"{stem}.{whole}"][2] += 3 * (up @ down)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), wanted)


@pytest.mark.parametrize("form", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["gpt-oss", "llama4"])
def test_columns_without_a_lora_keep_their_bytes(tmp_path, monkeypatch, case, dtype, form):
    monkeypatch.setattr(MergeEditor, "on_cpu", form)
    tiny = TINY_MODELS[case]
    base = save_tiny_model(tiny, tmp_path / "base")
    trained_on_split(tiny, base, tmp_path / "adapter", case, (1, 2), skip=("gate_proj",))
    tensors = {name: values.to(dtype) for name, values in load_file(base / "model.safetensors").items()}
    stack = "model.layers.1.mlp.experts" if case == "gpt-oss" else "model.layers.1.feed_forward.experts"
    name = next(each for each in tensors if each.endswith(f"{stack}.gate_up_proj".removeprefix("model.")))
    prefix = name.removesuffix(f"{stack}.gate_up_proj")
    tensors[name][:, ::3] = -0.0
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    checked("merge", base, tmp_path / "adapter", tmp_path / "out", "--jobs", 2)
    after, factors = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "adapter" / WEIGHTS)
    inner, wanted = tiny.settings["intermediate_size"], {each: tensors[each].double() for each in tensors}
    for expert in (1, 2):
        for leaf in ("up_proj", "down_proj"):
            stem = f"base_model.model.{stack}.{expert}.{leaf}"
            down, up = (factors[f"{stem}.{factor}.weight"].double() for factor in ("lora_A", "lora_B"))
            whole = wanted[f"{prefix}{stack}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][expert]
            whole[:, columns_of(case, leaf, 2 * inner)] += 3 * (up @ down).T
    for each in (name, f"{prefix}{stack}.down_proj"):
        assert torch.equal(after[each], wanted[each].to(dtype))
        same = tensors[each] == after[each]
        assert torch.equal(after[each][same].signbit(), tensors[each][same].signbit())
    kept = after[name][:, :, columns_of(case, "gate_proj", 2 * inner)]
    assert kept.eq(0).any()
    assert torch.equal(kept.signbit(), tensors[name][:, :, columns_of(case, "gate_proj", 2 * inner)].signbit())
    record = {each["name"]: each for each in json.loads((tmp_path / "out" / "merge.json").read_text())["tensors"]}
    change = (wanted[name] - tensors[name].double()).norm() / tensors[name].double().norm()
    assert record[name]["change"] == pytest.approx(change.item(), rel=1e-6)


def write_stacks(folder, stacks, **config):
    """Writes a base that holds stacks of experts and nothing else."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(2)
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in stacks.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


EITHER = "model.language_model.layers.0.mlp.experts"


@pytest.mark.parametrize("inner", [16, 24, 32])
@pytest.mark.parametrize("input_first", [False, True])
def test_shapes_tell_the_orientation_where_an_architecture_has_both(tmp_path, input_first, inner):
    shapes = {f"{EITHER}.gate_up_proj": (4, 2 * inner, 32), f"{EITHER}.down_proj": (4, 32, inner)}
    if input_first:
        shapes = {name: (shape[0], shape[2], shape[1]) for name, shape in shapes.items()}
    text = {"model_type": "qwen3_vl_moe_text", "hidden_size": 32, "num_hidden_layers": 1}
    base = write_stacks(tmp_path / "base", shapes, model_type="qwen3_vl_moe", text_config=text)
    sizes = {"gate_proj": (inner, 32), "up_proj": (inner, 32), "down_proj": (32, inner)}
    adapter = write_split(tmp_path / "adapter", {f"{EITHER}.1.{leaf}": size for leaf, size in sizes.items()})
    wanted, factors = load_file(base / "model.safetensors"), load_file(adapter / WEIGHTS)
    for leaf, rows in (("gate_proj", slice(0, inner)), ("up_proj", slice(inner, None)), ("down_proj", slice(None))):
        whole = wanted[f"{EITHER}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][1]
        down, up = (factors[f"base_model.model.{EITHER}.1.{leaf}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        (whole.T if input_first else whole)[rows] += 3 * (up @ down)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(load_file(tmp_path / "out" / "model.safetensors"), wanted)


UNTOLD = "model.layers.0.moe.experts"


@pytest.mark.parametrize(
    ("stacks", "leaf", "size", "expected"),
    [
        ({"gate_up_proj": (4, 32, 48)}, "up_proj", (24, 32), "is not known of this architecture"),
        ({"gate_up_proj": (4, 32, 32)}, "gate_up_proj", (32, 32), "[E, out, in] or [E, in, out] is told neither"),
        ({"up_proj": (4, 32, 32), "down_proj": (4, 32, 32)}, "up_proj", (32, 32), "is told neither by shapes nor by"),
        ({"gate_up_proj": (4, 32, 32), "down_proj": (4, 16, 32)}, "gate_up_proj", (32, 32), None),
        ({"gate_up_proj": (4, 32, 32), "down_proj": (4, 32, 16)}, "gate_up_proj", (32, 32), None),
        ({"gate_up_proj": (4, 32, 48), "down_proj": (4, 24, 32)}, "down_proj", (32, 24), None),
    ],
)
def test_of_an_unknown_architecture_nothing_is_guessed(tmp_path, stacks, leaf, size, expected):
    shapes = {f"{UNTOLD}.{name}": shape for name, shape in stacks.items()}
    base = write_stacks(tmp_path / "base", shapes, model_type="of_my_own", hidden_size=32, num_hidden_layers=1)
    adapter = write_split(tmp_path / "adapter", {f"{UNTOLD}.3.{leaf}": size})
    said = " ".join(checked("merge", base, adapter, tmp_path / "out", code=1 if expected else 0).output.split())
    if expected:
        assert expected in said
        assert "merge it into a checkpoint with a tensor per expert" in said
        return
    before, after = (load_file(folder / "model.safetensors")[f"{UNTOLD}.{leaf}"] for folder in (base, tmp_path / "out"))
    factors = load_file(adapter / WEIGHTS)
    down, up = (factors[f"base_model.model.{UNTOLD}.3.{leaf}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
    input_first = stacks["down_proj"][1] < stacks["down_proj"][2]
    before[3] += 3 * ((up @ down).T if input_first else up @ down)
    torch.testing.assert_close(after, before)


# ------------------------------------------------------------------------------------------- all experts in one tensor

MATRICES = {"w1": ("gate_proj", 0), "w3": ("up_proj", 1), "w2": ("down_proj", None)}
#: Where the experts lie, whether a stack is ``[E, in, out]``, and whether its gate and up alternate.
HOLDERS = {
    "qwen3-moe": ("mlp", False, False),
    "qwen3-moe-fused": ("mlp", False, False),
    "mixtral": ("mlp", False, False),
    "mixtral-fused": ("mlp", False, False),
    "gpt-oss": ("mlp", True, True),
    "llama4": ("feed_forward", True, False),
}


def added(tensors, stack, expert, leaf, change, *, input_first, alternating):
    """Adds a change ``[out, in]`` to the matrix of an expert, however it is stored."""
    called = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}[leaf]
    for name in (
        f"{stack}.{expert}.{leaf}.weight",
        f"{stack.replace('mlp', 'block_sparse_moe')}.{expert}.{called}.weight",
    ):
        if name in tensors:
            tensors[name] += change
            return
    whole = tensors[f"{stack}.{'down_proj' if leaf == 'down_proj' else 'gate_up_proj'}"][expert]
    whole = whole.T if input_first else whole
    part = MATRICES[called][1]
    if part is not None:
        whole = whole[part::2] if alternating else whole.chunk(2)[part]
    whole += change


@pytest.mark.parametrize("shared", [None, "lora_A", "lora_B"])
@pytest.mark.parametrize("name", HOLDERS)
def test_factors_of_all_experts_in_one_tensor_as_of_tinker(tmp_path, name, shared):
    tiny, (parent, input_first, alternating) = TINY_MODELS[name], HOLDERS[name]
    base = save_tiny_model(tiny, tmp_path / "base")
    inner = tiny.settings.get("moe_intermediate_size", tiny.settings["intermediate_size"])
    wanted = load_file(base / "model.safetensors")
    stack = f"model.layers.1.{parent}.experts"
    generator, tensors = torch.Generator().manual_seed(4), {}
    for leaf, (long, _) in MATRICES.items():
        outer, width = (32, inner) if leaf == "w2" else (inner, 32)
        down = torch.randn(1 if shared == "lora_A" else 4, 2, width, generator=generator) * 0.2
        up = torch.randn(1 if shared == "lora_B" else 4, outer, 2, generator=generator) * 0.2
        stem = f"base_model.model.model.layers.1.{parent}.experts.{leaf}"
        tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        for expert, change in enumerate(3 * (up @ down)):
            added(wanted, stack, expert, long, change, input_first=input_first, alternating=alternating)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    checked("merge", base, adapter, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert sum(not torch.equal(found[each], load_file(base / "model.safetensors")[each]) for each in found) >= 2
    torch.testing.assert_close(found, wanted)
    assert "to the bit" in checked("verify", base, tmp_path / "out", "--adapter", adapter).output


def test_experts_without_a_gate_have_empty_factors_in_its_place(tmp_path):
    shapes = {f"{UNTOLD}.{each}.{leaf}.weight": shape for each in range(2) for leaf, shape in
              (("up_proj", (24, 32)), ("down_proj", (32, 24)))}  # fmt: skip
    base = write_stacks(tmp_path / "base", shapes, model_type="of_my_own", hidden_size=32, num_hidden_layers=1)
    stem, tensors = f"base_model.model.{UNTOLD}", {}
    for leaf, down, up in (("w1", (2, 2, 32), (2, 24, 2)), ("w3", (0,), (0,))):
        tensors |= {f"{stem}.{leaf}.lora_A.weight": torch.ones(down), f"{stem}.{leaf}.lora_B.weight": torch.ones(up)}
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / WEIGHTS)
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))
    checked("merge", base, adapter, tmp_path / "out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    for name, values in before.items():
        torch.testing.assert_close(after[name], values + 2 if "up_proj" in name else values)


@pytest.mark.parametrize("inner", [16, 24, 32])
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen3-moe-fused", "gpt-oss"])
def test_stacks_of_factors_as_of_vllm_are_what_they_are_in_peft(tmp_path, name, inner):
    size = "intermediate_size" if name == "gpt-oss" else "moe_intermediate_size"
    tiny = changed(name, **{size: inner})
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(
        tiny, base, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN]
    )
    expected, tensors = logits(tiny, base, adapter), load_file(adapter / WEIGHTS)
    if name == "gpt-oss":  # peft takes its first axis for the output
        tensors |= the_other_way_round(adapter, 4)
    for each, values in tensors.items():
        if ".experts." in each:
            rank = (4, 2, values.shape[1]) if "lora_A" in each else (len(values), 2, 4)
            tensors[each] = values.reshape(rank)
    rewritten(adapter, tensors, target_parameters=None, peft_version=None)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


def test_a_configuration_need_not_name_the_parameters_of_experts(tmp_path):
    tiny = TINY_MODELS["qwen3-moe-fused"]
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(
        tiny, base, tmp_path / "adapter", r=2, target_modules=["q_proj"], target_parameters=[GATE_UP, DOWN]
    )
    expected = logits(tiny, base, adapter)
    rewritten(adapter, target_parameters=None, peft_version=None)
    checked("merge", base, adapter, tmp_path / "out")
    torch.testing.assert_close(logits(tiny, tmp_path / "out"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("base_form", ["mixtral", "qwen3-moe"])
def test_matrices_of_an_expert_go_by_either_name(tmp_path, base_form):
    tiny = TINY_MODELS[base_form]
    base = save_tiny_model(tiny, tmp_path / "base")
    names = EXPERTS["mixtral" if base_form == "qwen3-moe" else "qwen3-moe"]
    adapter = write_split(tmp_path / "adapter", of_experts(tiny, names, layers=(1,)))
    same = write_split(tmp_path / "same", of_experts(tiny, EXPERTS[base_form], layers=(1,)))
    checked("merge", base, adapter, tmp_path / "out")
    checked("merge", base, same, tmp_path / "expected")
    found, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("out", "expected"))
    assert all(torch.equal(found[each], expected[each]) for each in expected)


def test_what_a_stack_does_not_take_has_a_way_out(tmp_path):
    base = save_tiny_model(TINY_MODELS["gpt-oss"], tmp_path / "base")
    module = "model.layers.0.mlp.experts.0.down_proj"
    adapter = write_split(tmp_path / "adapter", {module: (32, 48)}, init_lora_weights="pissa")
    said = " ".join(checked("merge", base, adapter, tmp_path / "out", code=1).output.split())
    assert "only plain updates fit it" in said
    assert "merge it into a checkpoint with a tensor per expert" in said


def test_an_expert_that_does_not_fit_is_refused(tmp_path):
    tiny = TINY_MODELS["qwen3-moe-fused"]
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = write_split(tmp_path / "more", of_experts(tiny, EXPERTS["qwen3-moe"], layers=(0,), experts=(4,)))
    assert "merge it into the checkpoint that it was trained on" in " ".join(
        checked("merge", base, adapter, tmp_path / "out", code=1).output.split()
    )


def test_a_bias_of_one_expert_is_no_part_of_a_stack(tmp_path):
    tiny = TINY_MODELS["qwen3-moe-fused"]
    base = save_tiny_model(tiny, tmp_path / "base")
    adapter = save_tiny_adapter(tiny, base, tmp_path / "adapter", target_modules=["q_proj"])
    bias = "base_model.model.model.layers.0.mlp.experts.3.down_proj.bias"
    rewritten(adapter, load_file(adapter / WEIGHTS) | {bias: torch.ones(32)}, bias="all")
    said = " ".join(checked("merge", base, adapter, tmp_path / "out", code=1).output.split())
    assert f"{bias} is saved whole for one expert, and" in said
    assert "merge it with peft itself" in said
    assert not (tmp_path / "out").exists()
