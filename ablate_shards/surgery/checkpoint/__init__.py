"""What a checkpoint holds, wherever it lies, from its headers alone; and its bytes, by range."""

from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ablate_shards.surgery.checkpoint.files import Files
from ablate_shards.surgery.checkpoint.headers import Shard, TensorInfo, read_header
from ablate_shards.surgery.checkpoint.stores import open_files, open_source

__all__ = ["Checkpoint", "Files", "Shard", "TensorInfo", "open_checkpoint", "open_files", "open_source", "read_header"]
