"""What a checkpoint holds, wherever it lies, from its headers alone; and its bytes, by range."""
