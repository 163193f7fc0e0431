"""What a merged model has that its base has not: a head of its own, rows for new tokens, the head of a classifier."""

import dataclasses
import hashlib
import json
import math
import re
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from ablate_shards.errors import AdapterError, ExecuteError, PlanError
from ablate_shards.kernels.codecs.plain import STORED, decoded
from ablate_shards.surgery.anatomy.architecture import Anatomy, head_of
from ablate_shards.surgery.anatomy.tied import stored_head
from ablate_shards.surgery.checkpoint.amended import CONFIG, Amendments, NewTensor
from ablate_shards.surgery.checkpoint.checkpoint import Checkpoint, text_part
from ablate_shards.surgery.checkpoint.headers import ITEM_BYTES, TensorInfo
from ablate_shards.surgery.merge.adapter import Adapter, LowRank, TokenRows

__all__ = ["Found", "find_amendments", "read_files", "read_pieces"]

_T = TypeVar("_T")

_HEAD = re.compile(r"(?:^|\.)(?:lm_head|embed_out)\.weight$")
#: Embeddings and heads, of encoders and of encoders with a decoder too.
_SHARED = re.compile(
    r"(?:^|\.)(?:shared|embed_tokens|wte|word_embeddings|lm_head|embed_out|predictions\.decoder)\.weight$"
)
_POSITIONS = re.compile(r"(?:^|[._])(?:wpe|positions?|position_embeddings)\.weight$")
_LM_HEAD = "lm_head.weight"
#: Elements of a tensor that are compared at a time.
_PIECE = 1 << 18
_TIE = "tie_word_embeddings"
#: The files of a tokenizer, and the template that goes with its special tokens.
_TOKENIZER = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "merges.txt", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "vocab.json", "vocab.txt",
)  # fmt: skip
#: The end of a class's name by the task that peft knows it by.
_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
#: Model types whose classifiers transformers calls after the text part, unlike the model itself.
_OF_TEXT = frozenset({"cohere_compass_text", "gemma3_text", "qwen3_5_text"})
_CLASS = re.compile(r"(?P<stem>\w+?)(?:For[A-Z]\w*|LMHeadModel|Model)")
#: No head of its own lies in a layer of the model.
_IN_LAYER = re.compile(r"(?:^|\.)(?:layers?|h|blocks?)\.\d+\.")
#: Heads whose rows are the labels, as transformers calls them.
_LABELS = re.compile(r"(?:^|\.)(?:score|classifier|classifier\.out_proj)\.(?:weight|bias)$")


@dataclass(frozen=True, slots=True)
class Found:
    """What a merge has to add or change besides the values of weights.

    Attributes:
        amendments: The changes.
        same: Tensors of the adapter that say what others say already, so that they are left out.
        begins_as: Tensors of the adapter that weights begin as, because they hold the rows of new tokens, by weight.
        tied: The head that is stored although it is tied, and the embedding as which it is changed.
        parted: Whether the head parts from the embedding.
        notes: What the user should know, a line each.
    """

    amendments: Amendments = field(default_factory=Amendments)
    same: frozenset[str] = frozenset()
    begins_as: Mapping[str, str] = field(default_factory=dict)
    tied: tuple[str, str] | None = None
    parted: bool = False
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Part:
    """The token embedding or the output head, and what an adapter says of it.

    Attributes:
        name: The weight; of a head that is neither stored nor in the adapter, None.
        update: A low-rank update.
        replaced: The tensor that replaces it.
        rows: Rows that replace some of it.
        copy: What it was before the training, rows of new tokens among it.
    """

    name: str | None
    update: LowRank | None = None
    replaced: str | None = None
    rows: TokenRows | None = None
    copy: str | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The tensors that change it."""
        update = () if self.update is None else (self.update.down, self.update.up)
        rows = () if self.rows is None else (self.rows.rows,)
        return (*update, *rows, *([self.replaced] if self.replaced else []))


def find_amendments(
    checkpoint: Checkpoint, adapter: Adapter, anatomy: Anatomy | None, find: Callable[[str], str | None]
) -> Found:
    """Finds what a merge has to add or change besides the values of weights.

    Args:
        checkpoint: The base.
        adapter: What to merge.
        anatomy: The base's writers, None where they are not known.
        find: Returns the weight that a parameter of the trained model is stored as.

    Raises:
        AdapterError: The adapter lacks what the merged model needs.
        PlanError: The base has no configuration that could be changed.
    """
    finder = _Finder(checkpoint, adapter, anatomy, find)
    finder.look_at_embeddings()
    finder.look_at_labels()
    return finder.found()


def read_files(adapter: Adapter, amendments: Amendments) -> dict[str, bytes]:
    """Returns the files of an adapter's folder that are carried over.

    Raises:
        ExecuteError: One of them has changed since.
    """
    contents = {name: (adapter.path / name).read_bytes() for name in amendments.files}
    for name, content in contents.items():
        if hashlib.sha256(content).hexdigest() != amendments.files[name]:
            raise ExecuteError(f"{adapter.path / name}: changed while it was read; run again when nothing writes to it")
    return contents


class _Finder:
    def __init__(
        self, checkpoint: Checkpoint, adapter: Adapter, anatomy: Anatomy | None, find: Callable[[str], str | None]
    ) -> None:
        self._checkpoint, self._adapter, self._anatomy, self._find = checkpoint, adapter, anatomy, find
        self._file = adapter.path / adapter.weights
        self._tensors: dict[str, NewTensor] = {}
        self._config: dict[str, Any] = {}
        self._same: set[str] = set()
        self._begins_as: dict[str, str] = {}
        self._tied: tuple[str, str] | None = None
        self._files: dict[str, str] = {}
        self._notes: list[str] = []

    def found(self) -> Found:
        """Returns what was found."""
        if self._config and (self._checkpoint.config is None or CONFIG not in self._checkpoint.sidecars):
            raise PlanError(
                f"{self._checkpoint.name}: {', '.join(self._config)} has to be set in {CONFIG}, and there is none to "
                "carry over; name a folder that holds the weights and their configuration"
            )
        if self._config:
            said = (f"{path} {json.dumps(value)}" for path, value in self._config.items())
            self._notes.append(f"{CONFIG} is given {', '.join(said)}")
        return Found(
            Amendments(tuple(self._tensors.values()), self._config, self._files),
            frozenset(self._same),
            self._begins_as,
            self._tied,
            _TIE in self._config,
            tuple(self._notes),
        )

    # ------------------------------------------------------------------------------------- embeddings

    def look_at_embeddings(self) -> None:
        """Finds whether the head parts from the embedding, and whether either has rows for more or fewer tokens."""
        embedding = self._embedding()
        several = bool((self._checkpoint.config or {}).get("is_encoder_decoder"))
        if embedding is None or several:
            self._check_shared(several=several)
        if embedding is None:
            return
        stored = head_of(self._checkpoint.tensors)
        one = self._part(lambda path: self._find(path) == embedding, embedding)
        other = self._part(lambda path: self._is_head(path, stored), stored)
        if not one.sources and not other.sources:
            return
        if self._is_classifier() or self._anatomy is None:
            parts = [one]  # an output head that is stored is not part of it
        elif not self._anatomy.tied:
            parts = [one] if other.name is None else [one, other]
        elif self._stays_tied(one, other):
            self._keep_tied(one, other, self._anatomy)
            parts = [one]
        else:
            parts = self._part_ways(one, other)
        height = self._checkpoint.tensors[embedding].shape[0]
        rows = next((found for part in parts if (found := self._rows_of(part, height)) != height), height)
        if rows != height:
            self._resize(parts, rows, height)
        if rows != height or one.rows or other.rows:
            self._take_tokenizer()

    def _check_shared(self, *, several: bool) -> None:
        """Refuses changes of what other weights are tied to, where not all of those are known.

        peft trains one of them by itself, and loaders make the others the same. What was saved and never trained,
        because the model does not use it under that name, changes nothing.

        Args:
            several: Whether the model has an encoder and a decoder, whose embeddings are one even if the head is not.
        """
        tied = (self._checkpoint.config or {}).get(_TIE, True) is not False
        updates = {f"{update.module}.weight": update.up for update in self._adapter.updates}
        rows = {f"{rows.module}.weight": rows.rows for rows in self._adapter.token_rows}
        for path, source in {**updates, **self._adapter.replaced, **rows}.items():
            name = self._find(path)
            apart = name is not None or not tied if _HEAD.search(path) else not (tied or several)
            if apart or not _SHARED.search(path) or self._is_classifier():
                continue
            if name is not None and path in self._adapter.replaced and self._is_still(source, name):
                self._same.add(source)
                continue
            raise AdapterError(
                f"{self._file}: {source} is of {path}, to which other weights of {self._checkpoint.name} are tied; "
                "peft trained it apart from them, and no checkpoint that loaders tie holds that; load it with peft "
                "beside the base instead"
            )

    def _is_still(self, source: str, name: str) -> bool:
        """Returns whether a tensor of the adapter holds the numbers of a weight of the base."""
        tensor = self._checkpoint.tensors[name]
        if tensor.dtype not in ITEM_BYTES or self._adapter.shape(source) != tensor.shape:
            return False
        return all(
            np.array_equal(decoded(stored, np.float32), self._adapter.read(source, first, len(stored)))
            for first, stored in read_pieces(self._checkpoint, tensor, math.prod(tensor.shape))
        )

    def _is_classifier(self) -> bool:
        """Returns whether the trained model has another head than that of a language model."""
        architectures = (self._checkpoint.config or {}).get("architectures") or ()
        ends = tuple(_TASKS.values())
        return self._adapter.config.task_type in _TASKS or any(str(name).endswith(ends) for name in architectures)

    def _embedding(self) -> str | None:
        if self._anatomy is None:
            return None
        names = (
            writer.name
            for writer in self._anatomy.writers
            # A projection of narrower embeddings writes too, and is [hidden, inputs].
            if writer.component == "embedding" and writer.kind == "weight" and writer.axis == -1 and not writer.mtp
        )
        return next((name for name in names if not _POSITIONS.search(name)), None)

    def _part(self, means: Callable[[str], bool], name: str | None) -> _Part:
        adapter = self._adapter
        updates = {f"{update.module}.weight": update for update in adapter.updates if update.depth == 0}
        rows = {f"{rows.module}.weight": rows for rows in adapter.token_rows}
        if name is None:
            path = next((path for path in (*updates, *adapter.replaced, *rows) if means(path)), None)
            name = path and ".".join(path.split(".")[-2:])

        def said(sources: Mapping[str, _T]) -> _T | None:
            return next((source for path, source in sources.items() if means(path) and source not in self._same), None)

        return _Part(name, said(updates), said(adapter.replaced), said(rows), said(adapter.copies))

    def _is_head(self, path: str, stored: str | None) -> bool:
        return self._find(path) == stored if stored is not None else bool(_HEAD.search(path))

    def _stays_tied(self, one: _Part, other: _Part) -> bool:
        """Returns whether embedding and head are one weight after the training too."""
        if not other.sources:
            # peft, told to keep ties, finds those of modules of this name only.
            told = self._adapter.config.ensure_weight_tying and str(one.name).endswith("embed_tokens.weight")
            return one.rows is not None or self._adapter.keeps_ties or told
        if one.replaced and other.replaced:
            return self._equal(one.replaced, other.replaced)
        if one.rows and other.rows:
            return one.rows.tokens == other.rows.tokens and self._equal(one.rows.rows, other.rows.rows)
        if one.update and other.update and one.update.magnitude is other.update.magnitude is other.update.taken is None:
            # What is A of an embedding is B of a head, transposed.
            return self._equal(one.update.down, other.update.up, transposed=True) and self._equal(
                one.update.up, other.update.down, transposed=True
            )
        return False

    def _equal(self, one: str, other: str, *, transposed: bool = False) -> bool:
        """Compares two tensors of the adapter; those that are to be transposed are factors, which fit into memory."""
        read, shape = self._adapter.read, self._adapter.shape(one)
        if shape != self._adapter.shape(other)[:: -1 if transposed else 1]:
            return False
        if transposed:
            return np.array_equal(read(one), read(other).T)
        count = math.prod(shape)
        pieces = ((first, min(_PIECE, count - first)) for first in range(0, count, _PIECE))
        return all(np.array_equal(read(one, *piece), read(other, *piece)) for piece in pieces)

    def _keep_tied(self, one: _Part, other: _Part, anatomy: Anatomy) -> None:
        """Changes the head with the embedding: what the adapter says of it, it says twice."""
        self._same |= {*other.sources, *([other.copy] if other.copy else [])}
        head = stored_head(self._checkpoint, anatomy)
        if head is None:
            self._notes.append("the output head is tied to the token embedding, so both are changed")
            return
        self._notes.append(head.note)
        if one.name is not None and head.embedding == one.name:
            self._tied = head.tensor.name, one.name

    def _part_ways(self, one: _Part, other: _Part) -> list[_Part]:
        """Gives the head a weight of its own, which begins as the embedding was, rows for new tokens and all."""
        name = other.name or _LM_HEAD
        if name not in self._checkpoint.tensors:
            embedding = self._checkpoint.tensors[one.name or ""]
            self._tensors[name] = NewTensor(name, embedding.shard, embedding.dtype, embedding.shape, embedding.name)
            self._notes.append(
                f"the output head was tied to the token embedding, and the training made two of them, so {name} is "
                "stored by itself"
            )
            copy = one.copy or other.copy
            one, other = dataclasses.replace(one, copy=copy), dataclasses.replace(other, copy=copy, name=name)
        if other.update is not None and other.update.taken is not None:
            # peft takes it out of the one weight that both are until the head has an update.
            if other.copy is None:
                raise AdapterError(
                    f"{self._file}: {other.update.up}: {other.update.taken} took a part out of the token embedding, "
                    "to which the output head was tied, and what is left of it is not in the adapter; save it again "
                    "with save_embedding_layers=True"
                )
            self._begins_as |= {part.name: other.copy for part in (one, other) if part.name}
        self._config[_TIE] = False
        part = text_part(self._checkpoint.config or {})
        if part is not None and _TIE in part[1]:
            self._config[f"{part[0]}.{_TIE}"] = False
        return [one, other]

    def _rows_of(self, part: _Part, height: int) -> int:
        """Returns how many rows a part has after the training, if anything tells, else those that it has."""
        if whole := part.replaced or part.copy:
            return self._adapter.shape(whole)[0]
        if part.update is None:
            return height
        down, up = (self._adapter.shape(source) for source in (part.update.down, part.update.up))
        return up[0] if part.update.kind == "linear" else down[1]

    def _resize(self, parts: Sequence[_Part], rows: int, height: int) -> None:
        """Gives embedding, head and configuration the number of rows that the vocabulary has after the training."""
        for part in parts:
            if self._rows_of(part, height) != rows or not (part.replaced or part.copy):
                raise AdapterError(
                    f"{self._file}: was trained with {rows} tokens, and {self._checkpoint.name} has {height}; the rows "
                    f"of {part.name} for the others are not in it; save the adapter again with "
                    f"save_embedding_layers=True, or train it with {_leaf(part.name)} among modules_to_save"
                )
            self._stretch(part.name or "", rows)
            if part.copy and not part.replaced:
                self._begins_as[part.name or ""] = part.copy
        if self._tied is not None:
            self._stretch(self._tied[0], rows)
        for path, source in self._adapter.replaced.items():
            if path.endswith("lm_head.bias") and self._adapter.shape(source) == (rows,) and (name := self._find(path)):
                self._stretch(name, rows)
        config = self._checkpoint.config or {}
        text = text_part(config)
        inner = text is not None and ("vocab_size" in text[1] or "vocab_size" not in config)
        if text is not None and inner:
            self._config[f"{text[0]}.vocab_size"] = rows
        if "vocab_size" in config or not inner:
            self._config["vocab_size"] = rows

    def _stretch(self, name: str, rows: int) -> None:
        """Gives a weight another number of rows."""
        tensor = self._tensors.get(name) or self._checkpoint.tensors[name]
        begins_as = self._tensors[name].begins_as if name in self._tensors else name
        shape = (rows, *tensor.shape[1:])
        self._tensors[name] = NewTensor(name, tensor.shard, tensor.dtype, shape, begins_as)

    def _take_tokenizer(self) -> None:
        for name in _TOKENIZER:
            path = self._adapter.path / name
            if path.is_file():
                self._files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        if self._files:
            self._notes.append(f"tokens were trained, so {', '.join(self._files)} of {self._adapter.path} is taken")
        else:
            self._notes.append(
                f"tokens were trained, but {self._adapter.path} holds no tokenizer; if it has new ones, add it to OUT"
            )

    # ---------------------------------------------------------------------------------------- labels

    def look_at_labels(self) -> None:
        """Finds the head of a classifier or reward model, which the base has not, or for another number of labels."""
        missing: dict[str, str] = {}
        for path, source in self._adapter.replaced.items():
            if self._named_otherwise(path, source):
                continue
            name = self._find(path)
            if name is None:
                if not _IN_LAYER.search(path):
                    missing[path] = source
            elif self._adapter.shape(source) != self._checkpoint.tensors[name].shape and _LABELS.search(path):
                tensor = self._checkpoint.tensors[name]
                self._tensors[name] = NewTensor(name, tensor.shard, tensor.dtype, self._adapter.shape(source))
                self._label(path, source)
        if not missing:
            return
        architecture = self._architecture(missing)
        if architecture is None:
            return
        if architecture.endswith(_TASKS["QUESTION_ANS"]):
            self._check_prefix(architecture)
        dtype = self._dtype()
        for path, source in missing.items():
            shard = self._checkpoint.shards[-1].name
            self._tensors[path] = NewTensor(path, shard, dtype, self._adapter.shape(source))
            self._label(path, source)
        self._config["architectures"] = [architecture]
        self._notes.append(f"{', '.join(missing)}: added, so the model becomes a {architecture}")

    def _architecture(self, missing: Collection[str]) -> str | None:
        """Returns the class of the trained model, None where what the base lacks is not its head."""
        config = self._checkpoint.config or {}
        own = str(next(iter(config.get("architectures") or ()), ""))
        if (named := self._adapter.trained_class) not in (None, own):
            return named
        task = _TASKS.get(self._adapter.config.task_type or "")
        if task is None:
            self._refuse_without_task(missing)
            return None
        stem = _CLASS.fullmatch(own)
        if stem is None:
            raise PlanError(
                f"{self._checkpoint.name}: {CONFIG} names no class of transformers under architectures, so what class "
                f"{next(iter(missing))} makes of it is not known; write the base model's class there"
            )
        return f"{stem['stem']}{'Text' if config.get('model_type') in _OF_TEXT else ''}{task}"

    def _named_otherwise(self, path: str, source: str) -> bool:
        """Returns whether a parameter belongs to the embedding or the head, which are looked at before."""
        return source in self._same or path in self._tensors or self._find(path) in self._tensors

    def _check_prefix(self, architecture: str) -> None:
        """Refuses a class that calls the decoder by another name than the base does, and so loads nothing of it."""
        for update in self._adapter.updates:
            stored = self._find(f"{update.module}.weight")
            trained, known = update.module.split("."), (stored or "").removesuffix(".weight").split(".")
            while trained and known and trained[-1] == known[-1]:
                trained.pop()
                known.pop()
            if stored and trained and known and trained[0] != known[0]:
                raise AdapterError(
                    f"{self._file}: {architecture} calls {stored.removesuffix('.weight')} {update.module}, so that it "
                    f"loads no such weight of {self._checkpoint.name} and was trained on random ones; train the "
                    f"adapter on a base that {architecture} has saved"
                )

    def _refuse_without_task(self, missing: Collection[str]) -> None:
        labels = next((path for path in missing if _LABELS.search(path)), None)
        if labels is not None:
            raise AdapterError(
                f"{self._file}: holds {labels}, which {self._checkpoint.name} has not, and task_type is "
                f"{self._adapter.config.task_type!r}, so what kind of head it is is not known; write "
                f"SEQ_CLS, TOKEN_CLS or QUESTION_ANS as task_type into {self._adapter.path / 'adapter_config.json'}"
            )

    def _label(self, path: str, source: str) -> None:
        """Numbers the labels as transformers does, unless the base names as many."""
        if not _LABELS.search(path):
            return
        count = self._adapter.shape(source)[0]
        known = (self._checkpoint.config or {}).get("id2label")
        if not (isinstance(known, Mapping) and len(known) == count):
            self._config["id2label"] = {str(number): f"LABEL_{number}" for number in range(count)}
            self._config["label2id"] = {f"LABEL_{number}": number for number in range(count)}

    def _dtype(self) -> str:
        counts = Counter(tensor.dtype for tensor in self._checkpoint.tensors.values() if tensor.dtype in ITEM_BYTES)
        return counts.most_common(1)[0][0] if counts else "F32"


def read_pieces(checkpoint: Checkpoint, tensor: TensorInfo, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the first elements of a tensor in pieces: the number of a piece's first, and the piece as stored, flat.

    Args:
        checkpoint: What holds it.
        tensor: One of a dtype in ``STORED``.
        count: How many elements.
    """
    never = threading.Event()
    for first in range(0, count, _PIECE):
        stored = np.empty(min(_PIECE, count - first), STORED[tensor.dtype])
        checkpoint.files.read_into(tensor.shard, stored.data.cast("B"), tensor.start + first * stored.itemsize, never)
        yield first, stored


def _leaf(name: str | None) -> str:
    """Returns what a weight's module is called within its parent."""
    return (name or _LM_HEAD).split(".")[-2]
