"""Directional ablation on raw safetensors shards, without building the model."""

__version__ = "0.1.0"
__all__ = ["__version__"]
