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
        "positions are computed and added to the embedding, and no tensor holds them",
        ("ctrl", "kosmos-2", "kosmos-2.5", "musicgen", "musicgen_melody", "xglm"),
    ),
    Reason(
        "vectors multiply the stream coordinate by coordinate, so a direction comes back",
        ("doge", "muse_spark", "muse_spark_text", "zaya"),
    ),
    Reason(
        "a convolution along the tokens, with weights of its own for each coordinate, follows the writers",
        ("inkling2", "inkling2_text", "inkling_mm_model", "inkling_text"),
    ),
    Reason(
        "its LAuReL blocks add the normalised stream, multiplied coordinate by coordinate, so a direction comes back",
        ("gemma3n", "gemma3n_text"),
    ),
    Reason(
        "its layers multiply the stream itself by the gains of their norms before each addition, so a direction comes "
        "back as another one",
        ("minimax",),
    ),
    Reason(
        "its channel mixing multiplies what it adds, coordinate by coordinate, by a gate that each token sets, so a "
        "direction comes back",
        ("rwkv",),
    ),
    Reason(
        "it denoises blocks of text, and what its self-conditioning adds to the stream was not proven",
        ("diffusion_gemma",),
    ),
    Reason(
        "several streams are added up in ways that an edit of writers does not reach",
        ("blt", "hrm_text", "reformer"),
    ),
    Reason(
        "its attention to images lies in a list of layers of its own, which a line of the table cannot describe",
        ("idefics",),
    ),
    Reason(
        "its decoder reads an embedding of the encoder, with a vector of its own for the end of an image that no text "
        "reaches",
        ("t5gemma2",),
    ),
    Reason(
        "its adapters read proteins beside the text, which no twin was given, so its writers were not proven",
        ("evolla",),
    ),
    Reason(
        "it generates actions of a robot in a stream of their own, which starts from states and noise; what it takes "
        "from its language model are keys and values",
        ("pi0",),
    ),
    Reason(
        "its n-gram embeddings pass through a convolution with weights of its own for each coordinate before they are "
        "added, and several streams lie side by side in one vector",
        ("qwen4_exp", "qwen4_exp_text"),
    ),
    Reason(
        "it is a head over the states of another model, with no decoder of its own to edit",
        ("gemma4_assistant", "gemma4_unified_assistant"),
    ),
)


def reason_for(model_type: str) -> str | None:
    """Returns why an architecture is not in the table, None where nothing is known of it."""
    return next((reason.why for reason in REASONS if model_type in reason.model_types), None)
