"""CLIPScore, 2.5 times the cosine of a picture and its prompt in CLIP's space, or 0 where that is negative.

Source: Hessel et al., EMNLP 2021, arXiv 2104.08718, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer

from dit_accel.eval.rewards.pictures import Picture, batches, listed, preprocess

WEIGHT = 2.5
PREFIX = "A photo depicts "


class ClipScore:
    """CLIPScore of pictures for their prompts, 0 to 2.5: higher is better. Made by `ClipScore.from_checkpoint`.

    Args:
        model: a CLIPModel.
        tokenizer: its CLIPTokenizer.
        prefix: whether the prompts are read after "A photo depicts ", as the paper does with captions.
    """

    def __init__(self, model: Any, tokenizer: Any, *, prefix: bool = False) -> None:
        vocab_size = model.config.text_config.vocab_size
        if len(tokenizer) != vocab_size:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} pieces and the model {vocab_size}; "
                "give a checkpoint with its own vocab.json and merges.txt, or tokenizer.json."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.prefix = PREFIX if prefix else ""
        self.max_tokens = model.config.text_config.max_position_embeddings

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path = "openai/clip-vit-base-patch32",
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        prefix: bool = False,
    ) -> ClipScore:
        """A CLIP model in transformers' format, of a folder or a hub id; the default is the paper's, ViT-B/32.

        Raises:
            OSError: from transformers, if there is no such checkpoint.
            ValueError: for weights that are missing, or a tokenizer that is not the model's.
        """
        model, info = CLIPModel.from_pretrained(checkpoint, dtype=dtype, output_loading_info=True)
        if info["missing_keys"]:
            raise ValueError(
                f"{checkpoint} lacks {', '.join(sorted(info['missing_keys']))}; give a checkpoint of the whole CLIP model."
            )
        return cls(model.to(device), CLIPTokenizer.from_pretrained(checkpoint), prefix=prefix)

    @torch.inference_mode()
    def score(self, prompts: str | Sequence[str], images: Picture | Sequence[Picture], batch_size: int = 16) -> np.ndarray:
        """CLIPScore of every picture for the prompt at the same place of its list, [N].

        Args:
            prompts: what the pictures are to show, or one text that all of them are to show; what exceeds the tokens of the
                model (77) is not read.
            images: open pictures or paths, or one of them for all prompts. They are prepared as the original code of CLIP does,
                except that transparent places count as white, EXIF rotation is obeyed and 16 bits are read as such.
            batch_size: how many are scored at a time; it changes the speed, not the scores.

        Raises:
            ValueError: unless there is one picture for every prompt, or for a file that is no picture.
            FileNotFoundError: for a picture that does not exist.
        """
        scores: list[float] = []
        size, device = self.model.config.vision_config.image_size, self.model.device
        for texts, opened in batches(prompts, images, batch_size):
            tokens = self.tokenizer(
                [self.prefix + text for text in texts],
                padding="max_length",
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            )
            embedded = self.model(
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                pixel_values=torch.stack([preprocess(picture, size) for picture in opened]).to(device),
            )
            cosine = torch.cosine_similarity(embedded.text_embeds.float(), embedded.image_embeds.float())
            scores += (WEIGHT * cosine.clamp(min=0)).tolist()
        return np.array(scores)

    def cut(self, prompts: str | Sequence[str]) -> int:
        """How many of the prompts, with the prefix if there is one, exceed the tokens that the model reads."""
        return sum(len(self.tokenizer(self.prefix + prompt)["input_ids"]) > self.max_tokens for prompt in listed(prompts))
