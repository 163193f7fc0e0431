"""A small model with a planted slant, the world it was trained on, and a run of the main job on it.

``python -m ablate_shards.data.demo`` runs the demo, ``python -m ablate_shards.data.demo.train`` trains the
model anew.
"""

from pathlib import Path

__all__ = ["MODEL"]

#: The shipped model, a checkpoint folder.
MODEL = Path(__file__).parent / "model"
