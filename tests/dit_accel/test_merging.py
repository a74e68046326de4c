"""Matching, merging and unmerging against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_accel import merging


def brute_force(tokens, into, count):
    """For one picture: the set of groups, each a set of tokens, and the similarity of every merged source."""
    unit = [t / t.norm() for t in tokens.double()]
    best = {}
    for i in range(len(tokens)):
        if i not in into:
            best[i] = max((float(unit[i] @ unit[j]), j) for j in into)
    ranked = sorted(best, key=lambda i: -best[i][0])[:count]
    heads = {i: i for i in range(len(tokens)) if i not in ranked}
    heads.update({i: best[i][1] for i in ranked})
    return heads


@st.composite
def cases(draw):
    height, width = draw(st.integers(2, 9)), draw(st.integers(2, 9))
    stride = draw(st.integers(1, min(3, height))), draw(st.integers(1, min(3, width)))
    seed, batch = draw(st.integers(0, 2**31)), draw(st.integers(1, 3))
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, height * width, 5, generator=g)
    cells = (height // stride[0]) * (width // stride[1])
    noise = torch.rand(cells, generator=g) if draw(st.booleans()) else None
    into = merging.destinations((height, width), stride, noise)
    count = draw(st.integers(0, height * width - cells))
    return tokens, (height, width), stride, into, count


@settings(deadline=None)
@given(cases())
def test_matching_equals_the_brute_force(case):
    tokens, _, _, into, count = case
    matching = merging.match(tokens, into, count)
    assert matching.places.shape == (len(tokens), tokens.shape[1] - count)
    for b, picture in enumerate(tokens):
        heads = brute_force(picture, into.tolist(), count)
        places = matching.places[b].tolist()
        assert places == sorted(set(heads.values())), "order is kept"
        assert {i: places[g] for i, g in enumerate(matching.group[b].tolist())} == heads


@settings(deadline=None)
@given(cases())
def test_merging_takes_means_and_unmerging_gives_every_token_its_groups(case):
    tokens, _, _, into, count = case
    matching = merging.match(tokens, into, count)
    merged = merging.merge(tokens, matching)
    for b in range(len(tokens)):
        for m in range(merged.shape[1]):
            members = [i for i, g in enumerate(matching.group[b].tolist()) if g == m]
            assert matching.sizes[b, m] == len(members) > 0
            torch.testing.assert_close(merged[b, m], tokens[b, members].mean(dim=0))
    constant = merging.unmerge(torch.randn_like(merged), matching)  # alike within every group
    torch.testing.assert_close(merging.unmerge(merging.merge(constant, matching), matching), constant)
    if count == 0:
        assert torch.equal(merging.unmerge(merged, matching), tokens)


@settings(deadline=None)
@given(cases())
def test_a_picture_is_matched_as_if_it_were_alone(case):
    tokens, _, _, into, count = case
    together = merging.match(tokens, into, count)
    for b in range(len(tokens)):
        alone = merging.match(tokens[b : b + 1], into, count)
        assert torch.equal(alone.group[0], together.group[b]) and torch.equal(alone.places[0], together.places[b])


@settings(deadline=None)
@given(cases())
def test_every_whole_cell_has_one_destination(case):
    _, (height, width), (down, right), into, _ = case
    assert into.tolist() == sorted(into.tolist())
    cells = [(i // width // down, i % width // right) for i in into.tolist()]
    assert sorted(cells) == [(r, c) for r in range(height // down) for c in range(width // right)]


def test_destinations_by_hand():
    assert merging.destinations((4, 5), (2, 2)).tolist() == [0, 2, 10, 12]
    assert merging.destinations((4, 5), (2, 2), torch.tensor([0.0, 0.3, 0.6, 0.99])).tolist() == [0, 3, 15, 18]


def test_ratios_that_cannot_be():
    assert merging.merged_away(16, (4, 4), (2, 2), 0.75) == 12
    assert merging.merged_away(20, (4, 5), (2, 2), 0.8) == 16, "ragged edges are sources"
    with pytest.raises(ValueError, match=r"at most 0\.75"):
        merging.merged_away(16, (4, 4), (2, 2), 0.82)
    with pytest.raises(ValueError, match="merge"):
        merging.merged_away(16, (4, 4), (2, 2), -0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_half(dtype):
    tokens = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    matching = merging.match(tokens, merging.destinations((4, 4), (2, 2)), 8)
    merged = merging.merge(tokens, matching)
    assert merged.dtype is dtype and merging.unmerge(merged, matching).shape == tokens.shape
