"""Tensors in, tensors out: the arithmetic, which knows no file and no name."""
