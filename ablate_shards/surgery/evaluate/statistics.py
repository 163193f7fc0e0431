"""Says how sure a ratio or a mean is, whether two sets of paired outcomes differ, and how far two judges agree."""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from ablate_shards.surgery.evaluate.resampling import mean_interval, sign_flip_p

__all__ = ["Agreement", "Mean", "Paired", "Ratio", "Shift", "agreement", "mean", "paired", "ratio", "shift"]

_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Ratio:
    """A share of a number of cases, with its 95 % confidence interval.

    Attributes:
        hits: The cases that count.
        count: All cases, at least one.
        interval: The Wilson score interval (Wilson 1927), each end in [0, 1].
    """

    hits: int
    count: int
    interval: tuple[float, float]

    @property
    def value(self) -> float:
        """The share, in [0, 1]."""
        return self.hits / self.count


@dataclass(frozen=True, slots=True)
class Paired:
    """How often an outcome was seen on one side only of the same questions.

    Attributes:
        count: How many questions.
        lost: Seen before, and not after.
        gained: Seen after, and not before.
        p: Two-sided p value of the exact McNemar test: of at most ``min(lost, gained)`` heads, or as many tails, in
            ``lost + gained`` throws of a fair coin.
    """

    count: int
    lost: int
    gained: int
    p: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far two judges agree.

    Attributes:
        raw: The share of the questions on which they say the same.
        kappa: Cohen's kappa (1960), which takes off the agreement by chance; None where both always say the same one
            thing, since chance then explains all.
    """

    raw: Ratio
    kappa: float | None


@dataclass(frozen=True, slots=True)
class Mean:
    """A mean, and between what values the true one lies with 95 % confidence.

    Attributes:
        value: The mean.
        count: Of how many values, at least one.
        interval: The percentile bootstrap interval, see ``resampling.mean_interval``.
    """

    value: float
    count: int
    interval: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Shift:
    """How far a mean moved over the same questions.

    Attributes:
        change: The mean of the differences, after less before, with its interval.
        p: Two-sided p value of the sign-flip permutation test, see ``resampling.sign_flip_p``.
    """

    change: Mean
    p: float


def ratio(outcomes: Iterable[bool]) -> Ratio:
    """Counts outcomes and gives the Wilson interval of their share.

    Raises:
        ValueError: There are no outcomes.
    """
    seen = list(outcomes)
    hits, count = sum(seen), len(seen)
    if not count:
        raise ValueError("a ratio of no outcomes is none")
    share, square = hits / count, _Z95**2
    centre = (share + square / (2 * count)) / (1 + square / count)
    margin = _Z95 / (1 + square / count) * math.sqrt(share * (1 - share) / count + square / (4 * count**2))
    # At the ends the formula is exactly 0 and 1, which rounding would miss.
    low = 0.0 if hits == 0 else centre - margin
    high = 1.0 if hits == count else centre + margin
    return Ratio(hits, count, (low, high))


def paired(before: Sequence[bool], after: Sequence[bool]) -> Paired:
    """Compares the outcomes of the same questions, before and after.

    Raises:
        ValueError: There are not as many outcomes after as before.
    """
    pairs = Counter(zip(before, after, strict=True))
    lost, gained = pairs[True, False], pairs[False, True]
    throws = lost + gained
    tail = sum(math.comb(throws, heads) for heads in range(min(lost, gained) + 1))
    return Paired(len(before), lost, gained, min(1.0, 2 * tail / 2**throws))


def agreement(first: Sequence[Hashable], second: Sequence[Hashable]) -> Agreement:
    """Compares what two judges said of the same answers.

    Raises:
        ValueError: There are no answers, or not as many from one as from the other.
    """
    same = ratio(one == other for one, other in zip(first, second, strict=True))
    ones, others = Counter(first), Counter(second)
    # In whole numbers, so that certainty is seen as such.
    chance = sum(ones[verdict] * others[verdict] for verdict in ones)
    whole = same.count**2
    kappa = None if chance == whole else (same.hits * same.count - chance) / (whole - chance)
    return Agreement(same, kappa)


def mean(values: Sequence[float]) -> Mean:
    """Returns the mean of some values, and its bootstrap interval.

    Raises:
        ValueError: There are no values.
    """
    if not values:
        raise ValueError("a mean of no values is none")
    return Mean(math.fsum(values) / len(values), len(values), mean_interval(values))


def shift(before: Sequence[float], after: Sequence[float]) -> Shift:
    """Compares measurements of the same questions, before and after.

    Raises:
        ValueError: There are none, or not as many after as before.
    """
    moved = [new - old for old, new in zip(before, after, strict=True)]
    return Shift(mean(moved), sign_flip_p(moved))
