"""What configured training runs need: memory from the compiled step, time from measured steps."""

import contextlib
import dataclasses
import inspect
import io
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from softprompt import config, dry_run, eval_task, launch, memory, signals
from softprompt import train as training

# Steps that are timed, after the first, which compiles.
STEPS = 3


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs alike in what they cost.

    Attributes:
      name: what they are.
      runs: how many there are.
      configure: makes gin's configuration that of the largest, with the given MODEL_DIR.
      together: how many train at once, in one batch.
    """

    name: str
    runs: int
    configure: Callable[[str], None]
    together: int = 1


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a group takes: bytes per device at the peak, and seconds of its training steps."""

    group: Group
    peak: int
    seconds_per_step: float
    train_steps: int

    @property
    def hours(self) -> float:
        """Of all runs one after another, training alone: no evaluation, compilation or loading."""
        return self.seconds_per_step * self.train_steps * self.group.runs / 3600


def of(group: Group) -> Cost:
    """Compiles a group's step for its memory, then trains a few steps, which loads the backbone."""
    with tempfile.TemporaryDirectory() as folder, config.errors():
        group.configure(folder)
        settings = config.arguments(launch.train)
        labels = 0
        if settings["loss"] == eval_task.LABELS:
            labels = launch.label_count(settings)
        run = dry_run.of_settings(settings, settings["mesh"](), labels)
        found = memory.need(run.but(rows=run.rows * group.together))
        seconds = measured()
    return Cost(group, found.peak, seconds, settings["train_steps"])


def measured() -> float:
    """Seconds of a training step of the run that gin describes: the median of a few, measured."""
    ends: list[float] = []

    def note(params: Any, step: int) -> dict[str, float]:
        jax.block_until_ready({k: v for k, v in params.items() if v is not None})
        ends.append(time.perf_counter())
        return {"order": -float(step)}  # The first is the best: nothing is copied after it.

    def few(*args: Any, **kwargs: Any) -> training.Result:
        arguments = inspect.signature(training.fit).bind(*args, **kwargs).arguments
        arguments |= dict(
            train_steps=STEPS + 1, evaluate=note, eval_period=1, best_metric=None, patience=0,
            checkpoint_period=0, model_dir=None, save=None,
        )  # fmt: skip
        training.fit(**arguments)
        return training.Result(0, {}, {}, 0, None, {}, interrupted=True)

    with contextlib.redirect_stdout(io.StringIO()):
        config.configured(launch.train)(fit=few)
    signals.clear_caches()
    return float(np.median(np.diff(ends)))
