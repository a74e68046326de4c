"""The machine a run is on: what its seconds depend on, and that only one process works in a folder."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from dit_accel.pipelines.pictures import write_atomically


class InUse(ValueError):
    """Another process is working in the folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes from working in a folder, inside a `with` block. The lock of a process that died is free.

    Raises:
        InUse: another process has the lock; the message names it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / "running.json"
    lock = FileLock(folder / "run.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InUse(f"{folder} is in use by {_owner(name)}; wait until that is done, stop it, or give another --output.") from None
    try:
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        write_atomically(name, json.dumps(owner).encode())
        yield
    finally:
        name.unlink(missing_ok=True)
        lock.release()


def _owner(name: Path) -> str:
    try:
        owner = json.loads(name.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun, or ended
        return "another process"


def hardware(device: str) -> dict[str, Any]:
    """What the seconds depend on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else processor()
    return {
        "hardware": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)$", info.read_text(), re.MULTILINE) if info.is_file() else []
    return names[0] if names else platform.processor() or platform.machine() or sys.platform
