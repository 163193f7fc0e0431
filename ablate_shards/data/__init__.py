"""What ships with ablate-shards beside its code."""
