"""What the training takes from inside transformers, because it has no public call for it."""

from typing import Any

__all__ = ["take_loss_as_mean", "use_one_device"]


def use_one_device(arguments: Any) -> None:
    """Makes a trainer use one GPU of several.

    transformers: ``TrainingArguments`` counts the GPUs that it sees, and ``Trainer`` trains on all of them through
    DataParallel; ``n_gpu`` can only be read.
    """
    arguments._n_gpu = min(arguments.n_gpu, 1)


def take_loss_as_mean(trainer: Any) -> None:
    """Makes a trainer divide the loss by the steps of gradient accumulation, as a mean over each batch has to be.

    transformers: ``Trainer`` decides by the signature of the model's ``forward`` whether the loss is divided already,
    even where ``compute_loss`` returns another loss; no argument tells it.
    """
    trainer.model_accepts_loss_kwargs = False
