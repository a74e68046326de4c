"""The forecast of the output through diffusers' own pipelines, against plain loops that fit with numpy."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import threading
import warnings
from types import SimpleNamespace

import diffusers
import numpy
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dit_accel
from dit_accel import OutputCacheConfig, TokenCacheConfig, hook, store
from tests.dit_accel.tiny_pipelines import pipelines

PIPELINES = dict(pipelines())
IMAGES = ["flux", "flux-true-guidance", "qwen", "chroma", "sd3", "pixart", "z-image", "lumina2"]
KINDS = [*IMAGES, "wan", "wan2.2", "ltx", "cogvideox", "mochi", "dit"]
TWO_CALLS, ONE_BATCH = ["flux-true-guidance", "qwen", "wan"], ["pixart", "sd3", "ltx"]
STEPS = 7


def made(name):
    build, call = PIPELINES[name]
    pipe = build()
    return pipe, lambda **more: call(pipe, **{"steps": STEPS, **more})


class Reference:
    """Stands in for a transformer's forward: counts its calls, keeps what stock returns, and fits polynomials with numpy.

    Args:
        full: numbers of the full steps; guided: of those whose unconditional output is computed, None for all.
        orders, dampings: of every interval.
        batched: whether both halves of guidance share the batch, the unconditional one first.
        branches: calls on every step, the conditional one first.
    """

    def __init__(self, model, full, orders=(1,), dampings=(1.0,), guided=None, guidance_order=0, batched=False, branches=1):
        self.stock, self.full, self.orders, self.dampings = model.forward, full, orders, dampings
        self.guided, self.guidance_order, self.batched, self.branches = guided, guidance_order, batched, branches
        self.outputs, self.differences, self.calls, self.number, self.computed = {}, [], 0, 0, 0
        model.forward = self

    def __call__(self, *args, **kwargs):
        step, branch = divmod(self.calls, self.branches)
        self.calls += 1
        time = float(torch.as_tensor(kwargs["timestep"]).double().reshape(-1)[-1])
        follows = self.guided is not None and branch == 1
        if follows and step not in self.guided:
            return self.like(self.last - fit(self.differences, time, self.guidance_order))
        halved = self.guided is not None and self.batched
        if step in self.full:
            self.nest = self.stock(*args, **kwargs)
            output = self.nest[0].double().numpy()
            if follows:
                self.differences.append((time, self.last - output))
                return self.nest
            if branch == 0:
                self.number += 1
            if halved:
                unconditional, output = numpy.split(output, 2)
                if step in self.guided:
                    self.differences.append((time, output - unconditional))
            self.outputs.setdefault(branch, []).append((time, output))
        else:
            interval = min(self.number, len(self.orders)) - 1
            past = self.outputs[branch]
            output = fit(past, time, self.orders[interval])
            damping = self.dampings[min(self.number, len(self.dampings)) - 1]
            output = damping * output + (1 - damping) * past[-1][1]
        self.last = output
        if halved:
            output = numpy.concatenate([output - fit(self.differences, time, self.guidance_order), output])
        return self.like(output)

    def like(self, output):
        return (torch.from_numpy(output).to(self.nest[0]),)


def fit(past, time, order):
    """The polynomial through the last order + 1 values, or as many as there are."""
    past = past[-(order + 1) :]
    values = numpy.stack([value.reshape(-1) for _, value in past])
    powers = numpy.polyfit([t - time for t, _ in past], values, len(past) - 1)
    return powers[-1].reshape(past[0][1].shape)


def assert_close(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).norm() / theirs.norm() < tolerance


def modes(pipe, branch=0):
    return "".join(call.mode.value[0] for call in dit_accel.report(pipe).calls if call.branch == branch)


@pytest.mark.parametrize("name", KINDS)
def test_settings_that_save_nothing_change_no_bit(name):
    pipe, call = made(name)
    plain = call()
    for config in (
        OutputCacheConfig(interval=1, order=3),
        OutputCacheConfig(full_steps=tuple(range(99)), correct=1),
        OutputCacheConfig(warmup_steps=99, damping=0.0, how="hermite"),
        OutputCacheConfig(interval=1, guidance_steps=1),
        OutputCacheConfig(tolerance=1e-12),
    ):
        dit_accel.apply(pipe, config)
        assert torch.equal(call(), plain), config
        report = dit_accel.report(pipe)
        assert report.partial_steps == 0 and not any(call.saves for call in report.calls)
        assert report.flops_ratio == 1


SETTINGS = [
    (dict(interval=3), (0, 3, 6), {}),
    (dict(full_steps=(0, 1, 2, 4)), (0, 1, 2, 4), {}),
    (dict(interval=2, order=2, warmup_steps=2), (0, 1, 3, 5), dict(orders=(2,))),
    (dict(interval=2, order=(0, 1, 2, 3)), (0, 2, 4, 6), dict(orders=(0, 1, 2, 3))),
    (dict(interval=2, order=(2, 0), damping=(1.0, 0.5)), (0, 2, 4, 6), dict(orders=(2, 0), dampings=(1.0, 0.5))),
    (dict(interval=3, order=1, damping=0.5, warmup_steps=2), (0, 1, 4), dict(dampings=(0.5,))),
    (dict(when=lambda progress: progress.number), (0, 1, 3, 6), {}),
]


@pytest.mark.parametrize("name", ["flux", "flux-true-guidance", "pixart", "wan", "chroma"])
@pytest.mark.parametrize("settings, full, expected", SETTINGS)
def test_the_forecast_equals_the_reference(name, settings, full, expected):
    pipe, call = made(name)
    ours = call_with(pipe, call, OutputCacheConfig(**settings))
    assert [c.step for c in dit_accel.report(pipe).calls if c.branch == 0 and c.mode.value == "full"] == list(full)
    dit_accel.remove(pipe)
    plain = call()
    assert not torch.allclose(ours, plain, atol=1e-4), "nothing is left out"
    Reference(pipe.transformer, full, branches=1 if name in ("flux", "pixart") else 2, **expected)
    assert_close(ours, call())


class Course:
    """Stands in for a transformer's forward, whose output then is a function of the time alone."""

    def __init__(self, model, function):
        self.stock, self.function, self.nest = model.forward, function, None
        model.forward = self

    def __call__(self, *args, **kwargs):
        if self.nest is None:
            self.nest = self.stock(*args, **kwargs)
            self.nest = self.nest if isinstance(self.nest, tuple) else (self.nest.sample,)
        time = float((kwargs["timestep"] if "timestep" in kwargs else args[1]).reshape(-1)[-1])
        leaf = self.nest[0]
        if isinstance(leaf, list):
            return ([part * self.function(time) for part in leaf],)
        batch = len(kwargs["hidden_states"])  # half as large where the unconditional branch follows
        return (leaf[-1:].expand(batch, *leaf.shape[1:]) * self.function(time),)


@pytest.mark.parametrize("settings", [{}, {"order": 0}, {"damping": 0.4}, {"how": "reuse"}])
@pytest.mark.parametrize("name", ["flux", "flux-true-guidance", "sd3", "qwen", "z-image"])
def test_corrected_forecasts_of_a_straight_course_end_where_it_does(name, settings):
    """With Euler's method: the last full step makes up for all that was left out of a line, however bad the forecasts were."""
    pipe, call = made(name)
    most = 1000 if name in ("sd3",) else 1
    Course(pipe.transformer, lambda time: 1 - 3 * time / most)
    plain = call()
    steps = {"full_steps": (0, 2, 6)}
    assert_close(call_with(pipe, call, OutputCacheConfig(correct=1, **steps, **settings)), plain, 1e-5)
    dit_accel.remove(pipe)
    if settings:
        wrong = call_with(pipe, call, OutputCacheConfig(**steps, **settings))
        dit_accel.remove(pipe)
        half = call_with(pipe, call, OutputCacheConfig(correct=0.5, **steps, **settings))
        assert (wrong - plain).norm() / plain.norm() > 1e-2
        dit_accel.remove(pipe)
        assert_close(call_with(pipe, call, OutputCacheConfig(correct=0, full_steps=tuple(range(7)))), plain, 1e-7)
        assert (half - plain).norm() < (wrong - plain).norm()


def test_every_interval_has_its_own_correction():
    """Euler's method adds up: what is left out of each interval is left over from it alone."""
    pipe, call = made("flux")
    Course(pipe.transformer, lambda time: 1 - 3 * time)
    plain = call()

    def off(*correct):
        with dit_accel.applied(pipe, OutputCacheConfig(full_steps=(0, 2, 6), order=0, correct=correct)):
            return call() - plain

    first, second = off(0, 1), off(1, 0)
    assert min(first.norm(), second.norm()) > 1e-2 * plain.norm() and (first - second).norm() > 1e-2 * plain.norm()
    assert_close(off(0.25, 0.5) + plain, 0.75 * first + 0.5 * second + plain, 1e-5)
    assert_close(off(0.5) + plain, 0.5 * first + 0.5 * second + plain, 1e-5)


@pytest.mark.parametrize("name", ["flux-true-guidance", "sd3"])
def test_both_branches_of_guidance_are_corrected_alike(name):
    pipe, call = made(name)
    Course(pipe.transformer, lambda time: 1 - 3 * time / (1000 if name == "sd3" else 1))
    plain = call()
    config = OutputCacheConfig(correct=1, full_steps=(0, 2, 3, 6), guidance_steps=(0, 3), order=0)
    assert_close(call_with(pipe, call, config), plain, 1e-5)


LEADS = (0.9, -0.3, 0.2, 0.0, 0.4)  # there is nothing that the first one could lead from


class Leading:
    """Stands in for a function whose values move on, or back, by shares of what they differ from those before, branch by branch."""

    def __init__(self, stock, branches):
        self.stock, self.branches, self.before, self.calls = stock, branches, [], 0

    def __call__(self, *args, **kwargs):
        found = self.stock(*args, **kwargs)
        value = found[0] if isinstance(found, tuple) else found
        step = self.calls // self.branches
        before = self.before[-self.branches] if step else value
        self.calls += 1
        self.before.append(value)
        value = value + LEADS[min(step, len(LEADS) - 1)] * (value - before)
        return (value,) if isinstance(found, tuple) else value


@pytest.mark.parametrize("name", ["flux", "flux-true-guidance", "sd3", "pixart"])
def test_full_steps_lead_from_the_one_before(name):
    pipe, call = made(name)
    plain, config = call(), OutputCacheConfig(full_steps=tuple(range(7)), lead=LEADS)
    led = call_with(pipe, call, config)
    assert (led - plain).norm() > 1e-3 * plain.norm()
    dit_accel.remove(pipe)
    pipe.transformer.forward = Leading(pipe.transformer.forward, 2 if name in TWO_CALLS else 1)
    assert_close(led, call(), 1e-5)
    del pipe.transformer.forward
    assert torch.equal(call_with(pipe, call, dataclasses.replace(config, lead=0)), plain)


def test_leads_in_data_space_are_those_of_the_pictures_that_dpm_solver_makes_of_outputs():
    pipe, call = made("pixart")
    led = call_with(pipe, call, OutputCacheConfig(full_steps=tuple(range(7)), lead=LEADS, space="data"))
    plain = call_with(pipe, call, OutputCacheConfig(full_steps=tuple(range(7)), lead=LEADS))
    assert (led - plain).norm() > 1e-3 * plain.norm()
    dit_accel.remove(pipe)
    pipe.scheduler.convert_model_output = Leading(pipe.scheduler.convert_model_output, 1)
    assert_close(led, call(), 1e-3)


def test_a_lead_moves_its_own_step_alone():
    """Forecasts of a line stay exact, and the picture is off by one step's share of what its output differs from the one before."""
    pipe, call = made("flux")
    stock, found = pipe.transformer.forward, []
    for function in (lambda time: 0.0, lambda time: 1.0, lambda time: 1 - 3 * time):
        pipe.transformer.forward = stock
        Course(pipe.transformer, function)
        found.append(call())
    t = [*pipe.scheduler.sigmas.tolist()]
    led = call_with(pipe, call, OutputCacheConfig(full_steps=(0, 1, 3, 6), lead=(0, 0, 0.5, 0)))
    assert modes(pipe) == "ffpfppf"
    expected = (found[0] - found[1]) * 0.5 * -3 * (t[3] - t[1]) * (t[4] - t[3])
    assert_close(led - found[2], expected, 1e-4)


class Picture:
    """Stands in for a transformer's forward: what it returns implies a picture on a line over log(alpha / sigma).

    By the definitions alone: x = alpha * picture + sigma * noise, and a prediction of the velocity, of v or of the noise.
    """

    def __init__(self, pipe, noise, prediction):
        self.pipe, self.noise, self.prediction, self.nest = pipe, noise, prediction, None
        self.stock, self.seen = pipe.transformer.forward, []
        pipe.transformer.forward = self

    def __call__(self, *args, **kwargs):
        self.nest = self.nest or self.stock(*args, **kwargs)
        alpha, sigma = self.noise(self.pipe.scheduler)
        latents = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        several = isinstance(latents, list)
        self.seen.append(latents[0].clone())
        outputs = [self.one(x.double(), alpha, sigma).to(x.dtype) for x in (latents if several else [latents])]
        return (outputs if several else outputs[0],)

    def one(self, x, alpha, sigma):
        shape = torch.Generator().manual_seed(0)
        base, slope = (torch.randn(x.shape[1:], generator=shape, dtype=x.dtype) for _ in range(2))
        picture = base + slope * numpy.log(max(alpha, 1e-3) / sigma) / 5
        noise = (x - alpha * picture) / sigma
        output = {"velocity": noise - picture, "minus velocity": picture - noise, "v": alpha * noise - sigma * picture}.get(
            self.prediction, noise
        )
        learned = self.prediction in ("v", "noise")  # the tiny PixArt has a learned variance, which the pipeline cuts off
        return torch.cat([output, output], 1) if learned else output


def flowing(scheduler):
    sigma = float(scheduler.sigmas[scheduler.step_index or 0])
    return 1 - sigma, sigma


def diffusing(scheduler):
    share = float(scheduler.alphas_cumprod[int(scheduler.timesteps[scheduler.step_index or 0])])
    return share**0.5, (1 - share) ** 0.5


def with_prediction(pipe, prediction):
    kind = {"v": "v_prediction"}.get(prediction, "epsilon")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=kind)


@pytest.mark.parametrize(
    ("name", "noise", "prediction"),
    [
        ("flux", flowing, "velocity"),
        ("sd3", flowing, "velocity"),
        ("z-image", flowing, "minus velocity"),
        ("pixart", diffusing, "v"),
        ("pixart", diffusing, "noise"),
    ],
)
def test_data_space_forecasts_the_implied_picture(name, noise, prediction):
    """Exactly, of a picture on a line; and with Euler's method, full steps make up for a repeated one."""
    pipe, call = made(name)
    if name == "pixart":
        with_prediction(pipe, prediction)
    stub = Picture(pipe, noise, prediction)
    plain = call()
    fifth = stub.seen[5]  # what enters step 5
    full = OutputCacheConfig(full_steps=(0, 1, 4, 5), space="data", order=1)
    assert_close(call_with(pipe, call, full), plain, 1e-4)
    assert modes(pipe) == "ffppffp"
    assert_close(stub.seen[-1], fifth, 1e-4)
    for correct in (0, 1):
        dit_accel.remove(pipe)
        call_with(pipe, call, dataclasses.replace(full, order=0, correct=correct))
        off = (stub.seen[-1] - fifth).norm() / fifth.norm()
        assert (off < 1e-4) if correct and noise is flowing else (off > 1e-3)


@pytest.mark.parametrize("name", ["flux", "flux-true-guidance", "sd3", "pixart", "z-image"])
def test_nothing_left_out_in_data_space_changes_no_bit(name):
    pipe, call = made(name)
    plain = call()
    assert torch.equal(call_with(pipe, call, OutputCacheConfig(full_steps=tuple(range(7)), space="data", correct=1)), plain)


@pytest.mark.parametrize("name", ["flux-true-guidance", "sd3", "pixart"])
def test_guidance_in_data_space(name):
    """Both branches on all full steps, or only remembered on some: as in the output's space where the difference is the same."""
    pipe, call = made(name)
    steps = dict(full_steps=(0, 2, 4, 6), order=1, space="data")
    both = call_with(pipe, call, OutputCacheConfig(**steps))
    dit_accel.remove(pipe)
    assert_close(call_with(pipe, call, OutputCacheConfig(**steps, guidance_steps=1, guidance_order=1)), both, 1e-3)


def test_a_learned_variance_is_no_part_of_the_picture():
    from dit_accel import spaces

    x, output = torch.randn(2, 4, 8, 8), torch.randn(2, 8, 8, 8)
    numbers = spaces.IMPLIED["epsilon"](0.6, 0.8)
    picture = spaces.implied(output, x, numbers)
    assert torch.allclose(picture[:, :4], (x - 0.8 * output[:, :4]) / 0.6, atol=1e-5) and torch.equal(picture[:, 4:], output[:, 4:])
    assert torch.allclose(spaces.output_of(picture, x, numbers), output, atol=1e-5)
    with pytest.raises(ValueError, match="needs an output like the latents"):
        spaces.implied(output[:, :3], x, numbers)


def test_data_space_needs_to_know_the_noise():
    from tests.dit_accel import tiny

    model, given = tiny.flux()
    dit_accel.apply(model, OutputCacheConfig(space="data"))
    with torch.no_grad(), pytest.raises(ValueError, match="needs a scheduler that tells the noise of every step"):
        model(**given(1.0))
    for wrong in (dict(compute_ratio=0.5), dict(how="logit")):
        with pytest.raises(ValueError, match="space='data'"):
            OutputCacheConfig(space="data", **wrong)


def call_with(pipe, call, config, **more):
    dit_accel.apply(pipe, config)
    return call(**more)


def tolerated(model, tolerance, most, times, branches=1):
    """Makes a transformer compute in full only where the error that was seen, grown, would be too large; by brute force."""
    stock, past, full, calls = model.forward, [], [], [0]

    def forward(*args, **kwargs):
        step = calls[0]
        calls[0] += 1
        if step and step < full[-1][1]:
            return (torch.from_numpy(fit(past, times[step], 1)).float(),)
        nest = stock(*args, **kwargs)
        output, wait = nest[0].double().numpy(), 1
        if len(past) > 1:
            error = numpy.sqrt(((fit(past, times[step], 1) - output) ** 2).sum() / (output**2).sum())
            distance = abs(times[step] - past[-1][0])
            far = [error * (abs(times[s] - times[step]) / distance) ** 2 for s in range(step, len(times))]
            wait = max(n for n in range(1, min(most, len(far)) + 1) if all(e <= tolerance for e in far[1:n]))
        past.append((times[step], output))
        full.append((step, step + wait))
        return nest

    model.forward = forward
    return full


@pytest.mark.parametrize("name", ["flux", "pixart"])
def test_tolerance_equals_brute_force(name):
    """Intervals grow and shrink."""
    steps, waits = 24, set()
    for tolerance in (0.1, 0.5, 2.0):
        pipe, call = made(name)
        ours = call_with(pipe, call, OutputCacheConfig(tolerance=tolerance, interval=6), steps=steps)
        found = [c.step for c in dit_accel.report(pipe).calls if c.mode.value == "full"]
        dit_accel.remove(pipe)
        times = [float(t) / (1000 if name == "flux" else 1) for t in pipe.scheduler.timesteps]
        full = tolerated(pipe.transformer, tolerance, 6, times)
        assert_close(ours, call(steps=steps), 1e-3)
        assert found == [step for step, _ in full]
        waits |= {b - a for a, b in zip(found, found[1:], strict=False)}
    assert len(waits) > 2 and max(waits) <= 6


GUIDANCE = [
    (dict(interval=2, guidance_steps=(0, 4)), (0, 2, 4, 6), (0, 4), 0),
    (dict(interval=2, guidance_steps=3), (0, 2, 4, 6), (0, 6), 0),
    (dict(interval=2, guidance_steps=2, guidance_order=1), (0, 2, 4, 6), (0, 4), 1),
    (dict(interval=1, guidance_steps=(0, 1, 3), guidance_order=2), tuple(range(7)), (0, 1, 3), 2),
    (dict(full_steps=(0, 1, 5), guidance_steps=(0, 5)), (0, 1, 5), (0, 5), 0),
]


@pytest.mark.parametrize("name", [*TWO_CALLS, *ONE_BATCH])
@pytest.mark.parametrize("settings, full, guided, order", GUIDANCE)
def test_guidance_on_its_own_steps_equals_the_reference(name, settings, full, guided, order):
    pipe, call = made(name)
    rows, first = [], next(m for m in pipe.transformer.modules() if isinstance(m, torch.nn.ModuleList))[0]
    listening = first.register_forward_pre_hook(
        lambda m, args, kwargs: rows.append(len((*args, *kwargs.values())[0])), with_kwargs=True
    )
    dit_accel.apply(pipe, OutputCacheConfig(**settings))
    ours = call()
    listening.remove()
    calls = dit_accel.report(pipe).calls
    if name in ONE_BATCH:
        assert [c.rows for c in calls] == [(1 if s in guided else 0.5) if s in full else 0 for s in range(STEPS)]
        assert rows == [2 if s in guided else 1 for s in full], "the batch is halved"
    else:
        assert [c.step for c in calls if c.branch == 1 and c.rows] == list(guided)
        assert len(rows) == len(full) + len(guided)
    dit_accel.remove(pipe)
    batched = name in ONE_BATCH
    Reference(pipe.transformer, full, (1,), (1.0,), guided, order, batched, 1 if batched else 2)
    assert_close(ours, call())


@pytest.mark.parametrize("name", [*TWO_CALLS, *ONE_BATCH])
@pytest.mark.parametrize("order", [0, 1, 2])
def test_guidance_on_all_full_steps_is_no_other_forecast(name, order):
    """Of the difference as of both: forecasts are linear."""
    pipe, call = made(name)
    plain = call()
    both = call_with(pipe, call, OutputCacheConfig(interval=2, order=order))
    assert_close(call_with(pipe, call, OutputCacheConfig(interval=2, order=order, guidance_order=order, guidance_steps=1)), both)
    other = call_with(pipe, call, OutputCacheConfig(interval=2, order=order, guidance_order=order, guidance_steps=3))
    assert (both - other).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("name", [*TWO_CALLS, *ONE_BATCH])
def test_guidance_on_its_own_steps_where_tokens_are_computed(name):
    """With all tokens and fresh attention, the conditional branch is stock on every step, and the other one follows from it."""
    pipe, call = made(name)
    settings = dict(interval=2, guidance_steps=(0, 4), attention="fresh")
    config = OutputCacheConfig(**settings, compute_ratio=1.0)
    ours, some = call_with(pipe, call, config), call_with(pipe, call, OutputCacheConfig(**settings, compute_ratio=0.4))
    dit_accel.apply(pipe, config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    report, batched = dit_accel.report(pipe), name in ONE_BATCH
    calls = report.calls
    assert sum(report.flops) == counter.get_total_flops()
    if batched:
        assert [c.rows for c in calls] == [1 if s in (0, 4) else 0.5 for s in range(STEPS)]
    else:
        assert [c.step for c in calls if c.branch == 1 and c.rows] == [0, 4]
    dit_accel.remove(pipe)
    Reference(pipe.transformer, range(STEPS), guided=(0, 4), batched=batched, branches=1 if batched else 2)
    expected = call()
    assert_close(ours, expected)
    assert (some - expected).norm() > 1e-4 * expected.norm()


@pytest.mark.parametrize("name", ["flux", "pixart", "wan", "flux2"])
@pytest.mark.parametrize("selector", ["attention", "k-norm", "v-norm"])
def test_selectors_that_look_at_attention(name, selector):
    """All of which is counted; other selectors compute other tokens."""
    pipe, call = made(name)
    config = OutputCacheConfig(interval=3, compute_ratio=0.3, selector=selector)
    ours = call_with(pipe, call, config)
    assert (ours - call_with(pipe, call, dataclasses.replace(config, selector="random"))).norm() > 1e-4 * ours.norm()
    dit_accel.apply(pipe, config)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        assert_close(call(), ours)
    report = dit_accel.report(pipe)
    assert sum(report.flops) == counter.get_total_flops() and report.partial_steps


@pytest.mark.parametrize("weight", [0.0, 0.1, 10.0])
def test_tokens_that_have_waited_longer_are_preferred(weight):
    """What is ranked, by hand: the score over its norm, and the weight for as many steps as an interval has."""
    pipe, call = made("flux")
    dit_accel.register_selector("rising")(lambda context: torch.arange(1.0, 1 + context.tokens.shape[1])[None])
    config = OutputCacheConfig(interval=5, compute_ratio=0.25, selector="rising", age_weight=weight)
    dit_accel.apply(pipe, config, record=True)
    call(steps=10)
    report = dit_accel.report(pipe)
    found = {report.calls[one.call].step: one.tokens[0].tolist() for one in report.selections}
    tokens, expected = math.prod(report.grid), {}
    length = math.sqrt(sum(n**2 for n in range(1, tokens + 1)))
    for step in range(10):
        if step % 5 == 0:
            waited = [0] * tokens
            continue
        ranked = sorted(range(tokens), key=lambda n: -((n + 1) / length + weight * waited[n] / 5))
        expected[step] = sorted(ranked[: round(tokens / 4)])
        waited = [0 if n in expected[step] else waited[n] + 1 for n in range(tokens)]
    assert found == expected and (len({*map(tuple, found.values())}) == 1) == (weight == 0)


def test_selectors_that_need_more_are_refused(tiny_flux):
    with pytest.raises(
        ValueError, match="'cross-entropy' needs entropy, not observed at model scope; choose one of random, attention"
    ):
        dit_accel.apply(tiny_flux(), OutputCacheConfig(compute_ratio=0.3, selector="cross-entropy"))
    mochi, _ = made("mochi")
    with pytest.raises(
        ValueError, match="Attention of Mochi.* cannot be looked at: .* choose a selector that looks at no attention"
    ):
        dit_accel.apply(mochi, OutputCacheConfig(compute_ratio=0.3, selector="attention"))


@pytest.mark.parametrize("prefix", ["", "pred_"])
def test_names_of_branches(prefix):
    """Diffusers' guiders call them pred_cond and pred_uncond."""
    pipe, call = made("qwen")
    named = pipe.transformer.cache_context
    pipe.transformer.cache_context = lambda name, **more: named(prefix + name, **more)
    dit_accel.apply(pipe, OutputCacheConfig(interval=2, guidance_steps=9))
    call()
    assert [c.rows for c in dit_accel.report(pipe).calls if c.branch == 1] == [1, *6 * [0]]


def test_every_transformer_of_diffusers_has_arguments_that_are_known():
    """Those that have neither latents nor a timestep work in one pass."""
    for name in dir(diffusers):
        if "Transformer" not in name or not name.endswith("Model"):
            continue
        given = set(inspect.signature(getattr(diffusers, name).forward).parameters)
        if not name.startswith("Dummy") and given & {*hook.LATENTS} and "timestep" in str(given):
            assert given & {*hook.TIMESTEP}, name
            assert given & {*hook.TEXT} or name == "Kandinsky6SRTransformer3DModel", name


CONFIGS = [OutputCacheConfig(interval=3), OutputCacheConfig(interval=2, guidance_steps=2), OutputCacheConfig(tolerance=0.3)]
NAMES = ["forecast", "guidance", "tolerance"]


def look(pipe):
    models = [m for n in ("transformer", "transformer_2") if (m := getattr(pipe, n, None)) is not None]
    return [
        (
            list(model.state_dict()),
            [(name, type(module)) for name, module in model.named_modules()],
            {name: sorted(set(vars(module)) - {"_diffusers_hook"}) for name, module in model.named_modules()},
            [id(processor) for processor in getattr(model, "attn_processors", {}).values()],
            "forward" in vars(model),
        )
        for model in models
    ]


@pytest.mark.parametrize("name", KINDS)
def test_remove_restores_everything(name):
    pipe, call = made(name)
    plain, before = call(), look(pipe)
    for config in (*CONFIGS[:2], OutputCacheConfig(tolerance=1000.0)):
        dit_accel.apply(pipe, config)
        assert not torch.equal(call(), plain)
    dit_accel.remove(pipe)
    assert look(pipe) == before and torch.equal(call(), plain)
    assert "_diffusers_hook" not in vars(pipe.transformer) or not pipe.transformer._diffusers_hook.hooks
    copy.deepcopy(pipe.transformer)


class Stop(Exception):
    pass


@pytest.mark.parametrize("name", ["flux-true-guidance", "chroma", "pixart", "wan2.2", "z-image"])
@pytest.mark.parametrize("config", CONFIGS, ids=NAMES)
def test_repeated_and_interrupted_runs_give_the_same_bits(name, config):
    pipe, call = made(name)
    first = call_with(pipe, call, config)
    record = dit_accel.report(pipe).calls
    assert torch.equal(call(), first)
    block = next(m for m in pipe.transformer.modules() if isinstance(m, torch.nn.ModuleList))[0]
    for stop, steps in ((1, 7), (2, 7), (3, 20), (1, 5)):
        calls = 0

        def halt(*args):
            nonlocal calls
            calls += 1
            if calls == stop:
                raise Stop

        listening = block.register_forward_hook(halt)
        with pytest.raises(Stop):
            call(seed=3, steps=steps)
        listening.remove()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="dit_accel")
            assert torch.equal(call(), first) and dit_accel.report(pipe).calls == record


@pytest.mark.parametrize("family", ["flux", "pixart"])
@pytest.mark.parametrize("config", CONFIGS[:2], ids=NAMES[:2])
def test_a_picture_does_not_depend_on_its_batch(tiny_flux, tiny_pixart, family, config):
    pipe = tiny_flux() if family == "flux" else tiny_pixart()
    more = {} if family == "flux" else {"use_resolution_binning": False, "clean_caption": False}

    def call(prompts, seeds):
        generator = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = dict(height=64, width=48, num_inference_steps=7, max_sequence_length=8, output_type="latent", **more)
        if family == "flux":
            given |= {"true_cfg_scale": 2.0, "negative_prompt": ["a teapot"] * len(prompts)}
        return pipe(prompts, generator=generator, **given).images

    dit_accel.apply(pipe, config)
    prompts, seeds = ["red apple, 3d style", "tiger face"], [0, 1]
    together = call(prompts, seeds)
    for i in range(2):
        assert_close(together[i], call(prompts[i : i + 1], seeds[i : i + 1])[0])


def kept(pipe):
    """Bytes that are remembered."""
    return store.size_in_bytes([branch.kept() for branch in pipe.transformer._dit_accel.branches.values()])


def test_outputs_are_freed_at_the_end():
    """By the pipeline, or on the last step if it does not say when it is over."""
    pipe, call = made("flux")
    dit_accel.apply(pipe, OutputCacheConfig(interval=3, order=2))
    pipe.maybe_free_model_hooks = lambda: None
    call()
    assert kept(pipe) == 0 and dit_accel.report(pipe).calls[-1].cache_bytes == 0
    assert dit_accel.report(pipe).cache_bytes == 2 * 64 * 16 * 4
    pipe, call = made("wan2.2")
    dit_accel.apply(pipe, OutputCacheConfig(interval=3))
    call()
    assert kept(pipe) == 0 and not pipe.transformer_2._dit_accel.branches


def alone(call_of="flux-true-guidance"):
    """A transformer, and the arguments of its two branches, conditional first."""
    pipe, call = made(call_of)
    given = []
    listening = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.append(kwargs), with_kwargs=True)
    call(steps=1)
    listening.remove()
    return pipe.transformer, given[:2]


@torch.no_grad()
@pytest.mark.parametrize("named", [True, False])
def test_the_conditional_output_is_kept_only_until_the_other_branch_has_seen_it(named):
    """A loop of one's own, which announces no end."""
    model, given = alone()
    dit_accel.apply(model, OutputCacheConfig(interval=2, guidance_steps=2))
    for t in torch.linspace(1, 0.2, 5):
        for name, branch in zip(("cond", "uncond"), given, strict=True):
            with model.cache_context(name if named else None):
                model(**{**branch, "timestep": t[None]})
        assert all(branch.latest is branch.conditional is None for branch in model._dit_accel.branches.values())
    assert [c.rows for c in dit_accel.report(model).calls if c.branch == 1] == [1, 0, 0, 0, 1]


@torch.no_grad()
def test_branches_may_return_different_types():
    model, given = alone()
    dit_accel.apply(model, OutputCacheConfig(interval=3))
    for t in torch.linspace(1, 0.2, 5):
        for branch, as_dict in zip(given, (True, False), strict=True):
            output = model(**{**branch, "timestep": t[None], "return_dict": as_dict})
            assert isinstance(output, tuple) != as_dict and hasattr(output, "sample") == as_dict
    assert modes(SimpleNamespace(transformer=model)) == "fppfp"


@torch.no_grad()
def test_an_unconditional_branch_that_is_called_first_is_refused():
    model, given = alone()
    dit_accel.apply(model, OutputCacheConfig(interval=2, guidance_steps=2))
    with pytest.raises(ValueError, match="'uncond' is called first; call the conditional one first, or leave guidance_steps out"):
        with model.cache_context("uncond"):
            model(**given[1])


def test_a_warning_once_where_a_run_saves_nothing():
    pipe, call = made("flux")
    for config in (OutputCacheConfig(interval=3, warmup_steps=STEPS), TokenCacheConfig(interval=STEPS, warmup_steps=STEPS)):
        dit_accel.apply(pipe, config)
        with pytest.warns(UserWarning, match=f"saved nothing in a run of {STEPS} steps") as told:
            call()
            call()
        assert len([w for w in told if "saved nothing" in str(w.message)]) == 1
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="dit_accel")
            dit_accel.apply(pipe, config)
            call(steps=STEPS + 2), call(steps=1)


@pytest.mark.parametrize("name", ["flux-true-guidance", "pixart", "sd3", "qwen", "lumina2", "mochi"])
def test_the_report_counts_what_ran(name):
    pipe, call = made(name)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    plain = counter.get_total_flops()
    for config in (OutputCacheConfig(interval=3), OutputCacheConfig(interval=2, guidance_steps=2)):
        dit_accel.apply(pipe, config)
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            call()
        report = dit_accel.report(pipe)
        assert sum(report.flops) == counter.get_total_flops() and report.full_flops == plain
        assert report.flops_ratio == plain / counter.get_total_flops() > 1.5
        assert len(report.to_dict()["calls"]) == len(report.calls) and "times fewer FLOPs" in str(report)


def test_two_transformers_of_one_pipeline():
    """Each has a clock of its own, which begins where its part of the steps does."""
    pipe, call = made("wan2.2")
    dit_accel.apply(pipe, OutputCacheConfig(interval=3))
    ours = call(steps=9)
    seen = [[(c.branch, c.step, c.mode.value) for c in model._dit_accel.calls] for model in (pipe.transformer, pipe.transformer_2)]
    counts = [len(part) // 2 for part in seen]
    assert sum(counts) == 9 and min(counts) > 2
    report = dit_accel.report(pipe)
    assert [(c.transformer, c.branch, c.step, c.mode.value) for c in report.calls] == [
        (i, *call) for i, part in enumerate(seen) for call in part
    ]
    assert report.flops_ratio == 18 / sum(c.mode.value == "full" for c in report.calls)
    assert [row["transformer"] for row in report.to_dict()["calls"]] == 2 * counts[0] * [0] + 2 * counts[1] * [1]
    for part, count in zip(seen, counts, strict=True):
        assert part == [(b, s, "full" if s % 3 == 0 else "partial") for s in range(count) for b in (0, 1)]
    dit_accel.remove(pipe)
    for model, count in zip((pipe.transformer, pipe.transformer_2), counts, strict=True):
        Reference(model, tuple(range(0, count, 3)), branches=2)
    assert_close(ours, call(steps=9))


def test_pipelines_that_share_a_transformer(tiny_flux):
    """A scheduler of its own or the same; the one that apply was given drives, and the other's calls are told apart by time."""
    pipe = tiny_flux()
    shared = {name: part for name, part in pipe.components.items() if part is not None}
    again = diffusers.FluxImg2ImgPipeline(**shared)
    apart = diffusers.FluxPipeline(**{**pipe.components, "scheduler": copy.deepcopy(pipe.scheduler)})
    given = dict(prompt="red apple", height=64, width=64, num_inference_steps=7, max_sequence_length=8, output_type="latent")
    for each in (again, apart):
        each.set_progress_bar_config(disable=True)
    dit_accel.apply(pipe, OutputCacheConfig(interval=3))
    run = lambda p, **more: p(**given, generator=torch.Generator().manual_seed(0), **more).images
    first, picture = run(pipe), torch.rand(1, 3, 64, 64)
    second = run(again, image=picture, strength=0.6)
    assert modes(pipe) == "fppfp"
    for _ in range(2):
        assert_close(run(apart), first)
        assert modes(pipe) == "fppfppf"
        assert torch.equal(run(again, image=picture, strength=0.6), second) and torch.equal(run(pipe), first)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential", "group"])
def test_offloading(when, kind):
    from accelerate import cpu_offload
    from accelerate.hooks import CpuOffload, add_hook_to_module

    config, cpu = OutputCacheConfig(interval=3), torch.device("cpu")
    pipe, call = made("flux")
    plain = call()
    cached = call_with(pipe, call, config)
    dit_accel.remove(pipe)
    model = pipe.transformer
    offload = {
        "model": lambda: add_hook_to_module(model, CpuOffload(execution_device="cpu")),
        "sequential": lambda: cpu_offload(model, cpu),
        "group": lambda: model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level"),
    }[kind]
    steps = [offload, lambda: dit_accel.apply(pipe, config)]
    for step in steps if when == "before" else reversed(steps):
        step()
    for _ in range(2):
        assert torch.equal(call(), cached) and modes(pipe) == "fppfppf"
    dit_accel.remove(pipe)
    assert torch.equal(call(), plain)
    assert kind == "group" or model._hf_hook is not None


def test_two_threads_each_with_a_pipeline():
    pipes = [made(name) for name in ("flux", "sd3")]
    for pipe, _ in pipes:
        dit_accel.apply(pipe, OutputCacheConfig(interval=3))
    alone, found = [call() for _, call in pipes], [None, None]

    def work(i):
        found[i] = pipes[i][1]()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert all(map(torch.equal, found, alone))


def test_two_threads_in_one_transformer_are_told():
    pipe, call = made("flux")
    dit_accel.apply(pipe, OutputCacheConfig(interval=3))
    parts = {name: part for name, part in pipe.components.items() if name != "scheduler"}
    again = diffusers.FluxPipeline(**parts, scheduler=copy.deepcopy(pipe.scheduler))
    first, found = call(), []
    block, inside, go = pipe.transformer.transformer_blocks[0], threading.Event(), threading.Event()

    def wait(*args):
        inside.set()
        assert go.wait(20)

    listening = block.register_forward_pre_hook(wait)
    other = threading.Thread(target=lambda: found.append(call()))
    other.start()
    assert inside.wait(20)
    listening.remove()
    with pytest.raises(RuntimeError, match="two threads at once.*own"):
        PIPELINES["flux"][1](again)
    go.set()
    other.join()
    assert torch.equal(found[0], first) and torch.equal(call(), first)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(full_steps=()), r"full_steps must be a list of one or more whole numbers of at least 0 or None, not \(\)"),
        (dict(full_steps=(3, 2)), r"full_steps must be numbers of steps, counted from 0 and ascending, not \(3, 2\)"),
        (dict(full_steps=4), "full_steps must be a list of one or more whole numbers of at least 0 or None, not 4"),
        (dict(guidance_steps=0), "guidance_steps must be a whole number of at least 1, not 0"),
        (dict(guidance_steps=(1, 1)), "guidance_steps must be numbers of steps"),
        (dict(order=4), "order must be a whole number between 0 and 3 or a list"),
        (dict(order=(1, -1)), "order must be a whole number between 0 and 3 or a list"),
        (dict(guidance_order=1.5), "guidance_order must be a whole number between 0 and 3"),
        (dict(damping=3), "damping must be a number between 0 and 2"),
        (dict(damping=(0.5, "1")), "damping must be a number between 0 and 2 or a list"),
        (dict(tolerance=0), "tolerance must be a number of at least 1e-12 or None, not 0"),
        (dict(tolerance=float("nan")), "tolerance must be"),
        (dict(interval=0), "interval must be a whole number of at least 1"),
        (dict(compute_ratio=1.5), "compute_ratio must be a number between 0 and 1"),
        (dict(attention="none"), "attention must be one of reuse, fresh"),
        (dict(full_steps=(0,), tolerance=0.1), "full_steps, tolerance and when each say when a step is full; give one"),
        (dict(how="magic"), "no method 'magic'. Known methods: reuse, polynomial"),
        (dict(when="magic"), "no rule 'magic'"),
        (dict(selector="magic"), "magic"),
        (dict(how=["a"]), r"how must be a name or a function, not \['a'\]"),
        (dict(when=3), "when must be a name or a function or None, not 3"),
    ],
)
def test_bad_options_are_explained(settings, message):
    with pytest.raises(ValueError, match=message):
        OutputCacheConfig(**settings)


def test_options_round_trip():
    config = OutputCacheConfig(full_steps=[0, 2, numpy.int64(5)], order=[1, 2], damping=[0.5], guidance_steps=[0, 2])
    assert OutputCacheConfig.from_dict(config.to_dict()) == config and hash(config)
    assert config.full_steps == (0, 2, 5)
    with pytest.raises(ValueError, match="no option full. Its options are full_steps"):
        OutputCacheConfig.from_dict({"full": 3})


def test_what_cannot_be_served_is_refused():
    with pytest.raises(TypeError, match="Linear is not a transformer of diffusers"):
        dit_accel.apply(torch.nn.Linear(2, 2), OutputCacheConfig())
    pipe, call = made("flux")
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
    with pytest.raises(RuntimeError, match="disable_cache"):
        dit_accel.apply(pipe, OutputCacheConfig())
    pipe.transformer.disable_cache()
    dit_accel.apply(pipe, OutputCacheConfig())
    with pytest.raises(TypeError, match=r"call dit_accel\.remove first"):
        copy.deepcopy(pipe.transformer)


@torch.no_grad()
def test_a_warning_once_where_nothing_is_saved():
    """The same picture at one time again and again; and never in ordinary use, whatever scheduler steps."""
    pipe, call = made("flux")
    given = {}
    pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    call(steps=1)
    dit_accel.apply(pipe, OutputCacheConfig(interval=3))
    heun, sample = made("sd3")
    heun.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()
    dit_accel.apply(heun, OutputCacheConfig(interval=3))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="dit_accel")
        for steps in (7, 3, 12):
            call(steps=steps)
            sample(steps=steps)
        assert "p" in modes(heun)
    plain = [given["hidden_states"] + i for i in range(8)]
    with pytest.warns(UserWarning, match="saves nothing here.*same timestep.*cache_context") as told:
        outputs = [pipe.transformer(**{**given, "hidden_states": x})[0] for x in plain]
    assert len(told) == 1
    dit_accel.remove(pipe)
    for x, output in zip(plain, outputs, strict=True):
        assert torch.equal(pipe.transformer(**{**given, "hidden_states": x})[0], output)


def test_gradients_compute_everything():
    pipe, call = made("flux")
    given = {}
    listening = pipe.transformer.register_forward_pre_hook(lambda m, args, kwargs: given.update(kwargs), with_kwargs=True)
    call(steps=1)
    listening.remove()
    dit_accel.apply(pipe, OutputCacheConfig(interval=3))
    outputs = [pipe.transformer(**{**given, "timestep": torch.tensor([t])})[0] for t in (1.0, 0.8, 0.6)]
    assert all(output.requires_grad for output in outputs) and not dit_accel.report(pipe).calls


def test_two_pictures_of_one_seed_are_no_guidance(tiny_flux):
    """FLUX calls twice for guidance: a batch of equal latents is two pictures."""
    pipe, call = tiny_flux(), dict(height=64, width=48, num_inference_steps=4, max_sequence_length=8, output_type="latent")
    two = lambda: pipe(["a tiger", "a teapot"], generator=[torch.Generator().manual_seed(0) for _ in range(2)], **call).images
    plain = two()
    dit_accel.apply(pipe, OutputCacheConfig(interval=1, guidance_steps=2))
    assert torch.equal(two(), plain)
