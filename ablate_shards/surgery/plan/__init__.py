"""What will be done, as pure data, before a byte is written."""

from ablate_shards.surgery.plan.bases import resolve_bases
from ablate_shards.surgery.plan.edits import TensorEdit
from ablate_shards.surgery.plan.plan import Plan, make_plan
from ablate_shards.surgery.plan.recipe import AblateOptions, read_recipe

__all__ = ["AblateOptions", "Plan", "TensorEdit", "make_plan", "read_recipe", "resolve_bases"]
