"""What the last run computed, step by step."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from dit_accel.apply import transformers_of
from dit_accel.plan import Record
from dit_accel.recipe import Recipe
from dit_accel.when import Mode

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True)
class Selection:
    """The tokens that one layer computed on one partial step.

    Attributes:
        call: index into the report's calls.
        stream, layer: which computation; see `dit_accel.SelectionContext`.
        tokens: indices [1 or B, k]; one row serves the whole batch. In the joint sequence, text comes first.
    """

    call: int
    stream: str
    layer: int
    tokens: torch.Tensor


@dataclass(frozen=True)
class Report:
    """The calls of one run.

    Attributes:
        calls: every call of the transformer, in order; of two transformers, one's after the other's.
        grid: height and width of the picture in tokens.
        selections: which tokens were computed, if `apply` was asked to record them.
        recipe: that ran, if one did.
    """

    calls: tuple[Record, ...]
    grid: tuple[int, int]
    selections: tuple[Selection, ...]
    recipe: Recipe | None
    _counters: tuple[Any, ...]  # one for each transformer

    @property
    def full_steps(self) -> int:
        return sum(call.mode is Mode.FULL for call in self.calls)

    @property
    def partial_steps(self) -> int:
        return sum(call.mode is Mode.PARTIAL for call in self.calls)

    @property
    def tokens_share(self) -> float:
        """Share of tokens that the token-wise computations of partial steps worked on; 1 if there were no partial steps."""
        total = sum(call.tokens for call in self.calls)
        return sum(call.tokens_computed for call in self.calls) / total if total else float(not self.partial_steps)

    @property
    def tokens_merged(self) -> int:
        """Image tokens that were merged into others in every merging layer, on steps that merged."""
        return max((call.merged for call in self.calls), default=0)

    @property
    def cache_bytes(self) -> int:
        """The most that the cache held."""
        return max((call.cache_bytes for call in self.calls), default=0)

    @functools.cached_property
    def flops(self) -> tuple[int, ...]:
        """FLOPs of every call: 2 for every multiply-add of matrix products, convolutions and attention, selection included.

        Counted by replaying the calls on a weightless copy, which takes seconds for a large model; adapters are not counted.
        """
        return tuple(self._counters[call.transformer].call(call) for call in self.calls)

    @functools.cached_property
    def full_flops(self) -> int:
        """FLOPs of as many calls with everything computed; of as many more as the pipeline was asked for more steps."""
        total, engine = sum(self._counters[call.transformer].plain(call) for call in self.calls), self._counters[0].engine
        return int(total * engine.run.asked / engine.config.run_steps) if engine.run.asked else total

    @property
    def flops_ratio(self) -> float:
        """Full over executed. Not a speed-up: see benchmarks/ for seconds."""
        return self.full_flops / sum(self.flops) if self.calls else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Everything but the selections, as plain numbers."""
        names = ("full_steps", "partial_steps", "tokens_share", "tokens_merged", "cache_bytes", "full_flops")
        return {name: getattr(self, name) for name in names} | {"flops": sum(self.flops), "calls": self._rows()}

    def to_pandas(self) -> pandas.DataFrame:
        """One row a call."""
        import pandas

        return pandas.DataFrame(self._rows())

    def _rows(self) -> list[dict[str, Any]]:
        names = ("transformer", "branch", "step", "tokens_computed", "tokens", "cache_bytes")
        return [
            {name: getattr(call, name) for name in names} | {"mode": call.mode.value, "tokens_merged": call.merged, "flops": flops}
            for call, flops in zip(self.calls, self.flops, strict=True)
        ]

    def _table(self) -> list[tuple[str, ...]]:
        """Texts of the table that is printed, heading first; none before the first run."""
        if not self.calls:
            return []
        table: list[tuple[str, ...]] = [("branch", "step", "mode", "tokens computed", "GFLOPs", "cache MiB")]
        for call, flops in zip(self.calls, self.flops, strict=True):
            tokens = f"{call.tokens_computed} of {call.tokens}" if call.tokens else "none" if call.mode is Mode.PARTIAL else "all"
            tokens = f"{call.rows:.0%} of the batch" if call.mode is Mode.FULL and call.rows < 1 else tokens
            tokens += f", {call.merged} merged" if call.merged else ""
            size, work = f"{call.cache_bytes / 2**20:.1f}", f"{flops / 1e9:.3f}"
            table.append((str(call.branch), str(call.step), call.mode.value, tokens, work, size))
        return table

    def _summary(self) -> str:
        if not self.calls:
            return "No run yet: call the pipeline first."
        height, width = self.grid
        made = f"By the {self.recipe}.\n" if self.recipe is not None else ""
        merged = f"Up to {self.tokens_merged} of {height * width} image tokens were merged into others in every layer.\n"
        return f"{made}{merged if self.tokens_merged else ''}" + (
            f"{self.full_steps} full and {self.partial_steps} partial calls; a partial call computed {self.tokens_share:.1%} of "
            f"its tokens; {self.flops_ratio:.2f} times fewer FLOPs; the cache held up to {self.cache_bytes / 2**20:.1f} MiB."
        )

    def __str__(self) -> str:
        row = "{:>6}  {:>4}  {:8}  {:>17}  {:>9}  {:>9}".format
        return "\n".join([*(row(*cells) for cells in self._table()), self._summary()])

    def _repr_html_(self) -> str:
        """What is printed, as a table for notebooks."""
        rows = "".join(f"<tr><td>{'</td><td>'.join(cells)}</td></tr>" for cells in self._table())
        return f"<table>{rows}</table><p>{self._summary()}</p>"


def report(model: Any) -> Report:
    """What the last run of a pipeline or transformer computed; it stays until the next run begins.

    Raises:
        RuntimeError: if nothing is applied to the model.
    """
    from dit_accel.flops import FlopCounter  # which loads what diffusers takes a second for

    engines = [engine for transformer in transformers_of(model) if (engine := vars(transformer).get("_dit_accel"))]
    if not engines:
        raise RuntimeError("Nothing is applied to this model; call dit_accel.apply first.")
    calls = tuple(replace(call, transformer=i) for i, engine in enumerate(engines) for call in engine.calls)
    made = tuple(Selection(*selection) for selection in engines[0].selections)
    return Report(calls, engines[0].run.grid, made, engines[0].recipe, tuple(map(FlopCounter, engines)))
