"""Asks a model, judges its answers, and says how sure that is."""

from ablate_shards.surgery.evaluate.evaluation import Evaluation
from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation, write_evaluation
from ablate_shards.surgery.evaluate.interview import EvaluateOptions, evaluate

__all__ = ["EvaluateOptions", "Evaluation", "evaluate", "read_evaluation", "write_evaluation"]
