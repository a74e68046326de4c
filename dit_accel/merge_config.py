"""The settings of token merging."""

from __future__ import annotations

from dataclasses import dataclass

from dit_accel.options import Options, option


@dataclass(frozen=True)
class TokenMergeConfig(Options):
    """Token merging (ToMe-SD: Bolya and Hoffman, CVPRW 2023, arXiv 2303.17604) of image tokens.

    *When*: warmup_steps, rematch_every. *Which* tokens: ratio, stride, randomize, seed. *How*, and in which modules: the rest.

    Raises:
        TypeError: for an option that does not exist, with the one that was probably meant.
        ValueError: for a value out of range, with what is valid.
    """

    ratio: float = option(
        0.5,
        "Share of the image tokens merged into others, at most 1 - 1 / (width x height of the stride).",
        0,
        flag="merge_ratio",
    )
    stride: tuple[int, int] = option(
        (2, 2), "Width and height in tokens of the cells that keep one token each.", 1, flag="merge_stride"
    )
    randomize: bool = option(True, "Merge into a random token of each cell rather than its top-left one.", flag="merge_randomize")
    merge_attention: bool = option(True, "Self-attention (the joint attention of FLUX) works on merged tokens.")
    merge_cross_attention: bool = option(False, "Cross-attention to the text works on merged tokens (PixArt).")
    merge_mlp: bool = option(
        False, "The feed-forward works on merged tokens (in FLUX's single blocks, with the output projection)."
    )
    rematch_every: int | tuple[int, int] = option((2, 1), "Steps, and layers, that share one matching; one number sets both.", 1)
    warmup_steps: int = option(0, "Steps at the start on which nothing is merged.", 0, flag="merge_warmup_steps")
    keep_queries: bool = option(
        False,
        "Merge keys and values only, so that every token keeps its own query: half of the saving in attention's projections, all "
        "of it in the products.",
        flag="merge_keys_only",
    )
    proportional_attention: bool = option(
        False,
        "Weight merged tokens by group size: the logarithm of the size is added to attention scores. Needs an attention mask, "
        "which flash and sage attention do not take.",
        flag="merge_proportional",
    )
    seed: int = option(0, "Random seed for merging; the initial noise has its own.", 0, flag="merge_seed")

    def __post_init__(self) -> None:
        super().__post_init__()
        most = 1 - 1 / (self.stride[0] * self.stride[1])
        if self.ratio > most:
            raise ValueError(
                f"ratio is the share of image tokens merged into others, with a stride of {self.stride} between 0 and {most:g}, "
                f"not {self.ratio!r}; a larger stride allows more."
            )
        if not (self.merge_attention or self.merge_cross_attention or self.merge_mlp):
            raise ValueError("Nothing would be merged; leave at least one of merge_attention, merge_cross_attention, merge_mlp on.")
        if not self.merge_attention and (self.keep_queries or self.proportional_attention):
            raise ValueError("keep_queries and proportional_attention are about merged attention; leave merge_attention on.")

    @property
    def rematching(self) -> tuple[int, int]:
        """Steps, and layers, that share one matching."""
        every = self.rematch_every
        return every if isinstance(every, (tuple, list)) else (every, every)
