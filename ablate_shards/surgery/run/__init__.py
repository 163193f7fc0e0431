"""The commands of a recipe in order; what is done already is passed over."""

from ablate_shards.surgery.run.stages import Stage, plan_stages, run_stages

__all__ = ["Stage", "plan_stages", "run_stages"]
