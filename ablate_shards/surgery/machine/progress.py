"""Protocols for whatever shows how far a run has come."""

from typing import Protocol

__all__ = ["Progress", "Silent", "Steps"]


class Progress(Protocol):
    """Receives how far a run has come."""

    def begin(self, total: int) -> None:
        """Says how many bytes will be read or written."""

    def advance(self, count: int) -> None:
        """Adds ``count`` bytes to those that are done; called from several threads."""

    def note(self, text: str) -> None:
        """Says something in one line."""


class Steps(Protocol):
    """Receives how far a run with a model has come: in layers, questions or steps of a training."""

    def count(self, done: int, total: int) -> None:
        """Says that ``done`` of ``total`` are done."""

    def note(self, text: str) -> None:
        """Says something in one line."""


class Silent:
    """Steps that nobody sees."""

    def count(self, done: int, total: int) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""
