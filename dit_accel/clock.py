"""Which run, step, time and guidance branch a call of a transformer belongs to.

A pipeline's scheduler knows all of it on the host: its `timesteps` are another tensor in every run, and its `step_index` moves on
between steps. So nothing is read from the device, except on the first step of a run. Where no scheduler drives the calls (a
sampling loop of one's own), the time is read from the call's argument, and what cannot be the next step of the same run starts
afresh.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_accel import spaces

# How transformers are told the time that their scheduler calls t.
ARGUMENTS: tuple[Callable[[float], float], ...] = (lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000)
AGAIN = "the transformer was called again at the same timestep with the same text"
ROSE = "the time rose"
ANEW = "the scheduler was set anew"
MOST = 16  # guidance branches


@dataclass(frozen=True)
class Call:
    """What is known of a call before it is carried out; text tells branches apart; of a timestep the last element counts."""

    latents: Any
    text: Any
    timestep: Any
    context: Any = None


@dataclass(frozen=True)
class Moment:
    """Where a call lies."""

    begins: bool  # whether a run begins here: everything remembered belongs to another one
    fresh: bool  # whether this branch begins here, or begins anew because its text changed
    branch: int  # number of the guidance branch, in the order in which the run met them
    step: int  # from 0, where the run began
    time: float  # as the transformer is told it
    steps: int | None  # of the whole run; None if unknown
    times: tuple[float, ...] = ()  # of all steps; empty if unknown
    levels: tuple[tuple[float, float], ...] = ()  # alpha and sigma of all steps, as the scheduler has them; empty if unknown
    predicts: str = ""  # what the transformer predicts: a key of spaces.IMPLIED


@dataclass(eq=False)
class _Branch:
    name: str | None
    text: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]  # how often they were written to
    step: int  # of its last call
    time: float
    again: bool = False  # whether it was called more than once at that time


@dataclass
class Clock:
    """Follows the calls of one transformer. `why` says why the last run began amid another, or is empty."""

    scheduler: Callable[[], Any] = lambda: None
    why: str = ""
    _branches: list[_Branch] = field(default_factory=list)
    _running: bool = False
    _signature: tuple[Any, ...] = ()
    _timesteps: Any = None  # the scheduler's own, kept so that no other can be taken for it
    _times: tuple[float, ...] = ()  # as the transformer is told them
    _levels: tuple[tuple[float, float], ...] = ()  # likewise
    _predicts: str = ""
    _driven: bool = False  # by the scheduler
    _told: bool = False  # whether the transformer is told what ARGUMENTS makes of the scheduler's times
    _start: int = 0  # index of the run's first step
    _step: int = 0
    _time: float = float("nan")
    _direction: int = 0  # of the time where nothing drives; 0 while only one is known

    def end(self) -> None:
        """The run is over; the next call begins another."""
        self._running, self._branches = False, []

    def tick(self, call: Call) -> Moment:
        """Where this call lies."""
        latents = call.latents if isinstance(call.latents, (list, tuple)) else [call.latents]
        # Without the batch: a branch of its own may be called with another one.
        signature = (threading.get_ident(), *((t.shape[1:], t.dtype, t.device) for t in latents[:1]))
        index, why = self._index(call)
        if self._running and signature != self._signature:
            why = "the shape, type or device of the latents changed, or another thread called"
        time = self._times[index] if index is not None else _number(call.timestep)
        text = tuple(
            t for t in (call.text if isinstance(call.text, (list, tuple)) else (call.text,)) if isinstance(t, torch.Tensor)
        )
        versions, name = tuple(-1 if t.is_inference() else t._version for t in text), getattr(call.context, "name", None)
        branch = self._find(name, text, index, time) if self._running and not why else None
        still = branch is not None and index is not None and branch.step == index - self._start
        if still:  # the scheduler has not moved on between two calls of one branch: it does not drive them
            self._driven, index, expected, time = False, None, time, _number(call.timestep)
            why = AGAIN if not self._told or _near(expected, time) else ""  # half precision rounds down, too
        if index is None and self._running and not why:
            why = self._against(time, branch)
        again = why == AGAIN and (still or time == self._time)
        if self._running and not why and branch is None and len(self._branches) == MOST:
            why = f"the transformer was called with more than {MOST} texts at a time"
        if begins := bool(why) or not self._running:
            self.why, self._branches, branch = why if why != ANEW else "", [], None
            self._running, self._signature, self._start = True, signature, index or 0
            self._step = self._direction = 0
        elif index is not None:
            self._step = index - self._start
        elif time != self._time:
            self._step, self._direction = self._step + 1, 1 if time > self._time else -1
        self._time = time
        known = branch is not None and (branch.versions == versions if _same(branch.text, text) else _equal(branch.text, text))
        if branch is None:
            self._branches.append(branch := _Branch(name, text, versions, self._step, time))
        branch.text, branch.versions, branch.step, branch.time, branch.again = text, versions, self._step, time, again
        place, number = self._branches.index(branch), self._step
        if index is None:
            return Moment(begins, not known, place, number, time, None)
        times, levels = self._times[self._start :], self._levels[self._start :]
        return Moment(begins, not known, place, number, time, len(times), times, levels, self._predicts)

    def _index(self, call: Call) -> tuple[int | None, str]:
        """The scheduler's step, or None where it cannot be trusted; and why a run begins, where that is seen from it."""
        scheduler, why = self.scheduler(), ""
        timesteps = getattr(scheduler, "timesteps", None)
        if timesteps is None or getattr(scheduler, "num_inference_steps", None) is None:
            return None, ""
        if timesteps is not self._timesteps:
            self._timesteps, self._times, self._driven = timesteps, tuple(map(float, timesteps.tolist())), True
            self._levels, self._predicts = spaces.levels_of(scheduler, list(self._times)), spaces.predicted_by(scheduler)
            why = ANEW
        if not self._driven:
            return None, why
        index = getattr(call.context, "step_index", None)
        if index is None:
            index = _place(call.timestep, timesteps)
        counts = hasattr(scheduler, "step_index")
        if index is None and counts:
            index = scheduler.step_index if scheduler.step_index is not None else getattr(scheduler, "begin_index", None)
            index = self._start if index is None and not why else index
        if why:
            index = self._read(index, _number(call.timestep), counts)
        elif index is None or (self._told and not _on_device(call.timestep)):
            index = self._checked(index, _number(call.timestep))
        if index is None or index >= len(self._times):
            self._driven = False
            return None, why or ("" if self._told else "the scheduler no longer tells the time")
        if self._running and not why and index < self._start + self._step:
            why = "the scheduler went back"
        return index, why

    def _read(self, index: int | None, number: float, counts: bool) -> int | None:
        """The step of a run's first call, told this number; from now on times are what the transformer is told."""
        times = self._times
        for place in (0, None) if index is None else (index,):
            for argument in ARGUMENTS:
                self._times = tuple(argument(t) for t in times)
                if (found := self._checked(place, number)) is not None:
                    self._told = True
                    return found
        self._times, self._told = times, False  # told something else altogether: the scheduler's moving on is what counts
        return 0 if index is None and counts else index

    def _checked(self, index: int | None, number: float) -> int | None:
        """The step if the transformer may be told this number there; of a scheduler that counts no steps, the step it is told."""
        if index is None:
            away = [abs(t - number) for t in self._times]
            index = away.index(min(away))
        return index if index < len(self._times) and _near(self._times[index], number) else None

    def _against(self, time: float, branch: _Branch | None) -> str:
        """Why this time cannot be that of the next step; empty if it can."""
        if branch is not None and (branch.again or branch.time == time):
            return AGAIN  # several pictures take turns, perhaps: which of them comes next, nobody knows
        direction = (time > self._time) - (time < self._time)
        if direction * self._direction < 0:
            return "the time turned back"
        if direction > 0 and not self._direction and self.why != ROSE:
            return ROSE  # only when it rises again, this is a run in which it rises
        return ""

    def _find(self, name: str | None, text: tuple[torch.Tensor, ...], index: int | None, time: float) -> _Branch | None:
        """By name; else by the very tensors of the text; else by what they hold; else by its turn among the calls of a step."""
        if name is not None:
            return next((b for b in self._branches if b.name == name), None)
        unnamed = [b for b in self._branches if b.name is None]
        for same in (_same, _equal):
            if found := next((b for b in unnamed if same(b.text, text)), None):
                return found
        return next((b for b in unnamed if (b.step != index - self._start if index is not None else b.time != time)), None)


def _place(timestep: Any, timesteps: torch.Tensor) -> int | None:
    """Index of a timestep that is a view of the scheduler's own."""
    if not isinstance(timestep, torch.Tensor) or not isinstance(timesteps, torch.Tensor) or timestep.dtype != timesteps.dtype:
        return None
    if timestep.is_meta or timestep.device != timesteps.device or timestep.ndim > 1:
        return None
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return None
    index, rest = divmod(int(timestep.storage_offset() - timesteps.storage_offset()), timesteps.stride(0))
    return index if 0 <= index < len(timesteps) and not rest else None


def _on_device(timestep: Any) -> bool:
    return isinstance(timestep, torch.Tensor) and timestep.device.type != "cpu"


def _same(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    """Whether these are the very same tensors, whatever was written to them since."""
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _equal(some: tuple[torch.Tensor, ...], others: tuple[torch.Tensor, ...]) -> bool:
    """Whether they hold the same."""

    def equal(a: torch.Tensor, b: torch.Tensor) -> bool:
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and bool(torch.equal(a, b))

    return len(some) == len(others) and all(map(equal, some, others))


def _number(timestep: Any) -> float:
    if not isinstance(timestep, torch.Tensor):
        return float(timestep)
    return float(timestep.reshape(-1)[-1]) if not timestep.is_meta else float("nan")


def _near(expected: float, number: float) -> bool:
    """Half precision rounds, and some models cut fractions off."""
    return abs(expected - number) <= max(0.01 * abs(expected), 1.0 if expected > 10 else 0.004)
