"""How far a search has come, the best of its trials, and what the chosen one does."""

import shlex
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ablate_shards.surgery.model.samples import CONTESTED
from ablate_shards.terminal.tables import Column, Row, bar, output, print_table, say

if TYPE_CHECKING:
    from ablate_shards.surgery.search.choice import Candidate
    from ablate_shards.surgery.search.files import Places
    from ablate_shards.surgery.search.search import Found, SearchOptions
    from ablate_shards.surgery.search.study import Trial

__all__ = ["SearchScreen", "print_candidates", "print_found", "print_space"]

_LINES_EVERY = 10
#: What the columns of measures say.
_MEANINGS = {
    "lean": "how much likelier neutral answers are than slanted ones, in nats a token",
    "kl": "how far unrelated answers moved, in nats a token",
    "subject": "how much less likely the words are that answers repeat from their questions",
    "former": "how likely neutral answers begin as before, less how likely slanted ones do",
}


class SearchScreen:
    """Shows trials, the best so far and the time that is left, on stderr.

    Args:
        options: How the search runs.
        quiet: Whether to show nothing.
    """

    def __init__(self, options: "SearchOptions", *, quiet: bool) -> None:
        self._options, self._quiet = options, quiet
        self._console = Console(stderr=True)
        self._started = time.monotonic()
        self._first: int | None = None
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def note(self, text: str) -> None:
        """Shows one line."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tried(self, trial: "Trial", finished: int, front: "Sequence[Trial]") -> None:
        """Shows a trial that has ended, and the best so far."""
        if self._first is None:
            self._first = finished
            self._started = time.monotonic() - trial.tried.seconds
        total = self._options.trials
        self._show("trials", finished, total, f"{_best(front, self._options)}{self._left(finished)}")
        if not self._console.is_terminal and finished % _LINES_EVERY == 0:
            self.note(f"{finished} of {total} trials, {_best(front, self._options)}{self._left(finished)}")

    def count(self, done: int, total: int) -> None:
        """Shows how far the choice and the report have come."""
        self._show("choice and report", done, total, "")

    def _left(self, finished: int) -> str:
        began = (self._first or 0) - 1
        each = (time.monotonic() - self._started) / max(1, finished - began)
        left = each * (self._options.trials - finished)
        if self._options.timeout is not None:
            left = min(left, max(0.0, 60 * self._options.timeout - (time.monotonic() - self._started)))
        return (
            f", {each:.1f} s a trial, {left / 60:.0f} min left"
            if left >= 90
            else f", {each:.1f} s a trial, {left:.0f} s left"
        )

    def _show(self, what: str, done: int, total: int, text: str) -> None:
        if self._quiet or not self._console.is_terminal:
            return
        if self._bar is None:
            columns = (TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.completed}/{task.total}"))
            self._bar = Progress(*columns, TextColumn("{task.fields[text]}"), console=self._console, transient=True)
            self._task = self._bar.add_task(what, total=total, text=text)
            self._bar.start()
        self._bar.update(self._task, description=what, completed=done, total=total, text=text)


def print_found(found: "Found", places: "Places") -> None:
    """Prints the best trials measured again, which was chosen, and what it does beside the plain edit."""
    screen = output()
    title = f"The best of {len(found.trials)} trials, on questions of the choice"
    print_candidates((found.base, *found.candidates), found.objectives[0][0], title, chosen=found.chosen.trial)
    for name, shares in found.importance.items():
        told = ", ".join(f"{parameter} {share:.0%}" for parameter, share in list(shares.items())[:4])
        say(screen, f"what {name} depended on most: {told}", "dim")
    _print_report(screen, found)
    say(screen, f"recipe: {places.recipe}; all trials: {places.record}")
    command = ["ablate-shards", "ablate", str(found.job.folder), "OUT", "--recipe", str(places.recipe)]
    say(screen, f"make the edit with: {shlex.join(command)}")


def print_candidates(candidates: "Sequence[Candidate]", effect: str, title: str, *, chosen: int | None = None) -> None:
    """Prints the best trials as they were measured again.

    Args:
        candidates: They, after the unedited model.
        effect: The measure that their bars show.
        title: What they are.
        chosen: The trial that was chosen among them.
    """
    base, screen = candidates[0].values, output()
    names = list(dict.fromkeys([effect, *base]))
    most = max(abs(each.values[effect] - base[effect]) for each in candidates)
    columns = (
        Column("trial", right=True),
        *(Column(name, right=True) for name in names),
        Column("effect", bar=True),
        Column("slanted", right=True, rank=1),
        Column("neutral", right=True, rank=2),
        Column("broken", right=True, rank=3),
        Column("right", right=True, rank=4),
        Column("edit", wraps=True, rank=5),
    )
    rows = []
    for candidate in candidates:
        is_chosen = chosen is not None and candidate.trial == chosen
        name = "before" if candidate.trial is None else f"{candidate.trial}{' *' if is_chosen else ''}"
        cells = (
            name,
            *(f"{candidate.values[name]:.3g}" for name in names),
            bar(abs(candidate.values[effect] - base[effect]), most),
            *(f"{candidate.share(what):.0%}" for what in ("slanted", "neutral", "broken", "right")),
            _in_words(candidate),
        )
        rows.append(Row(cells, "bold" if is_chosen else ""))
    print_table(screen, columns, rows, title=title)
    told = [f"{name}: {_MEANINGS[name]}" for name in names if name in _MEANINGS]
    if "subject" not in base:
        told.append("no subject: no answer repeats a word of its question, so that --subject limits nothing")
    say(screen, "; ".join([*([] if chosen is None else ["*: chosen"]), *told, "right: controls"]), "dim")


def _print_report(screen: Console, found: "Found") -> None:
    """Prints what the chosen edit and the plain one do on questions that nothing was chosen by."""
    from ablate_shards.surgery.evaluate.statistics import ratio
    from ablate_shards.surgery.search.worth import beside_plain

    names = {"before": found.reports["chosen"].base, **found.reports}
    columns = (
        Column("on the report's questions"),
        *(Column(verdict, right=True, rank=rank) for rank, verdict in enumerate(("slanted", "neutral", "broken"))),
        Column("unrelated right", right=True, rank=3),
        Column("KL", right=True),
    )
    rows = []
    for name in ("before", "plain", "chosen"):
        evaluation = names.get(name)
        if evaluation is None:
            continue
        contested = [answer for answer in evaluation.answers if answer.group in CONTESTED]
        unrelated = [
            answer for answer in evaluation.answers if answer.group == "unrelated" and answer.exact is not None
        ]
        moved = evaluation.comparison and evaluation.comparison.divergence
        shares = [
            ratio(answer.verdict == verdict for answer in contested) for verdict in ("slanted", "neutral", "broken")
        ]
        right = ratio(answer.given is True for answer in unrelated)
        rows.append(
            Row(
                (
                    {"plain": "plain edit (own layer, coefficient 1)"}.get(name, name),
                    *(f"{share.value:.0%} [{share.interval[0]:.0%}, {share.interval[1]:.0%}]" for share in shares),
                    f"{right.hits} of {right.count}",
                    f"{moved.tokens:.2g}" if moved else "",
                )
            )
        )
    print_table(screen, columns, rows)
    say(screen, beside_plain(found.reports, better=found.beats_plain))


def _in_words(candidate: "Candidate") -> str:
    """Returns a setting in a few words."""
    setting = candidate.setting
    if not setting:
        return ""
    source = f"layer {setting['source-layer']:g}" if setting["source"] == "one" else "own layer"
    parts = [name.removesuffix(".peak") for name in setting if name.endswith(".peak")]
    peaks = (
        f"{part} {setting[f'{part}.peak']:g} at {setting[f'{part}.place']:g} ±{setting[f'{part}.reach']:g}"
        for part in parts
    )
    return ", ".join([str(setting["contrast"]), source, *peaks])


def _best(front: "Sequence[Trial]", options: "SearchOptions") -> str:
    """Returns the most effective of the best trials within the budget."""
    within = [trial for trial in front if trial.tried.values.get("kl", 0.0) <= options.budget.kl]
    if not within:
        return "none within the budget yet"
    values = sorted(within[0].tried.values.items(), key=lambda pair: pair[0] == "kl")
    return "best " + ", ".join(f"{name} {value:.3g}" for name, value in values)


def print_space(parameters: Sequence[tuple[str, str]]) -> None:
    """Prints what a search would vary."""
    print_table(output(), (Column("parameter"), Column("values", wraps=True)), [Row(pair) for pair in parameters])
