"""Parts what a model thinks aloud from what it answers."""

import re
from dataclasses import dataclass

__all__ = ["Parted", "without_thoughts"]

_CLOSED = re.compile(r"<think>(.*?)</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Parted:
    """A text in two parts, each stripped.

    Attributes:
        answer: What stands outside of ``<think>`` and ``</think>``.
        thoughts: What stands inside, None where there are no such tags.
    """

    answer: str
    thoughts: str | None


def without_thoughts(text: str) -> Parted:
    """Parts thoughts from the answer.

    A ``</think>`` without its beginning closes what stands before it, since some chat templates open the thoughts in
    the prompt; a ``<think>`` without its end (cut off) leaves no answer after it.
    """
    thoughts: list[str] = []
    first, closed, rest = text.partition("</think>")
    if closed and "<think>" not in first:
        thoughts.append(first)
        text = rest
    thoughts += _CLOSED.findall(text)
    answer, opened, open_end = _CLOSED.sub("", text).partition("<think>")
    if opened:
        thoughts.append(open_end)
    return Parted(answer.strip(), "\n".join(map(str.strip, thoughts)).strip() if thoughts else None)
