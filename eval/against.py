"""Every method of a run against any one of them, prompt by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches

import pandas as pd

from dit_accel.eval.page import NOTHING, Cell, Row, interval, number, p_value
from dit_accel.eval.statistics import compare, per_prompt


def check_methods(known: Sequence[str], methods: Sequence[str]) -> None:
    """ValueError for a method that the run does not have, with the one that was probably meant."""
    for method in methods:
        if method not in known:
            near = get_close_matches(method, known, 3, 0.3) or known
            raise ValueError(f"This run has no method {method!r}; did you mean {' or '.join(map(repr, near))}?")


def compared_with(rows: pd.DataFrame, spec: Row, table: pd.DataFrame, baseline: str, resamples: int) -> pd.DataFrame:
    """Paired differences over prompts of every method to `baseline`, in every score and in SSIM: one row each, with how many times
    faster than the baseline a method is."""
    found = []
    for pipeline, some_rows in rows.groupby("pipeline", sort=False):
        own = table[table["pipeline"] == pipeline].set_index("method")
        for value in [score for score in (*spec["scores"], "ssim") if score in some_rows]:
            values = per_prompt(some_rows, value)
            if baseline not in values:
                continue
            shared = values.notna().mul(values[baseline].notna(), axis=0).sum() > 1
            if shared.sum() < 2:
                continue
            some = compare(values.loc[:, shared], baseline, margin=spec["margin"], resamples=resamples).reset_index()
            faster = own.loc[some["method"], "speedup"].to_numpy() / own.loc[baseline, "speedup"]
            some = some.drop(columns="non_inferior").assign(pipeline=pipeline, against=baseline, value=value, times_as_fast=faster)
            found.append(some.assign(key=own.loc[some["method"], "key"].to_numpy()))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["pipeline", "against", "value", "key"])


def comparisons(table: pd.DataFrame) -> list[Row]:
    """Tables of methods against one of them, a pipeline each: `pipeline`, `against`, `values`, and `rows` with their cells."""
    found = []
    for (pipeline, baseline), some in table.groupby(["pipeline", "against"], sort=False):
        values = list(dict.fromkeys(some["value"]))
        rows = []
        for key, own in some.groupby("key", sort=False):
            by_value = {row["value"]: row for row in own.to_dict("records")}
            first = own.iloc[0]
            cells = [number(first["times_as_fast"], ".2f"), Cell(str(first["n"]), int(first["n"]))]
            for value in values:
                row = by_value.get(value)
                cells += [difference(row), p_value(row["p_holm"])] if row is not None else [Cell(NOTHING)] * 2
            rows.append({"key": key, "method": first["method"], "cells": cells})
        found.append({"pipeline": pipeline, "against": baseline, "values": values, "rows": rows})
    return found


def difference(row: Row) -> Cell:
    return interval(row["difference"], row["low"], row["high"], "+.3f")
