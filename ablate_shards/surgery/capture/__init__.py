"""The residual stream after every layer, into a dump."""

from ablate_shards.surgery.capture.forward import Captured, CaptureOptions, capture

__all__ = ["CaptureOptions", "Captured", "capture"]
