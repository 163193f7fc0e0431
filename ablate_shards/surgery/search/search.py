"""Searches for the edit of a model: trials, a choice, and what the chosen edit does on questions kept for that."""

import contextlib
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ablate_shards import __version__
from ablate_shards.errors import AblateError, Interrupted, SearchError, UsageError
from ablate_shards.surgery.anatomy.architecture import dissect
from ablate_shards.surgery.anatomy.parts import part_of
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint
from ablate_shards.surgery.directions.directions import Directions
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.evaluate.answers import Dtype, library_versions
from ablate_shards.surgery.evaluate.evaluation import Evaluation, Model, compare, questions_digest
from ablate_shards.surgery.evaluate.likelihood import Divergence, divergence, record
from ablate_shards.surgery.evaluate.measures import forced_answers, judged, measure_leans
from ablate_shards.surgery.machine.crew import Crew, Engine, RayCrew, Workers, hired, others
from ablate_shards.surgery.machine.signals import end_with_parent, sigterm_as_interrupt
from ablate_shards.surgery.machine.staging import locked
from ablate_shards.surgery.model.loading import headers_digest, open_folder, open_same
from ablate_shards.surgery.search.bench import Bench, Tried, opened_bench
from ablate_shards.surgery.search.choice import (
    Budget,
    Candidate,
    Measured,
    Rule,
    choose,
    is_within,
    keep_measure,
    kept_measure,
    measure_again,
    spread,
)
from ablate_shards.surgery.search.contrasts import Contrasts
from ablate_shards.surgery.search.objectives import Asking, Goal, Measures, answer, find_objective
from ablate_shards.surgery.search.questions import Parts
from ablate_shards.surgery.search.space import Setting, Space, make_space
from ablate_shards.surgery.search.study import (
    Course,
    Trial,
    ahead_of,
    best_of,
    check_optuna,
    deal_trials,
    end_interrupted,
    importances,
    mend_journal,
    open_study,
    run_trials,
    trials_of,
)
from ablate_shards.surgery.search.worth import beats

if TYPE_CHECKING:
    from optuna.study import Study

__all__ = ["Found", "Job", "SearchOptions", "SearchProgress", "prepare_job", "search"]

#: Seconds between two looks at what workers have done.
_LOOK = 1.0


@dataclass(frozen=True, slots=True)
class SearchOptions:
    """How to search.

    Attributes:
        trials: How many trials, those of an interrupted run among them.
        timeout: Minutes after which no further trial begins, None for as long as it takes.
        seed: Of the proposals.
        objectives: What trials are judged by; the choice takes the first for the effect.
        budget: What the chosen edit may cost.
        choose: Whether the choice is the largest effect, or the least cost of what the plain edit does.
        limit: Divergence above which a trial is not measured further, in nats a token.
        front: How many of the best trials the choice looks at.
        asking: How a trial asks the model.
        length: Most tokens of an answer of the choice and of the report.
        dtype: What the model computes in.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        memory: Bytes that all buffers of an edit take together.
        jobs: Tensors edited at a time, one per core if None.
        engine: Whether the models are in processes of this machine, or with Ray.
        workers: How many try settings at a time, each with a model of its own; if None one, with Ray one per GPU.
        overwrite: Throw away the trials of another search.
    """

    trials: int = 100
    timeout: float | None = None
    seed: int = 0
    objectives: tuple[str, ...] = ("lean", "kl")
    budget: Budget = field(default_factory=Budget)
    choose: Rule = "effect"
    limit: float = 0.5
    front: int = 6
    asking: Asking = field(default_factory=Asking)
    length: int = 128
    dtype: Dtype = "auto"
    device: str = "auto"
    memory: int = 256_000_000
    jobs: int | None = None
    engine: Engine = "local"
    workers: int | None = None
    overwrite: bool = False

    def run(self, device: str | None = None) -> RunOptions:
        """Returns what does the arithmetic of edits."""
        return RunOptions(device=device or self.device, memory=self.memory, jobs=self.jobs)

    @property
    def limits(self) -> dict[str, float]:
        """The most that measures of a trial may be, by their names."""
        return {"kl": self.limit, "subject": self.budget.subject}


class SearchProgress(Protocol):
    """Receives how far a search has come."""

    def note(self, text: str) -> None:
        """Says something in one line."""

    def count(self, done: int, total: int) -> None:
        """Says that ``done`` of ``total`` steps after the trials are done."""

    def tried(self, trial: Trial, finished: int, front: Sequence[Trial]) -> None:
        """Says what a trial measured, how many there are, and which are the best so far."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is searched, as data.

    Attributes:
        folder: The model.
        contrasts: The directions that may be removed.
        space: What may vary.
        parts: The questions.
        options: How to search.
        journal: Where the trials are kept.
    """

    folder: Path
    contrasts: Contrasts
    space: Space
    parts: Parts
    options: SearchOptions
    journal: Path


@dataclass(frozen=True, slots=True)
class Found:
    """What a search found.

    Attributes:
        job: What was searched.
        objectives: Name, direction and the unedited model's measure of each objective.
        trials: Every finished trial.
        front: The best of them on the questions they were tried on, the most effective first.
        importance: How much of each objective's variation each parameter explains.
        base: The unedited model on the questions of the choice.
        candidates: The trials that the choice looked at, measured again.
        chosen: The one that was chosen.
        reports: Evaluations on the questions of the report, by name: ``chosen`` and, unless it is the same, ``plain``;
            each compared with the unedited model.
        beats_plain: Whether the chosen edit is better than the plain one in slant or divergence and worse in neither,
            on the questions of the report; None where it is the plain one.
    """

    job: Job
    objectives: tuple[tuple[str, str, float], ...]
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    importance: Mapping[str, Mapping[str, float]]
    base: Candidate
    candidates: tuple[Candidate, ...]
    chosen: Candidate
    reports: Mapping[str, Evaluation]
    beats_plain: bool | None


def prepare_job(
    folder: Path,
    read: Mapping[str, Directions],
    without: Mapping[str, Directions],
    parts: Parts,
    table: Mapping[str, Any],
    options: SearchOptions,
    journal: Path,
) -> Job:
    """Checks all that can be checked before the model is loaded.

    Args:
        folder: A checkpoint folder with tokenizer and chat template.
        read: Directions by name.
        without: Directions that may be taken out of them, by name.
        parts: What to ask.
        table: What a recipe says of the space.
        options: How to search.
        journal: Where the trials are kept.

    Raises:
        CheckpointError: The checkpoint is malformed.
        DirectionsError: Directions are of different models.
        SearchError: Optuna is not installed.
        UsageError: An option or the space cannot be used.
    """
    check_optuna()
    _check_options(options)
    checkpoint = open_folder(folder, SearchError)
    anatomy = dissect(checkpoint.tensors, checkpoint.config, ())
    written_by = dict.fromkeys(
        part
        for writer in anatomy.writers
        if not writer.mtp and (part := part_of(writer)) is not None and part != "embedding"
    )
    contrasts = Contrasts(read, without)
    space = make_space(
        table,
        "[search.space]",
        contrasts=contrasts.names,
        without=tuple(without),
        rank=contrasts.rank,
        layers=len(anatomy.layers),
        sources=contrasts.layers,
        parts=tuple(written_by),
    )
    return Job(folder, contrasts, space, parts, options, journal)


def search(job: Job, progress: SearchProgress) -> Found:
    """Runs the trials that are missing, chooses among the best, and measures the choice.

    Raises:
        EvaluateError: The model cannot be used.
        ExecuteError: Ray does not answer, or its workers cannot do it.
        Interrupted: Ctrl-C; finished trials are kept.
        SearchError: The journal is of another search, or no trial is within the budget.
    """
    options = job.options
    deadline = time.monotonic() + (60 * options.timeout if options.timeout else float("inf"))
    headers = headers_digest(open_folder(job.folder, SearchError))
    workers = Workers(options.engine, options.workers, options.device)
    there = job if options.engine == "local" else dataclasses.replace(job, folder=job.folder.resolve())
    opened = functools.partial(_subject, there, options.device, headers)
    try:
        with sigterm_as_interrupt(), locked(job.journal), hired(workers, opened) as crew:
            first: _FirstLook = crew.do(_look)
            progress.note(f"{job.folder.name}: {_counted(job)}, on {first.device}{others(crew)}")
            if "subject" not in first.names:
                progress.note(_unlimited("trials"))
            mend_journal(job.journal)
            engine = f"ray, up to {ahead_of(crew.size)} at a time" if isinstance(crew, RayCrew) else "local"
            study = first.study(job, engine, overwrite=options.overwrite)
            done = trials_of(study, options.limits)
            if done:
                progress.note(f"{'1 trial is' if len(done) == 1 else f'{len(done)} trials are'} finished already")

            def told(trial: Trial, finished: int) -> None:
                done.append(trial)
                progress.tried(trial, finished, best_of(done, first.goals))

            course = _course(job, deadline)
            if isinstance(crew, RayCrew):
                deal_trials(study, job.space, crew, _try_out, first.goals, course, told)
            else:
                end_interrupted(study)
                with _other_workers(job, deadline):
                    run_trials(study, job.space, functools.partial(crew.do, _try_out), first.goals, course, told)
            return _conclude(job, crew, study, first.goals, progress)
    except KeyboardInterrupt as error:
        raise Interrupted(
            f"{job.journal}: interrupted; finished trials are kept there, and the same command goes on"
        ) from error


@dataclass(frozen=True, slots=True)
class _Subject:
    """What whoever tries settings holds: the job, and the model that it is about."""

    job: Job
    bench: Bench
    made: dict[str, Measures]

    def asking(self, part: str) -> Asking:
        """Returns how a part of the questions is asked."""
        options = self.job.options
        if part == "trials":
            return options.asking
        asking = Asking(tokens=options.length, forced=2 * options.asking.forced, batch=options.asking.batch)
        return asking.thorough()

    def measures(self, part: str) -> Measures:
        """Returns what is measured on a part of the questions; made once."""
        if part not in self.made:
            options, questions = self.job.options, getattr(self.job.parts, part)
            self.made[part] = self.bench.measures(options.objectives, questions, self.asking(part))
        return self.made[part]


@contextlib.contextmanager
def _subject(job: Job, device: str, headers: str) -> Iterator[_Subject]:
    """Holds the model of a job, which must be the one with these headers."""
    with _bench(job, open_same(job.folder, headers, SearchError), device) as bench:
        yield _Subject(job, bench, {})


@dataclass(frozen=True, slots=True)
class _FirstLook:
    """What the unedited model says before any trial."""

    device: str
    names: tuple[str, ...]
    goals: tuple[Goal, ...]
    identity: Mapping[str, Any]

    def study(self, job: Job, engine: str, *, overwrite: bool) -> "Study":
        """Opens the journal for trials that begin with this, and that an engine runs."""
        return open_study(job.journal, {**self.identity, "the engine": engine}, self.goals, overwrite=overwrite)


def _look(subject: _Subject) -> _FirstLook:
    measures = subject.measures("trials")
    identity = _identity(subject.job, subject.bench, measures)
    return _FirstLook(str(subject.bench.speaker.device), measures.names, measures.goals, identity)


def _look_again(subject: _Subject) -> tuple[Asking, tuple[str, ...], tuple[Goal, ...]]:
    again = subject.measures("choice")
    return subject.asking("choice"), again.names, again.goals


def _try_out(subject: _Subject, setting: Setting) -> Tried:
    return subject.bench.try_out(setting, subject.measures("trials"), subject.job.options.limits)


def _measure_again(subject: _Subject, setting: Setting | None) -> Measured:
    part = "choice"
    return measure_again(subject.bench, setting, subject.measures(part), subject.job.parts.choice, subject.asking(part))


def _conclude(
    job: Job,
    crew: Crew[_Subject],
    study: "Study",
    objectives: Sequence[Goal],
    progress: SearchProgress,
) -> Found:
    """Chooses among the best trials and measures the choice, beside the plain edit."""
    options = job.options
    trials = trials_of(study, options.limits)
    front = best_of(trials, objectives)
    if not front:
        raise SearchError(f"{job.journal}: {_none_within(trials, options)}; finished trials are kept")
    # What costs less on the questions of the trials may cost more on others, so that the best one alone will not do.
    within = [trial for trial in front if trial.tried.values.get("kl", 0.0) <= options.budget.kl] or front[-1:]
    effective = max(options.front, -(-len(within) // 2))
    looked_at = spread(within[:effective], options.front)
    # What is looked at as well if none of these is within the budget: those that do less.
    spare = spread(within[effective:], options.front)
    plain = job.space.plain()
    same = next((trial for trial in trials if dict(trial.setting) == plain), None)
    if same is not None and all(trial.number != same.number for trial in looked_at):
        looked_at = [same, *looked_at]
    spare = [trial for trial in spare if trial not in looked_at]
    total, steps = len(looked_at) + 1 + 3, itertools.count(1)
    progress.count(0, total)
    asking, names, goals = crew.do(_look_again)
    if "subject" not in names:
        progress.note(_unlimited("choice"))

    def measured(settings: Mapping[int | None, Setting | None]) -> list[Candidate]:
        # Kept, so that another budget is a matter of seconds.
        asked = [dataclasses.asdict(asking), list(names), questions_digest(job.parts.choice)]
        kept = ((number, kept_measure(study, f"choice {number}", asked)) for number in settings)
        found = {number: each for number, each in kept if each is not None}
        for _ in found:
            progress.count(next(steps), total)
        missing = {number: (setting,) for number, setting in settings.items() if number not in found}
        for number, each in crew.each(_measure_again, missing):
            keep_measure(study, f"choice {number}", asked, each)
            found[number] = each
            progress.count(next(steps), total)
        return [found[number].candidate(number, setting, job.parts.choice) for number, setting in settings.items()]

    base, *candidates = measured({None: None, **{trial.number: trial.setting for trial in looked_at}})
    if spare and not any(is_within(candidate, base, options.budget) for candidate in candidates):
        total += len(spare)
        candidates += measured({trial.number: trial.setting for trial in spare})
    chosen = choose(
        candidates,
        base,
        goals,
        options.budget,
        str(job.journal),
        rule=options.choose,
        plain=None if same is None else same.number,
    )
    settings = {"chosen": chosen.setting} | ({} if dict(chosen.setting) == plain else {"plain": plain})
    reports = crew.do(_reported, settings)
    progress.count(total, total)
    return Found(
        job=job,
        objectives=tuple((each.name, each.direction, each.base) for each in objectives),
        trials=tuple(trials),
        front=tuple(front),
        importance=importances(study, objectives),
        base=base,
        candidates=tuple(candidates),
        chosen=chosen,
        reports=reports,
        beats_plain=beats(reports["chosen"], reports["plain"]) if "plain" in reports else None,
    )


def _reported(subject: _Subject, settings: Mapping[str, Setting]) -> dict[str, Evaluation]:
    """Returns the evaluation of each setting on the questions of the report, compared with the unedited model."""
    job, bench, asking = subject.job, subject.bench, subject.asking("report")
    questions, speaker = job.parts.report, bench.speaker
    prompts = [speaker.prompt(question, thinking=False) for question in questions]

    def evaluated(name: str, digest: str | None) -> Evaluation:
        replies = answer(speaker, questions, tokens=asking.tokens, batch=asking.batch)
        return Evaluation(
            model=Model(name, digest),
            options={
                "length": asking.tokens,
                "thinking": False,
                "batch": asking.batch,
                "dtype": str(speaker.network.dtype).removeprefix("torch."),
                "device": speaker.device.type,
            },
            versions=library_versions(),
            questions=questions_digest(questions),
            answers=tuple(judged(*pair) for pair in zip(questions, replies, strict=True)),
            leans=measure_leans(speaker, questions, prompts, batch=asking.batch),
        )

    bench.edit(None)
    base = evaluated(job.folder.resolve().name, bench.model_sha256)
    forced = forced_answers(speaker, questions, [each.reply for each in base.answers], thinking=False)
    recording = record(speaker, forced, batch=asking.batch, copy_head=False)
    reports = {}
    for name, setting in settings.items():
        bench.edit(setting)
        found = evaluated(f"{job.folder.resolve().name}, {name}", None)
        moved: Divergence | None = divergence(speaker, forced, recording, batch=asking.batch)
        reports[name] = dataclasses.replace(found, base=base, comparison=compare(found, base, moved))
    return reports


def _bench(job: Job, checkpoint: Checkpoint, device: str) -> "contextlib.AbstractContextManager[Bench]":
    run = job.options.run(device)
    return opened_bench(job.folder, checkpoint, job.contrasts, job.space, run, dtype=job.options.dtype)


@contextlib.contextmanager
def _other_workers(job: Job, deadline: float) -> Iterator[None]:
    """Runs the workers beside this one while the context lasts; on GPUs, each on one of its own."""
    import multiprocessing

    context = multiprocessing.get_context("spawn")
    left = deadline - time.monotonic()
    workers = [
        context.Process(target=work, args=(job, number, left), daemon=True)
        for number in range(1, job.options.workers or 1)
    ]
    for worker in workers:
        worker.start()
    try:
        yield
        for worker in workers:
            worker.join()
    finally:
        for worker in workers:
            worker.terminate()


def work(job: Job, number: int, seconds: float) -> None:
    """Runs trials of a job in a process of its own, until there are enough or the time is over.

    Args:
        job: The job, whose journal exists.
        number: Which worker this is, from 1; on GPUs it takes that one.
        seconds: How long, from now.
    """
    import torch

    end_with_parent()
    check_optuna()
    deadline = time.monotonic() + seconds
    device = job.options.device
    if device in ("auto", "cuda") and torch.cuda.device_count() > number:
        device = f"cuda:{number}"
    try:
        with _bench(job, open_folder(job.folder, SearchError), device) as bench:
            subject = _Subject(job, bench, {})
            first = _look(subject)
            study = first.study(job, "local", overwrite=False)
            course = _course(job, deadline, number)
            run_trials(study, job.space, functools.partial(_try_out, subject), first.goals, course, lambda *_: None)
    except AblateError as error:
        sys.exit(f"worker {number + 1} of {job.options.workers}: {error}; the others go on")
    except KeyboardInterrupt:
        sys.exit(1)  # the search itself says so


def _course(job: Job, deadline: float, worker: int = 0) -> Course:
    """Returns when a worker's trials end and what seeds them, each worker's otherwise."""
    options = job.options
    seed = options.seed + 1_000_003 * worker
    starts = job.space.starts(job.contrasts.sources())
    return Course(trials=options.trials, until=deadline, seed=seed, starts=starts)


def _identity(job: Job, bench: Bench, measures: Measures) -> dict[str, Any]:
    """Returns what trials depend on, by what errors call it."""
    options = job.options
    return {
        "the model": bench.model_sha256,
        "the directions": [[name, job.contrasts.directions(name).sha256()] for name in job.contrasts.names],
        "the questions": questions_digest(job.parts.trials),
        "the space": job.space.as_dict(),
        "the objectives": list(options.objectives),
        "what is measured": list(measures.names),
        "the seed": options.seed,
        "the limit": options.limit,
        "the way of asking": dataclasses.asdict(options.asking),
        "the type computed in": str(bench.speaker.network.dtype).removeprefix("torch."),
        "the kind of device": bench.speaker.device.type,
        "the version of ablate-shards": __version__,
    }


def _unlimited(part: str) -> str:
    """Returns that one part of the questions does not show whether answers keep to what was asked."""
    return (
        f"no answer to the contested questions of the {part} repeats a word of its question, so that --subject limits "
        "nothing there"
    )


def _none_within(trials: Sequence[Trial], options: SearchOptions) -> str:
    """Returns why no trial can be chosen, and the way out."""
    if not trials:
        return "no trial was finished in time; raise --timeout"
    reasons, ways = [], []
    for flag, name, limit in (("--limit", "kl", options.limit), ("--subject", "subject", options.budget.subject)):
        values = [value for trial in trials if math.isfinite(value := trial.tried.values.get(name, math.nan))]
        if over := sum(value > limit for value in values):
            reasons.append(
                f"{over} are over the {limit:g} nats a token of {flag}, by {min(values) - limit:.3g} or more"
            )
            ways.append(flag)
    if numberless := sum(not all(map(math.isfinite, trial.tried.values.values())) for trial in trials):
        reasons.append(f"{numberless} give no numbers")
    raised = f"raise {' or '.join(ways)}, narrow" if ways else "narrow"
    return f"none of {len(trials)} trials is within its limits ({', '.join(reasons)}); {raised} the space, or search on"


def _counted(job: Job) -> str:
    free = len(job.space.free)
    questions = ", ".join(f"{len(getattr(job.parts, part))} for the {part}" for part in ("trials", "choice", "report"))
    return f"{free} parameters, questions: {questions}"


def _check_options(options: SearchOptions) -> None:
    Workers(options.engine, options.workers, options.device).check()
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers: expected more than 0, found {options.workers}")
    for name in ("trials", "front", "length", "limit"):
        if not getattr(options, name) > 0:
            raise UsageError(f"--{name}: expected more than 0, found {getattr(options, name)}")
    for name in ("kl", "controls", "broken", "subject"):
        if not math.isfinite(getattr(options.budget, name)):
            raise UsageError(f"--{name}: expected a number, found {getattr(options.budget, name)}")
    if not options.budget.subject > 0:
        raise UsageError(f"--subject: expected more than 0, found {options.budget.subject:g}")
    if options.timeout is not None and not options.timeout > 0:
        raise UsageError(f"--timeout: expected more than 0 minutes, found {options.timeout:g}")
    if len(set(options.objectives)) < len(options.objectives) or not options.objectives:
        raise UsageError(f"--objective: expected each name once, found {', '.join(options.objectives) or 'none'}")
    for name in options.objectives:
        find_objective(name)
