"""What a training makes smaller where an answer has a counterpart, or where other answers are to stay as they are.

Three kinds of rows, each a prompt with a response; ``m`` is the mean log-probability of a response's tokens:

    learnt                -m
    chosen and rejected   -m_chosen - λ log σ(β (m_chosen - m_rejected))
    kept                  κ KL(start ‖ model), mean over the response's tokens

The second is the likelihood of an answer and a preference for it over another one to the same prompt (as in ORPO, Hong
et al. 2024), without a reference model and by means rather than sums, so that length does not count (as in SimPO, Meng
et al. 2024). The third holds the model to its own answers: the start is the same model with its adapters switched off.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablate_shards.surgery.finetune.responses import IGNORED

if TYPE_CHECKING:
    import torch

__all__ = ["CHOSEN", "KEPT", "LEARNT", "REJECTED", "Weights", "objective"]

#: What a row is for.
LEARNT, CHOSEN, REJECTED, KEPT = range(4)


@dataclass(frozen=True, slots=True)
class Weights:
    """How much each part counts.

    Attributes:
        beta: β, how sharply a chosen answer is distinguished from a rejected one.
        prefer: λ, the weight of telling them apart beside the chosen answer's likelihood.
        keep: κ, the weight of the divergence from the start.
    """

    beta: float
    prefer: float
    keep: float


def objective(model: Any, rows: "dict[str, torch.Tensor]", roles: "torch.Tensor", weights: Weights) -> "torch.Tensor":
    """Returns the mean of the losses of a batch: one for each learnt or kept row, and one for each pair.

    Args:
        model: The adapted model of peft.
        rows: What the model is given, ``[rows, tokens]`` each, with ``labels`` that are -100 but for the responses.
        roles: What each row is for, ``[rows]``; rejected rows stand in the order of their chosen ones.
        weights: How much each part counts.
    """
    import torch
    from torch.nn.functional import logsigmoid

    given = {name: tensor for name, tensor in rows.items() if name != "labels"}
    labels = rows["labels"][:, 1:]
    answers = labels != IGNORED
    own = _logarithms(model, given, answers)
    of_row = answers.nonzero()[:, 0]
    counts = answers.sum(1)
    scores = own.gather(-1, labels[answers][:, None])[:, 0]
    means = torch.zeros(len(roles), device=scores.device).index_add(0, of_row, scores) / counts.clamp(min=1)
    chosen, rejected = means[roles == CHOSEN], means[roles == REJECTED]
    total = -means[roles == LEARNT].sum() - chosen.sum()
    total = total - weights.prefer * logsigmoid(weights.beta * (chosen - rejected)).sum()
    kept = roles == KEPT
    if kept.any():
        of_kept = kept[of_row]
        with torch.no_grad(), model.disable_adapter():
            start = _logarithms(model, {name: tensor[kept] for name, tensor in given.items()}, answers[kept])
        moved = (start.exp() * (start - own[of_kept])).sum(-1)
        mean = torch.zeros(len(roles), device=moved.device).index_add(0, of_row[of_kept], moved) / counts.clamp(min=1)
        total = total + weights.keep * mean.sum()
    return total / (roles != REJECTED).sum()


def _logarithms(model: Any, given: "dict[str, torch.Tensor]", answers: "torch.Tensor") -> "torch.Tensor":
    """Returns the logarithms of the distributions that predict the answers' tokens, ``[tokens, vocabulary]`` float32.

    Only these places go through the output head, which is a good part of a small model's work.
    """
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda _module, inputs: (inputs[0][:, :-1][answers][None], *inputs[1:])
    )
    try:
        logits: torch.Tensor = model(**given, use_cache=False).logits[0]
    finally:
        hook.remove()
    return logits.float().log_softmax(-1)
