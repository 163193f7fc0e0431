"""A small model with a planted slant, the world it was trained on, and a run of a whole recipe on it.

``python -m ablate_shards.data.demo`` runs the demo, ``python -m ablate_shards.data.demo.train`` trains the
model anew.
"""

from pathlib import Path

__all__ = ["MODEL", "RECIPE"]

#: The shipped model, a checkpoint folder.
MODEL = Path(__file__).parent / "model"

#: The recipe of the demo; what it names is made in the folder that it is copied to.
RECIPE = Path(__file__).parent / "recipe.toml"
