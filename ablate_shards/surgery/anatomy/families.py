"""The table of architectures: what writes to the residual stream in each, as pure data."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

__all__ = ["FAMILIES", "TIED_BY_DEFAULT", "Axis", "Component", "Family", "Layout", "Module", "Part"]

Axis = Literal["out", "in"]
Component = Literal["attention", "mlp", "embedding"]
Part = Literal[
    "attention",
    "linear-attention",
    "mamba",
    "convolution",
    "cross-attention",
    "mlp",
    "shared-experts",
    "routed-experts",
    "embedding",
]


class Module(NamedTuple):
    """A module whose output is added to the residual stream.

    Attributes:
        path: Its name relative to a layer (an embedding's: to the decoder); ``#`` is an expert's number. With
            ``.bias`` at its end only that of the module writes, as of a LayerNorm.
        axis: ``out`` for ``[..., d, n]`` as in nn.Linear, ``in`` for ``[..., n, d]`` as in embeddings; ``either`` where
            checkpoints have both, which their shapes tell.
        gain: The norm of the same layer that its output passes through; ``1 + NAME`` where that norm
            multiplies by one plus its weight, ``centred NAME`` where it subtracts the mean, ``NAME | OTHER`` where it
            goes by two names, ``NAME | none`` where only some layers have it, ``NAME * NEXT`` where another one
            follows. An embedding's lies beside it.
        fused: It is one parameter that stacks the matrices of all experts, ``[E, ...]``.
        unless: Where this module exists, the output goes there and not to the stream; a name as ``path`` is.
        bare: It is a parameter itself, without ``.weight`` after its name.
    """

    path: str
    axis: Axis | Literal["either"] = "out"
    gain: str = ""
    fused: bool = False
    unless: str = ""
    bare: bool = False

    @property
    def leaf(self) -> str:
        """The last part of its name; the whole where only the bias of a module writes."""
        return self.path if self.path.endswith(".bias") else self.path.rpartition(".")[2]


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
        within: Modules of a layer that are called like writers, and whose output stays within the layer.
        beside: What the decoder holds beside its embeddings, layers and final norm.
        refused: Settings of config.json (key, value, why) under which the writers cannot be edited; True stands for
            all but zero and nothing.
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
    within: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    refused: tuple[tuple[str, Any, str], ...] = ()


class Family(NamedTuple):
    """One line of the table.

    Attributes:
        name: What messages call it.
        model_types: Every ``model_type`` that it goes by.
        layout: Where its writers lie.
        published: Where they lie under the names of makers, if transformers converts these to others of its own.
    """

    name: str
    model_types: tuple[str, ...]
    layout: Layout = Layout()
    published: Layout | None = None

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Its layouts, that of transformers first."""
        return (self.layout,) if self.published is None else (self.layout, self.published)


#: The ``consolidated`` files of Mistral and Meta.
_CONSOLIDATED = Layout(
    attention=(Module("attention.wo"),),
    mlp=(
        Module("feed_forward.w2"),
        Module("feed_forward.experts.#.w2"),
        Module("experts.#.w2"),
        Module("shared_experts.w2"),
    ),
    embedding=(Module("tok_embeddings", "in"),),
    roots=("",),
    around=("attention_norm ffn_norm", "attention_norm ffn_norm gate"),
    beside=("output", "pre_mm_projector_norm"),
)
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
    mlp=(Module("mlp.down_proj"), Module("mlp.experts.down_proj", "either", fused=True)),
    roots=("model.language_model.",),
    around=(),
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
_EXPERTS_OF_GEMMA4 = "post_feedforward_layernorm * post_feedforward_layernorm_2"
_GEMMA4 = Layout(
    attention=(Module("self_attn.o_proj", gain="post_attention_layernorm"),),
    mlp=(
        Module(
            "mlp.down_proj",
            gain="post_feedforward_layernorm * post_feedforward_layernorm_1 | post_feedforward_layernorm",
        ),
        Module("experts.#.down_proj", gain=_EXPERTS_OF_GEMMA4),
        Module("experts.down_proj", gain=_EXPERTS_OF_GEMMA4, fused=True),
        Module("per_layer_projection", gain="post_per_layer_input_norm"),
    ),
    around=tuple(
        f"{_SANDWICH} layer_scalar{inputs}{experts}"
        for inputs in ("", " per_layer_input_gate post_per_layer_input_norm")
        for experts in (
            "",
            " router post_feedforward_layernorm_1 post_feedforward_layernorm_2 pre_feedforward_layernorm_2",
        )
    ),
    within=("router",),
    beside=("embed_tokens_per_layer", "per_layer_model_projection", "per_layer_projection_norm"),
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
        Module("mixer.switch_mlp.fc2", fused=True, unless=_LATENT),
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
    mlp=(
        Module("shared_mlp.output_linear"),
        Module("block_sparse_moe.output_linear", fused=True),
        Module("block_sparse_moe.experts.down_proj", fused=True),
    ),
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

_LONE = Layout(around=())
_SHARED_MLP = Layout(mlp=(*_EXPERTS, _SHARED, Module("mlp.shared_mlp.down_proj")), around=())
_MOE_SHARED_EITHER = Layout(mlp=(*_EXPERTS, _SHARED, _SHARED_GATED), around=())
_BLOCK_SPARSE = Layout(
    mlp=(
        Module("block_sparse_moe.experts.#.w2"),
        Module("block_sparse_moe.shared_experts.down_proj"),
        Module("block_sparse_moe.down_proj"),
        *_EXPERTS,
        _SHARED,
    ),
    around=(),
)
_ERNIE_VL = Layout(
    mlp=(
        *_EXPERTS,
        _SHARED,
        Module("mlp.text_moe.experts.down_proj", fused=True),
        Module("mlp.vision_moe.experts.down_proj", fused=True),
    ),
    around=(),
)
_ARIA = Layout(
    mlp=(
        Module("mlp.experts.fc2", "in", fused=True),
        Module("mlp.experts.down_proj", "in", fused=True),
        _SHARED,
    ),
    around=(),
)
_GRANITE_MOE = Layout(
    mlp=(
        Module("block_sparse_moe.output_linear", fused=True),
        Module("block_sparse_moe.experts.down_proj", fused=True),
        Module("shared_mlp.output_linear"),
    ),
    around=(),
)
_MIMO = Layout(mlp=_EXPERTS, around=())
_STEP3 = Layout(
    mlp=(*_EXPERTS, _SHARED, Module("moe.down_proj", fused=True), Module("share_expert.down_proj")),
    around=(),
)
#: Two sublayers of each kind a layer, and experts beside them.
_LONGCAT = Layout(
    attention=(Module("self_attn.#.o_proj"),),
    mlp=(Module("mlps.#.down_proj"), *_EXPERTS[1:]),
    around=(),
    refused=(
        (
            "zero_expert_num",
            True,
            "its experts without weights add the normalised stream, multiplied coordinate by coordinate, so a "
            "direction comes back; to edit it all the same, take the lines that `ablate-shards inspect SOURCE "
            "--derive` prints, which says how much they leave",
        ),
    ),
)
_BAILING = Layout(
    attention=(Module("self_attn.o_proj"), Module("attention.dense")),
    mlp=(*_EXPERTS, _SHARED),
    embedding=(Module("embed_tokens", "in"), Module("word_embeddings", "in")),
    around=(),
)


def _normed(mlp: tuple[Module, ...], attention: str, after: str) -> Layout:
    """Returns a layout in which a norm follows the attention, and another one all parts of the MLP."""
    return Layout(
        attention=(Module("self_attn.o_proj", gain=attention),),
        mlp=tuple(module._replace(gain=after) for module in mlp),
        around=(),
    )


_AFMOE = _normed((*_EXPERTS, _SHARED), "post_attention_layernorm", "post_mlp_layernorm")
_BEAM = _normed(_EXPERTS, "post_attention_layernorm", "post_feedforward_layernorm")
_KOLIBRI = _normed(
    (*_EXPERTS, _SHARED), "post_self_attn_layernorm | post_attn_norm", "post_mlp_layernorm | post_ffn_norm"
)
_HYPERCLOVAX = _normed((Module("mlp.down_proj"),), "post_norm1 | none", "post_norm2 | none")
_AXK1 = Layout(
    mlp=(
        Module("mlp.down_proj"),
        *(module._replace(gain="post_mlp_layernorm | mlp.post_mlp_layernorm") for module in (*_EXPERTS[1:], _SHARED)),
    ),
    around=(),
)
#: Its norms are gated by small networks of their own.
_AXK2 = Layout(mlp=(*_EXPERTS, _SHARED), within=("input_layernorm", "post_attention_layernorm"), around=())
_OLMO_HYBRID = Layout(
    attention=(
        Module("self_attn.o_proj", gain="post_attention_layernorm | feedforward_layer_norm"),
        Module("linear_attn.o_proj"),
    ),
    mlp=(Module("mlp.down_proj", gain="post_feedforward_layernorm | none"),),
    around=(),
)
_LFM3 = Layout(
    attention=(
        Module("self_attn.o_proj", gain="post_operator_norm"),
        Module("conv.out_proj", gain="post_operator_norm"),
    ),
    mlp=(Module("feed_forward.w2", gain="post_ffn_norm"),),
    final="embedding_norm",
    around=(),
)
_DEEPSEEK_V4 = Layout(
    attention=(Module("self_attn.o_b_proj"), Module("attn.wo_b")),
    mlp=(*_EXPERTS[1:], _SHARED, Module("ffn.experts.#.w2"), Module("ffn.shared_experts.w2")),
    around=(),
)
_RECURRENT_GEMMA = Layout(
    attention=(Module("temporal_block.o_proj"), Module("temporal_block.linear_out")),
    mlp=(Module("mlp_block.down_proj"),),
    final="final_norm",
    around=(),
)
_MAMBA = Layout(
    attention=(Module("mixer.out_proj"),),
    mlp=(),
    embedding=(Module("embeddings", "in"), Module("embedding", "in")),
    roots=("backbone.", "model.backbone.", "model.", ""),
    final="norm_f",
    around=(),
)
#: The attention that some layers share is read by their Mamba, and does not write itself.
_ZAMBA = Layout(
    attention=(Module("mamba.out_proj"), Module("mamba_decoder.mamba.out_proj")),
    mlp=(),
    within=("shared_transf", "shared_transformer"),
    final="final_layernorm",
    around=(),
)
_MLLAMA = Layout(attention=(Module("self_attn.o_proj"), Module("cross_attn.o_proj")), around=())
_CPMANT = Layout(
    attention=(Module("self_att.self_attention.attention_out"),),
    mlp=(Module("ffn.ffn.w_out"),),
    embedding=(Module("input_embedding", "in"), Module("segment_embedding", "in")),
    roots=("cpmant.", ""),
    layers="encoder.layers",
    final="encoder.output_layernorm",
    around=(),
)
_DBRX = Layout(
    attention=(Module("norm_attn_norm.attn.out_proj"),),
    mlp=(Module("ffn.experts.mlp.w2", "in", bare=True),),
    embedding=(Module("wte", "in"),),
    roots=("transformer.", ""),
    layers="blocks",
    final="norm_f",
    around=(),
)
_JETMOE = Layout(
    attention=(Module("self_attention.experts.output_linear", fused=True), Module("self_attention.experts.bias")),
    mlp=(Module("mlp.output_linear", fused=True), Module("mlp.bias")),
    around=(),
)
_GPT_NEOX_JAPANESE = Layout(
    attention=(Module("attention.dense", bare=True),),
    mlp=(Module("mlp.dense_4h_to_h"),),
    embedding=(Module("embed_in", "in"),),
    roots=("gpt_neox_japanese.", ""),
    final="final_layer_norm",
    around=(),
)
_XLSTM = Layout(
    attention=(Module("mlstm_layer.out_proj"),),
    mlp=(Module("ffn.proj_down"),),
    embedding=(Module("embeddings", "in"),),
    roots=("backbone.", "model.", ""),
    layers="blocks",
    final="out_norm",
    around=(),
)
_MPT = Layout(
    attention=(Module("attn.out_proj"),),
    mlp=(Module("ffn.down_proj"),),
    embedding=(Module("wte", "in"),),
    roots=("transformer.", ""),
    layers="blocks",
    final="norm_f",
    around=(),
)
_GPTJ = Layout(
    attention=(Module("attn.out_proj"),),
    mlp=(Module("mlp.fc_out"),),
    embedding=(Module("wte", "in"),),
    roots=("transformer.", ""),
    layers="h",
    final="ln_f",
    around=(),
)
_GPT_NEO = Layout(
    attention=(Module("attn.attention.out_proj"),),
    mlp=(Module("mlp.c_proj"),),
    embedding=(Module("wte", "in"), Module("wpe", "in")),
    roots=("transformer.", ""),
    layers="h",
    final="ln_f",
    around=(),
)
_PERSIMMON = Layout(
    attention=(Module("self_attn.dense"),),
    mlp=(Module("mlp.dense_4h_to_h"),),
    final="final_layernorm",
    around=(),
)
_BIOGPT = Layout(
    attention=(Module("self_attn.out_proj"),),
    mlp=(Module("fc2"),),
    embedding=(Module("embed_tokens", "in"), Module("embed_positions", "in")),
    roots=("biogpt.", ""),
    final="layer_norm",
    around=(),
)
_NANOCHAT = Layout(mlp=(Module("mlp.fc2"),), around=())
_MOSHI = Layout(attention=(Module("self_attn.o_proj.linear"),), mlp=(Module("mlp.fc2"),), around=())
_COSMOS3_EDGE = Layout(mlp=(Module("mlp.fc2"),), around=())
_COSMOS3_PUBLISHED = Layout(attention=(Module("self_attn.to_out"),), around=())
#: Its vocabulary is in two parts, of which transformers makes one.
_MOLMO2_PUBLISHED = Layout(
    attention=(Module("self_attn.attn_out"),),
    mlp=(Module("mlp.ff_out"),),
    embedding=(Module("wte.embedding", "in", bare=True), Module("wte.new_embedding", "in", bare=True)),
    roots=("model.transformer.", "transformer."),
    layers="blocks",
    final="ln_f",
    around=(),
)
_MUSE_GLIMMER = Layout(attention=_GEMMA2.attention, mlp=_GEMMA2.mlp, around=())

# ---------------------------------------------------------------------------------------- decoders beside an encoder

_CROSS = (Module("self_attn.out_proj"), Module("encoder_attn.out_proj"))
_WHISPER = Layout(
    attention=_CROSS,
    mlp=(Module("fc2"),),
    embedding=(Module("embed_tokens", "in"), Module("embed_positions", "in")),
    roots=("model.decoder.", "decoder."),
    final="layer_norm",
    around=(),
)
_PEGASUS = Layout(
    attention=_CROSS,
    mlp=(Module("fc2"),),
    embedding=(Module("shared", "in"), Module("decoder.embed_positions", "in")),
    roots=("model.", ""),
    layers="decoder.layers",
    final="decoder.layer_norm",
    around=(),
)
_T5 = Layout(
    attention=(Module("layer.#.SelfAttention.o"), Module("layer.#.EncDecAttention.o")),
    mlp=(Module("layer.#.DenseReluDense.wo"),),
    embedding=(Module("shared", "in"),),
    roots=("",),
    layers="decoder.block",
    final="decoder.final_layer_norm",
    around=(),
)

# ---------------------------------------------------------------------------------------- a norm after the embedding

_BLOOM = Layout(
    attention=(Module("self_attention.dense"),),
    mlp=(Module("mlp.dense_4h_to_h"),),
    embedding=(
        Module("word_embeddings", "in", gain="centred word_embeddings_layernorm"),
        Module("word_embeddings_layernorm.bias", "in"),
    ),
    roots=("transformer.", ""),
    layers="h",
    final="ln_f",
    beside=("word_embeddings_layernorm",),
    refused=(
        (
            "apply_residual_connection_post_layernorm",
            True,
            "the stream itself is normalised before every addition, so a direction comes back",
        ),
    ),
)
_MBART = Layout(
    attention=_CROSS,
    mlp=(Module("fc2"),),
    embedding=(
        Module("shared", "in", gain="centred decoder.layernorm_embedding"),
        Module("decoder.embed_tokens", "in", gain="centred decoder.layernorm_embedding"),
        Module("decoder.embed_positions", "in", gain="centred decoder.layernorm_embedding"),
        Module("decoder.layernorm_embedding.bias", "in"),
    ),
    roots=("model.", ""),
    layers="decoder.layers",
    final="decoder.layer_norm",
    around=(),
)
_MODERNBERT = Layout(
    attention=(Module("attn.Wo"),),
    mlp=(Module("mlp.Wo"),),
    embedding=(
        Module("embeddings.tok_embeddings", "in", gain="centred embeddings.norm"),
        Module("embeddings.norm.bias", "in"),
    ),
    roots=("model.", ""),
    final="final_norm",
    around=(),
)
_BERT_LAYERS = Layout(
    attention=(Module("attention.output.dense"), Module("crossattention.output.dense")),
    mlp=(Module("output.dense"),),
    embedding=(
        Module("embeddings.word_embeddings", "in"),
        Module("embeddings.position_embeddings", "in"),
        Module("embeddings.token_type_embeddings", "in"),
    ),
    roots=("bert.", "roberta.", ""),
    within=("intermediate",),
    layers="encoder.layer",
    final="encoder.ln",
    around=(),
)
_ROBERTA_NORM = "centred embeddings.LayerNorm"
_ROBERTA_PRELAYERNORM = Layout(
    attention=(Module("attention.output.dense"), Module("crossattention.output.dense")),
    mlp=(Module("output.dense"),),
    embedding=(
        Module("embeddings.word_embeddings", "in", gain=_ROBERTA_NORM),
        Module("embeddings.position_embeddings", "in", gain=_ROBERTA_NORM),
        Module("embeddings.token_type_embeddings", "in", gain=_ROBERTA_NORM),
        Module("embeddings.LayerNorm.bias", "in"),
    ),
    roots=("roberta_prelayernorm.", ""),
    within=("intermediate",),
    layers="encoder.layer",
    final="LayerNorm",
    around=(),
)
_PIX2STRUCT = Layout(
    attention=(Module("self_attention.attention.output"), Module("encoder_decoder_attention.attention.output")),
    mlp=(Module("mlp.DenseReluDense.wo"),),
    roots=("decoder.", ""),
    layers="layer",
    final="final_layer_norm",
    around=(),
)
FAMILIES = (
    Family("Llama", ("llama",), published=_CONSOLIDATED),
    Family("Llama 4", ("llama4_text",), _LLAMA4),
    Family("Mistral", ("mistral", "ministral", "ministral3"), published=_CONSOLIDATED),
    Family("Mixtral", ("mixtral",), _MIXTRAL, _CONSOLIDATED),
    Family("Qwen2", ("qwen2", "qwen2_vl", "qwen2_vl_text", "qwen2_5_vl", "qwen2_5_vl_text")),
    Family("Qwen2-MoE", ("qwen2_moe",), _MOE_SHARED_GATED),
    Family("Qwen3", ("qwen3", "qwen3_vl_text"), published=_COSMOS3_PUBLISHED),
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
    Family("Nemotron", ("nemotron",), _LONE),
    Family("ERNIE 4.5", ("ernie4_5", "paddleocr_vl_text"), _LONE),
    Family("ERNIE-4.5-MoE", ("ernie4_5_moe",), _MOE_SHARED),
    Family("ERNIE-4.5-VL-MoE", ("ernie4_5_vl_moe_text",), _ERNIE_VL),
    Family("Seed-OSS", ("seed_oss",), _LONE),
    Family("EXAONE 4", ("exaone4",), _OLMO2),
    Family("EXAONE-MoE", ("exaone_moe",), _MOE_SHARED),
    Family("Hunyuan", ("hunyuan_v1_dense", "hunyuan_vl_text"), _LONE),
    Family("Hunyuan-MoE", ("hunyuan_v1_moe", "hy_v3"), _SHARED_MLP),
    Family("Hunyuan 4", ("hy_v4",), _MOE_SHARED),
    Family("Helium", ("helium",), _LONE),
    Family("Arcee", ("arcee",), _LONE),
    Family("Apertus", ("apertus",), _LONE),
    Family("Phi-4-multimodal", ("phi4_multimodal",), _LONE),
    Family("BitNet", ("bitnet",), _LONE),
    Family("Cohere Compass", ("cohere_compass_text",), _LONE),
    Family("CWM", ("cwm",), _LONE),
    Family("DiffLlama", ("diffllama",), _LONE),
    Family("InternLM3", ("internlm3",), _LONE),
    Family("IQuest-Coder", ("iquestcoder",), _LONE),
    Family("Jais 2", ("jais2",), _LONE),
    Family("MiniCPM3", ("minicpm3",), _LONE),
    Family("Granite-SWA", ("granite_swa",), _LONE),
    Family("Granite 4 Vision", ("granite4_vision_text",), _LONE),
    Family("Granite-Docling", ("granite_docling_text",), _LONE),
    Family("Mllama", ("mllama_text_model",), _MLLAMA),
    Family("Chameleon", ("chameleon",), _LONE),
    Family("Emu 3", ("emu3_text_model",), _LONE),
    Family("Molmo 2", ("molmo2_text",), _LONE, _MOLMO2_PUBLISHED),
    Family("VaultGemma", ("vaultgemma",), _LONE),
    Family("Youtu", ("youtu",), _LONE),
    Family("Qwen2.5-Omni", ("qwen2_5_omni_text",), _LONE),
    Family("Qwen3-Omni-MoE", ("qwen3_omni_moe_text",), _MOE),
    Family("Mistral 4", ("mistral4",), _MOE_SHARED, _CONSOLIDATED),
    Family("Mistral Large 4", ("mistral_large4", "mistral_large4_text"), _MOE_SHARED, _CONSOLIDATED),
    Family("Phi-MoE", ("phimoe",), _MIXTRAL),
    Family("MiniMax-M2", ("minimax_m2",), _MIXTRAL),
    Family("MiniMax-M3", ("minimax_m3_vl_text",), _BLOCK_SPARSE),
    Family("Kimi Linear", ("kimi_linear",), _BLOCK_SPARSE),
    Family("dots.llm1", ("dots1", "dots3_note_text"), _MOE_SHARED),
    Family("DeepSeek-V3.2", ("deepseek_v32",), _MOE_SHARED),
    Family("DeepSeek-V4", ("deepseek_v4",), _DEEPSEEK_V4),
    Family("DeepSeek-OCR", ("deepseek_ocr2_text", "unlimited_ocr_text"), _MOE_SHARED),
    Family("GLM-MoE-DSA", ("glm_moe_dsa",), _MOE_SHARED),
    Family("GLM-5-Next", ("glm5_next_text",), _MOE_SHARED),
    Family("GLM-4-MoE-lite", ("glm4_moe_lite",), _MOE_SHARED),
    Family("GLM-4V", ("glm4v_text", "glm_ocr_text"), _GLM4),
    Family("GLM-4V-MoE", ("glm4v_moe_text",), _MOE_SHARED),
    Family("A.X K1", ("axk1",), _AXK1),
    Family("A.X K2", ("axk2",), _AXK2),
    Family("Solar Open", ("solar_open",), _MOE_SHARED),
    Family("MiMo-V2", ("mimo_v2_flash",), _MIMO),
    Family("Mellum", ("mellum",), _MOE),
    Family("Cohere-2-MoE", ("cohere2_moe",), _MOE),
    Family("Flint", ("flint",), _MOE_SHARED_GATED),
    Family("Laguna", ("laguna",), _MOE_SHARED_EITHER),
    Family("Step 3.5", ("step3p5",), _STEP3),
    Family("LongCat-Flash", ("longcat_flash",), _LONGCAT),
    Family("Bailing", ("bailing_hybrid",), _BAILING),
    Family("AFMoE", ("afmoe",), _AFMOE),
    Family("Beam", ("beam",), _BEAM),
    Family("FlexOLMo", ("flex_olmo",), _BEAM),
    Family("Kolibri", ("kolibri1",), _KOLIBRI),
    Family("HyperCLOVA X", ("hyperclovax",), _HYPERCLOVAX),
    Family("OLMo-Hybrid", ("olmo_hybrid",), _OLMO_HYBRID),
    Family("Gemma 4 unified", ("gemma4_unified_text",), _GEMMA4),
    Family("Muse Glimmer", ("muse_glimmer_text",), _MUSE_GLIMMER),
    Family("Granite-MoE", ("granitemoe", "granitemoeshared", "granitemoe_swa"), _GRANITE_MOE),
    Family("Aria", ("aria_text",), _ARIA),
    Family("LFM3", ("lfm3",), _LFM3),
    Family("Bamba", ("bamba",), _JAMBA),
    Family("Recurrent Gemma", ("recurrent_gemma",), _RECURRENT_GEMMA),
    Family("Mamba", ("mamba", "mamba2", "falcon_mamba"), _MAMBA),
    Family("Zamba", ("zamba", "zamba2"), _ZAMBA),
    Family("xLSTM", ("xlstm",), _XLSTM),
    Family("MPT", ("mpt",), _MPT),
    Family("GPT-J", ("gptj", "codegen"), _GPTJ),
    Family("GPT-Neo", ("gpt_neo",), _GPT_NEO),
    Family("Persimmon", ("persimmon",), _PERSIMMON),
    Family("BioGPT", ("biogpt",), _BIOGPT),
    Family("nanochat", ("nanochat",), _NANOCHAT),
    Family("Moshi", ("moshi",), _MOSHI),
    Family("Cosmos 3 Edge", ("cosmos3_edge_text",), _COSMOS3_EDGE, _COSMOS3_PUBLISHED),
    Family("Whisper", ("whisper",), _WHISPER),
    Family("Pegasus", ("pegasus", "blenderbot", "bigbird_pegasus"), _PEGASUS),
    Family("T5", ("t5", "mt5", "umt5", "udop"), _T5),
    Family("Pix2Struct", ("pix2struct_text_model",), _PIX2STRUCT),
    Family("CPM-Ant", ("cpmant",), _CPMANT),
    Family("DBRX", ("dbrx",), _DBRX),
    Family("JetMoE", ("jetmoe",), _JETMOE),
    Family("GPT-NeoX-Japanese", ("gpt_neox_japanese",), _GPT_NEOX_JAPANESE),
    Family("Megatron-BERT", ("megatron-bert", "xlm-roberta-xl"), _BERT_LAYERS),
    Family("BLOOM", ("bloom",), _BLOOM),
    Family("mBART", ("mbart",), _MBART),
    Family("ModernBERT decoder", ("modernbert-decoder",), _MODERNBERT),
    Family("RoBERTa-PreLayerNorm", ("roberta-prelayernorm",), _ROBERTA_PRELAYERNORM),
)

#: Those whose class in transformers ties the output head where config.json does not say.
TIED_BY_DEFAULT = frozenset(
    {
        "bigbird_pegasus",
        "biogpt",
        "blenderbot",
        "bloom",
        "cohere",
        "cohere2",
        "cohere2_moe",
        "cohere_compass_text",
        "cpmant",
        "ernie4_5",
        "ernie4_5_moe",
        "ernie4_5_vl_moe_text",
        "falcon",
        "falcon_mamba",
        "gemma",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma4",
        "gemma4_text",
        "gemma4_unified_text",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox_japanese",
        "granite_docling_text",
        "granite_swa",
        "hunyuan_vl_text",
        "jetmoe",
        "lfm2",
        "lfm2_moe",
        "lfm3",
        "mamba",
        "mbart",
        "megatron-bert",
        "minicpm3",
        "modernbert-decoder",
        "mpt",
        "mt5",
        "opt",
        "paddleocr_vl_text",
        "pegasus",
        "recurrent_gemma",
        "roberta-prelayernorm",
        "smollm3",
        "starcoder2",
        "t5",
        "udop",
        "umt5",
        "vaultgemma",
        "whisper",
        "xlm-roberta-xl",
        "youtu",
        "zamba",
        "zamba2",
    }
)
