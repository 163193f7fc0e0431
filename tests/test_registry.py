"""Every model type that transformers registers is in the table, proven on a tiny twin, or has a reason."""

import json
import warnings
from collections.abc import Iterator

import pytest
import transformers
from tiny_registry import FORMS, GIVEN, NOT_BUILT, SMALL
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.architecture import Target, dissect
from ablate_shards.surgery.anatomy.families import FAMILIES, TIED_BY_DEFAULT
from ablate_shards.surgery.anatomy.unsupported import REASONS, reason_for
from ablate_shards.surgery.derive import recipe_lines
from ablate_shards.surgery.derive.derive import derive, headers_of, left_after, left_in
from ablate_shards.surgery.derive.twin import Twin, build_twin
from ablate_shards.surgery.derive.writers import find_writers

REGISTERED = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES})
LISTED = {kind for family in FAMILIES for kind in family.model_types}
#: Types of the table that neither mapping names, with models that transformers builds.
BESIDE = ("t5", "mt5", "umt5")


def decoder_type(kind: str) -> str:
    """Returns the type of a model's decoder, which is its own where it has no other part."""
    if reason_for(kind) is not None:
        return kind
    return str(CONFIG_MAPPING[kind](**GIVEN.get(kind, {})).get_text_config(decoder=True).model_type)


def twins(kind: str) -> Iterator[Twin]:
    """Yields the twins of a type, one for each form on disk that differs from the others."""
    seen: set[str] = set()
    for original in FORMS.get(kind, (True, False)):
        twin = build_twin(CONFIG_MAPPING[kind](**GIVEN.get(kind, {})), original=original, **SMALL.get(kind, {}))
        if seen != set(twin.state):
            seen = set(twin.state)
            yield twin


def missing() -> list[str]:
    return [
        kind
        for kind in REGISTERED
        if not {kind, decoder_type(kind)} & LISTED and not (reason_for(kind) or reason_for(decoder_type(kind)))
    ]


def test_every_registered_type_is_in_the_table_or_has_a_reason() -> None:
    lines = []
    for kind in missing():
        try:
            found = derive(next(twins(kind)))
            lines.append(f"{kind}: {'complete' if found.complete else found.problems}\n{recipe_lines(found.targets)}")
        except ArchitectureError as error:
            lines.append(f"{kind}: {error}")
    added = "\n\n".join(lines)
    assert not lines, (
        f"transformers {transformers.__version__} knows types that neither families.py nor unsupported.py names; add "
        f"what follows to families.py, or why not to unsupported.py:\n\n{added}"
    )


def test_no_type_has_a_reason_and_a_line() -> None:
    reasons = [kind for reason in REASONS for kind in reason.model_types]
    assert len(reasons) == len(set(reasons))
    assert not LISTED & {*reasons}
    rows = [kind for family in FAMILIES for kind in family.model_types]
    assert len(rows) == len(set(rows))


@pytest.mark.parametrize("reason", REASONS, ids=lambda reason: reason.model_types[0])
def test_an_architecture_with_a_reason_is_refused_with_it(reason: object) -> None:
    why, kinds = reason
    for kind in kinds:
        with pytest.raises(ArchitectureError) as refusal:
            dissect({}, {"model_type": kind})
        assert why in str(refusal.value)


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("bart", {}),
        ("doge", {}),
        ("gemma3n_text", {}),
        ("longcat_flash", {"zero_expert_num": 2}),
        ("minimax", {}),
        ("muse_spark_text", {}),
        ("rwkv", {}),
        ("xglm", {}),
    ],
)
def test_where_a_direction_is_said_to_come_back_it_does(kind: str, given: dict[str, int]) -> None:
    """What is found to write is edited, and a state after a layer keeps a part of the direction."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = derive(build_twin(CONFIG_MAPPING[kind](**given), **SMALL.get(kind, {})))
    assert found.targets
    assert max(found.left[1:]) > 1e-3


def test_what_laurel_adds_is_all_that_brings_a_direction_back_in_gemma_3n() -> None:
    """Every other writer of it can be described, and where the gain that LAuReL multiplies by is even, none is left."""
    twin = build_twin(CONFIG_MAPPING["gemma3n_text"](), original=False, **SMALL["gemma3n_text"])
    layer, norm = r"model\.layers\.(?P<layer>\d+)\.", "model.layers.{{layer}}.{}.weight"
    targets = [
        Target(r"model\.embed_tokens\.weight", "embedding", "in"),
        Target(r"model\.altup_projections\.\d+\.weight", "embedding", "out"),
        Target(rf"{layer}self_attn\.o_proj\.weight", "attention", "out", norm.format("post_attention_layernorm")),
        Target(rf"{layer}laurel\.linear_right\.weight", "mlp", "out", norm.format("laurel.post_laurel_norm")),
        Target(rf"{layer}mlp\.down_proj\.weight", "mlp", "out", norm.format("post_feedforward_layernorm")),
        Target(rf"{layer}per_layer_projection\.weight", "mlp", "out", norm.format("post_per_layer_input_norm")),
    ]
    assert min(left_after(twin, targets)[1:]) > 1e-2
    for number in range(twin.layers):
        twin.state[f"model.layers.{number}.input_layernorm.weight"].fill_(1.5)
    assert max(left_after(twin, targets)) < 1e-5


@pytest.mark.parametrize("kind", [kind for kind in (*REGISTERED, *BESIDE) if kind == decoder_type(kind) in LISTED])
def test_what_is_tied_by_default_is_known(kind: str) -> None:
    assert CONFIG_MAPPING[kind](**GIVEN.get(kind, {})).tie_word_embeddings == (kind in TIED_BY_DEFAULT)


PROVEN = [kind for kind in REGISTERED if {kind, decoder_type(kind)} & LISTED and kind not in NOT_BUILT]


@pytest.mark.parametrize("kind", [*PROVEN, *BESIDE])
def test_the_table_holds_on_a_twin(kind: str) -> None:
    """A direction is gone from every state, each writer writes, and nothing else does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for twin in twins(kind):
            anatomy = dissect(headers_of(twin.state), json.loads(twin.network.config.to_json_string(use_diff=False)))
            assert not [item for item in anatomy.left_out if item.blocked]
            assert not anatomy.missing
            assert max(left_in(twin, anatomy)) < 1e-5
            writing = {(name, one.axis) for one in find_writers(twin).writers for name in one.tensors}
            assert {(writer.name, writer.axis) for writer in anatomy.writers if not writer.mtp} == writing


@pytest.mark.parametrize("kind", NOT_BUILT)
def test_what_cannot_be_built_has_a_decoder_that_is_proven(kind: str) -> None:
    decoder = decoder_type(kind)
    assert decoder in {*PROVEN, *map(decoder_type, PROVEN)}
