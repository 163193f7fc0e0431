"""How weights are stored, and what the stored numbers mean."""
