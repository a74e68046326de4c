"""Commands that list pipelines, selectors and families."""

from __future__ import annotations

from dit_accel.pipelines.options import AsJson
from dit_accel.pipelines.terminal import plain_errors, show


def pipelines(as_json: AsJson = False) -> None:
    """List the pipelines known by name. Any other FLUX or PixArt checkpoint works by its hub id or folder."""
    from rich.table import Column, Table

    from dit_accel.pipelines.catalog import CATALOG

    table = Table(Column("name", overflow="fold"), Column("alias", no_wrap=True), "class", "steps", "guidance", "size", "about")
    for entry in CATALOG.values():
        size = f"{entry.size} x {entry.size}"
        table.add_row(entry.name, entry.alias, entry.pipeline_class, f"{entry.steps}", f"{entry.guidance:g}", size, entry.about)
    show(table, as_json)


def selectors(as_json: AsJson = False) -> None:
    """List the selectors: which tokens a partial step computes."""
    with plain_errors():
        from rich.table import Table

        import dit_accel

        table = Table("name", "chooses")
        for name, description in dit_accel.selectors().items():
            table.add_row(name, description)
        show(table, as_json)


def families(as_json: AsJson = False) -> None:
    """List the supported transformers of diffusers, and what works on each."""
    with plain_errors():
        from rich.table import Table

        from dit_accel.families.table import FAMILIES, MODULE_SCOPE

        table = Table(
            *("family", "transformer", "forecast", "guidance", "packed, reuse", "packed, fresh", "module scope"),
            caption="Forecast, guidance and packed tokens (--compute-ratio, with --attention reuse or fresh) are of output-cache; "
            "module scope is token-cache and token-merge.",
        )
        for name, row in FAMILIES.items():
            guidance = "yes, in one batch" if row.batched_guidance else "yes, in two calls"
            fresh = f"no: {row.stale_only}" if row.stale_only else "yes"
            module = "yes" if name in MODULE_SCOPE else "no"
            table.add_row(name.split("Transformer")[0], name, "yes", guidance, "yes", fresh, module)
        table.add_row("any other", "of diffusers", "yes", "yes, in two calls", "no", "no", "no")
        show(table, as_json)
