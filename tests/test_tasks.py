"""Tasks of lm-evaluation-harness, on the demo model and an edited one, and the statistics against their definitions."""

import dataclasses
import itertools
import json
import os
import shutil
import socket
import statistics
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from progress import Heard
from safetensors.torch import load_file, save_file
from test_loading import DEAF, PARTS

from ablate_shards.data.demo import MODEL
from ablate_shards.errors import EvaluateError, UsageError
from ablate_shards.surgery.evaluate import tasks as station
from ablate_shards.surgery.evaluate.answers import speaking
from ablate_shards.surgery.evaluate.resampling import mean_interval, sign_flip_p
from ablate_shards.surgery.evaluate.statistics import paired, ratio
from ablate_shards.surgery.evaluate.tasks import TaskScore, compare_tasks, open_tasks, run_tasks

COLOURS = {
    "a lemon": "yellow",
    "snow": "white",
    "coal": "black",
    "grass": "green",
    "a ripe tomato": "red",
    "the clear sky": "blue",
    "a carrot": "orange",
    "milk": "white",
    "a raven": "black",
    "a frog": "green",
    "a flamingo": "pink",
    "chocolate": "brown",
}
OPPOSITES = ("hot cold", "big small", "fast slow", "early late", "light dark", "full empty", "young old", "open closed")

CHOICE = """\
task: colours
dataset_path: json
dataset_kwargs: {data_files: {test: colours.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "<|im_start|>user\\nWhat colour is {{thing}}?<|im_end|>\\n\
<|im_start|>assistant\\nThe colour of {{thing}} is"
doc_to_choice: choices
doc_to_target: right
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
GENERATE = """\
task: opposites
dataset_path: json
dataset_kwargs: {data_files: {test: opposites.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "What is the opposite of {{word}}?"
doc_to_target: "The opposite of {{word}} is {{other}}."
generation_kwargs: {until: ["<|im_end|>"], max_gen_toks: 16}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
#: A score that is no 0 and no 1, by code beside the task file.
GRADED = """\
task: graded
include: colours.yaml
doc_to_text: !function scoring.ask
process_results: !function scoring.score
metric_list: [{metric: margin, aggregation: mean, higher_is_better: true}]
"""
SCORING = """\
import math


def ask(doc):
    question = f"What colour is {doc['thing']}?"
    return f"<|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\nThe colour of {doc['thing']} is"


def score(doc, results):
    weights = [math.exp(likelihood) for likelihood, _ in results]
    return {"margin": weights[doc["right"]] / sum(weights)}
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The package, with what it keeps in a folder of the tests, and few of its tasks, for it takes long to list all."""
    pytest.importorskip("lm_eval")
    import datasets
    from lm_eval.tasks import manager

    listed = tmp_path_factory.mktemp("tasks")
    for name in ("arc", "hellaswag", "humaneval"):
        shutil.copytree(Path(manager.__file__).parent / name, listed / name)
    station._standard_tasks.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(manager, "__file__", str(listed / "manager.py"))
        yield
    station._standard_tasks.cache_clear()


def write_tasks(folder):
    rows = []
    for number, (thing, colour) in enumerate(COLOURS.items()):
        others = [other for other in dict.fromkeys(COLOURS.values()) if other != colour]
        choices = [others[number % len(others)], others[(number + 3) % len(others)]]
        choices.insert(number % 3, colour)
        rows.append({"thing": thing, "choices": choices, "right": number % 3})
    (folder / "colours.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pairs = [pair.split() for pair in OPPOSITES]
    rows = [{"word": word, "other": other} for a, b in pairs for word, other in ((a, b), (b, a))][:12]
    (folder / "opposites.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "scoring.py").write_text(SCORING)
    for name, text in (("colours", CHOICE), ("opposites", GENERATE), ("graded", GRADED)):
        (folder / f"{name}.yaml").write_text(text)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Task files with data beside them, and a model that was made from the demo's by noise."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    shutil.copytree(MODEL, folder / "edited")
    weights = load_file(folder / "edited" / "model.safetensors")
    for layer in range(8):
        name = f"model.language_model.layers.{layer}.mlp.down_proj.weight"
        noise = torch.randn(weights[name].shape, generator=torch.Generator().manual_seed(layer))
        weights[name] += (2.5 * weights[name].float().std() * noise).bfloat16()
    save_file(weights, folder / "edited" / "model.safetensors", metadata={"format": "pt"})
    return folder


class Told(Heard):
    """Hears all that a run says, which has nothing to note."""

    def note(self, text):
        raise AssertionError(text)


def scores(folder, tasks, told=None, **options):
    with speaking(Path(folder), dtype="auto", device="cpu") as speaker:
        return run_tasks(speaker, tasks, **{"batch": 4, "limit": None, "progress": told or Told(), **options})


@pytest.fixture(scope="module")
def opened(harness, files):
    return open_tasks([str(files / "tasks")])


@pytest.fixture(scope="module")
def base(opened):
    return scores(MODEL, opened)


@pytest.fixture(scope="module")
def edited(opened, files):
    return scores(files / "edited", opened)


def test_a_folder_is_all_its_task_files(opened):
    assert opened.names == ("colours", "graded", "opposites")
    assert opened.count(None) == 36
    assert opened.count(5) == 15


def test_the_demo_knows_its_colours(base):
    colours, graded, _ = base

    assert (colours.metric, colours.value, colours.count) == ("acc", 1.0, 12)
    assert colours.higher_is_better
    assert colours.samples == (1.0,) * 12
    assert colours.interval == ratio([True] * 12).interval
    assert graded.metric == "margin"
    assert 0.9 < graded.value < 1
    assert graded.interval[0] < graded.value < graded.interval[1]
    assert graded.value == pytest.approx(statistics.fmean(graded.samples), rel=1e-12)


def test_what_is_generated_is_judged_and_the_chat_template_is_a_choice(opened, files, base):
    told = Told()
    task = open_tasks([str(files / "tasks" / "opposites.yaml")])

    (asked,) = scores(MODEL, task, told, chat=True)

    assert (asked.metric, asked.value, asked.count) == ("exact_match", 1.0, 12)
    assert base[2].value == 0.0
    assert told.counts[-1] == (12, 12)
    assert sorted(told.counts) == told.counts
    assert len(set(told.counts)) == 12


@pytest.mark.parametrize("template", [PARTS, DEAF])
def test_a_chat_template_that_drops_texts_is_not_scored_in_silence(files, base, tmp_path, template):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    task = open_tasks([str(files / "tasks" / "opposites.yaml")])
    if template == DEAF:
        with pytest.raises(
            EvaluateError, match="task opposites: a document: the chat template leaves out what the user"
        ):
            scores(model, task, chat=True)
    else:
        (asked,) = scores(model, task, chat=True)
        assert asked.value == 1.0


def test_an_edit_costs_ability(base, edited):
    colours, graded, opposites = compare_tasks(base, edited)

    assert colours.name == "colours"
    assert colours.before == 1.0
    assert colours.after == edited[0].value < 1
    assert colours.difference == pytest.approx(colours.after - colours.before)
    assert colours.interval[0] <= colours.difference <= colours.interval[1] <= 0
    assert colours.p == paired([value == 1 for value in base[0].samples], [value == 1 for value in edited[0].samples]).p
    assert graded.difference < 0
    assert graded.p == sign_flip_p(np.subtract(edited[1].samples, base[1].samples).tolist())
    assert opposites.difference == 0.0
    assert opposites.interval == (0.0, 0.0)
    assert opposites.p == 1.0


def test_the_same_inputs_give_the_same_scores(opened, files, base, edited):
    # The other model was asked in between, and each task alone gives what it gives among others.
    assert scores(MODEL, opened) == base
    assert scores(MODEL, open_tasks([str(files / "tasks" / "graded.yaml")])) == base[1:2]


def test_examples_are_drawn_alike_for_both_models(harness, tmp_path):
    write_tasks(tmp_path)
    (tmp_path / "shown.yaml").write_text(
        GRADED.replace("task: graded", "task: shown\nnum_fewshot: 2\nfewshot_split: test")
    )
    task = open_tasks([str(tmp_path / "shown.yaml")])
    prompts = []

    for _ in range(2):
        (score,) = scores(MODEL, task, limit=4)
        prompts.append([request.args[0] for request in task.asked[0].tasks[0].task.instances])

    assert prompts[0] == prompts[1]
    assert all(prompt.count("What colour is") == 3 for prompt in prompts[0])
    assert score == scores(MODEL, open_tasks([str(tmp_path / "shown.yaml")]), limit=4)[0]


def test_the_batch_changes_no_answer(files, base):
    (alone,) = scores(MODEL, open_tasks([str(files / "tasks" / "graded.yaml")]), batch=1)

    assert alone.samples == pytest.approx(base[1].samples, abs=1e-4)


def test_a_limit_takes_the_first_documents(opened, base):
    told = Told()
    limited = scores(MODEL, opened, told, limit=5)

    assert [score.count for score in limited] == [5, 5, 5]
    assert limited[1].samples == pytest.approx(base[1].samples[:5], abs=1e-4)
    assert told.counts[-1] == (15, 15)
    with pytest.raises(EvaluateError, match="task colours: the two models were not asked the same documents"):
        compare_tasks(base, limited)


def test_likelihoods_are_those_of_the_model(files, base):
    """The graded score, computed from the logits alone."""
    with speaking(Path(MODEL), dtype="auto", device="cpu") as speaker:
        for line, found in zip(
            (files / "tasks" / "colours.jsonl").read_text().splitlines(), base[1].samples, strict=True
        ):
            row = json.loads(line)
            before = (
                f"<|im_start|>user\nWhat colour is {row['thing']}?<|im_end|>\n<|im_start|>assistant\n"
                f"The colour of {row['thing']} is"
            )
            start, likelihoods = speaker.encode(before), []
            for choice in row["choices"]:
                tokens = speaker.encode(f"{before} {choice}")
                assert tokens[: len(start)] == start
                with torch.no_grad():
                    logits = speaker.network(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
                likelihoods.append(
                    sum(logits[place - 1, tokens[place]].item() for place in range(len(start), len(tokens)))
                )
            weights = np.exp(likelihoods)
            assert found == pytest.approx(weights[row["right"]] / weights.sum(), abs=1e-5)


def test_nothing_is_printed_and_the_model_is_left_as_it_was(harness, files, capfd):
    task = open_tasks([str(files / "tasks" / "colours.yaml")])
    with speaking(Path(MODEL), dtype="auto", device="cpu") as speaker:
        side, settings = speaker.tokenizer.padding_side, speaker.network.generation_config.to_dict()
        speaker.tokenizer.padding_side = "right"
        run_tasks(speaker, task, batch=4, limit=2, progress=Told())
        assert speaker.tokenizer.padding_side == "right"
        assert speaker.network.generation_config.to_dict() == settings
        assert "tie_weights" not in vars(speaker.network)
    assert side in ("left", "right")
    assert capfd.readouterr() == ("", "")


def test_tasks_of_ones_own_need_no_network(harness, tmp_path, monkeypatch):
    import datasets
    import huggingface_hub

    asked = []

    def reached(*address, **_):
        # The libraries forgive what fails, so what was tried is kept.
        asked.append(address)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, reached)
    monkeypatch.setattr(socket.socket, "connect", reached)
    before = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, os.environ.get("HF_EVALUATE_OFFLINE")
    write_tasks(tmp_path)

    assert len(scores(MODEL, open_tasks([str(tmp_path)]), limit=1)) == 3
    assert asked == []
    assert before == (datasets.config.HF_UPDATE_DOWNLOAD_COUNTS, os.environ.get("HF_EVALUATE_OFFLINE"))


def test_an_output_head_that_differs_from_the_embedding_stays(harness, files, tmp_path):
    """A configuration may say that the two are tied where the checkpoint holds two that are not."""
    shutil.copytree(MODEL, tmp_path / "untied")
    weights = load_file(tmp_path / "untied" / "model.safetensors")
    embedding = weights["model.language_model.embed_tokens.weight"]
    weights["lm_head.weight"] = embedding.flip(0).contiguous()
    save_file(weights, tmp_path / "untied" / "model.safetensors", metadata={"format": "pt"})
    task = open_tasks([str(files / "tasks" / "colours.yaml")])
    with speaking(tmp_path / "untied", dtype="auto", device="cpu") as speaker:
        head = speaker.network.get_output_embeddings().weight
        assert head.data_ptr() != speaker.network.get_input_embeddings().weight.data_ptr()
        before = head.clone()
        run_tasks(speaker, task, batch=4, limit=1, progress=Told())
        assert torch.equal(speaker.network.get_output_embeddings().weight, before)


# ---------------------------------------------------------------------------------------- refusals


def test_without_the_package_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(EvaluateError, match=r"lm_eval is not installed; `pip install 'ablate-shards\[tasks\]'`"):
        open_tasks(["hellaswag"])


def test_an_unknown_name_is_answered_with_near_ones(harness):
    with pytest.raises(UsageError, match=r"task helaswag: .*did you mean hellaswag"):
        open_tasks(["helaswag"])


@pytest.mark.parametrize(
    ("name", "text", "error", "words"),
    [
        ("none.yaml", None, UsageError, "there is no such task file or folder"),
        ("nowhere/", None, UsageError, "there is no such task file or folder"),
        ("list.yaml", "- a\n- b\n", EvaluateError, "found a YAML without keys"),
        ("other.yaml", "model: gpt\n", EvaluateError, "found a YAML without `task`"),
        ("broken.yaml", "task: [\n", EvaluateError, "found no YAML"),
        ("data.yaml", CHOICE.replace("colours.jsonl", "absent.jsonl"), EvaluateError, "cannot be read: .*absent"),
        (
            "hub.yaml",
            CHOICE.replace("metric: acc,", "metric: rouge, hf_evaluate: true,"),
            EvaluateError,
            "metric rouge is",
        ),
        (
            "code.yaml",
            f"{CHOICE}unsafe_code: true\n",
            EvaluateError,
            "task colours: it runs code that the model writes",
        ),
        ("output.yaml", CHOICE.replace("multiple_choice", "poem"), EvaluateError, "invalid output_type 'poem'"),
    ],
)
def test_what_is_no_task_is_refused(harness, tmp_path, name, text, error, words):
    write_tasks(tmp_path)
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(error, match=words):
        open_tasks([f"{tmp_path}/{name}"])


def test_a_folder_without_tasks_is_refused(harness, tmp_path):
    (tmp_path / "part.yaml").write_text("output_type: multiple_choice\n")
    with pytest.raises(EvaluateError, match="expected task files, found 1 YAML files without `task`"):
        open_tasks([str(tmp_path)])


def test_a_task_that_is_named_twice_is_refused(harness, files):
    with pytest.raises(UsageError, match="task colours: it is asked for twice"):
        open_tasks([str(files / "tasks"), str(files / "tasks" / "colours.yaml")])


def test_a_task_that_runs_what_the_model_writes_is_refused(harness):
    with pytest.raises(EvaluateError, match="task humaneval: it runs code that the model writes"):
        open_tasks(["humaneval"])


def test_data_that_cannot_be_fetched_are_one_sentence(harness):
    with pytest.raises(EvaluateError, match="task arc_easy: its data are not on this machine and cannot be fetched"):
        open_tasks(["arc_easy"])


def test_a_score_that_cannot_be_paired_is_refused(harness, tmp_path):
    write_tasks(tmp_path)
    rolling = (
        "task: prose\ndataset_path: json\ndataset_kwargs: {data_files: {test: colours.jsonl}}\ntest_split: test\n"
        'output_type: loglikelihood_rolling\ndoc_to_text: ""\ndoc_to_target: "{{thing}}"\n'
        "metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]\n"
    )
    (tmp_path / "prose.yaml").write_text(rolling)
    with pytest.raises(EvaluateError, match=r"task prose: its scores \(word_perplexity\) are no means"):
        open_tasks([str(tmp_path / "prose.yaml")])


def test_a_group_over_all_documents_has_one_score(harness, files, tmp_path, base):
    write_tasks(tmp_path)
    (tmp_path / "more.yaml").write_text(CHOICE.replace("task: colours", "task: more"))
    for name, weighted in (("pooled", "true"), ("apart", "false")):
        (tmp_path / f"{name}.yaml").write_text(
            f"group: {name}\ntask: [colours, more]\n"
            f"aggregate_metric_list: [{{metric: acc, aggregation: mean, weight_by_size: {weighted}}}]\n"
        )
    pooled = open_tasks([str(tmp_path / "pooled.yaml")])

    assert pooled.names == ("pooled",)
    assert open_tasks([str(tmp_path / "apart.yaml")]).names == ("colours", "more")
    (score,) = scores(MODEL, pooled)
    assert (score.name, score.count, score.samples) == ("pooled", 24, base[0].samples * 2)


def test_a_task_that_fails_says_so(harness, tmp_path):
    write_tasks(tmp_path)
    (tmp_path / "scoring.py").write_text(SCORING.replace('{"margin": ', '{"margin": math.nan * '))
    with pytest.raises(EvaluateError, match="task graded, document 0: expected a number as its margin, found nan"):
        scores(MODEL, open_tasks([str(tmp_path / "graded.yaml")]), limit=1)
    (tmp_path / "long.yaml").write_text(GENERATE.replace("max_gen_toks: 16", "max_gen_toks: 600"))
    with pytest.raises(EvaluateError, match="task opposites: lm-evaluation-harness cannot run it with this model"):
        scores(MODEL, open_tasks([str(tmp_path / "long.yaml")]), limit=1)


# ---------------------------------------------------------------------------------------- the statistics


def score(samples, **fields):
    plain = TaskScore("t", "f1", True, statistics.fmean(samples), len(samples), (0.0, 1.0), tuple(samples), "d")
    return dataclasses.replace(plain, **fields)


def test_the_interval_of_a_mean_is_that_of_many_draws():
    values = [0.0, 0.2, 0.2, 0.9, 1.5, -0.4, 0.3, 0.8]
    rng = np.random.default_rng(7)
    means = sorted(statistics.fmean(rng.choice(values, len(values))) for _ in range(20_000))

    low, high = mean_interval(values)

    assert low == pytest.approx(means[500], abs=0.02)
    assert high == pytest.approx(means[-500], abs=0.02)
    assert mean_interval(values) == (low, high)
    assert mean_interval([0.1, 0.1, 0.1]) == (0.1, 0.1)
    with pytest.raises(ValueError, match="no values"):
        mean_interval([])


def test_the_interval_covers_what_it_says():
    rng = np.random.default_rng(3)
    covered = sum(low <= 0.3 <= high for low, high in (mean_interval(rng.normal(0.3, 1, 60)) for _ in range(200)))

    assert 0.9 <= covered / 200 <= 0.99


def test_sign_flips_count_what_all_choices_of_signs_would():
    differences = [0.4, -0.1, 0.7, 0.0, 0.2, 0.3, -0.2, 0.5]
    moved = [value for value in differences if value]
    sums = [abs(sum(np.multiply(signs, moved))) for signs in itertools.product((1, -1), repeat=len(moved))]
    exact = statistics.fmean(value >= abs(sum(moved)) - 1e-9 for value in sums)

    assert sign_flip_p(differences) == pytest.approx(exact, abs=0.02)
    assert sign_flip_p([-value for value in differences]) == sign_flip_p(differences)
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert sign_flip_p([1.0] * 40) == 1 / 10_001


def test_many_documents_are_drawn_in_parts(monkeypatch):
    from ablate_shards.surgery.evaluate import resampling

    values = np.random.default_rng(5).normal(size=50).tolist()
    whole = mean_interval(values), sign_flip_p(values)
    monkeypatch.setattr(resampling, "_MOST_NUMBERS", 7 * 50)

    assert mean_interval(values) == pytest.approx(whole[0], abs=0.02)
    assert sign_flip_p(values) == pytest.approx(whole[1], abs=0.03)


def test_a_change_is_that_of_the_same_documents():
    before, after = score([0.0, 1.0, 0.5, 0.5]), score([0.5, 1.0, 0.5, 1.0])

    (change,) = compare_tasks([before], [after])

    assert (change.before, change.after, change.difference, change.count) == (0.5, 0.75, 0.25, 4)
    assert change.interval == mean_interval([0.5, 0.0, 0.0, 0.5])
    assert change.p == sign_flip_p([0.5, 0.5])
    for other in (score([0.0] * 4, documents="e"), score([0.0] * 4, name="u"), score([0.0] * 4, metric="acc")):
        with pytest.raises(EvaluateError, match="not asked the same documents"):
            compare_tasks([before], [other])


def test_the_metric_is_the_first_mean_or_the_normalised_accuracy(harness):
    from lm_eval.api.metrics import mean, perplexity

    class Task:
        task_name = "t"

        def __init__(self, **metrics):
            self.aggregation = lambda: metrics

    assert station._metric(Task(perplexity=perplexity, acc=mean)) == "acc"
    assert station._metric(Task(acc=mean, acc_norm=mean)) == "acc_norm"
    with pytest.raises(EvaluateError, match=r"its scores \(none\) are no means"):
        station._metric(Task())
