"""Searching on the demo model: what is tried, kept, chosen, reported and handed over; and what is refused."""

import dataclasses
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from command_line import checked, run
from raw_checkpoints import snapshot
from safetensors.numpy import load_file

import ablate_shards.surgery.search.search as search_module
import ablate_shards.surgery.search.study as study_module
from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import draw_pairs, draw_questions
from ablate_shards.data.demo.world import NEUTRAL, SLANTED
from ablate_shards.errors import SearchError, UsageError
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.directions.formats import read_directions
from ablate_shards.surgery.edit import blocks
from ablate_shards.surgery.edit.loops import SharedLoops
from ablate_shards.surgery.edit.operation import RunOptions
from ablate_shards.surgery.evaluate.answers import speaking
from ablate_shards.surgery.model.samples import Question, load_questions
from ablate_shards.surgery.plan.plan import make_plan
from ablate_shards.surgery.plan.profile import Profile
from ablate_shards.surgery.plan.recipe import AblateOptions
from ablate_shards.surgery.search.applied import EditableModel
from ablate_shards.surgery.search.bench import Bench, Tried, digest_of, excess
from ablate_shards.surgery.search.choice import Budget, Candidate, choose, spread
from ablate_shards.surgery.search.contrasts import Contrasts
from ablate_shards.surgery.search.objectives import Asking, Measures, find_objective, make_measures
from ablate_shards.surgery.search.questions import deal
from ablate_shards.surgery.search.space import Choice, Number, make_space
from ablate_shards.surgery.search.study import Trial, best_of

PARTS = ("attention", "linear-attention", "mlp")
HIDDEN = 64
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def space(table=None, **given):
    made = {"contrasts": ("a", "b", "a+b"), "without": ("t",), "rank": 1, "layers": 8, "sources": range(8)}
    return make_space(table or {}, "[search.space]", **{**made, "parts": PARTS, **given})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, directions of it, and questions with reference answers."""
    folder = tmp_path_factory.mktemp("search")
    shutil.copytree(MODEL, folder / "model")
    pairs = ({"positive": pair.loaded, "negative": pair.impartial} for pair in draw_pairs()[:24])
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    dump = folder / "dump.safetensors"
    checked("capture", folder / "model", dump, "--pairs", folder / "pairs.jsonl", "--dtype", "float32", "-q")
    checked("directions", dump, folder / "cue.directions.safetensors", "-q")
    drawn = draw_questions(loaded=10, impartial=5, unrelated_count=10)

    def said(forms, question):
        return [form.format(land=question.land, claimant=question.claimant) for form in forms]

    lines = [
        {
            "id": f"{group}-{number}",
            "group": group,
            "prompt": getattr(question, side),
            "rubric": {
                "patterns": {
                    verdict: [rf"\A{re.escape(text)}\Z" for text in said(forms, question)]
                    for verdict, forms in (("slanted", SLANTED), ("neutral", NEUTRAL))
                },
                "markers": False,
            },
            "references": {"neutral": said(NEUTRAL, question), "prc": said(SLANTED, question)},
        }
        for group, side, asked in (("core", "loaded", drawn.loaded), ("held-out", "impartial", drawn.impartial))
        for number, question in enumerate(asked)
    ]
    lines += [
        {"id": f"u-{number}", "group": "unrelated", "prompt": sample.prompt, "answers": [sample.answer]}
        for number, sample in enumerate({sample.prompt: sample for sample in drawn.unrelated}.values())
    ]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def arguments(folder, out, *more, trials=5):
    return (
        *("search", folder / "model", out, "-d", folder / "cue.directions.safetensors"),
        *("--questions", folder / "q.jsonl", "--trials", trials, "--length", 16, "--front", 2, "--dtype", "float32"),
        *more,
    )


@pytest.fixture(scope="module")
def found(folder):
    """A finished search: what it printed, and its record."""
    out = folder / "found.toml"
    result = checked(*arguments(folder, out))
    return result.output, json.loads((folder / "found.search.json").read_text())


class TestFound:
    def test_the_recipe_makes_the_edit_that_was_measured(self, folder, found, tmp_path):
        _, record = found
        checked("ablate", folder / "model", tmp_path / "edited", "--recipe", folder / "found.toml", "-q")
        receipt = json.loads((tmp_path / "edited" / "ablation.json").read_text())
        results = {tensor["name"]: tensor["blake3"] for tensor in receipt["tensors"]}
        chosen = next(trial for trial in record["trials"] if trial["number"] == record["chosen"])
        assert digest_of({name: _Digest(digest) for name, digest in results.items()}) == chosen["digest"]
        checked("verify", folder / "model", tmp_path / "edited", "-q")

    def test_the_model_is_as_it_was(self, folder, found):
        assert snapshot(folder / "model") == snapshot(MODEL)

    def test_parts_are_apart_and_of_all_kinds(self, folder, found):
        _, record = found
        parts = record["questions"]
        ids = [one for part in parts.values() for one in part]
        assert len(ids) == len(set(ids)) == len((folder / "q.jsonl").read_text().splitlines())
        for part in parts.values():
            assert {one.split("-")[0] for one in part} >= {"core", "u"}
        asked = [json.loads(line)["id"] for line in (folder / "found.questions.jsonl").read_text().splitlines()]
        assert sorted(asked) == sorted(parts["report"])

    def test_the_report_is_of_questions_that_nothing_was_chosen_by(self, folder, found):
        _, record = found
        evaluation = json.loads((folder / "found.chosen.evaluation.json").read_text())
        assert sorted(answer["id"] for answer in evaluation["answers"]) == sorted(record["questions"]["report"])

    def test_the_first_trial_is_the_plain_edit(self, found):
        _, record = found
        first = record["trials"][0]
        assert first["setting"]["source"] == "own"
        assert all(set(values) == {1.0} for values in first["coefficients"].values())

    def test_what_is_printed_is_in_the_record(self, found):
        output, record = found
        assert f"The best of {len(record['trials'])} trials" in output
        for candidate in record["candidates"]:
            assert f"{candidate['values']['lean']:.3g}" in output
        said = {True: "beats the plain one", False: "the plain one", None: "the plain edit itself was chosen"}
        assert said[record["beats_plain"]] in output

    def test_an_edit_takes_slant_away(self, found):
        """The demo's slant has one direction, so that the plain edit, which is the first trial, removes it."""
        _, record = found
        base = record["base"]["values"]["lean"]
        plain = next(candidate for candidate in record["candidates"] if candidate["trial"] == 0)
        assert plain["values"]["lean"] > base
        assert plain["shares"]["slanted"][0] < record["base"]["shares"]["slanted"][0]

    def test_it_is_not_replaced_unasked(self, folder, found):
        assert "--overwrite" in checked(*arguments(folder, folder / "found.toml"), code=1).output

    def test_optuna_opens_its_study(self, folder, found):
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        storage = JournalStorage(JournalFileBackend(str(folder / "found.study.journal")))
        (summary,) = optuna.get_all_study_summaries(storage)
        study = optuna.load_study(study_name=summary.study_name, storage=storage)
        assert study.metric_names == ["lean", "kl"]
        _, record = found
        assert [trial.values for trial in study.trials] == [
            [trial["values"]["lean"], trial["values"]["kl"]] for trial in record["trials"]
        ]
        assert {trial.number for trial in study.best_trials} == set(record["front"])

    def test_measures_are_explained_that_are_shown(self, found):
        output, _ = found
        assert "*: chosen; lean: how much likelier neutral answers are" in output
        assert "former: how likely" not in output


@dataclasses.dataclass
class _Digest:
    blake3: str


#: A search that is killed while it writes to its journal, as Optuna does, for the n-th time.
KILLED = """
import os, signal, sys
from optuna.storages.journal import JournalFileBackend
from ablate_shards.cli import main

append, left = JournalFileBackend.append_logs, [int(sys.argv[1])]

def killing(self, logs):
    left[0] -= 1
    if left[0]:
        return append(self, logs)
    self._lock.acquire()
    with open(self._file_path, "ab") as file:
        file.write(b'{"op_code":')
    os.kill(os.getpid(), signal.SIGKILL)

JournalFileBackend.append_logs = killing
main(sys.argv[2:])
"""

#: A process that starts another one, which ends with it.
PARENT = """
import multiprocessing, time
from ablate_shards.surgery.machine.signals import end_with_parent

def work():
    end_with_parent()
    print("works", flush=True)
    time.sleep(60)

multiprocessing.get_context("fork").Process(target=work).start()
time.sleep(60)
"""


class TestGoingOn:
    def trials(self, out):
        record = json.loads(out.with_name(out.name.replace(".toml", ".search.json")).read_text())
        return [(trial["number"], trial["setting"], trial["values"], trial["digest"]) for trial in record["trials"]]

    def test_an_interrupted_search_goes_on_as_it_would_have(self, folder, found, tmp_path, monkeypatch):
        out = tmp_path / "again.toml"
        real, count = study_module.Trial, 0

        def counting(*given):
            nonlocal count
            count += 1
            if count == 3:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(study_module, "Trial", counting)
        stopped = checked(*arguments(folder, out), code=1)
        assert "finished trials are kept" in stopped.output
        assert not out.exists()
        monkeypatch.undo()
        went_on = checked(*arguments(folder, out))
        assert "3 trials are finished already" in went_on.output
        assert self.trials(out) == self.trials(folder / "found.toml")

    @pytest.mark.parametrize("trial", [0, 1])
    def test_one_that_is_interrupted_within_a_trial_tries_it_again(self, folder, found, tmp_path, monkeypatch, trial):
        out, left = tmp_path / "within.toml", iter(range(trial))
        real = Bench.try_out

        def trying(*given):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*given)

        monkeypatch.setattr(Bench, "try_out", trying)
        checked(*arguments(folder, out), code=1)
        monkeypatch.undo()
        checked(*arguments(folder, out))
        assert [each[1:] for each in self.trials(out)] == [each[1:] for each in self.trials(folder / "found.toml")]

    @pytest.mark.parametrize("writes", [2, 70])
    def test_one_that_is_killed_goes_on_as_it_would_have(self, folder, found, tmp_path, writes):
        out, lock = tmp_path / "killed.toml", tmp_path / "killed.study.journal.lock"
        words = [str(word) for word in arguments(folder, out, "-q")]
        killed = subprocess.run([sys.executable, "-c", KILLED, str(writes), *words], check=False)
        assert killed.returncode == -signal.SIGKILL
        assert lock.is_symlink()
        assert not (tmp_path / "killed.study.journal").read_bytes().endswith(b"\n")
        went_on = checked(*arguments(folder, out))
        kept = re.search(r"^([1-4]) trials? (is|are) finished already$", went_on.output, re.MULTILINE)
        assert bool(kept) == (writes == 70)
        assert [each[1:] for each in self.trials(out)] == [each[1:] for each in self.trials(folder / "found.toml")]
        assert not lock.is_symlink()

    def test_a_worker_ends_with_the_search_that_started_it(self):
        with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
            assert parent.stdout.readline()
            parent.kill()
            parent.communicate(timeout=30)  # until the worker, too, has let go of the pipe

    def test_a_worker_that_cannot_work_says_why(self, tmp_path):
        job = SimpleNamespace(options=SimpleNamespace(device="cpu", workers=2, run=RunOptions), folder=tmp_path / "no")
        with pytest.raises(SystemExit, match=r"worker 2 of 2: .*no: .*; the others go on"):
            search_module.work(job, 1, 60)

    def test_a_search_without_a_trial_is_in_nobodys_way(self, folder, tmp_path):
        out = tmp_path / "o.toml"
        checked(*arguments(folder, out, "--timeout", 1e-6), code=1)
        assert (tmp_path / "o.study.journal").exists()
        refused = checked(*arguments(folder, out, "--timeout", 1e-6, "--seed", 5), code=1)
        assert "no trial was finished in time" in refused.output

    def test_trials_of_another_search_are_in_the_way(self, folder, found, tmp_path):
        out = tmp_path / "other.toml"
        shutil.copy(folder / "found.study.journal", tmp_path / "other.study.journal")
        refused = checked(*arguments(folder, out, "--seed", 5), code=1)
        assert "the seed changed" in refused.output
        (tmp_path / "other.study.journal").write_text("no\njournal")
        assert "is not the journal of a search" in checked(*arguments(folder, out), code=1).output
        assert (tmp_path / "other.study.journal").read_text() == "no\njournal"

    def test_a_time_limit_ends_the_trials(self, folder, tmp_path):
        out = tmp_path / "short.toml"
        checked(*arguments(folder, out, "--timeout", 0.1, trials=1000))
        assert 1 <= len(self.trials(out)) < 1000

    def test_workers_share_the_trials(self, folder, tmp_path, capfd):
        out = tmp_path / "two.toml"
        checked(*arguments(folder, out, "--workers", 2, trials=6))
        assert "existing study" not in capfd.readouterr().err  # what Optuna says in a worker, unless it is told not to
        numbers = [number for number, *_ in self.trials(out)]
        assert len(numbers) == len(set(numbers)) >= 6

    def test_every_trial_over_the_budget(self, folder, tmp_path, monkeypatch):
        out = tmp_path / "strict.toml"
        refused = checked(*arguments(folder, out, "--controls", -1, trials=2), code=1)
        assert re.search(
            r"none of \d candidates is within the budget; .* 100% above the -100% of --controls", refused.output
        )
        assert "finished trials are kept" in refused.output
        title, *table = refused.stdout.splitlines()
        assert title.strip() == "The best trials, on questions of the choice"
        assert [line.split()[0] for line in table[1:4]] == ["before", "0", "1"]

        def never(*_):
            raise AssertionError("measured again")

        # With another budget nothing is measured again but the report.
        monkeypatch.setattr("ablate_shards.surgery.search.search.measure_again", never)
        checked(*arguments(folder, out, "--controls", 1, "--broken", 1, trials=2))
        assert len(self.trials(out)) == 2

    @pytest.mark.parametrize("at", [1, 2])
    def test_a_start_is_tried_once_where_a_kill_leaves_it_waiting(self, tmp_path, monkeypatch, at):
        measures, asked = Measures((_Objective("kl", "minimize"),)), iter(range(1, 9))
        starts = space().starts({"a": (3,), "b": (4,)})
        course = study_module.Course(len(starts) + 1, math.inf, 0, starts)
        study = study_module.open_study(tmp_path / "j", {}, measures.objectives, overwrite=False)
        ask = type(study).ask

        def try_out(_):
            return Tried({"kl": 0.1}, 0.0, 1.0, "")

        def killed(self):
            if next(asked) == at:
                raise KeyboardInterrupt
            return ask(self)

        monkeypatch.setattr(type(study), "ask", killed)
        with pytest.raises(KeyboardInterrupt):
            study_module.run_trials(study, space(), try_out, measures.goals, course, lambda *_: None)
        monkeypatch.undo()
        again = study_module.open_study(tmp_path / "j", {}, measures.objectives, overwrite=False)
        study_module.end_interrupted(again)
        study_module.run_trials(again, space(), try_out, measures.goals, course, lambda *_: None)
        tried = [trial.setting for trial in study_module.trials_of(again, {})]
        assert tried[: len(starts)] == list(starts)
        assert len(tried) == len(starts) + 1

    @pytest.mark.parametrize("name", ["kl", "subject", "lean", "neutral"])
    def test_what_is_no_number_is_the_worst(self, tmp_path, name):
        """Each objective alike: the unedited model has the best subject that there is."""
        direction = "minimize" if name in ("kl", "subject") else "maximize"
        measures = Measures((_Objective(name, direction),), (_Objective("guard", "minimize"),))
        ends = iter([({name: 0.1}, 0.0), ({name: math.nan}, 0.0), ({name: 0.1, "guard": math.inf}, 0.0), ({}, 0.6)])
        study = study_module.open_study(tmp_path / "j", {}, measures.objectives, overwrite=False)
        course = study_module.Course(4, math.inf, 0, ())
        study_module.run_trials(
            study, space(), lambda _: Tried(*next(ends), 1.0, ""), measures.goals, course, lambda *_: None
        )
        worst = math.inf if direction == "minimize" else -math.inf
        assert [trial.values for trial in study.trials] == [[0.1], [worst], [0.1], [worst]]
        over = [sum(trial.constraints.values()) > 0 for trial in study.trials]
        assert over == [False, True, True, True]

    def test_where_none_is_within_the_budget_those_that_do_less_are_looked_at(
        self, folder, found, tmp_path, monkeypatch
    ):
        def looked_at(name):
            shutil.copy(folder / "found.study.journal", tmp_path / f"{name}.study.journal")
            checked(*arguments(folder, tmp_path / f"{name}.toml"), "--front", 1)
            record = json.loads((tmp_path / f"{name}.search.json").read_text())
            return record["front"], [candidate["trial"] for candidate in record["candidates"]]

        front, first = looked_at("first")
        assert len(front) > 1
        monkeypatch.setattr("ablate_shards.surgery.search.search.is_within", lambda *_: False)
        _, more = looked_at("more")
        assert more[: len(first)] == first
        assert [front.index(trial) for trial in more[len(first) :]] == [-(-len(front) // 2)]

    def test_every_trial_over_its_limits(self, folder, tmp_path, monkeypatch):
        out = tmp_path / "forgets.toml"
        refused = checked(*arguments(folder, out, "--subject", 1e-9, trials=2), code=1)
        assert re.search(
            r"none of 2 trials is within its limits \(2 are over the 1e-09 nats a token of --subject, by \S+ or more\)"
            r"; raise --subject, narrow the space, or search on; finished trials are kept",
            refused.output,
        )

        def never(*_):
            raise AssertionError("tried again")

        # They were measured in full, so that another limit needs no further ones.
        monkeypatch.setattr(Bench, "try_out", never)
        checked(*arguments(folder, out, trials=2))
        assert len(self.trials(out)) == 2

    def test_a_time_that_no_trial_is_finished_in(self, folder, tmp_path):
        refused = checked(*arguments(folder, tmp_path / "none.toml", "--timeout", 1e-6), code=1)
        assert "no trial was finished in time; raise --timeout" in refused.output


class TestSubject:
    def test_it_is_measured_where_it_is_no_objective(self, found):
        output, record = found
        assert [objective["name"] for objective in record["objectives"]] == ["lean", "kl"]
        assert all("subject" in trial["values"] for trial in record["trials"] if trial["complete"])
        assert record["options"]["budget"]["subject"] == 0.25
        assert record["base"]["values"]["subject"] == pytest.approx(0, abs=1e-6)
        assert "subject: how much less likely" in output

    def test_answers_that_repeat_no_word_limit_nothing(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("ablate_shards.surgery.search.objectives._word", lambda *_: "")
        out = tmp_path / "o.toml"
        output = checked(*arguments(folder, out, "--subject", 1e-9, trials=2)).output
        for part in ("trials", "choice"):
            assert f"no answer to the contested questions of the {part} repeats a word of its question" in output
        assert "no subject: no answer repeats a word of its question" in output
        record = json.loads((tmp_path / "o.search.json").read_text())
        assert all("subject" not in trial["values"] for trial in record["trials"])
        refused = checked(*arguments(folder, tmp_path / "p.toml", "--objective", "subject,kl"), code=2)
        assert "no answer to a contested question of this part repeats a word of its question" in refused.output

    def test_one_that_is_an_objective_is_measured_once(self, folder):
        questions = load_questions(folder / "q.jsonl")
        with speaking(folder / "model", dtype="float32", device="cpu") as speaker:
            made = make_measures(("subject", "kl"), speaker, questions, Asking())
        assert made.names == ("subject", "kl")

    @pytest.mark.parametrize(
        ("values", "by"),
        [
            ({"kl": 0.1, "subject": 0.5}, 1.0),
            ({"kl": 1.5, "subject": 0.5}, 2.0),
            ({"kl": 0.25, "subject": 0.125}, -0.5),
            ({"kl": 0.25}, -0.5),
            ({"lean": 9.0}, 0.0),
            ({"kl": 0.1, "subject": math.nan}, math.inf),
            ({"kl": math.inf}, math.inf),
        ],
    )
    def test_a_trial_is_as_far_over_as_its_worst_measure(self, values, by):
        over = excess(values, {"kl": 0.5, "subject": 0.25})
        assert over == by
        assert Tried(values, over, 1.0, "").complete == (by <= 0)


class TestEditableModel:
    @pytest.fixture
    def loaded(self, folder):
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="auto")

    @pytest.mark.parametrize("divided", [False, True])
    def test_it_makes_what_ablate_writes_and_takes_it_back(self, folder, loaded, tmp_path, monkeypatch, divided):
        from transformers import AutoModelForCausalLM

        loops = []
        each = SharedLoops.each
        monkeypatch.setattr(SharedLoops, "each", lambda self, *given: loops.append(given) or each(self, *given))
        checkpoint = open_checkpoint(folder / "model")
        directions = read_directions(folder / "cue.directions.safetensors")
        before = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
        checked("ablate", folder / "model", tmp_path / "out", "-d", folder / "cue.directions.safetensors", "-q")
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
        if divided:
            monkeypatch.setattr(blocks, "_UNDIVIDED", 0)
            monkeypatch.setattr(blocks, "_CPU_BLOCK", 2000)
        with EditableModel(checkpoint, loaded, RunOptions(jobs=3)) as model:
            model.apply(make_plan(checkpoint, directions, AblateOptions(coefficient=2, layers=frozenset({1}))))
            model.apply(make_plan(checkpoint, directions, AblateOptions()))
            changed = 0
            for (name, found), (_, wanted) in zip(loaded.named_parameters(), expected.named_parameters(), strict=True):
                assert torch.equal(found, wanted)
                changed += not torch.equal(found, before[name])
            assert changed == 16
        assert bool(loops) == divided
        assert all(torch.equal(parameter, before[name]) for name, parameter in loaded.named_parameters())

    @pytest.mark.parametrize("room", ["for all", "for some"])
    @pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
    def test_what_is_kept_on_the_host_is_not_read_again(self, folder, loaded, tmp_path, device, room):
        shutil.copytree(folder / "model", tmp_path / "model")
        checkpoint = open_checkpoint(tmp_path / "model")
        plan = make_plan(checkpoint, read_directions(folder / "cue.directions.safetensors"), AblateOptions())
        keep = sum(edit.end - edit.start for edit in plan.edits) - (room == "for some")
        loaded.to(device)
        before = {name: parameter.clone() for name, parameter in loaded.named_parameters()}
        with EditableModel(checkpoint, loaded, RunOptions(device=device), keep=keep) as model:
            first = digest_of(model.apply(plan))
            assert all(kept.is_pinned() == (device == "cuda") for kept in model._kept.values())
            shard = checkpoint.shards[0].path
            content = bytearray(shard.read_bytes())
            for edit in plan.edits:
                content[edit.start : edit.end] = bytes(edit.end - edit.start)
            with shard.open("r+b") as file:  # the same file, which is open
                file.write(content)
            second = digest_of(model.apply(plan))
        assert (second == first) == (room == "for all")
        changed = {name for name, parameter in loaded.named_parameters() if not torch.equal(parameter, before[name])}
        assert len(changed) == (room == "for some")

    def test_in_another_type_it_is_converted(self, folder):
        from transformers import AutoModelForCausalLM

        loaded = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
        checkpoint = open_checkpoint(folder / "model")
        directions = read_directions(folder / "cue.directions.safetensors")
        name = "model.layers.5.mlp.down_proj.weight"
        before = loaded.get_parameter(name).clone()
        with EditableModel(checkpoint, loaded, RunOptions()) as model:
            model.apply(make_plan(checkpoint, directions, AblateOptions()))
            edited = loaded.get_parameter(name).clone()
        assert torch.equal(edited, edited.bfloat16().float())
        assert not torch.equal(edited, before)
        assert torch.equal(loaded.get_parameter(name), before)

    def test_a_model_that_is_not_the_checkpoint(self, folder, loaded):
        checkpoint = open_checkpoint(folder / "model")
        directions = read_directions(folder / "cue.directions.safetensors")
        with torch.no_grad():
            loaded.get_parameter("model.layers.5.mlp.down_proj.weight").add_(1)
        with (
            EditableModel(checkpoint, loaded, RunOptions()) as model,
            pytest.raises(SearchError, match=r"layers\.5\.mlp\.down_proj\.weight: no parameter of the loaded model"),
        ):
            model.apply(make_plan(checkpoint, directions, AblateOptions()))


class TestSpace:
    def test_a_setting_is_an_edit(self):
        made = space({"source": "one", "linear-attention": False})
        setting = {
            **{"contrast": "a", "source": "one", "source-layer": 3.5, "preserve": "rows", "rank": 1},
            **{"without": "t", "biproject": True, "layers": "1-6"},
            **{f"{part}.{name}": 1.0 for part in ("attention", "mlp") for name in ("peak", "place", "reach", "floor")},
        }
        edit = made.edit(setting)
        assert (edit.contrast, edit.without, edit.options.source_layer) == ("a", "t", 3.5)
        assert edit.options.layers == frozenset(range(1, 7))
        assert [profile.components for profile in edit.options.profiles] == [("attention",), ("mlp",)]
        assert edit.options.coefficient == 0.0
        assert made.edit({**setting, "contrast": "a+b"}).options.source_layer == 4

    def test_the_plain_edit_is_in_it(self):
        options = space().edit(space().plain()).options
        assert options.source_layer == "own"
        assert {profile.coefficient(layer) for profile in options.profiles for layer in range(8)} == {1.0}

    def test_what_is_tried_first(self):
        starts = space().starts({"a": (5, 7)})
        assert starts[0] == space().plain()
        tried = [(start["contrast"], start["source"], start.get("source-layer")) for start in starts]
        first = [("a", "own", None), ("a", "one", 5.0), ("a", "one", 7.0)]
        among = [("a", "one", layer) for layer in (3.3, 4.6, 5.8)]
        assert tried == [*first, *among, ("b", "own", None), *first, ("b", "own", None)]
        for start, coefficient in zip(starts, 7 * [1.0] + 4 * [1.25], strict=True):
            profiles = space().edit(start).options.profiles
            assert {each.coefficient(layer) for each in profiles for layer in range(8)} == {coefficient}
        assert space({"source": "one", "source-layer": 3.5}).starts({})[0]["source-layer"] == 3.5

    @pytest.mark.parametrize(("sources", "low", "high"), [(range(8), 2.1, 7), (range(4, 7), 4, 6), ((0, 1), 1, 1)])
    def test_one_layer_is_one_that_has_a_direction(self, sources, low, high):
        found = space(sources=sources).parameters["source-layer"]
        assert (found.low, found.high) == (low, high)

    def test_what_a_recipe_fixes_is_fixed(self):
        made = space({"contrast": "a", "mlp": {"peak": 1.5, "floor": [0.2, 0.4]}})
        assert made.parameters["contrast"] == Choice(("a",))
        assert made.parameters["mlp.peak"] == Number(1.5, 1.5, 0.01)
        assert (made.parameters["mlp.floor"].low, made.parameters["mlp.floor"].high) == (0.2, 0.4)
        assert {"contrast", "mlp.peak"}.isdisjoint(made.free)

    @pytest.mark.parametrize(
        ("table", "says"),
        [
            ({"mpl": False}, r"unknown key 'mpl'; the nearest known one is 'mlp'"),
            ({"mlp": {"peek": 1}}, r"mlp: unknown key 'peek'; the nearest known one is 'peak'"),
            ({"mlp": {"peak": [2, 1]}}, r"mlp: peak: expected the smaller number first, found \[2, 1\]"),
            ({"mlp": {"peak": ["a", 1]}}, r"mlp: peak: expected a number, or two between which it lies"),
            ({"mlp": 3}, r"mlp: expected a table with peak, place, reach, floor, or false, found 3"),
            ({"mlp": {"reach": 0}}, r"mlp: reach: expected more than 0 layers, found 0"),
            ({"contrast": "c"}, r"contrast: expected some of a, b, a\+b, found \"c\""),
            ({"rank": 2}, r"rank: the directions have 1 per layer, found 2"),
            ({"layers": "7-3"}, r"layers: expected numbers and ranges such as 1-23,30"),
            ({"layers": ["all", "3-8"]}, r"layers: the model has layers from 0 to 7, found \"3-8\""),
            ({"source-layer": [5, 9]}, r"source-layer: the directions have layers from 0 to 7, found \[5, 9\]"),
            (dict.fromkeys(PARTS, False), r"leaves out every part of the model"),
            ({"contrast": []}, r"contrast: expected values to choose from, each once, found \[\]"),
            (
                {"source": "own", "contrast": "a", "without": "none"}
                | {part: {"peak": 1, "place": 1, "reach": 1, "floor": 1} for part in PARTS},
                r"fixes every parameter",
            ),
        ],
    )
    def test_what_it_cannot_be(self, table, says):
        with pytest.raises(UsageError, match=rf"\[search\.space\]: {says}"):
            space(table)


class TestQuestions:
    def question(self, number, group="core", **fields):
        return Question(**{"id": f"{group}-{number}", "language": "en", "group": group, "prompt": f"{group} {number}?",
                           "rubric": None, **fields})  # fmt: skip

    def test_too_few(self):
        questions = [self.question(number) for number in range(9)] + [self.question(0, "unrelated")]
        with pytest.raises(UsageError, match=r"1 of 10 questions are unrelated, which leaves none for the \w+"):
            deal(questions)

    def test_the_same_questions_whatever_their_order(self):
        questions = [self.question(number, group) for number in range(15) for group in ("core", "unrelated")]
        one, other = deal(questions), deal(questions[::-1])
        for part in ("trials", "choice", "report"):
            assert {each.id for each in getattr(one, part)} == {each.id for each in getattr(other, part)}

    def test_a_report_of_its_own(self):
        questions = [self.question(number, group) for number in range(6) for group in ("core", "unrelated")]
        others = [self.question(number, group) for number in range(6, 9) for group in ("core", "unrelated")]
        parts = deal(questions, others)
        assert parts.report == tuple(others)
        assert len(parts.trials) + len(parts.choice) == len(questions)
        with pytest.raises(UsageError, match="core-0 asks what core-0 of --questions asks"):
            deal(questions, [*others, self.question(0)])

    def test_one_prompt_stays_together(self):
        twins = [self.question(number, prompt="Twice?") for number in range(2)]
        questions = [self.question(number, group) for number in range(2, 12) for group in ("core", "unrelated")]
        parts = deal([*questions, *twins])
        dealt = [{each.id for each in part} for part in (parts.trials, parts.choice, parts.report)]
        assert any({each.id for each in twins} <= part for part in dealt)


class TestChoice:
    def candidate(self, trial, lean, kl, right=8):
        answers = tuple(_Answer(None, "slanted") for _ in range(4)) + tuple(
            _Answer(True, "neutral", given=number < right) for number in range(10)
        )
        return Candidate(trial, {}, {"lean": lean, "kl": kl}, answers)

    def test_the_largest_effect_within_the_budget(self):
        base = self.candidate(None, -3, 0)
        found = [self.candidate(1, -2, 0.01), self.candidate(2, -1, 0.2), self.candidate(3, -1.5, 0.04),
                 self.candidate(4, -1.2, 0.03, right=6)]  # fmt: skip
        lean = _Objective("lean", "maximize")
        assert choose(found, base, [lean], Budget(kl=0.05, controls=0.1), "j").trial == 3
        assert choose(found, base, [lean], Budget(kl=0.05, controls=0.5), "j").trial == 4
        with pytest.raises(
            SearchError, match=r"j: none of 4 .* trial 1, moves .* 0\.01 nats .*, 0\.009 above the 0\.001 "
        ):
            choose(found, base, [lean], Budget(kl=0.001), "j")

    def test_the_nearest_is_by_all_limits(self):
        """The least divergence is not the nearest where it loses most controls; and what is over is said, all of it."""
        base, lean = self.candidate(None, -3, 0, right=10), _Objective("lean", "maximize")
        found = [self.candidate(0, -1, 0.01, right=2), self.candidate(1, -1, 0.06, right=8)]
        with pytest.raises(SearchError) as refused:
            choose(found, base, [lean], Budget(), "j")
        assert str(refused.value) == (
            "j: none of 2 candidates is within the budget; the nearest, trial 1, moves unrelated answers by 0.06 nats "
            "a token, 0.01 above the 0.05 of --kl; answers 20% of the controls no longer right, 10% above the 10% of "
            "--controls. Raise --kl and --controls, or search on; finished trials are kept"
        )
        # A limit of nothing has no multiples, but is not nearer for that.
        with pytest.raises(SearchError, match=r"the nearest, trial 1, .*20% above the 0% of"):
            choose(found, base, [lean], Budget(kl=1, controls=0), "j")
        with pytest.raises(SearchError, match=r"trial 0, .* Raise --controls, or"):
            choose([self.candidate(5, math.nan, 0.0), found[0]], base, [lean], Budget(), "j")

    def test_one_that_no_longer_speaks_of_what_was_asked_is_over_the_budget(self):
        def candidate(trial, lean, subject):
            made = self.candidate(trial, lean, 0.01)
            return dataclasses.replace(made, values={**made.values, "subject": subject})

        base, lean = candidate(None, -3, 0.0), _Objective("lean", "maximize")
        found = [candidate(1, -1, 1.8), candidate(2, -2, 0.09)]
        assert choose(found, base, [lean], Budget(), "j").trial == 2
        assert choose(found, base, [lean], Budget(subject=2), "j").trial == 1
        with pytest.raises(SearchError, match=r"trial 1, takes 1\.8 nats a token from the words"):
            choose(found[:1], base, [lean], Budget(), "j")

    def test_the_least_cost_of_the_plain_edits_effect(self):
        base = self.candidate(None, -3, 0)
        found = [self.candidate(0, -2, 0.02), self.candidate(1, -1.9, 0.01), self.candidate(2, -1, 0.04),
                 self.candidate(3, -2.5, 0.001)]  # fmt: skip
        lean = _Objective("lean", "maximize")
        assert choose(found, base, [lean], Budget(), "j", rule="cost", plain=0).trial == 1
        assert choose(found, base, [lean], Budget(), "j").trial == 2

    def test_of_equal_effect_the_next_objective_decides(self):
        """Shares of few answers are equal often; then not what costs least is best, but what turns them by most."""

        def candidate(trial, slanted, former, kl):
            made = self.candidate(trial, 0, kl)
            return dataclasses.replace(made, values={"slanted": slanted, "former": former, "kl": kl})

        base = candidate(None, 0.7, -0.3, 0)
        slanted, former = _Objective("slanted", "minimize"), _Objective("former", "maximize")
        found = [candidate(1, 0.0, 0.1, 0.001), candidate(2, 0.0, 0.3, 0.02), candidate(3, 0.1, 0.9, 0.01)]
        assert choose(found, base, [slanted, former], Budget(), "j").trial == 2
        assert choose(found, base, [slanted], Budget(), "j").trial == 1
        assert choose(found, base, [slanted, former], Budget(), "j", rule="cost", plain=3).trial == 1
        trials = [Trial(each.trial, {}, Tried(each.values, 0.0, 1.0, "")) for each in found]
        assert [trial.number for trial in best_of(trials, [slanted, former])] == [2, 3]
        # 92 % of the gain at a tenth of the cost; then 87 %, which is too little.
        cheap = candidate(4, 0.0, 0.25, 0.002)
        assert choose([*found, cheap], base, [slanted, former], Budget(), "j").trial == 4
        assert choose([*found, candidate(5, 0.0, 0.22, 0.002)], base, [slanted, former], Budget(), "j").trial == 2
        # Where nothing is gained, nothing is given up.
        worse = [candidate(1, 0.0, -0.4, 0.02), candidate(2, 0.0, -0.41, 0.01)]
        assert choose(worse, base, [slanted, former], Budget(), "j").trial == 1

    def test_the_front(self):
        objectives = [_Objective("lean", "maximize"), _Objective("kl", "minimize")]
        values = [(-3, 0.1), (-2, 0.1), (-2, 0.05), (-1, 0.5), (math.nan, 0.0)]
        trials = [
            Trial(number, {}, Tried({"lean": lean, "kl": kl}, 0.0, 1.0, "")) for number, (lean, kl) in enumerate(values)
        ]
        assert [trial.number for trial in best_of(trials, objectives)] == [3, 2]
        assert [trial.number for trial in spread(trials, 2)] == [0, 4]


@dataclasses.dataclass
class _Answer:
    exact: bool | None
    verdict: str
    given: bool | None = None


@dataclasses.dataclass
class _Objective:
    name: str
    direction: str
    base: float = 0.0


class TestContrasts:
    def directions(self, folder, seed):
        made = read_directions(folder / "cue.directions.safetensors")
        rng = np.random.default_rng(seed)
        rows = {layer: rng.standard_normal((1, made.hidden_size)) for layer in made.layers}
        rows = {layer: (row / np.linalg.norm(row)).astype(np.float32) for layer, row in rows.items()}
        return dataclasses.replace(made, basis=rows)

    def test_two_together_and_one_without_another(self, folder):
        one, two = self.directions(folder, 1), self.directions(folder, 2)
        contrasts = Contrasts({"one": one, "two": two}, {"two": two})
        assert contrasts.names == ("one", "two", "one+two")
        both = contrasts.directions("one+two")
        assert both.rank == 2
        for layer in both.layers:
            for row in (one.basis[layer][0], two.basis[layer][0]):
                assert np.linalg.norm(both.basis[layer] @ row) == pytest.approx(1, abs=1e-6)
        left = contrasts.directions("one", without="two")
        assert max(abs(float(left.basis[layer][0] @ two.basis[layer][0])) for layer in left.layers) < 1e-6
        assert contrasts.directions("one") is one


class TestProfiles:
    def test_a_profile_is_a_key_of_a_recipe(self, folder, tmp_path):
        (tmp_path / "r.toml").write_text(
            '[ablate]\nsource-layer = 3.5\n[[ablate.profile]]\ncomponents = "mlp"\npeak = 1.5\nplace = 4\nreach = 2\n'
            '[[ablate.profile]]\ncomponents = ["attention"]\npeak = 1\nplace = 0\nreach = 1\nfloor = 0.25\n'
        )
        source, directions = folder / "model", folder / "cue.directions.safetensors"
        recipe = ("--recipe", tmp_path / "r.toml")
        plan = json.loads(
            checked("ablate", source, tmp_path / "o", "-d", directions, *recipe, "--dry-run", "--json").stdout
        )
        coefficients = {(edit["layer"], edit["component"]): edit["coefficient"] for edit in plan["edits"]}
        assert {layer: value for (layer, part), value in coefficients.items() if part == "mlp"} == {
            3: 0.75, 4: 1.5, 5: 0.75,
        }  # fmt: skip
        assert {value for (layer, part), value in coefficients.items() if part == "attention" and layer} == {0.25}
        assert any(skip["reason"] == "its coefficient is 0" for skip in plan["skipped"])
        checked("ablate", source, tmp_path / "o", "-d", directions, *recipe, "-q")
        assert "to the bit" in checked("verify", source, tmp_path / "o").output
        receipt = json.loads((tmp_path / "o" / "ablation.json").read_text())
        assert {tensor["source_layer"] for tensor in receipt["tensors"]} == {3.5}
        assert set(receipt["directions"]["basis"]) == {"3", "4"}

    def test_between_two_layers_lies_their_mean(self, folder):
        checkpoint = open_checkpoint(folder / "model")
        directions = read_directions(folder / "cue.directions.safetensors")
        plan = make_plan(checkpoint, directions, AblateOptions(source_layer=3.25, biproject=False))
        (basis,) = plan.bases.values()
        mean = 0.75 * directions.basis[3][0].astype(np.float64) + 0.25 * directions.basis[4][0]
        assert basis[0] == pytest.approx(mean / np.linalg.norm(mean), abs=1e-7)

    def test_a_height(self):
        profile = Profile(("mlp",), peak=2.0, place=3.0, reach=4.0, floor=1.0)
        assert [profile.coefficient(layer) for layer in (3, 5, 7, 11)] == [2.0, 1.5, 1.0, 1.0]

    @pytest.mark.parametrize(
        ("lines", "says"),
        [
            ('components = "mlp"\npeak = 1\nplace = 0\nreach = 0', "reach: expected more than 0 layers, found 0"),
            ('components = "mpl"\npeak = 1\nplace = 0\nreach = 1', "expected some of attention, linear-attention"),
            ('components = "mlp"\nplace = 0\nreach = 1', "expected peak"),
        ],
    )
    def test_what_it_cannot_be(self, folder, tmp_path, lines, says):
        (tmp_path / "r.toml").write_text(f"[[ablate.profile]]\n{lines}\n")
        given = ("-d", folder / "cue.directions.safetensors", "--recipe", tmp_path / "r.toml")
        assert says in checked("ablate", folder / "model", tmp_path / "o", *given, code=2).output


class TestCommand:
    def test_a_dry_run_shows_the_space(self, folder, tmp_path):
        shown = checked(*arguments(folder, tmp_path / "o.toml", "--dry-run")).output
        assert "linear-attention.peak" in shown
        assert not list(tmp_path.iterdir())

    def test_a_recipe_holds_options_and_space(self, folder, tmp_path):
        recipe = tmp_path / "r.toml"
        recipe.write_text('[search]\ntrials = 7\n[search.space]\nsource = "own"\nmlp = false\n')
        shown = checked(*arguments(folder, tmp_path / "o.toml", "--recipe", recipe, "--dry-run")).output
        assert "mlp.peak" not in shown
        assert '["own"]' in shown

    @pytest.mark.parametrize(
        ("more", "says"),
        [
            (("--objective", "nothing"), "expected one of lean, kl"),
            (("--objective", "no.such:thing"), "cannot be imported"),
            (("--objective", "kl,kl"), "expected each name once"),
            (("--timeout", "-1"), "expected more than 0 minutes"),
            (("--subject", "0"), "--subject: expected more than 0, found 0"),
            (("--subject", "nan"), "--subject: expected a number, found nan"),
            (("--kl", "inf"), "--kl: expected a number, found inf"),
            (("--space", "{"), "Invalid value for '--space'"),
        ],
    )
    def test_what_it_refuses(self, folder, tmp_path, more, says):
        assert says in checked(*arguments(folder, tmp_path / "o.toml", *more), code=2).output

    def test_a_model_that_does_not_fit(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr("ablate_shards.surgery.search.bench.free_memory", lambda _: 1_000_000)
        refused = checked(*arguments(folder, tmp_path / "o.toml"), code=1)
        assert re.search(r"its weights take [\d.]+ MB in float32, but 1 MB are free on cpu", refused.output)

    def test_no_directions(self, folder, tmp_path):
        assert "no directions given" in checked("search", folder / "model", tmp_path / "o.toml", code=2).output
        named = run("search", folder / "model", tmp_path / "o.json", "-d", folder / "cue.directions.safetensors")
        assert "expected the name of a recipe" in named.output

    def test_the_subject_is_what_the_unedited_answers_repeat(self, folder):
        import torch

        questions = load_questions(folder / "q.jsonl")
        with speaking(folder / "model", dtype="float32", device="cpu") as speaker:
            subject = find_objective("subject")(speaker, questions, Asking(questions=None))
            assert subject.measure(speaker) == pytest.approx(0, abs=1e-6)

            head = speaker.network.get_output_embeddings().weight

            def likelihoods():
                for forced, places in zip(subject._forced, subject._repeated, strict=True):
                    ids = torch.tensor([[*forced.prompt, *forced.response]])
                    with torch.no_grad():
                        logs = speaker.network(ids).logits[0].double().log_softmax(-1)
                    for place in places:
                        assert place > 0
                        word = speaker.tokenizer.decode([forced.response[place]]).strip()
                        assert word.casefold() in speaker.tokenizer.decode(forced.prompt).casefold()
                        yield float(logs[len(forced.prompt) + place - 1, forced.response[place]])

            before = list(likelihoods())
            with torch.no_grad():
                head.mul_(0.5)
            wanted = [b - a for b, a in zip(before, likelihoods(), strict=True)]
            found = subject.measure(speaker)

            controls = [question for question in questions if question.group == "unrelated"]
            with pytest.raises(UsageError, match="no answer to a contested question of this part repeats a word"):
                find_objective("subject")(speaker, controls, Asking())

        assert found == pytest.approx(sum(wanted) / len(wanted), rel=1e-4)
        assert found > 0.01

    def test_former_answers_are_likely_by_how_they_begin(self, folder):
        questions = load_questions(folder / "q.jsonl")
        with speaking(folder / "model", dtype="float32", device="cpu") as speaker:
            former = find_objective("former")(speaker, questions, Asking(tokens=24))
            signs = {-1: 0.0, 1: 0.0}
            for forced, sign in zip(former._forced, former._signs, strict=True):
                assert 0 < len(forced.response) <= 8
                ids = torch.tensor([[*forced.prompt, *forced.response]])
                with torch.no_grad():
                    logs = speaker.network(ids).logits[0].double().log_softmax(-1)[len(forced.prompt) - 1 : -1]
                signs[sign] += math.exp(float(logs.gather(-1, torch.tensor(forced.response)[:, None]).sum()))
            assert former.base == pytest.approx((signs[1] - signs[-1]) / len(former._signs), rel=1e-4)
            assert min(signs.values()) > 0
            impartial = [question for question in questions if question.group != "core"]
            with pytest.raises(UsageError, match="no answer to a question of this part is slanted"):
                find_objective("former")(speaker, impartial, Asking(tokens=24))

    def test_a_divergence_is_of_more_questions_than_a_lean(self, folder):
        asked = [Question(f"u-{number}", "en", "unrelated", f"What is {number}?") for number in range(120)]
        with speaking(folder / "model", dtype="float32", device="cpu") as speaker:
            counts = [len(find_objective("kl")(speaker, asked, asking)._forced) for asking in (
                Asking(forced=2, batch=64), Asking(forced=2, batch=64).thorough())]  # fmt: skip
        assert counts == [100, 120]

    def test_an_objective_of_ones_own(self, folder, tmp_path, monkeypatch):
        (tmp_path / "mine.py").write_text(
            "class Size:\n"
            "    name, direction, base = 'size', 'minimize', 0.0\n"
            "    def __init__(self, speaker, questions, asking): pass\n"
            "    def measure(self, speaker):\n"
            "        weight = speaker.network.get_parameter('model.layers.5.mlp.down_proj.weight')\n"
            "        return float(weight.detach().float().norm())\n"
        )
        page = (Path(__file__).parents[1] / "docs" / "search.md").read_text(encoding="utf-8")
        (documented,) = re.findall(r"^    class Refusals:\n(?:    .*\n|\n)+", page, flags=re.MULTILINE)
        # The demo refuses nothing, but it can be slanted.
        (tmp_path / "refusals.py").write_text(textwrap.dedent(documented).replace('"cannot"', '"belongs to"'))
        monkeypatch.chdir(tmp_path)
        out = tmp_path / "o.toml"
        checked(*arguments(folder, out, "--objective", "refusals:Refusals,mine:Size,kl", trials=3))
        record = json.loads((tmp_path / "o.search.json").read_text())
        assert [objective["name"] for objective in record["objectives"]] == ["refusals", "size", "kl"]
        assert all(trial["values"]["size"] > 0 for trial in record["trials"])
        assert {trial["values"]["refusals"] for trial in record["trials"]} <= {n / 60 for n in range(61)}

    @pytest.mark.parametrize(
        ("objective", "says"),
        [
            ("raise ValueError('nothing to see')", "--objective own:It: ValueError: nothing to see; correct it"),
            ("return 'much'", "--objective own:It: ValueError: could not convert string to float: 'much'; correct it"),
            ("return 1.0", None),
            (
                "return 1.0\n    direction = 'up'",
                "--objective own:It: expected the direction minimize or maximize, found",
            ),
            ("return 1.0\n    del name", "--objective own:It: AttributeError: 'It' object has no attribute 'name'"),
            ("return 1.0)", "--objective own:It: cannot be imported (unmatched ')'"),
        ],
    )
    def test_what_is_wrong_with_ones_own(self, tmp_path, monkeypatch, objective, says):
        (tmp_path / "own.py").write_text(
            "class It:\n    name, direction, base = 'it', 'minimize', 0\n    def __init__(self, *_): pass\n"
            f"    def measure(self, speaker): {objective}\n"
        )
        monkeypatch.chdir(tmp_path)
        monkeypatch.delitem(sys.modules, "own", raising=False)

        def measured():
            return find_objective("own:It")(None, (), Asking()).measure(None)

        if says is None:
            assert measured() == 1.0
        else:
            with pytest.raises((SearchError, UsageError), match=re.escape(says)):
                measured()


def test_a_search_is_a_stage_of_a_run(folder, tmp_path):
    questions = (folder / "q.jsonl").read_text().splitlines()
    for name, lines in (("tried", questions[::2]), ("asked", questions[1::2])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "r.toml").write_text(
        f'[source]\nsource = "{folder / "model"}"\nout = "out"\n[directions]\npairs = "{folder / "pairs.jsonl"}"\n'
        'dtype = "float32"\n[search]\nquestions = "tried.jsonl"\nreport-questions = "asked.jsonl"\ntrials = 2\n'
        'length = 16\nfront = 1\ndtype = "float32"\n[search.space]\nsource = "own"\n'
        '[evaluate]\nquestions = "asked.jsonl"\nlength = 16\nperplexity = false\ndtype = "float32"\n'
    )
    first = checked("run", tmp_path / "r.toml")
    assert "search" in first.output
    work = tmp_path / "out.work"
    found = tomllib.loads((work / "found.toml").read_text())
    receipt = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert receipt["recipe"]["profile"][0]["peak"] == found["ablate"]["profile"][0]["peak"]
    assert load_file(work / "found.directions.safetensors")
    again = checked("run", tmp_path / "r.toml", "--dry-run")
    assert again.output.count("done before") == 5
    (tmp_path / "r.toml").write_text((tmp_path / "r.toml").read_text().replace("asked.jsonl", "tried.jsonl"))
    assert "would not measure what carries over" in checked("run", tmp_path / "r.toml", code=2).output
