"""Loads a model's folder with transformers: no code from it is run, and nothing is fetched."""

import contextlib
import hashlib
import importlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ablate_shards.errors import AblateError, reason
from ablate_shards.names import CONFIG_NAME
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, open_checkpoint
from ablate_shards.surgery.checkpoint.files import pointed_at
from ablate_shards.surgery.machine.devices import computes_bfloat16

if TYPE_CHECKING:
    import torch

__all__ = [
    "UNUSABLE",
    "Dtype",
    "answering_dtype",
    "build",
    "check_packages",
    "decoder_layers",
    "end_tokens",
    "free_memory",
    "generating_class",
    "headers_digest",
    "load_model",
    "most_tokens",
    "open_folder",
    "open_same",
    "pad_left",
    "quiet",
    "read_config",
    "read_tokenizer",
    "render_chat",
    "tokenize",
    "weight_bytes",
]

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

#: What transformers, torch and Jinja raise for a model or a template that they cannot use.
UNUSABLE = (ValueError, TypeError, KeyError, IndexError, AttributeError, OSError, RuntimeError, ImportError)

_HERE: Mapping[str, Any] = {"local_files_only": True, "trust_remote_code": False}
_OURS_NOT_THEIRS = r"(peft|transformers|accelerate|torch)\b"
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
_CGROUP = Path("/sys/fs/cgroup")


def check_packages(doing: str, *names: str, error: type[AblateError], instead: str = "") -> None:
    """Checks that the packages that a command needs are installed.

    Args:
        doing: What it does with them, as the sentence begins.
        names: The packages.
        error: What to raise.
        instead: What else can be done, as the end of the error's sentence.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as missing:
            raise error(
                f"{doing}, and {missing.name} is not installed; `pip install 'ablate-shards[lora]'`{instead}"
            ) from missing


def open_folder(folder: Path, error: type[AblateError]) -> Checkpoint:
    """Reads the headers of a checkpoint folder that transformers is to load.

    Raises:
        AblateError: Of the type given: it is no folder with a configuration.
        CheckpointError: It is malformed or holds no safetensors.
    """
    if not (folder / "config.json").is_file():
        if (folder / CONFIG_NAME).is_file():
            raise error(
                f"{folder}: holds an adapter, not a model; make a checkpoint of both with `ablate-shards merge MODEL "
                "ADAPTER OUT` and name that"
            )
        below = pointed_at(path.relative_to(folder).as_posix() for path in sorted(folder.glob("**/config.json")))
        found = f"found none{below}" if below else "name one as transformers saves"
        raise error(f"{folder}: expected a checkpoint folder with a config.json; {found}")
    return open_checkpoint(folder)


def headers_digest(checkpoint: Checkpoint) -> str:
    """Returns what tells a checkpoint's copies on other machines from another checkpoint: names, sizes, headers."""
    shards = [[shard.name, shard.size, shard.header_sha256] for shard in checkpoint.shards]
    return hashlib.sha256(json.dumps(shards).encode()).hexdigest()


def open_same(folder: Path, headers: str, error: type[AblateError]) -> Checkpoint:
    """Reads the headers of a folder that a worker of another machine is to load.

    Args:
        folder: The checkpoint folder.
        headers: The digest that it has there; see ``headers_digest``.
        error: What to raise.

    Raises:
        AblateError: Of the type given: it is not here, or is another.
        CheckpointError: It is malformed.
    """
    if not folder.is_dir():
        raise error(
            f"{folder}: there is no such folder on this machine; every machine needs the model at the same path, on a "
            "shared disk or as a copy"
        )
    if headers_digest(checkpoint := open_folder(folder, error)) != headers:
        raise error(f"{folder}: is another checkpoint on this machine than where the command runs; copy that one here")
    return checkpoint


def read_config(folder: Path, error: type[AblateError]) -> Any:
    """Reads a model's configuration."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **_HERE)
    except UNUSABLE as unusable:
        raise error(
            f"{folder}: transformers does not know the model of its config.json ({reason(unusable)}); update "
            "transformers if it is newer, code that comes with a checkpoint is not run"
        ) from unusable


def answering_dtype(wanted: Dtype, config: Any, device: "torch.device") -> Dtype:
    """Returns what to compute answers in: what is stored, but float32 on a CPU without instructions for it."""
    if wanted != "auto" or device.type != "cpu":
        return wanted
    stored = str(config.get_text_config(decoder=True).dtype).removeprefix("torch.")
    return "bfloat16" if stored == "bfloat16" and computes_bfloat16(device) else "float32"


#: Letters of a text that may be in a rendered chat by chance, and what is put in the text's place to find out.
_SHORT, _STAND_IN = 24, "Whereishoneysoldtoday"


def read_tokenizer(folder: Path, error: type[AblateError], *, template: bool = True, instead: str = "") -> Any:
    """Reads a model's tokenizer.

    Args:
        folder: The checkpoint folder.
        error: What to raise.
        template: Whether it must have a chat template.
        instead: What else can be done if it has none, as the end of the error's sentence.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **_HERE)
    except UNUSABLE as unusable:
        raise error(f"{folder}: its tokenizer cannot be loaded ({reason(unusable)}); put its files there") from unusable
    # Where the files are missing, transformers makes a tokenizer that knows no words.
    if not set(tokenize(tokenizer, "The sun is warm.")) - {tokenizer.unk_token_id}:
        raise error(f"{folder}: its tokenizer knows no words; put the model's tokenizer files there")
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = _processors_template(folder)
    if template and not getattr(tokenizer, "chat_template", None):
        raise error(f"{folder}: its tokenizer has no chat template; put the model's chat_template.jinja there{instead}")
    return tokenizer


def _processors_template(folder: Path) -> str | None:
    """Returns the template that older multimodal models keep in a file of their processor, which tokenizers skip."""
    for name in ("chat_template.json", "processor_config.json"):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            found = json.loads((folder / name).read_text(encoding="utf-8")).get("chat_template")
            if isinstance(found, str):
                return found
    return None


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, str]],
    where: str,
    error: type[AblateError],
    *,
    thinking: bool = False,
    **how: bool,
) -> str:
    """Returns a chat as text, written by the model's template.

    A template that leaves out a text which it is given is given lists of parts instead, as templates of multimodal
    models expect them; if the words are missing then too, it is refused.

    Args:
        tokenizer: The tokenizer.
        messages: The chat.
        where: What the chat is, for the error.
        error: What to raise.
        thinking: What to tell a template that asks whether the model thinks first; others ignore it.
        how: What else to tell the template.

    Raises:
        AblateError: Of the type given; its cause is what the template raised, None where it left words out.
    """
    problems: list[tuple[str, Exception | None]] = []
    for form in (str, _as_parts):

        def render(chat: Sequence[Mapping[str, str]], form: Callable[[str], Any] = form) -> str:
            given = [{**each, "content": form(each["content"])} for each in chat]
            return str(tokenizer.apply_chat_template(given, tokenize=False, enable_thinking=thinking, **how))

        try:
            text = render(messages)
        except Exception as refusal:  # noqa: BLE001 - a template raises whatever it likes
            problems.append((f"the chat template refuses it: {reason(refusal)}", refusal))
            continue
        left_out = next((each for n, each in enumerate(messages) if not _holds(text, messages, n, render)), None)
        if left_out is None:
            return text
        what = (
            f"the chat template leaves out what the {left_out['role']} says ({_opening(left_out['content'])}), so the "
            "model would never see it; repair the model's chat_template.jinja"
        )
        problems.append((what, None))
    raise error(f"{where}: {problems[0][0]}") from problems[0][1]


def _as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _holds(
    rendered: str,
    messages: Sequence[Mapping[str, str]],
    number: int,
    render: Callable[[Sequence[Mapping[str, str]]], str],
) -> bool:
    """Tells whether what a message says is in a rendered chat, whatever is between the words.

    A few letters may stand in the template itself or in another message, so that a word is put in their place, too.
    """
    # Templates leave out the thoughts of answers that are given.
    said = messages[number]["content"].rpartition("</think>")[2]
    spoken = any(map(str.isalnum, said))
    wanted, found = (
        "".join(filter(str.isalnum, text) if spoken else text.split())
        for text in (said.casefold(), rendered.casefold())
    )
    if wanted not in found:
        return False
    if not wanted or len(wanted) > _SHORT:
        return True
    changed = {**messages[number], "content": _STAND_IN}
    try:
        return _STAND_IN.casefold() in render([*messages[:number], changed, *messages[number + 1 :]]).casefold()
    except Exception:  # noqa: BLE001 - a template raises whatever it likes
        return True


def _opening(text: str) -> str:
    text = " ".join(text.split())
    return json.dumps(text if len(text) <= 40 else f"{text[:40]}…", ensure_ascii=False)


def tokenize(tokenizer: Any, text: str, *, special: bool = False) -> tuple[int, ...]:
    """Returns the tokens of a text, and no others unless ``special`` asks for the model's own."""
    return tuple(tokenizer(text, add_special_tokens=special, return_attention_mask=False)["input_ids"])


def pad_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Returns prompts side by side, ending together: tokens ``[prompts, tokens]`` and ones where there is a token.

    A model that sees the padding answers something else, so the mask must go with the tokens.
    """
    import torch

    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def end_tokens(*stated: Any) -> tuple[int, ...]:
    """Returns every token that ends an answer, each once, from where a token or a list of them is stated."""
    listed = (entry if isinstance(entry, list | tuple) else [entry] for entry in stated)
    return tuple(dict.fromkeys(token for tokens in listed for token in tokens if isinstance(token, int)))


def most_tokens(config: Any) -> int | None:
    """Returns the most tokens that a model reads, None if it does not say."""
    most = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return most if isinstance(most, int) else None


def generating_class(config: Any) -> Any:
    """Returns the class of transformers that loads a model with its output head."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def build(folder: Path, auto: Any, config: Any, error: type[AblateError], **how: Any) -> Any:
    """Builds a model without memory for its weights."""
    from accelerate import init_empty_weights

    try:
        with init_empty_weights(include_buffers=False):
            return auto.from_config(config, trust_remote_code=False, **how)
    except UNUSABLE as unusable:
        raise error(f"{folder}: transformers cannot build the model: {reason(unusable)}") from unusable


def load_model(folder: Path, auto: Any, error: type[AblateError], **how: Any) -> tuple[Any, list[str]]:
    """Loads a model with its weights.

    Returns:
        The model, and the names of the parameters that the checkpoint does not hold.

    Raises:
        AblateError: Of the type given: transformers cannot load it.
        OutOfMemoryError: The device's memory does not suffice.
    """
    import torch

    try:
        network, found = auto.from_pretrained(folder, use_safetensors=True, output_loading_info=True, **_HERE, **how)
    except torch.OutOfMemoryError:
        raise
    except UNUSABLE as unusable:
        raise error(f"{folder}: transformers cannot load the model: {reason(unusable)}") from unusable
    return network, sorted(found["missing_keys"])


def decoder_layers(folder: Path, network: Any, error: type[AblateError]) -> tuple[Any, Any]:
    """Returns the part of a model that takes tokens and runs the layers, and the list of these."""
    from torch import nn

    decoder = network.get_decoder()
    count = network.config.get_text_config(decoder=True).num_hidden_layers
    lists = [
        (name.count("."), part)
        for name, part in decoder.named_modules()
        if isinstance(part, nn.ModuleList) and len(part) == count
    ]
    outermost = [part for depth, part in lists if depth == min(depth for depth, _ in lists)]
    if len(outermost) != 1:
        raise error(
            f"{folder}: found {len(outermost)} lists of {count} layers in {type(decoder).__name__}, expected one; its "
            "decoder layers cannot be found"
        )
    return decoder, outermost[0]


def weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Returns the bytes that a checkpoint's weights take in a dtype of torch, or as they are stored (``auto``)."""
    item = _BYTES.get(dtype)
    return sum(
        tensor.end - tensor.start if item is None else math.prod(tensor.shape) * item
        for tensor in checkpoint.tensors.values()
    )


def free_memory(device: "torch.device") -> int:
    """Returns the bytes that are free on a device; on the CPU, as many as this process may take."""
    from accelerate.utils import get_max_memory

    free = get_max_memory()
    if device.type in ("cuda", "xpu"):
        return int(free[device.index or 0])
    # Where an accelerator shares the host's memory, only the accelerator is listed.
    found = int(free.get("cpu") or max(free.values()))
    # A container may be allowed less than the machine has; pages of files are given back on demand.
    with contextlib.suppress(OSError, ValueError, KeyError):
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text()) - int(counts["file"])
        found = min(found, int((_CGROUP / "memory.max").read_text()) - used)
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the libraries from writing to the terminal; what matters of it is printed instead."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=_OURS_NOT_THEIRS)
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
