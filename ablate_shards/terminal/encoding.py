"""How text gets to a terminal that cannot show all of Unicode."""

import codecs
import sys
from io import TextIOWrapper

__all__ = ["replace_unencodable", "speaks_unicode"]

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
    codecs.register_error("ablate-shards.plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="ablate-shards.plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lost = error.object[error.start : error.end]
    return "".join(_PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in lost), error.end
