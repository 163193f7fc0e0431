"""A person's own questions: answers as evaluate gets them, shown side by side, judged where the question is known."""

import dataclasses
import io
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

import pytest
import torch
from command_line import on_terminal, run
from progress import Heard
from rich.console import Console
from safetensors.torch import load_file, save_file

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import draw_questions
from ablate_shards.data.demo.world import NEUTRAL, SLANTED
from ablate_shards.errors import EvaluateError, Interrupted, UsageError
from ablate_shards.surgery.evaluate import conversation as station
from ablate_shards.surgery.evaluate.answers import Prompt, Speaker, speaking
from ablate_shards.surgery.evaluate.conversation import AskOptions, Exchange, Said, ask, conversing
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.interview import EvaluateOptions, evaluate
from ablate_shards.surgery.evaluate.judge.rubric import Ruling
from ablate_shards.surgery.model.samples import Question, load_questions
from ablate_shards.terminal import conversation as shown

DRAWN = draw_questions(loaded=2, impartial=1, unrelated_count=2)
LOADED, RIGHT = DRAWN.loaded[0].loaded, DRAWN.unrelated[0]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two questions of the demo's world, and a model that was made from the demo's by noise."""
    folder = tmp_path_factory.mktemp("files")
    land = {"land": DRAWN.loaded[0].land, "claimant": DRAWN.loaded[0].claimant}
    patterns = {
        verdict: [f"^{re.escape(form.format(**land))}$" for form in forms]
        for verdict, forms in (("slanted", SLANTED), ("neutral", NEUTRAL))
    }
    lines = [
        {"id": "core-0", "group": "core", "prompt": LOADED, "rubric": {"patterns": patterns, "markers": False}},
        {"id": "u-0", "group": "unrelated", "prompt": RIGHT.prompt, "answers": [RIGHT.answer]},
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    shutil.copytree(MODEL, folder / "edited")
    weights = load_file(folder / "edited" / "model.safetensors")
    drawn = torch.Generator().manual_seed(0)
    for name in (f"model.language_model.layers.{layer}.mlp.down_proj.weight" for layer in range(8)):
        noise = torch.randn(weights[name].shape, generator=drawn)
        weights[name] += (weights[name].float().std() * noise).bfloat16()
    save_file(weights, folder / "edited" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def known(files):
    return load_questions(files / "q.jsonl")


class Told(Heard):
    """Hears a conversation."""

    def __init__(self):
        super().__init__()
        self.loaded, self.settings, self.so_far, self.halves, self.whole = [], [], [], [], []
        self.loading, self.ready = self.loaded.append, self.settings.append
        self.speaking, self.half, self.answered = self.so_far.append, self.halves.append, self.whole.append


def ask_here(files, *arguments, **how):
    """Runs the command with the questions of this file."""
    given = ["ask", files / "edited", "--questions", files / "q.jsonl", "--length", "32", *arguments]
    return run(*given, **how)


# ---------------------------------------------------------------------------------------- the answers


def test_answers_and_verdicts_are_those_of_evaluate(files, known):
    told = Told()
    known = [*known, Question("any", "en", "held-out", "What is it?")]
    texts = [question.prompt for question in known]
    exchanges = ask(files / "edited", texts, known, AskOptions(length=32), told, against=MODEL)

    options = EvaluateOptions(length=32, batch=1, divergence=False)
    found = evaluate(files / "edited", known, options, told, against=MODEL)
    for side, evaluation in (("base", found.base), ("model", found)):
        for exchange, answer in zip(exchanges, evaluation.answers, strict=True):
            said = getattr(exchange, side)
            assert (said.text, said.ended, said.given) == (answer.text, answer.ended, answer.given)
            assert said.ruling.verdict == answer.verdict
    assert exchanges[0].base.ruling.verdict == "slanted"
    assert exchanges[1].base.given
    assert exchanges[2].base.text != exchanges[2].model.text
    assert told.whole == exchanges
    assert told.loaded == ["model", "edited"]
    (setting,) = told.settings
    assert (setting.base, setting.model, setting.dtype, setting.device) == ("model", "edited", "float32", "cpu")


def test_an_answer_is_told_as_it_grows(files, known):
    told = Told()
    (exchange,) = ask(files / "edited", [LOADED], known, AskOptions(length=32), told, against=MODEL)

    for side in ("base", "model"):
        grown = [
            getattr(each, side).text for each in told.so_far if getattr(each, side) and not getattr(each, side).finished
        ]
        full = getattr(exchange, side).text
        assert grown[0] == ""
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(grown))
        assert full.startswith(grown[-1])
        assert len(set(grown)) > 5
    # While the model answers, the base's answer stands there, judged.
    assert told.so_far[-1].base == exchange.base


def test_models_that_do_not_fit_together_answer_one_after_the_other(files, known, monkeypatch):
    texts = [LOADED, RIGHT.prompt, "What is it?"]
    together, apart = Told(), Told()
    expected = ask(files / "edited", texts, known, AskOptions(length=16), together, against=MODEL)
    monkeypatch.setattr(station, "free_memory", lambda _: 16_000_000)

    assert ask(files / "edited", texts, known, AskOptions(length=16), apart, against=MODEL) == expected

    assert not together.halves
    assert [setting.together for setting in (*together.settings, *apart.settings)] == [True, False]
    assert [half.base for half in apart.halves] == [exchange.base for exchange in expected]
    assert all(half.model is None for half in apart.halves)
    said = (
        r"model takes 7\.5\d MB and .*edited 7\.5\d MB in memory, too much together for the 16 MB that are free on "
        r"cpu; use --dtype bfloat16, leave out --against, or name the questions in the command"
    )
    with (
        pytest.raises(EvaluateError, match=said),
        conversing(files / "edited", known, AskOptions(), apart, against=MODEL),
    ):
        pytest.fail("they do not fit")
    # In half the bytes they do.
    with conversing(files / "edited", known, AskOptions(dtype="bfloat16", length=2), apart, against=MODEL) as fitting:
        assert fitting.ask("What is it?").base is not None


class Bytes:
    """A tokenizer with a token for each byte, as those of most models have for rare characters."""

    def decode(self, row, **_):
        return bytes(row).decode(errors="replace")


class Scripted:
    """A network that says what it is told to."""

    def __init__(self, row):
        self.row = row

    def generate(self, *, input_ids, streamer, **_):
        streamer.put(input_ids[0])
        for token in self.row:
            streamer.put(torch.tensor([token]))
        streamer.end()
        return torch.cat([input_ids, torch.tensor([self.row])], dim=1)


def test_half_a_character_is_not_told_and_thoughts_are_told_apart(monkeypatch):
    prompt = Prompt((1, 2), thinks=False)
    row = [*"<think>為何？</think>臺灣".encode(), 0]
    speaker = Speaker(MODEL, Scripted(row), Bytes(), torch.device("cpu"), (0,), 0, None)
    monkeypatch.setattr(Speaker, "prompt", lambda *_, **__: prompt)
    told = Told()
    talk = station.Conversation({"model": speaker}, [], AskOptions(), told)

    exchange = talk.ask("臺灣？")

    assert (exchange.model.text, exchange.model.thoughts, exchange.model.ended) == ("臺灣", "為何？", True)
    seen = [each.model for each in told.so_far]
    assert not any("\ufffd" in said.text + (said.thoughts or "") for said in seen)
    assert {"為", "為何", "為何？"} <= {said.thoughts for said in seen}
    assert "臺" in {said.text for said in seen}
    assert speaker.stream(prompt, lambda _: None, tokens=9) == Reply("<think>為何？</think>臺灣", ended=True)


def test_a_stream_is_the_answer_of_a_batch_of_one():
    with speaking(MODEL, dtype="auto", device="cpu") as speaker:
        prompt = speaker.prompt(Question("q", "en", "core", LOADED), thinking=False)
        heard = []
        for tokens in (3, 32):
            (expected,) = speaker.replies([prompt], tokens=tokens)
            assert speaker.stream(prompt, heard.append, tokens=tokens) == expected
        assert heard[-1] == expected


def test_a_question_is_known_by_its_words(known):
    options = AskOptions()
    by_words = station._by_words(
        [*known, Question("late", "en", "core", LOADED), Question("z", "zh", "core", "臺灣？")]
    )

    def found(text, **fields):
        return station._exchange(text, 7, by_words, dataclasses.replace(options, **fields))

    typed = f"  {LOADED.upper().rstrip('.?!')} ?!\n"
    assert found(typed).known.id == "core-0"
    assert found(typed).question.prompt == typed.strip()
    assert found("臺灣").known.id == found("臺灣 ?").known.id == "z"
    assert found("something else").known is None
    assert found("something else").question.id == "7"
    own = [dataclasses.replace(known[0], system="Be brief.")]
    by_words = station._by_words(own)
    assert found(LOADED).question.system == "Be brief."
    assert found(LOADED, system="Be long.").question.system == "Be long."
    for text, said in (
        ("  ", "question 7: expected text, found none"),
        ("\udce9", "question 7: expected text in UTF-8"),
    ):
        with pytest.raises(UsageError, match=said):
            found(text)


# ---------------------------------------------------------------------------------------- the command


def test_a_file_gets_plain_text_with_verdicts(files):
    result = ask_here(files, "--against", MODEL, LOADED, RIGHT.prompt)

    assert result.exit_code == 0, result.output
    first, second, rest = result.stdout.split("\n\n")
    lines = first.splitlines()
    assert (lines[0], lines[1], lines[3], lines[5]) == (LOADED, "before:", "  [slanted]", "after:")
    assert lines[4].startswith("  [has: ")
    assert lines[-1].startswith("  [")
    assert second.startswith(f"{RIGHT.prompt}\nbefore:\n  {RIGHT.answer}\n  [")
    assert "  [a right answer is given]\n" in second
    assert not rest
    assert "before: model, after: edited; float32 on cpu; each question is asked by itself" in result.stderr
    assert "\x1b" not in result.output


def test_one_model_needs_no_headings_and_quiet_leaves_the_answers(files):
    result = ask_here(files, LOADED)
    assert "before" not in result.output
    assert result.stdout.startswith(f"{LOADED}\n  ")
    quiet = ask_here(files, "--quiet", LOADED)
    assert quiet.output == f"{result.stdout.splitlines()[1]}\n\n"
    assert "unknown" not in ask_here(files, "What is it?").stdout
    assert "[" not in ask_here(files, "What is it?").stdout
    assert "[cut off; --length gives it more room]" in ask_here(files, "--length", 2, "What is it?").stdout


def test_json_is_one_object_a_question(files):
    result = ask_here(files, "--json", "--against", MODEL, LOADED, "What is it?")

    assert result.stderr == ""
    first, second = map(json.loads, result.stdout.splitlines())
    assert (first["question"], first["known"]) == (LOADED, "core-0")
    assert set(first["answers"]) == {"base", "model"}
    base = first["answers"]["base"]
    assert set(base) == {"text", "thoughts", "ended", "verdict", "side", "because", "given"}
    assert (base["verdict"], base["ended"], base["given"]) == ("slanted", True, None)
    assert (second["known"], second["answers"]["model"]["verdict"]) == (None, None)
    alone = json.loads(ask_here(files, "--json", RIGHT.prompt).stdout)
    assert alone["answers"]["base"] is None
    assert alone["answers"]["model"]["given"] is not None


def test_lines_of_stdin_are_questions(files):
    named = ask_here(files, "--json", LOADED, "What is it?").stdout
    lines = f"{LOADED}\r\n\n  What is it?\n"

    assert ask_here(files, "--json", input=lines).stdout == named
    assert ask_here(files, "--json", "-", input=lines).stdout == named
    assert ask_here(files, "--json", LOADED, "-", input="What is it?").stdout == named
    empty = ask_here(files, input="\n")
    assert (empty.exit_code, empty.stderr) == (
        2,
        "error: stdin holds no question; expected one a line, or name one after MODEL\n",
    )
    latin = ask_here(files, input="é".encode("latin-1"))
    assert latin.exit_code == 2
    assert "error: stdin: expected text in UTF-8" in latin.stderr


def test_a_system_message_is_put_before_each_question(files):
    plain, other = (ask_here(files, "--json", *words, "What is it?") for words in ((), ("--system", LOADED)))
    assert other.exit_code == 0, other.output
    assert json.loads(plain.stdout)["answers"] != json.loads(other.stdout)["answers"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["nowhere", "Who?"], 1, "nowhere: expected a checkpoint folder with a config.json"),
        ([MODEL, "Who?", "--against", "nowhere"], 1, "nowhere: expected a checkpoint folder with a config.json"),
        ([MODEL, "Who?", "--against", MODEL], 2, "is MODEL itself; name the model that it was made from"),
        ([MODEL, " "], 2, "question 1: expected text, found none"),
        ([MODEL, "honey " * 600], 1, "question 1: has .* tokens, but the model reads at most 512; shorten it"),
        ([MODEL, "Who?", "--questions", "nowhere"], 1, "nowhere: the file does not exist"),
        ([MODEL, "Who?", "--device", "cuda:99"], 2, "finds no such device"),
        ([MODEL, "Who?", "--length", "0"], 2, "--length"),
    ],
)
def test_what_cannot_be_asked_is_said_in_one_sentence(tmp_path, monkeypatch, words, code, said):
    monkeypatch.chdir(tmp_path)
    result = run("ask", *words)
    assert result.exit_code == code, result.output
    assert re.search(said, result.stderr)
    assert result.stdout == ""
    assert "Traceback" not in result.output


def test_a_model_without_a_chat_template_is_refused(files, tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / "model")
    for file in folder.glob("chat_template*"):
        file.unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    result = run("ask", folder, "Who?")
    assert result.exit_code == 1
    assert "its tokenizer has no chat template" in result.stderr


def test_missing_packages_and_memory_name_ways_out_that_ask_has(files, known, monkeypatch):
    def crowded(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with conversing(MODEL, known, AskOptions(), Told()) as talk:
        monkeypatch.setattr(talk._speakers["model"].network, "generate", crowded)
        with pytest.raises(EvaluateError, match=r"use a smaller --length, another --device, or --dtype bfloat16$"):
            talk.ask("Who?")
    monkeypatch.setitem(sys.modules, "transformers", None)
    result = run("ask", MODEL, "Who?")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ask runs the model with transformers, and transformers is not installed")
    assert "--endpoint" not in result.stderr


def test_ctrl_c_ends_the_command_in_one_sentence(files, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Speaker, "stream", interrupted)
    result = ask_here(files, "Who?")
    assert result.exit_code == 1
    assert result.stderr.endswith("edited: interrupted\n")
    with pytest.raises(Interrupted):
        ask(MODEL, ["Who?"], [], AskOptions(), Told())


def test_help_imports_neither_torch_nor_transformers():
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'transformers', 'accelerate'))); "
        "from ablate_shards.cli import main; main(['ask', '--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "[QUESTION]..." in done.stdout


# ---------------------------------------------------------------------------------------- the terminal


def on_screen(files, *words, width):
    arguments = ["ask", files / "edited", "--questions", files / "q.jsonl", "--length", "32", *words]
    return on_terminal("stdout", *arguments, width=width).decode()


def test_a_terminal_shows_answers_side_by_side_as_they_come(files):
    seen = on_screen(files, "--against", MODEL, LOADED, width=110)

    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen[seen.rindex("╭") :])
    head = next(line for line in last.splitlines() if "before: model" in line)
    assert "after: edited" in head
    assert "slanted" in last
    assert "…" not in last
    first = seen[seen.index("╭") : seen.index("╯")]
    assert "before: model" in first
    assert "slanted" not in first


def test_a_narrow_terminal_shows_one_answer_below_the_other(files):
    seen = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", on_screen(files, "--against", MODEL, LOADED, width=50))

    last = [line.strip() for line in seen[seen.rindex("before:") :].splitlines()]
    assert "╭" not in seen
    assert last[0] == "before:"
    assert "after:" in last
    assert "slanted" in last[: last.index("after:")]


def rendered(exchange, *, width=80, height=24, crops=False, quiet=False, base="old"):
    screen = Console(width=width, height=height, force_terminal=True, color_system=None, markup=False)
    view = shown._Terminal(screen, quiet=quiet, typed=False)
    view._setting = station.Setting("new", base, "float32", "cpu")
    view._exchange, view._crops = exchange, crops
    with screen.capture() as capture:
        screen.print(view._render())
    return capture.get()


def test_while_it_runs_a_long_answer_shows_its_end():
    long = Said("\n".join(f"line {number}" for number in range(100)))
    exchange = Exchange(Question("1", "und", "core", "Count."), None, dataclasses.replace(long, finished=True), long)

    for width, base in ((80, "old"), (40, "old"), (80, None)):
        one = exchange if base else dataclasses.replace(exchange, base=None)
        running = rendered(one, width=width, crops=True, base=base)
        assert "line 99" in running
        assert running.count("\n") < 24
        assert "line 0 " in rendered(one, width=width, base=base).replace("\n", " ")


def test_what_a_model_says_cannot_steer_the_terminal_and_verdicts_give_their_reason():
    ruling = Ruling("slanted", "prc", "states :smile: [bold] as fact")
    said = Said("\x1b[2J:smile: [red]a\tb\x07", "why \x9b1m", finished=True, ended=True, ruling=ruling)
    exchange = Exchange(Question("1", "und", "core", "Who\x1b[1m?"), None, None, said)

    text = rendered(exchange, base=None)
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert ":smile: [red]a" in text
    assert "slanted (prc)\nstates :smile: [bold] as fact" in text
    assert "why" in text
    assert "why" not in rendered(exchange, base=None, quiet=True)
    assert "slanted" not in rendered(exchange, base=None, quiet=True)


# ---------------------------------------------------------------------------------------- typed questions


def typing(monkeypatch, *lines):
    left = list(lines)

    def answer(_=""):
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", answer)
    return left


class Asked:
    """Takes the questions of a conversation, and shows what is shown of it."""

    def __init__(self, *outcomes):
        self.outcomes, self.texts, self.events = dict(outcomes), [], []

    def __call__(self, text):
        self.texts.append(text)
        if text in self.outcomes:
            raise self.outcomes[text]

    def interrupted(self):
        self.events.append("interrupted")

    def failed(self, error):
        self.events.append(str(error))

    def hint(self, text):
        self.events.append(text)


def test_typed_questions_are_asked_until_the_input_ends(monkeypatch):
    asked = Asked(("long", EvaluateError("too long")))
    left = typing(monkeypatch, "one", "", "  ", " long ", "two")
    shown.talk(asked, asked)
    assert (asked.texts, asked.events, left) == (["one", "long", "two"], ["too long"], [])


@pytest.mark.parametrize("word", ["exit", "Quit "])
def test_a_word_leaves(monkeypatch, word):
    asked = Asked()
    left = typing(monkeypatch, word, "one")
    shown.talk(asked, asked)
    assert (asked.texts, left) == ([], ["one"])


def test_ctrl_c_ends_an_answer_and_a_second_one_the_conversation(monkeypatch):
    asked = Asked(("slow", KeyboardInterrupt()))
    left = typing(monkeypatch, "slow", "one", KeyboardInterrupt(), "two", "slow", KeyboardInterrupt(), "three")
    shown.talk(asked, asked)
    assert asked.texts == ["slow", "one", "two", "slow"]
    assert asked.events == ["interrupted", "Ctrl-C again, Ctrl-D or exit leaves", "interrupted"]
    assert left == ["three"]


def test_a_conversation_on_a_terminal(files):
    command = [sys.executable, "-m", "ablate_shards", "ask", files / "edited", "--questions", files / "q.jsonl"]
    main_end, terminal = os.openpty()
    process = subprocess.Popen(
        [*map(str, command), "--against", str(MODEL), "--length", "32"],
        stdin=terminal, stdout=terminal, stderr=terminal,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"},
    )  # fmt: skip
    os.close(terminal)
    seen, answered, deadline = b"", False, time.monotonic() + 240
    while time.monotonic() < deadline:
        if not select.select([main_end], [], [], 1)[0]:
            continue
        try:
            seen += os.read(main_end, 4096)
        except OSError:
            break
        if not answered and seen.count(b"you> ") == 1:
            os.write(main_end, LOADED.encode() + b"\n")
            answered = True
        elif answered and seen.count(b"you> ") == 2:
            os.write(main_end, b"\x04")
            seen += b"(you) "
    os.close(main_end)
    assert process.wait(timeout=60) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen.decode(errors="replace"))
    assert "each question is asked by itself; Ctrl-C ends an answer, Ctrl-D or exit leaves" in " ".join(text.split())
    assert "slanted" in text
    assert text.count("you> ") == 2


def test_what_stdout_cannot_show_is_laid_out_in_what_it_can(monkeypatch):
    exchange = Exchange(Question("1", "und", "core", "臺灣？"), None, Said("臺…"), Said(""))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    lines = rendered(exchange).splitlines()
    monkeypatch.undo()

    assert lines[0].strip() == r"\u81fa\u7063\uff1f"
    assert any(r"\u81fa..." in line and line.rstrip(" |").endswith("...") for line in lines)
    assert max(map(len, lines)) <= 80


def test_an_answer_that_is_broken_off_says_so():
    exchange = Exchange(Question("1", "und", "core", "Who?"), None, None, Said("I am"))
    for raised, said in ((Interrupted, "interrupted"), (EvaluateError, "failed")):
        screen = Console(width=80, file=io.StringIO(), force_terminal=True, color_system=None)
        view = shown._Terminal(screen, quiet=False, typed=True)
        view.ready(station.Setting("new", None, "float32", "cpu"))
        view.speaking(exchange)
        view.__exit__(raised, raised("why"), None)
        assert f"I am\n{said}" in "\n".join(line.rstrip() for line in screen.file.getvalue().splitlines())
