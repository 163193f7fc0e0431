"""The table of architectures: what writes to the residual stream in each, as pure data."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["FAMILIES", "Axis", "Component", "Family", "Layout", "Module"]

Axis = Literal["out", "in"]
Component = Literal["attention", "mlp", "embedding"]


class Module(NamedTuple):
    """A module whose output is added to the residual stream.

    Attributes:
        path: Its name relative to a layer (an embedding's: to the decoder); ``#`` is an expert's number.
        axis: ``out`` for ``[..., d, n]`` as in nn.Linear, ``in`` for ``[..., n, d]`` as in embeddings.
        gain: The norm of the same layer that its output passes through; ``1 + NAME`` where that norm
            multiplies by one plus its weight.
        fused: It is one parameter that stacks the matrices of all experts, ``[E, ...]``.
        unless: Where this module exists, the output goes there and not to the stream; a name as ``path`` is.
    """

    path: str
    axis: Axis = "out"
    gain: str = ""
    fused: bool = False
    unless: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the writers lie; the defaults are Llama's.

    Attributes:
        attention: The attention modules that write.
        mlp: The MLP modules that write.
        embedding: The embedding modules that write.
        roots: Where the decoder may lie.
        layers: The name of its list of layers.
        final: The norm after the last layer.
        around: What a layer holds beside the parents of its writers, a string per variant; what recognises a
            checkpoint without config.json, and empty where the names do not tell the architecture.
        marks: Tensors of a layer that only this layout has.
        beside: What the decoder holds beside its embeddings, layers and final norm.
        refused: Settings of config.json (key, value, why) under which the writers cannot be edited.
    """

    attention: tuple[Module, ...] = (Module("self_attn.o_proj"),)
    mlp: tuple[Module, ...] = (Module("mlp.down_proj"),)
    embedding: tuple[Module, ...] = (Module("embed_tokens", "in"),)
    roots: tuple[str, ...] = (
        "model.",
        "model.language_model.",
        "model.text_model.",
        "language_model.model.",
        "language_model.",
        "text_model.model.",
        "text_model.",
        "",
    )
    layers: str = "layers"
    final: str = "norm"
    around: tuple[str, ...] = ("input_layernorm post_attention_layernorm",)
    marks: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    refused: tuple[tuple[str, Any, str], ...] = ()


class Family(NamedTuple):
    """One line of the table: a name, every ``model_type`` it goes by, and its layout."""

    name: str
    model_types: tuple[str, ...]
    layout: Layout = Layout()


_HYBRID = (Module("self_attn.o_proj"), Module("linear_attn.out_proj"))
_EXPERTS = (
    Module("mlp.down_proj"),
    Module("mlp.experts.#.down_proj"),
    Module("mlp.experts.down_proj", fused=True),
)
_SHARED = Module("mlp.shared_experts.down_proj")
_SHARED_GATED = Module("mlp.shared_expert.down_proj")

_MOE = Layout(mlp=_EXPERTS)
_MOE_SHARED = Layout(mlp=(*_EXPERTS, _SHARED))
_MOE_SHARED_GATED = Layout(mlp=(*_EXPERTS, _SHARED_GATED))
_HYBRID_DENSE = Layout(attention=_HYBRID)
_HYBRID_MOE = Layout(attention=_HYBRID, mlp=(*_EXPERTS, _SHARED_GATED))
_MIXTRAL = Layout(mlp=(Module("block_sparse_moe.experts.#.w2"), Module("mlp.experts.down_proj", fused=True)))
_GPT_OSS = Layout(mlp=(Module("mlp.experts.down_proj", "in", fused=True),), marks=("mlp.experts.down_proj_bias",))
_QWEN3_VL_MOE = Layout(
    mlp=(Module("mlp.down_proj"), Module("mlp.experts.down_proj", "in", fused=True)),
    roots=("model.language_model.",),
    refused=(
        (
            "model_type",
            "qwen3_vl_moe_text",
            "its experts are stored as [E, d, n] or as [E, n, d] under one name; "
            "describe every writer with [[ablate.target]] in a recipe",
        ),
    ),
)
_LLAMA4 = Layout(
    mlp=(
        Module("feed_forward.down_proj"),
        Module("feed_forward.experts.down_proj", "in", fused=True),
        Module("feed_forward.shared_expert.down_proj"),
    ),
)
_SANDWICH = "input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"
_GEMMA2 = Layout(
    attention=(Module("self_attn.o_proj", gain="1 + post_attention_layernorm"),),
    mlp=(Module("mlp.down_proj", gain="1 + post_feedforward_layernorm"),),
    around=(_SANDWICH,),
)
_GEMMA4 = Layout(
    attention=(Module("self_attn.o_proj", gain="post_attention_layernorm"),),
    mlp=(
        Module("mlp.down_proj", gain="post_feedforward_layernorm"),
        Module("per_layer_projection", gain="post_per_layer_input_norm"),
    ),
    around=(
        f"{_SANDWICH} layer_scalar",
        f"{_SANDWICH} layer_scalar per_layer_input_gate post_per_layer_input_norm",
    ),
    beside=("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"),
    refused=(("enable_moe_block", True, "the sum of MLP and experts passes through a second norm"),),
)
_OLMO2 = Layout(
    attention=(Module("self_attn.o_proj", gain="post_attention_layernorm"),),
    mlp=(Module("mlp.down_proj", gain="post_feedforward_layernorm"),),
    around=("post_attention_layernorm post_feedforward_layernorm",),
)
_GLM4 = Layout(
    attention=(Module("self_attn.o_proj", gain="post_self_attn_layernorm"),),
    mlp=(Module("mlp.down_proj", gain="post_mlp_layernorm"),),
    around=("input_layernorm post_self_attn_layernorm post_attention_layernorm post_mlp_layernorm",),
)
_PARALLEL = Layout(around=("input_layernorm",))
_STABLELM = Layout(around=("input_layernorm", "input_layernorm post_attention_layernorm"))
_STARCODER2 = Layout(mlp=(Module("mlp.c_proj"),))
_PHI = Layout(
    attention=(Module("self_attn.dense"),),
    mlp=(Module("mlp.fc2"),),
    final="final_layernorm",
    around=("input_layernorm",),
)
_CROSS_ATTENTION = ("add_cross_attention", True, "its cross-attention writes to the stream as well")
_GPT2 = Layout(
    attention=(Module("attn.c_proj", "in"),),
    mlp=(Module("mlp.c_proj", "in"),),
    embedding=(Module("wte", "in"), Module("wpe", "in")),
    roots=("transformer.", ""),
    layers="h",
    final="ln_f",
    around=("ln_1 ln_2",),
    refused=(_CROSS_ATTENTION,),
)
_GPT_BIGCODE = Layout(
    attention=(Module("attn.c_proj"),),
    mlp=(Module("mlp.c_proj"),),
    embedding=(Module("wte", "in"), Module("wpe", "in")),
    roots=("transformer.", ""),
    layers="h",
    final="ln_f",
    around=("ln_1 ln_2",),
    refused=(_CROSS_ATTENTION,),
)
_GPT_NEOX = Layout(
    attention=(Module("attention.dense"),),
    mlp=(Module("mlp.dense_4h_to_h"),),
    embedding=(Module("embed_in", "in"),),
    roots=("gpt_neox.", ""),
    final="final_layer_norm",
)
_FALCON = Layout(
    attention=(Module("self_attention.dense"),),
    mlp=(Module("mlp.dense_4h_to_h"),),
    embedding=(Module("word_embeddings", "in"),),
    roots=("transformer.", ""),
    layers="h",
    final="ln_f",
    around=("input_layernorm", "input_layernorm post_attention_layernorm", "ln_attn ln_mlp"),
)
_LFM2 = Layout(
    attention=(Module("self_attn.out_proj"), Module("conv.out_proj")),
    mlp=(
        Module("feed_forward.w2"),
        Module("feed_forward.experts.#.w2"),
        Module("feed_forward.experts.down_proj", fused=True),
    ),
    final="embedding_norm",
    around=(),
)
_LATENT = "mixer.fc2_latent_proj"
_NEMOTRON_H = Layout(
    attention=(Module("mixer.o_proj"), Module("mixer.out_proj")),
    mlp=(
        Module("mixer.down_proj"),
        Module("mixer.experts.#.down_proj", unless=_LATENT),
        Module("mixer.experts.down_proj", fused=True, unless=_LATENT),
        Module("mixer.shared_experts.down_proj"),
        Module(_LATENT),
    ),
    embedding=(Module("embeddings", "in"), Module("embed_tokens", "in")),
    roots=("backbone.", "model.", "language_model.backbone.", "language_model.model.", ""),
    final="norm_f",
    around=(),
)
#: A linear layer may stand in place of a whole sublayer, or nothing.
_NEMOTRON_NAS = Layout(
    attention=(Module("self_attn.o_proj"), Module("self_attn.linear_attn")),
    mlp=(Module("mlp.down_proj"), Module("mlp.linear_mlp")),
    around=(),
)
_GRANITE_HYBRID = Layout(
    attention=(Module("self_attn.o_proj"), Module("mamba.out_proj")),
    mlp=(Module("shared_mlp.output_linear"), Module("block_sparse_moe.output_linear", fused=True)),
    around=(),
)
_JAMBA = Layout(
    attention=(Module("self_attn.o_proj"), Module("mamba.out_proj")),
    mlp=(
        Module("feed_forward.down_proj"),
        Module("feed_forward.experts.#.down_proj"),
        Module("feed_forward.experts.down_proj", fused=True),
    ),
    final="final_layernorm",
    around=(),
)
_OPT = Layout(
    attention=(Module("self_attn.out_proj"),),
    mlp=(Module("fc2"),),
    embedding=(
        Module("embed_tokens", "in", unless="project_in"),
        Module("embed_positions", "in"),
        Module("project_in"),
    ),
    roots=("model.decoder.", "language_model.model.decoder.", "decoder.", ""),
    final="final_layer_norm",
    around=("self_attn_layer_norm final_layer_norm fc1",),
    beside=("project_out",),
    refused=(
        (
            "do_layer_norm_before",
            False,
            "the stream itself is normalised after every addition, so a direction comes back",
        ),
    ),
)

FAMILIES = (
    Family("Llama", ("llama",)),
    Family("Llama 4", ("llama4_text",), _LLAMA4),
    Family("Mistral", ("mistral", "ministral", "ministral3")),
    Family("Mixtral", ("mixtral",), _MIXTRAL),
    Family("Qwen2", ("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")),
    Family("Qwen2-MoE", ("qwen2_moe",), _MOE_SHARED_GATED),
    Family("Qwen3", ("qwen3", "qwen3_vl_text")),
    Family("Qwen3-MoE", ("qwen3_moe",), _MOE),
    Family("Qwen3-VL-MoE", ("qwen3_vl_moe_text",), _QWEN3_VL_MOE),
    Family("Qwen3-Next", ("qwen3_next",), _HYBRID_MOE),
    Family("Qwen3.5", ("qwen3_5", "qwen3_5_text"), _HYBRID_DENSE),
    Family("Qwen3.5-MoE", ("qwen3_5_moe", "qwen3_5_moe_text"), _HYBRID_MOE),
    Family("Phi", ("phi",), _PHI),
    Family("Phi-3", ("phi3",)),
    Family("Gemma", ("gemma",)),
    Family("Gemma 2", ("gemma2",), _GEMMA2),
    Family("Gemma 3", ("gemma3", "gemma3_text"), _GEMMA2),
    Family("Gemma 4", ("gemma4", "gemma4_text"), _GEMMA4),
    Family("OLMo", ("olmo",), Layout(around=())),
    Family("OLMo 2", ("olmo2",), _OLMO2),
    Family("OLMo 3", ("olmo3",), _OLMO2),
    Family("OLMoE", ("olmoe",), _MOE),
    Family("gpt-oss", ("gpt_oss",), _GPT_OSS),
    Family("DeepSeek-V2", ("deepseek_v2",), _MOE_SHARED),
    Family("DeepSeek-V3", ("deepseek_v3",), _MOE_SHARED),
    Family("GLM", ("glm",)),
    Family("GLM-4", ("glm4",), _GLM4),
    Family("GLM-4-MoE", ("glm4_moe",), _MOE_SHARED),
    Family("Granite", ("granite",)),
    Family("Cohere", ("cohere",), _PARALLEL),
    Family("Cohere 2", ("cohere2",), _PARALLEL),
    Family("StarCoder2", ("starcoder2",), _STARCODER2),
    Family("StableLM", ("stablelm",), _STABLELM),
    Family("SmolLM3", ("smollm3",)),
    Family("GPT-2", ("gpt2",), _GPT2),
    Family("GPT-BigCode", ("gpt_bigcode",), _GPT_BIGCODE),
    Family("GPT-NeoX", ("gpt_neox",), _GPT_NEOX),
    Family("Falcon", ("falcon",), _FALCON),
    Family("OPT", ("opt",), _OPT),
    Family("LFM2", ("lfm2", "lfm2_moe"), _LFM2),
    Family("Nemotron-H", ("nemotron_h",), _NEMOTRON_H),
    Family("Nemotron-NAS", ("nemotron-nas", "deci"), _NEMOTRON_NAS),
    Family("Granite-MoE-Hybrid", ("granitemoehybrid",), _GRANITE_HYBRID),
    Family("Jamba", ("jamba",), _JAMBA),
    Family("Falcon-H1", ("falcon_h1",), _JAMBA),
)
