"""What was answered is kept line by line, and found again whatever became of the last line."""

from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.journal import Journal

ONE, TWO = Reply("yes\u2028indeed\n", ended=True), Reply("", ended=False)


def test_what_was_kept_is_found_by_the_next_run(tmp_path):
    path = tmp_path / ".answers"
    first = Journal(path)
    assert first.kept == ""
    first.keep({"a": ONE})
    assert first.kept == "; 1 answer is kept, and the same command goes on from there"
    first.keep({"b": TWO, "a": ONE})

    second = Journal(path)

    assert (second["a"], second["b"]) == (ONE, TWO)
    assert "c" not in second
    assert second.kept == "; 2 answers are kept, and the same command goes on from there"
    second.remove()
    second.remove()
    assert not path.exists()
    assert "a" not in Journal(path)


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    path = tmp_path / ".answers"
    Journal(path).keep({"a": ONE})
    with path.open("ab") as file:
        file.write(b'[]\n{"key": "x"}\n\xff\xfe\n{"key": "b", "text": "to')
    Journal(path).keep({"c": TWO})

    found = Journal(path)

    assert (found["a"], found["c"]) == (ONE, TWO)
    assert "b" not in found
    assert "x" not in found


def test_what_is_taken_over_is_not_counted_as_kept(tmp_path):
    path = tmp_path / ".answers"
    journal = Journal(path)
    journal.take_over({"a": ONE, "b": ONE})
    journal.keep({"a": ONE, "c": TWO})

    assert journal.kept.startswith("; 1 answer is kept")
    assert journal["b"] == ONE
    assert "b" not in Journal(path)


def test_what_was_asked_goes_before_what_is_taken_over(tmp_path):
    journal = Journal(tmp_path / ".answers")
    journal.keep({"a": ONE})
    journal.take_over({"a": TWO})

    assert journal["a"] == ONE


def test_without_a_file_nothing_is_kept():
    journal = Journal(None)
    journal.keep({"a": ONE})

    assert journal["a"] == ONE
    assert journal.kept == ""
    journal.remove()
