"""Who computes with a model: this process, or actors of Ray that each hold one; behind one interface.

Starting, placing, restarting and retrying is Ray's own. A piece of work has one result, however often it is tried, and
results come to the process that asked, which alone writes them down.
"""

import contextlib
import importlib.metadata
import os
import platform
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from ablate_shards.errors import AblateError, ExecuteError, UsageError, reason
from ablate_shards.surgery.machine.signals import sigterm_as_interrupt

__all__ = ["Alone", "Crew", "Engine", "RayCrew", "Workers", "connected", "hired", "others"]

Engine = Literal["local", "ray"]

_H = TypeVar("_H")
_K = TypeVar("_K")

#: Seconds that a cluster may take to answer, and its workers to start, the slowest of them.
_ANSWER, _START = 5.0, 120.0
#: How often a piece of work is tried again whose worker died.
_RETRIES = 2
#: What has to be the same everywhere: results depend on it.
_SAME = ("ablate-shards", "torch", "transformers")
#: How HTTP/2 begins, which Ray speaks: with a line, and a frame of settings from either side.
_SETTINGS = b"\x04"
_GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0" + _SETTINGS + b"\0\0\0\0\0"
_QUIET: Mapping[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}


@dataclass(frozen=True, slots=True)
class Workers:
    """Where models are held.

    Attributes:
        engine: This process, or Ray.
        count: How many workers of Ray, one per GPU if None, or per machine where there are none.
        device: The device that the command was given.
    """

    engine: Engine = "local"
    count: int | None = None
    device: str = "auto"

    def check(self) -> None:
        """Checks that these can be had, without Ray.

        Raises:
            UsageError: Ray gives out GPUs itself, so that none can be named.
        """
        if self.engine == "local":
            return
        if ":" in self.device:
            raise UsageError(f"--device {self.device}: Ray gives each worker its GPU; use --device cuda")


class Alone(Generic[_H]):
    """This process.

    Args:
        held: What it holds.
    """

    size = 1

    def __init__(self, held: _H) -> None:
        self.held = held

    def do(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Calls the function."""
        return function(self.held, *given, **options)

    keep = do

    def each(
        self, function: Callable[..., Any], works: Mapping[_K, Sequence[Any]], **options: Any
    ) -> Iterator[tuple[_K, Any]]:
        """Calls the function for each, in order."""
        for key, given in works.items():
            yield key, function(self.held, *given, **options)


class RayCrew(Generic[_H]):
    """Actors of Ray.

    Args:
        actors: Their handles, at least one.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        from ray.util import ActorPool

        self._actors = actors
        self._pool = ActorPool(list(actors))

    @property
    def size(self) -> int:
        """How many there are."""
        return len(self._actors)

    @property
    def idle(self) -> bool:
        """Whether one of them has nothing to do."""
        return bool(self._pool.has_free())

    @property
    def busy(self) -> bool:
        """Whether a result is still to come."""
        return bool(self._pool.has_next())

    def submit(self, key: Any, function: Callable[..., Any], *given: Any, **options: Any) -> None:
        """Gives one that is idle something to do."""
        self._pool.submit(lambda actor, _: actor.keyed.remote(key, function, *given, **options), None)

    def next(self) -> tuple[Any, Any]:
        """Waits for a result; returns it with its key.

        Raises:
            AblateError: What the function raised, with the machine's name.
            ExecuteError: A worker died at the same piece of work again and again.
        """
        with _said_plainly():
            found: tuple[Any, Any] = self._pool.get_next_unordered()
        return found

    def do(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Has one of them do it, and waits."""
        self.submit(None, function, *given, **options)
        return self.next()[1]

    def keep(self, function: Callable[..., Any], *given: Any) -> Any:
        """Has one of them do it, and waits; the result stays in Ray's store, also when this one is gone."""
        import ray

        result = self._actors[0].only.remote(function, *given)
        ray.wait([result], fetch_local=False)
        return result

    def each(
        self, function: Callable[..., Any], works: Mapping[_K, Sequence[Any]], **options: Any
    ) -> Iterator[tuple[_K, Any]]:
        """Deals the work out; the next piece goes to whoever is done first."""
        left = iter(works.items())
        for key, given in left:
            self.submit(key, function, *given, **options)
            if not self.idle:
                yield self.next()
        while self.busy:
            yield self.next()


#: One or several that hold the same thing; both can ``do``, ``keep`` and do ``each``.
Crew = Alone[_H] | RayCrew[_H]


def others(crew: Crew[Any]) -> str:
    """Returns what a note on where one of them computes says of the rest."""
    return f" and {crew.size - 1} others" if crew.size > 1 else ""


@contextlib.contextmanager
def hired(workers: Workers, opened: Callable[[], AbstractContextManager[_H]]) -> "Iterator[Crew[_H]]":
    """Has whoever computes hold something while the context lasts.

    Args:
        workers: Who.
        opened: What opens the thing; for Ray, it is called on the workers' machines, and must be picklable.

    Raises:
        ExecuteError: Ray is not installed or does not answer, or its workers cannot run this.
        UsageError: There are fewer cores or GPUs than workers.
    """
    if workers.engine == "local":
        with opened() as held:
            yield Alone(held)
        return
    ray = _import_ray()
    with _connected(ray), sigterm_as_interrupt():
        count, resources = _shares(ray.nodes(), workers)
        # Ray starts one that died again, and gives it what it was doing.
        kind = ray.remote(max_restarts=-1, max_task_retries=_RETRIES, **resources)(_Actor)
        actors = [kind.remote(opened) for _ in range(count)]
        try:
            yield RayCrew(_ready(ray, actors))
        finally:
            for actor in actors:
                ray.kill(actor)


class _Actor:
    """What runs on a worker; the thing is opened when it is first needed, so that an error of that is a result."""

    def __init__(self, opened: Callable[[], AbstractContextManager[Any]]) -> None:
        self._opened, self._stack = opened, contextlib.ExitStack()
        self._held: list[Any] = []

    def versions(self) -> tuple[str, dict[str, str]]:
        return platform.node(), _versions()

    def only(self, function: Callable[..., Any], *given: Any, **options: Any) -> Any:
        try:
            if not self._held:
                self._held.append(self._stack.enter_context(self._opened()))
            return function(self._held[0], *given, **options)
        except AblateError as error:
            raise type(error)(f"{error} (said by the worker on {platform.node()})") from error

    def keyed(self, key: Any, function: Callable[..., Any], *given: Any, **options: Any) -> tuple[Any, Any]:
        return key, self.only(function, *given, **options)


def _import_ray() -> Any:
    # Nothing is reported to anybody, and older versions do not warn of how newer ones treat GPUs that nobody asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise ExecuteError(
            f"--engine ray: {error.name} is not installed; `pip install 'ablate-shards[ray]'`, on every machine of the "
            "cluster"
        ) from error
    return ray


@contextlib.contextmanager
def connected(engine: Engine) -> Iterator[None]:
    """Stays connected with Ray while the context lasts: what one crew keeps is lost to the next without.

    Raises:
        ExecuteError: Ray is not installed or does not answer.
        UsageError: ``RAY_ADDRESS`` is not an address of a cluster.
    """
    with contextlib.nullcontext() if engine == "local" else _connected(_import_ray()):
        yield


@contextlib.contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """Connects with the cluster that ``RAY_ADDRESS`` names, or starts one of this machine; leaves it again."""
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if "://" in address:
        raise UsageError(
            f"RAY_ADDRESS={address}: expected HOST:PORT, such as 10.0.0.1:6379; to run the command in a cluster from "
            "outside, `ray job submit --address ADDRESS -- ablate-shards …`"
        )
    answers = False
    try:
        answers = _answers(address)
        ray.init(address=address, include_dashboard=False if address == "local" else None, **_QUIET)
    except (OSError, ValueError, OverflowError, RuntimeError, SystemExit) as error:
        why = "it is no cluster" if isinstance(error, SystemExit) else " ".join(str(error).split())
        if answers:
            raise ExecuteError(
                f"RAY_ADDRESS={address}: a cluster of Ray answers there, but cannot be used ({why}); if it asks for a "
                "token, set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN where ~/.ray/auth_token is not the cluster's; else "
                "install the cluster's version of Ray"
            ) from error
        raise ExecuteError(
            f"RAY_ADDRESS={address}: no cluster of Ray answers there ({why}); start one with `ray start "
            "--head`, correct the address, or unset it to use this machine alone"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _answers(address: str) -> bool:
    """Returns whether a server as Ray's is at an address; Ray itself tries for two minutes, and ends the process then.

    False where it does not say where to look.

    Raises:
        OSError: There is none.
        ValueError: It is no address.
    """
    host, colon, port = address.rpartition(":")
    if not colon:
        return False
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as connection:
        if os.environ.get("RAY_USE_TLS", "0") in ("0", ""):
            connection.sendall(_GREETING)
            if connection.recv(4)[3:] != _SETTINGS:
                raise OSError("something else does")
    return True


def _shares(nodes: Sequence[Mapping[str, Any]], workers: Workers) -> tuple[int, dict[str, float]]:
    """Returns how many actors there will be, and what each takes of its machine.

    Raises:
        UsageError: There is not enough for so many.
    """
    machines = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = int(sum(each.get("GPU", 0) for each in machines))
    if workers.device in ("auto", "cuda") and gpus:
        if (workers.count or 1) > gpus:
            raise UsageError(f"--workers {workers.count}: the cluster has {gpus} GPUs, and each worker takes one")
        cores = min(int(each.get("CPU", 0) // each["GPU"]) for each in machines if each.get("GPU", 0))
        return workers.count or gpus, {"num_gpus": 1, "num_cpus": cores}
    if workers.device not in ("auto", "cpu"):
        raise UsageError(f"--device {workers.device}: the cluster has none that Ray gives out; use --device cpu")
    cpus = [int(each["CPU"]) for each in machines if each.get("CPU", 0) >= 1]
    count = workers.count or max(1, len(cpus))
    # As many cores each as all of them can have.
    for cores in range(max(cpus, default=0), 0, -1):
        if sum(each // cores for each in cpus) >= count:
            return count, {"num_cpus": cores}
    raise UsageError(f"--workers {count}: the cluster has {sum(cpus)} cores, and each worker takes one or more")


def _ready(ray: Any, actors: Sequence[Any]) -> list[Any]:
    """Returns the actors that have started; those that find no room are done without.

    Raises:
        ExecuteError: None has, or one cannot run this as this process would.
    """
    asked = {actor.versions.remote(): actor for actor in actors}
    started, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_START)
    here = _versions()
    for each in started:
        try:
            node, there = ray.get(each)
        except (ray.exceptions.RayError, RuntimeError) as error:
            raise ExecuteError(
                f"a worker of Ray cannot run ablate-shards ({reason(error)}); install ablate-shards "
                f"{here['ablate-shards']} with its extras on every machine of the cluster"
            ) from error
        if other := next((name for name in here if there.get(name) != here[name]), None):
            raise ExecuteError(
                f"the worker on {node} has {other} {there.get(other, 'not')} installed, and here it is {here[other]}; "
                "install the same version on every machine of the cluster"
            )
    if not started:
        raise ExecuteError(
            f"no worker of Ray has started within {_START:.0f} s; the cluster's cores or GPUs are taken (`ray status` "
            "shows by what), so wait, or ask for fewer with --workers"
        )
    return [asked[each] for each in started]


def _versions() -> dict[str, str]:
    found = {}
    for name in _SAME:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@contextlib.contextmanager
def _said_plainly() -> Iterator[None]:
    """Makes errors of Ray those of the function that was called, or a sentence."""
    from ray.exceptions import RayError, RayTaskError

    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, AblateError):
            raise type(error.cause)(str(error.cause)) from error
        raise
    except RayError as error:
        raise ExecuteError(
            f"a worker of Ray died {_RETRIES + 1} times at the same work ({reason(error)}); it may lack memory: use "
            "fewer --workers, or a smaller --batch"
        ) from error
