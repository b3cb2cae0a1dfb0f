"""Soft prompts for frozen T5 language models (Lester et al. 2021), in JAX and Flax."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def __getattr__(name: str):
    """Imports what is public when it is first used: `softprompt --help` needs no JAX."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from softprompt import api, tuning

    return getattr(tuning if name.startswith("tune") else api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
