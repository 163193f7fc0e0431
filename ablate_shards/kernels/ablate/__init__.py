"""Directions out of matrices, the norms kept."""
