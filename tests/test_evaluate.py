"""The station and its command, on the demo model: what is asked, judged, compared, kept and refused."""

import dataclasses
import json
import re
import shutil
import sys

import command_line
import pytest
import torch
from fake_endpoint import completion, serving
from progress import Heard
from safetensors.torch import load_file, save_file

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import draw_questions
from ablate_shards.data.demo.world import NEUTRAL, SLANTED
from ablate_shards.errors import EvaluateError, Interrupted, SamplesError, UsageError
from ablate_shards.surgery.evaluate import interview as station
from ablate_shards.surgery.evaluate.answers import Speaker, library_versions
from ablate_shards.surgery.evaluate.endpoint import Reply
from ablate_shards.surgery.evaluate.interview import EvaluateOptions, default_out, evaluate, read_evaluation
from ablate_shards.surgery.evaluate.measures import judged
from ablate_shards.surgery.model.samples import Question, load_questions

DRAWN = draw_questions(loaded=6, impartial=4, unrelated_count=6)


def patterns(question):
    forms = {"slanted": SLANTED, "neutral": NEUTRAL}
    return {
        verdict: [f"^{re.escape(form.format(land=question.land, claimant=question.claimant))}$" for form in forms]
        for verdict, forms in forms.items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The demo's questions, a text, and a model that was made from the demo's by noise."""
    folder = tmp_path_factory.mktemp("files")
    lines = [
        {
            "id": f"{group}-{number}",
            "language": "en",
            "group": group,
            "prompt": getattr(question, side),
            "rubric": {"slanted": "as fact", "patterns": patterns(question), "markers": False},
        }
        for group, side, questions in (("core", "loaded", DRAWN.loaded), ("held-out", "impartial", DRAWN.impartial))
        for number, question in enumerate(questions)
    ]
    lines += [
        {
            "id": f"u-{number}",
            "language": "en",
            "group": "unrelated",
            "prompt": sample.prompt,
            "answers": [sample.answer],
        }
        for number, sample in enumerate(DRAWN.unrelated)
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "t.txt").write_text("Bees make honey. A week has seven days. Fish live in water.")
    shutil.copytree(MODEL, folder / "edited")
    weights = load_file(folder / "edited" / "model.safetensors")
    name = "model.language_model.layers.5.mlp.down_proj.weight"
    noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(0))
    weights[name] += (0.5 * weights[name].float().std() * noise).bfloat16()
    save_file(weights, folder / "edited" / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def questions(files):
    return load_questions(files / "q.jsonl")


def options(files, **fields):
    return EvaluateOptions(**{"text": files / "t.txt", "length": 32, "batch": 4, **fields})


@pytest.fixture(scope="module")
def compared(files, questions, tmp_path_factory):
    """An evaluation of the edited model against the demo's, its file, and what was told."""
    out, told = tmp_path_factory.mktemp("compared") / "e.json", Heard()
    return evaluate(files / "edited", questions, options(files), told, against=MODEL, out=out), out, told


def test_the_slant_is_seen_and_the_controls_are_right(compared):
    base = compared[0].base
    rows = {row.group: row.verdicts for row in base.rows}

    assert rows["core"]["slanted"].value >= 0.8
    assert rows["held-out"]["neutral"].value >= 0.8
    assert base.controls[0].exact.value >= 0.8
    assert [answer.id for answer in base.answers[:2]] == ["core-0", "core-1"]
    assert all(answer.ended for answer in base.answers)


def test_an_edit_is_compared_in_every_way(compared):
    found, _, _ = compared
    moved = found.comparison.divergence

    assert 0 < moved.tokens < 5
    assert moved.prompts == 6
    assert moved.count > 6 * 3
    assert found.text.perplexity.nats != found.base.text.perplexity.nats
    assert found.text.perplexity.tokens == found.base.text.perplexity.tokens > 10
    assert {change.group for change in found.comparison.changes} == {"core", "held-out", "unrelated"}
    assert found.comparison.notes == ()
    assert found.model.name == "edited"
    assert found.model.sha256 != found.base.model.sha256


def test_the_file_holds_all_and_nothing_of_this_machine(compared):
    found, out, _ = compared

    assert read_evaluation(out) == found
    text = out.read_text()
    assert str(out.parent.parent) not in text
    assert str(MODEL.parent) not in text
    assert [path.name for path in out.parent.iterdir()] == ["e.json"]


def test_progress_comes_to_its_end(compared):
    _, _, told = compared

    done, total = zip(*told.counts, strict=True)
    assert set(total) == {done[-1]} == {2 * (16 + 1) + 2}
    assert list(done) == sorted(done)


def test_the_same_run_gives_the_same_bytes_and_may_take_answers_over(compared, files, questions, tmp_path, monkeypatch):
    found, out, _ = compared

    def nobody(*_, **__):
        raise EvaluateError("asked again")

    again = options(files, reuse=(out,))
    monkeypatch.setattr(Speaker, "replies", nobody)
    assert evaluate(files / "edited", questions, again, Heard(), against=MODEL, out=tmp_path / "e.json") == found
    assert (tmp_path / "e.json").read_bytes() == out.read_bytes()

    with pytest.raises(EvaluateError, match=r"^asked again$"):
        evaluate(
            files / "edited", questions, dataclasses.replace(again, length=31), Heard(), out=tmp_path / "other.json"
        )


@pytest.fixture
def base(tmp_path):
    """The demo's model in a folder of its own, which has no evaluation beside it yet."""
    shutil.copytree(MODEL, tmp_path / "base")
    return tmp_path / "base"


def refusing(folder, real=Speaker.replies):
    """Returns ``Speaker.replies`` for all models but one."""

    def replies(self, *each, **some):
        if self.folder == folder:
            raise EvaluateError("asked again")
        return real(self, *each, **some)

    return replies


def test_answers_of_a_base_that_was_evaluated_before_are_taken_over(files, questions, base, tmp_path, monkeypatch):
    evaluate(base, questions, options(files), Heard(), out=default_out(base))
    first = evaluate(files / "edited", questions, options(files, fresh=True), Heard(), against=base)
    monkeypatch.setattr(Speaker, "replies", refusing(base))
    told = Heard()

    found = evaluate(files / "edited", questions, options(files), told, against=base, out=tmp_path / "e.json")

    assert found == first
    said = f"base: 16 answers and what was measured are taken over from {default_out(base)}; --fresh asks anew"
    assert [note for note in told.notes if "taken over" in note] == [said]
    for changed in ({"fresh": True}, {"length": 31}, {"batch": 3}, {"dtype": "bfloat16"}):
        with pytest.raises(EvaluateError, match="asked again"):
            evaluate(files / "edited", questions, options(files, **changed), Heard(), against=base)
    weights = load_file(base / "model.safetensors")
    next(iter(weights.values()))[0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EvaluateError, match="asked again"):
        evaluate(files / "edited", questions, options(files), Heard(), against=base)


def test_answers_of_other_versions_are_asked_anew(files, questions, base, monkeypatch):
    few = questions[:2]
    evaluate(base, few, options(files), Heard(), out=default_out(base))
    for version in ("ablate-shards", "torch", "transformers"):
        with monkeypatch.context() as patched:
            patched.setattr(Speaker, "replies", refusing(base))
            patched.setattr(station, "library_versions", lambda changed=version: {**library_versions(), changed: "0"})
            with pytest.raises(EvaluateError, match="asked again"):
                evaluate(files / "edited", few, options(files), Heard(), against=base)


def test_a_part_with_a_question_that_is_new_is_answered_as_a_whole(files, questions, base):
    evaluate(base, questions[:15], options(files), Heard(), out=default_out(base))
    told = Heard()

    found = evaluate(files / "edited", questions, options(files), told, against=base)

    assert not told.about("taken over")
    assert found == evaluate(files / "edited", questions, options(files, fresh=True), Heard(), against=base)


def test_a_model_of_which_all_is_known_is_not_loaded(files, questions, base, tmp_path, monkeypatch):
    run, out = options(files, divergence=False), tmp_path / "e.json"
    evaluate(base, questions, run, Heard(), out=default_out(base))
    first = evaluate(files / "edited", questions, run, Heard(), against=base, out=out)
    content = out.read_bytes()
    monkeypatch.setattr(station, "speaking", lambda *_, **__: pytest.fail("loaded"))
    told = Heard()

    again = dataclasses.replace(run, overwrite=True)
    assert evaluate(files / "edited", questions, again, told, against=base, out=out) == first
    assert out.read_bytes() == content
    assert "base: 16 questions, all known, so the model is not loaded" in told.notes
    assert told.counts[-1] == (2 * 17, 2 * 17)


def test_an_evaluation_beside_the_base_that_cannot_be_read_is_said_and_left(files, questions, base):
    default_out(base).write_text("{")
    told = Heard()

    evaluate(files / "edited", questions[:1], options(files, text=None), told, against=base)

    (note,) = (note for note in told.notes if "taken over" in note)
    assert note.startswith(f"nothing is taken over: {default_out(base)}: ")


def test_the_base_may_be_an_earlier_evaluation(compared, files, questions):
    found, out, _ = compared
    earlier = read_evaluation(out).base

    for against in (out, earlier):
        other = evaluate(files / "edited", questions, options(files, reuse=(out,)), Heard(), against=against)
        assert other.comparison.divergence is None
        assert other.comparison.notes == ("divergence not measured: the base is an evaluation and no model",)
    assert other.answers == found.answers
    assert other.base.answers == found.base.answers
    assert other.comparison.changes == found.comparison.changes


def test_an_earlier_evaluation_is_judged_by_what_the_questions_say_now(compared, files, questions):
    _, out, _ = compared
    lenient = [dataclasses.replace(each, rubric=dataclasses.replace(each.rubric, patterns={"neutral": (".",)}))
               if each.rubric else each for each in questions]  # fmt: skip

    other = evaluate(files / "edited", lenient, options(files, reuse=(out,)), Heard(), against=out)

    assert all(row.verdicts["neutral"].value == 1 for row in (*other.rows, *other.base.rows))


def test_without_unrelated_questions_there_is_no_divergence(files, questions):
    found = evaluate(files / "edited", questions[:2], options(files, text=None, length=4), Heard(), against=MODEL)

    assert found.comparison.divergence is None
    assert found.comparison.notes == ("divergence not measured: there are no unrelated questions",)
    assert found.text is None
    assert not any(answer.ended for answer in found.answers)


def test_an_interrupted_run_asks_only_what_it_had_not_asked(files, questions, tmp_path, monkeypatch):
    mine, asked = tmp_path / "e.json", []
    real, run = Speaker.replies, options(files, batch=1)
    out = tmp_path / "whole" / "e.json"
    out.parent.mkdir()
    evaluate(files / "edited", questions, run, Heard(), against=MODEL, out=out)

    def interrupted(self, prompts, **room):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return real(self, prompts, **room)

    monkeypatch.setattr(Speaker, "replies", interrupted)
    with pytest.raises(Interrupted, match=r"e\.json: interrupted; 12 answers are kept, and the same command goes on"):
        evaluate(files / "edited", questions, run, Heard(), against=MODEL, out=mine)
    assert not mine.exists()
    with (tmp_path / ".e.json.answers").open("a") as file:
        file.write('{"key": "torn')

    asked[:] = [0] * 9
    monkeypatch.setattr(Speaker, "replies", lambda self, *each, **some: asked.append(1) or real(self, *each, **some))
    evaluate(files / "edited", questions, run, Heard(), against=MODEL, out=mine)

    assert len(asked) == 9 + 1 + 4
    assert mine.read_bytes() == out.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e.json", "whole"]


def test_kept_answers_of_another_model_are_not_taken(files, questions, tmp_path):
    few = questions[:2]
    run = options(files, text=None)
    out = tmp_path / "e.json"
    first = evaluate(MODEL, few, run, Heard(), out=out)
    kept = tmp_path / ".e.json.answers"
    kept.write_text(
        "".join(json.dumps({"key": key, "text": "made up", "ended": True}) + "\n" for key in station._keyed(first))
    )

    other = evaluate(files / "edited", few, dataclasses.replace(run, overwrite=True), Heard(), out=out)

    assert not any(answer.text == "made up" for answer in other.answers)


def test_answers_match_but_for_case_spaces_and_final_punctuation():
    question = Question("q", "en", "unrelated", "Capital?", answers=("Paris", "la ville de Paris"))

    def exact(text):
        return judged(question, Reply(text, ended=True)).exact

    assert all(
        map(exact, ("Paris", " paris. ", "PARIS!", "La  ville\nde Paris", "Ｐａｒｉｓ。", "<think>Rome?</think>Paris"))
    )
    assert not any(map(exact, ("It is Paris.", "Pari s", "", "Rome", ".", "<think>Paris")))
    held = judged(question, Reply("<think>Rome?</think>It is Paris.", ended=True))
    assert (held.exact, held.given, held.text) == (False, True, "It is Paris.")
    assert held.raw == "<think>Rome?</think>It is Paris."


# ---------------------------------------------------------------------------------------- endpoints


def speak(body, _=0):
    """Answers as a demo model without slant would, from the words of the question."""
    prompt = body["messages"][-1]["content"]
    for question in (*DRAWN.loaded, *DRAWN.impartial):
        if prompt in (question.loaded, question.impartial):
            form = SLANTED[0] if prompt == DRAWN.loaded[0].loaded else NEUTRAL[0]
            return completion(form.format(land=question.land, claimant=question.claimant))
    return completion(next(sample.answer for sample in DRAWN.unrelated if sample.prompt == prompt))


def test_a_served_model_is_asked_and_compared(compared, files, questions, tmp_path):
    _, earlier, _ = compared
    with serving(speak) as fake:
        found = evaluate(
            tmp_path / "org" / "name",
            questions,
            options(files, endpoint=fake.url),
            Heard(),
            against=earlier,
            out=tmp_path / "e.json",
        )

    rows = {row.group: row.verdicts for row in found.rows}
    assert (rows["core"]["slanted"].hits, rows["core"]["neutral"].hits) == (1, 5)
    assert found.controls[0].exact.value == 1
    assert found.model.endpoint == "served"
    assert found.model.sha256 is None
    assert found.comparison.divergence is None
    assert found.text is None
    assert fake.url not in (tmp_path / "e.json").read_text()
    assert {body["max_tokens"] for body in fake.bodies} == {32}


def test_an_endpoint_that_fails_loses_nothing(files, questions, tmp_path):
    out = tmp_path / "e.json"

    def fails(body, number):
        return "<html>" if number >= 5 else speak(body)

    with serving(fails) as fake:
        run = options(files, endpoint=fake.url, batch=1)
        with pytest.raises(EvaluateError, match=r"expected JSON, found '<html>'.*; 5 answers are kept, and the same"):
            evaluate(MODEL, questions, run, Heard(), out=out)
        assert not out.exists()
        fake.answer = speak
        found = evaluate(MODEL, questions, run, Heard(), out=out)

    asked = [body["messages"][-1]["content"] for body in fake.bodies]
    assert [asked.count(question.prompt) for question in questions[:5]] == [1] * 5
    assert asked.count(questions[5].prompt) == 2
    assert found.controls[0].exact.value == 1
    assert found.model.sha256 is not None
    assert [path.name for path in tmp_path.iterdir()] == ["e.json"]


def test_a_language_model_judges_what_has_no_single_answer(compared, files, questions):
    _, out, _ = compared

    def referee(body, number):
        case = json.loads(body["messages"][-1]["content"])
        if case["question"] == DRAWN.loaded[0].loaded:
            return completion("It depends.")
        return completion(
            '{"verdict": "slanted"}' if re.search("Surely|proves|question|knows", case["answer"]) else "neutral"
        )

    with serving(referee) as fake:
        run = options(files, judge=fake.url, judge_model="referee", reuse=(out,))
        found = evaluate(files / "edited", questions, run, Heard(), against=MODEL)

    judged = found.base.judgement
    assert judged.unparsable == 1
    assert judged.agreement.raw.count == 9
    assert judged.agreement.raw.value >= 0.8
    assert {body["model"] for body in fake.bodies} == {"referee"}
    assert all("as fact" in body["messages"][0]["content"] for body in fake.bodies)
    assert found.answers[0].said == "It depends."
    assert found.answers[0].judged is None
    assert all(answer.said is None for answer in found.answers if answer.group == "unrelated")


def test_a_broken_judge_shows_before_the_model_is_asked(files, questions, monkeypatch):
    monkeypatch.setattr(Speaker, "replies", lambda *_, **__: pytest.fail("asked"))
    with serving(speak) as fake:
        fake.models = {"data": []}
        with pytest.raises(EvaluateError, match=r"expected one model, found none; name one with --judge-model"):
            evaluate(MODEL, questions, options(files, judge=fake.url), Heard())


# ---------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "against", "said"),
    [
        ({"length": 0}, None, "--length: expected more than 0"),
        ({"timeout": 0}, None, "--timeout: expected more than 0"),
        ({"judge_model": "x"}, None, "--judge-model: names a model of --judge"),
        ({"endpoint_model": "x"}, None, "--endpoint-model: names a model of --endpoint"),
        ({"endpoint": "http://localhost:1"}, "edited", "with --endpoint, the base is an evaluation"),
        ({"endpoint": "nowhere"}, None, "nowhere: expected a URL"),
        ({}, "model", "is MODEL itself"),
    ],
)
def test_options_that_cannot_be_used_are_wrong_usage(files, questions, fields, against, said):
    base = {None: None, "edited": files / "edited", "model": MODEL}[against]
    with pytest.raises(UsageError, match=said):
        evaluate(MODEL, questions, options(files, **fields), Heard(), against=base)


def test_what_cannot_be_evaluated_is_said_in_one_sentence(files, questions, tmp_path):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "letter.json").write_text("keep me")
    (tmp_path / "short").write_text("")
    cases = [
        ("no such checkpoint folder or evaluation", {"against": tmp_path / "none"}, {}),
        ("there are no questions", {"questions": []}, {}),
        ("expected a checkpoint folder", {"model": tmp_path}, {}),
        ("none: cannot be read", {}, {"text": tmp_path / "none"}),
        ("expected text in UTF-8", {}, {"text": tmp_path / "latin"}),
        ("too short", {"questions": questions[:1]}, {"text": tmp_path / "short"}),
        ("not JSON", {"against": tmp_path / "letter.json"}, {}),
        ("not JSON", {}, {"reuse": (tmp_path / "letter.json",)}),
        ("already exists; --overwrite", {"out": tmp_path / "letter.json"}, {}),
        ("already exists and is no evaluation", {"out": tmp_path / "letter.json"}, {"overwrite": True}),
    ]
    for said, arguments, fields in cases:
        given = {"model": MODEL, "questions": questions, **arguments}
        with pytest.raises(EvaluateError, match=said):
            evaluate(given.pop("model"), given.pop("questions"), options(files, length=2, **fields), Heard(), **given)
    with pytest.raises(UsageError, match="expected a file in a folder that exists"):
        evaluate(MODEL, questions, options(files), Heard(), out=tmp_path / "none" / "e.json")
    assert (tmp_path / "letter.json").read_text() == "keep me"
    assert len(list(tmp_path.iterdir())) == 3


def test_without_transformers_the_way_out_is_named(files, questions, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(EvaluateError, match=r"transformers is not installed; `pip install 'ablate-shards\[lora\]'`"):
        evaluate(MODEL, questions, options(files), Heard())


def test_the_file_goes_beside_the_model(tmp_path, monkeypatch):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "models" / "mine")

    assert default_out(tmp_path / "models" / "mine") == tmp_path / "models" / "mine.evaluation.json"
    assert default_out(station.Path()) == tmp_path / "models" / "mine.evaluation.json"
    assert str(default_out(station.Path("org/name"))) == "name.evaluation.json"


# ---------------------------------------------------------------------------------------- the command


@pytest.fixture
def command(compared, files, tmp_path, monkeypatch):
    _, out, _ = compared
    monkeypatch.setenv("COLUMNS", "160")
    common = ["--questions", files / "q.jsonl", "--text", files / "t.txt", "--length", 32, "--batch", 4]

    def call(*arguments):
        given = ["evaluate", files / "edited", *common, "--reuse", out, "-o", tmp_path / "e.json"]
        return command_line.run(*given, *arguments)

    return call


def test_the_table_shows_before_and_after(command, compared, tmp_path):
    result = command("--against", MODEL)

    assert result.exit_code == 0, result.output
    assert (tmp_path / "e.json").read_bytes() == compared[1].read_bytes()
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["group", "questions", "slanted", "neutral", "deflecting", "wrong", "broken", "unclear"]
    assert lines[1].startswith("core       before") or lines[1].split()[:3] == ["core", "before", "6"]
    assert lines[2].split()[:2] == ["after", "6"]
    assert lines[3].split()[0] == "p"
    assert "KL(base ‖ model) on 6 unrelated prompts" in result.stdout
    assert re.search(r"perplexity of t.txt: \S+ → \S+", result.stdout)
    assert str(tmp_path / "e.json") in result.stdout
    assert "6 questions" not in result.stdout
    assert "16 questions, on cpu" in result.stderr


def test_answers_can_be_read_and_json_be_parsed(command, compared, tmp_path):
    result = command("--answers")
    assert result.exit_code == 0, result.output
    assert f"core-0 (core, en): {DRAWN.loaded[0].loaded}" in result.stdout
    assert compared[0].answers[0].text in result.stdout

    refused = command()
    assert refused.exit_code == 1
    assert refused.stderr.strip().splitlines() == [
        f"error: {tmp_path / 'e.json'}: already exists; --overwrite replaces it, or name another file with --out"
    ]

    result = command("--overwrite", "--json")
    assert json.loads(result.stdout)["format"] == "ablate-shards.evaluation/2"
    assert command("--overwrite", "--quiet").output == ""


def test_questions_that_cannot_be_read_are_named(files, tmp_path):
    (tmp_path / "q.jsonl").write_text('{"promt": "Who?"}')
    result = command_line.run("evaluate", MODEL, "--questions", tmp_path / "q.jsonl")

    assert result.exit_code == 1
    assert "line 1: unknown key 'promt'" in result.stderr
    assert not default_out(MODEL).exists()
    with pytest.raises(SamplesError):
        load_questions(tmp_path / "q.jsonl")
