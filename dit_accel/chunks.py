"""How much of something large exists at the same time: little on a CPU, much where every kernel has to be launched."""

import torch

SMALL = ("cpu",)  # device types on which the numbers of rows hold as they are
MORE = 16  # times as much on any other: 1,024 queries of FLUX.1-dev at 1024 px take 450 MB


def at_once(rows: int, device: torch.device) -> int:
    """How many rows on this device, where a CPU has so many."""
    return rows if device.type in SMALL else MORE * rows
