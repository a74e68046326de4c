"""The words and cells of a report's page: what stands in the table, what was found, how it was measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from dit_accel.eval.statistics import FEWEST, MANY
from dit_accel.eval.summary import broken, non_inferior_text, verdict

NOTHING = "–"
Row = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Text, and what the row is sorted by: a number, or nothing where there is none."""

    text: str
    order: float | str = ""
    note: str = ""


@dataclass(frozen=True)
class Column:
    heading: str
    help: str
    cell: Callable[[Row], Cell]
    kind: str = "number"


def columns(scores: tuple[str, ...], pipelines: int) -> list[Column]:
    """Of the main table. What the scores besides the first say comes last."""
    found = [
        Column("#", "number of the method in the figures", lambda r: Cell(str(r["number"]), r["number"])),
        Column("method", "", lambda r: Cell(r["method"], r["method"].lower()), "name"),
    ]
    if pipelines > 1:
        found.append(Column("pipeline", "", lambda r: Cell(r["pipeline"], r["pipeline"]), "text"))
    found += [
        Column("pictures", "made, and how many failed", pictures),
        *quality(scores[0], "score"),
        Column("p (Holm)", "sign-flip test, adjusted for the number of methods", lambda r: p_value(r["p_holm"])),
        Column("non-inferior", "whether the whole interval of the difference lies above minus the margin", non_inferior, "text"),
        Column(
            "against fewer steps",
            "difference to the run with fewer steps that takes the method's seconds, paired over prompts, with 95 % interval",
            against,
        ),
        Column("verdict", "whether the method beats fewer steps at its seconds", lambda r: Cell(verdict(r) or NOTHING), "text"),
        Column("PSNR, dB", "to the uncached baseline, of the mean squared error", psnr),
        Column("SSIM", "to the uncached baseline", lambda r: number(r["ssim"], ".3f")),
        Column("identical", "share of pictures bit-identical to the uncached baseline", lambda r: number(r["identical"], ".0%")),
        Column("seconds", "of denoising a picture: median over rounds, and its quartiles", denoising),
        Column("speed-up, measured", "seconds of denoising, full over method: median over rounds, and quartiles", speedup),
        Column("speed-up end to end", "with text encoders and decoder", lambda r: number(r["end_to_end_speedup"], ".2f")),
        Column("FLOPs ratio", "full over method, counted; this is no speed-up", lambda r: number(r["flops_ratio"], ".2f")),
        Column("peak memory, MiB", "of the device; not measured on a CPU", lambda r: mebibytes(r["peak_memory"])),
        Column("cache, MiB", "features kept between steps", lambda r: mebibytes(r["cache_bytes"])),
    ]
    if len(scores) > 1:
        about = "scores that are lower than full's, the whole interval of the difference below 0; the surest first"
        found.append(Column("breaks", about, lambda r: Cell(", ".join(broken(r, scores)) or NOTHING), "text"))
    for i, score in enumerate(scores[1:], 1):
        found += quality(score, f"score {i}", f"{i}: ")
    return found


def quality(score: str, heading: str, prefix: str = "") -> list[Column]:
    """Mean and difference to full of one score; `prefix` of its columns in a row."""
    mean, difference = (
        lambda r: interval(r[f"{prefix}score"], r[f"{prefix}score_low"], r[f"{prefix}score_high"], ".3f"),
        lambda r: interval(r[f"{prefix}difference"], r[f"{prefix}low"], r[f"{prefix}high"], "+.3f"),
    )
    name = heading if heading == "score" else score
    return [
        Column(name, f"mean of {score} over prompts, and its 95 % interval", mean),
        Column(
            "difference to full" if heading == "score" else f"{score}: difference",
            "paired over prompts, with 95 % interval",
            difference,
        ),
    ]


def number(value: Any, form: str) -> Cell:
    return Cell(signed(value, form), float(value)) if pd.notna(value) else Cell(NOTHING)


def interval(value: Any, low: Any, high: Any, form: str) -> Cell:
    if pd.isna(value):
        return Cell(NOTHING)
    return Cell(signed(value, form), float(value), f"[{signed(low, form)}, {signed(high, form)}]" if pd.notna(low) else "")


def signed(value: float, form: str) -> str:
    return format(value, form).replace("-", "−")


def pictures(row: Row) -> Cell:
    return Cell(str(row["pictures"]), float(row["pictures"]), f"{row['failed']} failed" if row["failed"] else "")


def p_value(value: Any) -> Cell:
    return Cell("<0.001", float(value)) if pd.notna(value) and value < 0.001 else number(value, ".3f")


def non_inferior(row: Row) -> Cell:
    text = non_inferior_text(row)
    return Cell(text or NOTHING, float(row["non_inferior"]) if text in ("yes", "no") else "")


def against(row: Row) -> Cell:
    found = interval(row["matched_difference"], row["matched_low"], row["matched_high"], "+.3f")
    return Cell(found.text, found.order, f"{found.note} {row['matched']}") if found.note else found


def psnr(row: Row) -> Cell:
    if pd.isna(row["psnr"]):
        return Cell(NOTHING)
    if math.isinf(row["psnr"]):
        return Cell("identical", "Infinity")
    return Cell(f"{row['psnr']:.1f}", float(row["psnr"]), f"[{row['psnr_low']:.1f}, {row['psnr_high']:.1f}]".replace("inf", "∞"))


def denoising(row: Row) -> Cell:
    digits = ".3f" if row["seconds"] < 10 else ".1f"
    return interval(row["seconds"], row["seconds_low"], row["seconds_high"], digits)


def speedup(row: Row) -> Cell:
    found = interval(row["speedup"], row["speedup_low"], row["speedup_high"], ".2f")
    if row["kind"] == "full":
        return Cell(found.text, found.order)
    return Cell(found.text, found.order, f"{found.note} shared device") if not row["comparable"] else found


def mebibytes(value: Any) -> Cell:
    return number(value / 2**20 if pd.notna(value) else value, ".1f")


def findings(table: pd.DataFrame, margin: float) -> list[str]:
    """One sentence or two for every pipeline: how many methods are non-inferior, and which of them is fastest."""
    sentences = []
    for name, part in table.groupby("pipeline", sort=False):
        tested = part[part["non_inferior"].notna()]
        if tested.empty and part["difference"].notna().any():
            sentences.append(f"{name}: too few prompts for a verdict; at least {FEWEST} are needed.")
            continue
        methods, fewer = (tested[tested["kind"] == kind] for kind in ("method", "fewer steps"))
        if methods.empty:
            sentences.append(f"{name}: no method can be compared with full yet.")
            continue
        good = methods[methods["non_inferior"].astype(bool)]
        text = f"{name}: {len(good)} of {count(len(methods), 'method')} {'is' if len(good) == 1 else 'are'} "
        text += f"non-inferior to full at the margin of {margin:g}."
        if good["speedup"].notna().any():
            text += f" The fastest of them: {fastest(good)}."
        baseline = fewer[fewer["non_inferior"].astype(bool) & fewer["speedup"].notna()]
        if len(compared := methods[methods["matched_difference"].notna()]):
            better = [row["method"] for row in compared.to_dict("records") if verdict(row).startswith("better")]
            text += f" {len(better)} of {len(compared)} {'does' if len(better) == 1 else 'do'} better than fewer steps at the "
            text += f"same seconds: {', '.join(better)}." if better else "same seconds."
        if len(baseline):
            text += f" The fastest plain run with fewer steps that is non-inferior: {fastest(baseline)}."
        sentences.append(text)
    return sentences


def fastest(part: pd.DataFrame) -> str:
    row = part.loc[part["speedup"].idxmax()].to_dict()
    gain, loss = speedup(row), interval(row["difference"], row["low"], row["high"], "+.3f")
    speed, quality = f"{gain.text}, quartiles {gain.note}", f"{loss.text}, 95 % interval {loss.note}"
    return f"{row['method']} (#{row['number']}), measured speed-up {speed}, difference {quality}"


def count(amount: int, thing: str) -> str:
    return f"{amount} {thing}{'' if amount == 1 else 's'}"


def doubts(table: pd.DataFrame, unfinished: str, unreadable: Sequence[str] = (), machines: Sequence[str] = ()) -> list[str]:
    """Caveats of the table.

    Args:
        unfinished: how far the run is, or nothing.
        unreadable: files of the run that could not be read.
        machines: hardware on which seconds were taken.
    """
    found = [unfinished] if unfinished else []
    if unreadable:
        found.append(f"Could not be read and counts as missing: {', '.join(unreadable)}. The same command makes it again.")
    if len(machines) > 1:
        found.append(f"Seconds were taken on different hardware: {', '.join(machines)}. Rely on speed-ups, measured within rounds.")
    noop = table[(table["kind"] == "no-op") & (table["identical"] < 1)]
    for row in noop.itertuples():
        found.append(
            f"{row.pipeline}: the no-op cache is not bit-identical to full: {same(row)} pictures are. "
            "A cache that caches nothing must change nothing: differences of the other methods may come from the machinery."
        )
    shared = table[~table["comparable"]]
    if len(shared):
        found.append(
            f"Processes shared a device while {count(len(shared), 'method')} {'was' if len(shared) == 1 else 'were'} timed; "
            "their seconds and speed-ups cannot be compared. They are marked in the table and drawn hollow."
        )
    failed = table[table["failed"] > 0]
    if len(failed):
        found.append(f"{count(int(failed['failed'].sum()), 'picture')} of {count(len(failed), 'method')} failed; see Failures.")
    return found


def same(row: Any) -> str:
    """How many pictures equal their uncached baselines."""
    return f"{round(row.identical * row.compared)} of {row.compared}"


def untouched(table: pd.DataFrame) -> str:
    """What the cache that caches nothing has shown."""
    noop = table[table["kind"] == "no-op"]
    states = []
    for row in noop.itertuples():
        some = "not compared yet" if pd.isna(row.identical) else f"{same(row)} pictures are bit-identical to full"
        states.append(
            f"{row.pipeline}: {'bit-identical to full in all ' + count(row.compared, 'picture') if row.identical == 1 else some}"
        )
    return "; ".join(states) or "not made yet"


def protocol(
    spec: Row, resolved: dict[str, str], table: pd.DataFrame, rows: pd.DataFrame, times: pd.DataFrame, cut: dict[str, int]
) -> list[tuple[str, str]]:
    """How it was measured, as terms and sentences."""
    full = rows[(rows["kind"] == "full") & rows["error"].isna()]
    steps = [
        f"{name}: {', '.join(f'{n:g}' for n in some.unique())}" for name, some in full.groupby("pipeline", sort=False)["steps"]
    ]
    rounds = times.groupby("pipeline", sort=False)["round"].nunique() if len(times) else pd.Series(dtype=int)
    size = f"{spec['width']} x {spec['height']}" if spec["width"] and spec["height"] else "each pipeline's own"
    fewest = len(spec["prompts"])
    least = 2.0 ** (1 - fewest)
    return [
        ("Prompts", f"{count(fewest, 'prompt')}, each with {count(spec['seeds'], 'seed')}"),
        ("Initial noise", "from prompt and seed only: the same for every method, batch and process"),
        ("Denoising steps, uncached", "; ".join(steps) or "unknown yet"),
        ("Guidance", "each pipeline's own" if spec["guidance"] is None else f"{spec['guidance']:g}"),
        ("Size", size),
        ("Batch size", f"{spec['batch_size']}; {spec['timing_batch_size']} where time is measured"),
        ("Numbers and device", f"dtype {resolved['dtype']}, device {resolved['device']}, offload {spec['offload']}"),
        (
            "Seconds",
            "; ".join(f"{name}: {n} of {count(spec['timing_rounds'], 'round')}" for name, n in rounds.items())
            or "not measured yet",
        ),
        (
            "How seconds are taken",
            "after a warm-up, all methods in turn, in another order every round; the median over rounds, quartiles in brackets. "
            "Speed-up: uncached seconds over those of the method in the same round.",
        ),
        ("FLOPs ratio", "uncached FLOPs over the method's, counted from the steps that were executed. It is not a speed-up."),
        ("Scores", ", ".join(spec["scores"]) + ("; the first decides" if len(spec["scores"]) > 1 else "")),
        ("Prompts cut by the score", ", ".join(f"{name}: {n} of {fewest}" for name, n in cut.items()) or "unknown"),
        ("Margin of non-inferiority", f"{spec['margin']:g}, declared in the specification before the run"),
        ("No-op cache", untouched(table)),
        (
            "Statistics",
            f"seeds are averaged for every prompt; 95 % intervals over prompts are BCa bootstrap intervals from {MANY} prompts on, "
            "with fewer the wider of Student's t and the bootstrap-t; p is that of a "
            "two-sided sign-flip permutation test of the paired differences, adjusted by Holm's method over all methods but the "
            "no-op cache. "
            "Non-inferior: the interval of the difference lies above minus the margin as a whole; "
            f"below {FEWEST} prompts there is no verdict. "
            "Against fewer steps: the same, to the run with fewer steps that takes the method's seconds; better or worse where "
            "Holm's p is at most 0.05."
            + (f" With {fewest} prompts no unadjusted p can be below {least:.2g}." if least > 0.01 else ""),
        ),
        ("PSNR", "of the mean squared error over pictures; identical pictures are counted, not dropped"),
    ]


def failures(rows: pd.DataFrame, times: pd.DataFrame) -> list[Row]:
    """Every message once for each method: where, how often, and the first prompt."""
    found = []
    for what, table in (("pictures", rows), ("time", times)):
        bad = table[table["error"].notna()]
        for (pipeline, method, error), some in bad.groupby(["pipeline", "method", "error"], sort=False):
            first = some.iloc[0]
            where = (
                f"first with prompt {first['prompt']!r}, seed {first['seed']}" if what == "pictures" else f"round {first['round']}"
            )
            unit = "picture" if what == "pictures" else "timing round"
            found.append(dict(pipeline=pipeline, method=method, error=error, count=count(len(some), unit), where=where))
    return found
