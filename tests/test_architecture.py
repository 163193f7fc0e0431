"""What the table of architectures finds, leaves out and refuses, from names, shapes and config.json alone."""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.architecture import LeftOut, Target, Writer, dissect, family_names
from ablate_shards.surgery.anatomy.families import FAMILIES
from ablate_shards.surgery.checkpoint.headers import TensorInfo

D, N, V = 8, 12, 20
LLAMA = {"model_type": "llama", "hidden_size": D, "num_hidden_layers": 2}


def tensors_of(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, TensorInfo]:
    return {name: tensor(name, shape, dtype) for name, shape in shapes.items()}


def tensor(name: str, shape: tuple[int, ...], dtype: str = "BF16") -> TensorInfo:
    size = 1
    for length in shape:
        size *= length
    return TensorInfo(name, dtype, shape, "model.safetensors", 0, size)


def llama(root: str = "model.", layers: int = 2) -> dict[str, TensorInfo]:
    shapes: dict[str, tuple[int, ...]] = {f"{root}embed_tokens.weight": (V, D), f"{root}norm.weight": (D,)}
    for layer in range(layers):
        shapes |= {
            f"{root}layers.{layer}.input_layernorm.weight": (D,),
            f"{root}layers.{layer}.post_attention_layernorm.weight": (D,),
            f"{root}layers.{layer}.self_attn.q_proj.weight": (D, D),
            f"{root}layers.{layer}.self_attn.o_proj.weight": (D, D),
            f"{root}layers.{layer}.mlp.up_proj.weight": (N, D),
            f"{root}layers.{layer}.mlp.down_proj.weight": (D, N),
        }
    return tensors_of(shapes)


def blocked(items: tuple[LeftOut, ...]) -> list[str]:
    return [item.name for item in items if item.blocked]


class TestFamilies:
    def test_writers_of_a_dense_decoder(self) -> None:
        anatomy = dissect(llama(), LLAMA)
        assert (anatomy.family, anatomy.hidden_size, anatomy.layers) == ("Llama", D, (0, 1))
        assert anatomy.left_out == ()
        assert anatomy.writers[:3] == (
            Writer("model.embed_tokens.weight", None, "embedding", -1, "weight", None, 0.0, mtp=False),
            Writer("model.layers.0.self_attn.o_proj.weight", 0, "attention", -2, "weight", None, 0.0, mtp=False),
            Writer("model.layers.0.mlp.down_proj.weight", 0, "mlp", -2, "weight", None, 0.0, mtp=False),
        )
        assert [writer.layer for writer in anatomy.writers] == [None, 0, 0, 1, 1]

    @pytest.mark.parametrize("root", ["", "model.", "model.language_model.", "language_model.model."])
    def test_decoder_is_found_under_every_root(self, root: str) -> None:
        names = {writer.name for writer in dissect(llama(root), LLAMA).writers}
        assert f"{root}layers.1.mlp.down_proj.weight" in names
        assert len(names) == 5

    def test_two_decoders_are_refused(self) -> None:
        with pytest.raises(ArchitectureError, match="lie in two decoders, expected one"):
            dissect({**llama("model."), **llama("language_model.model.")}, LLAMA)

    def test_text_config_decides(self) -> None:
        config = {"model_type": "someones_vlm", "hidden_size": 999, "text_config": LLAMA}
        anatomy = dissect(llama("model.language_model."), config)
        assert (anatomy.family, anatomy.hidden_size) == ("Llama", D)

    def test_square_matrices_keep_the_axis_of_the_table(self) -> None:
        conv1d = {
            "h.0.attn.c_proj.weight": (D, D),
            "h.0.attn.c_proj.bias": (D,),
            "h.0.mlp.c_proj.weight": (D, D),
            "wte.weight": (D, D),
        }
        axes = {}
        for kind in ("gpt2", "gpt_bigcode"):
            anatomy = dissect(tensors_of(conv1d), {"model_type": kind, "n_embd": D, "n_layer": 1})
            axes[kind] = {writer.name: writer.axis for writer in anatomy.writers}
        assert axes["gpt2"] == dict.fromkeys(conv1d, -1)
        assert axes["gpt_bigcode"] == {**axes["gpt2"]} | {
            "h.0.attn.c_proj.weight": -2,
            "h.0.mlp.c_proj.weight": -2,
        }

    @pytest.mark.parametrize(
        ("kind", "sublayer", "gain", "offset"),
        [
            ("gemma2", "self_attn.o_proj", "post_attention_layernorm", 1.0),
            ("gemma3_text", "mlp.down_proj", "post_feedforward_layernorm", 1.0),
            ("gemma4_text", "mlp.down_proj", "post_feedforward_layernorm", 0.0),
            ("olmo2", "self_attn.o_proj", "post_attention_layernorm", 0.0),
            ("olmo3", "mlp.down_proj", "post_feedforward_layernorm", 0.0),
            ("glm4", "self_attn.o_proj", "post_self_attn_layernorm", 0.0),
            ("glm4", "mlp.down_proj", "post_mlp_layernorm", 0.0),
        ],
    )
    def test_post_norm_gain(self, kind: str, sublayer: str, gain: str, offset: float) -> None:
        writer, norm = f"model.layers.0.{sublayer}.weight", f"model.layers.0.{gain}.weight"
        config = {"model_type": kind, "hidden_size": D, "num_hidden_layers": 1}
        (found,) = dissect(tensors_of({writer: (D, D), norm: (D,)}), config).writers
        assert (found.gain, found.gain_offset) == (norm, offset)
        with pytest.raises(ArchitectureError, match=f"passes through {re.escape(norm)}, which"):
            dissect(tensors_of({writer: (D, D)}), config)
        with pytest.raises(ArchitectureError, match=re.escape(f"{norm}: expected [{D}]")):
            dissect(tensors_of({writer: (D, D), norm: (D + 1,)}), config)

    def test_projected_embedding_is_not_a_writer(self) -> None:
        shapes = {
            "model.decoder.embed_tokens.weight": (V, 4),
            "model.decoder.embed_positions.weight": (V, D),
            "model.decoder.project_in.weight": (D, 4),
            "model.decoder.layers.0.fc2.weight": (D, N),
        }
        config = {"model_type": "opt", "hidden_size": D, "num_hidden_layers": 1, "do_layer_norm_before": True}
        anatomy = dissect(tensors_of(shapes), config)
        axes = {writer.name: writer.axis for writer in anatomy.writers}
        assert axes.pop("model.decoder.project_in.weight") == -2
        assert axes.pop("model.decoder.embed_positions.weight") == -1
        assert set(axes) == {"model.decoder.layers.0.fc2.weight"}
        (left,) = anatomy.left_out
        assert (left.name, left.blocked) == ("model.decoder.embed_tokens.weight", False)

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            ({"model_type": "opt", "do_layer_norm_before": False}, "do_layer_norm_before = false is refused"),
            ({"model_type": "gpt2", "add_cross_attention": True}, "cross-attention writes to the stream"),
            ({"model_type": "longcat_flash", "zero_expert_num": 256}, "zero_expert_num = 256 is refused: its experts"),
            ({"model_type": "bloom", "apply_residual_connection_post_layernorm": True}, "the stream itself"),
            ({"model_type": "bert"}, "the stream itself is normalised after each addition"),
        ],
    )
    def test_refused_settings(self, config: dict[str, Any], reason: str) -> None:
        with pytest.raises(ArchitectureError, match=reason):
            dissect(llama(), config)

    @pytest.mark.parametrize(
        ("down", "first", "axis"),
        [
            ((4, D, N), (4, 2 * N, D), -2),
            ((4, N, D), (4, D, 2 * N), -1),
            ((4, D, D), (4, 2 * D, D), -2),
            ((4, D, D), (4, D, 2 * D), -1),
        ],
    )
    def test_experts_in_either_orientation(self, down: tuple[int, ...], first: tuple[int, ...], axis: int) -> None:
        home = "model.language_model."
        shapes = {
            f"{home}embed_tokens.weight": (64, D),
            f"{home}layers.0.self_attn.o_proj.weight": (D, D),
            f"{home}layers.0.mlp.experts.gate_up_proj": first,
            f"{home}layers.0.mlp.experts.down_proj": down,
        }
        config = {"model_type": "qwen3_vl_moe_text", "hidden_size": D, "num_hidden_layers": 1}
        anatomy = dissect(tensors_of(shapes), config)
        assert next(one.axis for one in anatomy.writers if one.name.endswith("experts.down_proj")) == axis

    def test_experts_of_no_orientation_are_refused(self) -> None:
        home = "model.language_model."
        shapes = {f"{home}layers.0.self_attn.o_proj.weight": (D, D), f"{home}layers.0.mlp.experts.down_proj": (4, D, D)}
        config = {"model_type": "qwen3_vl_moe_text", "hidden_size": D, "num_hidden_layers": 1}
        with pytest.raises(ArchitectureError, match=f"expected the hidden size {D} on one of the last two axes"):
            dissect(tensors_of(shapes), config)

    def test_family_names_are_unique(self) -> None:
        assert len(set(family_names())) == len(family_names()) > 30


class TestLeftOut:
    def test_vision_tower_is_left_out_with_a_reason(self) -> None:
        tower = {
            "model.visual.blocks.0.attn.proj.weight": (D, D),
            "model.visual.merger.linear_fc2.weight": (D, D),
        }
        anatomy = dissect({**llama("model.language_model."), **tensors_of(tower)}, LLAMA)
        assert [item.name for item in anatomy.left_out] == list(tower)
        assert not blocked(anatomy.left_out)
        assert "features" in anatomy.left_out[1].reason
        assert any("image" in note for note in anatomy.notes)

    def test_unknown_writer_in_a_layer_is_blocked(self) -> None:
        names = {
            "model.layers.1.cross_attn.o_proj.weight": (D, D),
            "model.layers.1.mlp.experts.0.w2.weight": (D, N),
        }
        anatomy = dissect({**llama(), **tensors_of(names)}, LLAMA)
        assert blocked(anatomy.left_out) == list(names)
        assert [item.component for item in anatomy.left_out] == ["attention", "mlp"]

    def test_unknown_embedding_is_blocked(self) -> None:
        anatomy = dissect({**llama(), **tensors_of({"model.embed_positions.weight": (V, D)})}, LLAMA)
        assert blocked(anatomy.left_out) == ["model.embed_positions.weight"]

    def test_layer_that_is_never_run(self) -> None:
        anatomy = dissect(llama(layers=3), LLAMA)
        assert anatomy.layers == (0, 1)
        assert {item.layer for item in anatomy.left_out} == {2}
        assert all("counts 2 layers" in item.reason and not item.blocked for item in anatomy.left_out)

    @pytest.mark.parametrize("tied", [True, False])
    def test_tied_head_is_said(self, tied: bool) -> None:
        assert dissect(llama(), {**LLAMA, "tie_word_embeddings": tied}).tied is tied


class TestQuantised:
    @pytest.mark.parametrize(
        ("dtype", "companions", "reason"),
        [
            ("F8_E5M2", {"weight_scale_inv": "F32"}, "found F8_E5M2; dequantise the checkpoint"),
            (
                "F8_E4M3",
                {"weight_scale_inv": "F32", "weight_zero_point": "F8_E4M3"},
                "expected no model.layers.1.mlp.down_proj.weight_zero_point beside FP8 codes; dequantise the",
            ),
            (
                "U8",
                {"weight.absmax": "F32", "weight.quant_state.bitsandbytes__nf4": "U8"},
                "expected bitsandbytes as quant_method of codes of bitsandbytes, found None; restore the config.json",
            ),
            (
                "I8",
                {"SCB": "F32"},
                "expected bitsandbytes as quant_method of codes of LLM.int8, found None; restore the config.json",
            ),
            ("F64", {}, "found F64; convert the checkpoint"),
        ],
    )
    def test_quantised_writer_is_blocked_not_missed(self, dtype: str, companions: dict[str, str], reason: str) -> None:
        module = "model.layers.1.mlp.down_proj"
        tensors = {name: info for name, info in llama().items() if not name.startswith(module)}
        for name, kind in companions.items():
            tensors[f"{module}.{name}"] = tensor(f"{module}.{name}", (1,), kind)
        tensors[f"{module}.weight"] = tensor(f"{module}.weight", (D, N), dtype)
        anatomy = dissect(tensors, LLAMA)
        assert not any(writer.name.startswith(module) for writer in anatomy.writers)
        (item,) = anatomy.left_out
        assert (item.name, item.layer, item.component) == (f"{module}.weight", 1, "mlp")
        assert item.blocked
        assert reason in item.reason

    def test_mxfp4_experts_are_blocked_and_their_bias_found(self) -> None:
        module = "model.layers.0.mlp.experts.down_proj"
        tensors = {
            f"{module}_blocks": tensor(f"{module}_blocks", (4, D, 1, 16), "U8"),
            f"{module}_scales": tensor(f"{module}_scales", (4, D, 1), "U8"),
            f"{module}_bias": tensor(f"{module}_bias", (4, D)),
        }
        anatomy = dissect(tensors, {"model_type": "gpt_oss", "hidden_size": D, "num_hidden_layers": 1})
        assert blocked(anatomy.left_out) == [f"{module}_blocks"]
        (bias,) = anatomy.writers
        assert (bias.name, bias.kind, bias.axis) == (f"{module}_bias", "bias", -1)

    def test_unmerged_adapter_is_blocked(self) -> None:
        name = "model.layers.0.self_attn.o_proj.lora_B.default.weight"
        anatomy = dissect({**llama(), **tensors_of({name: (D, 2)})}, LLAMA)
        (item,) = anatomy.left_out
        assert (item.name, item.blocked) == ("model.layers.0.self_attn.o_proj.weight", True)
        assert "merge the adapter" in item.reason


class TestMultiTokenPrediction:
    def test_layers_under_mtp(self) -> None:
        extra = {
            "mtp.fc.weight": (D, 2 * D),
            "mtp.layers.0.self_attn.o_proj.weight": (D, D),
            "mtp.layers.0.mlp.down_proj.weight": (D, N),
            "mtp.embed_tokens.weight": (V, D),
        }
        for config in ({**LLAMA, "model_type": "qwen3_5_text"}, LLAMA, None):
            anatomy = dissect({**llama(), **tensors_of(extra)}, config)
            found = [(writer.name, writer.layer, writer.component) for writer in anatomy.writers if writer.mtp]
            assert found == [
                ("mtp.fc.weight", None, "embedding"),
                ("mtp.layers.0.self_attn.o_proj.weight", 0, "attention"),
                ("mtp.layers.0.mlp.down_proj.weight", 0, "mlp"),
            ]
            assert [(item.name, item.mtp, item.blocked) for item in anatomy.left_out] == [
                ("mtp.embed_tokens.weight", True, False)
            ]
            assert anatomy.layers == (0, 1)
            assert any("multi-token prediction" in note for note in anatomy.notes)

    @pytest.mark.parametrize("config", [{**LLAMA, "model_type": "deepseek_v3"}, None])
    def test_layer_after_the_last(self, config: dict[str, Any] | None) -> None:
        extra = {
            "model.layers.2.eh_proj.weight": (D, 2 * D),
            "model.layers.2.enorm.weight": (D,),
            "model.layers.2.embed_tokens.weight": (V, D),
            "model.layers.2.shared_head.norm.weight": (D,),
        }
        anatomy = dissect({**llama(layers=3), **tensors_of(extra)}, config)
        assert anatomy.layers == (0, 1)
        mtp = [writer for writer in anatomy.writers if writer.mtp]
        assert [writer.component for writer in mtp] == ["attention", "mlp", "embedding"]
        assert {writer.layer for writer in mtp} == {2}
        assert [item.name for item in anatomy.left_out] == ["model.layers.2.embed_tokens.weight"]


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "shape", "found"),
        [
            ("model.layers.0.mlp.down_proj.weight", (N, D), "expected the hidden size 8 on axis -2, found"),
            ("model.layers.0.mlp.down_proj.weight", (4, D, N), "expected 2 dimensions, found [4, 8, 12]"),
            ("model.layers.0.mlp.down_proj.bias", (N,), "expected the hidden size 8 on axis -1, found [12]"),
            ("model.layers.0.mlp.down_proj.bias", (1, D), "expected 1 dimension, found [1, 8]"),
            ("model.embed_tokens.weight", (D, V), "expected the hidden size 8 on axis -1, found [8, 20]"),
        ],
    )
    def test_wrong_shape_names_tensor_and_sizes(self, name: str, shape: tuple[int, ...], found: str) -> None:
        with pytest.raises(ArchitectureError, match=re.escape(f"{name}: {found}")):
            dissect({**llama(), name: tensor(name, shape)}, LLAMA)

    def test_fused_experts_have_three_dimensions(self) -> None:
        name = "model.layers.0.mlp.experts.down_proj"
        config = {**LLAMA, "model_type": "qwen3_moe"}
        axes = {w.name: w.axis for w in dissect({**llama(), name: tensor(name, (4, D, N))}, config).writers}
        assert axes[name] == -2
        with pytest.raises(ArchitectureError, match="expected 3 dimensions"):
            dissect({**llama(), name: tensor(name, (4 * D, N))}, config)

    @pytest.mark.parametrize("value", ["8", 0, -1, True, 8.0])
    def test_config_with_a_bad_hidden_size(self, value: Any) -> None:
        with pytest.raises(ArchitectureError, match="expected hidden_size from 1 to"):
            dissect(llama(), {**LLAMA, "hidden_size": value})

    def test_config_with_an_absurd_depth(self) -> None:
        with pytest.raises(ArchitectureError, match="expected num_hidden_layers from 1 to 99999"):
            dissect(llama(), {**LLAMA, "num_hidden_layers": 10**12})

    def test_config_that_disagrees_with_the_weights(self) -> None:
        with pytest.raises(ArchitectureError, match="expected the hidden size 16"):
            dissect(llama(), {**LLAMA, "hidden_size": 16})

    def test_config_without_sizes_falls_back_on_the_final_norm(self) -> None:
        anatomy = dissect(llama(), {"model_type": "llama"})
        assert (anatomy.hidden_size, anatomy.layers) == (D, (0, 1))
        without = {name: info for name, info in llama().items() if name != "model.norm.weight"}
        with pytest.raises(ArchitectureError, match=r"no model\.norm\.weight"):
            dissect(without, {"model_type": "llama"})


class TestWithoutConfig:
    def test_names_decide(self) -> None:
        assert dissect(llama(), None).family == "Llama-like"
        assert dissect(llama(), None).writers == dissect(llama(), LLAMA).writers
        assert dissect(llama(), {"torch_dtype": "bfloat16"}).family == "Llama-like"

    def test_ambiguous_names_say_what_is_missing(self) -> None:
        shapes = {"ln_f.weight": (D,), "wte.weight": (V, D)}
        shapes |= {f"h.0.{norm}.weight": (D,) for norm in ("ln_1", "ln_2")}
        shapes |= {"h.0.attn.c_proj.weight": (D, D), "h.0.mlp.c_proj.weight": (D, D)}
        with pytest.raises(ArchitectureError, match=r"fit GPT-2 and GPT-BigCode, .* put the model's config\.json"):
            dissect(tensors_of(shapes), None)
        config = {"model_type": "gpt2", "n_embd": D, "n_layer": 1}
        assert dissect(tensors_of(shapes), config).family == "GPT-2"

    @pytest.mark.parametrize(
        "stranger",
        [
            "model.layers.0.post_feedforward_layernorm.weight",
            "model.layers.0.cross_attn.o_proj.weight",
            "model.layers.0.self_attn.out_proj.weight",
            "model.embed_norm.weight",
        ],
    )
    def test_one_strange_name_is_enough_to_refuse(self, stranger: str) -> None:
        with pytest.raises(ArchitectureError, match="not those of an architecture in the table"):
            dissect({**llama(), stranger: tensor(stranger, (D, D))}, None)

    def test_norms_tell_gemma_from_olmo(self) -> None:
        def with_norms(*norms: str) -> dict[str, TensorInfo]:
            names = {name: info for name, info in llama(layers=1).items() if "layernorm" not in name}
            return names | tensors_of({f"model.layers.0.{norm}_layernorm.weight": (D,) for norm in norms})

        gemma = dissect(with_norms("input", "post_attention", "pre_feedforward", "post_feedforward"), None)
        olmo = dissect(with_norms("post_attention", "post_feedforward"), None)
        assert {writer.gain_offset for writer in gemma.writers if writer.gain} == {1.0}
        assert {writer.gain_offset for writer in olmo.writers if writer.gain} == {0.0}
        assert sum(writer.gain is not None for writer in olmo.writers) == 2


class TestUnknown:
    def test_error_shows_lines_that_work(self) -> None:
        tensors = llama() | tensors_of({"model.visual.blocks.0.attn.proj.weight": (D, D)})
        tensors |= tensors_of({f"model.layers.{n}.self_attn.o_proj.bias": (D,) for n in range(2)})
        config = {**LLAMA, "model_type": "brand_new"}
        with pytest.raises(ArchitectureError, match="does not know model_type 'brand_new'") as caught:
            dissect(tensors, config)
        sentence, _, lines = str(caught.value).partition("\n\n")
        assert "\n" not in sentence
        described = tomllib.loads(lines)["ablate"]["target"]
        assert [target["component"] for target in described] == ["embedding", "attention", "mlp"]
        found = dissect(tensors, config, [Target(**target) for target in described])
        assert found.family == "recipe"
        assert found.writers == dissect(tensors, LLAMA).writers

    def test_error_without_any_writer_shows_an_example(self) -> None:
        with pytest.raises(ArchitectureError) as caught:
            dissect(tensors_of({"a": (1,)}), None)
        assert tomllib.loads(str(caught.value).partition("\n\n")[2])["ablate"]["target"]

    def test_known_type_with_foreign_names(self) -> None:
        with pytest.raises(ArchitectureError, match="no tensor is named as a writer of Falcon is"):
            dissect(llama(), {**LLAMA, "model_type": "falcon"})


class TestTargets:
    LAYER = r"model\.layers\.(?P<layer>\d+)\."
    DOWN = LAYER + r"mlp\.down_proj\.(?:weight|bias)"

    def test_only_targets_apply(self) -> None:
        anatomy = dissect(llama(), LLAMA, [Target(self.DOWN, "mlp", "out")])
        assert [(writer.name, writer.layer, writer.axis) for writer in anatomy.writers] == [
            ("model.layers.0.mlp.down_proj.weight", 0, -2),
            ("model.layers.1.mlp.down_proj.weight", 1, -2),
        ]
        could_write = "no target describes it, and by its shape it could write to the stream"
        reasons = {item.name: item.reason for item in anatomy.left_out}
        assert reasons == {
            "model.embed_tokens.weight": "no target describes it",
            "model.layers.0.self_attn.o_proj.weight": could_write,
            "model.layers.1.self_attn.o_proj.weight": could_write,
        }
        assert not blocked(anatomy.left_out)

    @pytest.mark.parametrize(("prefix", "offset"), [("", 0.0), ("1 + ", 1.0)])
    def test_gain(self, prefix: str, offset: float) -> None:
        gain = prefix + "model.layers.{layer}.post_attention_layernorm.weight"
        anatomy = dissect(llama(), None, [Target(self.DOWN, "mlp", "out", gain)])
        assert [(writer.gain, writer.gain_offset) for writer in anatomy.writers] == [
            (f"model.layers.{layer}.post_attention_layernorm.weight", offset) for layer in range(2)
        ]

    def test_axis_is_the_users(self) -> None:
        (first, _) = dissect(
            llama(), None, [Target(self.LAYER + r"self_attn\.o_proj\.weight", "attention", "in")]
        ).writers
        assert first.axis == -1

    def test_embedding_needs_no_layer(self) -> None:
        (writer,) = dissect(llama(), None, [Target(r"model\.embed_tokens\.weight", "embedding", "in")]).writers
        assert (writer.layer, writer.axis) == (None, -1)

    def test_bias_that_no_target_describes_is_blocked(self) -> None:
        name = "model.layers.0.mlp.down_proj.bias"
        tensors = {**llama(), name: tensor(name, (D,))}
        narrow = dissect(tensors, LLAMA, [Target(self.LAYER + r"mlp\.down_proj\.weight", "mlp", "out")])
        assert blocked(narrow.left_out) == [name]
        wide = dissect(tensors, LLAMA, [Target(self.DOWN, "mlp", "out")])
        assert blocked(wide.left_out) == []
        assert [writer.kind for writer in wide.writers if writer.layer == 0] == ["weight", "bias"]

    def test_quantised_target_is_blocked(self) -> None:
        name = "model.layers.0.mlp.down_proj.weight"
        anatomy = dissect({**llama(), name: tensor(name, (D, N), "F8_E4M3")}, LLAMA, [Target(self.DOWN, "mlp", "out")])
        assert blocked(anatomy.left_out) == [name]

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            (Target(r"model\.(", "mlp", "out"), "is not a regular expression"),
            (Target(r"model\.layers\.0\.mlp\.down_proj\.weight", "mlp", "out"), "has no group for the layer"),
            (
                Target(r"(?P<layer>model)\..*o_proj.*", "mlp", "out"),
                "expected a number as layer, found 'model'",
            ),
            (Target(LAYER + r"mlp\.w2\.weight", "mlp", "out"), "matches no tensor"),
            (Target(r"layers\.(?P<layer>\d+)\.mlp\.down_proj", "mlp", "out"), "matches no tensor"),
            (
                Target(DOWN, "mlp", "out", "model.{block}.norm"),
                "expected groups of its pattern ({layer}), found {block}",
            ),
            (Target(DOWN, "mlp", "out", "model.{layer.real}"), "found {layer.real}"),
            (Target(DOWN, "mlp", "out", "model.{layer"), "passes through model.{layer, which"),
            (Target(DOWN, "mlp", "out", "model.layers.{layer}.gain"), "does not hold"),
            (Target(DOWN, "mlp", "in"), "expected the hidden size 8 on axis -1, found [8, 12]"),
        ],
    )
    def test_target_that_cannot_be_used(self, target: Target, message: str) -> None:
        with pytest.raises(ArchitectureError, match=re.escape(message)):
            dissect(llama(), LLAMA, [target])

    @pytest.mark.parametrize(
        "second",
        [
            Target(DOWN.replace("mlp", r"\w+"), "attention", "out"),
            Target(DOWN, "mlp", "in"),
            Target(DOWN, "mlp", "out", "1 + model.layers.{layer}.post_attention_layernorm.weight"),
        ],
    )
    def test_targets_that_contradict(self, second: Target) -> None:
        targets = [Target(self.DOWN, "mlp", "out", "model.layers.{layer}.input_layernorm.weight"), second]
        with pytest.raises(ArchitectureError, match="expected one description, found those of targets"):
            dissect(llama(), LLAMA, targets)


def test_every_family_has_its_row_in_the_documentation() -> None:
    text = (Path(__file__).parents[1] / "docs" / "architectures.md").read_text(encoding="utf-8")
    rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in text.splitlines() if line.startswith("| ")]
    documented = {name: set(re.findall(r"`([\w-]+)`", kinds)) for name, kinds in rows}
    assert {family.name: set(family.model_types) for family in FAMILIES}.items() <= documented.items()
