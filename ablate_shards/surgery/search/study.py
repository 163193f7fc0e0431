"""The trials of a search, kept by Optuna in a journal that can be gone on with."""

import contextlib
import functools
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate_shards.errors import SearchError
from ablate_shards.surgery.search.bench import Tried, excess
from ablate_shards.surgery.search.objectives import Goal, loss
from ablate_shards.surgery.search.space import Setting, Space

if TYPE_CHECKING:
    from optuna.study import Study, StudyDirection
    from optuna.trial import FrozenTrial, TrialState
    from optuna.trial import Trial as AskedTrial

    from ablate_shards.surgery.machine.crew import RayCrew

__all__ = [
    "Course",
    "Trial",
    "ahead_of",
    "best_of",
    "check_optuna",
    "deal_trials",
    "end_interrupted",
    "importances",
    "mend_journal",
    "open_study",
    "run_trials",
    "trials_of",
]

_NAME = "ablate-shards search"
_STARTUP = 16
#: How many trials may run at a time without a change of what is tried; multiples of it where there are more workers.
_AHEAD = 8
_NUMBER = "number"
#: How a journal of Optuna begins.
_BEGINNING = b'{"op_code":'
#: What Optuna is told of a trial that gave something else than numbers: over its limits by more than any other.
_NO_NUMBER = 1e9


@dataclass(frozen=True, slots=True)
class Trial:
    """A finished trial.

    Attributes:
        number: Which one, from 0.
        setting: The point of the space.
        tried: What was measured.
    """

    number: int
    setting: Setting
    tried: Tried


def check_optuna() -> None:
    """Checks that Optuna is installed, and has it say errors only.

    Raises:
        SearchError: It is not.
    """
    try:
        import optuna
    except ImportError as error:
        raise SearchError(
            f"search runs its trials with Optuna, and {error.name} is not installed; "
            "`pip install 'ablate-shards[search]'`"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def mend_journal(path: Path) -> None:
    """Removes what a killed process left of a journal: its lock, and a line that it had not finished.

    Optuna would wait half a minute for the lock, and write the next line behind the unfinished one, so that neither
    could be read. Only when no worker runs.
    """
    from optuna.storages.journal import JournalFileSymlinkLock

    with contextlib.suppress(RuntimeError):  # nobody holds it
        JournalFileSymlinkLock(str(path)).release()
    if path.is_file():
        with path.open("r+b") as file:
            content = file.read()
            finished = content[: content.rfind(b"\n") + 1]
            if finished.startswith(_BEGINNING) and len(finished) < len(content):
                file.truncate(len(finished))


def open_study(path: Path, identity: Mapping[str, Any], objectives: Sequence[Goal], *, overwrite: bool) -> "Study":
    """Opens the journal of a study, a new one if there is none, or if no trial of another search was finished in it.

    Args:
        path: The journal.
        identity: What trials depend on: the model, the questions, the space, the options; by what errors call it.
        objectives: What trials are judged by.
        overwrite: Throw away a journal that is of something else.

    Raises:
        SearchError: The journal is of a study of something else and may not be thrown away, or cannot be read.
    """
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    there = path.exists()
    try:
        storage = JournalStorage(JournalFileBackend(str(path)))
        study = optuna.create_study(
            storage=storage,
            study_name=_NAME,
            directions=[objective.direction for objective in objectives],
            load_if_exists=True,
        )
    except (ValueError, KeyError, AssertionError, OSError) as error:
        if overwrite and there:
            path.unlink()
            return open_study(path, identity, objectives, overwrite=False)
        raise SearchError(f"{path}: is not the journal of a search ({error}); --overwrite starts again") from error
    if "identity" not in study.user_attrs and not study.get_trials(deepcopy=False):
        study.set_user_attr("identity", json.loads(json.dumps(identity)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([objective.name for objective in objectives])  # as a dashboard shows them
    known = study.user_attrs.get("identity", {})
    if changed := [what for what, value in json.loads(json.dumps(identity)).items() if known.get(what) != value]:
        if overwrite or not _count(study, optuna.trial.TrialState.COMPLETE):
            path.unlink()
            return open_study(path, identity, objectives, overwrite=False)
        raise SearchError(
            f"{path}: holds the trials of another search, as {' and '.join(changed)} changed since; --overwrite starts "
            "again, or name another file"
        )
    return study


@dataclass(frozen=True, slots=True)
class Course:
    """When trials end, and what they depend on besides those before them.

    Attributes:
        trials: How many, those that are finished already among them.
        until: When no further one begins, as ``time.monotonic`` counts.
        seed: Of the proposals.
        starts: The settings that are tried first; the first of all is the plain edit.
    """

    trials: int
    until: float
    seed: int
    starts: tuple[Setting, ...]


def run_trials(
    study: "Study",
    space: Space,
    try_out: Callable[[Setting], Tried],
    goals: Sequence[Goal],
    course: Course,
    told: Callable[[Trial, int], None],
) -> None:
    """Runs trials until there are enough, or the time is over.

    The first ones are the course's starts. Each proposal depends on the seed and the finished trials alone, so that a
    study that was interrupted goes on as it would have.

    Args:
        study: Where they are kept.
        space: What may vary.
        try_out: What measures a setting.
        goals: What they are judged by, in the order of the study.
        course: When they end, and what they depend on.
        told: Is called with each finished trial, and how many there are.
    """
    from optuna.trial import TrialState

    while (count := _count(study, TrialState.COMPLETE)) < course.trials and time.monotonic() < course.until:
        study.sampler = _sampler(course.seed + count)
        # A start that waits was put there by a run that ended before it could ask for it, or by another worker.
        begun = _count(study, TrialState.COMPLETE, TrialState.RUNNING, TrialState.WAITING)
        asked, setting = _propose(study, space, course, begun)
        tried = try_out(setting)
        for name, value in _record(setting, tried).items():
            asked.set_user_attr(name, value)
        asked.set_constraint("over", _over(tried))
        study.tell(asked, [_told(goal, tried) for goal in goals])
        told(Trial(asked.number, setting, tried), count + 1)


def deal_trials(
    study: "Study",
    space: Space,
    crew: "RayCrew[Any]",
    try_out: Callable[..., Tried],
    goals: Sequence[Goal],
    course: Course,
    told: Callable[[Trial, int], None],
) -> None:
    """Runs trials on the workers of Ray until there are enough, or the time is over.

    Trial n is proposed from the seed, the results of the trials that are ``ahead`` or more before it, and the settings
    of those between, which count as failures (a constant liar). So neither which worker is faster nor how many there
    are changes what is tried, and a search that was interrupted goes on as it would have.

    Args:
        study: Where they are kept, each when it has ended.
        space: What may vary.
        crew: Who tries them.
        try_out: What each worker calls with a setting.
        goals: What they are judged by, in the order of the study.
        course: When they end, and what they depend on.
        told: Is called with each finished trial, and how many there are.
    """
    from optuna.trial import TrialState, create_trial

    finished = {_number(trial): trial for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    begun: dict[int, AskedTrial | FrozenTrial] = dict(finished)
    todo = [number for number in range(course.trials) if number not in finished]
    ahead = ahead_of(crew.size)
    while True:
        while crew.idle and todo and time.monotonic() < course.until:
            number = todo[0]
            before = range(max(0, number - ahead + 1))
            if not all(earlier in finished for earlier in before):
                break
            copy = _so_far(
                study.directions,
                [finished[earlier] for earlier in before],
                [begun[earlier] for earlier in range(len(before), number)],
                course.seed + number,
            )
            begun[number], setting = _propose(copy, space, course, number)
            crew.submit((todo.pop(0), setting), try_out, setting)
        if not crew.busy:
            return
        (number, setting), tried = crew.next()
        finished[number] = create_trial(
            values=[_told(goal, tried) for goal in goals],
            params=begun[number].params,
            distributions=begun[number].distributions,
            user_attrs={_NUMBER: number, **_record(setting, tried)},
            constraints={"over": _over(tried)},
        )
        study.add_trial(finished[number])
        told(Trial(number, setting, tried), len(finished))


def _propose(study: "Study", space: Space, course: Course, number: int) -> "tuple[AskedTrial, Setting]":
    """Begins a trial: one of the course's starts, by its number, or what the study's sampler proposes after them."""
    if number < len(course.starts):
        start = course.starts[number]
        study.enqueue_trial({name: start[name] for name in space.free if name in start})
    asked = study.ask()
    return asked, space.suggest(asked)


def ahead_of(workers: int) -> int:
    """Returns how many trials further on the results of one bear; the same for any number of workers up to it."""
    return _AHEAD * -(-workers // _AHEAD)


def _so_far(
    ways: "Sequence[StudyDirection]",
    known: "Sequence[FrozenTrial]",
    open_ones: "Sequence[AskedTrial | FrozenTrial]",
    seed: int,
) -> "Study":
    """Returns a study in memory that knows some results, and takes the trials without one for failures."""
    import optuna
    from optuna.trial import create_trial

    copy = optuna.create_study(directions=ways, sampler=_sampler(seed))
    copy.add_trials(known)
    worst = [math.inf if way == optuna.study.StudyDirection.MINIMIZE else -math.inf for way in ways]
    for trial in open_ones:
        copy.add_trial(
            create_trial(
                values=worst,
                params=trial.params,
                distributions=trial.distributions,
                constraints={"over": _NO_NUMBER},
            )
        )
    return copy


def end_interrupted(study: "Study") -> None:
    """Marks the trials that an earlier run began as failed; only when no worker runs."""
    from optuna.trial import TrialState

    for stale in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(stale.number, state=TrialState.FAIL, skip_if_finished=True)


def trials_of(study: "Study", limits: Mapping[str, float]) -> list[Trial]:
    """Returns the finished trials, in order, as they lie to the limits as they are now."""
    from optuna.trial import TrialState

    found = [_read(trial, limits) for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))]
    return sorted(found, key=lambda trial: trial.number)


def best_of(trials: Sequence[Trial], objectives: Sequence[Goal]) -> list[Trial]:
    """Returns the trials that no other beats in every objective, the most effective first."""
    complete = [trial for trial in trials if trial.tried.complete]

    def losses(trial: Trial) -> tuple[float, ...]:
        return tuple(loss(each, trial.tried.values[each.name]) for each in objectives)

    def beaten(one: Trial) -> bool:
        mine = losses(one)
        return any(
            all(a <= b for a, b in zip(losses(other), mine, strict=True)) and losses(other) != mine
            for other in complete
        )

    front = {losses(trial): trial for trial in reversed(complete) if not beaten(trial)}
    return sorted(front.values(), key=losses)


def importances(study: "Study", objectives: Sequence[Goal]) -> dict[str, dict[str, float]]:
    """Returns how much of each objective's variation each parameter explains, by PED-ANOVA; empty with few trials."""
    import optuna

    found = {}
    for index, objective in enumerate(objectives):
        # It explains what makes a target small, and says so in a warning.
        target = functools.partial(_loss, index, objective)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                evaluator = optuna.importance.PedAnovaImportanceEvaluator()
                shares = optuna.importance.get_param_importances(study, evaluator=evaluator, target=target)
        except (ValueError, RuntimeError):
            continue
        found[objective.name] = {name: round(float(share), 4) for name, share in shares.items()}
    return found


def _sampler(seed: int) -> Any:
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(n_startup_trials=_STARTUP, multivariate=True, group=True, seed=seed)


def _loss(index: int, objective: Goal, trial: "FrozenTrial") -> float:
    return loss(objective, float(trial.values[index]))


def _count(study: "Study", *states: "TrialState") -> int:
    return len(study.get_trials(deepcopy=False, states=states))


def _number(trial: "FrozenTrial") -> int:
    """Returns which trial it is; Optuna counts those of several workers in the order in which they end."""
    return int(trial.user_attrs.get(_NUMBER, trial.number))


def _record(setting: Setting, tried: Tried) -> dict[str, Any]:
    return {
        "setting": dict(setting),
        "values": dict(tried.values),
        "seconds": round(tried.seconds, 3),
        "digest": tried.digest,
    }


def _over(tried: Tried) -> float:
    return tried.over if all(map(math.isfinite, tried.values.values())) else _NO_NUMBER


def _told(objective: Goal, tried: Tried) -> float:
    """Returns a measure for Optuna: where it is not a number, or was not reached, what is worse than any number."""
    value = tried.values.get(objective.name, math.nan)
    if math.isfinite(value):
        return value
    return math.inf if objective.direction == "minimize" else -math.inf


def _read(trial: "FrozenTrial", limits: Mapping[str, float]) -> Trial:
    kept = trial.user_attrs
    over = excess(kept["values"], limits)
    return Trial(_number(trial), kept["setting"], Tried(kept["values"], over, kept["seconds"], kept["digest"]))
