"""What ships with ablate-shards beside its code."""

from pathlib import Path

__all__ = ["RECIPES"]

#: The folder of the recipes that ``run`` knows by name.
RECIPES = Path(__file__).parent / "recipes"
