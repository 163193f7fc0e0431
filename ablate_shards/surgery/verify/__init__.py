"""Compares an output with its source and its receipt."""

from ablate_shards.surgery.verify.proof import Difference, Verification, verify

__all__ = ["Difference", "Verification", "verify"]
