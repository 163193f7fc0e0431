"""An adapter into the shards of its model."""
