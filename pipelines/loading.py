"""Load a pipeline by name, hub id or path, on a sensible device in a sensible dtype, or say in one sentence why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from dit_accel.pipelines.catalog import CATALOG, SUPPORTED, find, suggestion

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOAD = ("none", "model", "group", "sequential")


class LoadError(RuntimeError):
    """The pipeline cannot be loaded; the message says in a sentence what to do."""


class NoSuchPipeline(LoadError, ValueError):
    """What was asked for is no pipeline, or none that is supported."""


def load(name_or_path: str, dtype: str = "auto", device: str = "auto", offload: str = "none") -> Any:
    """Load a FLUX or PixArt pipeline.

    Args:
        name_or_path: a name of the catalog, a hub id, or a folder in diffusers format.
        dtype: "auto", "float32", "bfloat16" or "float16".
        device: "auto" or a torch device such as "cpu", "cuda", "cuda:1", "mps".
        offload: "none", "model" (one whole model on the device at a time), "group" (a few layers at a time, ahead of use)
            or "sequential" (one layer at a time: least memory, slowest).

    Raises:
        NoSuchPipeline: a name that is unknown, or what is no FLUX or PixArt pipeline; a LoadError, too.
        LoadError: missing weights, no access, no connection.
        ValueError: an option that does not exist or cannot be had on this machine.
    """
    place, kind = understand(dtype, device, offload)
    entry = find(name_or_path)
    source = entry.source if entry else name_or_path
    class_name = read_class(source)
    import diffusers  # takes seconds, and is not needed to find out that a name is wrong

    with explained(source):
        pipe = getattr(diffusers, class_name).from_pretrained(source, dtype=kind)
    if offload == "model":
        pipe.enable_model_cpu_offload(device=place)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=place)
    elif offload == "group":
        pipe.enable_group_offload(place, offload_type="leaf_level", use_stream=place.type == "cuda")
    else:
        pipe.to(place)
    return pipe


def understand(dtype: str, device: str, offload: str) -> tuple[torch.device, torch.dtype]:
    """The device and dtype that these options mean on this machine; ValueError if they are not available."""
    place = pick_device(device)
    if offload not in OFFLOAD:
        raise ValueError(f"offload is {offload!r}; choose one of {', '.join(OFFLOAD)}.")
    if offload != "none" and place.type == "cpu":
        raise ValueError(f"offload {offload!r} needs a GPU, but the device is the CPU; use none.")
    return place, pick_dtype(dtype, place)


def pick_device(device: str) -> torch.device:
    """The device of this name; "auto" is the first that exists of cuda, mps, cpu."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device is {device!r}; use auto, cpu, cuda, cuda:1 or mps.") from None
    if place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"The device {device} does not exist here: torch sees {torch.cuda.device_count()} CUDA device(s).")
    if place.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("The device mps does not exist here; use auto or cpu.")
    return place


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of this name; "auto" is float32 on the CPU, else bfloat16, or float16 where bfloat16 is not computed."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; choose auto or one of {', '.join(DTYPES)}.")
        return DTYPES[dtype]
    if device.type == "cpu":
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.float16
    return torch.bfloat16


def read_class(source: str) -> str:
    """Name of the pipeline class in model_index.json of a folder or a hub repository; only supported ones are returned."""
    folder = Path(source)
    embedded = {entry.source: entry.name for entry in CATALOG.values() if entry.embedded}
    if source in embedded and not folder.exists():
        raise LoadError(f"The embedded pipeline {embedded[source]} is missing from {folder.parent}: install dit-accel again.")
    if folder.exists():
        path = folder / "model_index.json"
        if not path.is_file():
            raise NoSuchPipeline(
                f"{source} is not a pipeline in diffusers format: it has no model_index.json; give the folder that has one."
            )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        with explained(source):
            path = Path(hf_hub_download(source, "model_index.json"))
    else:
        raise NoSuchPipeline(
            f"There is no pipeline {source!r}.{suggestion(source)} Give one of {', '.join(CATALOG)}, "
            "a folder that exists, or a hub id such as owner/name."
        )
    class_name = str(json.loads(path.read_text(encoding="utf-8")).get("_class_name"))
    if class_name not in SUPPORTED:
        raise NoSuchPipeline(f"{source} is a {class_name}, which is not supported: give a pipeline of {', '.join(SUPPORTED)}.")
    return class_name


@contextmanager
def explained(source: str) -> Iterator[None]:
    """Turn what goes wrong between here and the weights into one sentence; anything else goes through as it is."""
    try:
        yield
    except GatedRepoError as error:
        raise LoadError(
            f"{source} is gated: accept its terms on https://huggingface.co/{source}, then log in with `hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise NoSuchPipeline(
            f"The hub has no repository {source}, or it is private: check the name, or log in with `hf auth login`."
            f"{suggestion(source)}"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise LoadError(
            f"{source} is not on this machine and the hub cannot be reached: check the connection (and HF_HUB_OFFLINE), "
            f"or use an embedded pipeline such as emoji-flux.{suggestion(source)}"
        ) from error
    except EntryNotFoundError as error:
        raise LoadError(f"{source} lacks a file that a pipeline in diffusers format has: {first_sentence(error)}") from error
    except HfHubHTTPError as error:
        raise LoadError(f"The hub refused {source}: {first_sentence(error)}") from error
    except OSError as error:  # diffusers and transformers raise it for files that are missing or cannot be read
        raise LoadError(f"{source} is incomplete or cannot be read: {first_sentence(error)}") from error


def first_sentence(error: BaseException) -> str:
    """The first line of an error, without line breaks, ending in a period."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".: ") + "."
