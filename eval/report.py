"""`dit-accel-eval report`: one self-contained page, and its figures as PNG and CSV."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from PIL import Image

from dit_accel.eval import drawing, figures, page
from dit_accel.eval.against import compared_with, comparisons
from dit_accel.eval.folder import RunFolder, read_json, read_table
from dit_accel.eval.runs import with_flops
from dit_accel.eval.spec import FULL
from dit_accel.eval.statistics import per_prompt
from dit_accel.eval.summary import RESAMPLES, summarize
from dit_accel.pipelines.pictures import psnr_text, write_atomically

SIDE = 512  # pixels, of the embedded pictures
EXTREMES = 3  # worst and best pictures of a method
NUMBERS = (
    "score score_low score_high difference low high p p_holm non_inferior psnr psnr_low psnr_high ssim identical seconds "
    "seconds_low seconds_high speedup speedup_low speedup_high end_to_end_speedup flops_ratio peak_memory cache_bytes comparable "
    "matched matched_seconds matched_n matched_difference matched_low matched_high matched_p_holm"
).split()
PAIR = (("method", "picture"), ("uncached baseline", "picture_full"))
PLACE = ["pipeline", "method", "kind", "error"]
MADE = [*PLACE, "prompt", "seed", "picture", "steps", "flops", "full_flops", "squared_error", "psnr"]
TIMED = [
    *PLACE,
    "round",
    "comparable",
    "seconds",
    "denoising_seconds",
    "steps",
    "flops",
    "full_flops",
    "cache_bytes",
    "peak_memory",
]


@dataclass(frozen=True)
class Run:
    """The files of a run. `unfinished` says how far it is, or nothing."""

    folder: RunFolder
    spec: dict[str, Any]
    versions: dict[str, str]
    rows: pd.DataFrame
    times: pd.DataFrame
    unfinished: str


def read_run(folder: RunFolder) -> Run:
    """A run that is whole, or the rows of one that is not.

    Raises:
        FileNotFoundError: the folder is no run.
        ValueError: it has no pictures yet.
    """
    begun = folder.begun
    tables = [folder.read(folder.path / f"{name}.parquet", read_table) for name in ("results", "timing")]
    if all(table is not None for table in tables):
        rows, times = (complete(table, known) for table, known in zip(tables, (MADE, TIMED), strict=True))
        return Run(folder, begun["spec"], begun["versions"], rows, times, "")
    rows, times = (complete(folder.table(kind), known) for kind, known in (("rows", MADE), ("timing", TIMED)))
    if rows.empty:
        raise ValueError(f"{folder.path} has no pictures yet; go on with: dit-accel-eval run SPEC.yaml --output {folder.path}")
    done = f"This run is unfinished: {len(rows)} of {pictures_asked(folder)} pictures. What follows is preliminary."
    return Run(folder, begun["spec"], begun["versions"], with_flops(rows), with_flops(times), done)


def complete(table: pd.DataFrame, known: list[str]) -> pd.DataFrame:
    """A table with all columns: parquet files of rows that all failed lack what was not measured."""
    return table.reindex(columns=[*table, *(column for column in known if column not in table)])


def pictures_asked(folder: RunFolder) -> int:
    return len(folder.labels()) * len(folder.begun["spec"]["prompts"]) * int(folder.begun["spec"]["seeds"])


def write_report(folder: RunFolder, output: Path, resamples: int = RESAMPLES, against: Sequence[str] = ()) -> Path:
    """Write index.html and the figures as PNG and CSV; the path of the page.

    Args:
        folder: of the run.
        output: made if there is none; files of an earlier report are replaced.
        resamples: see `dit_accel.eval.summary.summarize`.
        against: methods to which all others are compared, too.

    Raises:
        FileNotFoundError, ValueError: see `read_run`.
    """
    run = read_run(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Prompts left out")  # the table counts what failed
        table = methods(run, resamples)
        drawings = {name: draw(run, part) for name, part in table.groupby("pipeline", sort=False)}
        compared = [compared_with(run.rows, run.spec, table, method, resamples) for method in against]
    pairs = extremes(run, table)
    files = {f"{one.name}.{kind}": one for some in drawings.values() for one, *_ in some for kind in ("png", "csv")}
    for file, one in files.items():
        write_atomically(output / file, one.png if file.endswith("png") else csv(one.table))
    write_atomically(output / "summary.csv", csv(table.drop(columns="key")))
    write_atomically(output / "pictures.csv", csv(pairs.drop(columns="key")))
    if compared:
        write_atomically(output / "against.csv", csv(pd.concat(compared).drop(columns="key")))
    write_atomically(output / "index.html", render(run, table, drawings, pairs, compared).encode())
    return output / "index.html"


def csv(table: pd.DataFrame) -> bytes:
    return table.to_csv(index=False).encode()


def methods(run: Run, resamples: int) -> pd.DataFrame:
    """The summary of the first score, with what the page adds: a `number` for every method of a pipeline, a `key`, the pictures
    that were `compared` with their uncached baselines, and the other scores."""
    scores, margin = run.spec["scores"], run.spec["margin"]
    table, *others = [
        summarize(run.rows, run.times, score=score, margin=margin, resamples=resamples, baselines=run.folder.baselines())
        for score in scores
    ]
    table = complete(table, NUMBERS)
    for i, other in enumerate(others, 1):
        for column in ("score", "score_low", "score_high", "difference", "low", "high"):
            table[f"{i}: {column}"] = other.get(column)
    numbers = table.groupby("pipeline", sort=False).cumcount()
    keys = [f"{run.spec['pipelines'].index(name)}-{n}" for name, n in zip(table["pipeline"], numbers, strict=True)]
    baselines = run.rows[run.rows["squared_error"].notna()].groupby(["pipeline", "method"]).size()
    compared = [baselines.get(name, 0) for name in zip(table["pipeline"], table["method"], strict=True)]
    comparable = table["comparable"].isna() | table["comparable"].eq(True)
    return table.assign(compared=compared, number=numbers, key=keys, comparable=comparable)


def draw(run: Run, part: pd.DataFrame) -> list[tuple[drawing.Drawing, str, str]]:
    """The figures of a pipeline, each with a title and a caption."""
    name, score, margin = part["pipeline"].iloc[0], run.spec["scores"][0], run.spec["margin"]
    number = run.spec["pipelines"].index(name)
    rows = run.rows[run.rows["pipeline"] == name]
    full = part[part["kind"] == "full"]
    own = "" if full.empty else page.interval(*full.iloc[0][["score", "score_low", "score_high"]], ".3f")
    named = "" if len(part) <= drawing.NAMED else " The numbers are those of the table."
    with drawing.style():
        found = [
            (
                figures.quality_latency(f"quality-latency-{number:02}", part, margin, score),
                "Quality against measured seconds",
                "Up and left is better. Vertical bars: 95 % interval of the paired difference to full, drawn around the score; "
                "horizontal bars: quartiles over rounds. Solid line: the uncached score"
                + (f", {own.text} {own.note} over prompts" if own and own.order != "" else "")
                + f"; dashed: less the margin of {margin:g}. Gray steps: the Pareto front of all methods.{named}",
            ),
            (
                figures.latency_flops(f"latency-flops-{number:02}", part),
                "Latency ratio against FLOPs ratio",
                "How many times faster a method was measured to be, against how many times less arithmetic it does. On the dashed "
                f"line time falls as much as arithmetic; below it, less. Bars: quartiles over rounds.{named}",
            ),
            (
                figures.differences(f"differences-{number:02}", part, paired(rows, score), margin, score),
                "Differences prompt by prompt",
                f"Each dot is a prompt, mean of its {page.count(run.spec['seeds'], 'seed')}; black: the mean and its 95 % "
                f"interval. Dashed: minus the margin of {margin:g}. Above {figures.DOTS} prompts the outline of the distribution.",
            ),
            (
                figures.selection_maps(f"selection-maps-{number:02}", part, maps(run, name)),
                "Selection maps",
                "How often each place was computed between full steps, in the same colors for all methods. Uniformity is 1 where "
                "every region gets equally many tokens, 0 where one gets all; coverage is the share of tokens "
                f"computed at least once between two full steps.{named}",
            ),
        ]
    more = " Arrowheads: the interval goes on beyond the axis."
    return [(one, title, caption + more * ('data-part="cut"' in one.svg)) for one, title, caption in found if one]


def paired(rows: pd.DataFrame, score: str) -> pd.DataFrame:
    """Differences to full, [prompts, methods], without full and the no-op cache."""
    if score not in rows or FULL not in set(rows["method"]):
        return pd.DataFrame()
    table = per_prompt(rows, score)
    plain = rows.loc[rows["kind"].isin(["full", "no-op"]), "method"].unique()
    return table.sub(table[FULL], axis=0).drop(columns=plain)


def maps(run: Run, pipeline: str) -> list[dict[str, Any]]:
    """The selection maps of a pipeline, as the run has recorded them."""
    return [one for one in run.folder.maps() if one["pipeline"] == pipeline]


def extremes(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """The pictures of every method that lose most and gain most against their uncached baselines: `place` is worst or best."""
    score, rows = run.spec["scores"][0], run.rows
    keep = ["pipeline", "method", "prompt", "seed", "score", "picture", "psnr"]
    made = rows[rows["error"].isna()].assign(score=rows[score] if score in rows else float("nan"))[keep]
    baselines = made[made["method"] == FULL].drop(columns=["method", "psnr"])
    both = made.merge(baselines, on=["pipeline", "prompt", "seed"], suffixes=("", "_full"))
    both = both.assign(difference=both["score"] - both["score_full"]).dropna(subset="difference")
    both = both.sort_values(["difference", "prompt", "seed"], kind="stable")
    parts = []
    for row in table.itertuples():
        if row.kind == "full" or row.identical == 1:
            continue
        some = both[(both["pipeline"] == row.pipeline) & (both["method"] == row.method)]
        best = min(EXTREMES, len(some) // 2)
        worst = min(EXTREMES, len(some) - best)
        parts.append(some.head(worst).assign(place="worst", key=row.key))
        parts.append(some.tail(best).iloc[::-1].assign(place="best", key=row.key))
    return pd.concat(parts, ignore_index=True) if parts else both.assign(place="", key="")


def embedded(path: Path) -> str:
    """A picture of at most SIDE pixels a side, as a data URI; nothing if the file is gone."""
    if not path.is_file():
        return ""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        small.save(buffer, "WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def render(
    run: Run, table: pd.DataFrame, drawings: dict[str, list[Any]], pairs: pd.DataFrame, compared: Sequence[pd.DataFrame] = ()
) -> str:
    """The page."""
    spec = run.spec
    records = table.to_dict("records")
    columns = page.columns(tuple(spec["scores"]), len(spec["pipelines"]))
    source = lru_cache(maxsize=None)(embedded)  # a baseline is shown beside several methods
    shown = {
        row["key"]: [
            (
                title,
                [
                    pair_of(run.folder, pair, source)
                    for pair in pairs[(pairs["key"] == row["key"]) & (pairs["place"] == place)].to_dict("records")
                ],
            )
            for place, title in (("worst", "Lowest differences"), ("best", "Highest differences"))
        ]
        for row in records
    }
    cut = run.folder.read(run.folder.path / "cut.json", read_json) or {}
    sessions = run.folder.sessions()
    facts = page.protocol(spec, run.folder.begun["resolved"], table, run.rows, run.times, cut)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        name=run.folder.path.resolve().name,
        spec=spec,
        counts={kind: int((table["kind"] == kind).sum()) for kind in ("method", "fewer steps")},
        findings=page.findings(table, spec["margin"]),
        doubts=page.doubts(table, run.unfinished, [str(path) for path in run.folder.unreadable], machines(run, sessions)),
        columns=columns,
        rows=[(row, [(column, column.cell(row)) for column in columns]) for row in records],
        kinds=list(dict.fromkeys(table["kind"])),
        pipelines=[(spec["pipelines"].index(name), name, some) for name, some in drawings.items()],
        pairs=shown,
        compared=[one for some in compared for one in comparisons(some)],
        failures=page.failures(run.rows, run.times),
        protocol=facts,
        baselines=run.folder.baselines(),
        sessions=sessions,
        versions=run.versions,
        yaml=yaml.safe_dump(spec, sort_keys=False, allow_unicode=True, width=100),
    )


def machines(run: Run, sessions: list[dict[str, Any]]) -> list[str]:
    """The hardware on which seconds were taken."""
    taken = set(run.times["session"].dropna().astype(int)) if "session" in run.times else set()
    return sorted({str(one.get("hardware")) for number, one in enumerate(sessions) if number in taken})


def pair_of(folder: RunFolder, pair: dict[str, Any], source: Callable[[Path], str]) -> dict[str, Any]:
    """A picture beside its uncached baseline, for the page."""
    likeness = "PSNR unknown" if pd.isna(pair["psnr"]) else psnr_text(pair["psnr"])
    return pair | {
        "sources": [(label, source(folder.path / pair[file])) for label, file in PAIR],
        "difference": page.signed(pair["difference"], "+.3f"),
        "scores": " against ".join(page.signed(pair[name], ".3f") for name in ("score", "score_full")),
        "likeness": f"PSNR {likeness}" if likeness.endswith("dB") else likeness,
    }
