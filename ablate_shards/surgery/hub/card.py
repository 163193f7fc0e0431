"""Writes the model card of an edited checkpoint or an adapter, from its receipts, and keeps what people wrote."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ablate_shards.errors import HubError
from ablate_shards.names import ADAPTER_RECEIPT_NAME, BEGIN, END, RECEIPT_NAMES
from ablate_shards.surgery.model.samples import SIDES, Side
from ablate_shards.surgery.plan.recipe import layer_ranges

if TYPE_CHECKING:
    from ablate_shards.surgery.evaluate.evaluation import Evaluation, VerdictRow
    from ablate_shards.surgery.evaluate.statistics import Ratio

__all__ = ["CardOptions", "Figure", "metadata_of", "model_card", "read_object"]

_HOME = "https://pypi.org/project/ablate-shards/"
_EVALUATION = "ablate-shards.evaluation/"
_PLOTS = (".png", ".svg", ".webp")
_INHERITED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
#: What begins the name of a measure of the model as it was before: an evaluation has it under ``base``.
_BASE = "base "
_LARGEST = 64 << 20
_MOST_LEFT_OUT = 8
#: What tells one adapter from another, of all that PEFT writes down.
_ADAPTER_KEYS = {"peft_type", "r", "lora_alpha", "target_modules", "target_parameters", "use_rslora", "use_dora"}
_DIGESTS = {"format", "sha256"}

PublishedKind = Literal["ablation", "merge", "dequantisation", "adapter"]


@dataclass(frozen=True, slots=True)
class CardOptions:
    """What a card is made of, beside the files of the folder.

    Attributes:
        repo: The repository it is for.
        kind: What the folder holds.
        base: The repository of the base model, None where it is not known.
        revision: The commit of it that was edited.
        inherited: The metadata of the base model's card.
        existing: The card to keep, of which only the generated section is replaced; None for a new one.
        files: The names of the files that go with it.
    """

    repo: str
    kind: PublishedKind
    base: str | None
    revision: str | None
    inherited: Mapping[str, Any]
    existing: str | None
    files: Sequence[str]


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of an evaluation.

    Attributes:
        name: What was measured.
        value: The figure.
        low: The lower end of its interval, None where it has none.
        high: The upper end.
        count: How many answers it is of.
        percent: Whether it is a share, to be read in percent.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None
    percent: bool = False

    @property
    def shown(self) -> str:
        """The figure as a person reads it."""
        return self._written(self.value)

    @property
    def interval(self) -> str:
        """The interval as a person reads it, empty where there is none."""
        if self.low is None or self.high is None:
            return ""
        return f"{self._written(self.low)} – {self._written(self.high)}"

    def _written(self, value: float) -> str:
        return f"{value:.1%}" if self.percent else f"{value:.4g}"


def model_card(folder: Path, options: CardOptions) -> str:
    """Returns the text of README.md: YAML metadata that the Hub accepts, and what was done as tables.

    Args:
        folder: What is published.
        options: What is known of it otherwise.

    Raises:
        HubError: The existing card's metadata, or a receipt, cannot be read.
        EvaluateError: The evaluation cannot be read, or is of another version.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData
    from jinja2 import Environment

    evaluation, said, measures = _find_evaluation(folder, options.files)
    inherited = {key: options.inherited[key] for key in _INHERITED if options.inherited.get(key)}
    adapter = options.kind == "adapter"
    ours: dict[str, Any] = {
        **inherited,
        "language": _languages(inherited.get("language")),
        "library_name": "peft" if adapter else inherited.get("library_name", "transformers"),
        "pipeline_tag": inherited.get("pipeline_tag", "text-generation"),
        "base_model": options.base,
        "base_model_relation": ("adapter" if adapter else "finetune") if options.base else None,
        "tags": _tags(options),
    }
    section = (
        Environment(autoescape=False, keep_trailing_newline=True)
        .from_string(_template())
        .render(
            kind=options.kind,
            base=options.base,
            revision=options.revision,
            repo=options.repo,
            home=_HOME,
            receipt=next((name for name in RECEIPT_NAMES if name in options.files), None),
            extracted=ADAPTER_RECEIPT_NAME in options.files,
            tables=_tables(folder, options.files),
            evaluation=evaluation,
            effect=said,
            measures=[measure for measure in measures if not measure.name.startswith(_BASE)],
            before={
                measure.name.removeprefix(_BASE): measure for measure in measures if measure.name.startswith(_BASE)
            },
            plots=[name for name in options.files if name.endswith(_PLOTS)],
            task=ours["pipeline_tag"],
        )
    )
    section = f"{BEGIN}\n\n{section.strip()}\n\n{END}"
    if options.existing is None:
        data = ModelCardData(**{key: value for key, value in ours.items() if value})
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {options.repo.rpartition('/')[2]}\n\n{section}\n")
    else:
        card = _parsed(options.existing, options.repo)
        for key, value in ours.items():
            if key == "tags":
                card.data[key] = list(dict.fromkeys([*(card.data.get(key) or ()), *value]))
            elif value and not card.data.get(key):
                card.data[key] = value
        card.text = _replaced(card.text, section)
    if measures:
        card.data["model_name"] = options.repo.rpartition("/")[2]
        card.data["eval_results"] = [
            EvalResult(
                task_type="text-generation",
                dataset_type="ablate-shards-questions",
                dataset_name="ablate-shards questions",
                metric_type=re.sub(r"\W+", "-", measure.name).strip("-").lower(),
                metric_name=_shown_name(measure),
                metric_value=round(measure.value, 6),
                metric_args=None
                if measure.low is None
                else {"interval": [round(measure.low, 6), round(measure.high or 0, 6)]},
            )
            for measure in measures
        ]
    return str(card)


def _template() -> str:
    from importlib import resources

    return (resources.files("ablate_shards.data") / "model_card.md.jinja").read_text(encoding="utf-8")


def metadata_of(card: str) -> dict[str, Any]:
    """Returns the metadata of a card's YAML header, empty where there is none that can be read."""
    from huggingface_hub import ModelCard

    if not card.lstrip().startswith("---"):
        return {}
    try:
        metadata: dict[str, Any] = ModelCard(card, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
    except Exception:  # noqa: BLE001 - what a stranger wrote there is no reason to stop
        return {}
    return metadata


def _shown_name(measure: Figure) -> str:
    """Returns a measure's name that says of which model it is."""
    own = measure.name.removeprefix(_BASE)
    return own if own == measure.name else f"{own} (base model, before)"


def _find_evaluation(folder: Path, files: Sequence[str]) -> tuple[str | None, str, tuple[Figure, ...]]:
    """Returns the name of the evaluation that is published, what it comes to in words, and its figures."""
    from ablate_shards.surgery.evaluate.effect import effect
    from ablate_shards.surgery.evaluate.evaluation_file import read_evaluation

    for name in files:
        path = folder / name
        named = name.endswith(".json") and "/" not in name and "evaluation" in name
        if named and path.stat().st_size < _LARGEST and _is_evaluation(path):
            found = read_evaluation(path)
            return name, effect(found), tuple(_measured(found))
    return None, "", ()


def _is_evaluation(path: Path) -> bool:
    return str(read_object(path).get("format", "")).startswith(_EVALUATION)


def _measured(found: "Evaluation", model: str = "", known: Sequence[Side] = ()) -> Iterator[Figure]:
    """Yields the figures of an evaluation and then those of its base, by names that a person reads.

    Args:
        found: The evaluation.
        model: What the names begin with.
        known: Sides to tell of in any case, beside those that an answer takes.
    """
    told = {answer.side for each in (found, found.base) if each for answer in each.answers}
    sides = [side for side in SIDES if side in told or side in known]
    yield from _of_rows(found.rows, model, sides)
    if (judgement := found.judgement) is not None:
        yield from _of_rows(judgement.rows, model, sides, f", by {found.judge}")
        if judgement.agreement is not None:
            yield _share(f"{model}agreement of {found.judge} with the rules", judgement.agreement.raw)
    for control in found.controls:
        part = _part(control.group, control.language)
        yield _share(f"{model}{part} answered exactly", control.exact)
        yield _share(f"{model}{part} answer contained", control.given)
    for row in found.lean:
        where = "" if row.group is None else f"{row.group} "
        name = f"{model}{where}lean, neutral over {SIDES.get(row.side, row.side)} (nats)"
        yield Figure(name, row.mean.value, *row.mean.interval, row.mean.count)
    for score in found.tasks:
        name = f"{model}{score.name}, {score.metric}"
        yield Figure(name, score.value, *score.interval, score.count)
    if found.text is not None and found.text.perplexity is not None and math.isfinite(found.text.perplexity.value):
        name = f"{model}perplexity of {found.text.name}"
        yield Figure(name, found.text.perplexity.value, count=found.text.perplexity.tokens)
    if found.comparison is not None and (moved := found.comparison.divergence) is not None:
        yield Figure(f"{model}KL from the base at the first token (nats)", moved.first, count=moved.prompts)
        yield Figure(f"{model}KL from the base over all tokens (nats)", moved.tokens, count=moved.count)
    if found.base is not None:
        yield from _measured(found.base, _BASE, sides)


def _of_rows(rows: "Iterable[VerdictRow]", model: str, sides: Sequence[Side], by: str = "") -> Iterator[Figure]:
    for row in rows:
        part = _part(row.group, row.language)
        for verdict, found in row.verdicts.items():
            yield _share(f"{model}{part} {verdict}{by}", found)
            if verdict == "slanted":
                yield from (_share(f"{model}{part} slanted to {SIDES[side]}{by}", row.sides[side]) for side in sides)


def _part(group: str, language: str | None) -> str:
    return group if language is None else f"{group} ({language})"


def _share(name: str, found: "Ratio") -> Figure:
    return Figure(name, found.value, *found.interval, found.count, percent=True)


def _tables(folder: Path, files: Sequence[str]) -> list[dict[str, Any]]:
    tables = []
    if "ablation.json" in files:
        tables.append(_ablation_table(read_object(folder / "ablation.json")))
    if ADAPTER_RECEIPT_NAME in files:
        tables.append(_extraction_table(read_object(folder / ADAPTER_RECEIPT_NAME)))
    for name, title, said in (
        ("adapter_config.json", "The adapter", "From PEFT's `adapter_config.json`:"),
        ("merge.json", "The merge", "A LoRA adapter was added to the weights, `W + s·B·A`, shard by shard."),
        ("training.json", "The training", "Trained with peft and transformers, the loss on the responses only."),
    ):
        if name in files:
            rows = [(key, value) for key, value in _flat(read_object(folder / name)) if value and key not in _DIGESTS]
            if name == "adapter_config.json":
                rows = [(key, value) for key, value in rows if key in _ADAPTER_KEYS]
            tables.append({"title": title, "said": said, "rows": rows})
    return tables


def _ablation_table(receipt: Mapping[str, Any]) -> dict[str, Any]:
    tensors = receipt.get("tensors") or []
    recipe = receipt.get("recipe") or {}
    drifts = [tensor["norm_drift"] for tensor in tensors if tensor.get("norm_drift") is not None]
    rows: list[tuple[str, Any]] = [(key, _plain(value)) for key, value in recipe.items() if value not in ([], None)]
    if tensors:
        rows += [
            ("tensors edited", len(tensors)),
            ("share of the weights along the direction before, at most", f"{max(t['before'] for t in tensors):.3%}"),
            ("after, at most", f"{max(t['after'] for t in tensors):.3%}"),
        ]
    if drifts:
        rows.append(("largest change of a kept norm", f"{max(drifts):.3%}"))
    directions = receipt.get("directions") or {}
    rows += [
        ("directions (SHA-256)", f"`{str(directions.get('sha256'))[:16]}…`"),
        ("made with", _plain(receipt.get("tool"))),
    ]
    return {
        "title": "The edit",
        "said": "A direction was projected out of the weights that write to the residual stream. From `ablation.json`:",
        "rows": rows,
    }


def _extraction_table(receipt: Mapping[str, Any]) -> dict[str, Any]:
    modules = receipt.get("modules") or []
    recipe = receipt.get("recipe") or {}
    rows: list[tuple[str, Any]] = [(key, _plain(value)) for key, value in recipe.items() if value not in ([], None)]
    if modules:
        rows += [
            ("modules", len(modules)),
            ("rank, at most", max(module["rank"] for module in modules)),
            ("what the adapter lacks of a module's change, at most", f"{max(m['error'] for m in modules):.2%}"),
        ]
    if modules and receipt.get("made_from") == "ablation":
        rows += [
            ("share of the weights along the direction before, at most", f"{max(m['before'] for m in modules):.3%}"),
            ("with the adapter, at most", f"{max(m['after'] for m in modules):.3%}"),
        ]
    rows += [("not in the adapter", _plain(skip["name"])) for skip in (receipt.get("left_out") or [])[:_MOST_LEFT_OUT]]
    rows.append(("made with", _plain(receipt.get("tool"))))
    said = "This adapter adds to the weights what lies between two checkpoints"
    if receipt.get("made_from") == "ablation":
        said = "This adapter projects a direction out of the weights that write to the residual stream"
    return {"title": "The edit", "said": f"{said}. From `{ADAPTER_RECEIPT_NAME}`:", "rows": rows}


def _flat(content: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the single values of a receipt, and no list of tensors or losses."""
    for key, value in content.items():
        name = f"{path}{key}"
        if isinstance(value, dict):
            yield from _flat(value, f"{name} ")
        elif value is not None and (
            not isinstance(value, list)
            or (len(value) <= 12 and not any(isinstance(item, dict | list) for item in value))
        ):
            yield _plain(name), _plain(value)


def _plain(value: Any) -> str:
    if isinstance(value, list) and value and all(type(item) is int for item in value):
        return layer_ranges(value, to="–")
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _languages(value: Any) -> list[str]:
    """Returns languages as the Hub knows them: ISO 639 codes, without a script or region."""
    texts = [value] if isinstance(value, str) else list(value or ())
    codes = (str(text).partition("-")[0].lower() for text in texts)
    return list(dict.fromkeys(code for code in codes if re.fullmatch(r"[a-z]{2,3}|code|multilingual", code)))


def _tags(options: CardOptions) -> list[str]:
    tags = {
        "ablation": ["directional-ablation"],
        "merge": ["lora-merged"],
        "dequantisation": ["dequantised"],
        "adapter": ["lora"],
    }[options.kind]
    tags = [*tags, "directional-ablation"] if ADAPTER_RECEIPT_NAME in options.files else tags
    return ["ablate-shards", *tags]


def _parsed(text: str, repo: str) -> Any:
    from huggingface_hub import ModelCard

    try:
        return ModelCard(text)
    except Exception as error:
        reason = str(error).strip().splitlines()
        raise HubError(
            f"{repo}: the metadata of its README.md cannot be read ({reason[0] if reason else type(error).__name__}); "
            "repair it, or start from another card with --card"
        ) from error


def _replaced(text: str, section: str) -> str:
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        return f"{text.rstrip()}\n\n{section}\n"
    return text[:start] + section + text[end + len(END) :]


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises:
        HubError: There is none.
    """
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise HubError(f"{path}: not valid JSON; it was changed after it was written") from error
    if not isinstance(content, dict):
        raise HubError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content
