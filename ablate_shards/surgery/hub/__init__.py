"""Where results go: a folder, an object store, the Hub; and the model card."""

from ablate_shards.surgery.hub.outputs import carry_out
from ablate_shards.surgery.hub.push import plan_push

__all__ = [
    "carry_out",
    "plan_push",
]
