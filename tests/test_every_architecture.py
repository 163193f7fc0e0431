"""Ablates tiny models of every architecture and shows that the direction is gone from every hidden state."""

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import checked
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from tiny_models import TINY_MODELS, capture_stream, save_tiny_model

from ablate_shards.errors import ArchitectureError
from ablate_shards.surgery.anatomy.architecture import Anatomy, dissect
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint

RECIPE = r"""
[[ablate.target]]
pattern = 'model\.layers\.(?P<layer>\d+)\.self_attn\.o_proj\.weight'
component = "attention"
axis = "out"
{attention}

[[ablate.target]]
pattern = 'model\.layers\.(?P<layer>\d+)\.mlp\.down_proj\.weight'
component = "mlp"
axis = "out"
{mlp}

[[ablate.target]]
pattern = 'model\.embed_tokens\.weight'
component = "embedding"
axis = "in"
"""
GAIN = 'gain = "1 + model.layers.{{layer}}.{}_layernorm.weight"'
NOT_TOLD_BY_NAMES = {"gpt2", "gpt2-bare", "gpt-bigcode", "olmo", "jamba", "falcon-h1"}
NOT_TOLD_BY_NAMES |= {name for name in TINY_MODELS if name.startswith(("lfm2", "nemotron-h", "granite-hybrid"))}


@pytest.mark.parametrize("name", TINY_MODELS)
def test_direction_is_absent_from_every_hidden_state(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    source = save_tiny_model(tiny, tmp_path / "source")
    stream = capture_stream(tiny.load(source))
    direction = random_direction(stream[0].shape[-1])
    assert all(share > 0.1 for share in shares(stream, direction))

    ablate(source, tmp_path / "out", direction)

    after = shares(capture_stream(tiny.load(tmp_path / "out")), direction)
    assert len(after) == len(stream) > 2
    assert max(after) < 1e-5


@pytest.mark.parametrize("name", ["qwen3.5", "deepseek-v3"])
@pytest.mark.parametrize("mtp", ["keep", "edit"])
def test_multi_token_prediction_is_edited_only_on_request(name: str, mtp: str, tmp_path: Path) -> None:
    source = save_tiny_model(TINY_MODELS[name], tmp_path / "source")
    direction = random_direction(32)
    before = load_file(source / "model.safetensors")
    writers = [writer for writer in read_anatomy(source).writers if writer.mtp]
    assert {writer.component for writer in writers} == {"embedding", "attention", "mlp"}

    ablate(source, tmp_path / "out", direction, "--mtp", mtp)

    after = load_file(tmp_path / "out" / "model.safetensors")
    for writer in writers:
        assert (direction @ before[writer.name].double()).abs().max() > 0.1
        if mtp == "keep":
            assert torch.equal(after[writer.name], before[writer.name])
        else:
            assert (direction @ after[writer.name].double()).abs().max() < 1e-6


@pytest.mark.parametrize(("gain", "absent"), [(True, True), (False, False)])
def test_a_recipe_describes_what_the_table_would(gain: bool, absent: bool, tmp_path: Path) -> None:
    tiny = TINY_MODELS["gemma2"]
    source = save_tiny_model(tiny, tmp_path / "source")
    direction = random_direction(32)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        RECIPE.format(
            attention=GAIN.format("post_attention") if gain else "",
            mlp=GAIN.format("post_feedforward") if gain else "",
        )
    )

    ablate(source, tmp_path / "out", direction, "--recipe", recipe)

    after = shares(capture_stream(tiny.load(tmp_path / "out")), direction)
    assert (max(after) < 1e-5) is absent
    assert absent or min(after[1:]) > 1e-2


def random_direction(hidden: int) -> torch.Tensor:
    direction = torch.randn(hidden, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return direction / direction.norm()


def shares(stream: Iterable[torch.Tensor], direction: torch.Tensor) -> list[float]:
    return [float(((state.double() @ direction).abs() / state.double().norm(dim=-1)).max()) for state in stream]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_writers_are_what_the_modules_add_to_the_stream(name: str, tmp_path: Path) -> None:
    tiny = TINY_MODELS[name]
    folder = save_tiny_model(tiny, tmp_path / "model")
    original = load_file(folder / "model.safetensors")
    anatomy = read_anatomy(folder)
    assert anatomy.family == tiny.family
    assert not [item for item in anatomy.left_out if item.blocked]
    kinds: dict[tuple[bool, str], list[str]] = {}
    for writer in anatomy.writers:
        if not writer.mtp:
            kind = re.sub(r"(?<=\.)\d+(?=\.)", "#", writer.name)
            kinds.setdefault((writer.layer is None, kind), []).append(writer.name)
    outside = [writer for (embeds, _), names in kinds.items() if embeds for writer in names]
    inside = [writer for (embeds, _), names in kinds.items() if not embeds for writer in names]

    def stream_without(names: Iterable[str]) -> list[torch.Tensor]:
        zeroed = {name: torch.zeros_like(original[name]) for name in names}
        save_file(original | zeroed, folder / "model.safetensors", metadata={"format": "pt"})
        return capture_stream(tiny.load(folder))

    assert not stream_without(outside)[0].any()
    start, *rest = stream_without(inside)
    assert start.any()
    assert all(torch.equal(state, start) for state in rest)
    for (embeds, kind), names in kinds.items():
        start, *rest = stream_without({*(outside if embeds else inside)} - {*names})
        writes = start.any() if embeds else not all(torch.equal(state, start) for state in rest)
        assert writes, kind


@pytest.mark.parametrize("name", TINY_MODELS)
def test_without_config_the_names_decide_or_it_is_refused(name: str, tmp_path: Path) -> None:
    folder = save_tiny_model(TINY_MODELS[name], tmp_path / "model")
    expected = read_anatomy(folder)
    (folder / "config.json").unlink()
    if name in NOT_TOLD_BY_NAMES:
        with pytest.raises(ArchitectureError, match=r"there is no config\.json"):
            read_anatomy(folder)
    else:
        found = read_anatomy(folder)
        assert (found.hidden_size, found.layers, found.writers) == (32, expected.layers, expected.writers)


def read_anatomy(folder: Path) -> Anatomy:
    checkpoint = open_checkpoint(folder)
    return dissect(checkpoint.tensors, checkpoint.config)


def ablate(source: Path, out: Path, direction: torch.Tensor, *more: str | Path) -> None:
    file = source.parent / "directions.safetensors"
    vector = direction.float().numpy()[None]
    arrays = {"direction.layers.0": vector, "reference.layers.0": np.zeros_like(vector[0])}
    save_arrays(arrays, file, metadata={"format": "ablate-shards.directions/1"})
    last = max(read_anatomy(source).layers)
    options = ["-d", file, "--layers", f"0-{last}", "--source-layer", 0, "--no-biproject", "--coefficient", 1]
    options += ["--components", "attention,mlp,embedding", "--preserve", "columns"]
    checked(source, out, *options, *more)
