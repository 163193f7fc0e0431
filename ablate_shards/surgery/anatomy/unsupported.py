"""Architectures that are known and not in the table, and why no edit of their writers would hold."""

from typing import NamedTuple

__all__ = ["REASONS", "Reason", "reason_for"]


class Reason(NamedTuple):
    """Why some architectures are not in the table.

    Attributes:
        why: What it is, as the end of a sentence.
        model_types: Those that it holds for.
    """

    why: str
    model_types: tuple[str, ...]


REASONS = (
    Reason(
        "the stream itself is normalised after each addition, so a direction comes back",
        (
            "bart",
            "bert",
            "bert-generation",
            "big_bird",
            "blenderbot-small",
            "blip",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "florence2",
            "git",
            "marian",
            "minimax",
            "moss_transcribe_diarize_text",
            "mvp",
            "openai-gpt",
            "plbart",
            "pp_formulanet",
            "prophetnet",
            "rembert",
            "roberta",
            "roc_bert",
            "roformer",
            "trocr",
            "vision-encoder-decoder",
            "xlm",
            "xlm-roberta",
            "xlnet",
            "xmod",
        ),
    ),
    Reason(
        "a norm that subtracts the mean stands between the embedding and the stream, so a direction comes back",
        ("bloom", "mbart", "modernbert-decoder", "roberta-prelayernorm", "rwkv"),
    ),
    Reason(
        "positions are computed and added to the embedding, and no tensor holds them",
        ("ctrl", "kosmos-2", "kosmos-2.5", "musicgen", "musicgen_melody", "xglm"),
    ),
    Reason("vectors multiply the stream coordinate by coordinate, so a direction comes back", ("doge", "zaya")),
    Reason(
        "a convolution along the tokens, with weights of its own for each coordinate, follows the writers",
        ("inkling2", "inkling2_text", "inkling_mm_model", "inkling_text"),
    ),
    Reason(
        "experts without weights add the normalised stream, multiplied coordinate by coordinate",
        ("longcat_flash",),
    ),
    Reason(
        "an output passes through two gains before it is added",
        ("diffusion_gemma", "muse_spark", "muse_spark_text"),
    ),
    Reason(
        "several streams are added up in ways that an edit of writers does not reach",
        ("blt", "gemma3n", "gemma3n_text", "hrm_text", "reformer"),
    ),
    Reason(
        "what it stores cannot be described by a line of the table; `ablate-shards inspect SOURCE --derive` finds the "
        "lines of a recipe for it",
        ("dbrx", "gpt_neox_japanese", "jetmoe", "megatron-bert", "t5gemma2", "xlm-roberta-xl"),
    ),
    Reason(
        "it runs on images, boxes or states beside the text, without which its writers were not proven; "
        "`ablate-shards inspect SOURCE --derive` says what it finds",
        ("evolla", "idefics", "pi0", "pix2struct", "pix2struct_text_model", "udop"),
    ),
    Reason("its layers could not be followed one by one, so its writers were not proven", ("cpmant",)),
    Reason(
        "transformers builds no model of its default configuration, so it was not proven; `ablate-shards inspect "
        "SOURCE --derive` finds the lines of a recipe from that of a checkpoint",
        (
            "deepseek_ocr2",
            "deepseek_ocr2_text",
            "emu3",
            "emu3_text_model",
            "granite4_vision",
            "granite4_vision_text",
            "qwen4_exp",
            "qwen4_exp_text",
        ),
    ),
    Reason(
        "it is a head over the states of another model, with no decoder of its own to edit",
        ("gemma4_assistant", "gemma4_unified_assistant"),
    ),
)


def reason_for(model_type: str) -> str | None:
    """Returns why an architecture is not in the table, None where nothing is known of it."""
    return next((reason.why for reason in REASONS if model_type in reason.model_types), None)
