"""The pipelines that are known by name, and what each is best called with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dit_accel.names import meant

SUPPORTED = ("FluxPipeline", "PixArtSigmaPipeline", "PixArtAlphaPipeline")


def samples_folder() -> Path:
    """Where the embedded pipelines lie: beside the package in a checkout, inside it in an installation."""
    inside = Path(__file__).parent / "samples"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "samples"


@dataclass(frozen=True)
class Entry:
    """One pipeline, the settings it was made for, and a shorter name. `size` is the side of the square picture, in pixels."""

    name: str
    pipeline_class: str
    about: str
    steps: int
    guidance: float
    size: int
    max_sequence_length: int
    embedded: bool = False
    alias: str = ""

    @property
    def source(self) -> str:
        """A folder for an embedded pipeline, else the hub id."""
        return str(samples_folder() / self.name) if self.embedded else self.name


CATALOG: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        Entry("emoji-flux", "FluxPipeline", "small FLUX trained on emoji, no download", 28, 3.5, 128, 24, embedded=True),
        Entry("emoji-pixart", "PixArtSigmaPipeline", "small PixArt trained on emoji, no download", 20, 3.0, 128, 24, embedded=True),
        Entry("black-forest-labs/FLUX.1-dev", "FluxPipeline", "12 B parameters, gated", 50, 3.5, 1024, 512, alias="flux-dev"),
        Entry(
            "black-forest-labs/FLUX.1-schnell",
            "FluxPipeline",
            "12 B parameters, four steps",
            4,
            0.0,
            1024,
            256,
            alias="flux-schnell",
        ),
        Entry(
            "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",
            "PixArtSigmaPipeline",
            "0.6 B parameters",
            20,
            4.5,
            1024,
            300,
            alias="pixart-sigma",
        ),
        Entry(
            "PixArt-alpha/PixArt-XL-2-1024-MS", "PixArtAlphaPipeline", "0.6 B parameters", 20, 4.5, 1024, 120, alias="pixart-alpha"
        ),
    )
}


def find(name_or_path: str) -> Entry | None:
    """The entry of a name, an alias, a hub id, or the folder of an embedded pipeline; None for any other pipeline."""
    for entry in CATALOG.values():
        if name_or_path and name_or_path in (entry.name, entry.alias):
            return entry
    path = Path(name_or_path).resolve()
    return next((e for e in CATALOG.values() if e.embedded and Path(e.source).resolve() == path), None)


def suggestion(name: str) -> str:
    """ " Did you mean emoji-flux?" for a name that is nearly one of the catalog; "" for any other."""
    return meant(name, [known for entry in CATALOG.values() for known in (entry.name, entry.alias) if known], likeness=0.75)
