"""Does what is planned, block by block, and writes down what it measured."""

from ablate_shards.surgery.edit.blocks import BlockEditor
from ablate_shards.surgery.edit.edited_file import EditedFile
from ablate_shards.surgery.edit.folder import perform_in_folder
from ablate_shards.surgery.edit.operation import Operation, RunOptions
from ablate_shards.surgery.edit.receipt import Receipt, read_receipt

__all__ = ["BlockEditor", "EditedFile", "Operation", "Receipt", "RunOptions", "perform_in_folder", "read_receipt"]
