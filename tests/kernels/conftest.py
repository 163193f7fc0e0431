"""Runs the Triton kernels everywhere: compiled where there is a GPU, interpreted elsewhere."""

import os

import pytest
import torch

# Triton reads this when its kernels are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    pytest.importorskip("triton")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
