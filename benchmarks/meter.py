"""Multiply-adds and memory of what is really executed, on a CPU or a GPU, at a few microseconds an operation.

    with Meter() as meter:
        model(**inputs)
    meter.flops, meter.peak_bytes

torch's own FlopCounterMode takes attention on a CPU for nothing and costs several times as much.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    """Queries x keys x both widths; [B, H, Q or K, D] each. Causal attention counts in full, as in torch's own counter."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def vector_flops(left: torch.Size, *_: Any, **__: Any) -> int:
    """Matrix or vector [..., K] times a vector [K]."""
    return 2 * left.numel()


# What torch's counter takes for 0; it is given shapes in place of tensors.
FORMULAS: dict[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    aten._scaled_dot_product_fused_attention_overrideable: attention_flops,
    aten.mv: vector_flops,
    aten.dot: vector_flops,
}
# Their schemas lie: these return the storage of their input without saying so, and `torch.tensor` a new one as if it were old.
OLD, NEW = {aten._unsafe_view, aten.unsafe_split, aten.unsafe_split_with_sizes, aten.lift}, {aten.lift_fresh}
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA", "meta": "Meta"}


@dataclass(frozen=True)
class Plan:
    """What is to be done at one operation.

    composite: device types on which it has no kernel but is made of other operations, which are counted instead.
    formula: its FLOPs; called with shapes, or with the tensors themselves if it is `raw`.
    allocates: whether its outputs may be storages that were not there before.
    """

    composite: frozenset[str]
    formula: Callable[..., int] | None
    raw: bool
    allocates: bool


def plan_for(operation: Any) -> Plan:
    packet, name = operation.overloadpacket, operation.name()
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    composite = {device for device, key in DISPATCH_KEYS.items() if not has_kernel(name, key)}
    counted = FORMULAS.get(packet) or flop_registry.get(packet)
    own = counted is None or packet in FORMULAS
    shapes_only = None if own else getattr(counted, "__wrapped__", None)  # without the wrapper, which costs 10 us a call
    fresh = any(value.alias_info is None and "Tensor" in str(value.type) for value in operation._schema.returns)
    return Plan(
        composite=frozenset(composite if counted is None and has_kernel(name, "CompositeImplicitAutograd") else ()),
        formula=shapes_only or counted,
        raw=not own and shapes_only is None,
        allocates=packet in NEW or (fresh and packet not in OLD),
    )


PLANS: dict[Any, Plan] = {}


class Storage(weakref.ref):  # type: ignore[type-arg]
    """A storage that was allocated inside the meter."""

    __slots__ = ("address", "size")


class Meter(TorchDispatchMode):
    """Counts operations on tensors from `with Meter() as meter:` to the end of the block, whatever the gradient mode.

    `flops` and `peak_bytes` do not count what torch does not dispatch: scratch memory inside a kernel, kernels of other
    libraries without an operation of torch (their outputs count if torch allocates them), and what `torch.compile` fused.

    Attributes:
        flops: 2 for every multiply-add of matrix products, convolutions and attention; causal attention counts in full.
        live_bytes: sizes of the storages that were allocated inside the block, on any device but meta, and are alive now, after
            the block too. Views cost nothing; what was there before the block does not count, nor what an allocator rounds up.
        peak_bytes: the most that `live_bytes` was inside the block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.live_bytes = self.peak_bytes = 0
        self._alive: dict[int, Storage] = {}  # by address

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        plan = PLANS.get(func)
        if plan is None:
            plan = PLANS[func] = plan_for(func)
        if plan.composite and device_of(args) in plan.composite:  # so it is under inference_mode
            with self:
                return func.decompose(*args, **kwargs)
        output = func(*args, **kwargs)
        if plan.formula is not None:
            if plan.raw:
                self.flops += plan.formula(*args, **kwargs, out_val=output)
            else:
                shapes = [arg.shape if isinstance(arg, torch.Tensor) else arg for arg in args]
                self.flops += plan.formula(*shapes, **kwargs, out_shape=getattr(output, "shape", None))
        if plan.allocates:
            for tensor in (output,) if isinstance(output, torch.Tensor) else output:
                if isinstance(tensor, torch.Tensor):
                    self._count(tensor.untyped_storage())
        return output

    def _count(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._alive or storage.device.type == "meta":
            return
        entry = Storage(storage, self._forget)
        entry.address, entry.size = address, storage.nbytes()
        self._alive[address] = entry
        self.live_bytes += entry.size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, entry: Storage) -> None:
        del self._alive[entry.address]
        self.live_bytes -= entry.size


def device_of(args: tuple[Any, ...]) -> str:
    """Device type of the first tensor among the arguments; "cpu" if there is none."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            return arg.device.type
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], torch.Tensor):
            return arg[0].device.type
    return "cpu"
