"""The model card: metadata the Hub accepts, what the receipts say, and what people wrote kept."""

import dataclasses
import json

import pytest
import yaml
from hub.hub_server import check_card
from report_runs import evaluation

from ablate_shards.errors import EvaluateError, HubError
from ablate_shards.names import BEGIN, END
from ablate_shards.surgery.evaluate.evaluation import Answer, Evaluation, Model, compare
from ablate_shards.surgery.evaluate.evaluation_file import write_evaluation
from ablate_shards.surgery.evaluate.statistics import ratio
from ablate_shards.surgery.hub.card import CardOptions, metadata_of, model_card

RECEIPT = {
    "format": "ablate-shards.receipt/1",
    "tool": "ablate-shards 9",
    "recipe": {
        "layers": [1, 2, 3, 7],
        "components": ["attention", "mlp"],
        "coefficient": 2.5,
        "preserve": "rows",
        "source-layer": "best",
        "override": [],
    },
    "directions": {"sha256": "ab" * 32},
    "tensors": [
        {"before": 0.05, "after": 0.001, "norm_drift": 1e-4},
        {"before": 0.03, "after": 0.002, "norm_drift": None},
    ],
}


def options(**changes):
    settings = {
        "repo": "me/edited",
        "kind": "ablation",
        "base": "org/base",
        "revision": "f" * 40,
        "inherited": {"license": "apache-2.0", "language": ["en", "zh-Hant", "zh"], "pipeline_tag": "text-generation"},
        "existing": None,
        "files": ["ablation.json"],
    }
    return CardOptions(**settings | changes)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "ablation.json").write_text(json.dumps(RECEIPT))
    return tmp_path


def test_a_new_card_passes_the_check_of_the_hub_and_says_what_was_done(folder):
    card = model_card(folder, options())
    assert check_card(card) == ([], [])
    assert metadata_of(card) == {
        "license": "apache-2.0",
        "language": ["en", "zh"],
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base",
        "base_model_relation": "finetune",
        "tags": ["ablate-shards", "directional-ablation"],
    }
    for words in (
        "# edited",
        "| layers | 1–3, 7 |",
        "| coefficient | 2.5 |",
        "before, at most | 5.000% |",
        "| after, at most | 0.200% |",
        "| largest change of a kept norm | 0.010% |",
        'pipeline("text-generation", model="me/edited")',
        "vllm serve me/edited",
        f"ablate-shards verify org/base@{'f' * 40} me/edited`",
        "Intended use and limitations",
    ):
        assert words in card
    assert "override" not in card


def test_the_check_is_one_that_fails():
    bad = {"license": "nonsense", "language": "zh-Hant", "base_model": "/home/me/model", "tags": [1]}
    errors, _ = check_card(f"---\n{yaml.safe_dump(bad)}---\n")
    assert len(errors) == 4


def test_evaluations_with_intervals_become_results(folder):
    found = evaluation("edited", 2, 18)
    write_evaluation(found, folder / "evaluation.json")
    card = model_card(folder, options(files=["ablation.json", "evaluation.json", "report/slant.png"]))
    assert check_card(card) == ([], [])
    (model,) = yaml.safe_load(card.split("---")[1])["model-index"]
    metrics = model["results"][0]["metrics"]
    slanted = found.rows[0].verdicts["slanted"]
    assert model["name"] == "edited"
    assert metrics[0] == {
        "type": "core-slanted",
        "name": "core slanted",
        "value": 0.125,
        "args": {"interval": [round(end, 6) for end in slanted.interval]},
    }
    low, high = (f"{end:.1%}" for end in slanted.interval)
    assert f"| core slanted | 12.5% | {low} – {high} | 16 |" in card
    assert "| perplexity of neutral.txt | 20.09 | – | 100 |" in card
    (perplexity,) = [metric for metric in metrics if metric["name"] == "perplexity of neutral.txt"]
    assert "args" not in perplexity
    assert "![slant](report/slant.png)" in card


def test_an_evaluation_that_cannot_be_read_is_not_published(folder):
    write_evaluation(evaluation("edited", 2, 18), folder / "evaluation.json")
    content = json.loads((folder / "evaluation.json").read_text())
    files = ["ablation.json", "evaluation.json"]
    (folder / "evaluation.json").write_text(json.dumps({**content, "format": "ablate-shards.evaluation/1"}))
    with pytest.raises(EvaluateError, match=r"found .*/1'; evaluate the model with this version"):
        model_card(folder, options(files=files))
    (folder / "evaluation.json").write_text(json.dumps({**content, "answers": None}))
    with pytest.raises(EvaluateError, match=r"evaluation\.json: not a complete evaluation"):
        model_card(folder, options(files=files))


def test_a_real_evaluation_is_shown_before_and_after(folder):
    def asked(model, verdict, base=None):
        answers = tuple(
            Answer(
                id=str(number),
                language="en",
                group="core",
                prompt="Whose is it?",
                system=None,
                text="text",
                raw=None,
                ended=True,
                verdict=verdict if number else "neutral",
            )
            for number in range(4)
        )
        made = Evaluation(
            model=Model(model, "0" * 64), options={"length": 8}, versions={}, questions="1" * 64, answers=answers
        )
        if base is None:
            return made
        return dataclasses.replace(made, base=base, comparison=compare(made, base))

    write_evaluation(asked("edited", "neutral", base=asked("base", "slanted")), folder / "edited.evaluation.json")
    card = model_card(folder, options(files=["ablation.json", "edited.evaluation.json"]))
    assert check_card(card) == ([], [])
    after, before = (ratio([False] * 4), ratio([False, True, True, True]))
    ends = [" – ".join(f"{end:.1%}" for end in found.interval) for found in (after, before)]
    assert f"| core slanted | 0.0% | {ends[0]} | 4 | 75.0% | {ends[1]} |\n" in card
    (model,) = yaml.safe_load(card.split("---")[1])["model-index"]
    metrics = {metric["name"]: metric for metric in model["results"][0]["metrics"]}
    for name, found in (("core slanted", after), ("core slanted (base model, before)", before)):
        assert metrics[name]["value"] == found.value
        assert metrics[name]["args"]["interval"] == pytest.approx(found.interval, abs=1e-6)


def test_measures_are_named_as_a_person_reads_them(folder):
    base = evaluation("base", 14, 20)
    found = evaluation("edited", 2, 18, base)
    write_evaluation(found, folder / "edited.evaluation.json")
    card = model_card(folder, options(files=["ablation.json", "edited.evaluation.json"]))
    assert check_card(card) == ([], [])
    section = card[card.index(BEGIN) :]
    rows = {line.split(" | ")[0][2:]: line for line in section.splitlines() if line.startswith("| ")}
    for name, now, before in (
        ("core slanted", "12.5%", "87.5%"),
        ("core slanted to the PRC's claims", "6.2%", "81.2%"),
        ("core slanted to Taiwan's independence", "6.2%", "6.2%"),
        ("core broken", "0.0%", "0.0%"),
        ("core (zh-Hant) slanted", "12.5%", "87.5%"),
        ("unrelated answered exactly", "90.0%", "100.0%"),
        ("lean, neutral over the PRC's claims (nats)", "0.5125", "-0.6875"),
        ("core lean, neutral over Taiwan's independence (nats)", "0.8125", "0.8125"),
        ("colours, acc", "0.9", "1"),
        ("perplexity of neutral.txt", "20.09", "20.09"),
        ("KL from the base over all tokens (nats)", "0.02", "–"),
    ):
        cells = rows[name].split(" | ")
        assert (cells[1], cells[4]) == (now, before), name
    assert section.index("**Slanted answers fell: 58 % → 8 % of 24") < section.index("## The edit")
    for words in ("sides", "comparison", "controls unrelated", "manner"):
        assert words not in card
    (model,) = yaml.safe_load(card.split("---")[1])["model-index"]
    metrics = {metric["type"]: metric for metric in model["results"][0]["metrics"]}
    assert metrics["core-slanted-to-the-prc-s-claims"]["value"] == 0.0625
    assert metrics["base-colours-acc"]["name"] == "colours, acc (base model, before)"


def test_a_model_whose_answers_take_no_side_is_not_said_to(folder):
    found = evaluation("edited", 0, 18, evaluation("base", 0, 20, measured=False), measured=False)
    write_evaluation(found, folder / "edited.evaluation.json")
    card = model_card(folder, options(files=["ablation.json", "edited.evaluation.json"]))
    assert "| core slanted | 0.0% |" in card
    for words in ("PRC", "Taiwan", "lean", "colours"):
        assert words not in card


def test_the_card_of_a_wrecked_model_says_so_first(folder):
    found = evaluation("edited", 2, 18, evaluation("base", 14, 20), broken=True)
    write_evaluation(found, folder / "edited.evaluation.json")
    card = model_card(folder, options(files=["ablation.json", "edited.evaluation.json"]))
    assert check_card(card) == ([], [])
    assert card.index("**The edit broke the model: 75 % of its answers are broken") < card.index(
        "| core slanted | 0.0% |"
    )
    assert "| core broken | 75.0% |" in card


def test_names_from_files_break_no_table(folder):
    base = evaluation("base", 2, 20)
    found = dataclasses.replace(base, text=dataclasses.replace(base.text, name="a | b\nc.txt"))
    write_evaluation(found, folder / "edited.evaluation.json")
    card = model_card(folder, options(files=["ablation.json", "edited.evaluation.json"]))
    assert "| perplexity of a \\| b c.txt | 20.09 | – | 100 |" in card


def test_what_is_no_evaluation_is_not_taken_for_one(folder):
    (folder / "evaluation.json").write_text(json.dumps({"format": "other/1", "core": {"slanted": {"ratio": 0.125}}}))
    card = model_card(folder, options(files=["ablation.json", "evaluation.json"]))
    assert "model-index" not in card
    assert "## Evaluation" not in card


def test_an_existing_card_is_kept_around_the_generated_section(folder):
    mine = "---\nlicense: mit\ntags: [mine]\nwidget: []\n---\n# Mine\n\nBefore.\n"
    first = model_card(folder, options(existing=mine))
    assert check_card(first) == ([], [])
    assert first.index("Before.") < first.index(BEGIN) < first.index(END)
    data = metadata_of(first)
    assert (data["license"], data["tags"]) == ("mit", ["mine", "ablate-shards", "directional-ablation"])
    assert data["base_model"] == "org/base"
    spoilt = first.replace("coefficient", "spoilt") + "After.\n"
    second = model_card(folder, options(existing=spoilt))
    assert second == first + "After.\n"
    # And again, it is the same to the byte.
    assert model_card(folder, options(existing=second)) == second


def test_a_card_that_cannot_be_read_is_named(folder):
    for metadata in ("a: [", "- a\n- b", "model-index: 3"):
        with pytest.raises(HubError, match=r"me/edited: the metadata of its README\.md cannot be read"):
            model_card(folder, options(existing=f"---\n{metadata}\n---\ntext"))


def test_nothing_known_of_the_base_leaves_it_out(folder):
    card = model_card(folder, options(base=None, revision=None, inherited={}))
    assert check_card(card) == ([], [])
    assert "base_model" not in card
    assert "None" not in card
    assert "A model edited in its safetensors shards" in card


def test_a_receipt_that_is_not_json_is_named(folder):
    for text in ("{", "[]"):
        (folder / "ablation.json").write_text(text)
        with pytest.raises(HubError, match=r"ablation\.json"):
            model_card(folder, options())


def test_text_of_strangers_stays_text(folder):
    """What stands in a receipt is not a template, and breaks no table."""
    receipt = {**RECEIPT, "tool": "{{ 7 * 7 }} | a\nb"}
    (folder / "ablation.json").write_text(json.dumps(receipt))
    card = model_card(folder, options())
    assert r"{{ 7 * 7 }} \| a b |" in card


@pytest.mark.parametrize("text", ["", "no header", "---\n- a\n---\n", "---\na: [\n---\n"])
def test_metadata_of_what_has_none_is_empty(text):
    assert metadata_of(text) == {}


def test_an_adapter_says_what_it_is_and_how_to_run_it(tmp_path):
    config = {"peft_type": "LORA", "r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_parameters": None, "use_rslora": True}))
    files = ["adapter_config.json", "adapter_model.safetensors"]
    card = model_card(tmp_path, options(kind="adapter", repo="me/adapter", files=files))
    assert check_card(card) == ([], [])
    data = metadata_of(card)
    assert (data["library_name"], data["base_model_relation"], data["base_model"]) == ("peft", "adapter", "org/base")
    assert data["tags"] == ["ablate-shards", "lora"]
    for words in (
        "| r | 16 |",
        "| lora_alpha | 32 |",
        "| target_modules | q_proj, v_proj |",
        "| use_rslora | True |",
        'AutoPeftModelForCausalLM.from_pretrained("me/adapter")',
        "vllm serve org/base --enable-lora --lora-modules adapter=me/adapter",
        "Intended use and limitations",
    ):
        assert words in card
    # Nothing that is not so: no edit of weights, no figures, no empty cells.
    for words in (
        "A direction in the weights",
        "What was measured is above",
        "target_parameters",
        "|  |",
        "ablate-shards verify",
    ):
        assert words not in card
