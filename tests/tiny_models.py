"""Tiny random-weight transformers models, one per architecture of the table and per form on disk."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

__all__ = ["TINY_MODELS", "TinyModel", "capture_stream", "save_tiny_adapter", "save_tiny_model", "train_at_random"]

HIDDEN = 32
VOCAB = 64

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE: dict[str, Any] = {
    "moe_intermediate_size": 24,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}
_GATED_SHARED = {"shared_expert_intermediate_size": 24}
_HYBRID: dict[str, Any] = {
    "head_dim": 8,
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 2,
}
_LATENT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": HIDDEN,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_PIXTRAL: dict[str, Any] = {
    "model_type": "pixtral",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
_SIGLIP = {**_PIXTRAL, "model_type": "siglip_vision_model"}
_IDEFICS_VISION = {key: value for key, value in _PIXTRAL.items() if key != "model_type"}
_CLIP = {**_PIXTRAL, "model_type": "clip_vision_model", "projection_dim": 16}
_GPT = {"vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GPT |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


@dataclass(frozen=True)
class TinyModel:
    """One architecture in one form on disk.

    Attributes:
        family: Its row in the table.
        model: The transformers class, saved and loaded.
        config: The configuration class.
        settings: What the configuration is made of.
        native: Whether it is saved as on the Hub, one tensor per expert, or as transformers holds it, fused.
        extra: Tensors that no transformers class loads, name to shape.
    """

    family: str
    model: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    native: bool = True
    extra: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def load(self, folder: Path) -> torch.nn.Module:
        """Loads the model from a folder, in evaluation mode."""
        model = getattr(transformers, self.model).from_pretrained(folder, dtype=torch.float32)
        return model.eval()


def _tiny(family: str, stem: str, *, head: str = "ForCausalLM", **settings: Any) -> TinyModel:
    own = {key: settings.pop(key) for key in {"native", "extra"} & settings.keys()}
    config = settings.pop("config", f"{stem}Config")
    return TinyModel(family, stem + head, config, {**_BASE, **settings}, **own)


def _multimodal(
    family: str, model: str, config: str, text: dict[str, Any], vision: dict[str, Any], **more: Any
) -> TinyModel:
    own = {key: more.pop(key) for key in {"native", "extra"} & more.keys()}
    return TinyModel(family, model, config, {"text_config": text, "vision_config": vision, **more}, **own)


def _mtp(prefix: str, start: str, width: int) -> dict[str, tuple[int, ...]]:
    return {
        start: (HIDDEN, 2 * HIDDEN),
        f"{prefix}self_attn.q_proj.weight": (width, HIDDEN),
        f"{prefix}self_attn.o_proj.weight": (HIDDEN, width),
        f"{prefix}mlp.up_proj.weight": (48, HIDDEN),
        f"{prefix}mlp.down_proj.weight": (HIDDEN, 48),
        f"{prefix}input_layernorm.weight": (HIDDEN,),
    }


_QWEN_MTP = _mtp("mtp.layers.0.", "mtp.fc.weight", HIDDEN)
_DEEPSEEK_MTP = {
    **_mtp("model.layers.3.", "model.layers.3.eh_proj.weight", HIDDEN),
    "model.layers.3.enorm.weight": (HIDDEN,),
    "model.layers.3.embed_tokens.weight": (VOCAB, HIDDEN),
}
_QWEN_TEXT = {**_BASE, **_MROPE}
_QWEN35_VISION = {**_QWEN_VISION, "num_position_embeddings": 16}
_GEMMA_TEXT = {**_BASE, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
_GEMMA4: dict[str, Any] = {
    "head_dim": 8,
    "global_head_dim": 8,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"],
}
_GEMMA4_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "position_embedding_size": 16,
}
_MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}
#: One sublayer a layer: Mamba, MLP, attention, experts.
_NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["mamba", "mlp", "attention", "moe"],
    "head_dim": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "ssm_state_size": 8,
    "n_groups": 2,
    "chunk_size": 8,
    "n_routed_experts": 4,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
    "moe_shared_expert_intermediate_size": 24,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
}
_CONVOLUTION = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
_LFM2_MOE = {"num_dense_layers": 1, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
_GRANITE_HYBRID = {**_MAMBA, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 48}
_JAMBA: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "num_experts": 4,
    "mamba_d_state": 8,
    "use_mamba_kernels": False,
}
_FALCON = {"alibi": False, "bias": True}
_LLAMA_BIAS = {"attention_bias": True, "mlp_bias": True}

TINY_MODELS: dict[str, TinyModel] = {
    "llama": _tiny("Llama", "Llama", **_LLAMA_BIAS),
    "llama-bare": _tiny("Llama", "Llama", head="Model"),
    "llava": _multimodal(
        "Llama", "LlavaForConditionalGeneration", "LlavaConfig", {**_BASE, "model_type": "llama"}, _CLIP
    ),
    "idefics3": _multimodal(
        "Llama",
        "Idefics3ForConditionalGeneration",
        "Idefics3Config",
        {**_BASE, "model_type": "llama"},
        _IDEFICS_VISION,
        scale_factor=2,
    ),
    "smolvlm": _multimodal(
        "Llama",
        "SmolVLMForConditionalGeneration",
        "SmolVLMConfig",
        {**_BASE, "model_type": "llama"},
        _IDEFICS_VISION,
        scale_factor=2,
    ),
    "llama4": _tiny(
        "Llama 4",
        "Llama4",
        config="Llama4TextConfig",
        head_dim=8,
        intermediate_size_mlp=40,
        num_local_experts=4,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        attention_chunk_size=32,
    ),
    "mistral": _tiny("Mistral", "Mistral"),
    "ministral3": _tiny("Mistral", "Ministral3", head_dim=8),
    "mistral3": _multimodal(
        "Mistral",
        "Mistral3ForConditionalGeneration",
        "Mistral3Config",
        {**_BASE, "model_type": "mistral", "head_dim": 8},
        _PIXTRAL,
    ),
    "mixtral": _tiny("Mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    "mixtral-fused": _tiny("Mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, native=False),
    "qwen2": _tiny("Qwen2", "Qwen2", tie_word_embeddings=True),
    "qwen2-vl": _multimodal(
        "Qwen2",
        "Qwen2VLForConditionalGeneration",
        "Qwen2VLConfig",
        _QWEN_TEXT,
        {"depth": 1, "embed_dim": 16, "hidden_size": HIDDEN, "num_heads": 2, "patch_size": 4, "mlp_ratio": 2},
    ),
    "qwen2.5-vl": _multimodal(
        "Qwen2",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen2_5_VLConfig",
        _QWEN_TEXT,
        {**_QWEN_VISION, "fullatt_block_indexes": [1]},
    ),
    "qwen2-moe": _tiny("Qwen2-MoE", "Qwen2Moe", **_MOE, **_GATED_SHARED, mlp_only_layers=[0]),
    "qwen3": _tiny("Qwen3", "Qwen3", head_dim=8, attention_bias=True),
    "qwen3-vl": _multimodal(
        "Qwen3",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {**_QWEN_TEXT, "head_dim": 8},
        {**_QWEN35_VISION, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3-moe": _tiny("Qwen3-MoE", "Qwen3Moe", head_dim=8, **_MOE, mlp_only_layers=[0]),
    "qwen3-moe-fused": _tiny("Qwen3-MoE", "Qwen3Moe", head_dim=8, **_MOE, native=False),
    "qwen3-next": _tiny("Qwen3-Next", "Qwen3Next", **_HYBRID | _MOE | _GATED_SHARED, extra=_QWEN_MTP),
    "qwen3-next-fused": _tiny("Qwen3-Next", "Qwen3Next", **_HYBRID | _MOE | _GATED_SHARED, native=False),
    "qwen3.5": _multimodal(
        "Qwen3.5",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5Config",
        {**_QWEN_TEXT, **_HYBRID, "tie_word_embeddings": True},
        _QWEN35_VISION,
        extra=_QWEN_MTP,
        tie_word_embeddings=True,
    ),
    "qwen3.5-text": _tiny("Qwen3.5", "Qwen3_5", config="Qwen3_5TextConfig", **_MROPE, **_HYBRID),
    "qwen3.5-moe": _multimodal(
        "Qwen3.5-MoE",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {**_QWEN_TEXT, **_HYBRID, **_MOE, **_GATED_SHARED},
        _QWEN35_VISION,
    ),
    "qwen3.5-moe-fused": _multimodal(
        "Qwen3.5-MoE",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen3_5MoeConfig",
        {**_QWEN_TEXT, **_HYBRID, **_MOE, **_GATED_SHARED},
        _QWEN35_VISION,
        native=False,
    ),
    "phi": _tiny("Phi", "Phi", partial_rotary_factor=0.5),
    "phi3": _tiny("Phi-3", "Phi3"),
    "gemma": _tiny("Gemma", "Gemma", head_dim=8),
    "gemma2": _tiny("Gemma 2", "Gemma2", **_GEMMA_TEXT),
    "gemma3": _tiny("Gemma 3", "Gemma3", config="Gemma3TextConfig", **_GEMMA_TEXT),
    "gemma3-vision": _multimodal(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        _GEMMA_TEXT,
        _SIGLIP,
        mm_tokens_per_image=4,
    ),
    "gemma3-vision-renamed": _multimodal(
        "Gemma 3",
        "Gemma3ForConditionalGeneration",
        "Gemma3Config",
        _GEMMA_TEXT,
        _SIGLIP,
        mm_tokens_per_image=4,
        native=False,
    ),
    "gemma4": _tiny(
        "Gemma 4",
        "Gemma4",
        config="Gemma4TextConfig",
        hidden_size_per_layer_input=8,
        **_GEMMA4,
    ),
    "gemma4-vision": _multimodal(
        "Gemma 4",
        "Gemma4ForConditionalGeneration",
        "Gemma4Config",
        {**_BASE, **_GEMMA4, "hidden_size_per_layer_input": 8},
        _GEMMA4_VISION,
    ),
    "gemma4-plain": _tiny(
        "Gemma 4",
        "Gemma4",
        config="Gemma4TextConfig",
        hidden_size_per_layer_input=0,
        **_GEMMA4,
    ),
    "gemma4-experts": _tiny(
        "Gemma 4",
        "Gemma4",
        config="Gemma4TextConfig",
        hidden_size_per_layer_input=8,
        enable_moe_block=True,
        num_experts=4,
        top_k_experts=2,
        moe_intermediate_size=24,
        **_GEMMA4,
    ),
    "bloom": _tiny("BLOOM", "Bloom", n_layer=2, n_head=4),
    "olmo": _tiny("OLMo", "Olmo"),
    "olmo2": _tiny("OLMo 2", "Olmo2"),
    "olmo3": _tiny("OLMo 3", "Olmo3", sliding_window=8),
    "olmoe": _tiny("OLMoE", "Olmoe", num_experts=4, num_experts_per_tok=2),
    "gpt-oss": _tiny("gpt-oss", "GptOss", head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
    "deepseek-v2": _tiny("DeepSeek-V2", "DeepseekV2", **_LATENT, topk_method="greedy"),
    "deepseek-v3": _tiny("DeepSeek-V3", "DeepseekV3", **_LATENT, attention_bias=True, extra=_DEEPSEEK_MTP),
    "deepseek-v3-fused": _tiny("DeepSeek-V3", "DeepseekV3", **_LATENT, native=False),
    "glm": _tiny("GLM", "Glm", head_dim=8),
    "glm4": _tiny("GLM-4", "Glm4", head_dim=8),
    "glm4-moe": _tiny(
        "GLM-4-MoE",
        "Glm4Moe",
        head_dim=8,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        extra=_DEEPSEEK_MTP,
    ),
    "granite": _tiny("Granite", "Granite", residual_multiplier=0.5, embedding_multiplier=3.0, **_LLAMA_BIAS),
    "cohere": _tiny("Cohere", "Cohere"),
    "cohere2": _tiny("Cohere 2", "Cohere2", sliding_window=8),
    "starcoder2": _tiny("StarCoder2", "Starcoder2", use_bias=True),
    "stablelm": _tiny("StableLM", "StableLm", use_parallel_residual=False),
    "stablelm-parallel": _tiny("StableLM", "StableLm", use_parallel_residual=True),
    "smollm3": _tiny("SmolLM3", "SmolLM3"),
    "gpt2": TinyModel("GPT-2", "GPT2LMHeadModel", "GPT2Config", _GPT),
    "gpt2-bare": TinyModel("GPT-2", "GPT2Model", "GPT2Config", _GPT),
    "gpt-bigcode": TinyModel("GPT-BigCode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", _GPT),
    "gpt-neox": _tiny("GPT-NeoX", "GPTNeoX", use_parallel_residual=True),
    "gpt-neox-serial": _tiny("GPT-NeoX", "GPTNeoX", use_parallel_residual=False),
    "falcon-7b": _tiny("Falcon", "Falcon", **_FALCON, multi_query=True, parallel_attn=True),
    "falcon-40b": _tiny("Falcon", "Falcon", **_FALCON, new_decoder_architecture=True, num_kv_heads=2),
    "falcon-rw": _tiny("Falcon", "Falcon", bias=True, alibi=True, multi_query=False, parallel_attn=False),
    "opt": _tiny("OPT", "OPT", ffn_dim=48, word_embed_proj_dim=HIDDEN),
    "lfm2": _tiny("LFM2", "Lfm2", **_CONVOLUTION),
    "lfm2-moe": _tiny("LFM2", "Lfm2Moe", **_CONVOLUTION, **_LFM2_MOE),
    "lfm2-moe-fused": _tiny("LFM2", "Lfm2Moe", **_CONVOLUTION, **_LFM2_MOE, native=False),
    "nemotron-h": _tiny("Nemotron-H", "NemotronH", **_NEMOTRON_H),
    "nemotron-h-latent": _tiny("Nemotron-H", "NemotronH", **_NEMOTRON_H, moe_latent_size=16),
    "nemotron-h-fused": _tiny("Nemotron-H", "NemotronH", **_NEMOTRON_H, native=False),
    "granite-hybrid": _tiny("Granite-MoE-Hybrid", "GraniteMoeHybrid", **_GRANITE_HYBRID, num_local_experts=0),
    "granite-hybrid-moe": _tiny(
        "Granite-MoE-Hybrid", "GraniteMoeHybrid", **_GRANITE_HYBRID, num_local_experts=4, num_experts_per_tok=2
    ),
    "jamba": _tiny("Jamba", "Jamba", **_JAMBA),
    "falcon-h1": _tiny("Falcon-H1", "FalconH1", **_MAMBA, mamba_d_ssm=64, head_dim=8),
    "opt-projected": _tiny("OPT", "OPT", ffn_dim=48, word_embed_proj_dim=16),
}


def save_tiny_model(tiny: TinyModel, folder: Path, *, seed: int = 0) -> Path:
    """Saves a model whose every parameter, gain and bias is random, and returns the folder."""
    generator = torch.Generator().manual_seed(seed)
    config = getattr(transformers, tiny.config)(**tiny.settings)
    model = getattr(transformers, tiny.model)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.5 + noise.abs() if _is_gain(name, parameter) else 0.3 * noise)
    model.save_pretrained(folder, save_original_format=tiny.native)
    if tiny.extra:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        for name, shape in tiny.extra.items():
            tensors[name] = torch.randn(shape, generator=generator)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def save_tiny_adapter(tiny: TinyModel, folder: Path, adapter: Path, **settings: Any) -> Path:
    """Saves an adapter of random values for a saved model, as peft does, and returns its folder."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny.load(folder), peft.LoraConfig(**settings))
        train_at_random(model, 0.2)
        model.save_pretrained(adapter)
    return adapter


def train_at_random(model: torch.nn.Module, size: float, *, added: bool = False) -> None:
    """Gives everything that is trained the same random values in each run, or adds them to what it begins with."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                values = size * torch.randn(parameter.shape, generator=generator)
                (parameter.add_ if added else parameter.copy_)(values)


def capture_stream(model: torch.nn.Module, *, tokens: int = 48) -> list[torch.Tensor]:
    """Runs distinct tokens and returns the stream before the first and after every layer, ``[tokens, d]``."""
    layers = _decoder_layers(model)
    stream: list[torch.Tensor] = []

    def keep(state: Any) -> None:
        state = state[0] if isinstance(state, tuple) else state
        stream.append(state.detach().reshape(-1, state.shape[-1]).clone())

    def keep_input(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(args or kwargs["hidden_states"])

    handles = [layers[0].register_forward_pre_hook(keep_input, with_kwargs=True)]
    handles += [layer.register_forward_hook(lambda _, __, output: keep(output)) for layer in layers]
    with torch.no_grad():
        model(input_ids=torch.arange(3, 3 + tokens)[None])
    for handle in handles:
        handle.remove()
    return stream


def _is_gain(name: str, parameter: torch.Tensor) -> bool:
    return parameter.ndim == 1 and ("norm" in name or "ln_" in name) and name.endswith("weight")


def _decoder_layers(model: torch.nn.Module) -> torch.nn.ModuleList:
    found = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and name.rpartition(".")[2] in ("layers", "h")
        and "vision" not in name
        and "visual" not in name
    ]
    return found[0]
