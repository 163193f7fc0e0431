"""Which task of which shard is next."""

import threading

import pytest

from ablate_shards.surgery.edit.queue import Task, UnderWay, Work

SECONDS = 20


class Desk:
    """Shards under way whose tasks wait until they are told to go on."""

    def __init__(self) -> None:
        self.under_way: UnderWay[None] = UnderWay()
        self.shards = [Work(shard, -1, -1) for shard in ("first", "second", "third")]
        self.log: list[str] = []
        self._begun = threading.Semaphore(0)
        self._go_on = threading.Event()
        self._threads: list[threading.Thread] = []

    def task(self, name: str) -> Task:
        def do() -> tuple[str, None]:
            self.log.append(name)
            self._begun.release()
            assert self._go_on.wait(SECONDS)
            return name, None

        return Task(do)

    def start(self, step: str) -> None:
        """Lets a thread take what is next, and waits until it is at it."""
        thread = threading.Thread(target=getattr(self.under_way, step))
        thread.start()
        self._threads.append(thread)
        assert self._begun.acquire(timeout=SECONDS)

    def finish(self) -> None:
        self._go_on.set()
        for thread in self._threads:
            thread.join(SECONDS)


@pytest.fixture
def desk():
    made = Desk()
    yield made
    made.finish()


def test_edits_begin_at_the_first_shard_and_copying_at_the_last(desk):
    for work in desk.shards:
        desk.under_way.add(work, copies=[desk.task(f"copy {work.shard}")], edits=[desk.task(f"edit {work.shard}")])
    desk.start("edit_next")
    desk.start("copy_next")
    assert desk.log == ["edit first", "copy third"]


def test_nobody_goes_where_another_writes_while_a_shard_is_free(desk):
    for work in desk.shards:
        desk.under_way.add(work, edits=[desk.task(f"edit {work.shard}") for _ in range(2)])
    desk.under_way.add(desk.shards[0], copies=[desk.task("copy first")])
    desk.start("copy_next")
    for _ in range(3):
        desk.start("edit_next")
    assert desk.log == ["copy first", "edit second", "edit third", "edit first"]
    desk.finish()
    assert [work.writers for work in desk.shards] == [0, 0, 0]


def test_a_shard_with_nothing_to_do_is_passed_over(desk):
    desk.under_way.add(desk.shards[0], edits=[desk.task("edit first") for _ in range(2)])
    desk.under_way.add(desk.shards[1], copies=[desk.task("copy second")])
    for _ in range(2):
        desk.start("edit_next")
    assert desk.log == ["edit first", "edit first"]


def test_who_has_nothing_to_edit_copies_where_nobody_writes(desk):
    desk.under_way.add(desk.shards[0], copies=[desk.task(f"copy first {number}") for number in range(2)])
    desk.under_way.add(desk.shards[1], copies=[desk.task("copy second")], edits=[desk.task("edit second")])
    desk.start("edit_next")
    desk.start("copy_next")
    desk.under_way.edit_next()  # each shard has a writer, so this returns at once
    desk.under_way.remove(desk.shards[0])
    assert desk.log == ["edit second", "copy first 0"]
    desk.under_way.add(desk.shards[2], copies=[desk.task("copy third")])
    desk.start("edit_next")
    assert desk.log[2:] == ["copy third"]


def test_nothing_is_done_where_nothing_is_left(desk):
    desk.under_way.edit_next()
    desk.under_way.copy_next()
    assert not desk.log


def test_an_error_goes_to_who_waits_for_the_result_and_frees_the_shard(desk):
    def fail() -> None:
        raise OSError("no space")

    task = Task(fail)
    desk.under_way.add(desk.shards[0], copies=[task])
    desk.under_way.copy_next()
    with pytest.raises(OSError, match="no space"):
        task.future.result()
    assert desk.shards[0].writers == 0
    desk.under_way.remove(desk.shards[0])
    desk.under_way.remove(desk.shards[0])
