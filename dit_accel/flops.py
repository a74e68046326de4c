"""FLOPs of the calls of a run, counted on a weightless copy of the transformer: 2 for every multiply-add, attention included."""

import contextlib
import functools
import unittest.mock
from dataclasses import fields, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from dit_accel import hook
from dit_accel.clock import Moment
from dit_accel.engine import Engine
from dit_accel.plan import Record, StepPlan, Todo
from dit_accel.when import Matched, Mode

_KNOWN: dict[Any, dict[Any, int]] = {}  # counted already, by what is applied to what: a whole session asks the same few


class FlopCounter:
    """Replays plans on the meta device: the model's own code and the engine's, without arithmetic or memory.

    Adapters (LoRA, IP-Adapter) are not part of the copy and not counted.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inputs, transformer = engine, dict(engine.inputs), engine.transformer
        self.build, self.settings = type(transformer).from_config, transformer.config
        self.known = _KNOWN.setdefault((self.build, str(sorted(self.settings.items())), engine.settings(), str(engine.run)), {})

    @functools.cached_property
    def twin(self) -> Any:
        with torch.device("meta"):
            return self.engine.twin(self.build(self.settings).eval())

    def call(self, call: Record) -> int:
        """FLOPs of a call."""
        return self._count(call.branch, StepPlan(**{field.name: getattr(call, field.name) for field in fields(StepPlan)}))

    def plain(self, call: Record) -> int:
        """What it would cost if nothing were applied."""
        return self._count(call.branch, StepPlan(Mode.PLAIN))

    def _count(self, branch: int, plan: StepPlan) -> int:
        if plan.rows == 0:
            return 0
        given, plan = self.inputs[branch], replace(plan, weights=(1.0,), difference=())  # which make no difference
        key = tuple((name, v.shape) for name, v in given.items() if isinstance(v, torch.Tensor)), plan
        if key not in self.known:
            self.twin.end()
            memory = self.twin.new_branch()
            if plan.mode is Mode.PARTIAL or Matched.BEFORE in plan.matched:  # after a full step
                here = tuple(Matched.HERE if how is Matched.BEFORE else how for how in plan.matched)
                self._flops(memory, replace(plan, mode=Mode.FULL, rows=1.0, counts=(), matched=here), given)
            self.known[key] = self._flops(memory, plan, given)
        return self.known[key]

    def _flops(self, memory: Any, plan: StepPlan, given: dict[str, Any]) -> int:
        numbers: Any = _Numbers  # which carries no types
        # Mochi asks for float32, which the copy has; torch knows no autocast without numbers.
        no_autocast = unittest.mock.patch.object(torch, "autocast", lambda *_: contextlib.nullcontext())
        with torch.no_grad(), no_autocast, numbers(), FlopCounterMode(display=False) as counter:
            todo, args = Todo(), ()
            if plan.mode is Mode.PLAIN:
                self.twin.plain()
            else:
                todo = self.twin.carry_out(plan, memory, Moment(False, False, 0, 0, 0.0, None), hook.call_of(given))
            if todo.change is not None:
                args, given = todo.change((args, given))
            with todo.within:
                self.twin.transformer(*args, **given)
        return int(counter.get_total_flops())


class _Numbers(TorchDispatchMode):
    """Whole numbers and masks are really there, so that a forward may look at them, until they meet a tensor without numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        nest = (args, kwargs or {})
        devices = {leaf.device.type for leaf in torch.utils._pytree.tree_leaves(nest) if isinstance(leaf, torch.Tensor)}
        if devices == {"cpu", "meta"}:
            nest = tree_map_only(torch.Tensor, lambda t: t.to("meta"), nest)
        return func(*nest[0], **nest[1])
