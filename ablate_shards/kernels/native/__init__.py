"""The arithmetic in C, compiled when the package is installed."""
