"""The residual stream after every layer, into a dump."""
