"""Keeps transformers quiet and offline, torch to one thread, and pauses short; times no test."""

import os

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TQDM_DISABLE", "1")
# Test processes run side by side; threads of theirs would only wait for one another.
os.environ["OMP_NUM_THREADS"] = "1"

# A machine that does other things as well is no failure.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """What is tried again is tried again soon."""
    for module in ("checkpoint.remote", "evaluate.endpoint"):
        monkeypatch.setattr(f"ablate_shards.surgery.{module}._FIRST_PAUSE", 0.01)
