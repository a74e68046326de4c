"""Which tokens are computed on a partial step: a score per token, larger first.

A selector of one's own:

    @dit_accel.register_selector("mine")
    def mine(context):
        "Tokens with the largest input first."
        return context.tokens.norm(dim=-1)
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from dit_accel.chunks import at_once
from dit_accel.names import called, look_up, ours, registering
from dit_accel.tiles import from_tiles, to_tiles

CHUNK = 64  # tokens whose similarities to all others exist at the same time on a CPU
ROWS = 512  # tokens that exist in float32 at the same time on a CPU

# What a selector may ask to have remembered, and its shape.
OBSERVATIONS = {
    "keys": "keys of the last full step before QK-norm and RoPE, [B, N, heads, D]",
    "values": "values of the last full step, [B, N, heads, D]",
    "key_norms": "L2 norms of these keys, mean over heads, [B, N]",
    "value_norms": "L2 norms of these values, mean over heads, [B, N]",
    "attention": "attention that each token received on the last full step, mean over heads and queries, [B, N]",
    "entropy": "1 plus the entropy of each token's attention to the text when it was last computed, mean over heads, [B, N]",
    "last_tokens": "inputs of the layer when each token was last computed, [B, N, C]",
}


@dataclass
class SelectionContext:
    """What a selector may look at, for one layer on one partial step.

    Attributes:
        tokens: inputs of the layer now, [B, N, C].
        ages: partial steps since each token was computed, [1 or B, N].
        noise: uniform numbers in 0..1, [1, N], drawn afresh for every step and layer by a generator of the run's own, and
            shared by the batch, so that the tokens computed for one picture do not depend on the others.
        count: how many tokens will be computed.
        grid: height and width of the image in tokens; its tokens follow the text's. Tokens beyond (a reference picture)
            belong to no grid.
        text: text tokens at the front of the sequence.
        where: has `layer`, the layer's index within its stream; `stream`, which is "image", "text", "joint",
            "cross-attention" or "feed-forward"; and `step`, from 0. All three are properties of the context as well.
        observed: what the selector said that it needs, by the names of `OBSERVATIONS`; `context.keys` is `observed["keys"]`.
    """

    tokens: torch.Tensor
    ages: torch.Tensor
    noise: torch.Tensor
    count: int
    grid: tuple[int, int]
    text: int
    where: Any
    observed: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __getattr__(self, name: str) -> torch.Tensor:
        if name not in OBSERVATIONS:
            raise AttributeError(f"A SelectionContext has no {name}.")
        if name not in self.observed:
            raise ValueError(
                f"The selector looks at context.{name}, which is kept only on request; register it with needs={{{name!r}}}."
            )
        return self.observed[name]

    # Not fields: what is read becomes a constant of a compiled graph, and the step changes all the time.
    layer = property(lambda self: self.where.layer)
    stream = property(lambda self: self.where.stream)
    step = property(lambda self: self.where.step)

    @property
    def text_mask(self) -> torch.Tensor:
        """True for text tokens, [N]."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device) < self.text


Score = Callable[[SelectionContext], torch.Tensor]


@dataclass(frozen=True)
class Selector:
    score: Score
    description: str
    needs: frozenset[str]
    per_picture: bool
    blind: bool
    uses_tokens: bool


_SELECTORS: dict[str, Selector] = {}


def register_selector(
    name: str | Score | None = None,
    *,
    needs: Collection[str] = (),
    per_picture: bool = True,
    blind: bool = False,
    uses_tokens: bool = True,
) -> Callable[..., Any]:
    """Decorator that makes a function SelectionContext -> scores [1 or B, N] known by name.

    Args:
        name: what configurations and the command line call it, by default the function's own; it can be taken again.
        needs: what has to be remembered for it, from `OBSERVATIONS`.
        per_picture: False for scores [1, N] that are the same for every picture of a batch, which spares memory traffic.
        uses_tokens: False if the score does not depend on the layer's inputs (tokens, last_tokens): FLUX then need not compute
            its text stream on partial steps.
        blind: True if besides it looks at nothing but noise, ages, count, grid and text, row by row. It is then called once a
            step with a row for every layer, scores [layers, N], which spares most of a selection's cost; its tokens say nothing.

    Raises:
        ValueError: for the name of one of dit_accel's own, a need that is not known, or a blind selector that needs anything.
    """
    if blind and (per_picture or needs):
        raise ValueError("A blind selector looks at no picture: give per_picture=False and no needs.")
    if unknown := sorted(set(needs) - set(OBSERVATIONS)):
        raise ValueError(f"A selector cannot need {', '.join(unknown)}; it can need {', '.join(OBSERVATIONS)}.")

    def make(score: Score) -> Selector:
        description = (score.__doc__ or "").strip().split("\n")[0]
        return Selector(score, description, frozenset(needs), per_picture, blind, uses_tokens and not blind)

    return registering("selector", name, _SELECTORS, make)


def get(name: str | Score) -> Selector:
    """The selector of that name, or of a function, registered or not; ValueError with the known names if there is none."""
    if callable(name):
        unknown = Selector(name, "", frozenset(), per_picture=True, blind=False, uses_tokens=True)
        return next((known for known in _SELECTORS.values() if known.score is name), unknown)
    return look_up("selector", name, _SELECTORS)


def selectors() -> dict[str, str]:
    """Name and one-line description of every selector."""
    return {name: selector.description for name, selector in _SELECTORS.items()}


_SEEN: set[Selector] = set()  # whose scores have been looked at once


def scored(selector: Selector, name: str | Score, context: SelectionContext, rows: int) -> torch.Tensor:
    """The selector's scores, [1 or rows, N].

    Raises:
        ValueError: if they have another shape or are no tensor; or if some are NaN, which off the CPU, where looking makes the host
            wait, is found the first time only.
    """
    scores, tokens, its = selector.score(context), context.tokens.shape[1], f"The selector {called(name)!r} returned"
    wanted = f"[{'1' if rows == 1 else f'1 or {rows}'}, {tokens}], one for each of context.tokens"
    if not isinstance(scores, torch.Tensor):
        raise ValueError(f"{its} {scores!r:.40}; it must return a tensor of scores {wanted}.")
    if scores.ndim != 2 or len(scores) not in (1, rows) or scores.shape[1] != tokens:
        raise ValueError(f"{its} scores of shape {list(scores.shape)}; it must return {wanted}.")
    if not (torch.compiler.is_compiling() or ours(selector) or scores.is_meta):
        if (scores.device.type == "cpu" or selector not in _SEEN) and scores.isnan().any():
            raise ValueError(f"{its} NaN for some tokens of layer {context.layer} on step {context.step}; it must return numbers.")
        _SEEN.add(selector)
    return scores


@register_selector("random", per_picture=False, blind=True)
def random(context: SelectionContext) -> torch.Tensor:
    """Every token with the same chance."""
    return context.noise


def _observed(name: str, need: str, description: str) -> None:
    def score(context: SelectionContext) -> torch.Tensor:
        seen: torch.Tensor = getattr(context, need)
        return seen

    score.__doc__ = description
    register_selector(name, needs={need}, uses_tokens=False)(score)


_observed("attention", "attention", "Tokens that received the most attention on the last full step.")
_observed("k-norm", "key_norms", "Tokens with the longest keys (before QK-norm and RoPE) on the last full step.")
_observed("v-norm", "value_norms", "Tokens with the longest values on the last full step.")
_observed("cross-entropy", "entropy", "Tokens whose attention to the text is spread the most (PixArt).")


@register_selector("similarity")
def similarity(context: SelectionContext) -> torch.Tensor:
    """A random tenth of the selection, then the tokens most similar to it."""
    base = context.noise.topk(max(1, round(context.count / 10)), dim=-1).indices
    return nearness(context.tokens, base).scatter(1, base.expand(len(context.tokens), -1), 2.0)


@register_selector("stratified", per_picture=False, blind=True)
def stratified(context: SelectionContext) -> torch.Tensor:
    """Random, but every tile of the image gets its share."""
    total, (height, width) = context.tokens.shape[1], context.grid
    image, share = height * width, context.count / total
    if context.stream == "text" or image > total - context.text:
        parts = [(1, total)]
    else:
        parts = [(1, context.text), (height, width), (1, total - context.text - image)]
    scores = []
    for part, (rows, columns) in zip(context.noise.split([r * c for r, c in parts], dim=1), parts, strict=True):
        if rows * columns:
            side = max(1, round(math.sqrt(1 / share) if rows > 1 else 1 / share))
            tiled = to_tiles(part, (rows, columns), side, fill=-1.0)
            rank = tiled.argsort(dim=-1, descending=True).argsort(dim=-1)  # 0 for the first of its tile
            inside = tiled >= 0
            # The tile's own uniform number makes its r-th token due at (r + start) / tokens, whatever the size of the tile.
            start = ((tiled * inside).sum(dim=-1, keepdim=True) * 31) % 1
            scores.append(from_tiles(1 - (rank + start) / inside.sum(dim=-1, keepdim=True), (rows, columns), side))
    return torch.cat(scores, dim=1)


@register_selector("drift", needs={"last_tokens"})
def drift(context: SelectionContext) -> torch.Tensor:
    """Tokens whose input turned the most since they were last computed (keeps the inputs: twice the memory)."""
    rows = at_once(ROWS, context.tokens.device)
    pairs = zip(context.tokens.split(rows, dim=1), context.last_tokens.split(rows, dim=1), strict=True)
    return 1 - torch.cat([F.cosine_similarity(now.float(), last.float(), dim=-1) for now, last in pairs], dim=1)


@register_selector("variance")
def variance(context: SelectionContext) -> torch.Tensor:
    """Tokens that differ the most from the mean of the 2 x 2 tokens around them: where the picture has detail."""
    tokens, (height, width), start = context.tokens.float(), context.grid, context.text
    if context.stream == "text" or start + height * width > tokens.shape[1]:
        return (tokens - tokens.mean(1, keepdim=True)).square().mean(2)
    parts = tokens.split([start, height * width, tokens.shape[1] - start - height * width], dim=1)
    image = parts[1].transpose(1, 2).unflatten(2, (height, width))
    means = F.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False)
    around = means.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :width]
    own = (image - around).square().mean(1).flatten(1)
    others = [(part - part.mean(1, keepdim=True)).square().mean(2) for part in parts[::2]]
    return torch.cat([others[0], own, others[1]], dim=1)


@register_selector("diverse")
def diverse(context: SelectionContext) -> torch.Tensor:
    """A random tenth of the selection, then, in doubling rounds, the tokens least similar to all that are chosen."""
    batch = len(context.tokens)
    chosen = context.noise.topk(max(1, round(context.count / 10)), dim=-1).indices.expand(batch, -1)
    near = nearness(context.tokens, chosen)
    scores, head_start = torch.zeros_like(near), 3.0 * (1 + math.ceil(math.log2(max(2, context.count))))
    scores = scores.scatter(1, chosen, head_start)
    while chosen.shape[1] < context.count:
        head_start -= 3.0  # cosines are at most 2 apart, so that an earlier round always comes first
        fresh = (near + 4.0 * (scores > 0)).topk(min(chosen.shape[1], context.count - chosen.shape[1]), largest=False).indices
        scores = scores.scatter(1, fresh, head_start + 1.0 - near.gather(1, fresh))
        chosen, near = torch.cat([chosen, fresh], dim=1), torch.maximum(near, nearness(context.tokens, fresh))
    return torch.where(scores > 0, scores, 1.0 - near)


def nearness(tokens: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Greatest cosine similarity of every token [B, N, C] to one of the base [1 or B, k], [B, N], in memory that grows as N."""
    unit = F.normalize(tokens.float(), dim=-1)
    near = torch.full(tokens.shape[:2], -1.0, device=tokens.device)
    for part in base.expand(len(tokens), -1).split(at_once(CHUNK, tokens.device), dim=1):
        others = unit.gather(1, part[..., None].expand(-1, -1, unit.shape[-1]))
        near = torch.maximum(near, (unit @ others.transpose(1, 2)).amax(dim=-1))
    return near


def total_scores(
    scores: torch.Tensor,
    ages: torch.Tensor,
    age_weight: float,
    interval: int,
    spatial_bonus: float = 0.0,
    grid: tuple[int, int] = (1, 1),
    side: int = 1,
    text: int = 0,
) -> torch.Tensor:
    """What is ranked, [1 or B, N]: scores / their L2 norm over the tokens + age_weight * age / interval, then the bonus.

    The bonus raises the best score of every tile of the image by this share of itself; ragged tiles at the edges count too.

    Args:
        scores: [1 or B, N], larger is computed first; ages: [1 or B, N].
        grid: height and width of the image; side: of a tile; text: tokens in front of the image.
    """
    scores = scores.float() / scores.float().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    if age_weight:
        scores = scores + age_weight / interval * ages
    end = text + grid[0] * grid[1]
    if spatial_bonus and end <= scores.shape[1]:
        tiled = to_tiles(scores[:, text:end], grid, side, fill=-float("inf"))
        best = tiled.argmax(dim=-1, keepdim=True)
        top = tiled.gather(-1, best)
        raised = tiled.scatter(-1, best, top + spatial_bonus * top.abs())
        scores = torch.cat([scores[:, :text], from_tiles(raised, grid, side), scores[:, end:]], dim=1)
    return scores
