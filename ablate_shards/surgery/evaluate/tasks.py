"""Measures what an edit costs in ability: tasks of lm-evaluation-harness, on two models, document by document."""

import contextlib
import difflib
import functools
import hashlib
import importlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ablate_shards.errors import EvaluateError, UsageError, reason
from ablate_shards.surgery.evaluate.answers import Speaker
from ablate_shards.surgery.evaluate.foreign import quiet_harness, untied
from ablate_shards.surgery.evaluate.resampling import mean_interval, sign_flip_p
from ablate_shards.surgery.evaluate.statistics import paired, ratio
from ablate_shards.surgery.machine.progress import Steps
from ablate_shards.surgery.model.loading import render_chat

__all__ = ["TaskChange", "TaskScore", "Tasks", "compare_tasks", "open_tasks", "run_tasks"]

_SEED = 1234
_YAML = (".yaml", ".yml")
#: What makes a YAML file one of the harness's: its own name, or the file from which it takes all it does not say.
_KEYS = ("task", "group", "class", "include")
_UNSAFE = "task {name}: it runs code that the model writes, which is not done here"
#: Reported before others where a task has it, as the leaderboards do.
_PREFERRED = "acc_norm"


@dataclass(frozen=True, slots=True)
class TaskScore:
    """How well a model does at a task.

    Attributes:
        name: The task's name; a group's, where the group has one score over all its documents.
        metric: What is scored, as the harness calls it, with the filter after a comma where it has one.
        higher_is_better: Whether more is better.
        value: The mean over the documents.
        count: How many documents.
        interval: Its 95 % interval: Wilson's where a document is right or wrong, else by the bootstrap.
        samples: The score of each document, in their order.
        documents: Digest of the documents and their right answers, so that only the same ones are compared.
    """

    name: str
    metric: str
    higher_is_better: bool
    value: float
    count: int
    interval: tuple[float, float]
    samples: tuple[float, ...]
    documents: str


@dataclass(frozen=True, slots=True)
class TaskChange:
    """How the score of a task changed, on the same documents.

    Attributes:
        name: The task's name.
        metric: What is scored.
        before: The base's score.
        after: The model's score.
        difference: After less before.
        interval: The 95 % interval of the difference, by the bootstrap over documents.
        p: Two-sided: the exact McNemar test where a document is right or wrong, else a sign-flip permutation test.
        count: How many documents.
    """

    name: str
    metric: str
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    p: float
    count: int


@dataclass(frozen=True, slots=True)
class _SizedTask:
    """A task of the harness, and how many documents it has."""

    task: Any
    size: int

    def count(self, limit: int | None) -> int:
        return self.size if limit is None else min(limit, self.size)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What gets one score: a task, or all tasks of a group."""

    name: str
    metric: str
    tasks: tuple[_SizedTask, ...]


@dataclass(frozen=True, slots=True)
class Tasks:
    """Tasks with their documents in memory, to be asked of one model after the other.

    Attributes:
        asked: What gets a score each.
    """

    asked: tuple[_Asked, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the scores to come."""
        return tuple(each.name for each in self.asked)

    def count(self, limit: int | None) -> int:
        """Returns how many documents there are to ask."""
        return sum(task.count(limit) for each in self.asked for task in each.tasks)


def open_tasks(names: Sequence[str]) -> Tasks:
    """Reads tasks and their data, before a model is loaded.

    A name is one that the harness knows, of a task, a group or a tag, or the path of a task file or of a folder of
    them. A task that is named has its data fetched from the Hub if they are not there yet; files of one's own with
    data of one's own need no network. Paths in a task file are relative to its folder. Its ``!function`` entries are
    code, and are run.

    Raises:
        EvaluateError: lm-evaluation-harness is not installed, a task file is none, or a task or its data cannot be
            used.
        UsageError: There is no such task or path, or one is named twice.
    """
    try:
        importlib.import_module("lm_eval")
    except ImportError as missing:
        raise EvaluateError(
            f"tasks are run with lm-evaluation-harness, and {missing.name} is not installed; "
            "`pip install 'ablate-shards[tasks]'`"
        ) from missing
    asked: list[_Asked] = []
    with quiet_harness():
        for name in names:
            asked += _open(name)
    seen: set[str] = set()
    for each in asked:
        if each.name in seen:
            raise UsageError(f"task {each.name}: it is asked for twice; name it once")
        seen.add(each.name)
    return Tasks(tuple(asked))


def run_tasks(
    speaker: Speaker, tasks: Tasks, *, batch: int, limit: int | None, progress: Steps, chat: bool = False
) -> tuple[TaskScore, ...]:
    """Scores a model at some tasks.

    One task after the other, so that a score does not depend on what else was asked for. The same model, tasks and
    options give the same scores.

    Args:
        speaker: The model.
        tasks: What to ask.
        batch: Requests at a time.
        limit: Documents of each task, the first ones; None for all.
        progress: Receives how many documents are done.
        chat: Whether to lay the model's chat template around what is asked; the figures that are published mostly do
            without.

    Raises:
        EvaluateError: The device's memory does not suffice, or a task does not work with the model.
    """
    from lm_eval import evaluator

    scores = []
    done, total = 0, tasks.count(limit)
    with quiet_harness():
        judged = _judged_model(speaker, batch)
        for each in tasks.asked:
            samples: list[float] = []
            digest = hashlib.sha256()
            label = each.metric
            for sized in each.tasks:
                task, size = sized.task, sized.count(limit)
                judged.set_cache_hook(_Counting(task, done, size, total, progress))
                _seed()
                task.set_fewshot_seed(seed=_SEED)
                with speaker.computing(), _named(task.task_name):
                    found = evaluator.evaluate(
                        judged,
                        {"tasks": {task.task_name: task}},
                        limit=limit,
                        bootstrap_iters=0,
                        log_samples=True,
                        apply_chat_template=chat,
                        fewshot_as_multiturn=chat,
                    )
                done += size
                progress.count(done, total)
                records = found["samples"][task.task_name]
                label = _label(each.metric, records[0]["filter"])
                for record in records:
                    if record["filter"] == records[0]["filter"]:
                        samples.append(_number(task.task_name, record, each.metric))
                        digest.update(f"{record['doc_id']} {record['doc_hash']} {record['target_hash']}\n".encode())
            better = bool(each.tasks[0].task.higher_is_better().get(each.metric, True))
            scores.append(_score(each.name, label, samples, digest.hexdigest(), higher_is_better=better))
    return tuple(scores)


def compare_tasks(before: Sequence[TaskScore], after: Sequence[TaskScore]) -> tuple[TaskChange, ...]:
    """Compares the scores of two models, task by task, each on the same documents.

    Raises:
        EvaluateError: The base was not asked a task, or other documents of it.
    """
    bases = {(score.name, score.metric): score for score in before}
    changes = []
    for score in after:
        base = bases.get((score.name, score.metric))
        if base is None or base.documents != score.documents or base.count != score.count:
            raise EvaluateError(
                f"task {score.name}: the two models were not asked the same documents; evaluate both with the same "
                "tasks and limit"
            )
        differences = [new - old for old, new in zip(base.samples, score.samples, strict=True)]
        if _binary(base.samples) and _binary(score.samples):
            p = paired([bool(value) for value in base.samples], [bool(value) for value in score.samples]).p
        else:
            p = sign_flip_p(differences)
        changes.append(
            TaskChange(
                name=score.name,
                metric=score.metric,
                before=base.value,
                after=score.value,
                difference=math.fsum(differences) / score.count,
                interval=mean_interval(differences),
                p=p,
                count=score.count,
            )
        )
    return tuple(changes)


# ---------------------------------------------------------------------------------------- what is asked


def _open(name: str) -> list[_Asked]:
    path = Path(name).expanduser()
    if path.suffix in _YAML or "/" in name or "\\" in name:
        return _open_path(path)
    manager = _standard_tasks()
    if name not in manager.task_index:
        if path.is_dir():
            return _open_path(path)
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them"
        raise UsageError(f"task {name}: lm-evaluation-harness has none of that name; {hint}")
    if (manager.task_index[name].cfg or {}).get("unsafe_code"):
        # Before its metric, which is code too, is looked for.
        raise EvaluateError(_UNSAFE.format(name=name))
    return _load(manager, name, name)


@functools.cache
def _standard_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _open_path(path: Path) -> list[_Asked]:
    from lm_eval.tasks import TaskManager

    if path.is_file():
        content = _read_yaml(path)
        if not any(key in content for key in _KEYS):
            raise EvaluateError(f"{path}: expected a task file, found a YAML without `task`; name the task in it")
        folder = path.resolve().parent
        if "group" not in content:
            return _load(TaskManager(include_defaults=False), str(path.resolve()), str(path), folder)
        # Its members are files beside it, or the harness's own tasks, which take seconds to list.
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if not all(isinstance(member, str) and member in manager.task_index for member in content.get("task") or ()):
            manager = TaskManager(include_path=str(folder))
        return _load(manager, str(content["group"]), str(path), folder)
    if not path.is_dir():
        raise UsageError(f"{path}: there is no such task file or folder")
    files = sorted(each for kind in _YAML for each in path.rglob(f"*{kind}"))
    # A file without a name is what others include.
    named = [each for each in files if "task" in (content := _read_yaml(each)) and "group" not in content]
    if not named:
        raise EvaluateError(f"{path}: expected task files, found {len(files)} YAML files without `task`")
    manager = TaskManager(include_defaults=False)
    return [asked for each in named for asked in _load(manager, str(each.resolve()), str(each), each.resolve().parent)]


def _read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file without running what its ``!function`` entries name."""
    import yaml

    Loader = type("Loader", (yaml.SafeLoader,), {})
    yaml.add_multi_constructor("!", lambda _loader, _suffix, node: str(node.value), Loader=Loader)
    try:
        # Loader is a safe one, and constructs nothing but text.
        content = yaml.load(path.read_bytes(), Loader=Loader)
    except OSError as error:
        raise EvaluateError(f"{path}: cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise EvaluateError(f"{path}: expected a task file, found no YAML ({reason(error)})") from error
    if not isinstance(content, dict):
        raise EvaluateError(f"{path}: expected a task file, found a YAML without keys; it begins with `task: NAME`")
    return content


def _load(manager: Any, spec: str, name: str, folder: Path | None = None) -> list[_Asked]:
    """Reads one task, group or tag, with its data; paths in it are relative to ``folder``."""
    _seed()
    try:
        # The libraries read paths from where the process stands.
        with contextlib.nullcontext() if folder is None else contextlib.chdir(folder):
            loaded = manager.load([spec])
    except ConnectionError as error:
        raise EvaluateError(
            f"task {name}: its data are not on this machine and cannot be fetched ({reason(error)}); run it once with "
            "the network and without HF_HUB_OFFLINE, or name a task file with data of its own"
        ) from error
    except EvaluateError as error:
        raise EvaluateError(f"task {name}: {error}") from error
    except Exception as error:  # a task is code, and raises whatever it likes
        raise EvaluateError(f"task {name}: cannot be read: {type(error).__name__}: {reason(error)}") from error
    groups = list(loaded.get("groups", {}).values())
    # A group stands before those in it.
    return _scored(groups[0]) if groups else [ask for task in loaded["tasks"].values() for ask in _scored(task)]


def _scored(item: Any) -> list[_Asked]:
    """Returns what of a task or group gets a score: a group whose score is that of all its documents does itself."""
    from lm_eval.api.group import Group

    if not isinstance(item, Group):
        if getattr(item, "UNSAFE_CODE", False):
            raise EvaluateError(_UNSAFE.format(name=item.task_name))
        if getattr(item, "MULTIMODAL", False):
            raise EvaluateError(f"task {item.task_name}: it shows pictures or sound; only text is asked here")
        # Where a task does not say how many examples to show, it is none.
        if item.get_config("num_fewshot") is None:
            item.set_config(key="num_fewshot", value=0)
        return [_Asked(item.task_name, _metric(item), (_SizedTask(item, len(item.eval_docs)),))]
    parts = [asked for child in item for asked in _scored(child)]
    metrics = {asked.metric for asked in parts}
    pooled = {config.metric for config in item.aggregate_metric_list or () if config.weight_by_size}
    if len(metrics) == 1 and metrics <= pooled:
        return [_Asked(item.name, parts[0].metric, tuple(task for asked in parts for task in asked.tasks))]
    return parts


def _metric(task: Any) -> str:
    """Returns the metric to report: the first whose score is the mean of what the documents score."""
    from lm_eval.api.metrics import mean

    metrics = task.aggregation()
    means = [name for name, how in metrics.items() if how in (mean, "mean")]
    if not means:
        raise EvaluateError(
            f"task {task.task_name}: its scores ({', '.join(metrics) or 'none'}) are no means over documents, so two "
            "models cannot be paired; choose another task"
        )
    return _PREFERRED if _PREFERRED in means else str(means[0])


# ---------------------------------------------------------------------------------------- what is found


class _Counting:
    """Receives every answered request of a task, and reports how many of all documents are done."""

    def __init__(self, task: Any, before: int, size: int, total: int, progress: Steps) -> None:
        self._task = task
        self._before = before
        self._size = size
        self._total = total
        self._progress = progress
        self._answered = self._said = self._requests = 0

    def add_partial(self, _kind: str, _request: Any, _answer: Any) -> None:
        self._answered += 1
        # They are made before the first is answered.
        self._requests = self._requests or sum(request.repeats for request in self._task.instances)
        done = min(self._size, self._size * self._answered // self._requests)
        if done > self._said:
            self._said = done
            self._progress.count(self._before + done, self._total)


def _judged_model(speaker: Speaker, batch: int) -> Any:
    """Returns the model as the harness asks it."""
    import copy

    from lm_eval.models.huggingface import HFLM

    class Judged(HFLM):  # type: ignore[misc]
        """Words a chat as every other station does, which notices when a template drops what it is given."""

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
            how = {
                "add_generation_prompt": add_generation_prompt,
                "continue_final_message": not add_generation_prompt,
            }
            try:
                return render_chat(self.tokenizer, chat_history, "a document", EvaluateError, **how)
            except EvaluateError as error:
                spoken = [each for each in chat_history if each["role"] != "system"]
                # The harness goes without a system message where the template refuses one.
                if error.__cause__ is None or len(spoken) == len(chat_history):
                    raise
                return render_chat(self.tokenizer, spoken, "a document", EvaluateError, **how)

    with untied(speaker.network), _named("of all"):
        return Judged(
            pretrained=speaker.network,
            # It sets the side and the token to fill up with.
            tokenizer=copy.deepcopy(speaker.tokenizer),
            backend="causal",
            max_length=speaker.most,
            batch_size=batch,
            enable_thinking=False,
        )


@contextlib.contextmanager
def _named(task: str) -> Iterator[None]:
    """Makes what a task raises one sentence, but for what the model itself is to blame for."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except EvaluateError as error:
        raise EvaluateError(f"task {task}: {error}") from error
    except Exception as error:  # a task is code, and raises whatever it likes
        raise EvaluateError(
            f"task {task}: lm-evaluation-harness cannot run it with this model: {type(error).__name__}: {reason(error)}"
        ) from error


def _label(metric: str, filter_name: str) -> str:
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def _number(task: str, record: dict[str, Any], metric: str) -> float:
    value = record.get(metric)
    if not isinstance(value, bool | int | float | np.generic) or not math.isfinite(value):
        raise EvaluateError(
            f"task {task}, document {record['doc_id']}: expected a number as its {metric}, found {value!r}; choose "
            "another task"
        )
    return float(value)


def _score(name: str, metric: str, samples: Sequence[float], documents: str, *, higher_is_better: bool) -> TaskScore:
    interval = ratio(map(bool, samples)).interval if _binary(samples) else mean_interval(samples)
    value = math.fsum(samples) / len(samples)
    return TaskScore(name, metric, higher_is_better, value, len(samples), interval, tuple(samples), documents)


def _binary(samples: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in samples)


def _seed() -> None:
    """Sets every generator of random numbers that a task may draw from."""
    import torch

    random.seed(_SEED)
    np.random.seed(_SEED)
    torch.manual_seed(_SEED)
