"""Measures what ablate-shards costs, each case against what anyone has, and writes, quotes or draws the results.

Without CASE, every case that needs no GPU and is not a long one. A contender whose result is wrong gets no speed, and
the exit code is 1.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks import cases, machine, record  # noqa: F401 - cases fills the registry
from benchmarks.harness import CASES, Bench, BenchmarkError, Case

__all__ = ["main"]

CHART = Path(__file__).parent.parent / "docs" / "figures" / "scaling.svg"
#: Where there is no terminal, tables are as wide as they need.
FILE_WIDTH = 160


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where a result is wrong or a case cannot run."""
    given = parse(arguments)
    try:
        if given.list:
            for case in CASES.values():
                print(f"{case.name:12} {case.summary}{' (long)' if case.long else ''}")
        elif given.quote:
            print("\n\n".join(record.markdown(name) for name in given.cases or ["command"]))
        elif given.chart:
            record.draw(given.chart)
        else:
            return measure(given)
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Returns the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="what to measure; --list names them")
    parser.add_argument("--gpu", action="store_true", help="every case that needs a GPU")
    parser.add_argument("--all", action="store_true", help="the long cases too")
    parser.add_argument("--runs", type=int, help="how often each contender is timed")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that a case runs")
    parser.add_argument("--work", type=Path, default=Path("build/benchmarks"), help="where to write test files")
    folder = record.FOLDER
    parser.add_argument("--json", nargs="?", type=Path, const=folder, metavar="FOLDER", help="write CASE.json there")
    parser.add_argument("--list", action="store_true", help="name the cases")
    parser.add_argument("--quote", action="store_true", help="print the result of CASE as Markdown; measure nothing")
    parser.add_argument("--chart", nargs="?", type=Path, const=CHART, metavar="FILE", help="draw the result of scaling")
    given = parser.parse_args(arguments)
    for name in given.cases:
        if name not in CASES:
            parser.error(f"no case is called {name}; there are {', '.join(CASES)}")
    if given.runs is not None and given.runs < 1:
        parser.error(f"--runs: expected 1 or more, found {given.runs}")
    return given


def measure(given: argparse.Namespace) -> int:
    """Runs the cases that were asked for; returns 1 where a result is wrong.

    Raises:
        BenchmarkError: A case needs a GPU, and there is none; or a command failed.
    """
    chosen = [CASES[name] for name in given.cases] or [
        case for case in CASES.values() if case.gpu == given.gpu and (given.all or not case.long)
    ]
    needy = [case.name for case in chosen if case.gpu]
    device = machine.gpu() if needy else None
    if needy and device is None and not given.tiny:
        raise BenchmarkError(f"{', '.join(needy)}: expected a GPU, and torch sees none; the other cases need none")
    console = Console(markup=False, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, soft_wrap=True, width=FILE_WIDTH)
    wrong = [case for case in chosen if not run(case, given, device if case.gpu else None, console)]
    return int(bool(wrong))


def run(case: Case, given: argparse.Namespace, device: str | None, console: Console) -> bool:
    """Runs a case in a folder of its own, which is removed, and returns whether every check held."""
    given.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{case.name}-", dir=given.work) as name:
        work = Path(name).resolve()  # some commands run elsewhere
        console.print(f"\n{case.name}: {case.summary}")
        runs = given.runs or case.runs
        bench = Bench(work, runs=runs, tiny=given.tiny, show=lambda shown: console.print("", shown, sep="\n"))
        case.measure(bench)
        described = machine.describe(work, device=device)
    if given.json:
        given.json.mkdir(parents=True, exist_ok=True)
        content = json.dumps(record.as_dict(case, bench, described), indent=1, ensure_ascii=False)
        (given.json / f"{case.name}.json").write_text(f"{content}\n")
    return bench.is_right


if __name__ == "__main__":
    sys.exit(main())
