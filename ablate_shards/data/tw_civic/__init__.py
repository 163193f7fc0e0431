"""Contrastive pairs, instructions, questions and neutral text about Taiwan's status; see README.md beside this file."""

from pathlib import Path

__all__ = ["DEVELOPMENT", "INSTRUCTIONS", "KEPT", "NEUTRAL_TEXT", "PAIRS", "PREFERENCES", "QUESTIONS", "RESPONSES"]

_FOLDER = Path(__file__).parent

#: 40 prompt pairs of each kind, for ``samples.load_pairs``: slanted and neutral framings of a question; Taiwan and
#: another place in the same question; slogans and attributed facts as answers to the same question.
PAIRS = {kind: _FOLDER / "pairs" / f"{kind}.jsonl" for kind in ("framing", "topic", "answer")}

#: Instructions for the LoRA step, for ``samples.load_instructions``.
INSTRUCTIONS = _FOLDER / "instructions.jsonl"

#: Responses to the prompts of PREFERENCES that say the same facts in the same words, for a small model to learn;
#: for ``samples.load_instructions``.
RESPONSES = _FOLDER / "responses.jsonl"

#: Short attributed responses, each beside a slanted one that is to be rejected, for ``samples.load_instructions``.
PREFERENCES = _FOLDER / "preferences.jsonl"

#: Prompts on other matters, near and far, on which a model is to stay as it is, for ``samples.load_questions``.
KEPT = _FOLDER / "kept.jsonl"

#: Questions to choose settings by, none of them in QUESTIONS, for ``samples.load_questions``.
DEVELOPMENT = _FOLDER / "development.jsonl"

#: Questions for the evaluation, for ``samples.load_questions``.
QUESTIONS = _FOLDER / "questions.jsonl"

#: Plain neutral text, a sentence a line, that is in none of the others; for perplexity.
NEUTRAL_TEXT = _FOLDER / "neutral.txt"
