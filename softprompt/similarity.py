"""How alike prompts are, and starting from the most similar one (Vu et al. 2022, SPoT).

A prompt of a little training on a task is an embedding of that task (arXiv 2110.07904);
tasks whose prompts are alike tend to help one another. So a short trial on the target task chooses,
among the prompts of other tasks, which to start from.
"""

import glob
import os
from collections.abc import Callable, Sequence

import jax
import numpy as np

from softprompt import prompt
from softprompt.logbook import say

Measure = Callable[[np.ndarray, np.ndarray], float]


def average_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine between the mean vectors of `a` `[P, H]` and `b` `[Q, H]` (their "average tokens")."""
    return float(unit(a.mean(0, dtype=np.float64)) @ unit(b.mean(0, dtype=np.float64)))


def per_token_cosine(a: np.ndarray, b: np.ndarray) -> float:
    """Mean cosine over all pairs of a vector of `a` `[P, H]` and one of `b` `[Q, H]`."""
    # The mean over pairs of products is the product of the means.
    return float(unit(a.astype(np.float64)).mean(0) @ unit(b.astype(np.float64)).mean(0))


MEASURES: dict[str, Measure] = {"average": average_cosine, "per_token": per_token_cosine}


def unit(x: np.ndarray) -> np.ndarray:
    """Vectors on the last axis, of length 1; a zero vector stays zero."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def matrix(arrays: Sequence[np.ndarray], measure: str = "average") -> np.ndarray:
    """Similarities `[N, N]` of N prompts `[P, H]`, of any lengths; `measure`: see `MEASURES`."""
    chosen = measure_of(measure)
    if len({x.shape[-1] for x in arrays}) > 1:
        raise ValueError(
            f"prompts of different widths cannot be compared: {[x.shape[-1] for x in arrays]}"
        )
    return np.array([[chosen(a, b) for b in arrays] for a in arrays])


def measure_of(name: str) -> Measure:
    """The measure of that name; any other name is an error that lists them."""
    if name not in MEASURES:
        raise ValueError(f"SIMILARITY is {name!r}, expected one of {', '.join(MEASURES)}")
    return MEASURES[name]


def rank(
    trial: np.ndarray, candidates: Sequence[np.ndarray], measure: str = "average"
) -> list[tuple[int, float]]:
    """(index, similarity to `trial`) of each candidate, most similar first."""
    chosen = measure_of(measure)
    found = [(i, chosen(trial, x)) for i, x in enumerate(candidates)]
    return sorted(found, key=lambda pair: -pair[1])


def most_similar(
    key: jax.Array,
    length: int,
    source: prompt.Source,
    candidates: Sequence[str | os.PathLike] | str,
    trial: str | os.PathLike,
    measure: str = "average",
    ignore_fingerprint: bool = False,
) -> np.ndarray:
    """Initialiser: the candidate most similar to a trial prompt of the target task.

    Says and notes all similarities and which one it takes. The candidates' P must be `length`, the
    trial may have another; all must be of the same backbone.

    Args:
      candidates: prompt files, or a pattern such as `runs/*/prompts/best.safetensors`.
      trial: a prompt file of a short training on the target task.
      measure: 'average' (cosine of the average vectors) or 'per_token' (average cosine).
    """
    if isinstance(candidates, str):
        paths = sorted(glob.glob(candidates))
        if not paths:
            raise ValueError(f"PROMPT_FILES: no file matches {candidates!r}")
    else:
        paths = [str(path) for path in candidates]
        if not paths:
            raise ValueError("PROMPT_FILES names no prompt")
    tried, about = prompt.load(trial)
    if source.backbone is not None:
        prompt.check_backbone(trial, tried, about, source.backbone, ignore_fingerprint)
    arrays = [prompt.file(key, length, source, path, ignore_fingerprint) for path in paths]
    order = rank(tried, arrays, measure)
    for i, value in order:
        say(f"similarity {value:+.4f}  {paths[i]}")
    best, value = order[0]
    source.origin["initialised_from"] = paths[best]
    source.origin["similarities"] = {paths[i]: round(found, 4) for i, found in order}
    say(f"starting from {paths[best]}, similarity {value:+.4f} ({measure}) to {trial}")
    return arrays[best]
