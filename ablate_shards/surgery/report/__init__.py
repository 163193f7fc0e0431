"""One page about all that was done."""
