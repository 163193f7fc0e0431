"""An adapter into the shards of its model."""

from ablate_shards.surgery.merge.adapter import Adapter, read_adapter
from ablate_shards.surgery.merge.merge import merging
from ablate_shards.surgery.merge.plan import MergePlan, plan_merge
from ablate_shards.surgery.merge.receipt import MergeReceipt, read_merge_receipt

__all__ = ["Adapter", "MergePlan", "MergeReceipt", "merging", "plan_merge", "read_adapter", "read_merge_receipt"]
