"""Which tensors write to the residual stream, along which axis and through which gain."""
