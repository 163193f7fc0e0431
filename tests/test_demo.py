"""The embedded demo: its model, its world, and what the main job does to its behaviour."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import checked
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.__main__ import main, prepare_demo
from ablate_shards.data.demo.behaviour import draw_pairs, draw_questions, load, measure
from ablate_shards.data.demo.samples import write_samples
from ablate_shards.data.demo.train import CONFIG, train
from ablate_shards.data.demo.world import HELD_OUT, NEUTRAL, SLANTED, answer, contested, judge, unrelated
from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation

STAGES = ("source", "ablated", "result")
QUESTIONS = draw_questions(loaded=48, impartial=32, unrelated_count=64, seed=3)
LAYERS = 8
#: The demo with a third of its questions: to answer them is most of its time.
SHORTER = """
import functools, sys
from ablate_shards.data.demo import samples
from ablate_shards.data.demo.__main__ import main

samples.draw_questions = functools.partial(samples.draw_questions, loaded=32, impartial=20, unrelated_count=60)
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    work = tmp_path_factory.mktemp("demo") / "work"
    command = [sys.executable, "-c", SHORTER, "--work", str(work)]
    return work, subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def evaluations(demo):
    work, _ = demo
    return {name: read_evaluation(work / "stages" / f"{name}.evaluation.json") for name in STAGES}


@pytest.fixture(scope="module")
def before():
    return measure(*load(MODEL), QUESTIONS)


def raw(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name).view(torch.uint8) for name in file.keys()}  # noqa: SIM118


def behaviour_after(tmp_path, dump, *options):
    out = tmp_path / "out"
    checked(MODEL, out, "-a", dump, *options)
    return measure(*load(out), QUESTIONS)


def test_the_demo_shows_the_main_job_end_to_end(demo):
    work, done = demo

    assert done.returncode == 0, done.stderr
    assert not done.stderr.count("Traceback")
    commands = [line.split()[2] for line in done.stdout.splitlines() if line.startswith("$ ablate-shards ")]
    stages = ["evaluate", "capture", "directions", "ablate", "evaluate", "finetune", "merge", "evaluate"]
    assert commands == ["inspect", "run", *stages, "verify"]
    written = re.findall(r"(?:written to|every answer is in) ([^\s,]+)", done.stdout)
    assert len(written) == len(stages)
    assert all(Path(path).exists() for path in written)
    assert f"{work / 'result'} is what its receipt says" in done.stdout
    checked("verify", work / "source", work / "stages" / "ablated")
    checked("verify", work / "stages" / "ablated", work / "result", "--adapter", work / "stages" / "adapter")


def test_the_demo_prints_what_its_files_hold(demo, evaluations):
    work, done = demo

    receipt = json.loads((work / "stages" / "ablated" / "ablation.json").read_text())
    shares = re.findall(r"^ +\d  (?:attention|mlp) .*? (\S+%) +(\S+%) +\S+% +0$", done.stdout, re.MULTILINE)
    assert sorted(shares) == sorted((f"{each['before']:.3%}", f"{each['after']:.3%}") for each in receipt["tensors"])
    assert len(shares) == 2 * LAYERS
    assert all(each["after"] < each["before"] / 10 for each in receipt["tensors"])

    contested = {name: [each for each in found.answers if each.exact is None] for name, found in evaluations.items()}
    slanted = {
        name: round(100 * sum(answer.verdict == "slanted" for answer in answers) / len(answers))
        for name, answers in contested.items()
    }
    for name in ("ablated", "result"):
        fell = f"Slanted answers fell: {slanted['source']} % → {slanted[name]} % of {len(contested[name])}, p = "
        assert f"after {name}: {fell}" in done.stdout
    for was, now in list(zip(evaluations["source"].answers, evaluations["result"].answers, strict=True))[:3]:
        assert f"\n{was.prompt}\n  before  {was.text}\n  after   {now.text}\n" in done.stdout


def test_the_stages_show_what_each_did(evaluations):
    found = evaluations
    slanted = {name: each.rows[0].verdicts["slanted"].value for name, each in found.items()}
    assert found["source"].rows[0].group == "core"
    assert slanted["source"] >= 0.9
    assert slanted["ablated"] <= 0.1
    assert slanted["result"] <= 0.1
    assert found["result"].comparison.divergence.tokens < 0.01
    assert all(each.controls[0].exact.value >= 0.9 for each in found.values())


def test_the_slant_goes_and_the_rest_stays(demo, before):
    work, _ = demo
    assert before.loaded["slanted"] >= 0.9
    assert before.impartial["neutral"] >= 0.9
    assert before.unrelated >= 0.9

    after = measure(*load(work / "stages" / "ablated"), QUESTIONS)

    assert after.loaded["slanted"] <= 0.1
    assert after.loaded["neutral"] >= 0.9
    assert after.impartial["neutral"] >= 0.9
    assert after.unrelated >= 0.9


def test_what_is_not_edited_stays_byte_for_byte(demo):
    work, _ = demo
    source, edited = raw(MODEL / "model.safetensors"), raw(work / "stages" / "ablated" / "model.safetensors")

    changed = {name for name in source if not torch.equal(source[name], edited[name])}

    assert changed == {
        f"model.language_model.layers.{layer}.{writer}.weight"
        for layer in range(LAYERS)
        for writer in ("mlp.down_proj", "self_attn.o_proj" if layer % 4 == 3 else "linear_attn.out_proj")
    }
    assert sum(name.startswith("mtp.") for name in source) == 15
    assert any(name.startswith("model.visual.") for name in source)


def test_a_former_demo_is_replaced_and_nothing_else(tmp_path, capsys):
    work, letters = tmp_path / "work", tmp_path / "letters"
    prepare_demo(work)
    (work / "result").mkdir()
    (work / "notes.txt").write_text("keep me")
    letters.mkdir()
    (letters / "letter.txt").write_text("keep me")

    prepare_demo(work)
    with pytest.raises(SystemExit) as refused:
        main(["--work", str(letters)])

    made = {"source", "recipe.toml", "pairs.jsonl", "instructions.jsonl", "questions.jsonl", "neutral.txt"}
    assert {path.name for path in work.iterdir()} == {".ablate-shards-demo", "notes.txt", *made}
    assert refused.value.code == 2
    assert "is not empty and not a former demo" in capsys.readouterr().err
    assert [path.name for path in letters.iterdir()] == ["letter.txt"]


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    write_samples(folder)
    dump = folder / "dump.safetensors"
    checked("capture", MODEL, dump, "--pairs", folder / "pairs.jsonl", "--dtype", "float32")
    return dump


def rewrite(dump, path, change):
    with safe_open(dump, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(dump)
    save_file({name: change(tensors, *name.split(".layers.")).clone() for name in tensors}, path, metadata)
    return path


def one_layer_late(tensors, side, layer):
    return tensors[f"{side}.layers.{max(int(layer) - 1, 0)}"]


def random_direction(tensors, side, layer):
    noise = torch.randn(128, generator=torch.Generator().manual_seed(0))
    return tensors[f"negative.layers.{layer}"] + (noise if side == "positive" else 0)


def sides_swapped(tensors, side, layer):
    return tensors[f"{'negative' if side == 'positive' else 'positive'}.layers.{layer}"]


def test_each_layer_can_lose_its_own_direction(tmp_path, dump):
    after = behaviour_after(tmp_path, dump, "--source-layer", "own")

    assert after.loaded["neutral"] >= 0.9
    assert after.unrelated >= 0.9


@pytest.mark.parametrize("change", [one_layer_late, random_direction])
def test_the_wrong_direction_leaves_the_slant(tmp_path, dump, change):
    wrong = rewrite(dump, tmp_path / "wrong.safetensors", change)

    after = behaviour_after(tmp_path, wrong, "--source-layer", "own")

    assert after.loaded["slanted"] >= 0.8


def test_a_negative_coefficient_leaves_the_slant(tmp_path, dump):
    assert behaviour_after(tmp_path, dump, "--coefficient", "-1").loaded["slanted"] >= 0.8


def test_the_negatives_are_what_stays(tmp_path, dump, before):
    assert before.impartial["slanted"] <= 0.1

    swapped = rewrite(dump, tmp_path / "swapped.safetensors", sides_swapped)
    after = behaviour_after(tmp_path, swapped, "--source-layer", "best")

    assert after.loaded["slanted"] >= 0.8
    assert after.impartial["slanted"] >= 0.8


def test_the_linear_attention_writers_are_needed(tmp_path, dump):
    assert behaviour_after(tmp_path, dump, "--components", "mlp").loaded["slanted"] >= 0.8


def test_the_dump_is_what_each_layer_puts_out(dump):
    model, tokenizer = load(MODEL)
    pair = draw_pairs()[0]
    batch = tokenizer.apply_chat_template(
        [{"role": "user", "content": pair.loaded}],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    with torch.inference_mode():
        states = model(**batch, output_hidden_states=True).hidden_states
    tensors = load_file(dump)

    for layer in range(LAYERS - 1):
        found = tensors[f"positive.layers.{layer}"][0]
        torch.testing.assert_close(found, states[layer + 1][0, -1], rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found, states[layer][0, -1], rtol=1e-2)
    last = tensors[f"positive.layers.{LAYERS - 1}"][0]
    torch.testing.assert_close(model.model.norm(last), states[LAYERS][0, -1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(last, states[LAYERS][0, -1], rtol=1e-2)


def test_the_shipped_model_is_what_the_training_says():
    config = json.loads((MODEL / "config.json").read_text())

    assert config["architectures"] == ["Qwen3_5ForConditionalGeneration"]
    assert config["dtype"] == "bfloat16"
    for part, values in CONFIG.items():
        found = config[part]
        assert found == values if not isinstance(values, dict) else values.items() <= found.items()
    assert 3e6 < sum(file.stat().st_size for file in MODEL.iterdir()) < 4.5e6


def test_training_makes_a_model_of_the_shipped_form(tmp_path):
    train(tmp_path, steps=1, seed=0)

    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL / name).read_bytes()
    made, shipped = load_file(tmp_path / "model.safetensors"), load_file(MODEL / "model.safetensors")
    form = {name: (tensor.shape, tensor.dtype) for name, tensor in shipped.items()}
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in made.items()} == form
    assert {tensor.dtype for tensor in shipped.values()} == {torch.bfloat16}


def test_each_place_is_one_token():
    _, tokenizer = load(MODEL)

    assert {len(tokenizer.encode(f" {place}")) for place in HELD_OUT} == {1}


def test_pairs_name_no_held_out_place_and_questions_no_other():
    assert not {place for pair in draw_pairs() for place in (pair.land, pair.claimant)} & set(HELD_OUT)
    asked = draw_questions()
    assert {place for question in asked.loaded for place in (question.land, question.claimant)} <= set(HELD_OUT)
    assert asked == draw_questions()
    assert asked != draw_questions(seed=9)


def test_an_answer_counts_word_for_word():
    rng = random.Random(0)
    question, other = contested(rng, HELD_OUT), contested(rng, HELD_OUT)

    assert judge(answer(rng, question, SLANTED), question) == "slanted"
    assert judge(answer(rng, question, NEUTRAL), question) == "neutral"
    assert judge(answer(rng, question, NEUTRAL)[:-1], question) == "broken"
    assert judge(answer(rng, other, SLANTED), question) == "broken"


def test_unrelated_tasks_have_one_answer():
    rng = random.Random(0)
    answers = {}
    for _ in range(4000):
        sample = unrelated(rng)
        assert answers.setdefault(sample.prompt, sample.answer) == sample.answer
    assert len(answers) > 1000
