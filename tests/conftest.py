"""Keeps transformers quiet and offline, torch to one thread per test process, and times no test."""

import os

from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
# Test processes run side by side; threads of theirs would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A machine that does other things as well is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
