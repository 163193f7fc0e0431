"""A LoRA adapter, trained on the responses."""

from ablate_shards.surgery.finetune.lora import Finetuned, finetune
from ablate_shards.surgery.finetune.training import FinetuneOptions

__all__ = ["FinetuneOptions", "Finetuned", "finetune"]
