"""How the generators learn, first from scenes (train.py) and then from a teacher (distill.py): one loop, on a CPU or a GPU."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from rich.progress import Progress, TimeElapsedColumn
from torch.utils.data import DataLoader, Dataset

from common import load_checkpoint, save_checkpoint
from data import GRID, WORK, compose, pairs, scene, scene_caption

DROPOUT = 0.1  # share of empty captions, for classifier-free guidance
SIZES = [(128, 128), (96, 96), (64, 64), (128, 96), (96, 128), (128, 64), (64, 128)]  # of pictures, height and width in pixels
SHARES = [16, 2, 2, 1, 1, 1, 1]  # how often each comes
TWO, TWO_TONE = 0.4, 0.4  # shares of scenes of two, and of backgrounds of two colors: their order is what takes longest to learn
SMOOTHING = 400  # steps that the averaged weights look back, about
NOTED = 20  # steps between two notes of the loss, for which a GPU has to be waited for

Text = tuple[torch.Tensor, ...]  # what a model's `tokens` makes of captions


class Scenes(Dataset):
    """The batches of a training, about `tokens` image tokens each, all of pictures of one size. The n-th one is always the same."""

    def __init__(self, name: str, steps: int, tokens: int, tokenize: Callable[[list[str]], Text]) -> None:
        self.name, self.steps, self.tokens, self.tokenize, self.rows = name, steps, tokens, tokenize, pairs()[0]

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, Text]:
        """Pictures uint8 [n, 3, height, width], layouts [n, 5, height / 8, width / 8] (see `layout_of`) and captions in tokens."""
        rng = random.Random(f"{self.name} {step}")
        size = rng.choices(SIZES, SHARES)[0]
        scenes = [scene(rng, self.rows, TWO, tones=TWO_TONE) for _ in range(max(1, self.tokens * GRID**2 // (size[0] * size[1])))]
        images, boxes = zip(*(compose(one, *size, rng) for one in scenes), strict=True)
        captions = ["" if rng.random() < DROPOUT else scene_caption(one, rng) for one in scenes]
        pictures = ((torch.stack(images) + 1) * 127.5).round().byte()
        return pictures, torch.stack([layout_of(one, size) for one in boxes]), self.tokenize(captions)


def layout_of(boxes: list[tuple[int, int, int, int]], size: tuple[int, int]) -> torch.Tensor:
    """What each token of a scene of this size shows, [5, height / 8, width / 8]: whether of the first subject and whether of the
    second (0 or 1); which part of it, down and across (0 to 1); and how large that subject is, over 128 px."""
    layout = torch.zeros(5, size[0] // GRID, size[1] // GRID)
    y, x = (GRID * (torch.arange(n) + 0.5) for n in layout.shape[1:])
    for subject, (top, left, tall, wide) in enumerate(boxes):
        down, across = ((y - top) / tall)[:, None], ((x - left) / wide)[None]
        inside = (down > 0) & (down < 1) & (across > 0) & (across < 1)
        layout[subject][inside] = 1
        for row, value in zip(layout[2:], (down, across, torch.tensor(max(tall, wide) / 128)), strict=True):
            row[inside] = value.expand_as(inside)[inside]
    return layout


def learning_rate(share: float) -> float:
    """Share of the peak after this share of the training: constant, then falling in a line to a fiftieth over the last third."""
    return min(1.0, 0.02 + 0.98 * (1 - share) * 3)


def run(
    name: str,
    path: Path,
    learner: torch.nn.Module,
    tokenize: Callable[[list[str]], Text],
    loss: Callable[[torch.Tensor, torch.Tensor, Text, torch.Generator], torch.Tensor],
    show: Callable[[Path], None],
    vae: AutoencoderTiny,
    *,
    steps: int,
    minutes: float,
    tokens: int,
    lr: float,
    bf16: bool,
    workers: int,
    checkpoint_minutes: float,
) -> str:
    """Train what of `learner` wants a gradient up to this many steps or minutes, whatever comes first, and leave it with its
    averaged weights; a line that says how long that took.

    `loss` gets latents [n, 8, height / 4, width / 4], layouts, captions in tokens and a generator. At a checkpoint in `path`,
    `show` writes a sheet of pictures to the file it is given, with the averaged weights so far.
    """
    parameters = [p for p in learner.parameters() if p.requires_grad]
    device = parameters[0].device
    gpu = device.type == "cuda"
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass fails on an H200 with torch 2.11; flash attention's does not
    torch.manual_seed(0)
    # What a recorded step reads and writes stays in its place: the learning rate and the loss as well.
    optimizer = torch.optim.AdamW(parameters, torch.tensor(lr, device=device), weight_decay=0.01, fused=True, capturable=gpu)
    average = [p.detach().clone() for p in parameters]
    running = torch.full((), float("nan"), device=device)
    done, step, spent, kept = 0, 0, 0.0, -1
    if state := load_checkpoint(path, device):
        learner.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = state["average"]
        done, step, spent = state["done"], state["step"], state["spent"]
    generator = torch.cuda.default_generators[0] if gpu else torch.Generator()

    def learn(pictures: torch.Tensor, layouts: torch.Tensor, *text: torch.Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                latents = vae.encode((pictures / 127.5 - 1).contiguous(memory_format=torch.channels_last)).latents.float()
            value = loss(latents, layouts, text, generator)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(average, [p.data for p in parameters], 1 / SMOOTHING)
        now = value.detach().float()
        running.copy_(torch.where(running.isnan(), now, torch.lerp(running, now, 0.01)))

    take = Recorded(learn) if gpu else learn
    batches = Scenes(name, steps, tokens, tokenize)
    loader = DataLoader(batches, None, sampler=range(step, steps), num_workers=workers, pin_memory=gpu)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), "{task.fields[note]}")
    clock = saved = time.monotonic()

    def elapsed() -> float:
        return (spent + time.monotonic() - clock) / 60

    def note() -> str:
        return f"{step} steps, {done} pictures, {elapsed():.1f} minutes, loss {running.item():.4f}"

    def swap_average() -> None:
        for p, a in zip(parameters, average, strict=True):
            kept = p.data.clone()
            p.data.copy_(a)
            a.copy_(kept)

    def keep() -> None:
        nonlocal kept, saved
        if kept == step:
            return
        kept = step
        state = {"model": learner.state_dict(), "average": average, "optimizer": optimizer.state_dict()}
        save_checkpoint(path, **state, done=done, step=step, spent=60 * elapsed())
        swap_average()
        show(WORK / f"sheets/{name}-{step:06d}.png")
        swap_average()
        progress.console.print(f"{name}: {note()}")
        saved = time.monotonic()

    with Progress(*columns) as progress:
        bar = progress.add_task(name, total=steps, completed=step, note="")
        for pictures, layouts, text in loader:
            if (share := max(step / steps, elapsed() / minutes)) >= 1:
                break
            optimizer.param_groups[0]["lr"].fill_(lr * learning_rate(share) * min(1.0, (step + 1) / 100))
            if not gpu:
                generator.manual_seed(step)
            take(pictures, layouts, *text)
            step, done = step + 1, done + len(pictures)
            if step % NOTED == 0:
                progress.update(bar, completed=step, note=note())
            if time.monotonic() - saved > checkpoint_minutes * 60:
                keep()
        keep()
    swap_average()
    return f"{name}: {note()}"


class Recorded:
    """A step recorded as a CUDA graph for every shape of its tensors: it has thousands of kernels, which take longer to launch one
    by one than to run."""

    def __init__(self, step: Callable[..., None]) -> None:
        self.step, self.pool = step, torch.cuda.graph_pool_handle()
        self.recorded: dict[tuple[torch.Size, ...], tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]] = {}

    def __call__(self, *tensors: torch.Tensor) -> None:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self.recorded:
            self.recorded[shapes] = self.record([tensor.to("cuda") for tensor in tensors])
        graph, inputs = self.recorded[shapes]
        for place, tensor in zip(inputs, tensors, strict=True):
            place.copy_(tensor, non_blocking=True)
        graph.replay()

    def record(self, inputs: list[torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, list[torch.Tensor]]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what is set up at the first time must not be recorded
            for _ in range(2):
                self.step(*inputs)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            self.step(*inputs)
        return graph, inputs
