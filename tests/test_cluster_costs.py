"""What the page on clusters says that a job costs is what is computed, and that is right where it is known."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.cluster import CASES, Cluster, main, measured, simulate

PAGE = Path(__file__).parents[1] / "docs" / "howto" / "cluster.md"
GB = 10**9
#: One process, one shard: it reads and edits at the slowest of the three, then sends at the slower of two.
ONE = Cluster(GB, total=100 * GB, shard=100 * GB, machines=1, processes=1, cores=4, network=5 * GB, store=10 * GB)


def test_the_page_has_what_is_computed(capsys):
    main([])
    assert capsys.readouterr().out in PAGE.read_text()


@pytest.mark.parametrize(
    ("changes", "seconds", "limit"),
    [
        ({}, 100 / 4 + 100 / 5, "CPU"),
        ({"cores": 8}, 100 / 5 + 100 / 5, "network"),
        ({"cores": 16, "network": 50 * GB}, 100 / 10 + 100 / 10, "store"),
        ({"job": "capture", "network": 2 * GB}, 100 / 2, "network"),
        ({"job": "capture", "machines": 4}, 4 * 100 / 10, "store"),
    ],
)
def test_where_the_time_is_known(changes, seconds, limit):
    cost = simulate(replace(ONE, **changes))
    assert cost.seconds == pytest.approx(seconds)
    assert cost.limit == limit


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_faster_than_what_it_uses(name):
    cluster, cost = CASES[name], simulate(CASES[name])
    assert cost.seconds >= 0.999 * cost.read / min(cluster.store, cluster.machines * cluster.network)
    if cluster.job == "edit":
        assert (cost.read, cost.written) == (cluster.total, cluster.total)
        assert cost.seconds >= 0.999 * cluster.total / (cluster.core * cluster.cores * cluster.machines)
        slower = simulate(replace(cluster, **{"store": cluster.store / 4, "network": cluster.network / 4}))
        assert slower.seconds > cost.seconds


def test_it_computes_with_what_was_measured():
    speed, memory = measured()
    assert 0.1 * GB < speed < 10 * GB
    assert 20 * 2**20 < memory < 200 * 2**20
    assert f"a core, {speed / GB:.1f} GB/s" in " ".join(PAGE.read_text().split())


@pytest.mark.parametrize("words", [["--network", "0"], ["--machines", "-1"]])
def test_what_is_no_number_of_anything(words, capsys):
    with pytest.raises(SystemExit):
        main(words)
    assert "must be more than 0" in capsys.readouterr().err
