"""Speed and memory, measured against what anyone has: ``python -m benchmarks --help``."""
