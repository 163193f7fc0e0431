"""``verify --run``: on the model too, layers add nothing along what was removed, and it says what that cost."""

import json

import numpy as np
import pytest
import torch
from command_line import checked
from safetensors.numpy import save_file as save_arrays
from test_capture import save_tokenizer
from tiny_models import TINY_MODELS, save_tiny_model

PROMPTS = "how_what_is_it\n\nit_may_be_so_be_fair_what_is_it\n"


@pytest.fixture(params=["qwen3", "gemma2"])
def edited(request, tmp_path):
    """A tiny model without a direction in its layers, in which a norm may stand after each writer, and its prompts."""
    source = save_tiny_model(TINY_MODELS[request.param], tmp_path / "source")
    save_tokenizer(source)
    (tmp_path / "prompts.txt").write_text(PROMPTS)
    arrays = {}
    for layer in (0, 1):
        arrays[f"direction.layers.{layer}"] = direction_of(layer).astype(np.float32)
        arrays[f"reference.layers.{layer}"] = np.zeros(32, np.float32)
    save_arrays(arrays, tmp_path / "d.safetensors", metadata={"format": "ablate-shards.directions/1"})
    checked(source, tmp_path / "out", "-d", tmp_path / "d.safetensors", "--preserve", "columns", "--no-biproject")
    return tmp_path


def direction_of(layer):
    row = np.random.default_rng(layer).standard_normal((1, 32))
    return row / np.linalg.norm(row)


def shown(folder, out="out"):
    words = ("verify", folder / "source", folder / out, "--run", folder / "prompts.txt", "--json")
    return json.loads(checked(*words).stdout)["run"]


def test_what_layers_add_has_no_part_along_the_direction_any_more(edited):
    found = shown(edited)
    assert [each["layer"] for each in found["layers"]] == [0, 1]
    assert all(each["added_before"] > 0.02 and each["added_after"] < 1e-5 for each in found["layers"])
    # Only the layers were edited: what the embedding holds of it is still in the stream.
    assert all(each["stream_after"] > 1e-3 for each in found["layers"])
    assert found["divergence"] > 1e-4
    assert found["prompts"] == 2

    said = " ".join(
        checked("verify", edited / "source", edited / "out", "--run", edited / "prompts.txt").stdout.split()
    )
    assert "adds before" in said
    assert f"nats a token over {found['tokens']} tokens of 2 prompts" in said


def test_the_shares_are_those_of_each_token(edited, monkeypatch):
    """Against a stream that is taken from the model by another way."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(edited / "source")
    network = AutoModelForCausalLM.from_pretrained(edited / "source", dtype=torch.float32).eval()
    direction = torch.from_numpy(direction_of(0))[0]
    seen = []
    network.get_decoder().layers[0].register_forward_hook(
        lambda _, args, kwargs, output: seen.append((args[0], output)), with_kwargs=True
    )
    shares = []
    for prompt in filter(None, PROMPTS.splitlines()):
        network(input_ids=torch.tensor([tokenizer(prompt, add_special_tokens=False)["input_ids"]]))
        old, new = (each[0] if isinstance(each, tuple) else each for each in seen.pop())
        added = (new - old)[0].double()
        shares += ((added @ direction).abs() / added.norm(dim=-1)).tolist()
    assert shown(edited)["layers"][0]["added_before"] == pytest.approx(np.mean(shares), rel=1e-4)


def test_an_edit_of_nothing_moves_nothing(edited):
    words = ("-d", edited / "d.safetensors", "--coefficient", 0, "--no-biproject")
    checked(edited / "source", edited / "nothing", *words)
    refused = checked("verify", edited / "source", edited / "nothing", "--run", edited / "prompts.txt", code=1)
    assert "no decoder layer of it was edited" in " ".join(refused.output.split())


@pytest.mark.parametrize(
    ("text", "message"),
    [("\n \n", "holds no line of text"), (b"\xff", "cannot be read as UTF-8"), (None, "cannot be read")],
)
def test_prompts_that_cannot_be_used_are_refused(edited, text, message):
    if text is None:
        (edited / "prompts.txt").unlink()
    else:
        (edited / "prompts.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    refused = checked("verify", edited / "source", edited / "out", "--run", edited / "prompts.txt", code=1)
    assert message in " ".join(refused.output.split())


def test_what_cannot_be_run_is_refused(edited):
    refused = checked("verify", edited / "source", "hub:me/model", "--run", edited / "prompts.txt", code=2)
    assert "name two such folders" in " ".join(refused.output.split())
    refused = checked("verify", edited / "source", edited / "source", "--run", edited / "prompts.txt", code=2)
    assert "holds no ablation.json" in " ".join(refused.output.split())
