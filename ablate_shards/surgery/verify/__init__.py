"""Compares an output with its source and its receipt."""
