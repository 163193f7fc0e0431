"""Activations in, one scored basis per layer out."""
