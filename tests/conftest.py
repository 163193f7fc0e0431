"""Keeps transformers quiet and offline, and torch to one thread per test process."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
# Test processes run side by side; threads of theirs would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")
