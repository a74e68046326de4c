"""Rewards against plain computations on the same weights, in the layout of the original checkpoint."""

from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from huggingface_hub.errors import LocalEntryNotFoundError
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from dit_accel.eval.rewards import ClipScore, ImageReward, build_image_reward, image_reward
from dit_accel.eval.rewards.package import PackageImageReward
from dit_accel.eval.rewards.pictures import open_picture, preprocess

PIECES = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a red green cat apple on the table ##s ##pple caf ##e , . ' t don 3".split()
ID = {piece: index for index, piece in enumerate(PIECES)}
PROMPTS = ["a red apple", "the cats on the table, a green cat.", "", "a red " * 30, "café"]

# img_size, patch_size, embed_dim, depth, num_heads; hidden_size, intermediate_size, layers, heads, activation
SIZES = [
    ((32, 16, 24, 2, 3), (16, 40, 2, 2, "gelu")),
    ((48, 8, 16, 3, 4), (32, 24, 3, 8, "gelu")),
    ((40, 8, 32, 1, 1), (32, 64, 1, 4, "relu")),
]


def configs(vision, text):
    """The two configurations of a size, as the original writes them; encoder_width is wrong as in the published one."""
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
    hidden, intermediate, layers, heads, activation = text
    return dict(zip(names, vision, strict=True)), {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_act": activation,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "layer_norm_eps": 1e-12 if heads == 2 else 1e-5,
        "max_position_embeddings": 40,
        "pad_token_id": 0,
        "vocab_size": len(PIECES) + 2,
        "encoder_width": hidden + 1,
        "add_cross_attention": True,
        "add_type_embeddings": False,
    }


def random_weights(vision, text, seed=0):
    """Weights of the original's names, every bias and norm at random, and the five tensors that are not used."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}

    def linear(name, out, *into):
        weights[f"{name}.weight"] = torch.randn(out, *into, generator=generator) / math.prod(into) ** 0.5
        weights[f"{name}.bias"] = torch.randn(out, generator=generator) / 4

    def norm(name, width):
        weights[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) / 4
        weights[f"{name}.bias"] = torch.randn(width, generator=generator) / 4

    width, hidden = vision["embed_dim"], text["hidden_size"]
    patches = (vision["img_size"] // vision["patch_size"]) ** 2
    root = "blip.visual_encoder"
    weights[f"{root}.cls_token"] = torch.randn(1, 1, width, generator=generator)
    weights[f"{root}.pos_embed"] = torch.randn(1, patches + 1, width, generator=generator)
    linear(f"{root}.patch_embed.proj", width, 3, vision["patch_size"], vision["patch_size"])
    for n in range(vision["depth"]):
        norm(f"{root}.blocks.{n}.norm1", width)
        norm(f"{root}.blocks.{n}.norm2", width)
        linear(f"{root}.blocks.{n}.attn.qkv", 3 * width, width)
        linear(f"{root}.blocks.{n}.attn.proj", width, width)
        linear(f"{root}.blocks.{n}.mlp.fc1", 4 * width, width)
        linear(f"{root}.blocks.{n}.mlp.fc2", width, 4 * width)
    norm(f"{root}.norm", width)
    root = "blip.text_encoder"
    weights[f"{root}.embeddings.position_ids"] = torch.arange(40)[None]
    weights[f"{root}.embeddings.word_embeddings.weight"] = torch.randn(text["vocab_size"], hidden, generator=generator)
    weights[f"{root}.embeddings.position_embeddings.weight"] = torch.randn(40, hidden, generator=generator)
    norm(f"{root}.embeddings.LayerNorm", hidden)
    for n in range(text["num_hidden_layers"]):
        for kind, source in (("attention", hidden), ("crossattention", width)):
            linear(f"{root}.encoder.layer.{n}.{kind}.self.query", hidden, hidden)
            linear(f"{root}.encoder.layer.{n}.{kind}.self.key", hidden, source)
            linear(f"{root}.encoder.layer.{n}.{kind}.self.value", hidden, source)
            linear(f"{root}.encoder.layer.{n}.{kind}.output.dense", hidden, hidden)
            norm(f"{root}.encoder.layer.{n}.{kind}.output.LayerNorm", hidden)
        linear(f"{root}.encoder.layer.{n}.intermediate.dense", text["intermediate_size"], hidden)
        linear(f"{root}.encoder.layer.{n}.output.dense", hidden, text["intermediate_size"])
        norm(f"{root}.encoder.layer.{n}.output.LayerNorm", hidden)
    linear("blip.vision_proj", 256, width)
    linear("blip.text_proj", 256, hidden)
    for index, (into, out) in {0: (hidden, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}.items():
        linear(f"mlp.layers.{index}", out, into)
        weights[f"mlp.layers.{index}.weight"] *= 1.25
    for name in weights:
        if "_embed" in name or "cls_token" in name:
            weights[name] = weights[name] / 100  # so small that the epsilon of the first norms shows
    return weights


def reference(weights, vision, text, ids, pixels):
    """The score of one prompt, ids without padding, and one picture [3, S, S], written out for the original's names."""

    def linear(name, x):
        return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def norm(name, x, eps):
        centered = x - x.mean(-1, keepdim=True)
        scaled = centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def attention(query, key, value, heads):
        size = query.shape[-1] // heads
        parts = []
        for head in range(heads):
            q, k, v = (x[:, head * size : (head + 1) * size] for x in (query, key, value))
            parts.append(torch.softmax(q @ k.T / math.sqrt(size), -1) @ v)
        return torch.cat(parts, -1)

    def gelu(x):
        return x * (1 + torch.erf(x / math.sqrt(2))) / 2

    weights = {name: weight.double() for name, weight in weights.items()}
    root, side = "blip.visual_encoder", vision["patch_size"]
    patches = [patch.flatten() for row in pixels.double().split(side, 1) for patch in row.split(side, 2)]
    x = linear(f"{root}.patch_embed.proj", torch.stack(patches))
    x = torch.cat([weights[f"{root}.cls_token"][0], x]) + weights[f"{root}.pos_embed"][0]
    for n in range(vision["depth"]):
        block = f"{root}.blocks.{n}"
        q, k, v = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{block}.attn.proj", attention(q, k, v, vision["num_heads"]))
        x = x + linear(f"{block}.mlp.fc2", gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x, 1e-6))))
    seen = norm(f"{root}.norm", x, 1e-6)

    root, eps = "blip.text_encoder", text["layer_norm_eps"]
    x = weights[f"{root}.embeddings.word_embeddings.weight"][ids]
    x = norm(f"{root}.embeddings.LayerNorm", x + weights[f"{root}.embeddings.position_embeddings.weight"][: len(ids)], eps)
    for n in range(text["num_hidden_layers"]):
        layer = f"{root}.encoder.layer.{n}"
        for kind, source in (("attention", None), ("crossattention", seen)):
            name, source = f"{layer}.{kind}", x if source is None else source
            q, k, v = linear(f"{name}.self.query", x), linear(f"{name}.self.key", source), linear(f"{name}.self.value", source)
            mixed = linear(f"{name}.output.dense", attention(q, k, v, text["num_attention_heads"]))
            x = norm(f"{name}.output.LayerNorm", x + mixed, eps)
        inner = linear(f"{layer}.intermediate.dense", x)
        inner = gelu(inner) if text["hidden_act"] == "gelu" else inner.clamp(min=0)
        x = norm(f"{layer}.output.LayerNorm", x + linear(f"{layer}.output.dense", inner), eps)
    x = x[:1]
    for index in (0, 2, 4, 6, 7):
        x = linear(f"mlp.layers.{index}", x)
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def picture(width, height, mode="RGB", seed=0):
    """A smooth random picture with some noise."""
    rng = np.random.default_rng([seed, width, height])
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    noisy = np.asarray(coarse, int) + rng.integers(-20, 20, (height, width, 3))
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    if mode == "P":
        return image.quantize(16)
    image = image.convert(mode)
    if mode == "RGBA":
        image.putalpha(Image.fromarray(rng.integers(0, 256, (height, width), dtype=np.uint8)))
    return image


def expected_ids(prompt):
    """Token ids of the prompts of this file, [CLS] and [SEP] included, by hand."""
    words = {
        PROMPTS[0]: "a red apple",
        PROMPTS[1]: "the cat ##s on the table , a green cat .",
        PROMPTS[2]: "",
        PROMPTS[3]: "a red " * 16 + "a",
        PROMPTS[4]: "caf ##e",
    }[prompt]
    return [ID[piece] for piece in ["[CLS]", *words.split(), "[SEP]"]]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "pieces" / "vocab.txt"
    path.parent.mkdir()
    path.write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def parts(vocab):
    """What build_image_reward takes, of the first size."""
    vision, text = configs(*SIZES[0])
    return vision, text, random_weights(vision, text), vocab


PICTURES = [picture(50, 40), picture(33, 70, "L"), picture(64, 64, "P"), picture(90, 41, "RGBA"), picture(32, 32, seed=1)]


@pytest.mark.parametrize("size", SIZES)
def test_scores_are_those_of_the_architecture_written_out(size, vocab):
    vision, text = configs(*size)
    weights = random_weights(vision, text)
    by_hand = lambda prompt, image: reference(
        weights, vision, text, expected_ids(prompt), preprocess(open_picture(image), vision["img_size"])
    )
    expected = [by_hand(prompt, image) for prompt, image in zip(PROMPTS, PICTURES, strict=True)]
    assert np.std([by_hand(prompt, PICTURES[0]) for prompt in PROMPTS]) > 0.02  # prompts matter
    assert np.std([by_hand(PROMPTS[0], image) for image in PICTURES]) > 0.02  # and pictures do
    reward = build_image_reward(vision, text, weights, vocab)
    for batch_size in (1, 2, 16):
        scores = reward.score(PROMPTS, PICTURES, batch_size=batch_size)
        assert scores.shape == (5,) and np.abs(scores - expected).max() < 1e-5


def test_a_batch_is_scored_as_one_by_one(parts):
    reward = build_image_reward(*parts)
    alone = [reward.score([prompt], [image])[0] for prompt, image in zip(PROMPTS, PICTURES, strict=True)]
    assert np.abs(reward.score(PROMPTS, PICTURES, batch_size=3) - alone).max() < 5e-6
    assert reward.score([], []).shape == (0,)


def test_the_encoders_take_a_dtype_and_the_head_stays_in_float32(parts):
    reward, half = build_image_reward(*parts), build_image_reward(*parts, dtype=torch.bfloat16)
    assert (
        half.net["vision"].dtype == half.net["text"].dtype == torch.bfloat16 and half.net["head"][0].weight.dtype == torch.float32
    )
    assert 0 < np.abs(half.score(PROMPTS, PICTURES) - reward.score(PROMPTS, PICTURES)).max() < 0.5


def test_prompts_become_these_tokens(parts):
    reward = build_image_reward(*parts)
    for prompt in PROMPTS:
        assert reward.tokenizer(prompt, truncation=True, max_length=35)["input_ids"] == expected_ids(prompt)
    read = lambda prompt: [PIECES[index] for index in reward.tokenizer(prompt)["input_ids"][1:-1]]
    assert read("A RED  Apple\n") == ["a", "red", "apple"]  # lower case, any white space
    assert read("Don't") == ["don", "'", "t"]
    assert read("tables dog 3.") == ["table", "##s", "[UNK]", "3", "."]


SPELLED = ["a [MASK] cat", "a[SEP]cat", "[CLS] [PAD][UNK]red", "[ENC] the table", "A[ENC]s[DEC][DEC]apple", "[enc] [Mask] [M ASK]"]


@pytest.mark.parametrize("there", [False, True])
def test_special_tokens_in_a_prompt_are_read_as_in_the_original(tmp_path, there):
    """The original adds [DEC] and [ENC] to the plain tokenizer in Python, of which transformers keeps a copy."""
    pieces = [*PIECES, *"[ ] enc mask".split(), *(["[DEC]", "[ENC]"] if there else [])]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    original = BertTokenizerLegacy(path)
    original.add_special_tokens({"bos_token": "[DEC]"})
    original.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
    ours = image_reward.read_vocabulary(path, len(PIECES) + 6)
    for prompt in [*SPELLED, *(f"{text} " * 12 for text in SPELLED), *PROMPTS]:
        read, expected = (tokenizer(prompt, padding="max_length", truncation=True, max_length=35) for tokenizer in (ours, original))
        assert read["input_ids"] == expected["input_ids"] and read["attention_mask"] == expected["attention_mask"]
    assert len(PIECES) + 5 in ours("[ENC]")["input_ids"] and len(PIECES) + 5 not in ours("[enc]")["input_ids"]


def test_special_tokens_in_a_prompt_count(parts, tmp_path):
    reward = build_image_reward(*parts)
    scores = reward.score(["a cat", "a [SEP] cat", "a [MASK] cat", "a [ENC] cat", "a [UNK] cat"], PICTURES[0])
    assert len(set(scores.round(5))) == 5
    reward.save(tmp_path / "saved")
    assert (tmp_path / "saved/vocab.txt").read_text(encoding="utf-8").split() == PIECES
    again = ImageReward.from_checkpoint(tmp_path / "saved").score("a [ENC] cat", [PICTURES[0]] * 5)
    assert again == pytest.approx(scores[3], abs=1e-5)
    vision, text, weights, vocab = parts
    small = {n: w[: len(PIECES)] if "word_embeddings" in n else w for n, w in weights.items()}
    without = build_image_reward(vision, {**text, "vocab_size": len(PIECES)}, small, vocab)
    assert without.score(["[ENC]"], PICTURES[0]) == without.score(["[UNK][UNK][UNK]"], PICTURES[0]), "no room: text as any other"


def test_cut_counts_prompts_of_more_than_35_tokens(parts):
    reward = build_image_reward(*parts)
    assert reward.cut(["a " * 33, "a " * 34, "cats " * 17, "cats " * 16, ""]) == 2  # [CLS] and [SEP] are two of the 35
    assert reward.cut([]) == 0
    assert reward.score(["a " * 33 + "cat"], PICTURES[:1]) == pytest.approx(reward.score(["a " * 50], PICTURES[:1]))


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1"])
@pytest.mark.parametrize("size", [(75, 50), (50, 75), (31, 97), (40, 40), (41, 40), (24, 27), (27, 24), (35, 24)])
def test_preprocess_is_resize_crop_rgb_normalise(mode, size):
    """PIL resizes, numpy does the rest."""
    image, target = picture(*size, mode), 24
    width, height = size
    if width <= height:
        resized = image.resize((target, target * height // width), Image.Resampling.BICUBIC)
    else:
        resized = image.resize((target * width // height, target), Image.Resampling.BICUBIC)
    pixels = np.asarray(resized.convert("RGB"), np.float64)
    spare = max(pixels.shape[:2]) - target
    offset = spare // 2 + (1 if spare % 4 == 3 else 0)  # halves go to the even neighbour
    pixels = pixels[offset : offset + target] if height > width else pixels[:, offset : offset + target]
    expected = (pixels / 255 - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    assert np.abs(preprocess(image, target).permute(1, 2, 0).numpy() - expected).max() < 1e-6


def test_a_palette_picture_is_resized_before_it_becomes_rgb():
    image = picture(60, 60, "P")
    colors = {tuple(row) for row in np.asarray(image.convert("RGB")).reshape(-1, 3)}
    restored = preprocess(image, 24) * torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    restored = (restored + torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)) * 255
    assert {tuple(row) for row in restored.round().int().flatten(1).T.tolist()} <= colors


def test_paths_and_open_pictures_score_alike(parts, tmp_path):
    reward = build_image_reward(*parts)
    PICTURES[0].save(tmp_path / "one.png")
    paths = [tmp_path / "one.png", str(tmp_path / "one.png"), PICTURES[0]]
    assert len(set(reward.score(["a cat"] * 3, paths, batch_size=1))) == 1


def test_one_prompt_serves_every_picture_and_one_picture_every_prompt(parts, tmp_path):
    reward = build_image_reward(*parts)
    assert np.array_equal(reward.score("a cat", PICTURES), reward.score(["a cat"] * 5, PICTURES))
    PICTURES[0].save(tmp_path / "one.png")
    expected = reward.score(PROMPTS, [PICTURES[0]] * 5)
    for one in (PICTURES[0], tmp_path / "one.png", str(tmp_path / "one.png")):
        assert np.array_equal(reward.score(PROMPTS, one), expected)
    assert np.array_equal(reward.score(PROMPTS[0], str(tmp_path / "one.png")), reward.score(PROMPTS[:1], PICTURES[:1]))
    assert reward.score("a cat", []).shape == (0,)
    assert reward.cut("a " * 34) == 1 and reward.cut("a " * 33) == 0


def test_pictures_are_scored_as_viewers_show_them(parts, tmp_path):
    """Other than in the original: 16 bits, transparency and EXIF rotation."""
    reward, image = build_image_reward(*parts), picture(60, 40)
    gray, black = image.convert("L"), Image.new("RGBA", (60, 40), (0, 0, 0, 0))
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    assert np.array_equal(reward.score("a cat", tmp_path / "sixteen.png"), reward.score("a cat", gray))
    black.paste(image.crop((0, 0, 30, 40)))
    white = Image.new("RGB", (60, 40), "white")
    white.paste(image.crop((0, 0, 30, 40)))
    assert np.array_equal(reward.score("a cat", black), reward.score("a cat", white))
    assert np.array_equal(reward.score("a cat", image.convert("RGBA")), reward.score("a cat", image)), "opaque"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    image.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(reward.score("a cat", tmp_path / "turned.png"), reward.score("a cat", image.rotate(-90, expand=True)))
    Image.fromarray(np.asarray(gray).astype(np.float32)).save(tmp_path / "float.tiff")
    with pytest.raises(ValueError, match="float.tiff has pixels of 32 bits .mode F., .*; save it in 8 bits"):
        reward.score("a cat", tmp_path / "float.tiff")


def test_pictures_that_are_not_there_are_named(parts, tmp_path):
    reward = build_image_reward(*parts)
    with pytest.raises(FileNotFoundError, match="no picture .*absent.png; generate it"):
        reward.score(PROMPTS[:2], [PICTURES[0], tmp_path / "absent.png"])
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but no more")
    with pytest.raises(ValueError, match="broken.png cannot be read as a picture"):
        reward.score(["a cat"], [tmp_path / "broken.png"])
    with pytest.raises(ValueError, match="5 prompts and 4 pictures"):
        reward.score(PROMPTS, PICTURES[:4])
    with pytest.raises(ValueError, match="batch_size is 0"):
        reward.score(PROMPTS, PICTURES, batch_size=0)


def test_loading_is_strict(parts):
    vision, text, weights, vocab = parts
    gone = "blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"
    with pytest.raises(ValueError, match=f"{gone} is missing"):
        build_image_reward(vision, text, {name: weight for name, weight in weights.items() if name != gone}, vocab)
    with pytest.raises(ValueError, match="blip.itm_head.weight is unknown"):
        build_image_reward(vision, text, {**weights, "blip.itm_head.weight": torch.zeros(2, 16)}, vocab)
    with pytest.raises(ValueError, match=r"mlp.layers.7.weight has shape \[2, 16\] in place of \[1, 16\]"):
        build_image_reward(vision, text, {**weights, "mlp.layers.7.weight": torch.zeros(2, 16)}, vocab)
    with pytest.raises(ValueError, match="blocks.0.norm1.weight is missing.*; and [0-9]+ more.*whole checkpoint"):
        build_image_reward(vision, text, {}, vocab)
    with pytest.raises(ValueError, match="blocks.1.*unknown"):
        build_image_reward({**vision, "depth": 1}, text, weights, vocab)
    unused = ("position_ids", "vision_proj.weight", "vision_proj.bias", "text_proj.weight", "text_proj.bias")
    build_image_reward(vision, text, {n: w for n, w in weights.items() if not n.endswith(unused)}, vocab)


def test_configurations_and_vocabularies_that_do_not_fit(parts, tmp_path):
    vision, text, weights, vocab = parts
    with pytest.raises(ValueError, match="give img_size, patch_size, embed_dim, depth, num_heads"):
        build_image_reward({**vision, "hidden_size": 24}, text, weights, vocab)
    with pytest.raises(ValueError, match="max_position_embeddings is 20"):
        build_image_reward(vision, {**text, "max_position_embeddings": 20}, weights, vocab)
    with pytest.raises(ValueError, match="vocab_size is 20"):
        build_image_reward(vision, {**text, "vocab_size": 20}, weights, vocab)
    other = tmp_path / "other.txt"
    other.write_text("\n".join(["a", *PIECES]), encoding="utf-8")
    with pytest.raises(ValueError, match="25 lines, of which 24 differ"):
        build_image_reward(vision, text, weights, other)
    other.write_text("\n".join(PIECES[1:4]), encoding="utf-8")
    with pytest.raises(ValueError, match=r"other.txt lacks \[PAD\], \[SEP\], \[MASK\]"):
        build_image_reward(vision, text, weights, other)


def test_a_saved_reward_loads_from_its_folder_and_its_file(parts, tmp_path):
    reward = build_image_reward(*parts)
    reward.save(tmp_path / "saved")
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["config.json", "model.safetensors", "vocab.txt"]
    scores = reward.score(PROMPTS, PICTURES)
    for place in (tmp_path / "saved", str(tmp_path / "saved" / "model.safetensors")):
        loaded = ImageReward.from_checkpoint(place)
        assert np.array_equal(loaded.score(PROMPTS, PICTURES), scores)
    half = ImageReward.from_checkpoint(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.net["vision"].dtype == torch.bfloat16


def test_the_published_layout_loads_from_a_folder_a_file_and_the_hub(parts, tmp_path, monkeypatch):
    vision, text, weights, vocab = parts
    scores = build_image_reward(*parts).score(PROMPTS, PICTURES)
    monkeypatch.setattr(image_reward, "VISION_CONFIG", vision)
    hub = {}

    def download(repository, name):
        if (repository, name) not in hub:
            raise LocalEntryNotFoundError("The hub cannot be reached.\nMore.")
        return str(hub[repository, name])

    monkeypatch.setattr(image_reward, "hf_hub_download", download)
    folder = tmp_path / "published"
    folder.mkdir()
    torch.save(weights, folder / "ImageReward.pt")
    with pytest.raises(FileNotFoundError, match="med_config.json was not found in .*published or the hub's THUDM/ImageReward"):
        ImageReward.from_checkpoint(folder)
    (folder / "med_config.json").write_text(json.dumps(text), encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="vocab.txt was not found in .* or the hub's bert-base-uncased .*reached"):
        ImageReward.from_checkpoint(folder / "ImageReward.pt")
    hub["bert-base-uncased", "vocab.txt"] = vocab
    hub["THUDM/ImageReward", "ImageReward.pt"] = folder / "ImageReward.pt"
    hub["THUDM/ImageReward", "med_config.json"] = folder / "med_config.json"
    for place in (folder, folder / "ImageReward.pt", "THUDM/ImageReward"):
        assert np.array_equal(ImageReward.from_checkpoint(place).score(PROMPTS, PICTURES), scores)
    (folder / "ImageReward.pt").unlink()
    with pytest.raises(FileNotFoundError, match="no ImageReward.pt in .*published; give a checkpoint"):
        ImageReward.from_checkpoint(folder)
    with pytest.raises(FileNotFoundError, match="ImageReward.pt was not found in the hub's no/such"):
        ImageReward.from_checkpoint("no/such")


def test_the_published_vision_transformer_is_vit_l_16():
    assert image_reward.VISION_CONFIG == {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 24, "num_heads": 16}


def test_without_the_package_the_error_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "ImageReward", None)
    with pytest.raises(ImportError, match=r"timm 0.6.13.*transformers below 4.56.*gives the same scores"):
        PackageImageReward()


def test_the_package_gets_prompts_and_open_pictures_one_by_one(monkeypatch, tmp_path):
    calls = []
    package = types.ModuleType("ImageReward")
    model = types.SimpleNamespace(score=lambda prompt, image: calls.append((prompt, image)) or float(len(prompt)))
    package.load = lambda name, device, med_config: calls.append((name, device, med_config)) or model
    monkeypatch.setitem(sys.modules, "ImageReward", package)
    reward = PackageImageReward(Path("weights.pt"), med_config=Path("med.json"))
    assert reward.score(["a", "cat"], PICTURES[:2]).tolist() == [1.0, 3.0]
    assert calls == [("weights.pt", "cpu", "med.json"), ("a", PICTURES[0]), ("cat", PICTURES[1])]
    assert reward.score("tree", PICTURES[:2]).tolist() == [4.0, 4.0], "one prompt for every picture"
    reward.score("a", Image.new("LA", (2, 2)))
    assert calls[-1][1] == Image.new("RGB", (2, 2), "white")
    with pytest.raises(FileNotFoundError, match="absent.png"):
        reward.score(["a"], [tmp_path / "absent.png"])


@pytest.fixture
def clip(tmp_path):
    """A tiny random CLIP in transformers' format; its tokenizer knows single letters."""
    letters = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    pieces = {piece: index for index, piece in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    text = {
        "vocab_size": len(pieces),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 24,
        "bos_token_id": len(pieces) - 2,
        "eos_token_id": len(pieces) - 1,
        "pad_token_id": len(pieces) - 1,
    }
    vision = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4)).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.5)
    model.save_pretrained(tmp_path / "clip")
    CLIPTokenizer(vocab=pieces, merges=[]).save_pretrained(tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("prefix", [False, True])
def test_clip_score_is_two_and_a_half_cosines(clip, prefix):
    model = CLIPModel.from_pretrained(clip).eval()
    start, end = 52, 53
    prompts, expected = ["a cat", "the green apple", "zebra", "x", "dog " * 30], []
    for prompt, image in zip(prompts, PICTURES, strict=True):
        words = (("A photo depicts " if prefix else "") + prompt).lower().split()
        letters = [2 * (ord(letter) - ord("a")) + (place == len(word)) for word in words for place, letter in enumerate(word, 1)]
        ids = torch.tensor([[start, *letters[:22], end]])
        with torch.no_grad():
            text = model.text_projection(model.text_model(ids).last_hidden_state[:, -1])
            vision = model.vision_model(preprocess(open_picture(image), 32)[None])
            seen = model.visual_projection(vision.pooler_output)
        expected.append(2.5 * max(F.cosine_similarity(text, seen).item(), 0))
    assert max(expected) > 0 == min(expected)  # both sides of the clamp
    score = ClipScore.from_checkpoint(clip, prefix=prefix)
    for batch_size in (1, 2, 16):
        assert np.abs(score.score(prompts, PICTURES, batch_size=batch_size) - expected).max() < 1e-5
    assert score.cut(prompts) == (2 if prefix else 1) and score.cut(prompts[4]) == 1
    assert np.array_equal(score.score("x", PICTURES), score.score(["x"] * 5, PICTURES))
    with pytest.raises(ValueError, match="5 prompts and 4 pictures"):
        score.score(prompts, PICTURES[:4])


def test_a_clip_that_lacks_weights_is_an_error(clip):
    weights = load_file(clip / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, clip / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="clip lacks visual_projection.weight; give"):
        ClipScore.from_checkpoint(clip)


def test_a_clip_without_its_vocabulary_is_an_error(clip):
    for path in clip.glob("token*"):
        path.unlink()
    with pytest.raises(ValueError, match="tokenizer has [0-9]+ pieces and the model 54; give"):
        ClipScore.from_checkpoint(clip)
