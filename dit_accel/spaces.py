"""The picture that an output implies, at the noise level of its step: what samplers of the DPM-Solver++ kind extrapolate.

At a step, latents are alpha * picture + sigma * noise, and a transformer predicts the noise, the picture, or a mixture of both
(Salimans and Ho, ICLR 2022; Lu et al., arXiv 2211.01095). Then picture = a * latents + b * output, with numbers of the step.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

END = 1e-3  # the least share of signal or noise that is told from none

# By what a scheduler calls it: a and b, from alpha and sigma.
IMPLIED: dict[str, Callable[[float, float], tuple[float, float]]] = {
    "flow_prediction": lambda alpha, sigma: (1.0, -sigma),
    "reversed": lambda alpha, sigma: (1.0, sigma),  # the same with the other sign, where the time rises as the noise falls
    "v_prediction": lambda alpha, sigma: (alpha, -sigma),
    "epsilon": lambda alpha, sigma: (1 / alpha, -sigma / alpha),
    "sample": lambda alpha, sigma: (0.0, 1.0),
}


def levels_of(scheduler: Any, timesteps: list[float]) -> tuple[tuple[float, float], ...]:
    """alpha and sigma of every step, as the scheduler has them; empty if it does not tell."""
    config = getattr(scheduler, "config", {})
    if is_flow(scheduler):
        most = float(config.get("num_train_timesteps", 1000))
        pairs = [(1 - time / most, time / most) for time in timesteps]
    elif (alphas := getattr(scheduler, "alphas_cumprod", None)) is not None:
        kept = alphas[[min(int(time), len(alphas) - 1) for time in timesteps]].tolist()
        pairs = [(math.sqrt(share), math.sqrt(1 - share)) for share in kept]
    else:
        return ()
    return tuple((max(alpha, END), max(sigma, END)) for alpha, sigma in pairs)


def predicted_by(scheduler: Any) -> str:
    """What the transformer predicts, as a key of IMPLIED."""
    return "flow_prediction" if is_flow(scheduler) else str(getattr(scheduler, "config", {}).get("prediction_type", "epsilon"))


def is_flow(scheduler: Any) -> bool:
    """Whether it is one of flow matching."""
    return "Flow" in type(scheduler).__name__ or bool(getattr(scheduler, "config", {}).get("use_flow_sigmas"))


def implied(output: torch.Tensor, latents: torch.Tensor, numbers: tuple[float, float]) -> torch.Tensor:
    """The picture, in float32. Of twice as many channels, the second half are no part of it and stay: a learned variance.

    Raises:
        ValueError: if the output is not like the latents.
    """
    a, b = numbers
    mean, more = _parts(output, latents)
    return torch.cat([a * latents[-len(output) :].float() + b * mean.float(), *(part.float() for part in more)], 1)


def output_of(picture: torch.Tensor, latents: torch.Tensor, numbers: tuple[float, float]) -> torch.Tensor:
    """The inverse of `implied`, in the type of the latents."""
    a, b = numbers
    mean, more = _parts(picture, latents)
    return torch.cat([(mean - a * latents[-len(picture) :].float()) / b, *more], 1).to(latents.dtype)


def _parts(output: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    if output.shape[1:] == latents.shape[1:]:
        return output, ()
    channels = latents.shape[1]
    if output.shape[1] != 2 * channels or output.shape[2:] != latents.shape[2:]:
        raise ValueError(
            f"space='data' needs an output like the latents, but here they have the shapes {tuple(output.shape)} and "
            f"{tuple(latents.shape)}; use space='output'."
        )
    return output[:, :channels], (output[:, channels:],)
