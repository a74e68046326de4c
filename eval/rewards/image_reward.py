"""ImageReward, a reward for text-to-image models, on the BLIP classes of transformers.

Source: Xu et al., NeurIPS 2023, arXiv 2304.05977. A vision transformer sees the picture, BERT reads the prompt and attends to
the picture in every layer, and a head of five linear layers turns the first token into one number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertConfig, BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from dit_accel.eval.rewards.pictures import Picture, batches, listed, preprocess

REPOSITORY = "THUDM/ImageReward"
VOCABULARY_REPOSITORY = "bert-base-uncased"
VISION_CONFIG = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}  # of the checkpoint
MAX_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the data that it was trained on
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ADDED = ("[DEC]", "[ENC]")  # by BLIP, behind the vocabulary
UNUSED = ("blip.vision_proj.", "blip.text_proj.")

# Parts of our parameters' names, and what the checkpoint calls them.
NAMES = (
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    ("vision.post_layernorm", "blip.visual_encoder.norm"),
    (".layer_norm", ".norm"),
    (".self_attn.projection", ".attn.proj"),
    (".self_attn.qkv", ".attn.qkv"),
    ("text.", "blip.text_encoder."),
    ("head.", "mlp.layers."),
)


class ImageReward:
    """The reward of pictures for their prompts: higher is better, about 0 on average with a deviation of about 1.

    Made by `ImageReward.from_checkpoint`, or by `build_image_reward` for weights of another size.
    """

    def __init__(self, net: nn.ModuleDict, tokenizer: Any, configs: dict[str, dict[str, Any]]) -> None:
        self.net = net
        self.tokenizer = tokenizer
        self.configs = configs

    @classmethod
    def from_checkpoint(
        cls, checkpoint: str | Path = REPOSITORY, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> ImageReward:
        """The published model, or one that `save` wrote.

        Args:
            checkpoint: a folder, a .pt or .safetensors file, or a hub id. A folder holds what `save` writes, or ImageReward.pt.
                Unless they lie beside it, med_config.json comes from the hub's THUDM/ImageReward and vocab.txt from its
                bert-base-uncased.
            device: where it computes.
            dtype: of the two encoders; the head stays in float32.

        Raises:
            FileNotFoundError: a file that is neither there nor to be had from the hub.
            ValueError: weights, configuration or vocabulary that do not belong together.
        """
        path, repository = Path(checkpoint), REPOSITORY
        if path.is_file():
            folder, weights = path.parent, path
        elif path.is_dir():
            folder = path
            weights = folder / "model.safetensors"
            weights = weights if weights.is_file() else find(folder, "ImageReward.pt", None)
        else:
            folder, repository = None, str(checkpoint)
            weights = find(None, "ImageReward.pt", repository)
        if folder and (folder / "config.json").is_file():
            configs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        else:
            text_config = json.loads(find(folder, "med_config.json", repository).read_text(encoding="utf-8"))
            configs = {"vision_config": VISION_CONFIG, "text_config": text_config}
        vocab = find(folder, "vocab.txt", VOCABULARY_REPOSITORY)
        if weights.suffix == ".safetensors":
            state_dict = load_file(weights)
        else:
            state_dict = torch.load(weights, map_location="cpu", weights_only=True)
        return build_image_reward(configs["vision_config"], configs["text_config"], state_dict, vocab, device=device, dtype=dtype)

    def save(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors (the names are those of the original checkpoint) and vocab.txt."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {original_name(name): weight.cpu().contiguous() for name, weight in self.net.state_dict().items()}
        save_file(weights, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.configs, indent=2) + "\n", encoding="utf-8")
        vocabulary = self.tokenizer.get_vocab()
        lines = sorted(vocabulary, key=vocabulary.__getitem__)[: self.tokenizer.vocab_size]  # without those that are added
        (folder / "vocab.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    @torch.inference_mode()
    def score(self, prompts: str | Sequence[str], images: Picture | Sequence[Picture], batch_size: int = 16) -> np.ndarray:
        """The reward of every picture for the prompt at the same place of its list, [N].

        Args:
            prompts: what the pictures are to show, or one text that all of them are to show; what exceeds 35 tokens is not read.
            images: open pictures or paths, or one of them for all prompts. Other than in the original, transparent places count
                as white, EXIF rotation is obeyed and 16 bits are read as such.
            batch_size: how many are scored at a time; it changes the speed, not the rewards.

        Raises:
            ValueError: unless there is one picture for every prompt, or for a file that is no picture.
            FileNotFoundError: for a picture that does not exist.
        """
        rewards: list[float] = []
        size, device = self.configs["vision_config"]["img_size"], next(self.net.parameters()).device
        for texts, opened in batches(prompts, images, batch_size):
            pixels = torch.stack([preprocess(picture, size) for picture in opened]).to(device)
            tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
            seen = self.net["vision"](pixel_values=pixels).last_hidden_state  # [B, 1 + patches, width]
            read = self.net["text"](
                input_ids=tokens["input_ids"].to(device),
                attention_mask=tokens["attention_mask"].to(device),
                encoder_hidden_states=seen,
                is_decoder=False,
            )
            raw = self.net["head"](read.last_hidden_state[:, 0].float()).squeeze(1)
            rewards += ((raw - MEAN) / STD).tolist()
        return np.array(rewards)

    def cut(self, prompts: str | Sequence[str]) -> int:
        """How many of the prompts exceed 35 tokens, so that their ends are not read."""
        return sum(len(self.tokenizer(prompt)["input_ids"]) > MAX_TOKENS for prompt in listed(prompts))


def build_image_reward(
    vision_config: Mapping[str, int],
    text_config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    vocab: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ImageReward:
    """A reward of any size from weights that are named as in the original checkpoint.

    Args:
        vision_config: img_size, patch_size, embed_dim, depth and num_heads of the vision transformer.
        text_config: the original med_config. Its encoder_width is not read: the width of the vision transformer is taken, as
            in the original, whose published configuration says 768 where the weights have 1024.
        state_dict: the weights. The projections and position_ids, which the reward does not use, are left out.
        vocab: vocab.txt of BERT, one piece a line; it may have fewer than vocab_size, whose last two are [DEC] and [ENC].
        device: where it computes.
        dtype: of the two encoders; the head stays in float32.

    Raises:
        ValueError: names or shapes that are not those of this size; a configuration or vocabulary that does not fit.
    """
    if set(vision_config) != set(VISION_CONFIG):
        raise ValueError(f"vision_config has {', '.join(vision_config)}; give {', '.join(VISION_CONFIG)}.")
    bert = BertConfig.from_dict(dict(text_config))
    if bert.max_position_embeddings < MAX_TOKENS:
        raise ValueError(f"max_position_embeddings is {bert.max_position_embeddings}; prompts need {MAX_TOKENS} positions.")
    tokenizer = read_vocabulary(vocab, bert.vocab_size)
    net = build_net(vision_config, bert)
    load(net, state_dict)
    net.to(device=device, dtype=dtype).eval().requires_grad_(False)
    net["head"].float()
    return ImageReward(net, tokenizer, {"vision_config": dict(vision_config), "text_config": dict(text_config)})


def build_net(vision_config: Mapping[str, int], bert: Any) -> nn.ModuleDict:
    """The vision transformer, the text encoder and the head, with random weights."""
    width = vision_config["embed_dim"]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=vision_config["depth"],
        num_attention_heads=vision_config["num_heads"],
        image_size=vision_config["img_size"],
        patch_size=vision_config["patch_size"],
        layer_norm_eps=1e-6,
    )
    text = BlipTextConfig(
        **{
            key: getattr(bert, key)
            for key in (
                "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
                "max_position_embeddings hidden_act layer_norm_eps pad_token_id"
            ).split()
        },
        encoder_hidden_size=width,
        is_decoder=True,  # creates the cross-attention; the call says is_decoder=False, since all tokens see each other
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        sep_token_id=None,
    )
    head = nn.Sequential(
        nn.Linear(bert.hidden_size, 1024),
        nn.Dropout(0.2),
        nn.Linear(1024, 128),
        nn.Dropout(0.2),
        nn.Linear(128, 64),
        nn.Dropout(0.1),
        nn.Linear(64, 16),
        nn.Linear(16, 1),
    )
    text_model = BlipTextModel(text, add_pooling_layer=False)
    return nn.ModuleDict({"vision": BlipVisionModel(vision), "text": text_model, "head": head})


def original_name(name: str) -> str:
    """What the original checkpoint calls a parameter of ours."""
    for ours, theirs in NAMES:
        name = name.replace(ours, theirs)
    return name


def load(net: nn.ModuleDict, state_dict: Mapping[str, torch.Tensor]) -> None:
    """Copy weights that are named as in the original checkpoint into the net; ValueError names those that do not fit."""
    ours = {original_name(name): weight for name, weight in net.state_dict().items()}
    given = {
        name: weight for name, weight in state_dict.items() if not name.startswith(UNUSED) and not name.endswith(".position_ids")
    }
    wrong = [f"{name} is missing" for name in ours if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in ours]
    wrong += [
        f"{name} has shape {list(given[name].shape)} in place of {list(weight.shape)}"
        for name, weight in ours.items()
        if name in given and given[name].shape != weight.shape
    ]
    if wrong:
        more = [f"and {len(wrong) - 20} more"] if len(wrong) > 20 else []
        raise ValueError(
            f"The weights are not those of an ImageReward of this size: {'; '.join(wrong[:20] + more)}. "
            "Give the whole checkpoint with its own configuration."
        )
    net.load_state_dict({name: given[original_name(name)] for name in net.state_dict()})


def read_vocabulary(path: str | Path, vocab_size: int) -> Any:
    """The tokenizer of a vocab.txt, in lower case as bert-base-uncased; ValueError if it is none or larger than vocab_size.

    As in the original, a prompt that spells a special token is read as that token: BERT's own, and BLIP's [DEC] and [ENC] where
    vocab_size leaves room for them.
    """
    with open(path, encoding="utf-8") as file:
        vocabulary = {line.rstrip("\n"): index for index, line in enumerate(file)}
    absent = [token for token in SPECIAL if token not in vocabulary]
    if absent:
        raise ValueError(f"{path} lacks {', '.join(absent)}; give the vocab.txt of bert-base-uncased, one piece a line.")
    tokenizer = BertTokenizer(vocab=vocabulary)
    if not len(vocabulary) == len(tokenizer) == max(vocabulary.values()) + 1 <= vocab_size:
        raise ValueError(
            f"{path} has {max(vocabulary.values()) + 1} lines, of which {len(vocabulary)} differ, and vocab_size is {vocab_size}; "
            "give the vocab.txt that belongs to the weights, each piece once."
        )
    if len({*vocabulary, *ADDED}) <= vocab_size:
        tokenizer.add_tokens(list(ADDED), special_tokens=True)
    return tokenizer


def find(folder: Path | None, name: str, repository: str | None) -> Path:
    """A file of the folder or, if it is not there, of the hub's repository; FileNotFoundError if it is in neither."""
    if folder and (folder / name).is_file():
        return folder / name
    places = " or ".join(f"{place}" for place in (folder, repository and f"the hub's {repository}") if place)
    if repository is None:
        raise FileNotFoundError(f"There is no {name} in {places}; give a checkpoint's file, its folder or a hub id.")
    try:
        return Path(hf_hub_download(repository, name))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".: ")
        raise FileNotFoundError(
            f"{name} was not found in {places} ({reason}); put it beside the checkpoint, or check the name and the connection."
        ) from error
