"""Parts of a prompt that a pipeline's tokenizer would silently drop."""

from __future__ import annotations

import re
from typing import Any


def t5_tokenizer(pipe: Any) -> Any:
    """The tokenizer whose tokens the transformer attends to: FLUX has it second, PixArt has no other."""
    return getattr(pipe, "tokenizer_2", None) or pipe.tokenizer


def unknown_words(pipe: Any, prompt: str) -> list[str]:
    """The words of a prompt that its T5 tokenizer maps to <unk>, each once, in order."""
    tokenizer = t5_tokenizer(pipe)

    def unknown(text: str) -> bool:
        return tokenizer.unk_token_id in tokenizer(text, add_special_tokens=False).input_ids

    found: dict[str, None] = {}
    for chunk in prompt.split():
        if unknown(chunk):
            words = [word for word in re.findall(r"[\w'’-]+|[^\w\s]", chunk) if unknown(word)]
            found.update(dict.fromkeys(words or [chunk]))
    return list(found)


def cut_text(pipe: Any, prompt: str, max_sequence_length: int) -> str:
    """The end of a prompt that does not fit into `max_sequence_length` tokens; "" if all of it does."""
    tokenizer = t5_tokenizer(pipe)
    starts = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True, verbose=False).offset_mapping
    room = max_sequence_length - tokenizer.num_special_tokens_to_add()
    return prompt[starts[room][0] :].strip() if len(starts) > room else ""
