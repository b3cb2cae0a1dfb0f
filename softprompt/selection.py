"""Which evaluation of a run is the best, and the files that keep what was trained by then."""

import contextlib
import math
import os
import pathlib
from collections.abc import Mapping, Set
from typing import Any

import numpy as np

from softprompt import checkpoint
from softprompt.formats import prompts as prompt_files
from softprompt.logbook import say
from softprompt.prompted import DEEP, PROMPT

# What is known of the best evaluation before there was one.
UNJUDGED = {"step": 0, "metric": None, "waited": 0, "metrics": {}}


def choose_metric(figures: Mapping[str, float], best_metric: str | None) -> float:
    """The value to maximise: one named figure, or the mean of all but counts of illegal outputs."""
    if best_metric is None:
        values = [v for k, v in figures.items() if not k.endswith("illegal")]
        return float(np.mean(values)) if values else 0.0
    name = best_metric.lstrip("-")
    if name not in figures:
        raise ValueError(f"BEST_METRIC {name!r} is not among the figures {', '.join(figures)}")
    return -figures[name] if best_metric.startswith("-") else figures[name]


def better_of(
    best: Mapping[str, Any], step: int, figures: dict[str, float], best_metric: str | None
) -> dict[str, Any]:
    """What is known of the best evaluation, after another one at `step`; any number beats NaN."""
    metric, before = choose_metric(figures, best_metric), best["metric"]
    if before is None or metric > before or (math.isnan(before) and not math.isnan(metric)):
        return {"step": step, "metric": metric, "waited": 0, "metrics": figures}
    return {**best, "waited": best["waited"] + 1}


def save_evaluated(model_dir, save, trained, step: int, figures, best: Mapping[str, Any]) -> None:
    """Saves what was trained when `step` was evaluated, also as the best if `best` is that step.

    Without `save` (None) only what a resumed run needs: the arrays of the best step.
    """
    folder, note = pathlib.Path(model_dir) / "prompts", {"step": step, "metrics": figures}
    if save:
        save(folder / str(step), trained, note)
    if best["step"] == step:
        _save_best(model_dir, trained, best)
        if save:
            save(folder / "best", trained, note)


def save_unjudged(model_dir, save, trained, step: int, best: Mapping[str, Any]) -> None:
    """Saves what was trained by the last step, also as the best if nothing was ever evaluated.

    Also of a run that a kill ended after its last checkpoint, before this.
    """
    for name in [str(step)] if best["step"] else [str(step), "best"]:
        save(pathlib.Path(model_dir) / "prompts" / name, trained, {"step": step})


def _best_path(model_dir: str | os.PathLike) -> pathlib.Path:
    return pathlib.Path(model_dir) / "checkpoints" / "best.safetensors"


def _save_best(model_dir, trained: dict[str, np.ndarray], best: dict[str, Any]) -> None:
    checkpoint.write(_best_path(model_dir), trained, {"best": best})


def restore(
    model_dir, best: dict[str, Any], names: Set[str], save
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    """What a checkpoint says of the best evaluation, and what was trained by then: `names`.

    If checkpoints/best.safetensors is not that step's, the prompt that was saved at the step takes
    its place. Without one, a file of a later step, which a kill left before its checkpoint, means
    that the best step is chosen anew from here.

    Raises:
      CorruptFile: the file is missing, torn or older, and no prompt takes its place.
    """
    path, at = _best_path(model_dir), None
    try:
        arrays, metadata = checkpoint.read(path)
        at = metadata["best"]["step"]
        if at == best["step"]:
            return best, arrays
        reason = f"{str(path)!r} is of step {at}, the best one is {best['step']}"
    except ValueError as error:
        reason = str(error)
    if trained := _saved_prompt(model_dir, best["step"], names):
        say(f"{reason}; going on with the prompt that was saved at step {best['step']}")
        save_evaluated(model_dir, save, trained, best["step"], best["metrics"], best)
        return best, trained
    if at is not None and at > best["step"]:
        say(f"{reason}; the best step is chosen anew from here")
        return UNJUDGED, None
    raise checkpoint.CorruptFile(
        f"{reason}; without it the run cannot go on: remove the folder {str(path.parent)!r} to "
        f"start over"
    )


def _saved_prompt(model_dir, step: int, names: Set[str]) -> dict[str, np.ndarray] | None:
    """The arrays `names` from a prompt that was saved at `step`, None if there is none."""
    for name in (str(step), "best"):
        with contextlib.suppress(ValueError):
            path = pathlib.Path(model_dir) / "prompts" / f"{name}.safetensors"
            bank, deep, about = prompt_files.read_deep(path)
            found = {PROMPT: bank} | ({} if deep is None else {DEEP: deep})
            if about.get("step") == step and found.keys() == names:
                return found
    return None
