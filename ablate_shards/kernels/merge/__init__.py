"""Low-rank updates added to stored matrices."""
