"""Train emoji-reward: ImageReward's architecture in small, taught as the large one, by which of two pictures is better.

    python samples/training/reward.py
    python samples/training/reward.py --start samples/emoji-reward

Needs the drawings of prepare.py, the autoencoder of border.py and, unless --no-samples, the samples of stopped.py. The vision
transformer first learns to name what each of its patches shows, in place of BLIP's pretraining; then everything learns from pairs,
and to name what is wrong. --start takes over the weights of a finished reward, word by word where the vocabulary has changed. An
interrupted training goes on from its checkpoint. What the generators never see is not shown here either: `measured.json` is about
that.
"""

from __future__ import annotations

import math
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BlipTextModel

from augment import augment
from common import copy_card, load_checkpoint, open_vae, save_checkpoint, write_json
from data import BACKGROUNDS, WORK, all_captions, compose, concepts
from degrade import DEGRADATIONS
from dit_accel.eval.rewards.image_reward import MEAN, SPECIAL, STD, build_image_reward, build_net, original_name, read_vocabulary
from dit_accel.eval.rewards.pictures import MEAN as PIXEL_MEAN
from dit_accel.eval.rewards.pictures import STD as PIXEL_STD
from judge import through
from reward_data import (
    ENCODED,
    FAILURES,
    KINDS,
    LOOKS,
    PATCH,
    SHARES,
    SIDE,
    SIZES,
    STOPPED,
    Comparison,
    comparison,
    finished_and_stopped,
    fit,
    patch_labels,
    shown_scene,
)
from reward_measure import measure

OUT = Path(__file__).parent.parent / "emoji-reward"
VISION = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": 192, "depth": 5, "num_heads": 6}
TEXT = {
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "max_position_embeddings": 40,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
WORDS = "blip.text_encoder.embeddings.word_embeddings.weight"
# How often each kind is trained on: the longer it takes to learn, the more.
OFTEN = {**dict.fromkeys(FAILURES, 3), "swapped places": 10, **dict.fromkeys(DEGRADATIONS, 1), "shuffle": 3, STOPPED: 1}
PLACES = torch.cartesian_prod(*[torch.linspace(-1, 1, SIDE // PATCH)] * 2)  # of the patches, [64, 2]
GROUND = 0.2  # weight of a patch that shows the background: most do


def vocabulary() -> list[str]:
    """Every word of the captions, and of the names of concepts that the generators do not draw."""
    names = [name for concept in concepts() for name in (concept.name, *concept.aliases)]
    return sorted(set(re.findall(r"[a-z0-9]+|[^\sa-z0-9]", " ".join([*all_captions(), *names]).lower())))


def look_beside(text: BlipTextModel) -> None:
    """Two heads of every layer look, from the start, at the previous and at the next word.

    Started at random, whether an owl is left of a cactus or right of it is still a guess to the reward after 24,000 comparisons.
    Here a part of the embeddings is the place alone, as cosines and sines, which a rotation moves by one.
    """
    embeddings, size = text.embeddings, TEXT["hidden_size"] // TEXT["num_attention_heads"]
    rates = torch.linspace(0.1, 3.0, size // 2)
    places = torch.arange(TEXT["max_position_embeddings"])[:, None] * rates
    with torch.no_grad():
        spread = embeddings.word_embeddings.weight[:, size:].std()
        embeddings.word_embeddings.weight[:, :size] = 0
        embeddings.position_embeddings.weight[:, :size] = 1.4 * spread * torch.cat([places.cos(), places.sin()], 1)
        for layer in text.encoder.layer:
            query, key = layer.attention.self.query, layer.attention.self.key
            for head, way in enumerate((-1, 1)):
                own, cos, sin = slice(head * size, (head + 1) * size), (way * rates).cos().diag(), (way * rates).sin().diag()
                turned = torch.cat([torch.cat([cos, -sin], 1), torch.cat([sin, cos], 1)])
                for linear, weight in ((query, turned), (key, torch.eye(size))):
                    linear.weight[own], linear.bias[own] = 0, 0
                    linear.weight[own, :size] = 1.2 * weight


class Model(torch.nn.Module):
    """The net of an ImageReward, and heads that only its training has: what a patch shows, where it lies, where what a word names
    lies, and what is wrong with a picture.

    Its vocabulary is written to the file `vocab`.
    """

    def __init__(self, vocab: Path) -> None:
        super().__init__()
        words = vocabulary()
        self.vocab = vocab
        self.vocab.write_text("\n".join([*SPECIAL, *words]) + "\n")
        self.text_config = {**TEXT, "vocab_size": len(SPECIAL) + len(words) + 2}  # the last two are [DEC] and [ENC]
        self.tokenizer = read_vocabulary(self.vocab, self.text_config["vocab_size"])
        self.net = build_net(VISION, BertConfig.from_dict(self.text_config))
        for name, weight in [*self.net["vision"].named_parameters(), *self.net["text"].named_parameters()]:
            if weight.ndim == 2 and "embeddings" not in name:
                # As large for the width here as BERT's 0.02 is for 768 and more: with 0.02 all tokens attend to all alike, and no
                # preference is learned.
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        labels = (len(concepts()) + 1 + len(BACKGROUNDS), len(LOOKS))
        look_beside(self.net["text"])
        self.where = torch.nn.Linear(VISION["embed_dim"], 2)
        self.lies = torch.nn.ModuleList([torch.nn.Linear(TEXT["hidden_size"], 2) for _ in range(TEXT["num_hidden_layers"] - 1)])
        self.words = [[self.tokenizer(name).input_ids[1:-1] for name in (c.name, *c.aliases)] for c in concepts()]
        self.names = torch.nn.ModuleList([torch.nn.Linear(VISION["embed_dim"], n) for n in labels])
        self.faults = torch.nn.Linear(TEXT["hidden_size"], 1 + len(KINDS))
        weight = torch.ones(labels[0])
        weight[len(concepts()) :] = GROUND
        self.register_buffer("weight", weight)

    def take_over(self, folder: Path) -> None:
        """The weights of a finished reward; those of words by the word, whatever its place in either vocabulary."""
        given, ours = load_file(folder / "model.safetensors"), self.net.state_dict()
        for name, value in ours.items():
            old = given[original_name(name)].float()
            if original_name(name) == WORDS:
                places, theirs = self.tokenizer.get_vocab(), read_vocabulary(folder / "vocab.txt", len(old)).get_vocab()
                both = [word for word in places if word in theirs]
                value[[places[word] for word in both]] = old[[theirs[word] for word in both]]
            else:
                value.copy_(old)
        self.net.load_state_dict(ours)

    def see(self, images: Tensor) -> Tensor:
        """What the vision transformer makes of pictures [n, 3, 128, 128] in -1..1: [n, 65, width]."""
        return self.net["vision"](pixel_values=((images + 1) / 2 - PIXEL_MEAN) / PIXEL_STD).last_hidden_state

    def naming_loss(self, seen: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of what every patch shows and in whose style, labels [n, 2, 64], and the error of where it lies."""
        patches = seen[:, 1:].flatten(0, 1).float()
        shows, look = labels.transpose(0, 1).flatten(1)
        loss = F.mse_loss(self.where(patches), PLACES.repeat(len(seen), 1))
        for labels, head, weight, share in ((shows, self.names[0], self.weight, 1.0), (look, self.names[1], None, 0.5)):
            if len(given := (labels >= 0).nonzero()[:, 0]):  # not if all are samples, which may show anything
                loss = loss + share * F.cross_entropy(head(patches[given]), labels[given], weight, label_smoothing=0.05)
        return loss

    def score(self, prompts: list[str], seen: Tensor, shows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The reward of every prompt for the picture at the same place [n]; logits of what is wrong [n, 1 + kinds]; and the error
        of where what words name lies, in every layer but the last, given which concept every patch shows, [n, 64]."""
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        read = self.net["text"](
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            is_decoder=False,
            output_hidden_states=True,
        )
        named, places = self.named(tokens["input_ids"].tolist(), shows)
        layers = [head(states[named]) for head, states in zip(self.lies, read.hidden_states[1:-1], strict=True)]
        lies = sum((F.mse_loss(found.float(), places) for found in layers if len(places)), torch.zeros(()))
        last = read.last_hidden_state[:, 0]
        return (self.net["head"](last).squeeze(1).float() - MEAN) / STD, self.faults(last).float(), lies

    def named(self, ids: list[list[int]], shows: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """The words of prompts that name what is in the picture at the same place, as an index, and where that lies, [words, 2]."""
        found: list[tuple[int, int]] = []
        places: list[Tensor] = []
        for row, (prompt, patches) in enumerate(zip(ids, shows, strict=True)):
            for concept in patches[(patches >= 0) & (patches < len(concepts()))].unique().tolist():
                place = PLACES[patches == concept].mean(0)
                for words in self.words[concept]:
                    for start in range(len(prompt) - len(words) + 1):
                        if prompt[start : start + len(words)] == words:
                            found += [(row, start + i) for i in range(len(words))]
                            places += [place] * len(words)
        rows, columns = torch.tensor(found, dtype=torch.long).reshape(-1, 2).unbind(1)
        return (rows, columns), torch.stack(places) if places else torch.zeros(0, 2)

    def set_scale(self, scores: Tensor) -> None:
        """Make these scores have mean 0 and deviation 1, as those of ImageReward have on its own data."""
        last = self.net["head"][-1]
        with torch.no_grad():
            last.weight /= scores.std()
            last.bias.copy_((last.bias - MEAN - STD * scores.mean()) / scores.std() + MEAN)


def scenes_to_name(batch: int, vae: AutoencoderTiny, rng: random.Random, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pictures [batch, 3, 128, 128] that were turned, recolored, covered, blurred, and their patches' labels [batch, 2, 64]."""
    images, labels = [], []
    for _ in range(batch):
        made, size = shown_scene(rng), rng.choices(SIZES, SHARES)[0]
        image, boxes = compose(made, *size, rng)
        images.append(fit(through(vae, image[None]) if rng.random() < ENCODED else image[None])[0])
        labels.append(patch_labels(made, boxes, size))
    return augment(torch.stack(images), generator, 0.3, mirror=False).clamp(-1, 1), torch.stack(labels)


@dataclass(frozen=True)
class Scores:
    """Of comparisons: every reward [n], those of the better and of the worse [pairs] among them, and three losses beside."""

    all: Tensor
    better: Tensor
    worse: Tensor
    naming: Tensor  # of what the patches of the pictures show
    lies: Tensor  # of where what the prompts name lies
    faults: Tensor  # of what is wrong


def compare(model: Model, comparisons: list[Comparison]) -> Scores:
    seen = model.see(torch.cat([each.pictures for each in comparisons]))
    start, named = 0, []
    scored: list[tuple[str, int, str]] = []
    better: list[tuple[int, int]] = []
    for each in comparisons:
        better += [(len(scored) + a, len(scored) + b) for a, b in each.better]
        scored += [(text, start + place, fault) for text, place, fault in each.scored]
        named += range(start, start + len(each.labels))
        start += len(each.pictures)
    prompts, places, faults = zip(*scored, strict=True)
    labels = torch.cat([each.labels for each in comparisons])
    shows = torch.full((len(seen), labels.shape[2]), -100)
    shows[named] = labels[:, 0]
    rewards, logits, lies = model.score(list(prompts), seen[list(places)], shows[list(places)])
    wins, loses = torch.tensor(better).unbind(1)
    naming = model.naming_loss(seen[named], labels)
    fault = F.cross_entropy(logits, torch.tensor([("", *KINDS).index(fault) for fault in faults]))
    return Scores(rewards, rewards[wins], rewards[loses], naming, lies, fault)


def main(
    naming: int = typer.Option(40_000, help="Pictures whose patches are named at first."),
    ranking: int = typer.Option(40_000, help="Comparisons that are then learned from, of two or three pictures each."),
    batch: int = typer.Option(32, help="Pictures to name at a time; half as many comparisons."),
    lr: float = typer.Option(1e-3),
    count: int = typer.Option(400, help="Held-out pairs of each kind that are measured."),
    no_samples: bool = typer.Option(False, help="Go without the samples of stopped.py; nothing is then stopped early."),
    bf16: bool = typer.Option(False, help="Multiply in bfloat16: faster on a CPU with AMX or AVX512-BF16, slower on an old one."),
    threads: int = typer.Option(torch.get_num_threads()),
    vae_path: Path = typer.Option(WORK / "vae-cured"),
    start: Path = typer.Option(None, help="Folder of a reward whose weights to start from, instead of random ones."),
    out: Path = typer.Option(OUT),
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    vae = open_vae(vae_path)
    samples, held_samples = ([], []) if no_samples else finished_and_stopped()
    kinds = {kind: often for kind, often in OFTEN.items() if samples or kind != STOPPED}
    path, done, total = WORK / f"{out.name}.pt", 0, naming + ranking
    model = Model(path.with_suffix(".txt"))
    if start:
        model.take_over(start)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, done = state["average"], state["done"]

    def comparisons(seed: int) -> list[Comparison]:
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        chosen = rng.choices(list(kinds), list(kinds.values()), k=batch // 2)
        return [comparison(kind, rng, generator, samples, vae) for kind in chosen]

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task(out.name, total=total, completed=done, note="")
        running: dict[str, float] = {}
        while done < total:
            torch.manual_seed(done)  # dropout
            rank = done >= naming
            if rank:
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    scores = compare(model, comparisons(done))
                # Xu et al., equation 1: minus the log of the probability that the better one wins.
                ranked = -F.logsigmoid(scores.better - scores.worse).mean()
                parts = {"ranking": ranked, "faults": scores.faults, "naming": scores.naming, "places": scores.lies}
                loss = ranked + 0.3 * scores.faults + 0.3 * scores.naming + 0.5 * scores.lies
            else:
                images, labels = scenes_to_name(batch, vae, random.Random(done), torch.Generator().manual_seed(done))
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                    loss = model.naming_loss(model.see(images), labels)
                parts = {"naming": loss}
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            shown = batch // 2 if rank else batch
            share = (done - naming) / ranking if rank else done / naming
            warm = min(1.0, (done - naming * rank + shown) / (100 * shown))
            optimizer.param_groups[0]["lr"] = lr * (0.5 if rank else 1.0) * warm * 0.5 * (1 + math.cos(math.pi * share))
            optimizer.step()
            optimizer.zero_grad()
            done += shown
            step = done // shown
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.998, step / (step + 10)))
            running |= {part: 0.98 * running.get(part, value.item()) + 0.02 * value.item() for part, value in parts.items()}
            note = ", ".join(f"{part} loss {value:.3f}" for part, value in running.items())
            progress.update(bar, completed=done, note=note)
            if step % 50 == 0 or done >= total:
                state = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_checkpoint(path, **state, done=done)
                progress.console.print(f"{out.name}: {done}, {note}")

    for p, a in zip(parameters, average, strict=True):
        p.data.copy_(a)
    model.eval()
    with torch.no_grad():
        model.set_scale(torch.cat([compare(model, comparisons(i)).all for i in range(512 // batch)]))
    weights = {original_name(name): weight.half().float() for name, weight in model.net.state_dict().items()}
    reward = build_image_reward(VISION, model.text_config, weights, model.vocab)
    write_json(out / "measured.json", measure(reward, vae, held_samples, count))  # of what ships
    reward.net.half()  # the folder takes half the room; it is computed in float32 again
    reward.save(out)
    copy_card(out)
    typer.echo((out / "measured.json").read_text())


if __name__ == "__main__":
    typer.run(main)
