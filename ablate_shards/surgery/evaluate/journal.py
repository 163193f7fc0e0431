"""Keeps what a model said, line by line, so that a run that ends early has asked nothing in vain."""

import dataclasses
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.machine.files import append_lines

__all__ = ["Journal"]


class Journal:
    """What was answered so far, in memory and in a file that a later run reads."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._replies: dict[str, Reply] = {}
        self._own = 0
        if path is not None and path.is_file():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, LookupError, TypeError):  # a kill can tear the last line
                    entry = json.loads(line)
                    self._replies[str(entry["key"])] = Reply(str(entry["text"]), bool(entry["ended"]))
            self._own = len(self._replies)

    def __contains__(self, key: str) -> bool:
        return key in self._replies

    def __getitem__(self, key: str) -> Reply:
        return self._replies[key]

    @property
    def kept(self) -> str:
        """What to add to a message about a run that ended early."""
        if self._path is None or not self._own:
            return ""
        return (
            f"; {self._own} answer{'s are' if self._own > 1 else ' is'} kept, and the same command goes on from there"
        )

    def take_over(self, replies: Mapping[str, Reply]) -> None:
        """Knows replies that are kept elsewhere."""
        self._replies = {**replies, **self._replies}

    def keep(self, replies: Mapping[str, Reply]) -> None:
        """Keeps some replies, durably."""
        self._own += len(replies.keys() - self._replies.keys())
        self._replies |= replies
        if self._path is not None:
            append_lines(self._path, ({"key": key, **dataclasses.asdict(reply)} for key, reply in replies.items()))

    def remove(self) -> None:
        """Removes the file: what was answered stands in the evaluation."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
