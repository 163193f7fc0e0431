"""Asks a model, judges its answers, and says how sure that is."""
