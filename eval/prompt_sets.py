"""Prompt sets, read as `dit-accel generate` reads them."""

from dit_accel.pipelines.prompt_sets import read_prompt_set

__all__ = ["read_prompt_set"]
