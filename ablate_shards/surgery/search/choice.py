"""Chooses among the best trials, on questions that they were not tried on."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ablate_shards.errors import SearchError
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.evaluation import Answer
from ablate_shards.surgery.evaluate.measures import judged
from ablate_shards.surgery.model.samples import Question
from ablate_shards.surgery.search.bench import Bench
from ablate_shards.surgery.search.objectives import Asking, Goal, Measures, answer, loss, shares
from ablate_shards.surgery.search.space import Setting
from ablate_shards.surgery.search.study import Trial

if TYPE_CHECKING:
    from optuna.study import Study

__all__ = [
    "Budget",
    "Candidate",
    "Measured",
    "OverBudgetError",
    "Rule",
    "choose",
    "is_within",
    "keep_measure",
    "kept_measure",
    "measure_again",
    "spread",
]


Rule = Literal["effect", "cost"]

#: What share of the gain in a further objective an edit may keep and be as good; it takes much of the cost for the last
#: of an effect.
_KEPT = 0.9


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


class OverBudgetError(SearchError):
    """No candidate is within the budget.

    Attributes:
        candidates: What was measured of them, of the unedited model first.
        effect: The measure that counts as the effect.
    """

    def __init__(self, text: str, candidates: Sequence[Candidate], effect: str) -> None:
        super().__init__(text)
        self.candidates, self.effect = candidates, effect


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


def kept_measure(study: "Study", key: str, asked: Any) -> Measured | None:
    """Returns what a study has kept under a key, if it was asked the same way."""
    known = study.user_attrs.get(key)
    if known is None or known["asked"] != json.loads(json.dumps(asked)):
        return None
    return Measured(known["values"], tuple((text, ended) for text, ended in known["replies"]))


def keep_measure(study: "Study", key: str, asked: Any, measured: Measured) -> None:
    """Keeps it."""
    kept = {"asked": asked, "values": dict(measured.values), "replies": list(measured.replies)}
    study.set_user_attr(key, json.loads(json.dumps(kept)))


def choose(
    candidates: Sequence[Candidate],
    base: Candidate,
    objectives: Sequence[Goal],
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
        objectives: What counts: the first is the effect. Of what is equal in that, what keeps nine tenths of the best
            one's gain in each further one counts as equal as well, and of these the one that costs least is best.
        budget: What an edit may cost.
        where: The journal, for the error.
        rule: Which is best: that with the largest effect, or the one that moves unrelated answers least of those with
            at least the effect of the plain edit.
        plain: The trial of the plain edit, if it is among the candidates.

    Raises:
        OverBudgetError: None is within the budget.
    """
    within = [each for each in candidates if is_within(each, base, budget)]
    if not within:
        nearest = min(candidates, key=lambda each: _distance(each, base, budget))
        ways = [f"--{cost.name}" for cost in _costs(nearest, base, budget) if cost.over]
        raised = f"Raise {' and '.join(ways)}, or search on" if ways else "Search on"
        raise OverBudgetError(
            f"{where}: none of {len(candidates)} candidates is within the budget; the nearest, trial {nearest.trial}, "
            f"{'; '.join(_excesses(nearest, base, budget))}. {raised}; finished trials are kept",
            (base, *candidates),
            objectives[0].name,
        )

    def gain(candidate: Candidate) -> tuple[float, ...]:
        return tuple(-loss(each, candidate.values[each.name]) for each in objectives)

    def cost(candidate: Candidate) -> float:
        return candidate.values.get("kl", 0.0)

    if rule == "cost" and plain is not None:
        least = next(gain(each)[0] for each in candidates if each.trial == plain)
        if enough := [each for each in within if gain(each)[0] >= least]:
            return max(enough, key=lambda each: (-cost(each), gain(each)))
    best = max(within, key=lambda each: (gain(each), -cost(each)))
    before = gain(base)
    further = [place for place, each in enumerate(objectives) if place and each.name != "kl"]

    def is_alike(candidate: Candidate) -> bool:
        if gain(candidate)[0] < gain(best)[0]:
            return False
        gained = [(gain(candidate)[place] - before[place], gain(best)[place] - before[place]) for place in further]
        return all(own >= min(_KEPT * most, most) for own, most in gained)

    return max(filter(is_alike, within), key=lambda each: (-cost(each), gain(each)), default=best)


def is_within(candidate: Candidate, base: Candidate, budget: Budget) -> bool:
    """Returns whether a candidate costs no more than it may in any way, and gives numbers."""
    return not _excesses(candidate, base, budget)


@dataclass(frozen=True, slots=True)
class _Cost:
    """What an edit costs in one way.

    Attributes:
        name: The limit, as the option and the budget call it.
        figure: How much it is.
        limit: The most that it may be.
        words: What that means, with ``{}`` for the figure.
        share: Whether it is a share, and not nats.
    """

    name: str
    figure: float
    limit: float
    words: str
    share: bool = False

    @property
    def over(self) -> bool:
        """Whether it is above its limit, or not a number."""
        return not self.figure <= self.limit

    @property
    def ratio(self) -> float:
        """How many times its limit it is; the limit itself is 1, where it is nothing or less as well."""
        if not math.isfinite(self.figure):
            return math.inf
        return self.figure / self.limit if self.limit > 0 else 1 + self.figure - self.limit

    def told(self) -> str:
        """Returns by how much it is above its limit, in words."""
        said = self.words.format(self._shown(self.figure))
        return f"{said}, {self._shown(self.figure - self.limit)} above the {self._shown(self.limit)} of --{self.name}"

    def _shown(self, value: float) -> str:
        return f"{100 * value:.3g}%" if self.share else f"{value:.3g}"


def _costs(candidate: Candidate, base: Candidate, budget: Budget) -> tuple[_Cost, ...]:
    """Returns what a candidate costs in each way that the budget limits, and that was measured."""
    lost = base.share("right") - candidate.share("right")
    broken = candidate.share("broken") - base.share("broken")
    found = [
        _Cost("controls", lost, budget.controls, "answers {} of the controls no longer right", share=True),
        _Cost("broken", broken, budget.broken, "breaks {} of the answers", share=True),
    ]
    if (kl := candidate.values.get("kl")) is not None:
        found.insert(0, _Cost("kl", kl, budget.kl, "moves unrelated answers by {} nats a token"))
    if (subject := candidate.values.get("subject")) is not None:
        words = "takes {} nats a token from the words that answers repeat from their questions"
        found.append(_Cost("subject", subject, budget.subject, words))
    return tuple(found)


def _excesses(candidate: Candidate, base: Candidate, budget: Budget) -> list[str]:
    """Returns in what a candidate is over the budget, in words."""
    numberless = [] if candidate.finite else ["gives no numbers"]
    return [cost.told() for cost in _costs(candidate, base, budget) if cost.over] + numberless


def _distance(candidate: Candidate, base: Candidate, budget: Budget) -> float:
    """Returns how many times its limit the cost is that is furthest above it; infinite without numbers."""
    if not candidate.finite:
        return math.inf
    return max(cost.ratio for cost in _costs(candidate, base, budget))
