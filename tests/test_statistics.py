"""Intervals, paired tests and agreement, against published figures and against brute force."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablate_shards.surgery.evaluate.statistics import agreement, mean, paired, ratio, shift


def outcomes(hits, count):
    return [True] * hits + [False] * (count - hits)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        # Newcombe 1998, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_the_interval_is_the_published_one(hits, count, low, high):
    found = ratio(outcomes(hits, count))

    assert found.value == hits / count
    assert found.interval == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda count: st.tuples(st.integers(0, count), st.just(count))))
def test_the_interval_holds_the_share_and_is_mirrored(case):
    hits, count = case
    found, other = ratio(outcomes(hits, count)), ratio(outcomes(count - hits, count))

    low, high = found.interval
    assert 0 <= low <= found.value <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(other.interval, abs=1e-12)


def test_no_outcomes_have_no_share():
    with pytest.raises(ValueError, match="no outcomes"):
        ratio([])


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (6, 0, 0.03125), (8, 1, 0.0390625), (3, 3, 1.0)],
)
def test_the_paired_test_is_exact(lost, gained, p):
    before = [True] * lost + [False] * gained + [True, False, True]
    after = [False] * lost + [True] * gained + [True, False, True]

    found = paired(before, after)

    assert (found.count, found.lost, found.gained) == (lost + gained + 3, lost, gained)
    assert found.p == p
    assert paired(after, before).p == p


@given(st.integers(0, 9), st.integers(0, 9))
def test_the_paired_test_counts_coin_throws(lost, gained):
    throws = lost + gained
    least = min(lost, gained)
    as_rare = sum(min(sum(coins), throws - sum(coins)) <= least for coins in itertools.product((0, 1), repeat=throws))

    assert paired(outcomes(lost, throws), outcomes(0, lost) + outcomes(gained, gained)).p == as_rare / 2**throws


def test_many_pairs_do_not_overflow():
    found = paired(outcomes(3000, 5000), outcomes(2000, 5000))

    assert found.lost == 1000
    assert 0 <= found.p < 1e-200
    assert math.isfinite(found.p)


def test_both_sides_have_as_many_outcomes():
    with pytest.raises(ValueError, match="zip"):
        paired([True], [True, False])


def test_kappa_is_cohens():
    # 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no: observed 0.7, by chance 0.5.
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15

    found = agreement(first, second)

    assert found.raw.value == 0.7
    assert found.kappa == pytest.approx(0.4)


def test_kappa_needs_something_to_tell_apart():
    assert agreement(["slanted"] * 4, ["slanted"] * 4).kappa is None
    assert agreement(["slanted", "neutral"], ["slanted", "neutral"]).kappa == 1
    assert agreement(["slanted", "neutral"], ["neutral", "slanted"]).kappa == -1
    assert agreement(["slanted"] * 2, ["neutral"] * 2).kappa == 0


def test_the_mean_has_about_the_interval_of_the_normal_theory():
    values = [math.sin(12.9898 * number) for number in range(200)]

    found = mean(values)

    expected = sum(values) / 200
    deviation = math.sqrt(sum((value - expected) ** 2 for value in values) / 199)
    assert found.value == pytest.approx(expected)
    assert found.interval == pytest.approx(
        (expected - 1.96 * deviation / math.sqrt(200), expected + 1.96 * deviation / math.sqrt(200)), abs=0.01
    )
    assert mean(values) == found


def test_a_mean_of_one_value_is_that_value():
    found = mean([0.25])
    assert (found.value, found.count, found.interval) == (0.25, 1, (0.25, 0.25))
    with pytest.raises(ValueError, match="no values"):
        mean([])


def test_the_p_of_a_shift_is_that_of_every_flip():
    before, after = [0.0] * 8, [0.5, 0.1, -0.2, 0.7, 0.4, 0.3, -0.1, 0.6]

    found = shift(before, after)

    observed = abs(sum(after))
    flips = [sum(s * x for s, x in zip(signs, after, strict=True)) for signs in itertools.product((1, -1), repeat=8)]
    exact = sum(abs(total) >= observed - 1e-12 for total in flips) / len(flips)
    assert found.change.value == pytest.approx(sum(after) / 8)
    assert found.p == pytest.approx(exact, abs=0.01)
    assert found.change.interval[0] > 0


def test_nothing_moved_is_no_shift():
    found = shift([0.3, -0.2], [0.3, -0.2])
    assert (found.change.value, found.change.interval, found.p) == (0.0, (0.0, 0.0), 1.0)
