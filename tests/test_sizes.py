"""Numbers of bytes as people read them."""

import pytest

from ablate_shards.surgery.machine.sizes import size_text


@pytest.mark.parametrize(
    ("count", "text", "exactly"),
    [
        (0, "0 bytes", "0 bytes"),
        (999, "999 bytes", "999 bytes"),
        (1000, "1 kB", "1 kB"),
        (98_304, "98.3 kB", "98.304 kB"),
        (999_999, "1,000 kB", "1,000 kB"),
        (3_783_999, "3.78 MB", "3.784 MB"),
        (16_000_000, "16 MB", "16 MB"),
        (145_304_000_000, "145 GB", "145.3 GB"),
        (1_340_000_000_000, "1.34 TB", "1.34 TB"),
        (2 * 10**15, "2,000 TB", "2,000 TB"),
    ],
)
def test_a_size_has_the_unit_that_suits_it(count, text, exactly):
    assert size_text(count) == text
    assert size_text(count, 5) == exactly
