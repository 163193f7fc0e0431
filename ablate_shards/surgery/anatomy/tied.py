"""The output head of a model whose configuration ties it to the token embedding, where a checkpoint stores both."""

from dataclasses import dataclass

from ablate_shards.surgery.anatomy.architecture import Anatomy, head_of
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, same_tensor
from ablate_shards.surgery.checkpoint.headers import TensorInfo

__all__ = ["StoredHead", "stored_head"]


@dataclass(frozen=True, slots=True)
class StoredHead:
    """An output head that is stored although the configuration ties it.

    Attributes:
        tensor: The head.
        embedding: The embedding with the same bytes, None where there is none. transformers 5 ties equal ones and
            keeps different ones apart; loaders that always tie drop the head.
    """

    tensor: TensorInfo
    embedding: str | None

    @property
    def note(self) -> str:
        """What an edit of the embedding does to it, as a sentence."""
        if self.embedding is not None:
            return (
                f"the output head is tied to the token embedding and stored as {self.tensor.name} too, so the same is "
                "done to both"
            )
        return (
            f"config.json ties the output head to the token embedding, but {self.tensor.name} is stored with other "
            "bytes: transformers 5 keeps it as a head of its own, which stays as it is, and loaders that always tie "
            "ignore it; set tie_word_embeddings to false if the head is meant"
        )


def stored_head(checkpoint: Checkpoint, anatomy: Anatomy) -> StoredHead | None:
    """Returns the head that is stored although it is tied, None where there is none; compares it with the embedding."""
    name = head_of(checkpoint.tensors)
    if not anatomy.tied or name is None:
        return None
    head = checkpoint.tensors[name]
    embeddings = (
        checkpoint.tensors[writer.name]
        for writer in anatomy.writers
        if writer.component == "embedding" and writer.kind == "weight" and not writer.mtp
    )
    equal = (embedding.name for embedding in embeddings if same_tensor(checkpoint, embedding, checkpoint, head))
    return StoredHead(head, next(equal, None))
