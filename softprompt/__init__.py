"""Soft prompts for frozen T5 language models (Lester et al. 2021), in JAX and Flax."""

from softprompt.api import (
    Backbone,
    Prompt,
    classify,
    embedded_data,
    ensemble,
    evaluate,
    generate,
    load_backbone,
    load_prompt,
    read_pairs,
    score_labels,
)
from softprompt.tuning import tune, tune_many

__all__ = [
    "Backbone",
    "Prompt",
    "classify",
    "embedded_data",
    "ensemble",
    "evaluate",
    "generate",
    "load_backbone",
    "load_prompt",
    "read_pairs",
    "score_labels",
    "tune",
    "tune_many",
]
