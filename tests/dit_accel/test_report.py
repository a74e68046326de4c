"""What a report shows in a terminal and in a notebook."""

from __future__ import annotations

import re

import pytest

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, TokenMergeConfig


@pytest.mark.parametrize(
    "config",
    [TokenCacheConfig(interval=3, cache_ratio=0.5), OutputCacheConfig(interval=3), TokenMergeConfig()],
    ids=["cache", "output", "merge"],
)
def test_a_notebook_shows_what_is_printed(tiny_flux, config):
    pipe = dit_accel.apply(tiny_flux(), config)
    assert str(dit_accel.report(pipe)) == "No run yet: call the pipeline first." in dit_accel.report(pipe)._repr_html_()
    pipe("a", height=64, width=48, num_inference_steps=5, max_sequence_length=8, output_type="latent")
    report = dit_accel.report(pipe)
    html, lines = report._repr_html_(), str(report).splitlines()
    rows = [re.findall("<td>(.*?)</td>", row) for row in re.findall("<tr>(.*?)</tr>", html)]
    assert [re.sub(" +", " ", " ".join(row)) for row in rows] == [re.sub(" +", " ", line).strip() for line in lines[:6]]
    assert re.findall("<p>(.*)</p>", html, flags=re.DOTALL) == ["\n".join(lines[6:])]
    frame = report.to_pandas()
    assert [row[1:3] for row in rows[1:]] == [[str(step), mode] for step, mode in zip(frame["step"], frame["mode"], strict=True)]
    assert [row[4] for row in rows[1:]] == [f"{flops / 1e9:.3f}" for flops in frame["flops"]]
    assert ("image tokens were merged" in html) == isinstance(config, TokenMergeConfig)
    assert f"{report.full_steps} full and {report.partial_steps} partial calls" in html
