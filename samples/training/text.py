"""Tokenizers and text encoders of the embedded pipelines, built from the training captions."""

from __future__ import annotations

import math
import re
from collections import Counter
from itertools import pairwise

import torch
from tokenizers import normalizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from data import all_captions

LENGTH = 24  # text tokens, padding included
WIDTH = 192
PLACES = ("whole", "left", "right", "upper", "lower")
HALVES = {"left": ("left", "right"), "right": ("right", "left"), "above": ("upper", "lower"), "below": ("lower", "upper")}


def t5_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words and the comma, in lower case; any other word becomes <unk>, which the command line reports."""
    counts = Counter(word for text in all_captions() for word in re.findall(r"[^\s,]+", text))
    total = sum(counts.values())
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -8.0), (",", -3.0)]
    pieces += [("▁" + word, math.log(n / total)) for word, n in sorted(counts.items())]
    backend = T5Tokenizer(vocab=pieces, extra_ids=0).backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    # T5Tokenizer drops the normalizer when it is loaded again; the general class keeps the whole of tokenizer.json.
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=LENGTH
    )


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair merges until every caption word is one token.

    The same every time, which the trainer of `tokenizers` is not where pairs are equally frequent: a training that goes on
    after an interruption builds its tokenizers anew.
    """
    special = ["<|startoftext|>", "<|endoftext|>"]
    alphabet = [chr(c) for c in range(33, 127)]
    counts = Counter(re.findall(r"[a-z]+|[0-9]|[^\sa-z0-9]+", " ".join(all_captions()).lower()))
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    merges = []
    while any(len(parts) > 1 for parts in words.values()):
        pairs = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                pairs[pair] += counts[word]
        first = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(first)
        for word, parts in words.items():
            words[word] = merged(parts, first)
    vocab = sorted({*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)})
    return CLIPTokenizer(
        vocab={token: i for i, token in enumerate([*vocab, *special])},
        merges=merges,
        model_max_length=LENGTH,
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
        unk_token=special[1],
    )


def merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """The parts of a word with every occurrence of the pair joined."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def roles(captions: list[str]) -> torch.Tensor:
    """Where in the picture every token of T5 belongs, [n, LENGTH]: an index of PLACES, or -100 behind the end of the caption.

    The words of a subject, and one of two colors, belong to a half of the picture; all others to the whole.
    """
    found = torch.full((len(captions), LENGTH), -100)
    for row, caption in zip(found, captions, strict=True):
        words = re.findall(r"[^\s,]+|,", caption)[:LENGTH]
        row[: len(words)] = PLACES.index("whole")
        if match := next((i for i, word in enumerate(words) if word in ("left", "right", "above", "below")), None):
            first, second = HALVES[words[match]]
            after = match + (2 if words[match] in ("left", "right") else 1)
            end = next((i for i in range(after, len(words)) if words[i] in (",", "in", "on")), len(words))
            row[:match], row[after:end] = PLACES.index(first), PLACES.index(second)
        if words[-1:] == ["background"] and words[-3] == "and":
            row[len(words) - 4], row[len(words) - 2] = PLACES.index("upper"), PLACES.index("lower")
    return found


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    """Its four heads look, from the start, at the words before, at those behind, at the previous and at the next one.

    T5's bias for distances starts near zero, and needs to grow to several units before order means anything. Adam moves it by its
    learning rate a step: after 50,000 steps it lay where it had started, and no order of two colors or objects had been learned.
    """
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=48,
            d_ff=512,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # [32 distances, 4 heads]
    with torch.no_grad():
        for head, distances in enumerate((slice(1, 16), slice(17, 32), 1, 17)):  # the first half are those before
            bias[distances, head] += 4
    return encoder


def clip_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
