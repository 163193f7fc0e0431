"""Captures tiny models of many architectures, loaded and streamed, and shows where the stream is read."""

import dataclasses
import json
import shutil
from pathlib import Path

import command_line
import pytest
import torch
from progress import Heard
from raw_checkpoints import flip, snapshot
from safetensors.torch import load_file, save_file
from test_ranks import killed_tidying_up
from tiny_models import TINY_MODELS, save_tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from ablate_shards.data import demo
from ablate_shards.data.demo import behaviour
from ablate_shards.errors import CaptureError, CheckpointError, ExecuteError, Interrupted, UsageError
from ablate_shards.surgery.capture import forward as capturing
from ablate_shards.surgery.capture import layer_stream as station
from ablate_shards.surgery.capture.dump import DumpWriter
from ablate_shards.surgery.capture.forward import CaptureOptions, capture
from ablate_shards.surgery.capture.prompts import EncodedTurn, encode_turn, make_batches
from ablate_shards.surgery.checkpoint.checkpoint import open_checkpoint
from ablate_shards.surgery.checkpoint.headers import read_header
from ablate_shards.surgery.directions.activations import open_activations
from ablate_shards.surgery.machine.ranks import WorkerRank
from ablate_shards.surgery.model.loading import quiet, read_config
from ablate_shards.surgery.model.samples import Pair, Turn

#: Every way in which layers are called and stored: hybrid masks, rotary embeddings by layer type, fused and single
#: experts, tuples, Conv1D, absolute positions with an offset, state shared between layers, wrappers with towers.
ARCHITECTURES = [
    "llama-bare",
    "llava",
    "qwen3.5",
    "qwen3-vl",
    "qwen3-next",
    "mixtral",
    "gemma2",
    "gemma3-vision",
    "gemma4",
    "gpt-oss",
    "deepseek-v3",
    "gpt2",
    "falcon-7b",
    "falcon-rw",
    "opt-projected",
]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'][0] }}>{{ message['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz_."
WORDS = ["<pad>", "<bos>", "<eos>", "<s>", "<u>", "<a>", "<end>", *LETTERS]
PAIRS = [
    Pair("1", "en", Turn("how_is_it"), Turn("what_is_it_then")),
    Pair("2", "en", Turn("why"), Turn("why_not._say_it")),
    Pair("3", "en", Turn("tell_me"), Turn("tell_us")),
]
ANSWERED = [
    Pair("1", "en", Turn("how", "it_is_so"), Turn("how", "it_may_be_so.", "be_fair")),
    Pair("2", "en", Turn("what_is_it", "a  "), Turn("what", "end")),
]


class Stops(Heard):
    """Presses Ctrl-C when so many layers are done."""

    def __init__(self, after):
        super().__init__()
        self.after = after

    def count(self, done, total):
        if done == self.after:
            raise KeyboardInterrupt


def save_tokenizer(folder, template=TEMPLATE, words=WORDS):
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, "<pad>"))
    tokenizer.pre_tokenizer = Split("", "isolated")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    fast.add_special_tokens({"additional_special_tokens": ["<s>", "<u>", "<a>", "<end>"]})
    fast.padding_side = "left"
    fast.chat_template = template
    fast.save_pretrained(folder)


def make(folder, name="llama", **kwargs):
    save_tiny_model(TINY_MODELS[name], folder)
    save_tokenizer(folder, **kwargs)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "llama", "qwen3-next-fused")


def run(model, dump, pairs=PAIRS, progress=None, **options):
    return capture(model, dump, pairs, CaptureOptions(**options), progress or Heard())


def tokens_of(text):
    tokens = []
    while text:
        word = next(word for word in WORDS if text.startswith(word))
        tokens.append(WORDS.index(word))
        text = text[len(word) :]
    return tokens


def forward(model, text):
    """Returns the stream after every layer for one prompt, from plain hooks: ``[layers, tokens, d]``."""
    decoder = model.get_decoder()
    layers = decoder.h if hasattr(decoder, "h") else decoder.layers
    seen = []
    hooks = [
        layer.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in layers
    ]
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens_of(text)]))
    for hook in hooks:
        hook.remove()
    return torch.cat(seen)


def stack(dump, label):
    tensors = load_file(dump)
    return torch.stack([tensors[f"{label}.layers.{layer}"] for layer in range(len(tensors) // 2)])


def distance(one, other):
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_streamed_loaded_and_plain_hooks_agree(name, tmp_path):
    model = make(tmp_path / "model", name)
    loaded = run(model, tmp_path / "loaded.safetensors", offload="never")
    streamed = run(model, tmp_path / "streamed.safetensors", offload="always")
    run(model, tmp_path / "single.safetensors", offload="never", batch=1)

    assert streamed.streamed
    assert not loaded.streamed
    assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "loaded.safetensors").read_bytes()
    network = TINY_MODELS[name].load(model)
    for label in ("positive", "negative"):
        truth = torch.stack([forward(network, f"<u>{getattr(p, label).prompt}<end><a>")[:, -1] for p in PAIRS], 1)
        found = stack(tmp_path / "streamed.safetensors", label)
        assert found.shape == truth.shape == (streamed.layers, len(PAIRS), streamed.hidden_size)
        assert distance(stack(tmp_path / "single.safetensors", label), truth) < 1e-6
        assert distance(found, truth) < 1e-5
        # What the bounds tell apart: the neighbouring layer, the neighbouring prompt.
        assert distance(found[:-1], truth[1:]) > 1e-2
        assert distance(found.roll(1, 1), truth) > 1e-2


def test_the_last_layer_has_not_passed_the_final_norm(llama, tmp_path):
    run(llama, tmp_path / "dump.safetensors")
    network = TINY_MODELS["qwen3-next-fused"].load(llama)
    with torch.no_grad():
        ids = torch.tensor([tokens_of("<u>how_is_it<end><a>")])
        states = network(input_ids=ids, output_hidden_states=True).hidden_states
    found = stack(tmp_path / "dump.safetensors", "positive")
    assert distance(found[0, 0], states[1][0, -1]) < 1e-5
    assert distance(found[-1, 0], states[-1][0, -1]) > 1e-2


def hooked(prompts):
    """The plain way: hooks on the layers of a loaded model, all prompts at once, padded on the left."""
    network, tokenizer = behaviour.load(demo.MODEL)
    batch = tokenizer.apply_chat_template(
        [[{"role": "user", "content": prompt}] for prompt in prompts],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    seen = []
    for layer in network.model.layers:
        layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output[:, -1]))
    with torch.inference_mode():
        network(**batch, use_cache=False)
    return seen


def test_the_demo_model_gives_what_plain_hooks_give(tmp_path):
    contested = behaviour.draw_pairs(12)
    sides = {"positive": [pair.loaded for pair in contested], "negative": [pair.impartial for pair in contested]}
    own = {
        f"{side}.layers.{layer}": tensor
        for side, prompts in sides.items()
        for layer, tensor in enumerate(hooked(prompts))
    }
    pairs = [Pair(str(number), "en", Turn(p.loaded), Turn(p.impartial)) for number, p in enumerate(contested)]
    run(demo.MODEL, tmp_path / "dump.safetensors", pairs, dtype="float32", offload="always")
    found = load_file(tmp_path / "dump.safetensors")
    assert own.keys() == found.keys()
    for name in own:
        assert distance(found[name], own[name]) < 1e-5


@pytest.mark.parametrize(("pairs", "position"), [(PAIRS, "last"), (ANSWERED, "mean")])
def test_responses_are_read_whole_unless_somebody_says_otherwise(llama, pairs, position, tmp_path):
    auto = run(llama, tmp_path / "auto.safetensors", pairs)
    assert auto.position == position
    run(llama, tmp_path / "said.safetensors", pairs, position=position)
    assert (tmp_path / "auto.safetensors").read_bytes() == (tmp_path / "said.safetensors").read_bytes()


@pytest.mark.parametrize("position", ["last", "mean"])
@pytest.mark.parametrize("plain", [False, True])
def test_a_response_is_read_where_it_stands(llama, position, plain, tmp_path):
    pairs = ANSWERED[1:] if plain else ANSWERED
    run(llama, tmp_path / "dump.safetensors", pairs, position=position, plain=plain)
    network = TINY_MODELS["qwen3-next-fused"].load(llama)
    for label in ("positive", "negative"):
        rows = []
        for pair in pairs:
            turn = getattr(pair, label)
            before = turn.prompt if plain else f"<u>{turn.prompt}<end><a>"
            before = f"<s>{turn.system}<end>{before}" if turn.system else before
            # What follows the response, such as the end marker, would not change these tokens.
            stream = forward(network, before + turn.response.rstrip() + ("" if plain else "<end>"))
            start, end = len(tokens_of(before)), len(tokens_of(before + turn.response.rstrip()))
            rows.append(stream[:, end - 1] if position == "last" else stream[:, start:end].mean(1))
        found = stack(tmp_path / "dump.safetensors", label)
        assert distance(found, torch.stack(rows, 1)) < 1e-5


def test_the_tokens_of_a_response_are_told_without_offsets():
    class Pairing:
        """Joins letters two by two, so that a token spans the border before the response."""

        def __call__(self, text, **_):
            return {"input_ids": [text[at : at + 2] for at in range(0, len(text), 2)]}

    prompt = encode_turn(Pairing(), Turn("abc", "defg"), "here", "mean", plain=True)
    assert prompt.tokens[prompt.start :] == ("cd", "ef", "g")


def test_only_one_part_has_weights_at_a_time(llama, tmp_path):
    checkpoint, config = open_checkpoint(llama), read_config(llama, CaptureError)
    with quiet():
        model = station.open_streamed(checkpoint, config, torch.float32, torch.device("cpu"))

        def present():
            return {name for name, weight in model.decoder.named_parameters() if not weight.is_meta}

        assert not present()
        with model.holding(station.REST):
            assert present() == {"embed_tokens.weight", "norm.weight"}
        for layer in range(3):
            with model.holding(layer):
                assert present() == {n for n, _ in model.decoder.named_parameters() if n.startswith(f"layers.{layer}.")}
    assert not present()


@pytest.mark.parametrize(("memory", "streamed"), [(10**9, False), (10**4, True)])
def test_weights_that_do_not_fit_are_streamed(llama, memory, streamed, tmp_path):
    assert run(llama, tmp_path / "dump.safetensors", memory=memory).streamed is streamed
    assert run(llama, tmp_path / "again", memory=memory, offload="never").streamed is False


# ---------------------------------------------------------------------------------------- the dump


def test_the_dump_is_read_by_the_next_stage(llama, tmp_path):
    run(llama, tmp_path / "dump.safetensors", ANSWERED, position="mean")
    run(llama, tmp_path / "folder", ANSWERED, position="mean")
    file, folder = open_activations(tmp_path / "dump.safetensors"), open_activations(tmp_path / "folder")
    assert file.layers == folder.layers == (0, 1, 2)
    assert file.hidden_size == folder.hidden_size == 32
    assert file.counts(0) == folder.counts(0) == (2, 2)
    for layer in file.layers:
        for label in ("positive", "negative"):
            assert (next(file.chunks(layer, label)) == next(folder.chunks(layer, label))).all()
    assert file.metadata == folder.metadata
    assert {key: file.metadata[key] for key in list(file.metadata)[:-1]} == {
        "format": "ablate-shards.activations/1",
        "positive_label": "positive",
        "negative_label": "negative",
        "model": "llama",
        "position": "mean",
        "hidden_size": "32",
    }


def test_bytes_depend_on_the_inputs_alone(llama, tmp_path):
    run(llama, tmp_path / "one.safetensors")
    (tmp_path / "elsewhere").mkdir()
    moved = shutil.copytree(llama, tmp_path / "elsewhere" / "llama")
    run(moved, tmp_path / "elsewhere" / "two.safetensors")
    run(llama, tmp_path / "three.safetensors", PAIRS[::-1])
    one = (tmp_path / "one.safetensors").read_bytes()
    assert one == (tmp_path / "elsewhere" / "two.safetensors").read_bytes()
    inputs = [read_header(tmp_path / f"{name}.safetensors")[1]["inputs"] for name in ("one", "three")]
    assert inputs[0] != inputs[1]
    rows = [stack(tmp_path / f"{name}.safetensors", "positive") for name in ("one", "three")]
    assert torch.allclose(rows[0], rows[1].flip(1), atol=1e-5)


@pytest.mark.parametrize("offload", ["never", "always"])
@pytest.mark.parametrize("name", ["dump", "dump.safetensors"])
def test_an_interrupted_run_goes_on(llama, name, offload, tmp_path):
    run(llama, tmp_path / f"whole-{name}", offload=offload)
    dump = tmp_path / name
    with pytest.raises(Interrupted, match="--resume goes on"):
        run(llama, dump, progress=Stops(after=2), offload=offload)
    assert not dump.exists()
    with pytest.raises(CaptureError, match="--resume goes on with it"):
        run(llama, dump, offload=offload)
    with pytest.raises(CaptureError, match="because the prompts changed"):
        run(llama, dump, PAIRS[:2], resume=True, offload=offload)
    with pytest.raises(CaptureError, match="because the options changed"):
        run(llama, dump, resume=True, batch=2, offload=offload)

    found = run(llama, dump, resume=True, offload=offload)

    assert found.resumed in (1, 2)
    whole = tmp_path / f"whole-{name}"
    if dump.is_dir():
        assert {p.name: p.read_bytes() for p in dump.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}
    else:
        assert dump.read_bytes() == whole.read_bytes()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_changed_model_is_not_resumed(tmp_path):
    model = make(tmp_path / "model")
    with pytest.raises(Interrupted):
        run(model, tmp_path / "dump", progress=Stops(after=1))
    tensors = load_file(model / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CaptureError, match="because the model changed"):
        run(model, tmp_path / "dump", resume=True)
    assert run(model, tmp_path / "dump", resume=True, overwrite=True).resumed == 0


def test_layers_that_share_state_start_again(tmp_path):
    model = make(tmp_path / "model", "gemma4")
    with pytest.raises(Interrupted, match="nothing was kept"):
        run(model, tmp_path / "dump.safetensors", progress=Stops(after=1))
    assert run(model, tmp_path / "dump.safetensors", resume=True).resumed == 0


def test_nothing_but_a_dump_is_replaced(llama, tmp_path):
    dump = tmp_path / "dump.safetensors"
    run(llama, dump)
    before = dump.read_bytes()
    with pytest.raises(CaptureError, match="--overwrite replaces it"):
        run(llama, dump, PAIRS[:1])
    assert dump.read_bytes() == before
    run(llama, dump, PAIRS[:1], overwrite=True)
    assert dump.read_bytes() != before

    folder = tmp_path / "folder"
    run(llama, folder)
    run(llama, folder, overwrite=True)
    (folder / "note.txt").write_text("mine")
    for taken in (folder, llama / "model.safetensors"):
        with pytest.raises(CaptureError, match="no activation dump"):
            run(llama, taken, overwrite=True)
    for wrong in (tmp_path / "dump.npz", tmp_path / "nowhere" / "dump", llama, llama.parent):
        with pytest.raises(UsageError):
            run(llama, wrong, overwrite=True)
    assert (folder / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["dump", "dump.safetensors"])
def test_what_appears_during_the_run_is_not_replaced(llama, name, tmp_path):
    dump = tmp_path / name

    class Takes(Heard):
        def count(self, done, total):
            if done == 2:
                if dump.suffix:
                    dump.write_text("mine")
                else:
                    dump.mkdir()
                    (dump / "note.txt").write_text("mine")

    with pytest.raises(CaptureError, match="appeared during the run and is not replaced; --resume goes on"):
        run(llama, dump, progress=Takes(), overwrite=True)
    assert (dump if dump.suffix else dump / "note.txt").read_text() == "mine"
    if dump.suffix:
        dump.unlink()
    else:
        shutil.rmtree(dump)
    assert run(llama, dump, resume=True).resumed in (1, 2)


def test_a_folder_named_as_a_file_is_wrong_usage(llama, tmp_path):
    (tmp_path / "dump.safetensors").mkdir()
    with pytest.raises(UsageError, match="is a folder"):
        run(llama, tmp_path / "dump.safetensors")


# ---------------------------------------------------------------------------------------- side state


class Layer(torch.nn.Linear):
    def forward(self, hidden, extra):
        return super().forward(hidden) + extra


class Decoder(torch.nn.Module):
    """Three layers; ``how`` says what happens between them."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.embedding = torch.nn.Embedding(len(WORDS), 8)
        self.layers = torch.nn.ModuleList(Layer(8, 8) for _ in range(3))

    def forward(self, input_ids, **_):
        hidden = self.embedding(input_ids)
        extra = hidden
        for layer in self.layers:
            hidden = layer(hidden, extra)
            if self.how == "between":
                hidden = hidden * 2
            if self.how == "beside":
                extra = hidden.sin()


@pytest.mark.parametrize(
    ("how", "why"),
    [("stream", None), ("between", "changes the residual stream"), ("beside", "computes more from the residual")],
)
def test_what_a_model_does_beside_its_layers_is_noticed(how, why):
    decoder = Decoder(how)
    run = station.Network(decoder, decoder.layers, torch.device("cpu"))
    prompts = [EncodedTurn((1, 2, 3), 2), EncodedTurn((4, 5), 1)]
    with torch.inference_mode():
        if why is None:
            station.record_calls(run, make_batches(prompts, 1, 0))
        else:
            with pytest.raises(station.NotOneStream, match=why):
                station.record_calls(run, make_batches(prompts, 1, 0))
    assert not any("forward" in vars(layer) for layer in decoder.layers)


@pytest.mark.parametrize("how", ["stream", "between", "beside"])
def test_loaded_models_are_captured_whatever_they_do(how, tmp_path):
    decoder = Decoder(how)
    run = station.Network(decoder, decoder.layers, torch.device("cpu"))
    prompts = [EncodedTurn((1, 2, 3), 2), EncodedTurn((4, 5), 1)]
    staging = DumpWriter(tmp_path / "dump", {}, {"the model": "tiny"})
    with torch.inference_mode():
        station.run_layers(run, make_batches(prompts, 2, 0), staging, "last", Heard())
        staging.publish()
        hidden = extra = decoder.embedding(torch.tensor([1, 2, 3]))
        for index, layer in enumerate(decoder.layers):
            hidden = layer(hidden, extra)
            tensors = load_file(tmp_path / "dump" / f"layer-{index:05}.safetensors")
            torch.testing.assert_close(tensors[f"positive.layers.{index}"][0], hidden[-1])
            hidden = hidden * 2 if how == "between" else hidden
            extra = hidden.sin() if how == "beside" else extra


def test_what_cannot_be_streamed_is_refused(tmp_path):
    decoder = Decoder("between")

    class NoShards:
        def load(self, part):
            pass

        free = load

    run = station.Network(decoder, decoder.layers, torch.device("cpu"), NoShards())
    staging = DumpWriter(tmp_path / "dump", {}, {"the model": "tiny"})
    with torch.inference_mode(), pytest.raises(CaptureError, match="--offload never"):
        station.run_layers(run, make_batches([EncodedTurn((1, 2), 1)], 1, 0), staging, "last", Heard())


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("pairs", "options", "message"),
    [
        ([], {}, "no pairs"),
        (PAIRS, {"position": "mean"}, "pair 1, positive: has no response"),
        ([Pair("7", "en", Turn("a", "b"), Turn("a"))], {}, "pair 7: one side has a response"),
        ([Pair("7", "en", Turn("a" * 90), Turn("a"))], {}, "pair 7, positive: has 93 tokens.* at most 64"),
        ([Pair("7", "en", Turn("a", system="b"), Turn("a"))], {"plain": True}, "pair 7, positive: has a system"),
        ([Pair("7", "en", Turn(""), Turn("a"))], {"plain": True}, "pair 7, positive: has no tokens"),
    ],
)
def test_pairs_that_cannot_be_captured(llama, pairs, options, message, tmp_path):
    with pytest.raises(CaptureError, match=message):
        run(llama, tmp_path / "dump.safetensors", pairs, **options)
    assert not list(tmp_path.iterdir())


def break_config(model, **changes):
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_models_that_cannot_be_captured(tmp_path):
    dump = tmp_path / "dump.safetensors"

    def refused(name, message, error=CaptureError, **options):
        with pytest.raises(error, match=message):
            run(tmp_path / name, dump, **options)
        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == []

    make(tmp_path / "untemplated", template=None)
    refused("untemplated", "no chat template.*--plain")
    run(tmp_path / "untemplated", tmp_path / "plain", plain=True)

    make(tmp_path / "strict", template="{{ raise_exception('only once') }}")
    refused("strict", "pair 1, positive: the chat template refuses it: only once")

    make(tmp_path / "wordy", words=[*(f"<{number}>" for number in range(40)), *WORDS])
    refused("wordy", "gives token .* the model has 64")

    model = make(tmp_path / "unknown")
    marker = tmp_path / "unknown" / "ran"
    (model / "modeling.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    break_config(model, model_type="unheard", auto_map={"AutoConfig": "modeling.C", "AutoModel": "modeling.M"})
    refused("unknown", "does not know the model")
    assert not marker.exists()

    break_config(make(tmp_path / "quantised"), quantization_config={"quant_method": "fp8"})
    refused("quantised", "quantised.*--offload never", offload="always")

    model = make(tmp_path / "pickled")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refused("pickled", "no safetensors weights", CheckpointError)

    (make(tmp_path / "bare") / "config.json").unlink()
    refused("bare", "config.json")

    (tmp_path / "wordless").mkdir()
    save_tiny_model(TINY_MODELS["llama"], tmp_path / "wordless")
    refused("wordless", "tokenizer cannot be loaded")


@pytest.mark.parametrize("offload", ["never", "always"])
def test_incomplete_and_overflowing_weights(offload, tmp_path):
    dump = tmp_path / "dump.safetensors"
    model = make(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    gone = "model.layers.1.mlp.down_proj.weight"
    rest = {name: tensor for name, tensor in tensors.items() if name != gone}
    save_file(rest, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CaptureError, match=r"holds no weight for .*mlp.down_proj.weight"):
        run(model, dump, offload=offload)

    save_file({**rest, gone: tensors[gone][:16].clone()}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CaptureError, match=r"down_proj|size mismatch|mismatch"):
        run(model, dump, offload=offload)

    save_file({**rest, gone: tensors[gone] * 1e6}, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(CaptureError, match="layer 1 of LlamaModel: its output is not finite; use --dtype bfloat16"):
        run(model, dump, offload=offload, dtype="float16")
    assert run(model, dump, offload=offload, dtype="bfloat16").dtype == "BF16"


# ---------------------------------------------------------------------------------------- the command


def test_the_command(llama, tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"positive": pair.positive.prompt, "negative": pair.negative.prompt} for pair in PAIRS]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["capture", llama, tmp_path / "dump.safetensors", "--pairs", pairs]

    found = command_line.run(*arguments)
    assert found.exit_code == 0, found.output
    assert "3 pairs, 3 layers, hidden size 32, last token, computed in F32" in found.output
    assert "ablate-shards directions" in found.output
    before = (tmp_path / "dump.safetensors").read_bytes()

    again = command_line.run(*arguments, "--overwrite", "--offload", "always", "--json")
    told = json.loads(again.stdout)
    assert told["streamed"] is True
    assert told["layers"] == 3
    assert (tmp_path / "dump.safetensors").read_bytes() == before

    failed = command_line.run(*arguments)
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert command_line.run(*arguments, "--batch", "0").exit_code == 2


def test_a_missing_package_is_named(llama, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "accelerate", None)
    with pytest.raises(CaptureError, match=r"accelerate is not installed; .*ablate-shards\[lora\]"):
        run(llama, tmp_path / "dump.safetensors")


def test_memory_that_does_not_suffice_is_one_sentence(llama, tmp_path, monkeypatch):
    def full(self, layer, hidden):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB")

    monkeypatch.setattr(station._Inputs, "call", full)
    with pytest.raises(CaptureError, match="cpu has too little memory; use --offload always"):
        run(llama, tmp_path / "dump.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_noticed_before(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1))
    with pytest.raises(CaptureError, match=r"needs about .* while it is written"):
        run(llama, Path(tmp_path / "dump.safetensors"))


# ---------------------------------------------------------------------------------------- several ranks


def capture_part(model, dump, index, count, progress=None, **options):
    command = ("capture", str(model), str(dump), "--worker-rank", str(index))
    return run(model, dump, progress=progress, rank=WorkerRank(index, count), command=command, **options)


def read_all(dump):
    return snapshot(dump) if dump.is_dir() else dump.read_bytes()


@pytest.mark.parametrize("name", ["dump.safetensors", "dump"])
@pytest.mark.parametrize(
    ("count", "options"),
    [
        (2, {"batch": 2}),
        (3, {"batch": 1, "offload": "always"}),
        (9, {"batch": 4}),
        (4, {"pairs": ANSWERED, "batch": 1}),
    ],
)
def test_any_number_of_ranks_captures_the_same_bytes(llama, tmp_path, name, count, options):
    run(llama, tmp_path / f"whole-{name}", **options)
    dump = tmp_path / name
    for index in reversed(range(count)):
        capture_part(llama, dump, index, count, **options)
    assert not dump.exists()
    done = command_line.checked("finish", dump)
    assert f"3 layers of {len(options.get('pairs', PAIRS))} pairs" in done.stdout
    assert read_all(dump) == read_all(tmp_path / f"whole-{name}")
    assert {path.name for path in tmp_path.iterdir()} == {name, f"whole-{name}"}


def test_a_rank_that_was_stopped_goes_on_and_what_is_missing_is_named(llama, tmp_path):
    run(llama, tmp_path / "whole", batch=1)
    dump = tmp_path / "dump"
    with pytest.raises(Interrupted, match="--resume goes on"):
        capture_part(llama, dump, 1, 2, progress=Stops(after=2), batch=1)
    capture_part(llama, dump, 0, 2, batch=1)
    refused = command_line.run("finish", dump)
    assert f"rank 1 of 2 is not complete; run `ablate-shards capture {llama} {dump} --worker-rank 1" in refused.stderr
    assert capture_part(llama, dump, 1, 2, batch=1).resumed in (1, 2)
    heard = Heard()
    capture_part(llama, dump, 1, 2, progress=heard, batch=1)
    assert "it was complete already" in heard.notes
    command_line.checked("finish", dump)
    assert read_all(dump) == read_all(tmp_path / "whole")


@pytest.mark.parametrize("name", ["dump.safetensors", "dump"])
def test_a_finish_that_was_stopped_goes_on(llama, tmp_path, monkeypatch, name):
    dump, whole = tmp_path / name, tmp_path / f"whole-{name}"
    run(llama, whole)
    for index in range(2):
        capture_part(llama, dump, index, 2)
    write = DumpWriter.write

    def stopping(self, layer, tensors):
        if layer == 1:
            raise KeyboardInterrupt
        write(self, layer, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(DumpWriter, "write", stopping)
        stopped = command_line.run("finish", dump)
    assert stopped.exit_code == 1
    assert "interrupted; finish again to go on" in stopped.stderr
    assert not dump.exists()
    command_line.checked("finish", dump)
    assert read_all(dump) == read_all(whole)
    assert {path.name for path in tmp_path.iterdir()} == {name, whole.name}


@pytest.mark.parametrize("name", ["dump.safetensors", "dump"])
@pytest.mark.parametrize("when", ["not begun", "half"])
def test_a_finish_that_had_only_to_tidy_up_tidies_up(llama, tmp_path, name, when):
    dump, whole = tmp_path / name, tmp_path / f"whole-{name}"
    run(llama, whole)
    for index in range(2):
        capture_part(llama, dump, index, 2)
    killed_tidying_up(when, dump)
    assert read_all(dump) == read_all(whole)
    assert "is complete" in command_line.checked("finish", dump).stdout
    assert read_all(dump) == read_all(whole)
    assert {path.name for path in tmp_path.iterdir()} == {name, whole.name}


@pytest.mark.parametrize("name", ["dump.safetensors", "dump"])
def test_another_dump_in_the_way_of_finish_stays(llama, tmp_path, name):
    """Of the same model and prompts, but with a number that differs."""
    dump = tmp_path / name
    run(llama, dump)
    for index in range(2):
        capture_part(llama, dump, index, 2, overwrite=True)
    flip(max(dump.iterdir()) if dump.is_dir() else dump, -1)
    before = read_all(dump)
    assert "already exists; --overwrite replaces it" in command_line.run("finish", dump).stderr
    assert read_all(dump) == before
    command_line.checked("finish", dump, "--overwrite")
    assert read_all(dump) != before
    assert {path.name for path in tmp_path.iterdir()} == {name}


def test_ranks_that_do_not_capture_the_same(llama, tmp_path):
    dump = tmp_path / "dump.safetensors"
    capture_part(llama, dump, 0, 2, batch=2)
    with pytest.raises(ExecuteError, match="rank 0 of 2 is of another run, which differs in the options;"):
        capture_part(llama, dump, 1, 2, batch=1)
    with pytest.raises(ExecuteError, match="which differs in the prompts;"):
        capture_part(llama, dump, 1, 2, pairs=PAIRS[:2], batch=2)
    with pytest.raises(ExecuteError, match="which differs in the number of ranks;"):
        capture_part(llama, dump, 1, 3, batch=2)
    capture_part(llama, dump, 1, 2, batch=2)
    shard = tmp_path / ".dump.safetensors.ablate-ranks" / "1-of-2" / "layer-00001.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    broken = command_line.run("finish", dump)
    assert f"{shard}: is not what rank 1 captured" in broken.stderr
    assert not dump.exists()
    shard.write_bytes(content)
    command_line.checked("finish", dump)
    run(llama, tmp_path / "whole.safetensors", batch=2)
    assert read_all(dump) == read_all(tmp_path / "whole.safetensors")
    for index in range(2):
        capture_part(llama, dump, index, 2, pairs=PAIRS[:2], batch=2, overwrite=True)
    assert "already exists; --overwrite replaces it" in command_line.run("finish", dump).stderr
    command_line.checked("finish", dump, "--overwrite")
    assert len(load_file(dump)["positive.layers.0"]) == 2


def test_what_is_said_of_parts_is_true_of_all(llama, tmp_path):
    whole = run(llama, tmp_path / "dump")
    parts = [
        dataclasses.replace(whole, device=device, resumed=resumed, streamed=streamed)
        for device, resumed, streamed in (("cuda:1", 1, True), ("cuda:0", 3, False), ("cuda:1", 2, True))
    ]
    found = capturing._of_all(parts, tmp_path / "d")
    assert (found.dump, found.device, found.resumed, found.streamed) == (tmp_path / "d", "cuda:0, cuda:1", 1, False)


def test_the_command_of_a_rank(llama, tmp_path, monkeypatch):
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"positive": pair.positive.prompt, "negative": pair.negative.prompt} for pair in PAIRS]
    pairs.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["capture", llama, tmp_path / "dump.safetensors", "--pairs", pairs, "--batch", "2"]
    for rank in ("0", "1"):
        monkeypatch.setenv("SLURM_PROCID", rank)
        monkeypatch.setenv("SLURM_NTASKS", "2")
        made = command_line.checked(*arguments)
        assert f"rank {rank} of 2 is complete; once all are: ablate-shards finish" in made.stdout
    command_line.checked("finish", tmp_path / "dump.safetensors")
    monkeypatch.delenv("SLURM_NTASKS")
    whole = tmp_path / "whole.safetensors"
    command_line.checked("capture", llama, whole, *arguments[3:])
    assert read_all(whole) == read_all(tmp_path / "dump.safetensors")
