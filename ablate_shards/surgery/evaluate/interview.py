"""Asks a model the questions, judges every answer, and compares it with the model that it was made from."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate_shards.errors import AblateError, EvaluateError, Interrupted, UsageError
from ablate_shards.surgery.evaluate.answers import (
    Dtype,
    Prompt,
    Speaker,
    batches,
    library_versions,
    model_digest,
    speaking,
)
from ablate_shards.surgery.evaluate.endpoint import ChatOptions, Endpoint, Messages, Reply, chat, open_endpoint
from ablate_shards.surgery.evaluate.evaluation import (
    Comparison,
    Evaluation,
    Lean,
    Model,
    PredictedText,
    compare,
    questions_digest,
)
from ablate_shards.surgery.evaluate.evaluation_file import EVALUATION_FORMAT, read_evaluation, write_evaluation
from ablate_shards.surgery.evaluate.journal import Journal
from ablate_shards.surgery.evaluate.judge.llm_judge import judge_messages, read_verdict
from ablate_shards.surgery.evaluate.likelihood import (
    Divergence,
    Forced,
    Recording,
    divergence,
    perplexity,
    record,
)
from ablate_shards.surgery.evaluate.measures import forced_answers, is_control, judged, measure_leans
from ablate_shards.surgery.evaluate.tasks import Tasks, TaskScore, open_tasks, run_tasks
from ablate_shards.surgery.machine.crew import Alone, Engine, Workers, connected, hired, others
from ablate_shards.surgery.machine.devices import resolve_device
from ablate_shards.surgery.machine.progress import Steps
from ablate_shards.surgery.machine.staging import locked
from ablate_shards.surgery.model.loading import answering_dtype, headers_digest, open_folder, open_same, read_config
from ablate_shards.surgery.model.samples import Question, Turn

if TYPE_CHECKING:
    import torch
    from ray import ObjectRef

__all__ = [
    "ENDPOINT_KEY",
    "EVALUATION_FORMAT",
    "JUDGE_KEY",
    "Comparison",
    "EvaluateOptions",
    "Evaluation",
    "compare",
    "default_out",
    "evaluate",
    "read_evaluation",
    "write_evaluation",
]

#: The environment variables with the keys; this tool's own, so that no other service's key goes to some address.
ENDPOINT_KEY = "ABLATE_SHARDS_API_KEY"
JUDGE_KEY = "ABLATE_SHARDS_JUDGE_API_KEY"

_JUDGE_TOKENS = 1024
#: Batches' worth of questions that are answered together, to be kept when all of them are: the more there are, the
#: longer a batch stays full; the fewer, the less is asked again after an interruption.
_FULL_BATCHES = 4


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """How to ask, and what to measure.

    Attributes:
        length: Most tokens of an answer.
        thinking: Let the model think first, where its chat template offers the choice.
        thoughts: Most tokens of the thoughts before an answer.
        batch: Questions answered at a time.
        dtype: What to compute in; ``auto``: what is stored, but float32 on a CPU without instructions for it.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``xpu``.
        endpoint: Base URL of an OpenAI-compatible endpoint that serves the model, None to run it here.
        endpoint_model: The name that the endpoint knows it by, asked of the endpoint if None.
        judge: Base URL of an endpoint whose model judges the answers as well, None for the rules alone.
        judge_model: The name of that model, asked of the endpoint if None.
        timeout: Seconds that an endpoint may take for one answer.
        divergence: Whether to measure the divergence from the base.
        lean: Whether to measure how likely the reference answers are, where questions have them.
        reuse: Earlier evaluations whose answers and measures are taken over where model, question, options and
            versions are the same; for models that run here.
        fresh: Do not take over what an earlier evaluation beside the base, or the one that is replaced, has.
        text: Plain text whose perplexity is measured, none if None.
        tasks: Tasks of lm-evaluation-harness, see ``tasks.open_tasks``.
        task_limit: How many documents of each task are asked, all if None.
        task_chat: Lay the model's chat template around the tasks' prompts.
        engine: Whether the model runs here, or on workers of Ray.
        workers: How many of those, one per GPU if None, or per machine where there are none.
        overwrite: Replace an existing evaluation.
    """

    length: int = 256
    thinking: bool = False
    thoughts: int = 1024
    batch: int = 16
    dtype: Dtype = "auto"
    device: str = "auto"
    endpoint: str | None = None
    endpoint_model: str | None = None
    judge: str | None = None
    judge_model: str | None = None
    timeout: float = 120.0
    divergence: bool = True
    lean: bool = True
    reuse: tuple[Path, ...] = ()
    fresh: bool = False
    text: Path | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None
    task_chat: bool = False
    engine: Engine = "local"
    workers: int | None = None
    overwrite: bool = False


def evaluate(
    model: Path,
    questions: Sequence[Question],
    options: EvaluateOptions,
    progress: Steps,
    *,
    against: Path | Evaluation | None = None,
    out: Path | None = None,
) -> Evaluation:
    """Asks a model all ``questions``, judges its answers, and compares it with a base.

    Models are in memory one at a time, the base first. No code from a checkpoint runs, and nothing is fetched. The
    evaluation depends on the models, the questions, the options, the kind of device and the versions of torch and
    transformers alone, where the model runs here.

    Args:
        model: A checkpoint folder with tokenizer and chat template. With an endpoint it need not be here; then it is
            a name.
        questions: What to ask, at least one.
        options: How.
        progress: Receives how far the run has come.
        against: The base: a checkpoint folder, the file of an earlier evaluation, or that evaluation. Only with a
            folder can the divergence be measured.
        out: Where to write the evaluation. What the one that is replaced has, or one beside the base, is taken over as
            from ``options.reuse``. Answers are kept beside it while the run lasts, so that the next run with the same
            model, options and questions goes on from there.

    Raises:
        EvaluateError: A model, an endpoint or the base cannot be used, or ``out`` may not be replaced.
        CheckpointError: A checkpoint is malformed.
        UsageError: An option's value cannot be used.
        Interrupted: Ctrl-C; what was answered is kept.
    """
    _check(model, questions, options, against)
    if out is not None:
        _check_out(out, overwrite=options.overwrite)
    with nullcontext() if out is None else locked(out):
        journal = Journal(None if out is None else out.with_name(f".{out.name}.answers"))
        earlier = {path: read_evaluation(path) for path in options.reuse}
        if not options.fresh:
            beside = default_out(against) if isinstance(against, Path) and against.is_dir() else None
            earlier |= _found_by_itself([place for place in (beside, out) if place is not None], progress)
        for each in earlier.values():
            journal.take_over(_keyed(each))
        try:
            with connected(options.engine):
                found = _Run(questions, options, journal, earlier, progress).evaluate(model, against)
            if out is not None:
                write_evaluation(found, out)
        except KeyboardInterrupt as error:
            raise Interrupted(f"{out or model}: interrupted{journal.kept}") from error
        except EvaluateError as error:
            raise EvaluateError(f"{error}{journal.kept}") from error
        journal.remove()
    return found


def default_out(model: Path) -> Path:
    """Returns where the evaluation of a model goes by itself: beside its folder, or here if it is but a name."""
    folder = model.resolve() if model.exists() else Path(model.name)
    return folder.with_name(f"{folder.name}.evaluation.json")


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The responses of a base, and what it computes over them."""

    forced: Sequence[Forced]
    recording: "Recording | ObjectRef"


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model that runs here, and how it is asked.

    Attributes:
        model: Its name and digest.
        versions: Of what computes its answers.
        asked: What bears on them.
        keys: What each answer is kept by.
    """

    model: Model
    versions: Mapping[str, str]
    asked: Mapping[str, Any]
    keys: Sequence[str]


class _Run:
    """One evaluation: whom to ask, what is known already, and how far it has come."""

    def __init__(
        self,
        questions: Sequence[Question],
        options: EvaluateOptions,
        journal: Journal,
        earlier: Mapping[Path, Evaluation],
        progress: Steps,
    ) -> None:
        self._questions = questions
        self._options = options
        self._journal = journal
        self._earlier = earlier
        self._progress = progress
        self._digest = questions_digest(questions)
        self._referenced = options.lean and any(question.references for question in questions)
        self._diverges = options.divergence and any(question.group == "unrelated" for question in questions)
        self._done = self._total = 0
        self._text: tuple[str, str, str] | None = None
        self._tasks = Tasks(())

    def evaluate(self, model: Path, against: Path | Evaluation | None) -> Evaluation:
        options = self._options
        if options.text is not None and options.endpoint is None:
            self._text = _read_text(options.text)
        if options.tasks:
            self._tasks = open_tasks(options.tasks)
        # What may be wrong with an endpoint shows before a model is asked.
        referee = self._endpoint(options.judge, options.judge_model, JUDGE_KEY, "--judge-model")
        endpoint = self._endpoint(options.endpoint, options.endpoint_model, ENDPOINT_KEY, "--endpoint-model")
        folder = against if isinstance(against, Path) and against.is_dir() else None
        sides = 1 + (against is not None)
        self._plan(models=1 + (folder is not None), referee=referee is not None, evaluations=sides)
        base, recorded = None, None
        if folder is not None:
            base, recorded, _ = self._interview(folder, recorded=None, recording=self._diverges)
        elif against is not None:
            earlier = read_evaluation(against) if isinstance(against, Path) else against
            base = self._judged_anew(earlier)
        if endpoint is not None:
            found, moved = self._query(model, endpoint), None
        else:
            found, _, moved = self._interview(model, recorded=recorded, recording=False)
        if referee is not None:
            base = base and self._refer(referee, base)
            found = self._refer(referee, found)
        if base is None:
            return found
        comparison = compare(found, base, moved)
        if options.divergence and moved is None:
            why = (
                "the base is an evaluation and no model"
                if folder is None
                else "there are no unrelated questions"
                if recorded is None
                else "the model gives no numbers"
            )
            comparison = dataclasses.replace(comparison, notes=(*comparison.notes, f"divergence not measured: {why}"))
        return dataclasses.replace(found, base=base, comparison=comparison)

    # ------------------------------------------------------------------------------------ a model here

    def _interview(
        self, folder: Path, *, recorded: _Recorded | None, recording: bool
    ) -> tuple[Evaluation, _Recorded | None, Divergence | None]:
        """Asks a model that runs here, and measures it while it is in memory."""
        options = self._options
        checkpoint = open_folder(folder, EvaluateError)
        place = folder if options.engine == "local" else folder.resolve()
        opened = functools.partial(
            _speaking, place, headers_digest(checkpoint), dtype=options.dtype, device=options.device
        )
        digest = model_digest(checkpoint)
        if options.engine == "local" and not recording and recorded is None and not self._tasks.asked:
            subject = self._subject(folder, digest, resolve_device(options.device))
            if (measured := self._measured(subject)) is not None:
                self._note(subject, "all known, so the model is not loaded", set(subject.keys))
                self._advance(len(subject.keys) + self._referenced + (self._text is not None))
                return measured, None, None
        leans: tuple[Lean, ...] = ()
        text, kept, moved = None, None, None
        with hired(Workers(options.engine, options.workers, options.device), opened) as crew:
            device = crew.do(_device_of)
            subject = self._subject(folder, digest, device)
            keys, known = subject.keys, self._known(subject, self._earlier.values())
            prompts = crew.do(_prompts, self._questions, thinking=options.thinking)
            open_ones = {}
            for rows in batches(prompts, _FULL_BATCHES * options.batch):
                if all(keys[row] in self._journal for row in rows):
                    self._advance(len(rows))
                else:
                    open_ones[tuple(rows)] = ([prompts[row] for row in rows],)
            asked_anew = {keys[row] for rows in open_ones for row in rows}
            self._note(subject, f"on {device}{others(crew)}", set(keys) - asked_anew)
            room = {
                "tokens": options.length,
                "thoughts": options.thoughts if options.thinking else 0,
                "at_once": options.batch,
            }
            # Each answer that ends is seen here alone.
            here = isinstance(crew, Alone)
            told = {"ended": lambda: self._advance(1)} if here else {}
            for asked_together, said in crew.each(Speaker.replies, open_ones, **room, **told):
                self._journal.keep({keys[row]: reply for row, reply in zip(asked_together, said, strict=True)})
                if not here:
                    self._advance(len(asked_together))
            replies = [self._journal[key] for key in keys]
            if self._referenced:
                leans = known.leans if known else crew.do(measure_leans, self._questions, prompts, batch=options.batch)
                self._advance(1)
            if self._text is not None:
                name, text_digest, content = self._text
                text = self._known_text(known) or PredictedText(name, text_digest, crew.do(perplexity, content))
                self._advance(1)
            tasks = crew.do(self._scores, known) if self._tasks.asked else ()
            if recorded is not None:
                moved = crew.do(divergence, recorded.forced, recorded.recording)
                self._advance(1)
            if recording and (forced := crew.do(forced_answers, self._questions, replies, thinking=options.thinking)):
                # On a GPU it lies there, and it is not fetched from a worker.
                kept = _Recorded(forced, crew.keep(record, forced))
                self._advance(1)
        found = self._evaluation(subject.model, {**subject.asked, **self._tasked()}, subject.versions, replies)
        return dataclasses.replace(found, leans=leans, text=text, tasks=tasks), kept, moved

    def _subject(self, folder: Path, digest: str, device: "torch.device") -> _Subject:
        options = self._options
        model = Model(folder.resolve().name, digest)
        versions = library_versions()
        asked = {
            **self._asked(),
            "batch": options.batch,
            "dtype": answering_dtype(options.dtype, read_config(folder, EvaluateError), device),
            "device": device.type,
        }
        keys = [_key(digest, versions, asked, question.turn.messages()) for question in self._questions]
        return _Subject(model, versions, asked, keys)

    def _note(self, subject: _Subject, where: str, known: Set[str]) -> None:
        """Says which model is asked, and what of it is not asked again."""
        name = subject.model.name
        self._progress.note(f"{name}: {len(subject.keys)} questions, {where}")
        for path, each in self._earlier.items():
            if count := len(_keyed(each).keys() & known):
                measures = " and what was measured" if self._known(subject, [each]) else ""
                self._progress.note(f"{name}: {count} answers{measures} are taken over from {path}; --fresh asks anew")

    def _measured(self, subject: _Subject) -> Evaluation | None:
        """Returns what is known of a model, None where an answer or a measure of it is not."""
        known = self._known(subject, self._earlier.values())
        text = self._known_text(known)
        if (
            not all(key in self._journal for key in subject.keys)
            or (self._referenced and known is None)
            or (self._text is not None and text is None)
        ):
            return None
        replies = [self._journal[key] for key in subject.keys]
        found = self._evaluation(subject.model, subject.asked, subject.versions, replies)
        leans = known.leans if known is not None and self._referenced else ()
        return dataclasses.replace(found, leans=leans, text=text)

    def _known_text(self, known: Evaluation | None) -> PredictedText | None:
        """Returns what an earlier evaluation measured of the same text."""
        if self._text is None or known is None or known.text is None or known.text.sha256 != self._text[1]:
            return None
        return known.text

    def _known(self, subject: _Subject, earlier: Iterable[Evaluation]) -> Evaluation | None:
        """Returns an earlier evaluation of the same model by the same questions, whose measures hold here too."""
        sides = (side for each in earlier for side in (each, each.base) if side is not None)
        measured = ("dtype", "device", "thinking", "batch")
        return next(
            (
                side
                for side in sides
                if side.model.sha256 == subject.model.sha256
                and (side.versions, side.questions) == (subject.versions, self._digest)
                and all(side.options.get(each) == subject.asked.get(each) for each in measured)
                and (bool(side.leans) or not self._referenced)
            ),
            None,
        )

    def _scores(self, speaker: Speaker, known: Evaluation | None) -> tuple[TaskScore, ...]:
        """Scores the model at the tasks, as far as an earlier evaluation has not."""
        limit, before = self._options.task_limit, self._done
        same = known is not None and known.options.get("tasks") == self._tasked()["tasks"]
        if known is not None and same and tuple(score.name for score in known.tasks) == self._tasks.names:
            self._advance(self._tasks.count(limit))
            return known.tasks
        scores = run_tasks(
            speaker,
            self._tasks,
            batch=self._options.batch,
            limit=limit,
            progress=_Onwards(self._progress, before, self._total),
            chat=self._options.task_chat,
        )
        self._done = before
        self._advance(self._tasks.count(limit))
        return scores

    def _tasked(self) -> dict[str, Any]:
        """Returns what bears on the scores at tasks, and on nothing else."""
        if not self._tasks.asked:
            return {}
        made_by = {name: importlib.metadata.version(name) for name in ("lm_eval", "datasets")}
        return {"tasks": {"limit": self._options.task_limit, "chat": self._options.task_chat, **made_by}}

    def _asked(self) -> dict[str, Any]:
        """Returns what bears on an answer, wherever the model runs."""
        options = self._options
        thoughts = {"thoughts": options.thoughts} if options.thinking else {}
        return {"length": options.length, "thinking": options.thinking, **thoughts}

    # ------------------------------------------------------------------------------------ an endpoint

    def _endpoint(self, url: str | None, model: str | None, key_variable: str, option: str) -> Endpoint | None:
        if url is None:
            return None
        return open_endpoint(url, model, key_variable=key_variable, option=option, timeout=self._options.timeout)

    def _query(self, model: Path, endpoint: Endpoint) -> Evaluation:
        """Asks a model that an endpoint serves."""
        options = self._options
        known = model_digest(open_folder(model, EvaluateError)) if model.is_dir() else None
        asked = self._asked()
        messages = [question.turn.messages() for question in self._questions]
        tokens = options.length + (options.thoughts if options.thinking else 0)
        replies = self._chat(endpoint, messages, known, tokens, thinking=options.thinking, greedy=True)
        name = model.resolve().name if model.is_dir() else str(model)
        return self._evaluation(Model(name, known, endpoint.model), asked, {}, replies)

    def _refer(self, endpoint: Endpoint, evaluation: Evaluation) -> Evaluation:
        """Has a language model judge the answers that have no single right one."""
        by_id = {question.id: question for question in self._questions}
        contested = [answer for answer in evaluation.answers if answer.exact is None]
        messages = [judge_messages(by_id[answer.id], answer.text) for answer in contested]
        replies = self._chat(endpoint, messages, None, _JUDGE_TOKENS, thinking=False, greedy=False)
        said = {answer.id: reply for answer, reply in zip(contested, replies, strict=True)}
        answers = tuple(
            dataclasses.replace(answer, judged=read_verdict(said[answer.id].text), said=said[answer.id].text)
            if answer.id in said
            else answer
            for answer in evaluation.answers
        )
        return dataclasses.replace(evaluation, answers=answers, judge=endpoint.model)

    def _chat(
        self,
        endpoint: Endpoint,
        messages: Sequence[Messages],
        known: str | None,
        tokens: int,
        *,
        thinking: bool,
        greedy: bool,
    ) -> list[Reply]:
        where = {"endpoint": endpoint.url, "model": endpoint.model, "sha256": known}
        keys = [_key(where, tokens, thinking, each) for each in messages]
        open_ones = {key: each for key, each in zip(keys, messages, strict=True) if key not in self._journal}
        self._progress.note(f"{endpoint.model} at {endpoint.url}: {len(open_ones)} of {len(keys)} to ask")
        self._advance(len(keys) - len(open_ones))

        asked = list(open_ones)

        def answered(number: int, reply: Reply) -> None:
            self._journal.keep({asked[number]: reply})
            self._advance(1)

        chat(
            endpoint,
            list(open_ones.values()),
            ChatOptions(tokens=tokens, thinking=thinking, at_once=self._options.batch, greedy=greedy),
            answered,
            self._progress.note,
        )
        return [self._journal[key] for key in keys]

    # ------------------------------------------------------------------------------------ both

    def _evaluation(
        self,
        model: Model,
        asked: Mapping[str, Any],
        versions: Mapping[str, str],
        replies: Sequence[Reply],
    ) -> Evaluation:
        answers = tuple(judged(question, reply) for question, reply in zip(self._questions, replies, strict=True))
        return Evaluation(model, asked, versions, self._digest, answers)

    def _judged_anew(self, earlier: Evaluation) -> Evaluation:
        """Returns an earlier evaluation's answers to these questions, judged by what the questions say now."""
        found = {(answer.id, answer.prompt, answer.system): answer for answer in earlier.answers}
        answers = []
        for question in self._questions:
            answer = found.get((question.id, question.prompt, question.system))
            if answer is None:
                raise EvaluateError(
                    f"question {question.id}: {earlier.model.name} was not asked it in these words; evaluate it with "
                    "the same questions"
                )
            answers.append(judged(question, answer.reply))
        return dataclasses.replace(
            earlier,
            questions=self._digest,
            answers=tuple(answers),
            # Other questions may have other references.
            leans=earlier.leans if earlier.questions == self._digest else (),
            judge=None,
            base=None,
            comparison=None,
        )

    def _plan(self, *, models: int, referee: bool, evaluations: int) -> None:
        """Counts the steps to come."""
        contested = sum(not is_control(question) for question in self._questions)
        steps = len(self._questions) + self._referenced + (self._text is not None)
        self._total = models * (steps + self._tasks.count(self._options.task_limit))
        self._total += evaluations * contested * referee
        self._total += 2 * (models > 1 and self._diverges)

    def _advance(self, count: int) -> None:
        self._done += count
        self._progress.count(self._done, self._total)


@contextmanager
def _speaking(folder: Path, headers: str, *, dtype: Dtype, device: str) -> Iterator[Speaker]:
    """Holds a model, which must be the one with these headers."""
    open_same(folder, headers, EvaluateError)
    with speaking(folder, dtype=dtype, device=device) as speaker:
        yield speaker


def _device_of(speaker: Speaker) -> "torch.device":
    return speaker.device


def _prompts(speaker: Speaker, questions: Sequence[Question], *, thinking: bool) -> list[Prompt]:
    return [speaker.prompt(question, thinking=thinking) for question in questions]


@dataclass(frozen=True, slots=True)
class _Onwards:
    """Receives how far a part of an evaluation has come, and reports how far all of it has."""

    progress: Steps
    before: int
    total: int

    def count(self, done: int, total: int) -> None:
        del total
        self.progress.count(self.before + done, self.total)

    def note(self, text: str) -> None:
        self.progress.note(text)


def _found_by_itself(places: Sequence[Path], progress: Steps) -> dict[Path, Evaluation]:
    """Reads the evaluations that nobody named; one that cannot be read is said and left."""
    found = {}
    for path in filter(Path.is_file, places):
        try:
            found[path] = read_evaluation(path)
        except AblateError as error:
            progress.note(f"nothing is taken over: {error}")
    return found


def _keyed(evaluation: Evaluation) -> dict[str, Reply]:
    """Returns what the models of an evaluation said, by what they were asked."""
    replies = {} if evaluation.base is None else _keyed(evaluation.base)
    for answer in evaluation.answers:
        messages = Turn(answer.prompt, None, answer.system).messages()
        options = {name: value for name, value in evaluation.options.items() if name != "tasks"}
        key = _key(evaluation.model.sha256, evaluation.versions, options, messages)
        replies[key] = answer.reply
    return replies


def _key(*content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _read_text(path: Path) -> tuple[str, str, str]:
    """Returns a text's name, digest and content."""
    try:
        raw = path.read_bytes()
        return path.name, hashlib.sha256(raw).hexdigest(), raw.decode("utf-8-sig")
    except OSError as error:
        raise EvaluateError(f"{path}: cannot be read ({error.strerror}); --text names another text") from error
    except UnicodeDecodeError as error:
        raise EvaluateError(f"{path}: expected text in UTF-8, found another encoding ({error.reason})") from error


def _check(
    model: Path, questions: Sequence[Question], options: EvaluateOptions, against: Path | Evaluation | None
) -> None:
    if not questions:
        raise EvaluateError("there are no questions to ask; expected at least one")
    for name in ("length", "thoughts", "batch", "timeout"):
        if getattr(options, name) <= 0:
            raise UsageError(f"--{name}: expected more than 0, found {getattr(options, name)}")
    if options.task_limit is not None and options.task_limit <= 0:
        raise UsageError(f"--task-limit: expected more than 0, found {options.task_limit}")
    if options.tasks and options.endpoint is not None:
        raise UsageError("--tasks: needs the model itself; evaluate it without --endpoint")
    Workers(options.engine, options.workers, options.device).check()
    for name in ("tasks", "endpoint"):
        if options.engine == "ray" and getattr(options, name):
            raise UsageError(f"--{name}: cannot be had with --engine ray; evaluate without one of them")
    for name in ("endpoint", "judge"):
        if getattr(options, name) is None and getattr(options, f"{name}_model") is not None:
            raise UsageError(f"--{name}-model: names a model of --{name}, which is not given")
    if isinstance(against, Path):
        if options.endpoint is not None and against.is_dir():
            raise UsageError(
                f"{against}: with --endpoint, the base is an evaluation; serve and evaluate the base first, and name "
                "the file that this wrote"
            )
        if not against.exists():
            raise EvaluateError(f"{against}: no such checkpoint folder or evaluation")
        if against.is_dir() and against.resolve() == model.resolve():
            raise UsageError(f"{against}: is MODEL itself; name the model that it was made from")


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise UsageError(f"{out}: expected a file in a folder that exists; make the folder first, or name another file")
    if not out.exists():
        return
    if not overwrite:
        raise EvaluateError(f"{out}: already exists; --overwrite replaces it, or name another file with --out")
    try:
        read_evaluation(out)
    except AblateError as error:
        raise EvaluateError(
            f"{out}: already exists and is no evaluation, so it is not replaced; name another file with --out"
        ) from error
