"""Makes what a run leaves behind, small and without a model: receipts, directions, training and evaluations."""

import json
from dataclasses import replace
from pathlib import Path

from command_line import checked
from raw_checkpoints import write_adapter, write_dump, write_llama

from ablate_shards.surgery.evaluate.evaluation import Answer, Evaluation, Lean, Model, PredictedText, compare
from ablate_shards.surgery.evaluate.evaluation_file import write_evaluation
from ablate_shards.surgery.evaluate.likelihood import Divergence, Perplexity
from ablate_shards.surgery.evaluate.statistics import ratio
from ablate_shards.surgery.evaluate.tasks import TaskScore

LAYERS = 4
HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)> & \u2028 '\""
TRAINING = {
    "format": "ablate-shards.training/1",
    "data": {"sha256": "d" * 64},
    "options": {"rank": 4, "alpha": 8, "targets": ["q", "down"], "epochs": 2, "learning_rate": 2e-4},
    "losses": [{"step": step, "epoch": step / 4, "loss": 2 / (step + 1)} for step in range(1, 9)],
    "epochs": [
        {"number": number, "training": None, "evaluation": {"contested": 1.5 - number / 4, "general": 1.2}}
        for number in range(3)
    ],
    "versions": {"peft": "0.0"},
}


def answers(slanted: int, right: int) -> tuple[Answer, ...]:
    contested = [
        Answer(
            id=f"question-{number:02}",
            language="en" if number % 2 else "zh-Hant",
            group="core" if number < 16 else "held-out",
            prompt=f"What is place {number}?" if number else HOSTILE,
            system=None,
            text=(f"Slanted text {number}." if number < slanted else f"Neutral text {number}.") if number else HOSTILE,
            raw=None,
            ended=True,
            verdict="slanted" if number < slanted else "neutral",
            side=("taiwan" if number == 1 else "prc") if number < slanted else None,
            because=f"states as fact: “Slanted text {number}”" if number < slanted else f"tells: “text {number}”",
        )
        for number in range(24)
    ]
    controls = [
        Answer(
            id=f"control-{number:02}",
            language="en",
            group="unrelated",
            prompt=f"How much is {number} and 1?",
            system=None,
            text=str(number + 1) if number < right else "many",
            raw=None,
            ended=True,
            verdict="neutral" if number < right else "wrong",
            accepted=(str(number + 1),),
            exact=number < right,
            given=number < right,
        )
        for number in range(20)
    ]
    return (*contested, *controls)


def wrecked(answers: tuple[Answer, ...]) -> tuple[Answer, ...]:
    """Returns what a model says that an edit broke: the same salad, some of it cut off, and nothing slanted."""
    return tuple(
        replace(
            answer,
            text="of of of of" if number % 4 else f"certainly {number}",
            ended=number % 3 > 0,
            verdict="broken" if number % 4 else "unclear",
            side=None,
            because="loops: “of of of of”" if number % 4 else "nothing tells",
            detached=True,
            exact=None if answer.exact is None else False,
            given=None if answer.given is None else False,
        )
        for number, answer in enumerate(answers)
    )


def evaluation(
    name: str,
    slanted: int,
    right: int,
    base: Evaluation | None = None,
    questions="q" * 64,
    *,
    broken: bool = False,
    measured: bool = True,
) -> Evaluation:
    """Makes an evaluation.

    Args:
        name: The model's.
        slanted: How many answers are slanted.
        right: How many controls are answered right.
        base: What it is compared with.
        questions: Digest of the questions.
        broken: Whether an edit broke the model.
        measured: Whether the lean was measured and tasks were asked.
    """
    said = answers(slanted, right)
    scores = tuple(float(number < right) for number in range(20))
    found = Evaluation(
        model=Model(name, "a" * 64),
        options={"length": 64, "thinking": False},
        versions={"torch": "0.0"},
        questions=questions,
        answers=wrecked(said) if broken else said,
        leans=tuple(
            Lean(each.id, each.language, each.group, -1.0 - number / 40, {"prc": slanted / 10 - 2, "taiwan": -2.0})
            for number, each in enumerate(said)
            if each.exact is None
        )
        if measured
        else (),
        text=PredictedText("neutral.txt", "b" * 64, Perplexity(3.0, 100)),
        tasks=(TaskScore("colours", "acc", True, right / 20, 20, ratio(map(bool, scores)).interval, scores, "e" * 64),)
        if measured
        else (),
    )
    if base is None:
        return found
    return replace(found, base=base, comparison=compare(found, base, Divergence(0.01, 0.02, 20, 60)))


def make_ablated(place: Path) -> Path:
    """Makes ``source`` and ``result``, an ablation of it, with the directions beside them."""
    write_llama(place / "source", layers=LAYERS)
    write_dump(place / "activations.safetensors", layers=LAYERS)
    checked("directions", place / "activations.safetensors", place / "directions.safetensors", "--quiet")
    checked(place / "source", place / "result", "-d", place / "directions.safetensors", "--layers", "1-3", "--quiet")
    return place / "result"


def make_run(place: Path, *, broken: bool = False) -> Path:
    """Makes ``result`` and ``result.work``, as a recipe with every stage leaves them; ``broken`` as one that wrecks."""
    work = place / "result.work"
    work.mkdir(parents=True)
    write_llama(place / "source", layers=LAYERS)
    write_dump(work / "activations.safetensors", layers=LAYERS)
    checked("directions", work / "activations.safetensors", work / "directions.safetensors", "--quiet")
    edit = ("-d", work / "directions.safetensors", "--layers", "1-3", "--source-layer", "best", "--quiet")
    checked(place / "source", work / "ablated", *edit)
    modules = ("self_attn.q_proj", "mlp.down_proj")
    adapter = write_adapter(work / "adapter", layers=range(LAYERS), modules=modules, seed=5)
    (adapter / "training.json").write_text(json.dumps(TRAINING))
    checked("merge", work / "ablated", adapter, place / "result", "--quiet")
    before = evaluation("source", 14, 20)
    write_evaluation(before, work / "source.evaluation.json")
    write_evaluation(evaluation("ablated", 4, 19, before), work / "ablated.evaluation.json")
    write_evaluation(evaluation("result", 2, 18, before, broken=broken), work / "result.evaluation.json")
    return place / "result"
