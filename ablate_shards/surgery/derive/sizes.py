"""A configuration of the same structure and a few thousand parameters."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "VOCABULARY", "shrink"]

#: Length of the stream, of every head, and of the vocabulary; heads times their length is the hidden size.
HIDDEN, HEAD, VOCABULARY = 64, 16, 128
_HEADS = HIDDEN // HEAD
#: Positions.
_LENGTH = 256
_MOST_LAYERS = 8
_FEWEST_LAYERS = 2

_DEPTH = re.compile(
    r"(?:num_)?(?:hidden_|encoder_|decoder_|global_)?layers|n_layers?|depth|num_blocks|num_layers_per_stack"
    r"|resampler_depth|num_hidden_layers|\w+_depth|aligner_num_add_layers"
)
#: Lists with an entry a layer, by what they list; others name layers by their number.
_NUMBERED = re.compile(r"\w*(?:layers|idxs|indexes|indices|layer_ids|layer_id)$")
_PERIOD = re.compile(
    r"\w*(?:period|interval|every_n_layers|sliding_window_pattern|sparse_step|moe_layer_step|group_size)$"
)
_START = re.compile(r"\w*(?:layer_offset|start_index|dense_replace|num_dense_layers)$")

_Rule = tuple[re.Pattern[str], int | Callable[[int], int]]


def _most(limit: int) -> Callable[[int], int]:
    return lambda found: min(found, limit)


#: What a number becomes, by its key; the first that matches counts.
_RULES: tuple[_Rule, ...] = tuple(
    (re.compile(pattern), value)
    for pattern, value in (
        (r"(?:\w*_)?vocab_size(?:_per_layer_input)?", VOCABULARY),
        (r"\w*vocab\w*(?:size|offset|base)|\w*_vocab", _most(VOCABULARY)),
        (r"hidden_size_per_layer_input|altup_coef_clip|laurel_rank|ple_embed_dim", _most(8)),
        (
            r"max_\w*positions?\w*|n_positions|n_ctx|max_seq_len|context_length|model_max_length|\w*seq_length",
            _LENGTH,
        ),
        (r"(?:\w*_)?(?:qk_)?(?:nope|rope)_head_dim|v_head_dim|index_head_dim|rotary_dim", _most(HEAD // 2)),
        (r"qk_head_dim", _most(HEAD)),
        (r"linear_(?:key|value)_head_dim|linear_head_dim", _most(8)),
        (r"linear_num_value_heads", _most(4)),
        (r"linear_num_(?:key_)?heads|linear_num_heads", _most(2)),
        (r"mamba_(?:n|num)_heads|n_mamba_heads", 8),
        (r"mamba_(?:d_head|head_?dim)", 16),
        (r"mamba_d_ssm", 128),
        (r"\w*(?:d_state|state_size)", _most(8)),
        (r"\w*(?:time_step_rank|dt_rank)", 4),
        (r"\w*(?:chunk_size|chunk_length)", _most(8)),
        (r"mamba_n_?groups|n_groups", _most(2)),
        (r"n_group|topk_group|num_expert_group|o_groups", 1),
        (
            r"(?:\w*_)?head_?dim|dim_head|d_head|d_kv|attention_head_(?:size|dim)|kv_channels|query_pre_attn_scalar",
            HEAD,
        ),
        (r"\w*(?:per_tok|per_token|top_?k|moe_k)", _most(2)),
        (r"(?:\w*_)?(?:n|num)_shared_experts", _most(1)),
        (r"(?:\w*_)?num_\w*experts|num_experts|n_routed_experts|num_local_experts|zero_expert_num", _most(4)),
        (r"\w*rank\w*|router_hidden_size", _most(16)),
        (r"moe_intermediate_size|\w*expert\w*(?:intermediate_size|dim|hidden_size)", _most(24)),
        (
            r"\w*intermediate_size\w*|\w*ffn_dim|\w*ffn_hidden_size|d_ff|d_inner|dff|dim_ff|mlp_dim|feed_forward_size"
            r"|n_inner|ffn_config|moe_hidden_size|prompt_mid_dim",
            _most(48),
        ),
        (
            r"(?:\w*_)?(?:hidden_size|d_model|n_embd|n_embed|emb_dim|embed_dim|embedding_dim|embedding_size|hidden_dim"
            r"|output_dim|projection_dim|input_size|out_hidden_size|lru_width|word_embed_proj_dim|projector_input_dim"
            r"|projector_output_dim|hidden_size_global|attention_hidden_size|adapter_out_dim|adapter_in_dim)",
            HIDDEN,
        ),
        (r"(?:index_n_heads|resampler_n_heads|resampler_heads)", 2),
        (
            r"sliding_window|window_size|local_attention|attention_window_size|\w*window_len|sliding_window_size",
            _most(16),
        ),
        (r"image_size|crop_size", _most(32)),
        (r"patch_size", _most(8)),
    )
)
_KEY_HEADS = re.compile(r"\w*(?:num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups|num_key_value_groups)")
_QUERY_HEADS = re.compile(r"(?:\w*_)?(?:num_)?(?:attention_)?heads|n_heads?")
_TOKEN = re.compile(r"\w*(?:_token_id|_token_index|_token_ids)|im_\w+_id|\w*_tok_id")
_SCALED = frozenset({"longrope", "yarn", "llama3", "dynamic", "linear", "su"})
_OTHERS = frozenset({"id2label", "label2id", "quantization_config", "torch_dtype", "dtype", "transformers_version"})


def shrink(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a configuration with the same kinds of layers in the same order, made small.

    What depends on one another stays consistent: heads times their length is the hidden size where it was, queries
    share keys where they did, and a list with an entry a layer keeps one of each kind.

    Args:
        values: The tables of a config.json.
    """
    kept = _kept_layers(values)
    small: dict[str, Any] = {}
    ids = iter(range(VOCABULARY - 1, 0, -1))
    for key, value in values.items():
        if key in _OTHERS:
            continue
        small[key] = _shrunk(key, value, values, kept, ids)
    return small


def _shrunk(key: str, value: Any, values: Mapping[str, Any], kept: Sequence[int], ids: Any) -> Any:
    if key in ("rope_parameters", "rope_scaling") and isinstance(value, Mapping):
        return _rope(value, values)
    if isinstance(value, Mapping):
        if value and all(str(each).isdecimal() for each in value):
            return {kept.index(int(each)): shrink(what) for each, what in value.items() if int(each) in kept}
        return shrink(value)
    if isinstance(value, list):
        return _list(key, value, values, kept)
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    if _TOKEN.fullmatch(key):
        return value if value < 3 else next(ids)
    if _DEPTH.fullmatch(key):
        return min(value, len(kept))
    if _START.fullmatch(key):
        return min(value, 1)
    if key in ("word_embed_proj_dim", "embedding_size") and value != values.get("hidden_size"):
        return HIDDEN // 2
    if key == "head_dim" and value == values.get("qk_rope_head_dim"):
        key = "qk_rope_head_dim"
    for pattern, becomes in _RULES:
        if pattern.fullmatch(key):
            return value if value <= 0 else becomes(value) if callable(becomes) else becomes
    if _KEY_HEADS.fullmatch(key):
        heads = next((values[each] for each in values if _QUERY_HEADS.fullmatch(each) and values[each]), value)
        return _HEADS if value == heads else 1 if value == 1 else _HEADS // 2
    if _QUERY_HEADS.fullmatch(key):
        wide = "expand" in values and "num_attention_heads" not in values
        return values["expand"] * _HEADS if wide else min(value, _HEADS)
    return value


def _depth(values: Mapping[str, Any]) -> int | None:
    found = [
        value
        for key, value in values.items()
        if _DEPTH.fullmatch(key) and isinstance(value, int) and not isinstance(value, bool)
    ]
    return max(found, default=None)


def _kept_layers(values: Mapping[str, Any]) -> list[int]:
    """Returns the layers that stand for all: one of each kind where lists name the kinds, else the first few."""
    depth = _depth(values)
    if depth is None:
        return [0, 1]
    lists = [value for value in values.values() if isinstance(value, list) and len(value) == depth > 1]
    numbered = [
        [value.get(layer, value.get(str(layer))) for layer in range(depth)]
        for key, value in values.items()
        if key not in _OTHERS and isinstance(value, Mapping) and value and all(str(each).isdecimal() for each in value)
    ]
    lists += numbered
    if lists:
        lists += [
            [layer in value for layer in range(depth)]
            for key, value in values.items()
            if isinstance(value, list) and value and _NUMBERED.fullmatch(key) and _all_numbers(value)
        ]
        kinds: dict[tuple[str, ...], int] = {}
        for layer, kind in enumerate(zip(*lists, strict=True)):
            kinds.setdefault(tuple(map(str, kind)), layer)
        kept = sorted(kinds.values())[:_MOST_LAYERS]
        return kept if len(kept) > 1 else list(range(min(depth, _FEWEST_LAYERS)))
    count = _FEWEST_LAYERS
    for key, value in values.items():
        if isinstance(value, bool):
            continue
        if (isinstance(value, int) and value > 1 and _PERIOD.fullmatch(key)) or (
            isinstance(value, int) and value > 0 and _START.fullmatch(key)
        ):
            count = max(count, value + 1 if _PERIOD.fullmatch(key) else 3)
        elif isinstance(value, list) and value and _NUMBERED.fullmatch(key) and _all_numbers(value):
            count = max(count, min(value) + 2)
    return list(range(min(depth, _MOST_LAYERS, count)))


def _all_numbers(value: list[Any]) -> bool:
    return all(isinstance(each, int) and not isinstance(each, bool) for each in value)


def _list(key: str, value: list[Any], values: Mapping[str, Any], kept: Sequence[int]) -> list[Any]:
    depth = _depth(values)
    if depth is not None and len(value) == depth:
        return [_shrunk(key, value[layer], values, kept, iter(())) for layer in kept]
    if _NUMBERED.fullmatch(key) and _all_numbers(value):
        return [layer for layer in value if layer < len(kept)]
    if all(isinstance(each, Mapping) for each in value):
        return [shrink(each) for each in value]
    return value


def _rope(value: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    small: dict[str, Any] = {}
    part = value.get("partial_rotary_factor", values.get("partial_rotary_factor")) or 1.0
    for key, each in value.items():
        if isinstance(each, Mapping):
            small[key] = _rope(each, values)
        elif key in ("rope_type", "type"):
            small[key] = "default" if each in _SCALED else each
        elif key == "mrope_section":
            whole = int(HEAD * part) // 2
            small[key] = [whole - 2 * (whole // 3), whole // 3, whole // 3][: len(each)]
        elif each is None or isinstance(each, bool) or key in ("rope_theta", "partial_rotary_factor"):
            small[key] = each
    return small
