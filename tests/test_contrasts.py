"""What kinds of contrast do to a real model: the page quotes what was measured."""

import json
from pathlib import Path

from ablate_shards.data import tw_civic
from benchmarks.contrasts import RESULT, SETTINGS, table

PAGE = Path(__file__).parents[1] / "docs" / "quality.md"


def test_the_table_on_the_page_is_that_of_the_result():
    found = json.loads(RESULT.read_text(encoding="utf-8"))
    assert "\n".join(table(found)) in PAGE.read_text(encoding="utf-8")


def test_every_kind_source_layer_and_coefficient_was_measured():
    found = json.loads(RESULT.read_text(encoding="utf-8"))["settings"]
    measured = {(each["contrast"], each["source_layer"], each["coefficient"]) for each in found}
    assert measured == {(each.contrast, each.source_layer, each.coefficient) for each in SETTINGS}
    assert {each.contrast for each in SETTINGS} == set(tw_civic.PAIRS)
    assert {each.coefficient for each in SETTINGS} >= {0.5, 1.0, 1.5, 2.5}
    assert all(each["kl"] is not None and sum(each["verdicts"].values()) == each["questions"] for each in found)
