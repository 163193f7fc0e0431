"""What will be done, as pure data, before a byte is written."""
