"""How and when: weights of the past against numpy and plain loops, rules against brute force, plans as a pure function."""

from __future__ import annotations

import math

import numpy
import pytest
import torch

import dit_accel
from dit_accel import OutputCacheConfig, Progress, how, when
from dit_accel.clock import Moment
from dit_accel.plan import Past, rule, step_plan
from dit_accel.when import Mode

TIMES = [0.93, 0.85, 0.61, 0.58, 0.3, 0.24]  # of full steps, oldest first, at unequal distances
VALUES = [math.sin(7 * t) + t**2 for t in TIMES]


def forecast(name, now, order, damping=1.0, last=6):
    """From the first `last` values."""
    weights = how.coefficients(name, TIMES[:last][::-1], now, order, damping)
    assert sum(weights) == pytest.approx(1) and len(weights) == min(order + 1, last)
    return sum(w * v for w, v in zip(weights, VALUES[:last][::-1], strict=False))


def derivatives(order, last):
    """Backward differences, kept up at every full step as TaylorSeer does (arXiv 2503.06923, section 3)."""
    before, kept = None, []
    for time, value in zip(TIMES[:last], VALUES[:last], strict=True):
        terms = [value]
        for old in kept[:order]:
            terms.append((terms[-1] - old) / (time - before))
        kept, before = terms, time
    return kept


def divided(order, last):
    """The same of each neighbouring pair with its own distance, from the values alone."""
    times, row, kept = TIMES[:last][::-1], VALUES[:last][::-1], []
    while row and len(kept) <= order:
        kept.append(row[0])
        row = [(a - b) / (times[i] - times[i + 1]) for i, (a, b) in enumerate(zip(row, row[1:], strict=False))]
    return kept


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("last", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("now", [0.2, 0.05, -0.3])
def test_polynomial_equals_numpys_fit(order, last, now):
    count = min(order + 1, last)
    fit = numpy.polyfit(TIMES[:last][-count:], VALUES[:last][-count:], count - 1)
    assert forecast("polynomial", now, order, last=last) == pytest.approx(numpy.polyval(fit, now), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("most", [1, 1000])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_logit_is_a_polynomial_in_the_logarithm_of_signal_over_noise(order, most):
    fit = numpy.polyfit([numpy.log(1 / t - 1) for t in TIMES[-order - 1 :]], VALUES[-order - 1 :], order)
    expected = numpy.polyval(fit, numpy.log(1 / 0.1 - 1))
    weights = how.coefficients("logit", [most * t for t in TIMES[::-1]], most * 0.1, order)
    assert sum(w * v for w, v in zip(weights, VALUES[::-1], strict=False)) == pytest.approx(expected, rel=1e-6)
    assert all(map(math.isfinite, how.coefficients("logit", [most, 0.9 * most], 0.0, order))), "at either end, too"


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize("last", [1, 2, 3, 4, 6])
def test_taylor_equals_differences_kept_up_at_every_full_step(order, last):
    for now in (0.2, 0.05, -0.3):
        ahead = now - TIMES[last - 1]
        terms = derivatives(min(order, last - 1), last)
        expected = sum(term * ahead**k / math.factorial(k) for k, term in enumerate(terms))
        assert forecast("taylor", now, order, last=last) == pytest.approx(expected, rel=1e-9)
    assert derivatives(3, last) == pytest.approx(divided(3, last), rel=1e-9), "two ways to say the same"


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_hermite_equals_numpys_polynomials(order):
    """HiCache (arXiv 2508.16984): H_k(scale * x) * scale^k, over steps of the last interval."""
    unit, now = TIMES[-1] - TIMES[-2], 0.1
    x, total = (now - TIMES[-1]) / unit, 0.0
    for k, term in enumerate(derivatives(order, len(TIMES))):
        total += term * unit**k / math.factorial(k) * 0.5**k * numpy.polynomial.hermite.hermval(0.5 * x, [0] * k + [1])
    assert forecast("hermite", now, order) == pytest.approx(total, rel=1e-9)


def test_evenly_spaced_taylor_of_order_one_is_the_line():
    assert forecast("taylor", 0.1, 1) == pytest.approx(forecast("polynomial", 0.1, 1), rel=1e-12)
    assert forecast("taylor", 0.1, 2) != pytest.approx(forecast("polynomial", 0.1, 2), rel=1e-3)


@pytest.mark.parametrize("name", ["reuse", "polynomial", "logit", "taylor", "hermite"])
def test_damping_lies_between_the_last_value_and_the_method(name):
    whole = forecast(name, 0.1, 2) if name != "reuse" else VALUES[-1]
    if name == "reuse":
        assert how.coefficients(name, TIMES[::-1], 0.1, 3, 0.3) == pytest.approx([1.0])
        return
    assert forecast(name, 0.1, 2, damping=1) == whole
    assert forecast(name, 0.1, 2, damping=0) == pytest.approx(VALUES[-1])
    assert forecast(name, 0.1, 2, damping=0.25) == pytest.approx(0.25 * whole + 0.75 * VALUES[-1])


def test_a_method_of_ones_own(monkeypatch):
    monkeypatch.setattr(how, "HOW", dict(how.HOW))
    seen = []

    @dit_accel.register_how("mean")
    def mean(times, now, order):
        seen.append((list(times), now, order))
        return [1 / len(times)] * len(times)

    assert how.coefficients("mean", TIMES[::-1], 0.1, 1) == [0.5, 0.5]
    assert seen == [([0.24, 0.3], 0.1, 1)]
    OutputCacheConfig(how="mean")
    with pytest.raises(
        ValueError, match=r"no method 'median'\. Did.* Known methods: reuse, polynomial, logit, taylor, hermite, mean\."
    ):
        OutputCacheConfig(how="median")


def longest(tolerance, most, progress):
    """By trying every interval: the last forecast of it is one step before its end."""
    good = 1
    for interval in range(2, most + 1):
        last = progress.step + interval - 1
        if last >= len(progress.times):
            break
        ahead = abs(progress.times[last] - progress.times[progress.step])
        errors = progress.error * (ahead / abs(progress.distance)) ** (progress.order + 1)
        if errors > tolerance:
            break
        good = interval
    return good


@pytest.mark.parametrize("most", [1, 2, 5, 30])
@pytest.mark.parametrize("order", [0, 1, 3])
def test_within_equals_brute_force(most, order):
    generator = numpy.random.default_rng(0)
    found = set()
    for _ in range(200):
        rising = generator.random() < 0.5
        times = tuple(float(t) for t in sorted(generator.random(20), reverse=not rising))
        step = int(generator.integers(1, 20))
        back = int(generator.integers(1, step + 1))
        error, tolerance = 10 ** generator.uniform(-3, 0), 10 ** generator.uniform(-3, 0)
        progress = Progress(step, 20, times, 3, error, times[step] - times[step - back], order)
        wait = when.within(tolerance, most)(progress)
        assert wait == longest(tolerance, most, progress)
        found.add(wait)
    assert len(found) >= min(most, 5)


def test_within_waits_one_step_where_nothing_is_known():
    assert when.within(0.1, 9)(Progress(0, 5, (5.0, 4.0, 3.0, 2.0, 1.0), 1)) == 1
    assert when.within(0.1, 9)(Progress(3, None, (), 2, 1e-9, -1.0, 1)) == 1
    assert when.within(0.1, 9)(Progress(1, 5, (5.0, 4.0, 3.0, 2.0, 1.0), 2, 0.0, -1.0, 1)) == 4, "to the end and no further"


def full_steps(config, steps=20):
    """By asking the rule as an engine does."""
    ask, full, number, next_full = rule(config), [], 0, 0
    for step in range(steps):
        if step >= next_full:
            number += 1
            full.append(step)
            next_full = step + ask(Progress(step, steps, tuple(map(float, range(steps, 0, -1))), number))
    return full


def test_rules_say_which_steps_are_full(monkeypatch):
    monkeypatch.setattr(when, "WHEN", dict(when.WHEN))
    assert full_steps(OutputCacheConfig(interval=3)) == [0, 3, 6, 9, 12, 15, 18]
    assert full_steps(OutputCacheConfig(interval=3, warmup_steps=4)) == [0, 1, 2, 3, 6, 9, 12, 15, 18]
    assert full_steps(OutputCacheConfig(full_steps=(0, 1, 2, 5, 9))) == [0, 1, 2, 5, 9]
    assert full_steps(OutputCacheConfig(full_steps=(2, 7))) == [0, 2, 7], "the first always is one"
    assert full_steps(OutputCacheConfig(full_steps=(2, 7), warmup_steps=5)) == [0, 1, 2, 3, 4, 7]

    @dit_accel.register_when("ends")
    def ends(progress):
        return 1 if progress.step < 3 or progress.step > progress.steps - 4 else 5

    for config in (OutputCacheConfig(when="ends"), OutputCacheConfig(when=ends)):
        assert full_steps(config) == [0, 1, 2, 3, 8, 13, 18, 19]
    with pytest.raises(ValueError, match=r"no rule 'never'\. Known rules: .*ends\."):
        OutputCacheConfig(when="never")
    assert full_steps(OutputCacheConfig(when=lambda progress: progress.number)) == [0, 1, 3, 6, 10, 15]


def moment(step, time, fresh=False):
    return Moment(False, fresh, 0, step, time, 20)


def test_a_plan_is_a_pure_function_of_options_moment_and_past():
    config = OutputCacheConfig(order=(0, 1, 2), damping=(1.0, 0.5), guidance_steps=2, guidance_order=1)
    past = Past([0.7, 0.8, 0.95], [0.8, 0.95], number=3, next_full=9)
    before = repr((config, past))
    plan = step_plan(config, moment(8, 0.6), past)
    assert plan == step_plan(config, moment(8, 0.6), past) and repr((config, past)) == before
    assert plan.mode is Mode.PARTIAL
    fit = how.coefficients("polynomial", [0.7, 0.8, 0.95], 0.6, 2)
    assert plan.weights == pytest.approx([0.5 * fit[0] + 0.5, *(0.5 * w for w in fit[1:])])
    assert plan.difference == pytest.approx(how.coefficients("polynomial", [0.8, 0.95], 0.6, 1))


@pytest.mark.parametrize(
    "step, fresh, guidance, number, past, full, both",
    [
        (8, False, None, 3, True, False, False),
        (9, False, None, 3, True, True, True),
        (12, False, None, 3, True, True, True),
        (8, True, None, 3, True, True, True),
        (8, False, None, 0, False, True, True),
        (9, False, 2, 3, True, True, False),
        (9, False, 2, 4, True, True, True),
        (9, False, 1, 3, True, True, True),
        (9, False, (0, 9), 3, True, True, True),
        (9, False, (0, 8), 3, True, True, False),
    ],
)
def test_what_a_plan_computes(step, fresh, guidance, number, past, full, both):
    """Everything when it is time to, when the branch is new, and when nothing is there to forecast from."""
    config = OutputCacheConfig(guidance_steps=guidance)
    memory = Past([0.7, 0.8], [0.8], number, 9) if past else Past()
    plan = step_plan(config, moment(step, 0.6, fresh), memory)
    assert plan.mode is (Mode.FULL if full else Mode.PARTIAL)
    assert bool(plan.weights) is not full and (bool(plan.difference) is not both)


def test_without_a_difference_to_follow_from_both_branches_are_computed():
    plan = step_plan(OutputCacheConfig(guidance_steps=(5,)), moment(0, 1.0), Past())
    assert plan.mode is Mode.FULL and plan.difference == ()


@pytest.mark.parametrize("numbers, expected", [((0, 1, 2), [0, 1, 2, 2, 2]), (1, [1, 1, 1, 1, 1]), ((2, 0), [2, 0, 0, 0, 0])])
def test_one_order_for_every_interval(numbers, expected):
    """The first is that of the interval after the first full step, and the last one goes on."""
    for number, order in enumerate(expected, start=1):
        past = Past(TIMES[::-1], [], number, 99)
        weights = step_plan(OutputCacheConfig(order=numbers), moment(8, 0.1), past).weights
        assert len(weights) == order + 1
        damped = step_plan(OutputCacheConfig(order=1, damping=tuple(0.5 * o for o in numbers) if numbers != 1 else 0.5),
                           moment(8, 0.1), past).weights  # fmt: skip
        assert damped[1] == pytest.approx(0.5 * order * how.coefficients("polynomial", past.times, 0.1, 1)[1])


def test_partial_plans_read_and_need_no_device():
    """Times are numbers of the host, so that weights are, too."""
    with torch.device("meta"):
        plan = step_plan(OutputCacheConfig(order=3), moment(8, 0.1), Past(TIMES[::-1], [], 4, 99))
    assert all(isinstance(weight, float) for weight in plan.weights)
