"""Chooses among the best trials, on questions that they were not tried on."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ablate_shards.errors import SearchError
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.evaluation import Answer
from ablate_shards.surgery.evaluate.measures import judged
from ablate_shards.surgery.model.samples import Question
from ablate_shards.surgery.search.bench import Bench
from ablate_shards.surgery.search.objectives import Asking, Measures, Objective, answer, loss, shares
from ablate_shards.surgery.search.space import Setting
from ablate_shards.surgery.search.study import Trial

if TYPE_CHECKING:
    from optuna.study import Study

__all__ = ["Budget", "Candidate", "Measured", "Rule", "choose", "kept_measure", "measure_again", "spread"]


Rule = Literal["effect", "cost"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What an edit may cost on the questions of the choice.

    Attributes:
        kl: Most nats per token that the answers to unrelated questions may move by.
        controls: Most of the controls that may no longer be answered right, as a share of all.
        broken: Most that the share of broken answers may grow by.
        subject: Most nats a token that the words lose which answers repeat from their questions. Of a real model, edits
            that kept to what was asked lost 0.06 to 0.10, the plain edit, which did not in one answer of ten, 0.28 to
            0.68, and edits that spoke of another country 1.5 to 2.1.
    """

    kl: float = 0.05
    controls: float = 0.1
    broken: float = 0.1
    subject: float = 0.25


@dataclass(frozen=True, slots=True)
class Candidate:
    """A setting, measured on the questions of the choice.

    Attributes:
        trial: Its trial, None for the unedited model.
        setting: The setting.
        values: Each measure.
        answers: The greedy answers, judged.
    """

    trial: int | None
    setting: Setting
    values: Mapping[str, float]
    answers: tuple[Answer, ...]

    @property
    def shares(self) -> Mapping[str, tuple[int, int]]:
        """How many answers of how many are slanted, neutral, broken, right."""
        return shares(self.answers)

    @property
    def finite(self) -> bool:
        """Whether every measure is a number."""
        return all(math.isfinite(value) for value in self.values.values())

    def share(self, name: str) -> float:
        """One of these as a share, 0 where there is no answer to count."""
        hits, count = self.shares[name]
        return hits / count if count else 0.0


def spread(front: Sequence[Trial], count: int) -> list[Trial]:
    """Returns some of the best trials, as far apart on the front as there are, both ends among them."""
    if len(front) <= count:
        return list(front)
    if count == 1:
        return [front[0]]
    return [front[round(number * (len(front) - 1) / (count - 1))] for number in range(count)]


@dataclass(frozen=True, slots=True)
class Measured:
    """What is measured of a setting on the questions of the choice, as a journal keeps it.

    Attributes:
        values: Each measure.
        replies: What the model said, and whether it came to its own end.
    """

    values: Mapping[str, float]
    replies: tuple[tuple[str, bool], ...]

    def candidate(self, trial: int | None, setting: Setting | None, questions: Sequence[Question]) -> Candidate:
        """Returns it with its answers judged by the rules as they are now."""
        replies = (Reply(text, ended) for text, ended in self.replies)
        answers = tuple(judged(*pair) for pair in zip(questions, replies, strict=True))
        return Candidate(trial, setting or {}, self.values, answers)


def measure_again(
    bench: Bench,
    setting: Setting | None,
    measures: Measures,
    questions: Sequence[Question],
    asking: Asking,
) -> Measured:
    """Measures a setting, or the unedited model if there is none, on other questions and with its answers."""
    bench.edit(setting)
    values = {each.name: each.measure(bench.speaker) for each in measures.every}
    replies = answer(bench.speaker, questions, tokens=asking.tokens, batch=asking.batch)
    return Measured(values, tuple((reply.text, reply.ended) for reply in replies))


def kept_measure(study: "Study", key: str, asked: Any, measure: Callable[[], Measured]) -> Measured:
    """Returns what a study has kept under a key, if it was asked the same way, or measures it and keeps it."""
    asked = json.loads(json.dumps(asked))
    known = study.user_attrs.get(key)
    if known is not None and known["asked"] == asked:
        return Measured(known["values"], tuple((text, ended) for text, ended in known["replies"]))
    measured = measure()
    study.set_user_attr(key, {"asked": asked, "values": dict(measured.values), "replies": list(measured.replies)})
    return measured


def choose(
    candidates: Sequence[Candidate],
    base: Candidate,
    effect: Objective,
    budget: Budget,
    where: str,
    *,
    rule: Rule = "effect",
    plain: int | None = None,
) -> Candidate:
    """Returns the best candidate of those within the budget.

    Args:
        candidates: What there is to choose from.
        base: The unedited model on the same questions.
        effect: The objective that counts.
        budget: What an edit may cost.
        where: The journal, for the error.
        rule: Which is best: that with the largest effect, or the one that moves unrelated answers least of those with
            at least the effect of the plain edit.
        plain: The trial of the plain edit, if it is among the candidates.

    Raises:
        SearchError: None is within the budget.
    """
    within = [each for each in candidates if not excesses(each, base, budget)]
    if not within:
        nearest = min(candidates, key=lambda each: each.values.get("kl", math.inf))
        raise SearchError(
            f"{where}: none of {len(candidates)} candidates is within the budget; the nearest, trial {nearest.trial}, "
            f"{'; '.join(excesses(nearest, base, budget))}. Raise --kl, --controls, --broken or --subject, or search "
            "on; finished trials are kept"
        )

    def gain(candidate: Candidate) -> float:
        return -loss(effect, candidate.values[effect.name])

    def cost(candidate: Candidate) -> float:
        return candidate.values.get("kl", 0.0)

    if rule == "cost" and plain is not None:
        least = next(gain(each) for each in candidates if each.trial == plain)
        if enough := [each for each in within if gain(each) >= least]:
            return min(enough, key=lambda each: (cost(each), -gain(each)))
    return max(within, key=lambda each: (gain(each), -cost(each)))


def excesses(candidate: Candidate, base: Candidate, budget: Budget) -> list[str]:
    """Returns in what a candidate is over the budget, in words."""
    found = []
    kl = candidate.values.get("kl", 0.0)
    if not kl <= budget.kl:
        found.append(f"moves unrelated answers by {kl:.3g} nats a token, of at most {budget.kl:g}")
    lost = base.share("right") - candidate.share("right")
    if lost > budget.controls:
        found.append(f"answers {lost:.0%} of the controls no longer right, of at most {budget.controls:.0%}")
    broken = candidate.share("broken") - base.share("broken")
    if broken > budget.broken:
        found.append(f"breaks {broken:.0%} of the answers, of at most {budget.broken:.0%}")
    subject = candidate.values.get("subject", 0.0)
    if not subject <= budget.subject:
        found.append(f"loses {subject:.3g} nats a word of what was asked, of at most {budget.subject:g}")
    if not candidate.finite:
        found.append("gives no numbers")
    return found
