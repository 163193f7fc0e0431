"""How text gets to a terminal that cannot show all of Unicode."""

import codecs
import sys
from io import TextIOWrapper

__all__ = ["replace_unencodable", "showable", "speaks_unicode"]

_HANDLER = "ablate-shards.plain"

_PLAIN = {
    "–": "-", "—": "-", "−": "-", "→": "->", "×": "x", "·": ".", "…": "...", "‖": "||", "‘": "'", "’": "'",
    "α": "alpha", "Δ": "delta", "≤": "<=", "≥": ">=", "━": "-", "╸": "-", "╺": "-",
    "█": "#", "▉": "#", "▊": "#", "▋": "#", "▌": "#", "▍": " ", "▎": " ", "▏": " ", "▓": "x", "▒": ":", "░": ".",
}  # fmt: skip


def speaks_unicode() -> bool:
    """Says whether stdout can show every character."""
    return (getattr(sys.stdout, "encoding", None) or "utf-8").lower().replace("-", "").startswith("utf")


def replace_unencodable() -> None:
    """Makes stdout and stderr replace characters that their encoding lacks, such as → by ->, instead of failing."""
    codecs.register_error(_HANDLER, _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


def showable(text: str) -> str:
    """Returns a text in characters that stdout can show, so that its width is known before it is shown."""
    if speaks_unicode():
        return text
    codecs.register_error(_HANDLER, _plain)
    return text.encode(sys.stdout.encoding, _HANDLER).decode(sys.stdout.encoding)


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in lost), error.end
