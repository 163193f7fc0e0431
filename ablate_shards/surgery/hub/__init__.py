"""Where results go: a folder, an object store, the Hub; and the model card."""

from ablate_shards.surgery.hub.outputs import Prepared, prepare

__all__ = ["Prepared", "prepare"]
