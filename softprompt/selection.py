"""Which evaluation of a run is the best, and the files that keep what was trained by then."""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np

from softprompt import checkpoint, hosts
from softprompt.formats import prompts as prompt_files
from softprompt.logbook import Logbook, say
from softprompt.prompted import DEEP, PROMPT

Path = str | os.PathLike
Trained = Callable[[], dict[str, np.ndarray]]
# Writes trained arrays and facts to a path without ending.
Save = Callable[[pathlib.Path, dict[str, np.ndarray], dict[str, Any]], None]
# What is known of the best evaluation before there was one.
UNJUDGED = {"step": 0, "judged": 0, "metric": None, "waited": 0, "metrics": {}}


def choose_metric(figures: Mapping[str, float], best_metric: str | None) -> float | None:
    """The value to maximise: one named figure, or the mean of all but counts of illegal outputs.

    None where there is no figure to choose by.
    """
    if best_metric is None:
        values = [v for k, v in figures.items() if not k.endswith("illegal")]
        return float(np.mean(values)) if values else None
    name = best_metric.lstrip("-")
    if name not in figures:
        raise ValueError(f"BEST_METRIC {name!r} is not among the figures {', '.join(figures)}")
    return -figures[name] if best_metric.startswith("-") else figures[name]


def judged(facts: Mapping[str, Any]) -> int:
    """The step of the last evaluation by what is known of the best one, 0 without one."""
    return facts.get("judged", facts["step"])


class Best:
    """The best evaluation of a run so far, what was trained by then, and the files that keep both.

    Attributes:
      facts: its step (0: none yet), figures, the step of the last evaluation, and how many since
        were no better.
      trained: arrays by path, None without an evaluation.
    """

    def __init__(self, model_dir: Path | None, save: Save | None, best_metric: str | None):
        self.facts: Mapping[str, Any] = UNJUDGED
        self.trained: dict[str, np.ndarray] | None = None
        self._save, self._metric = save, best_metric
        self._folder = None if model_dir is None else pathlib.Path(model_dir)

    @property
    def step(self) -> int:
        return self.facts["step"]

    @property
    def judged(self) -> int:
        """The step of the last evaluation, 0 without one."""
        return judged(self.facts)

    def judge(
        self, step: int, figures: dict[str, float], log: Logbook, trained: Trained, name: str = ""
    ) -> None:
        """Tells of the figures of `step`, and keeps what was trained; any number beats NaN.

        Without a figure to choose by, the last step is the best.
        Without `save` only what a resumed run needs is kept: the arrays of the best step.
        """
        log.write("eval/metrics", step, figures)
        said = "  ".join(f"{k} {v:.4g}" for k, v in figures.items()) or "no figures"
        say(f"{name}step {step}  {said}")
        metric, before = choose_metric(figures, self._metric), self.facts["metric"]
        averaged = [k for k in figures if not k.endswith("illegal")]
        if before is None and self._metric is None and len(averaged) > 1:
            say(f"{name}the best step is that of the highest mean of {', '.join(averaged)}")
        better = before is None or (
            metric is not None
            and (metric > before or (math.isnan(before) and not math.isnan(metric)))
        )
        if better:
            self.facts = {"step": step, "metric": metric, "waited": 0, "metrics": figures}
        else:
            self.facts = {**self.facts, "waited": self.facts["waited"] + 1}
        self.facts["judged"] = step
        if self._folder is None and step != self.step:
            return
        now = trained()
        if step == self.step:
            self.trained = now
        if self._folder is not None:
            self._keep(step, now, figures)

    def out_of_patience(self, patience: int) -> bool:
        """Whether `patience` (0: endless) evaluations were no better."""
        return bool(patience) and self.facts["waited"] >= patience

    def save_unjudged(self, step: int, trained: dict[str, np.ndarray]) -> None:
        """Saves what was trained by the last step, as the best if nothing was ever evaluated.

        Also of a run that a kill ended after its last checkpoint, before this.
        """
        if self._save and self._folder is not None:
            for name in [str(step)] if self.step else [str(step), "best"]:
                self._save(self._folder / "prompts" / name, trained, {"step": step})

    def restore(self, facts: Mapping[str, Any], names: Set[str]) -> None:
        """Takes over what a checkpoint says of the best evaluation, and the arrays `names` of then.

        If checkpoints/best.safetensors is not that step's, the prompt that was saved at the step
        takes its place. Without one, a file of a later step, which a kill left before its
        checkpoint, means that the best step is chosen anew from here.

        Raises:
          CorruptFile: the file is missing, torn or older, and no prompt takes its place.
        """
        self.facts = facts
        if self.step:
            self.facts, self.trained = hosts.shared(lambda: self._read(names))

    def _read(self, names: Set[str]) -> tuple[Mapping[str, Any], dict[str, np.ndarray] | None]:
        path, at = self._path(), None
        try:
            arrays, metadata = checkpoint.read(path)
            at = metadata["best"]["step"]
            if at == self.step:
                return self.facts, arrays
            reason = f"{str(path)!r} is of step {at}, the best one is {self.step}"
        except ValueError as error:
            reason = str(error)
        if trained := self._saved_prompt(names):
            say(f"{reason}; going on with the prompt that was saved at step {self.step}")
            self._keep(self.step, trained, self.facts["metrics"])
            return self.facts, trained
        if at is not None and at > self.step:
            say(f"{reason}; the best step is chosen anew from here")
            return UNJUDGED, None
        raise checkpoint.CorruptFile(
            f"{reason}; without it the run cannot go on: remove the folder {str(path.parent)!r} "
            f"to start over"
        )

    def _path(self) -> pathlib.Path:
        return self._folder / "checkpoints" / "best.safetensors"

    def _keep(self, step: int, trained: dict[str, np.ndarray], figures: dict[str, float]) -> None:
        """Saves what was trained by `step`, also as the best if it is."""
        folder, note = self._folder / "prompts", {"step": step, "metrics": figures}
        if self._save:
            self._save(folder / str(step), trained, note)
        if step == self.step:
            checkpoint.write(self._path(), trained, {"best": self.facts})
            if self._save:
                self._save(folder / "best", trained, note)

    def _saved_prompt(self, names: Set[str]) -> dict[str, np.ndarray] | None:
        """The arrays `names` from a prompt that was saved at the best step, None without one."""
        for name in (str(self.step), "best"):
            with contextlib.suppress(ValueError):
                path = self._folder / "prompts" / f"{name}.safetensors"
                bank, deep, about = prompt_files.read_deep(path)
                found = {PROMPT: bank} | ({} if deep is None else {DEEP: deep})
                if about.get("step") == self.step and found.keys() == names:
                    return found
        return None
