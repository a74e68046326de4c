"""The clock alone: which run, step, time and branch a call belongs to, told by schedulers that are nothing but counters."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import diffusers
import numpy
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dit_accel import clock as module
from dit_accel.clock import AGAIN, ROSE, Call, Clock

LATENTS = torch.zeros(1, 4, 2)
TIMES = [1000.0, 800.0, 600.0, 400.0, 200.0]


class Scheduler:
    """Counts its steps, as most of diffusers' schedulers do, or only has times, as DDIM's."""

    def __init__(self, counts: bool = True) -> None:
        self.counts, self.timesteps, self.num_inference_steps = counts, torch.arange(999.0, -1, -1), None
        if counts:
            self.step_index = self.begin_index = None

    def set_timesteps(self, times=TIMES, begin=0, dtype=torch.float32):
        self.timesteps, self.num_inference_steps = torch.tensor(times, dtype=dtype), len(times)
        if self.counts:
            self.step_index, self.begin_index = None, begin
        return self.timesteps[begin or 0 :]

    def step(self):
        if self.counts:
            self.step_index = (self.begin_index or 0) + 1 if self.step_index is None else self.step_index + 1


def texts(count=2):
    return [torch.full((1, 3, 2), float(i)) for i in range(count)]


def drive(clock, scheduler, timesteps, branches, told=lambda t: t, names=None, latents=LATENTS):
    """The moments of the calls that a pipeline with these timesteps makes, one for each branch (a text) on every step."""
    moments = []
    for t in timesteps:
        for i, text in enumerate(branches):
            context = SimpleNamespace(name=names[i], step_index=None) if names else None
            moments.append(clock.tick(Call(latents, text, told(t), context)))
        if scheduler is not None:
            scheduler.step()
    return moments


def steps(moments, branch=0):
    return [m.step for m in moments if m.branch == branch]


def check(moments, branches=1, count=5, times=None):
    """One run of these branches, every one of them seen on every step."""
    assert [m.begins for m in moments] == [True] + [False] * (len(moments) - 1)
    assert [m.branch for m in moments] == list(range(branches)) * count
    assert [m.fresh for m in moments] == [True] * branches + [False] * (len(moments) - branches)
    assert [m.step for m in moments] == [step for step in range(count) for _ in range(branches)]
    if times is not None:
        assert [m.time for m in moments] == pytest.approx([time for time in times for _ in range(branches)], rel=1e-6)


TOLD = {
    "the scheduler's view": lambda t: t.expand(3),
    "a copy": lambda t: t.clone(),
    "divided": lambda t: t.expand(2) / 1000,
    "rising": lambda t: 1 - t / 1000,
    "bfloat16": lambda t: (t / 1000).bfloat16(),
    "python": lambda t: float(t) / 1000,
    "numpy": lambda t: numpy.float32(t),
    "sigma": lambda t: torch.log(t / 1000) / 4 + 2,
    "a column for every token": lambda t: torch.stack([torch.zeros(()), t])[None].expand(2, 2),
}


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("begin", [0, 2])
def test_a_scheduler_that_counts(told, branches, begin):
    scheduler = Scheduler()
    clock = Clock(lambda: scheduler)
    for _ in range(2):  # a run knows nothing of the one before
        timesteps = scheduler.set_timesteps(begin=begin)
        moments = drive(clock, scheduler, timesteps, texts(branches), told)
        check(moments, branches, 5 - begin)
        assert {m.steps for m in moments} == {5 - begin} and clock.why == ""
        assert all(m.times == moments[0].times and m.time == m.times[m.step] for m in moments)
        if told is not TOLD["sigma"]:
            number = [float(torch.as_tensor(told(t)).reshape(-1)[-1]) for t in timesteps]
            assert moments[0].times == pytest.approx(number, rel=0.004)


@pytest.mark.parametrize("name", ["the scheduler's view", "a copy", "python", "numpy", "bfloat16"])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("begin", [0, 2])
def test_a_scheduler_that_does_not_count(name, branches, begin):
    scheduler = Scheduler(counts=False)
    clock = Clock(lambda: scheduler)
    told = (lambda t: t.bfloat16()) if name == "bfloat16" else (lambda t: float(t)) if name == "python" else TOLD[name]
    for _ in range(2):
        moments = drive(clock, scheduler, scheduler.set_timesteps(begin=begin), texts(branches), told)
        check(moments, branches, 5 - begin, TIMES[begin:])
        assert {m.steps for m in moments} == {5 - begin} and clock.why == ""


def test_views_tell_steps_of_equal_or_close_times_apart():
    """PNDM repeats a time; whole numbers of many steps are closer than the tolerance."""
    for times in ([900.0, 700.0, 700.0, 500.0], [float(999 - i) for i in range(400)]):
        scheduler = Scheduler(counts=False)
        clock = Clock(lambda: scheduler)
        check(drive(clock, scheduler, scheduler.set_timesteps(times), texts(), TOLD["the scheduler's view"]), 2, len(times), times)
    scheduler.timesteps = torch.arange(20.0, 0, -1)[::4]
    check(drive(clock, scheduler, scheduler.timesteps, texts()), 2, 5, [20, 16, 12, 8, 4])


def test_img2img_that_does_not_say_where_it_begins():
    """Then the first time that is told is looked up, and no other."""
    scheduler = Scheduler()
    clock = Clock(lambda: scheduler)
    for told in (lambda t: t.clone(), lambda t: t / 1000, TOLD["sigma"]):
        timesteps = scheduler.set_timesteps(begin=None)[2 if told is not TOLD["sigma"] else 0 :]
        moments = []
        for t in timesteps:
            moments += drive(clock, None, [t], texts(), told)
            scheduler.step_index = 6 - len(timesteps) if scheduler.step_index is None else scheduler.step_index + 1
        check(moments, 2, len(timesteps), [float(told(t)) for t in timesteps] if len(timesteps) == 3 else None)
        assert {m.steps for m in moments} == {len(timesteps)}


@pytest.mark.parametrize("end", [1.0, 3.0])
def test_the_first_time_is_not_taken_for_the_last(end):
    """Flow matching's times may end at 1 of 1000, and the transformer is told 1000 / 1000."""
    for counts in (True, False):
        scheduler = Scheduler(counts)
        clock = Clock(lambda: scheduler)
        times = [1000.0, 667.0, 334.0, end]
        check(drive(clock, scheduler, scheduler.set_timesteps(times), texts(), lambda t: t / 1000), 2, 4, [t / 1000 for t in times])


def test_heun_and_rising_times():
    for times in ([1000.0, 700.0, 700.0, 400.0, 400.0, 100.0], [100.0, 300.0, 500.0, 900.0]):
        for told in (lambda t: t, lambda t: t.clone() / 1000):
            scheduler = Scheduler()
            clock = Clock(lambda: scheduler)
            for _ in range(2):
                moments = drive(clock, scheduler, scheduler.set_timesteps(times), texts(), told)
                check(moments, 2, len(times), [float(told(torch.tensor(t))) for t in times])
    scheduler = Scheduler(counts=False)  # DDIM's inversion
    check(drive(Clock(lambda: scheduler), scheduler, scheduler.set_timesteps(times), texts(), torch.clone), 2, 4, times)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_times_that_coincide(dtype):
    """On a schedule of many steps neighbours round to the same number; it is the scheduler that counts."""
    times = numpy.linspace(1000, 990, 50).tolist()
    rounded = torch.tensor([t / 1000 for t in times], dtype=dtype)
    assert len(rounded.unique()) < 50
    scheduler = Scheduler()
    clock = Clock(lambda: scheduler)
    told = lambda t: (t / 1000).to(dtype)
    check(drive(clock, scheduler, scheduler.set_timesteps(times), texts(), told), 2, 50, [t / 1000 for t in times])


class NoReads(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), f"reads: {function}"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("names", [None, ["cond", "uncond"]], ids=["unnamed", "named"])
@pytest.mark.parametrize("name", [*TOLD])
@pytest.mark.parametrize("counts", [True, False])
def test_nothing_is_read_while_a_scheduler_drives(monkeypatch, name, names, counts):
    if not counts and name != "the scheduler's view":
        pytest.skip("Without a count, a copy has to be looked at.")
    monkeypatch.setattr(module, "_on_device", lambda timestep: isinstance(timestep, torch.Tensor))
    scheduler, branches, told = Scheduler(counts), texts(), TOLD[name]
    clock = Clock(lambda: scheduler)
    for _ in range(2):
        timesteps = scheduler.set_timesteps()
        given = [told(t) for t in timesteps]
        if not isinstance(given[0], torch.Tensor):
            pytest.skip("Such a number lies on the host.")
        call = lambda i, b: Call(LATENTS, branches[b], given[i], SimpleNamespace(name=names[b], step_index=None) if names else None)
        clock.tick(call(0, 0)), clock.tick(call(0, 1))
        with NoReads(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "tolist", lambda tensor: pytest.fail("reads a list"))
            moments = []
            for i in range(1, 5):
                scheduler.step()
                moments += [clock.tick(call(i, b)) for b in (0, 1)]
        assert steps(moments, 0) == steps(moments, 1) == [1, 2, 3, 4]
        scheduler.step()


@pytest.mark.parametrize("scheduler", ["none", "never set", "stale", "stale and driven", "copied"])
@pytest.mark.parametrize("told", [float, lambda t: torch.tensor([t, t]), numpy.float64], ids=["python", "tensor", "numpy"])
@pytest.mark.parametrize("device", [False, True])
def test_a_loop_of_ones_own(monkeypatch, scheduler, told, device):
    """Time is told by the call; what cannot be the next step begins a run."""
    own = None if scheduler == "none" else Scheduler()
    clock = Clock(lambda: own)
    if device:
        monkeypatch.setattr(module, "_on_device", lambda timestep: isinstance(timestep, torch.Tensor))
    if "stale" in scheduler:
        timesteps = own.set_timesteps()
        for _ in timesteps:
            if scheduler == "stale and driven":
                clock.tick(Call(LATENTS, texts(1)[0], own.timesteps[own.step_index or 0] / 1000))
            own.step()
    elif scheduler == "copied":
        own.set_timesteps()  # and the loop is driven by the copy
    times = [1.0, 0.75, 0.5, 0.25, 0.125]
    for _ in range(3):
        moments = drive(clock, None, times, texts(), told)
        assert [m.begins for m in moments] == [True] + 9 * [False]
        assert [m.branch for m in moments] == 5 * [0, 1] and [m.step for m in moments] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
        assert [m.time for m in moments[2:]] == [t for t in times[1:] for _ in range(2)]
        assert all(m.steps is None for m in moments[2:]) and (moments[0].steps is None or scheduler == "copied")


def test_a_loop_of_ones_own_after_a_run_that_was_stopped():
    """The scheduler still says where that one was."""
    for told in (lambda t: t, lambda t: t.bfloat16(), lambda t: 5 + torch.log(t)):
        scheduler = Scheduler()
        clock = Clock(lambda: scheduler)
        timesteps = scheduler.set_timesteps()
        drive(clock, scheduler, timesteps[:3], texts(), lambda t: told(t / 1000))
        if told(timesteps[0]) == timesteps[0]:  # a look at the time is for free on the host
            assert clock.tick(Call(LATENTS, torch.ones(5), torch.tensor(1.0))).begins
        moments = drive(clock, None, torch.linspace(1, 0.125, 8), texts(), told)
        begins = [i for i, m in enumerate(moments) if m.begins or m.fresh]
        assert max(begins) < 8 and [m.step for m in moments[-8:]] == [
            s for s in range(moments[-8].step, moments[-8].step + 4) for _ in "ab"
        ]
        assert all(m.time == told(t) for m, t in zip(moments[-8::2], torch.linspace(1, 0.125, 8)[4:], strict=True))


def test_a_loop_in_which_the_time_rises():
    """Only when it rises twice can it be told from the beginning of a run of one step after another."""
    clock = Clock()
    for _ in range(2):
        moments = drive(clock, None, [0.0, 0.25, 0.5, 0.75], texts())
        assert [m.begins for m in moments][::2] == [True, True, False, False] and steps(moments) == [0, 0, 1, 2]
        clock.end()


def test_runs_of_one_step_are_each_a_run():
    clock = Clock()
    assert all(m.begins for m in (clock.tick(Call(LATENTS, text, 1.0)) for text in [texts()[0]] * 3))
    branches = texts(20)  # features of many texts at one time: what belongs to the first is not kept until the last
    clock, kept = Clock(), 0
    for text in branches * 2:
        moment = clock.tick(Call(LATENTS, text, 0.5))
        assert moment.fresh
        kept = 1 if moment.begins else kept + 1
        assert kept <= module.MOST


def test_a_run_that_was_stopped():
    for counts in (True, False):
        scheduler = Scheduler(counts)
        clock, branches = Clock(lambda: scheduler), texts()
        for begin, stop in ((0, 1), (0, 3), (2, 1), (3, 1), (0, 4)):
            drive(clock, scheduler, scheduler.set_timesteps(numpy.linspace(1000, 50, 20), begin)[:stop], branches)
            for begin, fewer in ((0, 4), (2, 5), (4, 5)):  # img2img, weaker and weaker
                times = numpy.linspace(1000, 50, fewer)
                timesteps = scheduler.set_timesteps(times, begin)
                check(drive(clock, scheduler, timesteps, branches), 2, fewer - begin, times[begin:])
                assert clock.why == ""


def test_a_stopped_run_is_over_where_the_pipeline_begins_its_scheduler_anew_without_setting_it():
    scheduler = Scheduler()
    clock, branches = Clock(lambda: scheduler), texts()
    timesteps = scheduler.set_timesteps()
    drive(clock, scheduler, timesteps[:3], branches)
    scheduler.step_index = None
    check(drive(clock, scheduler, timesteps, branches), 2)
    scheduler = Scheduler(counts=False)
    timesteps = scheduler.set_timesteps()
    drive(clock, scheduler, timesteps[:3], branches)
    check(drive(clock, scheduler, timesteps, branches), 2)


TURNS = {
    "features": [(0, 0.5)] * 5,
    "two tiles": [(0, t) for t in (1.0, 0.9, 0.7, 0.45) for _ in range(2)],
    "two tiles of a picture": [(0, t) for t in (0.9, 0.7, 0.45) for _ in range(2)],
    "four tiles of a picture": [(0, t) for t in (0.9, 0.7, 0.45) for _ in range(4)],
    "one tile, then two": [(0, 0.9), *((0, t) for t in (0.7, 0.45) for _ in range(2))],
    "three tiles": [(0, t) for t in (1.0, 0.8, 0.6, 0.4) for _ in range(3)],
    "guidance, then the other tile": [(b, t) for t in (1.0, 0.8, 0.6, 0.4) for _ in range(2) for b in (0, 1)],
    "tiles, then the other branch": [(b, t) for t in (1.0, 0.8, 0.6, 0.4) for b in (0, 1) for _ in range(2)],
    "heun": [(0, t) for t in (1.0, 0.8, 0.8, 0.6, 0.6, 0.4)],
    "bfloat16": [(0, float(torch.tensor(t, dtype=torch.bfloat16))) for t in (0.999, 0.998, 0.997, 0.996, 0.995, 0.994)],
}


@pytest.mark.parametrize("kind", [*TURNS])
@pytest.mark.parametrize("names", [None, ["cond", "uncond"]], ids=["unnamed", "named"])
@pytest.mark.parametrize("driven", [None, torch.float32, torch.bfloat16], ids=["loop", "scheduler", "rounded"])
@pytest.mark.parametrize("told", [lambda t: t, lambda t: 1000 * torch.log(2 + t)], ids=["time", "something else"])
def test_the_same_timestep_again_with_the_same_text(kind, names, driven, told):
    """Whose step comes next is unknown, so no call may build on what another one left: only the first of a time may."""
    scheduler = Scheduler() if driven else None
    clock, branches, seen = Clock(lambda: scheduler), texts(), {}
    if driven:
        scheduler.set_timesteps([1000 * t for t in sorted({t for _, t in TURNS[kind]}, reverse=True)])
    previous = None
    for number, (b, t) in enumerate(TURNS[kind]):
        if driven and previous not in (None, t):
            scheduler.step()
        previous = t
        context = SimpleNamespace(name=names[b], step_index=None) if names else None
        moment = clock.tick(Call(LATENTS, branches[b], told(torch.tensor([t], dtype=driven or torch.float32)), context))
        seen = {} if moment.begins else seen
        if not moment.fresh:  # it goes on from calls of this branch, none of whose times had two pictures
            past = seen[moment.branch]
            assert all(TURNS[kind][:number].count((b, time)) == 1 for time in past), (number, past)
            assert all(time > t for time in past)
        elif moment.branch in seen:
            raise AssertionError("a branch began anew with its old text")
        seen.setdefault(moment.branch, []).append(t)
    assert kind == "bfloat16" or clock.why


def test_again_is_said():
    clock, text = Clock(), texts(1)[0]
    for _ in range(2):
        clock.tick(Call(LATENTS, text, 0.5))
    assert clock.why == AGAIN
    clock.tick(Call(LATENTS, text, 0.9))
    clock.tick(Call(LATENTS, text, 0.95))
    assert clock.why == ROSE or "turned" in clock.why


@pytest.mark.parametrize("driven", [True, False])
@pytest.mark.parametrize("branches", [1, 2])
@pytest.mark.parametrize("named", [True, False])
def test_texts_that_change(driven, branches, named):
    """Replaced on every step, changed in place, and the same again in a new tensor."""
    scheduler = Scheduler() if driven else None
    clock, names = Clock(lambda: scheduler), ["cond", "uncond"]

    def run(text):
        moments = []
        for step, t in enumerate(scheduler.set_timesteps() if driven else torch.tensor(TIMES)):
            for b in range(branches):
                context = SimpleNamespace(name=names[b], step_index=None) if named else None
                moments.append(clock.tick(Call(LATENTS, text(step, b), t, context)))
            if driven:
                scheduler.step()
        assert [m.begins for m in moments] == [True] + [False] * (len(moments) - 1)
        assert [m.branch for m in moments] == list(range(branches)) * 5 and len(clock._branches) == branches
        return [[m.fresh for m in moments if m.branch == b] for b in range(branches)]

    first, always = [True] + 4 * [False], 5 * [True]
    assert run(lambda step, b: torch.full((1, 2), 10.0 * b + step)) == [always] * branches
    assert run(lambda step, b: torch.full((1, 2), float(b))) == [first] * branches
    assert run(lambda step, b: [torch.full((2, 2), float(b))]) == [first] * branches
    kept = texts()
    assert run(lambda step, b: kept[b].add_(1) if step == 3 else kept[b]) == [[True, False, False, True, False]] * branches
    kept = texts()
    assert run(lambda step, b: torch.full((1, 2), 10.0 * b + step) if b == 0 else kept[b])[0] == always
    with torch.inference_mode():
        kept = texts()
    assert run(lambda step, b: kept[b]) == [first] * branches
    if branches == 1:
        assert run(lambda step, b: None) == [first]


def test_a_text_swapped_under_one_name_is_another_branch():
    """As tokens of another prompt would otherwise be built from those of the first."""
    scheduler = Scheduler()
    clock, (red, blue) = Clock(lambda: scheduler), texts()
    fresh = []
    for t, text in zip(scheduler.set_timesteps(), [red, red, blue, blue, red], strict=True):
        fresh.append(clock.tick(Call(LATENTS, text, t, SimpleNamespace(name="cond", step_index=None))).fresh)
        scheduler.step()
    assert fresh == [True, False, True, False, True]


@pytest.mark.parametrize("driven", [True, False])
@pytest.mark.parametrize("known", ["by name", "by text", "by what it holds"])
def test_branches_that_are_left_out_on_some_steps(driven, known):
    scheduler = Scheduler() if driven else None
    clock, branches, names = Clock(lambda: scheduler), texts(3), ["cond", "uncond", "stg"]
    seen = []
    turns = [(0, 1), (0,), (0, 1, 2), (1, 0), (2,)]
    for t, turn in zip(scheduler.set_timesteps() if driven else torch.tensor(TIMES), turns, strict=True):
        for b in turn:
            context = SimpleNamespace(name=names[b], step_index=None) if known == "by name" else None
            text = branches[b].clone() if known == "by what it holds" else branches[b]
            m = clock.tick(Call(LATENTS, text, t, context))
            seen.append((m.branch, m.step, m.fresh))
        if driven:
            scheduler.step()
    expected = [(0, 0, True), (1, 0, True), (0, 1, False), (0, 2, False), (1, 2, False), (2, 2, True)]
    assert seen == [*expected, (1, 3, False), (0, 3, False), (2, 4, False)]


@pytest.mark.parametrize("counts", [True, False])
def test_a_context_that_counts_steps(counts):
    """It knows better than the scheduler, which may lag behind."""
    scheduler = Scheduler(counts)
    clock, branches = Clock(lambda: scheduler), texts()
    scheduler.set_timesteps()
    moments = []
    for i, t in enumerate(TIMES):
        for b, name in enumerate(("cond", "uncond")):
            moments.append(clock.tick(Call(LATENTS, branches[b], torch.tensor(t / 1000), SimpleNamespace(name=name, step_index=i))))
    check(moments, 2, 5, [t / 1000 for t in TIMES])
    assert moments[-1].steps == 5


def test_what_another_thread_or_another_size_leaves_is_not_built_on():
    scheduler = Scheduler()
    clock, text = Clock(lambda: scheduler), texts(1)[0]

    def tick(latents, t):
        return clock.tick(Call(latents, text, t)).begins

    others = [LATENTS[:, :3], LATENTS.double(), LATENTS.to("meta"), [LATENTS[0]]]
    for other in others:
        timesteps = scheduler.set_timesteps()
        assert tick(LATENTS, timesteps[0])
        scheduler.step()
        assert tick(other, timesteps[1]) and "latents changed" in clock.why
        scheduler.step()
        assert not tick(other, timesteps[2])
    assert tick(LATENTS, timesteps[0])
    scheduler.step()
    assert not tick(LATENTS.expand(3, 4, 2), timesteps[1]), "a branch may have a batch of its own"
    begins = []
    thread = threading.Thread(target=lambda: begins.append(tick(LATENTS, timesteps[1])))
    thread.start()
    thread.join()
    assert begins == [True]


def test_end_of_a_run():
    scheduler = Scheduler()
    clock, text = Clock(lambda: scheduler), texts(1)[0]
    timesteps = scheduler.set_timesteps()
    assert clock.tick(Call(LATENTS, text, timesteps[0])).begins
    clock.end()
    scheduler.step()
    moment = clock.tick(Call(LATENTS, text, timesteps[1]))
    assert moment.begins and moment.fresh and moment.step == 0 and clock.why == "" and moment.time == 800 and moment.steps == 4


REAL = [
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
    *(
        "EulerDiscreteScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
        "LMSDiscreteScheduler",
        "DEISMultistepScheduler",
    ),
    *("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "DDIMInverseScheduler"),
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "LCMScheduler", "SASolverScheduler", "TCDScheduler", "EDMEulerScheduler"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("stop", [1, 4, None])
def test_schedulers_of_diffusers(name, stop):
    """Whatever is done with their times, every call of the transformer is the next step of its run."""
    scheduler = getattr(diffusers, name)()
    for told in (lambda t: t.expand(2), lambda t: t[None] / 1000, lambda t: t.clone()):
        clock, branches = Clock(lambda: scheduler), texts()
        for count in (6, 9):
            scheduler.set_timesteps(count)
            sample, kinds, old = torch.ones(1, 4, 8, 8), [], None
            for i, t in enumerate(scheduler.timesteps[: stop if count == 6 else None]):
                kinds += [clock.tick(Call(LATENTS, text, told(t))) for text in branches]
                if name == "CogVideoXDPMScheduler":
                    back = scheduler.timesteps[i - 1] if i else None
                    sample, old = scheduler.step(0.1 * sample, old, t, back, sample, return_dict=False)[:2]
                else:
                    sample = scheduler.step(0.1 * sample, t, sample, return_dict=False)[0]
        if not hasattr(scheduler, "step_index") and (told(t) <= 1).all() or name == "PNDMScheduler" and told(t).ndim == 0:
            continue  # copies of times that repeat cannot be told apart
        check(kinds, 2, len(scheduler.timesteps))
