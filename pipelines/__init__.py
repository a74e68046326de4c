"""Whole pipelines: the catalog, loading, generation, and the `dit-accel` command."""
