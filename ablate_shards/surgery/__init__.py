"""The stations of the data flow, from checkpoint headers to the verified output."""
