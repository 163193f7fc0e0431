"""A LoRA adapter, trained on the responses."""
