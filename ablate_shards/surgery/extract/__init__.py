"""An edit, or what lies between two checkpoints, as an adapter of low rank."""
