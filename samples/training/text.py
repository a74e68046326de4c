"""Tokenizers and text encoders of the embedded pipelines, built from the training captions."""

from __future__ import annotations

import json
import math
import re
from collections import Counter

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
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

LENGTH = 16  # text tokens, padding included
WIDTH = 192


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
    """Byte-pair merges learned until every caption word is one token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(individual_digits=True)])
    alphabet = [chr(c) for c in range(33, 127)]
    bpe.train_from_iterator(
        all_captions(),
        trainers.BpeTrainer(vocab_size=4000, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False),
    )
    merges = [tuple(m) for m in json.loads(bpe.to_str())["model"]["merges"]]
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


def t5_encoder(tokenizer: PreTrainedTokenizerFast) -> T5EncoderModel:
    return T5EncoderModel(
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
