"""A checkpoint run by transformers, and the samples that it is given."""
