"""Reads a LoRA adapter as peft saves it: what it adds to which module, and what it replaces, as pure data."""

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
from msgspec import Meta

from ablate_shards.errors import AdapterError, CheckpointError
from ablate_shards.kernels.codecs.plain import STORED, decoded
from ablate_shards.kernels.merge.taken import Taken
from ablate_shards.names import ADAPTER_RECEIPT_NAME, CONFIG_NAME, NARROWING_NAME, TRAINING_NAME, WEIGHTS_NAME
from ablate_shards.surgery.anatomy.wrappers import unwrapped
from ablate_shards.surgery.checkpoint.digest import SOURCE_WEIGHTS
from ablate_shards.surgery.checkpoint.files import pointed_at
from ablate_shards.surgery.checkpoint.headers import TensorInfo, read_header
from ablate_shards.surgery.checkpoint.stores import is_hub_id
from ablate_shards.validation import Finite, checked

__all__ = ["Adapter", "LoraSettings", "LowRank", "TokenRows", "holds_adapter", "read_adapter"]

_ROOT = "base_model.model."
_MLX_WEIGHTS = "adapters.safetensors"
_MLX_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|word_embeddings|tok_embeddings)$")
_WITH_MLX = "fuse it with `mlx_lm.fuse`"
_FACTOR = re.compile(
    r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\."
    r"(?:lora_(?P<factor>[AB])(?:\.(?:[^.]+\.)?(?P<what>weight|bias))?|lora_embedding_(?P<embedding>[AB])(?:\.[^.]+)?)"
)
#: All experts in one tensor, A as ``[E, r, in]`` and B as ``[E, out, r]``.
_OF_EXPERTS = re.compile(
    r"(?P<stack>.+\.experts)\.(?P<leaf>w[123]|(?:gate|up|down)_proj)\.lora_(?P<factor>[AB])(?P<rest>(?:\.[^.]+){0,2})"
)
_STACKED = re.compile(r"\.experts\.(?:base_layer\.)*lora_(?P<factor>[AB])\.")
_MAGNITUDE = re.compile(r"(?P<module>.+?)\.lora_magnitude_vector(?:\.[^.]+){0,2}")
_LAYER = re.compile(r".*?\.[^.]*\.(?P<layer>\d+)\.")
#: What training alone needs: the projection of VeLoRA's backward pass, the sampler of MonteCLoRA.
_OF_TRAINING = re.compile(r".+\.lora_(?:velora|monteclora)_\w+(?:\..+)?")
_BASE_COPY = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.base_layer\.(?P<what>weight|bias)")
_TOKENS = re.compile(r"(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?")
#: As peft keeps a parameter that is trained whole, and the one that it began as, where it saves all of a module.
_SAVED = re.compile(r"(?P<module>.+?)\.modules_to_save\.(?:[^.]+\.)?(?P<what>weight|bias)")
_UNTRAINED = re.compile(r"(?P<module>.+?)\.original_module\.(?P<what>weight|bias)")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KOHYA, _KOHYA_FACTORS = re.compile(r"\.lora_(?P<factor>down|up)(?:\.|$)"), {"down": "A", "up": "B"}
_NOT_PLAIN = re.compile(r"(?:^|\.)(?P<what>lora_\w+|token_adapter|trainable_tokens\w*|modules_to_save)(?:\.|$)")

#: Keys of the configuration that change what a weight becomes, and that the merge takes into account.
_USED = {
    "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "target_parameters", "init_lora_weights", "bias", "lora_bias", "modules_to_save", "ensure_weight_tying",
    "use_dora", "trainable_token_indices", "task_type", "auto_mapping", "use_qalora",
}  # fmt: skip
#: Keys that say where an adapter came from, how it was trained, or what the names of its tensors say as well.
_IRRELEVANT = {
    "alpha", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_core", "merge_weights", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules",
}  # fmt: skip
_BESIDE = "load it with peft beside the base instead"
#: Methods that add to what a model reads or choose among adapters, which not even peft merges.
_WITHOUT_WEIGHTS = {
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "P_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "XLORA",
}  # fmt: skip
#: Why, and the way out.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA acts only on tokens after its invocation, so no weights hold it; "
    f"{_BESIDE}",
    "layer_replication": f"layers are used several times, each with an update of its own, and one weight cannot hold "
    f"them; {_BESIDE}, or merge it into a checkpoint that stores every copy",
    "arrow_config": f"Arrow chooses among adapters for every token, so no weights hold it; {_BESIDE}",
    "kasa_config": "KaSA is not merged here; merge it with peft itself",
    "use_bdlora": "block-diagonal factors are not merged here; merge it with peft itself",
    "megatron_config": "Megatron's parallel layers are not those of a checkpoint; merge it with peft itself",
}
#: A backward pass of their own; their forward pass and merge are those of LoRA.
_TRAINING_ONLY = {"velora_config", "monteclora_config"}
#: Initialisations that leave the base as it is.
_PLAIN_INITIALISATIONS = {"gaussian", "eva", "orthogonal", "mica"}
_STORED: dict[str, type[np.generic]] = {**STORED, "F64": np.float64}

#: The largest integer up to which a float holds every one.
_EXACT = 2**53
_Rank = Annotated[int, Meta(ge=1, le=_EXACT, description="a positive integer")]
_Tokens = tuple[Annotated[int, Meta(ge=0, le=_EXACT, description="the number of a token")], ...]
#: An integer stays one, as the receipt of a merge has it.
_Number = Annotated[Annotated[int, Meta(ge=-_EXACT, le=_EXACT)] | Finite, Meta(description="a finite number")]


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """What of ``adapter_config.json`` decides the result, under peft's names."""

    r: _Rank = 8
    lora_alpha: _Number = 8
    use_rslora: bool = False
    rank_pattern: Annotated[Mapping[str, _Rank], Meta(description="positive integers by pattern")] = field(
        default_factory=dict
    )
    alpha_pattern: Annotated[Mapping[str, _Number], Meta(description="finite numbers by pattern")] = field(
        default_factory=dict
    )
    fan_in_fan_out: bool = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_parameters: Annotated[tuple[str, ...], Meta(description="a list of names")] = ()
    trainable_token_indices: Annotated[
        _Tokens | Mapping[str, _Tokens], Meta(description="a list of tokens, or lists by module")
    ] = ()
    ensure_weight_tying: bool = False
    use_dora: bool = False
    task_type: str | None = None
    init_lora_weights: bool | str = True
    use_qalora: bool = False


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update ``s·B·A`` of one module.

    Attributes:
        module: The module's path in the model that was trained.
        down: The tensor A, ``[r, in]``, of E stacked experts ``[E·r, in]``.
        up: The tensor B, ``[out, r]``, of E stacked experts ``[out, r·E]``.
        bias: The bias of B, if it has one.
        kind: Of an embedding of peft and of a linear module of MLX, A and B are of the transposed weight.
        depth: How many adapters lie around it on the same module, which is so where peft wraps its parameters.
        magnitude: Of DoRA, the norms ``[out]`` that what ``W + s·B·A`` writes to each output is given.
        taken: What the training took out of the weight before it began.
    """

    module: str
    down: str
    up: str
    bias: str | None
    kind: Literal["linear", "embedding", "transposed"]
    depth: int
    magnitude: str | None = None
    taken: Taken | None = None

    @property
    def plain(self) -> bool:
        """Whether it is the update of a linear module's weight and nothing else."""
        return self.kind == "linear" and self.bias is self.magnitude is self.taken is None


@dataclass(frozen=True, slots=True)
class TokenRows:
    """Rows of an embedding, or of the output head, that were trained by themselves.

    Attributes:
        module: The module's path in the model that was trained.
        rows: The tensor of the rows, ``[tokens, d]``.
        tokens: Which rows they are, in their order.
    """

    module: str
    rows: str
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter as its configuration and its header describe it.

    Attributes:
        path: The folder.
        sha256: Digest of the configuration and the weights.
        config: Its settings.
        tensors: What the weights file holds, by the names in it.
        updates: The low-rank updates.
        replaced: Whole parameters, from their path in the model to the tensor that replaces them.
        copies: Parameters of the base that were saved along and never trained, likewise.
        base: Digest of the base it was trained on, None where nobody wrote it down.
        peft_version: The version of peft that saved it, None where it does not say.
        weights: The file that holds its tensors.
        token_rows: Rows of embeddings that replace those of the base.
        keeps_ties: Whether a head that is tied to the embedding changes with it, as in MLX.
        trained_class: The class of transformers that was trained, None where the configuration does not name it.
        trained_on: The repository and commit of its base, each None where the configuration does not name one.
        extracted: Whether it was made of an edit or of two checkpoints here, and says so.
        made_of: Digest of the weights that it was made of, None where nobody wrote it down.
        notes: Where its configuration and its weights differ, a line each.
    """

    path: Path
    sha256: str
    config: LoraSettings
    tensors: Mapping[str, TensorInfo]
    updates: tuple[LowRank, ...]
    replaced: Mapping[str, str]
    copies: Mapping[str, str]
    base: str | None
    peft_version: str | None = None
    weights: str = WEIGHTS_NAME
    token_rows: tuple[TokenRows, ...] = ()
    keeps_ties: bool = False
    trained_class: str | None = None
    trained_on: tuple[str | None, str | None] = (None, None)
    extracted: bool = False
    made_of: str | None = None
    notes: tuple[str, ...] = ()

    def scaling(self, key: str) -> tuple[int, float]:
        """Returns rank and scale of a module or parameter, by its path in the model that was trained.

        Raises:
            AdapterError: A pattern is not a regular expression.
        """
        rank = self._by_pattern("rank_pattern", key, self.config.r)
        alpha = self._by_pattern("alpha_pattern", key, self.config.lora_alpha)
        return int(rank), alpha / (math.sqrt(rank) if self.config.use_rslora else rank)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of one of its tensors: of A and B of stacked experts that of two dimensions."""
        shape = self.tensors[name].shape
        if (factor := self.stacked(name)) is None:
            return shape
        return (shape[0] * shape[1], shape[2]) if factor == "A" else (shape[0], shape[1] * shape[2])

    def stacked(self, name: str) -> Literal["A", "B"] | None:
        """Returns which factor of stacked experts a tensor is, ``[E, r, in]`` or ``[out, r, E]`` as vLLM reads them."""
        found = _STACKED.search(name) if len(self.tensors[name].shape) == 3 else None
        return None if found is None else found["factor"]  # type: ignore[return-value]

    def read(self, name: str, first: int = 0, count: int | None = None) -> np.ndarray:
        """Reads one tensor, or some of its elements, flat; float32 holds whatever an adapter is stored in.

        Args:
            name: The tensor.
            first: The first element.
            count: How many elements, all of them in the tensor's shape if None.

        Raises:
            AdapterError: It holds NaN or infinite values.
        """
        info = self.tensors[name]
        wanted = math.prod(info.shape) if count is None else count
        stored = np.empty(wanted, _STORED[info.dtype])
        with (self.path / self.weights).open("rb") as file:
            file.seek(info.start + first * stored.itemsize)
            if file.readinto(stored.data.cast("B") if wanted else bytearray()) != stored.nbytes:
                raise AdapterError(f"{self.path / self.weights}: ended early while {name} was read; it was changed")
        with np.errstate(over="ignore"):
            values = stored.astype(np.float32) if info.dtype == "F64" else decoded(stored, np.float32)
        if not math.isfinite(float(values.sum(dtype=np.float64))):
            raise AdapterError(f"{self.path / self.weights}: {name} holds NaN or infinite values; train it again")
        return values.reshape(info.shape) if count is None else values

    def _by_pattern(self, which: Literal["rank_pattern", "alpha_pattern"], key: str, default: float) -> float:
        for pattern, value in getattr(self.config, which).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", key):
                    return float(value)
            except re.error as error:
                raise AdapterError(
                    f"{self.path / CONFIG_NAME}: {which} holds {pattern!r}, which is not a regular expression ({error})"
                ) from error
        return default


def holds_adapter(path: Path) -> bool:
    """Tells whether a folder holds an adapter, and no weights of a model beside it."""
    weights = [file.name for file in path.glob("*.safetensors")]
    return (path / CONFIG_NAME).is_file() and {*weights} <= {WEIGHTS_NAME, _MLX_WEIGHTS} and bool(weights)


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter's configuration and header; of the weights, only the digest is taken.

    Raises:
        AdapterError: It is missing, malformed, or does something other than plain LoRA.
    """
    config_path = path / CONFIG_NAME
    mlx = (path / _MLX_WEIGHTS).is_file() and not (path / WEIGHTS_NAME).is_file()
    weights = path / (_MLX_WEIGHTS if mlx else WEIGHTS_NAME)
    if not path.is_dir():
        found = "a file; name the folder that it is in" if path.is_file() else "none"
        repo = str(path) if not path.is_file() and is_hub_id(str(path)) else ""
        way_out = f"; if it is on the Hub, fetch it with `hf download {repo} --local-dir FOLDER`" if repo else ""
        raise AdapterError(f"{path}: expected a folder with {CONFIG_NAME} and {WEIGHTS_NAME}, found {found}{way_out}")
    if not config_path.is_file():
        below = pointed_at(file.relative_to(path).as_posix() for file in sorted(path.glob(f"**/{CONFIG_NAME}")))
        raise AdapterError(f"{path}: holds no {CONFIG_NAME}{below or '; name the folder that peft saved it in'}")
    if not weights.is_file():
        others = sorted(file.name for file in path.glob("adapter_model*.*"))
        hint = f", but {others[0]}; save it again with a current peft, in one file of safetensors" if others else ""
        raise AdapterError(f"{path}: holds no {WEIGHTS_NAME}{hint}")
    raw = config_path.read_bytes()
    content = _object(config_path, raw)
    config = _mlx_settings(content, config_path) if mlx else _checked(content, config_path)
    version = content.get("peft_version")
    try:
        shard, _ = read_header(weights)
    except CheckpointError as error:
        raise AdapterError(str(error)) from error
    for tensor in shard.tensors:
        if tensor.dtype not in _STORED:
            raise AdapterError(
                f"{weights}: {tensor.name}: expected BF16, F16, F32 or F64, found {tensor.dtype}; save the adapter in "
                "one of them"
            )
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    tensors = shard.tensors if mlx else _of_each_expert(shard.tensors, weights)
    made = _made(path / ADAPTER_RECEIPT_NAME)
    sort = _sort_mlx if mlx else _sort
    updates, replaced, copies, token_rows = sort(tensors, weights, config)
    return Adapter(
        path=path,
        sha256=hashlib.sha256(hashlib.sha256(raw).digest() + bytes.fromhex(digest)).hexdigest(),
        config=config,
        tensors={tensor.name: tensor for tensor in tensors},
        updates=updates,
        replaced=replaced,
        copies=copies,
        base=_base_of(path / TRAINING_NAME) or _base_of(path / NARROWING_NAME),
        peft_version=version if isinstance(version, str) else None,
        weights=weights.name,
        token_rows=token_rows,
        keeps_ties=mlx,
        trained_class=_class_of(content),
        trained_on=_origin_of(content),
        extracted=bool(made),
        made_of=made.get(SOURCE_WEIGHTS),
        notes=() if mlx else (*_changed(made, digest, weights), *_differences(content, updates, replaced, weights)),
    )


def _class_of(config: Mapping[str, Any]) -> str | None:
    """Returns the class that peft notes where the configuration names no task."""
    mapping = config.get("auto_mapping")
    if not isinstance(mapping, Mapping) or not str(mapping.get("parent_library")).startswith("transformers."):
        return None
    found = mapping.get("base_model_class")
    return found if isinstance(found, str) and found else None


def _origin_of(config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Returns the repository and the commit that a configuration names as the base; not folders or branches."""
    name, revision = str(config.get("base_model_name_or_path")), str(config.get("revision"))
    return name if is_hub_id(name) else None, revision if _COMMIT.fullmatch(revision) else None


def _differences(
    config: Mapping[str, Any], updates: Iterable[LowRank], replaced: Iterable[str], path: Path
) -> Iterator[str]:
    """Yields what the configuration says and the weights do not hold, and the other way round.

    Raises:
        AdapterError: The weights are whole ones, and the configuration does not say that any was trained whole.
    """
    saved = [name for name in config.get("modules_to_save") or () if isinstance(name, str)]
    whole = [name for name in replaced if _LAYER.match(name) and not any(f".{each}." in f".{name}" for each in saved)]
    if not updates and whole:
        raise AdapterError(
            f"{path}: holds no LoRA tensors but {len(whole)} whole weights of layers, such as {whole[0]}, of which "
            "modules_to_save names none; if a trainer saved the model in the place of its adapter, use that as the "
            "model, with the config.json of its base, and otherwise save the adapter again"
        )
    if lacking := [each for each in saved if not any(f".{each}." in f".{name}" for name in replaced)]:
        yield f"modules_to_save names {', '.join(lacking)}, of which {path.name} holds nothing"
    # Experts go by names of their own, which trainers do not list.
    plain = [update.module for update in updates if ".experts" not in update.module]
    try:
        beside = [module for module in plain if not _targeted(config, module)]
    except (re.error, TypeError):
        beside = []
    if beside:
        yield (
            f"{path.name} holds a LoRA of modules that {CONFIG_NAME} does not target ({len(beside)}, such as "
            f"{beside[0]}); peft leaves them out, and here they are merged"
        )


def _targeted(config: Mapping[str, Any], module: str) -> bool:
    """Tells whether peft, with this configuration, adapts a module; True where that depends on more than its name."""
    targets, layers = config.get("target_modules"), config.get("layers_to_transform")
    if targets is None or _names(config.get("exclude_modules"), module):
        return targets is None
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.search(targets, module) is not None
    number = _LAYER.match(module)
    if module not in targets and number and layers not in (None, []):
        chosen = layers if isinstance(layers, list) else [layers]
        return int(number["layer"]) in chosen and _names(targets, module)
    return _names(targets, module)


def _names(given: Any, module: str) -> bool:
    """Tells whether an expression or a list of the ends of names says a module."""
    if isinstance(given, str):
        return re.fullmatch(given, module) is not None
    return any(f".{module}".endswith(f".{each}") for each in given or ())


def _mlx_settings(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """Returns what decides the result of an adapter of MLX, which gives the scale itself in place of alpha."""
    kind, given = config.get("fine_tune_type", "lora"), config.get("lora_parameters")
    if kind != "lora" or not isinstance(given, Mapping) or not {"rank", "scale"} <= given.keys():
        raise AdapterError(
            f"{path}: expected a LoRA of MLX with lora_parameters of rank and scale, found fine_tune_type {kind!r} and "
            f"{given!r}; {_WITH_MLX}"
        )
    try:
        rank, scale = checked(given["rank"], _Rank, "rank"), checked(given["scale"], Finite, "scale")
    except ValueError as error:
        raise AdapterError(f"{path}: lora_parameters: {error}; {_WITH_MLX}") from error
    return LoraSettings(r=rank, lora_alpha=scale * rank)


_Sorted: TypeAlias = tuple[tuple[LowRank, ...], dict[str, str], dict[str, str], tuple[TokenRows, ...]]
"""Updates, replacements, copies of the base, and rows of tokens."""


def _sort_mlx(tensors: tuple[TensorInfo, ...], path: Path, _: LoraSettings) -> _Sorted:
    """Returns the updates of an adapter of MLX: ``lora_a`` is ``[in, r]`` and ``lora_b`` is ``[r, out]``."""
    names = {tensor.name: tensor for tensor in tensors}
    updates = []
    for name, tensor in names.items():
        module, factor = name.rpartition(".")[::2]
        other = f"{module}.{'lora_b' if factor == 'lora_a' else 'lora_a'}"
        if factor not in ("lora_a", "lora_b") or other not in names or len(tensor.shape) != 2 or 0 in tensor.shape:
            raise AdapterError(
                f"{path}: {name} of shape {list(tensor.shape)}: expected lora_a and lora_b of 2 dimensions; {_WITH_MLX}"
            )
        if factor == "lora_a":
            kind: Literal["linear", "transposed"] = "linear" if _MLX_EMBEDDING.search(module) else "transposed"
            updates.append(LowRank(unwrapped(module), other, name, None, kind, 0))
    if not updates:
        raise AdapterError(f"{path}: holds no LoRA tensors; {_WITH_MLX}")
    return tuple(sorted(updates, key=lambda update: update.module)), {}, {}, ()


def _base_of(path: Path) -> str | None:
    if not path.is_file():
        return None
    base = _object(path, path.read_bytes()).get("base")
    found = base.get("sha256") if isinstance(base, dict) else None
    return found if isinstance(found, str) and found else None


def _made(path: Path) -> dict[str, Any]:
    """Returns the receipt of an adapter that was extracted, empty where there is none."""
    return _object(path, path.read_bytes()) if path.is_file() else {}


def _changed(made: Mapping[str, Any], digest: str, path: Path) -> Iterator[str]:
    """Yields that an adapter is not as its receipt says."""
    files = made.get("files")
    if isinstance(files, dict) and files.get(path.name) != digest:
        yield f"{path} was changed after {ADAPTER_RECEIPT_NAME} was written, so the figures there are not its own"


def _object(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not valid JSON ({error}); save the adapter again") from error
    if not isinstance(content, dict):
        raise AdapterError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def _checked(config: Mapping[str, Any], path: Path) -> LoraSettings:
    """Returns what decides the result, checked; refuses by name whatever is not plain LoRA."""
    kind = config.get("peft_type")
    if kind == "TRAINABLE_TOKENS":
        config = {"peft_type": "LORA", "trainable_token_indices": config.get("token_indices")}
    elif kind != "LORA":
        way_out = _BESIDE if kind in _WITHOUT_WEIGHTS else "merge it with peft itself"
        raise AdapterError(f"{path}: expected a LORA adapter, found {kind}; {way_out}")
    for key, why in _REFUSED.items():
        if config.get(key):
            raise AdapterError(f"{path}: {key}: {why}")
    known = _USED | _IRRELEVANT | _TRAINING_ONLY | _REFUSED.keys()
    for key, value in config.items():
        if key not in known and value not in (None, False, "", [], {}):
            raise AdapterError(
                f"{path}: {key} is set to {value!r}, which this version does not know; merge it with peft itself"
            )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start not in _PLAIN_INITIALISATIONS and _taken_by(start) is None:
        raise AdapterError(f"{path}: init_lora_weights is {start!r}, {_why_not_again(start)}")

    try:
        return checked({key: value for key, value in config.items() if value is not None}, LoraSettings)
    except ValueError as error:
        raise AdapterError(f"{path}: {error}") from error


def _why_not_again(start: str) -> str:
    """Returns why what an initialisation took out of the base is not found again, and the way out."""
    if start == "loftq":
        return (
            "which puts codes in the base's place; save the base as it was trained, without the adapter, and merge "
            "into that, with init_lora_weights true"
        )
    how = "by a random method" if start.startswith("pissa_niter_") else "by means that only the training had"
    return (
        f"which subtracts from the base what it starts with, found {how}; save the adapter again where it was trained, "
        "with path_initial_model_for_weight_conversion, which makes it a plain one"
    )


def _taken_by(start: object) -> Taken | None:
    """Returns what an initialisation took out of the base, where the base tells that again.

    peft knows ``olora`` in any case, ``pissa`` in one.
    """
    if start == "pissa":
        return "pissa"
    return "olora" if isinstance(start, str) and start.lower() == "olora" else None


def _inner(name: str) -> str:
    """Returns a tensor's name in the model that was trained, without peft's and wrappers' own."""
    inner = unwrapped(name)
    while inner.startswith(_ROOT):
        inner = unwrapped(inner.removeprefix(_ROOT))
    return inner.replace("model.unembed_tokens.", "lm_head.", 1)  # as Tinker calls it


def _of_each_expert(tensors: tuple[TensorInfo, ...], path: Path) -> tuple[TensorInfo, ...]:
    """Returns the tensors with those of SGLang and Tinker, which hold A or B of all experts, cut into one for each.

    One of the two may be the same for all experts. Both are empty where experts have no such matrix, as those without a
    gate, whose only one before the last is called w1.
    """
    found: dict[tuple[str, str], dict[str, tuple[TensorInfo, str]]] = {}
    rest = []
    for tensor in tensors:
        match = _OF_EXPERTS.fullmatch(tensor.name)
        if match is None or (len(tensor.shape) != 3 and 0 not in tensor.shape):
            rest.append(tensor)
        else:
            found.setdefault((match["stack"], match["leaf"]), {})[match["factor"]] = tensor, match["rest"]
    empty = {key for key, factors in found.items() if all(0 in tensor.shape for tensor, _ in factors.values())}
    for (stack, leaf), factors in found.items():
        if (stack, leaf) in empty:
            continue
        counts = {tensor.shape[0] for tensor, _ in factors.values()} - {1}
        if len(counts) != 1 or any(len(tensor.shape) != 3 for tensor, _ in factors.values()):
            shown = " and ".join(str(list(tensor.shape)) for tensor, _ in factors.values())
            raise AdapterError(
                f"{path}: {stack}.{leaf}: expected lora_A [experts, r, in] and lora_B [experts, out, r], one of which "
                f"may be the same for all experts, found {shown}; save the adapter again"
            )
        for factor, (tensor, ending) in factors.items():
            count, size = tensor.shape[0], (tensor.end - tensor.start) // tensor.shape[0]
            for expert in range(max(counts)):
                start = tensor.start + (expert if count > 1 else 0) * size
                called = "up_proj" if leaf == "w1" and (stack, "w3") in empty else leaf
                name = f"{stack}.{expert}.{called}.lora_{factor}{ending}"
                rest.append(
                    dataclasses.replace(tensor, name=name, shape=tensor.shape[1:], start=start, end=start + size)
                )
    return tuple(rest)


def _sort(tensors: tuple[TensorInfo, ...], path: Path, config: LoraSettings) -> _Sorted:
    """Sorts the tensors by what they do: factors of updates, replacements, copies of the base, rows of tokens."""
    factors: dict[tuple[str, int, str], dict[str, str]] = {}
    magnitudes: dict[str, str] = {}
    rest: list[tuple[str, str]] = []
    for tensor in tensors:
        inner = _inner(tensor.name)
        if config.use_dora and (match := _MAGNITUDE.fullmatch(inner)):
            magnitudes[match["module"]] = tensor.name
            continue
        if _OF_TRAINING.fullmatch(inner):
            continue
        match = _FACTOR.fullmatch(inner)
        if match is None:
            rest.append((inner, tensor.name))
            continue
        kind = "embedding" if match["embedding"] else "linear"
        role = "bias" if match["what"] == "bias" else match["factor"] or match["embedding"]
        if match["what"] == "bias" and match["factor"] == "A":
            raise AdapterError(f"{path}: {tensor.name}: LoRA has no bias of A")
        if role != "bias" and (len(tensor.shape) < 2 or 0 in tensor.shape):
            raise AdapterError(
                f"{path}: {tensor.name}: expected 2 dimensions, found {list(tensor.shape)}; it was saved in pieces, "
                "so save it again with all of them gathered, as stage3_gather_16bit_weights_on_model_save does"
            )
        key = (match["module"], match["nested"].count(".base_layer"), kind)
        if (other := factors.setdefault(key, {}).setdefault(role, tensor.name)) != tensor.name:
            raise AdapterError(
                f"{path}: {other} and {tensor.name} are of the same module; save one adapter to a folder, with peft"
            )
    for key, found in factors.items():
        if missing := {"A", "B"} - found.keys():
            raise AdapterError(f"{path}: {key[0]}: expected both lora_A and lora_B, found no lora_{missing.pop()}")
    taken = _taken_by(config.init_lora_weights)
    updates = tuple(
        LowRank(
            module,
            found["A"],
            found["B"],
            found.get("bias"),
            kind,  # type: ignore[arg-type]
            depth,
            magnitudes.get(module),
            taken if kind == "linear" else None,  # peft starts embeddings from nothing whatever it is told
        )
        for (module, depth, kind), found in sorted(factors.items())
    )
    if config.use_dora and (odd := {update.module for update in updates} ^ magnitudes.keys()):
        raise AdapterError(
            f"{path}: {min(odd)}: expected lora_A and lora_B and, because use_dora is set, lora_magnitude_vector; save "
            "the adapter again with peft"
        )
    replaced: dict[str, str] = {}
    copies: dict[str, str] = {}
    token_rows: list[TokenRows] = []
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    for inner, name in rest:
        if match := _TOKENS.fullmatch(inner):
            token_rows.append(TokenRows(match["module"], name, _tokens_of(match["module"], shapes[name], path, config)))
        elif _UNTRAINED.fullmatch(inner):
            continue
        elif match := _SAVED.fullmatch(inner):
            replaced.setdefault(f"{match['module']}.{match['what']}", name)
        elif match := _BASE_COPY.fullmatch(inner):
            trained = match["what"] == "bias" and config.bias != "none"
            (replaced if trained else copies)[f"{match['module']}.{match['what']}"] = name
        elif match := _KOHYA.search(inner):
            raise AdapterError(
                f"{path}: {name}: peft calls this factor lora_{_KOHYA_FACTORS[match['factor']]}; rename the tensors, "
                "lora_down to lora_A and lora_up to lora_B"
            )
        elif match := _NOT_PLAIN.search(inner):
            raise AdapterError(f"{path}: {name}: {match['what']} cannot be merged here; merge it with peft itself")
        else:
            replaced[inner] = name
    if not updates and not replaced and not token_rows:
        raise AdapterError(f"{path}: holds no LoRA tensors")
    return updates, replaced, copies, tuple(token_rows)


def _tokens_of(module: str, shape: tuple[int, ...], path: Path, config: LoraSettings) -> tuple[int, ...]:
    """Returns the tokens whose rows a tensor of a given shape holds, as the configuration lists them."""
    said = config.trainable_token_indices
    if isinstance(said, Mapping):
        named = (tokens for name, tokens in said.items() if f".{module}".endswith(f".{name}"))
        # Of a head that is tied, the configuration need not say anything.
        said = next(named, next(iter(said.values()), ()))
    if len(shape) != 2 or shape[0] != len(said) or len(set(said)) < len(said):
        raise AdapterError(
            f"{path}: {module}: expected a row for each token of trainable_token_indices, {len(said)} different ones, "
            f"found {list(shape)}; save the adapter again with peft"
        )
    return said
