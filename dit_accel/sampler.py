"""A run with other steps than its pipeline is asked for: fewer, or elsewhere along the scheduler's own schedule."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np

from dit_accel.config import OutputCacheConfig
from dit_accel.recipe import Recipe
from dit_accel.spaces import is_flow


class Sampler:
    """Stands before a scheduler's `set_timesteps`. A copy of the scheduler has a copy of its own.

    Attributes:
        asked: steps that the pipeline asked for in its last run; 0 before.
    """

    def __init__(self, scheduler: Any, chosen: OutputCacheConfig | Recipe) -> None:
        self.stock, self.chosen, self.asked = scheduler.set_timesteps, chosen, 0
        self.__signature__ = inspect.signature(self.stock)  # pipelines look at it

    def attach(self) -> None:
        self.stock.__self__.set_timesteps = self

    def detach(self) -> None:
        vars(self.stock.__self__).pop("set_timesteps", None)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Set the scheduler as it is asked to be, and from there to its other steps; ValueError if it cannot be."""
        self.stock(*args, **kwargs)
        scheduler, given = self.stock.__self__, self.__signature__.bind(*args, **kwargs).arguments
        self.asked = asked = int(scheduler.num_inference_steps)
        config = self.chosen.of(asked) if isinstance(self.chosen, Recipe) else self.chosen
        steps = config.sampler_steps
        assert steps is not None
        shares = np.arange(steps) / steps if isinstance(steps, int) else np.array(steps)

        def along(values: Any) -> Any:
            """Of values of the steps that were asked for, and one where they end."""
            return np.interp(shares * asked, np.arange(asked + 1), values)

        if set_by_pipeline := [name for name in ("sigmas", "timesteps") if given.get(name) is not None]:
            given |= {name: along([*given[name], 0.0]) for name in set_by_pipeline} | {"num_inference_steps": len(shares)}
        elif isinstance(steps, int):
            given["num_inference_steps"] = steps
        elif getattr(scheduler, "order", 1) > 1:
            raise ValueError(f"{type(scheduler).__name__} takes several calls for a step: give sampler_steps as one number.")
        elif is_flow(scheduler):  # whose times are the noise levels
            levels = scheduler.sigmas.tolist()
            times = [*scheduler.timesteps.tolist(), levels[-1] * scheduler.config.num_train_timesteps]
            scheduler.sigmas = scheduler.sigmas.new_tensor([*along(levels), levels[-1]])
            scheduler.timesteps = scheduler.timesteps.new_tensor(along(times))
            scheduler.num_inference_steps = len(shares)
            return
        elif "timesteps" in self.__signature__.parameters:
            times = along([*scheduler.timesteps.tolist(), 0.0])
            given |= {"timesteps": times.round().astype(int).tolist(), "num_inference_steps": None}
        else:
            raise ValueError(f"{type(scheduler).__name__} takes no timesteps of one's own: give sampler_steps as one number.")
        self.stock(**given)
