"""Differences of matrices approximated by a product of two thin ones."""
