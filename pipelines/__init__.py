"""Whole pipelines: what there is, how to load it, how to make pictures with it, and the `dit-accel` command."""
