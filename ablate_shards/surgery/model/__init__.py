"""A checkpoint run by transformers, and the samples that it is given."""

from ablate_shards.surgery.model.loading import load_model
from ablate_shards.surgery.model.samples import (
    Instruction,
    Pair,
    Question,
    load_instructions,
    load_pairs,
    load_questions,
)

__all__ = ["Instruction", "Pair", "Question", "load_instructions", "load_model", "load_pairs", "load_questions"]
