"""A tiny model with random weights and the structure of a given one, and the stream that runs through its layers."""

import copy
import inspect
import math
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from ablate_shards.errors import ArchitectureError, reason
from ablate_shards.surgery.derive.sizes import HIDDEN, VOCABULARY, shrink
from ablate_shards.surgery.model.loading import UNUSABLE, quiet

if TYPE_CHECKING:
    import torch

__all__ = ["SEQUENCES", "State", "Twin", "build_twin", "find_unreached", "kind_of", "numbers_of"]

#: Tensors by their name on disk.
State = Mapping[str, "torch.Tensor"]

_TOKENS = 48
#: States of an image.
_SEEN = 7
#: The second differs from the first in its first token, the third in what an encoder is given, if there is one.
SEQUENCES = 3
_MOST_PARAMETERS = 50_000_000
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Twin:
    """A tiny random model.

    Attributes:
        network: The model of transformers.
        state: Its tensors as a checkpoint holds them.
        hidden: Length of the stream.
        layers: How many layers the stream runs through.
        stack: Where these lie in the model.
        original: Whether the names are those that the architecture was published with, or transformers' own.
    """

    network: Any
    state: State
    hidden: int
    layers: int
    stack: str
    original: bool

    def stream(self, state: State) -> "torch.Tensor":
        """Returns the stream before the first and after every layer, ``[layers + 1, ..., d]`` float32."""
        import torch

        with quiet(), torch.no_grad():
            network = self._loaded(state)
            return torch.stack(_states(network, dict(network.named_modules())[self.stack]))

    def owners(self, tensors: Collection[str]) -> list[tuple[Any, ...]]:
        """Returns for each parameter that some tensors are read into the modules of its layer that it lies in."""
        import torch

        with quiet(), torch.no_grad():
            changed = self._loaded({**self.state, **{name: self.state[name] * 0 for name in tensors}})
        own = dict(self.network.named_parameters())
        modules = dict(self.network.named_modules())
        layer = len(self.stack.split(".")) + 1
        paths = [
            name.split(".")[:-1]
            for name, each in changed.named_parameters()
            if name.startswith(f"{self.stack}.") and not torch.equal(each, own[name])
        ]
        return [tuple(modules[".".join(path[:depth])] for depth in range(layer + 1, len(path) + 1)) for path in paths]

    def _loaded(self, state: State) -> Any:
        """Returns the model with other tensors."""
        import torch

        network, report = type(self.network).from_pretrained(
            None,
            config=copy.deepcopy(self.network.config),
            state_dict={name: tensor.clone() for name, tensor in state.items()},
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
        )
        if report["missing_keys"]:
            raise ArchitectureError(
                "transformers saves its tiny twin in a form that it does not load again: "
                f"{min(report['missing_keys'])} is missing"
            )
        return network.eval()


def kind_of(name: str) -> str:
    """Returns a tensor's name with its numbers as ``#``."""
    return _NUMBER.sub("#", name)


def numbers_of(name: str) -> list[str]:
    """Returns the numbers in a tensor's name."""
    return _NUMBER.findall(name)


def build_twin(config: Any, *, original: bool = True, seed: int = 0, **changed: Any) -> Twin:
    """Builds the tiny twin of a model.

    Args:
        config: Its configuration, as transformers reads it.
        original: Whether to name tensors as the architecture was published, or as transformers holds them.
        seed: Of its random weights.
        changed: Keys of the small configuration that must be other than what follows from the large one.

    Raises:
        ArchitectureError: transformers cannot build or run it, or no stream can be followed through it.
    """
    import torch

    name = config.model_type
    small = shrink(config.to_dict())
    for key, value in changed.items():
        small[key] = {**small[key], **value} if isinstance(value, dict) and isinstance(small.get(key), dict) else value
    try:
        with quiet():
            tiny = type(config).from_dict(small)
            network = _generating(tiny).from_config(tiny, attn_implementation="eager", dtype=torch.float32).eval()
    except Exception as unusable:
        raise ArchitectureError(f"a tiny twin of {name!r} cannot be built: {reason(unusable)}") from unusable
    count = sum(parameter.numel() for parameter in network.parameters())
    if count > _MOST_PARAMETERS:
        raise ArchitectureError(f"a tiny twin of {name!r} would have {count} parameters, more than {_MOST_PARAMETERS}")
    _randomise(network, seed)
    try:
        with torch.no_grad(), quiet():
            stack, layers, hidden = _find_stack(network)
    except UNUSABLE as unusable:
        raise ArchitectureError(f"the tiny twin of {name!r} does not run: {reason(unusable)}") from unusable
    return Twin(network, _saved(network, original=original), hidden, layers, stack, original)


def _generating(config: Any) -> Any:
    """Returns the class of transformers that builds the architecture with its output head, or another one if none."""
    import transformers

    text, whole = ("CAUSAL_LM", "CausalLM"), ("IMAGE_TEXT_TO_TEXT", "ImageTextToText")
    pairs = (("SEQ_TO_SEQ_CAUSAL_LM", "Seq2SeqLM"), ("SPEECH_SEQ_2_SEQ", "SpeechSeq2Seq"))
    composite = config.get_text_config(decoder=True) is not config
    ordered = (whole, text) if composite else (text, whole)
    for mapping, auto in (*pairs, *ordered) if config.is_encoder_decoder else (*ordered, *pairs):
        if type(config) in getattr(transformers, f"MODEL_FOR_{mapping}_MAPPING"):
            return getattr(transformers, f"AutoModelFor{auto}")
    return transformers.AutoModel


def _randomise(network: Any, seed: int) -> None:
    """Gives every parameter random values; what starts at one stays positive, as gains are."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            gain = parameter.ndim == 1 and bool((parameter == 1).all())
            scale = min(0.3, 2 / math.sqrt(max(parameter.shape[-1:], default=1)))
            parameter.copy_(0.5 + noise.abs() if gain else scale * noise)


def _saved(network: Any, *, original: bool) -> State:
    with tempfile.TemporaryDirectory() as folder, quiet():
        network.save_pretrained(folder, save_original_format=original)
        return {
            name: tensor
            for file in sorted(Path(folder).glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }


# ---------------------------------------------------------------------------------------- the stream


def _calls(network: Any) -> Iterator[dict[str, Any]]:
    """Yields the arguments that may run a model without images or sound, in the order of trying.

    What an encoder of images would give a decoder is random.
    """
    import torch
    from transformers.modeling_outputs import BaseModelOutput

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(10, VOCABULARY - 28, (1, _TOKENS), generator=generator).expand(SEQUENCES, -1).clone()
    tokens[1, 0] = tokens[0, 0] + 1
    encoded = tokens[0].flip(0).expand(SEQUENCES, -1).clone()
    encoded[2] = encoded[2].roll(1)
    seen = torch.randn((SEQUENCES, _SEEN, HIDDEN), generator=generator)
    seen[1] = seen[0]
    takes = inspect.signature(network.forward).parameters
    images = {"cross_attention_states": seen} if "cross_attention_states" in takes else {}
    plain = {"input_ids": tokens, "use_cache": False, **images}
    paired = {"input_ids": encoded, "decoder_input_ids": tokens, "use_cache": False}
    # Some make what their decoder is given from what their encoder is, with a token more before it.
    yield from (paired, plain) if network.config.is_encoder_decoder else (plain, paired)
    yield {"input_ids": tokens}
    if "encoder_outputs" in takes:
        encoder = BaseModelOutput(seen)
        encoder["attention_mask"] = torch.ones((SEQUENCES, _SEEN), dtype=torch.long)
        yield {"encoder_outputs": encoder, "decoder_input_ids": tokens, "use_cache": False}
    if "image_encoder_embeddings" in takes:
        mask = torch.ones((SEQUENCES, _TOKENS, 1), dtype=torch.long)
        yield {**plain, "image_encoder_embeddings": seen[:, None], "image_attention_mask": mask}
    if network.main_input_name == "input_features":
        shape = (SEQUENCES, network.config.num_mel_bins, 2 * network.config.max_source_positions)
        heard = torch.randn(shape, generator=generator)
        heard[1] = heard[0]
        yield {"input_features": heard, "decoder_input_ids": tokens}


def _run(network: Any) -> None:
    """Runs a model on its sequences."""
    problems = []
    for part in (network, network.get_decoder() if hasattr(network, "get_decoder") else None):
        for arguments in _calls(network):
            if part is None:
                continue
            try:
                part(**arguments)
            except UNUSABLE as unusable:
                problems.append(unusable)
            else:
                return
    raise problems[0]


def _find_stack(network: Any) -> tuple[str, int, int]:
    """Returns the name of the list of layers that generates, how many there are, and the length of their stream.

    Of the lists of modules that all take and return states of one shape, it is the outermost, and of several the one
    that runs last.
    """
    import torch
    from torch import nn

    lists = {
        name: part
        for name, part in network.named_modules()
        if isinstance(part, nn.ModuleList) and any(layer is not None for each in part for layer in each.children())
    }
    calls: dict[str, dict[int, list[tuple[Any, Any]]]] = {name: {} for name in lists}
    order: list[str] = []

    def note(name: str, number: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            calls[name].setdefault(number, []).append((_first(args, kwargs), _first((output,), {})))
            order.append(name)

        return hook

    hooks = [
        layer.register_forward_hook(note(name, number), with_kwargs=True)
        for name, part in lists.items()
        for number, layer in enumerate(part)
    ]
    try:
        _run(network)
    finally:
        for hook in hooks:
            hook.remove()

    def fits(name: str) -> bool:
        found = calls[name]
        states = [state for each in found.values() for pair in each for state in pair]
        if len(found) != len(lists[name]) or not all(isinstance(state, torch.Tensor) for state in states):
            return False
        shapes = {tuple(state.shape) for state in states}
        shape = next(iter(shapes))
        return len(shapes) == 1 and len(shape) >= 3 and max(shape[1:-1]) >= _TOKENS

    fitting = [name for name in lists if fits(name)]
    outer = [name for name in fitting if not any(name.startswith(f"{other}.") for other in fitting if other != name)]
    if not outer:
        raise ArchitectureError(
            f"{type(network).__name__}: no list of layers was found whose layers all take and return the states of the "
            "tokens, so no stream can be followed"
        )
    last = max(outer, key=lambda name: len(order) - order[::-1].index(name))
    return last, len(lists[last]), int(calls[last][0][0][0].shape[-1])


def find_unreached(twin: Twin) -> list[str]:
    """Returns the matrices of the layers that change no state, numbers as ``#``; of experts, where none of them does.

    Only those with an axis as long as the stream are looked at.
    """
    import torch

    network = twin.network
    stack = dict(network.named_modules())[twin.stack]
    kinds: dict[str, list[Any]] = {}
    for name, parameter in stack.named_parameters():
        if parameter.ndim > 1 and twin.hidden in parameter.shape:
            kinds.setdefault(kind_of(name), []).append(parameter)
    with quiet(), torch.enable_grad():
        total = torch.stack([state.square().sum() for state in _states(network, stack, attached=True)]).sum()
        torch.autograd.backward(total)
    unreached = []
    with quiet(), torch.no_grad():
        before = _states(network, stack)
        for kind, parameters in kinds.items():
            if any(each.grad is not None and bool(each.grad.any()) for each in parameters):
                continue
            # What only chooses has no gradient, and a part in the states all the same.
            kept = [each.clone() for each in parameters]
            for each in parameters:
                each.copy_(-3 * each)
            if all(torch.equal(one, other) for one, other in zip(before, _states(network, stack), strict=True)):
                unreached.append(f"{twin.stack}.{kind}")
            for each, values in zip(parameters, kept, strict=True):
                each.copy_(values)
    return unreached


def _states(network: Any, stack: Any, *, attached: bool = False) -> list["torch.Tensor"]:
    """Returns the stream before the first and after every layer, for gradients if ``attached``."""
    states: list[Any] = []

    def keep(state: Any) -> None:
        states.append(state if attached else state.detach().clone())

    def before(_: Any, args: Any, kwargs: Any) -> None:
        if not states:
            keep(_first(args, kwargs))

    def after(_: Any, __: Any, ___: Any, output: Any) -> None:
        keep(_first((output,), {}))

    hooks = [stack[0].register_forward_pre_hook(before, with_kwargs=True)]
    hooks += [layer.register_forward_hook(after, with_kwargs=True) for layer in stack]
    try:
        _run(network)
    finally:
        for hook in hooks:
            hook.remove()
    return states


def _first(args: Any, kwargs: Any) -> Any:
    """Returns the first tensor of states among arguments or outputs, those called ``hidden_states`` before others."""
    import torch

    values = [kwargs["hidden_states"]] if "hidden_states" in kwargs and not args else [*args, *kwargs.values()]
    for value in values:
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 3:
            return value
        if isinstance(value, tuple | list | dict):
            inner = _first(value if not isinstance(value, dict) else tuple(value.values()), {})
            if inner is not None:
                return inner
    return None
