"""The model that tests of the Hub and of object stores edit, and its edit."""

from command_line import run
from raw_checkpoints import write_adapter, write_directions, write_llama

SHARDS = [f"model-0000{number}-of-00004.safetensors" for number in range(1, 5)]
#: Two layers of three, so that a shard at least stays as it is.
OPTIONS = ["-d", "d.safetensors", "--source-layer", "1", "--layers", "0-1"]


def write_model(folder, *, hidden=128, shards=4, card="---\nlicense: mit\n---\n# Base\n"):
    """Writes ``local``, a model, and ``d.safetensors``, directions for it."""
    (write_llama(folder / "local", hidden=hidden, shards=shards) / "README.md").write_text(card)
    write_directions(folder / "d.safetensors", hidden=hidden)
    return folder


def write_model_adapter(folder, *, hidden=128):
    """Writes an adapter that changes the same two layers."""
    return write_adapter(folder, layers=range(2), hidden=hidden, base_model_name_or_path="org/model")


def ablate(source, out, *more):
    """Ablates a source, from the folder that has the directions."""
    return run("ablate", source, out, *OPTIONS, *more)
