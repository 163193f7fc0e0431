"""Says what the chosen edit is worth beside the plain one, on questions that nothing was chosen by."""

from collections.abc import Mapping
from typing import Any

from ablate_shards.surgery.evaluate.evaluation import Evaluation
from ablate_shards.surgery.evaluate.statistics import paired
from ablate_shards.surgery.search.objectives import shares

__all__ = ["beats", "beside_plain"]


def beside_plain(reports: Mapping[Any, Evaluation], *, better: bool | None) -> str:
    """Returns in a sentence what the chosen edit is worth beside the plain one.

    Args:
        reports: The evaluations of the ``chosen`` and the ``plain`` edit, as far as they are there.
        better: Whether the chosen one beats the plain one; None where it is the plain one.
    """
    if better is None:
        return "the plain edit itself was chosen"
    verdict = f"the chosen edit {'beats' if better else 'does not beat'} the plain one"
    if not {"chosen", "plain"} <= reports.keys():
        how = (
            "better in slant or divergence, and worse in neither"
            if better
            else "worse in slant or divergence, or better in neither"
        )
        return f"{verdict}: it is {how}"
    chosen, plain = reports["chosen"], reports["plain"]
    (slanted, moved), (plain_slanted, plain_moved) = _costs(chosen), _costs(plain)
    if not better:
        if slanted >= plain_slanted and moved >= plain_moved:
            same = (slanted, moved) == (plain_slanted, plain_moved)
            verdict += ", which is as good" if same else ", which is better"
        else:
            less = "removes more slant at a higher cost" if slanted < plain_slanted else "costs and removes less"
            verdict += f" in both, as it {less}"
    sides = [
        {answer.id: answer.verdict == "slanted" for answer in each.answers if answer.exact is None}
        for each in (chosen, plain)
    ]
    both = [(after, sides[1][name]) for name, after in sides[0].items() if name in sides[1]]
    p = paired([before for _, before in both], [after for after, _ in both]).p
    hits = [f"{sum(side.values())} of {len(side)}" for side in sides]
    return (
        f"{verdict}: {hits[0]} answers are slanted against {hits[1]} (exact McNemar test, p "
        f"{'< 0.0001' if p < 0.0001 else f'= {p:.3g}'}), and unrelated ones moved by {_nats(moved)} nats a token "
        f"against {_nats(plain_moved)}"
    )


def beats(chosen: Evaluation, plain: Evaluation) -> bool:
    """Returns whether an edit is better than another in slant or divergence, and worse in neither."""
    mine, theirs = _costs(chosen), _costs(plain)
    return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def _costs(found: Evaluation) -> tuple[int, float]:
    """Returns how many answers are slanted after an edit, and how far unrelated ones moved, in nats a token."""
    moved = found.comparison and found.comparison.divergence
    return shares(found.answers)["slanted"][0], moved.tokens if moved else float("inf")


def _nats(value: float) -> str:
    return f"{value:.2g}" if value < float("inf") else "–"
