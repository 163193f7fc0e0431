"""Chooses the codes of an edited matrix on the grid of its source, so that rounding does not undo the edit."""
