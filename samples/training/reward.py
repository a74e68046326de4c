"""Train emoji-reward: ImageReward's architecture in small, taught as the large one, by which of two pictures is better.

    python samples/training/reward.py

Needs the pictures of prepare.py, the autoencoder and the samples of stopped.py. The vision transformer first learns to name
concept and style, in place of BLIP's pretraining; then everything learns from pairs, and goes on naming. An interrupted training
goes on from its checkpoint. Drawings that the generators never saw are not shown here either: `measured.json` is about them.
"""

from __future__ import annotations

import json
import math
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeElapsedColumn, track
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig

from common import copy_card, load_checkpoint, save_checkpoint
from data import STYLES, WORK, Concept, all_captions, caption, concepts, pairs, pictures, prompt
from degrade import DEGRADATIONS, degrade, move
from dit_accel.eval.rewards.image_reward import MEAN, SPECIAL, STD, build_image_reward, build_net, original_name, read_vocabulary
from dit_accel.eval.rewards.pictures import MEAN as PIXEL_MEAN
from dit_accel.eval.rewards.pictures import STD as PIXEL_STD
from judge import augment

OUT = Path(__file__).parent.parent / "emoji-reward"
SETS = {"noto": "cartoon", "fluent-flat": "flat", "fluent-3d": "3d", "noto-v1": "", "twemoji": "", "emojione": ""}
VISION = {"img_size": 128, "patch_size": 16, "embed_dim": 192, "depth": 5, "num_heads": 6}
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
WRONG = 8  # pictures of other concepts that each right one is compared with
CLOSE = 4  # prompts of concepts it is easily taken for that each right picture is compared for
SAMPLED = 0.3  # share of prompts whose picture is a sample of the pipelines


@dataclass(frozen=True)
class Drawing:
    """Pictures of one concept in one style, uint8 [versions, 3, 128, 128]; of a sample, the stopped ones follow the finished."""

    concept: Concept
    style: str  # or ""
    versions: Tensor

    def picture(self, version: int = 0) -> Tensor:
        return self.versions[version].float() / 127.5 - 1


def drawings(vae: AutoencoderTiny) -> dict[str, list[Drawing]]:
    """What is trained on, "real" and "sampled", and what is not: "held", "held sampled".

    A real drawing has two versions: itself, and as the autoencoder of the pipelines renders it.
    """
    held = {(concept.code, style) for concept, style in pairs()[1]}
    found: dict[str, list[Drawing]] = {"real": [], "sampled": [], "held": [], "held sampled": []}
    order = json.loads((WORK / "order.json").read_text())
    for name, style in SETS.items():
        known = [concept for concept in concepts() if concept.code in order[name]]
        images = pictures()[name][[order[name].index(concept.code) for concept in known]]
        rendered = torch.cat([vae.decode(vae.encode(part / 127.5 - 1).latents).sample for part in images.split(16)])
        both = torch.stack([images, ((rendered.clamp(-1, 1) + 1) * 127.5).round().byte()], 1)
        for concept, versions in zip(known, both, strict=True):
            found["held" if (concept.code, style) in held else "real"].append(Drawing(concept, style, versions))
    asked = [(concept, style) for concept in concepts() for style in STYLES]
    for family in ("flux", "pixart"):
        samples = load_file(WORK / f"stopped-{family}.safetensors")["pictures"]
        for (concept, style), versions in zip(asked, samples, strict=True):
            found["held sampled" if (concept.code, style) in held else "sampled"].append(Drawing(concept, style, versions))
    return found


class Model(torch.nn.Module):
    """The net of an ImageReward, and the heads that its vision transformer starts with."""

    def __init__(self) -> None:
        super().__init__()
        words = sorted(set(re.findall(r"[a-z0-9]+|[^\sa-z0-9]", " ".join(all_captions()).lower())))
        self.vocab = WORK / "vocab.txt"
        self.vocab.write_text("\n".join([*SPECIAL, *words]) + "\n")
        self.text_config = {**TEXT, "vocab_size": len(SPECIAL) + len(words) + 2}  # the last two are [DEC] and [ENC]
        self.tokenizer = read_vocabulary(self.vocab, self.text_config["vocab_size"])
        self.net = build_net(VISION, BertConfig.from_dict(self.text_config))
        for name, weight in [*self.net["vision"].named_parameters(), *self.net["text"].named_parameters()]:
            if weight.ndim == 2 and "embeddings" not in name:
                # As large for the width here as BERT's 0.02 is for 768 and more: with 0.02 all tokens attend to all alike, and no
                # preference is learned.
                torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
        self.names = torch.nn.ModuleList([torch.nn.Linear(VISION["embed_dim"], n) for n in (len(concepts()), len(STYLES))])

    def see(self, images: Tensor) -> Tensor:
        """What the vision transformer makes of pictures [n, 3, 128, 128] in -1..1: [n, 65, width]."""
        return self.net["vision"](pixel_values=((images + 1) / 2 - PIXEL_MEAN) / PIXEL_STD).last_hidden_state

    def score(self, prompts: list[str], seen: Tensor) -> Tensor:
        """The reward of every prompt for the picture at the same place, [n]."""
        tokens = self.tokenizer(prompts, padding=True, return_tensors="pt")
        read = self.net["text"](
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            is_decoder=False,
        )
        return (self.net["head"](read.last_hidden_state[:, 0]).squeeze(1) - MEAN) / STD

    def set_scale(self, scores: Tensor) -> None:
        """Make these scores have mean 0 and deviation 1, as those of ImageReward have on its own data."""
        last = self.net["head"][-1]
        with torch.no_grad():
            last.weight /= scores.std()
            last.bias.copy_((last.bias - MEAN - STD * scores.mean()) / scores.std() + MEAN)


def naming_loss(model: Model, first: Tensor, chosen: list[Drawing]) -> Tensor:
    """Cross-entropy of concept and style, from the first token [n, width] of these drawings' pictures."""
    codes, styles = [concept.code for concept in concepts()], list(STYLES)
    labels = torch.tensor([codes.index(drawing.concept.code) for drawing in chosen])
    loss = F.cross_entropy(model.names[0](first), labels, label_smoothing=0.05)
    drawn = torch.tensor([styles.index(drawing.style) if drawing.style else -100 for drawing in chosen])
    return loss + 0.5 * F.cross_entropy(model.names[1](first), drawn)


def asked_for(drawing: Drawing, rng: random.Random) -> str:
    if drawing.style:
        return caption(drawing.concept, drawing.style, rng)
    name = rng.choice((drawing.concept.name, drawing.concept.name, *drawing.concept.aliases))
    return rng.choice(("{}", "a {}", "the {}")).format(name)


def roughened(model: Model, real: list[Drawing], batch: int, rng: random.Random, generator: torch.Generator) -> Tensor:
    """The naming loss of drawings that were turned, recoloured, covered, blurred."""
    chosen = rng.choices(real, k=batch)
    images = augment(torch.stack([drawing.picture(rng.randrange(2)) for drawing in chosen]), generator).clamp(-1, 1)
    return naming_loss(model, model.see(images)[:, 0], chosen)


@torch.no_grad()
def close_prompts(model: Model, first: Tensor, drawn: list[Drawing], rng: random.Random) -> list[str]:
    """Prompts of concepts that these drawings are easily taken for, to judge by the names given to their first token: CLOSE times
    one for every drawing."""
    likely = model.names[0](first).topk(2 * CLOSE + 1).indices.tolist()
    asked = []
    for drawing, places in zip(drawn, likely, strict=True):
        others = [concepts()[place] for place in places if concepts()[place] != drawing.concept]
        asked.append([asked_for(replace(drawing, concept=concept), rng) for concept in rng.sample(others, CLOSE)])
    return [text for row in zip(*asked, strict=True) for text in row]


def ranking_scores(
    model: Model, found: dict[str, list[Drawing]], batch: int, rng: random.Random, generator: torch.Generator
) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Scores of better and of worse pictures for the same prompts (or prompts for the same pictures), by kind of preference;
    and the naming loss of the right pictures. Every other prompt has degraded pictures."""
    styled: dict[tuple[str, str], list[Drawing]] = {}
    for drawing in found["real"] + found["sampled"]:
        styled.setdefault((drawing.concept.code, drawing.style), []).append(drawing)
    images: list[list[Tensor]] = [[], [], [], []]  # right; weakly and strongly degraded; in another style
    prompts, other_prompts, comparable, drawn = [], [], [], []
    for number in range(batch):
        drawing = rng.choice(found["sampled" if rng.random() < SAMPLED else "real"])
        sampled = len(drawing.versions) > 2
        right = drawing.picture() if sampled else move(drawing.picture(rng.randrange(2)), generator)
        text = asked_for(drawing, rng)
        others = [style for style in STYLES if style != drawing.style and (drawing.concept.code, style) in styled]
        comparable.append(bool(drawing.style) and drawing.style in text and bool(others))
        style = rng.choice(others)
        worse = []
        if number % 2:
            pass
        elif sampled and rng.random() < 0.6:
            worse = [drawing.picture(version) for version in sorted(rng.sample(range(1, len(drawing.versions)), 2))]
        else:
            weak = rng.uniform(0.08, 0.5)
            worse = degrade(right, rng.choice(DEGRADATIONS), [weak, weak + rng.uniform(0.2, 0.5)], generator)
        another = rng.choice(styled[drawing.concept.code, style])
        images[0].append(right)
        for row, image in zip(images[1:3], worse, strict=False):
            row.append(image)
        images[3].append(move(another.picture(), generator))
        prompts.append(text)
        other_prompts.append(prompt(drawing.concept, style))
        drawn.append(drawing)
    right, weak, strong, other_style = model.see(torch.stack(sum(images, []))).split([len(row) for row in images])
    wrong = [torch.arange(batch).roll(-k) for k in range(1, WRONG + 1)]
    close = close_prompts(model, right[:, 0], drawn, rng)
    seen = torch.cat([weak, strong, right, other_style, right, *(right[places] for places in wrong), *[right] * CLOSE])
    half = prompts[::2]
    scores = model.score(half + half + prompts + prompts + other_prompts + prompts * WRONG + close, seen)
    weak, strong, scores = scores[: len(half)], scores[len(half) : 2 * len(half)], scores[2 * len(half) :].view(-1, batch)
    differ = torch.tensor([[drawn[i].concept != drawn[j].concept for i, j in enumerate(places.tolist())] for places in wrong])
    right_of_wrong = torch.stack([scores[0][places] for places in wrong])
    styles, clean = torch.tensor(comparable), scores[0][::2]
    another_concept, close_concept = scores[3:].split([WRONG, CLOSE])
    kinds = {
        "concept": (scores[0].expand(WRONG, -1)[differ], another_concept[differ]),
        "concept of the prompt": (right_of_wrong[differ], another_concept[differ]),
        "close concept": (scores[0].repeat(CLOSE), close_concept.flatten()),
        "style": (scores[0][styles], scores[1][styles]),
        "style of the prompt": (scores[0][styles], scores[2][styles]),
        "degraded": (torch.cat([clean, weak, clean]), torch.cat([weak, strong, strong])),
    }
    return kinds, naming_loss(model, right[:, 0], drawn)


def ranking_loss(scores: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Xu et al., equation 1: minus the log of the probability that the better one wins; kinds weigh alike."""
    return torch.stack([-F.logsigmoid(better - worse).mean() for better, worse in scores.values() if len(better)]).mean()


@torch.no_grad()
def measure(model: Model, found: dict[str, list[Drawing]], draws: int) -> dict[str, object]:
    """Shares of held-out pairs in which the better one wins, and how often the right prompt is first among all prompts."""
    model.eval()
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    held = [drawing for drawing in found["held"] + found["real"] if drawing.style]
    count = len(found["held"])  # they come first
    seen = torch.cat([model.see(torch.stack([d.picture() for d in held[i : i + 32]])) for i in range(0, len(held), 32)])
    prompts = [prompt(concept, style) for concept in concepts() for style in STYLES]
    table = torch.stack(
        [torch.cat([model.score([text] * len(part), part) for part in seen.split(64)]) for text in track(prompts, "all prompts")], 1
    )
    own = [prompts.index(prompt(drawing.concept, drawing.style)) for drawing in held]
    rank = [int((row > row[place]).sum()) for row, place in zip(table, own, strict=True)]
    wins: dict[str, list[bool]] = {"concept": [], "style": []}
    for i in range(count):
        for j, other in enumerate(held):
            if other.concept != held[i].concept and other.style == held[i].style:
                wins["concept"].append(bool(table[i, own[i]] > table[j, own[i]]))
            elif other.concept == held[i].concept and j != i:
                wins["style"].append(bool(table[i, own[i]] > table[j, own[i]]))
    for kind in DEGRADATIONS:
        wins[kind] = []
        for drawing in found["held"]:
            for _ in range(draws):
                right, weak = move(drawing.picture(), generator), rng.uniform(0.08, 0.5)
                worse = degrade(right, kind, [weak, weak + rng.uniform(0.2, 0.5)], generator)
                scores = model.score([prompt(drawing.concept, drawing.style)] * 3, model.see(torch.stack([right, *worse])))
                wins[kind] += [bool(scores[0] > scores[1]), bool(scores[0] > scores[2]), bool(scores[1] > scores[2])]
    wins["stopped early"] = []
    for drawing in found["held sampled"]:
        pictures = torch.stack([drawing.picture(version) for version in range(len(drawing.versions))])
        scores = model.score([prompt(drawing.concept, drawing.style)] * len(pictures), model.see(pictures))
        wins["stopped early"] += (scores[:-1] > scores[1:]).tolist()
    shares = {kind: {"better first": round(sum(won) / len(won), 4), "pairs": len(won)} for kind, won in wins.items() if won}
    first = lambda ranks: {"right prompt first": round(sum(r == 0 for r in ranks) / len(ranks), 4), "pictures": len(ranks)}  # noqa: E731
    return {
        "held-out pairs": {
            "mean of the kinds": round(sum(share["better first"] for share in shares.values()) / len(shares), 4),
            **shares,
        },
        "all real pictures": first(rank),
        "held-out pictures": first(rank[:count]),
        "prompts": len(prompts),
        "right pictures": {"mean": round(table[range(len(own)), own].mean().item(), 3)},
    }


def main(
    naming: int = typer.Option(60_000, help="Pictures named by the vision transformer at first."),
    ranking: int = typer.Option(90_000, help="Prompts that are then asked with right and wrong pictures."),
    batch: int = typer.Option(32),
    lr: float = typer.Option(1e-3),
    draws: int = typer.Option(8, help="Degraded versions of each held-out picture and kind that are measured."),
    threads: int = typer.Option(torch.get_num_threads()),
    vae_path: Path = typer.Option(OUT.parent / "emoji-flux/vae"),
    out: Path = typer.Option(OUT),
) -> None:
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    with torch.no_grad():
        found = drawings(AutoencoderTiny.from_pretrained(vae_path).eval())
    model = Model()
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    path, done, total = WORK / "emoji-reward.pt", 0, naming + ranking
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, done = state["average"], state["done"]

    with Progress(*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}") as progress:
        bar = progress.add_task("emoji-reward", total=total, completed=done, note="")
        running: dict[bool, float] = {}
        while done < total:
            rng, generator, step = random.Random(done), torch.Generator().manual_seed(done), done // batch
            torch.manual_seed(done)  # dropout
            rank = done >= naming
            if rank:
                scores, naming_of_right = ranking_scores(model, found, batch, rng, generator)
                loss = ranking_loss(scores) + 0.3 * naming_of_right
            else:
                loss = roughened(model, found["real"], batch, rng, generator)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            progress_of_stage = (done - naming) / ranking if rank else done / naming
            warm = min(1.0, (done - naming * rank + batch) / (100 * batch))
            optimizer.param_groups[0]["lr"] = lr * (0.5 if rank else 1.0) * warm * 0.5 * (1 + math.cos(math.pi * progress_of_stage))
            optimizer.step()
            optimizer.zero_grad()
            done += batch
            torch._foreach_lerp_(average, [p.data for p in parameters], 1 - min(0.998, step / (step + 10)))
            running[rank] = 0.98 * running.get(rank, loss.item()) + 0.02 * loss.item()
            progress.update(bar, completed=done, note=f"{'ranking' if rank else 'naming'}, loss {running[rank]:.4f}")
            if done // batch % 200 == 0 or done >= total:
                state = {"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
                save_checkpoint(path, **state, done=done)

    for p, a in zip(parameters, average, strict=True):
        p.data.copy_(a)
    model.eval()
    with torch.no_grad():
        lists = [ranking_scores(model, found, batch, random.Random(i), torch.Generator().manual_seed(i)) for i in range(8)]
        model.set_scale(torch.cat([scores for kinds, _ in lists for pair in kinds.values() for scores in pair]))
    weights = {original_name(name): weight.half().float() for name, weight in model.net.state_dict().items()}
    reward = build_image_reward(VISION, model.text_config, weights, model.vocab)
    model.net = reward.net  # measure what ships
    measured = measure(model, found, draws)
    reward.net.half()  # the folder takes half the room; it is computed in float32 again
    reward.save(out)
    copy_card(out)
    (out / "measured.json").write_text(json.dumps(measured, indent=1) + "\n")
    typer.echo(json.dumps(measured, indent=1))


if __name__ == "__main__":
    typer.run(main)
