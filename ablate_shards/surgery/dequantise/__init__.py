"""Quantised weights as the numbers that their codes stand for, in bfloat16."""

from ablate_shards.surgery.dequantise.decoding import CodedWeight, ReadRange
from ablate_shards.surgery.dequantise.dequantisation import Dequantisation, plan_dequantisation

__all__ = ["CodedWeight", "Dequantisation", "ReadRange", "plan_dequantisation"]
