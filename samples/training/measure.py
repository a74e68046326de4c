"""Measure a pipeline by the judge: every concept in every style, named backgrounds, and two objects.

    python samples/training/measure.py samples/emoji-flux
    python samples/training/measure.py --checkpoint flux --every 6 --size 96      # how far is the training?

Writes measured.json into the pipeline's folder and contact sheets beside it: every concept and style; a prompt with four seeds side
by side; backgrounds; pairs. With --checkpoint or --every it only prints, and saves the sheets with the training's.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import typer

from common import write_json
from data import STYLES, WORK, Scene, concepts, pairs, scene_prompt
from dit_accel.eval.rewards.judge import Verdict, load_judge
from generate import background_scenes, defaults, generate_all, open_pipeline, pair_scenes
from judge import OUT, shares, verdicts
from sheets import contact_sheet

SEEDS = 4  # of one prompt, side by side
SHOWN = 48  # tiles on the sheets of seeds, backgrounds and pairs


def ranked(found: list[Verdict], scenes: list[Scene]) -> dict[str, float | int]:
    """How often the judge has the concept first, or among the first five."""
    ranks = [verdict.named.index(scene.subjects[0].code) for verdict, scene in zip(found, scenes, strict=True)]
    top1, top5 = (round(sum(rank < k for rank in ranks) / max(1, len(ranks)), 4) for k in (1, 5))
    return {"top1": top1, "top5": top5, "pictures": len(ranks)}


def singles_result(found: list[Verdict], scenes: list[Scene]) -> dict[str, object]:
    """Accuracy on every concept in every style: as a whole, of what training had and had not, by style; and the mistakes."""
    held = {(concept.code, style) for concept, style in pairs()[1]}
    names = {concept.code: concept.name for concept in concepts()}

    def part(wanted: list[bool]) -> dict[str, float | int]:
        chosen = [i for i, one in enumerate(wanted) if one]
        return ranked([found[i] for i in chosen], [scenes[i] for i in chosen])

    unseen = [(scene.subjects[0].code, scene.style) in held for scene in scenes]
    mistakes = Counter(
        (scene.subjects[0].name, names[verdict.named[0]])
        for verdict, scene in zip(found, scenes, strict=True)
        if not verdict.object
    )
    return {
        "all": ranked(found, scenes),
        "trained": part([not one for one in unseen]),
        "held_out": part(unseen),
        **{f"style_{style}": part([scene.style == style for scene in scenes]) for style in STYLES},
        "mistakes": [{"asked": a, "named": b, "pictures": n} for (a, b), n in mistakes.most_common()],
    }


def label(scene: Scene) -> str:
    """A caption that fits below a tile."""
    subjects = f" {scene.relation} ".join(concept.name for concept in scene.subjects)
    return ", ".join([subjects, *([" and ".join(scene.background)] if scene.background else [])])


def main(
    folder: Path = typer.Argument(None, help="Pipeline folder in diffusers format."),
    checkpoint: str = typer.Option(None, help="flux or pixart: measure the averaged weights of the training so far."),
    every: int = typer.Option(1, help="Take one prompt in K, whatever comes."),
    seed: int = typer.Option(0),
    size: int = typer.Option(128, help="Side in pixels; a training that has only seen small pictures wants 96."),
    steps: int = typer.Option(None, help="[default: the family's]"),
    guidance: float = typer.Option(None, help="[default: the family's]"),
    batch: int = typer.Option(16),
    bf16: bool = typer.Option(False, help="Weights and arithmetic in bfloat16."),
    threads: int = typer.Option(torch.get_num_threads()),
    judge_path: Path = typer.Option(OUT, "--judge"),
) -> None:
    torch.set_num_threads(threads)
    pipe, name = open_pipeline(folder, checkpoint, torch.bfloat16 if bf16 else torch.float32)
    native = defaults(pipe)
    settings = {"size": (size, size), "steps": steps or native[0], "guidance": native[1] if guidance is None else guidance}
    judge = load_judge(judge_path)
    everything = [Scene((concept,), style) for concept in concepts() for style in STYLES]
    several = random.Random(0).sample(everything, SHOWN // SEEDS)
    groups = {
        "singles": everything,
        "seeds": [scene for scene in several for _ in range(SEEDS)],
        "backgrounds": background_scenes(2 * SHOWN),
        "pairs": pair_scenes(SHOWN, held=False),
        "held-out pairs": pair_scenes(SHOWN, held=True),
    }
    pictures, found = {}, {}
    for group, scenes in groups.items():
        scenes = groups[group] = scenes if group == "seeds" or every == 1 else random.Random(0).sample(scenes, len(scenes) // every)
        seeds = [seed + i for i in range(len(scenes))]
        pictures[group] = generate_all(pipe, [scene_prompt(s) for s in scenes], seeds, **settings, batch=batch, note=group)
        found[group] = verdicts(judge, pictures[group], scenes)
    singles = singles_result(found["singles"], groups["singles"])
    others = {group: shares(found[group]) for group in ("backgrounds", "pairs", "held-out pairs")}
    for part, value in singles.items():
        if isinstance(value, dict):
            typer.echo(f"{part:14} top-1 {value['top1']:6.1%}  top-5 {value['top5']:6.1%}  of {value['pictures']}")
    for group, values in others.items():
        rights = "  ".join(f"{key} {value:6.1%}" for key, value in values.items() if key != "pictures")
        typer.echo(f"{group:14} {rights}  of {values['pictures']}")
    confused = ", ".join(f"{row['asked']} as {row['named']} ({row['pictures']})" for row in singles["mistakes"][:10])
    typer.echo(f"most confused: {confused}")

    whole = folder is not None and every == 1
    if whole:
        plain = {"seed": seed, "size": size, "steps": settings["steps"], "guidance_scale": settings["guidance"]}
        write_json(folder / "measured.json", {**plain, **singles, **others})
    page = folder.parent if whole else WORK / "sheets"
    stem = folder.name if whole else f"measured-{name.replace(' ', '-')}"

    def show(ending: str, shown: tuple[str, ...], most: int, right: Callable[[Verdict], object], columns: int, side: int) -> None:
        images = torch.cat([pictures[group][:most] for group in shown])
        captions = [label(scene) for group in shown for scene in groups[group][:most]]
        wrong = [not right(verdict) for group in shown for verdict in found[group][:most]]
        contact_sheet(images, captions, wrong, columns, side, page / f"{stem}{ending}.png")

    show("", ("singles",), len(everything), lambda verdict: verdict.object, 18, 64)
    show("-seeds", ("seeds",), SHOWN, lambda verdict: verdict.object, 3 * SEEDS, 80)
    show("-backgrounds", ("backgrounds",), SHOWN, lambda verdict: verdict.object and verdict.background, 12, 80)
    show("-pairs", ("pairs", "held-out pairs"), SHOWN // 2, lambda verdict: verdict.places, 8, 112)
    typer.echo(f"contact sheets: {page / stem}*.png")


if __name__ == "__main__":
    typer.run(main)
