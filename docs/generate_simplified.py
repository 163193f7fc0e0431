"""Writes the table of traditional characters and their simplified forms, from the data of OpenCC.

OpenCC is needed for this alone: ``pip install opencc==1.4.2``, then ``python docs/generate_simplified.py``.
"""

import importlib
from pathlib import Path

_TABLE = Path(__file__).parents[1] / "ablate_shards" / "surgery" / "evaluate" / "judge" / "simplified.txt"
_A_LINE = 50


def main() -> None:
    """Writes one pair after the other, a traditional character and its simplified form, without anything between."""
    simplify = importlib.import_module("opencc").OpenCC("t2s").convert
    characters = map(chr, range(0x3400, 0xA000))
    # The rare forms beyond the basic plane stand in no answer that the rules could read.
    pairs = [each + simplify(each) for each in characters if simplify(each) != each and simplify(each) <= "\uffff"]
    lines = ["".join(pairs[start : start + _A_LINE]) for start in range(0, len(pairs), _A_LINE)]
    _TABLE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
