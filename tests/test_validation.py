"""What does not fit a type is said with its place, as found and as expected."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
from msgspec import Meta

from ablate_shards.validation import Finite, Text, checked


@dataclass(frozen=True)
class Inner:
    rank: Annotated[int, Meta(ge=1, description="a positive integer")]
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class Outer:
    name: Text
    pair: tuple[int, int] = (0, 0)
    inner: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    scales: Mapping[Literal["x", "y"], Finite | None] | None = None
    flag: bool = False


def test_lists_become_tuples_and_integers_floats():
    found = checked({"name": "n", "pair": [1, 2], "inner": [{"rank": 1, "more": 0}], "scales": {"x": 1}}, Outer)
    assert found == Outer("n", (1, 2), (Inner(1),), None, {"x": 1.0})
    assert type(found.scales["x"]) is float


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"name": " \n"}, 'name: expected text, found " \\n"'),
        ({"name": "\ud800"}, 'name: expected text, found half a character ("\\ud800")'),
        ({"name": "x" * 99, "flag": "x" * 99}, f'flag: expected true or false, found "{"x" * 39}…'),
        ({"pair": [1]}, "pair: expected a list of 2, found [1]"),
        ({"pair": [1, True]}, "pair[1]: expected an integer, found true"),
        ({"inner": {}}, "inner: expected a list, found {}"),
        ({"inner": [{"rank": 1}, {"rank": 0}]}, "inner[1]: rank: expected a positive integer, found 0"),
        ({"inner": [{"kind": "a"}]}, "inner[0]: expected rank, found only kind"),
        ({"inner": [{}]}, "inner[0]: expected rank, found only an empty object"),
        ({"maybe": {"rank": 1, "kind": "c"}}, 'maybe: kind: expected one of a, b, found "c"'),
        ({"maybe": []}, "maybe: expected an object, found []"),
        ({"maybe": {"rank": 1, "kin": "a"}}, "maybe: unknown key 'kin'; the nearest known one is 'kind'"),
        ({"scales": {"x": 1, "z": 1}}, 'scales: expected one of x, y, found "z"'),
        *(
            ({"scales": {"x": 1, "y": value}}, "scales: y: expected a finite number, found")
            for value in (math.nan, -math.inf, 10**400, "1", True)
        ),
    ],
)
def test_what_does_not_fit_is_named(part, said):
    closed = (Inner,) if "maybe" in part else ()
    with pytest.raises(ValueError, match=re.escape(f"file: {said}")):
        checked({"name": "n", **part}, Outer, "file", closed=closed)
