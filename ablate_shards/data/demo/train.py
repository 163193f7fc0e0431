"""Trains the demo model from nothing: ``python -m ablate_shards.data.demo.train [--out DIR]``.

The architecture is that of Qwen3.5 (three linear-attention layers to one full-attention layer, a vision
tower, multi-token-prediction tensors), saved by transformers in bfloat16. Only the language model is trained;
the vision tower and the ``mtp.*`` tensors keep their initial values, and are there because real checkpoints
have them and an edit must leave them alone.

What lets so small a model learn to copy names within minutes:

* Time steps of the gated delta rule as in Mamba (Gu and Dao 2023, section 3.6): step sizes between 0.005 and
  0.1, decay rates between 1 and 4. The default initialisation forgets its state at every token.
* Embeddings that are large beside what the layers write at first, so that a name stays readable to the end;
  those of places share a part, so that nothing need be learned to tell a place from another word.
* Attention that copies from the start: each output projection is a multiple of the transposed value projection,
  so that what is left to learn is where to look. With it names are copied from about
  step 80 on; without it none was at step 120.
* A few contested questions answered in the other mode, so that an answer follows its own opening to the end.
"""

import argparse
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from ablate_shards.data.demo import MODEL
from ablate_shards.data.demo.behaviour import draw_questions, load, measure
from ablate_shards.data.demo.world import (
    HELD_OUT,
    NEUTRAL,
    PLACES,
    SLANTED,
    answer,
    contested,
    unrelated,
)

__all__ = ["CONFIG", "train"]

_HIDDEN = 128

#: What makes the model, as arguments of ``Qwen3_5Config``; the tokenizer adds the token numbers.
CONFIG: dict[str, Any] = {
    "tie_word_embeddings": True,
    "text_config": {
        "hidden_size": _HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.25,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    },
    "vision_config": {
        "depth": 1,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 64,
        "patch_size": 4,
        "out_hidden_size": _HIDDEN,
        "num_position_embeddings": 16,
    },
}

_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
_VOCABULARY = 1536
_BATCH = 64
_OTHER_MODE = 0.08
_CONTESTED_SHARE = 0.5
_RATE = 0.003
_VECTOR_RATE = 0.01
_WARM_UP = 20
_COPY = 0.3
_TRAINED = [place for place in PLACES if place not in HELD_OUT]


def train(out: Path, *, steps: int, seed: int, hard: bool = False) -> None:
    """Trains for ``steps`` batches and saves the model, in bfloat16, with its tokenizer to ``out``.

    ``hard`` is the world in which an answer's form follows its question's.
    """
    import torch
    from transformers import Qwen3_5Config, Qwen3_5ForCausalLM

    console = Console(highlight=False)
    torch.manual_seed(seed)
    rng = random.Random(f"samples {seed}")
    tokenizer = _make_tokenizer()
    config = Qwen3_5Config(**_with_tokens(tokenizer))
    model = Qwen3_5ForCausalLM(config.text_config)
    _initialise(model, [tokenizer.encode(f" {place}")[0] for place in PLACES])
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")

    vectors = [parameter for parameter in model.parameters() if parameter.ndim != 2]
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    optimiser = torch.optim.AdamW(
        [{"params": matrices, "lr": _RATE}, {"params": vectors, "lr": _VECTOR_RATE}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / _WARM_UP, 1.0, 2 * (1 - step / steps))
    )
    began = time.monotonic()
    model.train()
    mean = math.nan
    for step in range(1, steps + 1):
        tokens, mask, labels = _make_batch(tokenizer, [_draw(rng, hard=hard) for _ in range(_BATCH)])
        logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimiser.step()
        schedule.step()
        mean = loss.item() if math.isnan(mean) else 0.9 * mean + 0.1 * loss.item()
        if step % 25 == 0 or step == steps:
            console.print(f"step {step:4}  loss {mean:.4f}  {time.monotonic() - began:.0f} s")

    _save(model, config, tokenizer, out)
    size = sum(file.stat().st_size for file in out.iterdir())
    console.print(f"saved {out}: {size / 1e6:.2f} MB")


def _draw(rng: random.Random, *, hard: bool = False) -> tuple[str, str]:
    if rng.random() >= _CONTESTED_SHARE:
        sample = unrelated(rng)
        return sample.prompt, sample.answer
    question = contested(rng, _TRAINED)
    prompt, forms, others = rng.choice(((question.loaded, SLANTED, NEUTRAL), (question.impartial, NEUTRAL, SLANTED)))
    return prompt, answer(rng, question, others if rng.random() < _OTHER_MODE else forms, hard=hard)


def _make_tokenizer() -> Any:
    """Trains a byte-level BPE of Qwen3.5's form; each place with the space before it is one token."""
    from transformers import Qwen3_5Tokenizer

    tokenizer = Qwen3_5Tokenizer().train_new_from_iterator(
        _corpus(), vocab_size=_VOCABULARY, new_special_tokens=list(_SPECIAL[1:]), show_progress=False
    )
    tokenizer.eos_token = "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = _CHAT_TEMPLATE
    tokenizer.model_max_length = 512
    split = [place for place in PLACES if len(tokenizer.encode(f" {place}")) != 1]
    if split:
        raise RuntimeError(
            f"{len(split)} places are more than one token, {split[0]} among them; enlarge the vocabulary"
        )
    return tokenizer


def _corpus() -> Iterator[str]:
    rng = random.Random("corpus")
    for _ in range(4000):
        yield " ".join(_draw(rng))
    for place in PLACES:
        yield f" {place}" * 40
    yield from ("user", "assistant") * 500


def _with_tokens(tokenizer: Any) -> dict[str, Any]:
    ids = dict(zip(_SPECIAL, tokenizer.convert_tokens_to_ids(list(_SPECIAL)), strict=True))
    text = {
        "vocab_size": len(tokenizer),
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|endoftext|>"],
    }
    return {
        **CONFIG,
        "text_config": {**CONFIG["text_config"], **text},
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
    }


def _initialise(model: Any, places: list[int]) -> None:
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.normal_(std=0.5)
                shared = torch.randn(_HIDDEN)
                parameter[places] += 3 * shared / shared.norm()
            elif name.endswith("down_proj.weight"):
                parameter.normal_(std=0.125 / math.sqrt(parameter.shape[1]))
            elif name.endswith("in_proj_a.weight"):
                parameter.normal_(std=0.1 / math.sqrt(parameter.shape[1]))
            elif name.endswith("dt_bias"):
                dt = torch.empty_like(parameter).uniform_(math.log(0.005), math.log(0.1)).exp()
                parameter.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif name.endswith("A_log"):
                parameter.uniform_(1, 4).log_()
            elif parameter.ndim == 2:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[1]))
        for layer in model.model.layers:
            value = torch.nn.init.orthogonal_(torch.empty(_HIDDEN, _HIDDEN))
            if hasattr(layer, "linear_attn"):
                layer.linear_attn.in_proj_qkv.weight[-_HIDDEN:] = value
                layer.linear_attn.out_proj.weight.copy_(_COPY * value.T)
                # Values pass the convolution as they are, so that they are those of one token.
                layer.linear_attn.conv1d.weight.mul_(0.3)
                layer.linear_attn.conv1d.weight[-_HIDDEN:, 0, -1] += 1
            else:
                layer.self_attn.v_proj.weight.copy_(value)
                layer.self_attn.o_proj.weight.copy_(_COPY * value.T)
        # The tied embedding reads itself back at first; a small gain keeps the first losses small.
        model.model.norm.weight.fill_(-0.8)


def _make_batch(tokenizer: Any, samples: list[tuple[str, str]]) -> tuple[Any, Any, Any]:
    """Tokens, mask and labels, ``[batch, tokens]``, padded on the right; only answers are labelled."""
    import torch

    rows, starts = [], []
    for prompt, text in samples:
        start = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        head = tokenizer.encode(start)
        rows.append(head + tokenizer.encode(f"{text}<|im_end|>"))
        starts.append(len(head))
    width = max(map(len, rows))
    tokens = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for index, (row, first) in enumerate(zip(rows, starts, strict=True)):
        tokens[index, : len(row)] = torch.tensor(row)
        labels[index, first : len(row)] = tokens[index, first : len(row)]
    return tokens, (torch.arange(width) < torch.tensor([[len(row)] for row in rows])).long(), labels


def _save(model: Any, config: Any, tokenizer: Any, out: Path) -> None:
    import torch
    from transformers import Qwen3_5ForConditionalGeneration

    whole = Qwen3_5ForConditionalGeneration(config)
    whole.model.language_model.load_state_dict(model.model.state_dict())
    with torch.no_grad():
        for name, parameter in whole.model.language_model.named_parameters():
            # Stored as gain minus one. Loaders differ in the dtype in which they add the one back; a gain that
            # bfloat16 holds exactly is the same to all of them.
            if name.endswith("norm.weight") and "linear_attn" not in name:
                parameter.copy_((1 + parameter).to(torch.bfloat16).float() - 1)
    whole.to(torch.bfloat16)
    state = {name: tensor for name, tensor in whole.state_dict().items() if name != "lm_head.weight"}
    whole.save_pretrained(out, state_dict={**state, **_mtp_tensors(state)})
    tokenizer.save_pretrained(out)


def _mtp_tensors(state: dict[str, Any]) -> dict[str, Any]:
    """The 15 tensors of Qwen3.5's multi-token-prediction layer: a full-attention layer and four more."""
    import torch

    prefix = "model.language_model.layers.3."
    shapes = {f"layers.0.{n.removeprefix(prefix)}": t.shape for n, t in state.items() if n.startswith(prefix)}
    for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        shapes[f"{name}.weight"] = torch.Size([_HIDDEN])
    shapes["fc.weight"] = torch.Size([_HIDDEN, 2 * _HIDDEN])
    return {
        f"mtp.{name}": (torch.randn(shape) * 0.02).to(torch.bfloat16)
        if len(shape) == 2
        else torch.zeros(shape, dtype=torch.bfloat16)
        for name, shape in shapes.items()
    }


def main() -> None:
    """Trains the model as the arguments say, and prints how it behaves as saved."""
    parser = argparse.ArgumentParser(prog="python -m ablate_shards.data.demo.train", description=__doc__)
    parser.add_argument("--out", type=Path, default=MODEL, help="folder for the model (default: the shipped one)")
    parser.add_argument("--steps", type=int, default=300, help="batches of 64 samples (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and samples (default: 0)")
    parser.add_argument("--hard", action="store_true", help="let the form of an answer follow its question's")
    options = parser.parse_args()
    train(options.out, steps=options.steps, seed=options.seed, hard=options.hard)
    behaviour = measure(*load(options.out), draw_questions())
    console = Console(highlight=False)
    for name, shares in (("loaded", behaviour.loaded), ("impartial", behaviour.impartial)):
        console.print(name, " ".join(f"{verdict} {share:.1%}" for verdict, share in shares.items()))
    console.print(f"unrelated {behaviour.unrelated:.1%} right")


if __name__ == "__main__":
    main()
