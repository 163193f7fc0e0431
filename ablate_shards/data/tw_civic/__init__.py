"""Contrastive pairs, instructions, questions and neutral text about Taiwan's status; see README.md beside this file."""

from pathlib import Path

__all__ = ["INSTRUCTIONS", "NEUTRAL_TEXT", "PAIRS", "QUESTIONS"]

_FOLDER = Path(__file__).parent

#: 40 prompt pairs, slanted and neutral, for ``samples.load_pairs``.
PAIRS = _FOLDER / "pairs.jsonl"

#: Instructions for the LoRA step, for ``samples.load_instructions``.
INSTRUCTIONS = _FOLDER / "instructions.jsonl"

#: Questions for the evaluation, for ``samples.load_questions``.
QUESTIONS = _FOLDER / "questions.jsonl"

#: Plain neutral text, a sentence a line, that is in none of the others; for perplexity.
NEUTRAL_TEXT = _FOLDER / "neutral.txt"
