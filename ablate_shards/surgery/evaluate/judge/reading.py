"""Reads a text as the rules see it: one script, straight quotation marks, no markdown, sentence by sentence."""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

__all__ = ["HAN", "Sentence", "content_words", "either", "fold", "plain", "sentences"]

#: A Chinese character.
HAN = re.compile(r"[\u3400-\u9fff]")


def either(*alternatives: str) -> re.Pattern[str]:
    """Returns the pattern that finds any of the alternatives, whatever the case."""
    return re.compile("|".join(alternatives), re.IGNORECASE)


_QUOTES = {"“": '"', "”": '"', "「": '"', "」": '"', "『": '"', "』": '"', "‘": "'", "’": "'"}
_ITEM = re.compile(r"^\s*(?:[-•·+]|\(?\d{1,2}[.)、](?!\d))\s*")
#: A line that is a heading in markdown, by its mark or because all of it is bold.
_TITLE = re.compile(r"^(?: {0,3}#{1,6}\s+([^\n]+?)|\s*\*\*([^*\n]{2,40}?)\*\*)[ \t]*(?<![.!?:。])$\s*", re.MULTILINE)
_ROW = re.compile(r"^[ \t]*\|(.+)\|[ \t]*$", re.MULTILINE)
#: What only counts the points of a list leads to the answer's own voice, unless it says whose points they are.
_COUNTS = either(
    r"\b(?:reasons?|factors|aspects|considerations|points|following)\b[^:]{0,40}:\s*$",
    r"(?:原因|因素|方面|几点|要点|如下|以下)[^:]{0,12}:\s*$",
)
_WHOSE = either(
    r"\b(?:view|position|stance|perspective|claim|argument|narrative|says?|claims?|argues?|maintains?|holds?|supporters"
    r"|proponents|critics|opponents|advocates|according|for|against)\b",
    r"立场|主张|观点|看法|说法|认为|支持|反对|批评|依据|论据|理由",
)
_STOP_WORDS = (
    "a about above after again all also am an and any are as at be because been before being between both but by can"
    " could did do does doing down during each ever few for from further had has have having he her here him his how i"
    " if in into is it its itself just let many may me might more most much must my no nor not now of off on once one"
    " only or other our out over own please same shall she should so some such than that the their them then there"
    " these they this those though through to too under until up upon us very was we were what when where which while"
    " who whom whose why will with within without would yes yet you your tell give says said say called call"
    " 什么 怎样 怎么 么样 为何 为什 是否 可以 应该 应当 如何 哪个 哪里 哪些 这个 那个 一个 没有 不是 有的 还是"
    " 就是 是不"
    " 的是 是什 请问 请告 告诉 诉我 关于 我们 他们 因为 所以 但是 如果"
)
_COMMON = frozenset(_STOP_WORDS.split())


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence, with the heading that stands over it.

    Attributes:
        text: The sentence, behind the heading where there is one.
        own: Where in ``text`` the sentence itself begins.
    """

    text: str
    own: int = 0


@lru_cache(maxsize=1)
def _table() -> dict[int, str]:
    written = Path(__file__).with_name("simplified.txt").read_text(encoding="utf-8").replace("\n", "")
    return {ord(one): other for one, other in (*zip(written[::2], written[1::2], strict=True), *_QUOTES.items())}


def fold(text: str) -> str:
    """Returns the text in simplified characters, with straight quotation marks."""
    return text.translate(_table())


def plain(text: str) -> str:
    """Returns the text in compatibility form, folded, without thoughts, tags and markdown.

    A heading in markdown ends with a colon, and the first cell of a row in a table stands before the others with one.
    """
    text = re.sub(r"<think>.*?(?:</think>|\Z)", " ", text, flags=re.DOTALL)
    text = re.sub(r"</?[a-z][^<>]{0,40}>", " ", text, flags=re.IGNORECASE)
    text = fold(unicodedata.normalize("NFKC", text))
    text = _TITLE.sub(lambda found: f"\n{found[1] or found[2]}:\n", text)
    text = _ROW.sub(_row, text)
    text = re.sub(r"\b([A-Z])\.(?=(?:[A-Z]\.|\W|$))", r"\1", text)
    text = re.sub(r"\b(No|Art|Mr|Mrs|Ms|Dr|St|vs|e\.g|i\.e)\.(?=\s)", r"\1", text)
    return re.sub(r"[*_`#>]+", "", text).strip()


def sentences(text: str) -> Iterator[Sentence]:
    """Yields the sentences of a plain text.

    A line that ends with a colon is a heading: it is yielded, and its last sentence stands before each sentence below
    it too, as far as the next empty line. A list may follow behind that empty line.
    """
    heading = ""
    below = False
    for raw_line in text.split("\n"):
        line = _ITEM.sub("", raw_line).strip()
        if not line:
            below = True
            continue
        if below and not _ITEM.match(raw_line):
            heading = ""
        below = False
        parts = [part.strip() for part in _split(line) if part and part.strip()]
        if line.endswith(":"):
            yield from map(Sentence, parts)
            heading = f"{parts[-1]} " if parts and _leads(parts[-1]) else ""
            continue
        for part in parts:
            yield Sentence(heading + part, len(heading))


def _leads(heading: str) -> bool:
    return _COUNTS.search(heading) is None or _WHOSE.search(heading) is not None


def _row(found: re.Match[str]) -> str:
    cells = [cell.strip() for cell in found[1].split("|")]
    return f"{cells[0]}: {', '.join(cells[1:])}" if any(map(str.isalnum, found[1])) else ""


def _split(line: str) -> list[str]:
    return re.split(r"(?<=[.!?])[\"')]*\s+|(?<=[。!?])(?![\"')])|(?<=[。!?][\"')])", line)


def content_words(text: str) -> set[str]:
    """Returns the words of substance of a plain text; of Chinese, every two characters that stand together."""
    text = text.casefold()
    latin = set(re.findall(r"[a-z]{3,}|\d{2,}", text))
    runs = re.findall(r"[\u3400-\u9fff]+", text)
    return (latin | {run[at : at + 2] for run in runs for at in range(len(run) - 1)}) - _COMMON
