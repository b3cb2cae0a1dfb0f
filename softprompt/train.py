"""The training loop: steps, evaluations, checkpoints, and how it ends and goes on."""

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from softprompt import (
    checkpoint,
    hosts,
    int8,
    partition,
    pipeline,
    selection,
    signals,
    throughput,
    train_step,
    tree,
)
from softprompt.backbone import Backbone, prompt_layout
from softprompt.logbook import Logbook, check_figures, say
from softprompt.prompted import DEEP, PROMPT, PromptedT5
from softprompt.reparameterise import Mlp


class Diverged(ValueError):
    """The loss or its gradient stopped being finite."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What a run ends with.

    Attributes:
      step: last step taken.
      trained: flat tree of the trainable parameters after it.
      best: those of the best step (the last one where nothing was evaluated).
      best_step, best_metric: when it was, and the value it was chosen by.
      metrics: figures of the best step's evaluation.
      interrupted: True if SIGTERM ended the run before its last step, or before that was evaluated.
    """

    step: int
    trained: dict[str, np.ndarray]
    best: dict[str, np.ndarray]
    best_step: int
    best_metric: float | None
    metrics: dict[str, float]
    interrupted: bool = False

    @classmethod
    def of(cls, step: int, trained, best: selection.Best, interrupted: bool):
        """After `step`, which is the best one too if nothing was evaluated."""
        chosen, at = (trained, step) if best.trained is None else (best.trained, best.step)
        metric, metrics = best.facts["metric"], dict(best.facts["metrics"])
        return cls(step, trained, chosen, at, metric, metrics, interrupted)


def prompt_alone(trainable: Sequence[str]) -> bool:
    """Whether these patterns name nothing of a backbone."""
    return all(pattern.startswith("prompt/") for pattern in trainable)


def check_trainable(trained: tree.Flat) -> None:
    """Raises where a parameter that is to be trained is kept as int8."""
    rounded = [path for path in int8.parameters(trained) if trained[path].dtype == jnp.int8]
    rounded += [path for path in trained if path.endswith(int8.SCALE)]
    if rounded:
        shown = ", ".join(rounded[:3]) + (", …" if len(rounded) > 3 else "")
        raise ValueError(
            f"TRAINABLE names {len(rounded)} parameters that WEIGHTS 'int8' keeps as int8, which "
            f"cannot be trained ({shown}); set WEIGHTS to None, or TRAINABLE to what is not int8"
        )


@contextlib.contextmanager
def own_folder(model_dir: str | os.PathLike | None) -> Iterator[None]:
    """MODEL_DIR as this run's alone, if what lies there is a run's: see `checkpoint.locked`."""
    if model_dir is not None:
        hosts.shared(lambda: check_figures(model_dir))
    with checkpoint.locked(model_dir):
        yield


def _in_own_folder(fit: Callable[..., Result]) -> Callable[..., Result]:
    """`fit` within `own_folder` of its `model_dir`."""

    @functools.wraps(fit)
    def run(*args, **kwargs) -> Result:
        arguments = inspect.signature(fit).bind(*args, **kwargs).arguments
        with own_folder(arguments.get("model_dir")):
            return fit(*args, **kwargs)

    return run


@_in_own_folder
def fit(
    backbone: Backbone,
    batches: Callable[[int], Iterator[Mapping[str, np.ndarray]]],
    optimizer: optax.GradientTransformation,
    train_steps: int,
    prompt: np.ndarray | None = None,
    trainable: Sequence[str] = ("prompt/.*",),
    frozen: Sequence[str] = (".*",),
    evaluate: Callable[[tree.Flat, int], dict[str, float]] | None = None,
    eval_period: int = 0,
    best_metric: str | None = None,
    patience: int = 0,
    checkpoint_period: int = 0,
    keep: int = 2,
    log_period: int = 50,
    model_dir: str | os.PathLike | None = None,
    save: selection.Save | None = None,
    identity: Mapping[str, Any] | None = None,
    seed: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    label_ids: np.ndarray | None = None,
    deep: np.ndarray | None = None,
    reparameterisation: Mlp | None = None,
    microbatches: int = 1,
) -> Result:
    """Trains the parameters that `trainable` names, from step 0 or from MODEL_DIR's checkpoint.

    Args:
      backbone: frozen model; where patterns name its parameters, they train from its values.
      batches: called with a step, yields that step's batch and those after it; of several
        processes each yields its own rows (`partition.local_rows`). Read ahead, by a thread.
      prompt: initial prompt `[P, H]`, or None for no prompt.
      evaluate: `(parameters, step)` to figures; called every `eval_period` steps (0: never but at
        the end).
      best_metric: the figure to choose the best step by, "-name" for one to minimise (None: the
        mean of all figures).
      patience: stop after so many evaluations without a better one (0: never).
      checkpoint_period: steps between resumable checkpoints (0: only at the end).
      model_dir: where files go; None keeps everything in memory.
      save: `(path without ending, trained, metadata)` writes the trained parameters for use.
      identity: what makes this run the one it is (task, seed, backbone, …). A checkpoint of a run
        with another identity is refused, naming the difference.
      label_ids: `[C, L]`, to train by the loss among these labels: see `train_step.make_step`.
      deep: initial rows `[D - 1, P, H]` of a deep prompt: see `prompted`.
      reparameterisation: a network that the prompt is trained behind. Checkpoints hold it;
        evaluations, saved prompts and the result see the plain arrays that it makes.
      microbatches: equal parts that a batch is computed in: see `train_step.make_step`.

    Raises:
      Diverged: the loss was not finite; the message names the step. What was trained before it
        is saved.
      ValueError: settings that do not fit the backbone, or a MODEL_DIR that another run writes to
        or that holds something else.
    """
    rows = 0 if prompt is None else len(prompt)
    module = PromptedT5(backbone.cfg, rows)
    params = dict(backbone.params)
    if prompt is not None:
        if np.shape(prompt) != (rows, backbone.cfg.emb_dim):
            raise ValueError(
                f"the prompt has shape {np.shape(prompt)}, expected (P, {backbone.cfg.emb_dim}) "
                f"for the backbone {backbone.name!r}"
            )
        place = prompt_layout(backbone.cfg, backbone.mesh, rows).sharding
        params[PROMPT] = partition.place(np.asarray(prompt, np.float32), place)
        beside = _beside(prompt, deep, reparameterisation, backbone, seed)
        everywhere = partition.replicated(backbone.mesh)
        params |= {name: partition.place(x, everywhere) for name, x in beside.items()}
    collapse = reparameterisation.collapse if reparameterisation else dict
    trained, fixed = tree.split(params, trainable, frozen)
    check_trainable(trained)
    state = train_step.init_state(
        {path: x.astype(jnp.float32) for path, x in trained.items()}, optimizer, backbone.mesh
    )
    best, restored = selection.Best(model_dir, save, best_metric), None
    if model_dir is not None:
        restored = checkpoint.restore_state(model_dir, state, say)
    if restored:
        state = restored[0]
        at = int(state["step"])
        check_identity(restored[1]["identity"], dict(identity or {}), model_dir, at, train_steps)
        say(f"resuming from step {at} of {model_dir}")
    start = int(state["step"])
    judged = selection.judged(restored[1]["best"]) if restored else 0
    log = Logbook(model_dir, start, judged)
    if not restored and model_dir is not None and save and prompt is not None:
        # What drift is measured from: see `analysis`.
        start_of = pathlib.Path(model_dir) / "prompts" / "initial"
        save(start_of, {PROMPT: np.asarray(prompt, np.float32)}, {"step": 0})
    step_fn = train_step.jit_step(
        train_step.make_step(
            module,
            optimizer,
            seed,
            z_loss,
            label_smoothing,
            label_ids,
            reparameterisation,
            microbatches,
        )
    )
    whole = any(not path.startswith("prompt/") for path in trained)
    shards = backbone.mesh.shape["data"]
    own = partition.local_rows(backbone.mesh, shards)
    by_rows = partition.batch_sharding(backbone.mesh)
    meter = throughput.Meter(
        backbone.cfg, 3 if whole else 2, backbone.mesh.size, (own.stop - own.start) / shards
    )

    def parameters() -> tree.Flat:
        return collapse({**fixed, **state["trainable"]})

    # A prompt of which a part trains is kept whole.
    prompts = [k for k in params if k.startswith("prompt/")]
    kept = {*trained, *(prompts if any(k in trained for k in prompts) else ())}
    if restored:
        best.restore(restored[1]["best"], kept & parameters().keys())
    saved = start

    def trained_now() -> dict[str, np.ndarray]:
        return {k: hosts.fetch(x) for k, x in parameters().items() if k in kept}

    def save_checkpoint() -> None:
        if model_dir is not None:
            checkpoint.save_state(
                model_dir, state, {"best": best.facts, "identity": identity or {}}, keep
            )

    def judge(step: int) -> bool:
        """Evaluates; whether that came to its end."""
        try:
            with asked.at_once():
                figures = evaluate(parameters(), step)
        except signals.Stopped:
            return False
        best.judge(step, figures, log, trained_now)
        return True

    def finish(step: int, interrupted: bool = False) -> Result:
        log.close()
        return Result.of(step, trained_now(), best, interrupted)

    def place(batch: Mapping[str, np.ndarray]) -> tuple[Mapping[str, np.ndarray], Any]:
        return batch, partition.place_rows(batch, backbone.mesh)

    with (
        signals.termination(model_dir is not None) as asked,
        pipeline.Prefetch(batches(start), place) as stream,
    ):
        due = evaluate and eval_period and start % eval_period == 0
        if due and judged < start < train_steps:  # It was stopped before.
            if not judge(start):
                say(f"stopped by a signal at step {start}; the same command goes on from here")
                return finish(start, interrupted=True)
            save_checkpoint()
            log.restart(start)
        compiled: set[tuple] = set()
        counted = False  # Whether a step since the last line was one that compiled nothing.
        for step in range(start + 1, train_steps + 1):
            if best.out_of_patience(patience):
                say(f"stopping early at step {step - 1}: no better figure since {best.step}")
                break
            waited = stream.waited
            host_batch, batch = stream.next(state["step"])
            shapes = tuple(x.shape for x in host_batch.values())
            if compiles := shapes not in compiled:
                jax.block_until_ready(state)
                began = time.monotonic()
            else:
                meter.add(host_batch, label_ids)
                meter.wait(stream.waited - waited)
                counted = True
            if module.cfg.dropout_rate:
                key = train_step.step_key(seed, state["step"])
                batch = train_step.with_dropout(batch, module.cfg, key, label_ids, by_rows)
            state = step_fn(state, fixed, batch)
            train_step.settle(state)
            if compiles:
                jax.block_until_ready(state)
                compiled.add(shapes)
                if step == start + 1:
                    log.begin(step)
                    meter.restart()
                else:
                    log.leave_out(time.monotonic() - began)
                    meter.leave_out(time.monotonic() - began)
            last = step == train_steps
            due_eval = evaluate and (last or (eval_period and step % eval_period == 0))
            due_log = last or step % log_period == 0
            due_save = last or (checkpoint_period and step % checkpoint_period == 0)
            stop = asked(step)
            if due_log or due_eval or due_save or stop:
                _check_finite(state, save, model_dir, trained_now)
            elif log.due():
                # Steps are only asked for here: let the bar tell of those that are done.
                jax.block_until_ready(state["step"])
                log.tick(step, train_steps)
            if due_log:
                loss = float(state["loss_sum"]) / max(float(state["count_sum"]), 1)
                rates, counted = meter.read() if counted else {}, False
                log.progress(step, train_steps, loss, rates)
                log.write("train", step, {"loss": loss, **rates})
                zero = partition.place(np.float32(0), partition.replicated(backbone.mesh))
                state = {**state, "loss_sum": zero, "count_sum": jnp.copy(zero)}
            if due_eval and not stop:
                if last:  # An evaluation that fails loses nothing.
                    save_checkpoint()
                stop = not judge(step)
            if due_save or stop:
                save_checkpoint()
                saved = step
            if due_eval or due_save:
                meter.restart()
                counted = False
            if stop and not (last and (not evaluate or best.judged == step)):
                say(f"stopped by a signal after step {step}; the same command goes on from here")
                return finish(step, interrupted=True)
    step = int(state["step"])
    unjudged = evaluate and best.judged < step  # It went on from the end of what it was to do.
    if unjudged:
        best.judge(step, evaluate(parameters(), step), log, trained_now)
    if step > saved or unjudged:
        save_checkpoint()
    if not evaluate:
        best.save_unjudged(step, trained_now())
    return finish(step)


def _beside(
    prompt: np.ndarray,
    deep: np.ndarray | None,
    reparameterisation: Mlp | None,
    backbone: Backbone,
    seed: int,
) -> tree.Flat:
    """What a prompt trains with: its deep rows and the parameters of its network, if any."""
    found: tree.Flat = {}
    if deep is not None:
        layers, most = len(deep) + 1, backbone.cfg.num_encoder_layers
        if np.shape(deep)[1:] != np.shape(prompt) or not 1 < layers <= most:
            raise ValueError(
                f"the deep prompt has shape {np.shape(deep)}, expected (D - 1, "
                f"{', '.join(map(str, np.shape(prompt)))}) for D from 2 to {most} encoder layers"
            )
        found[DEEP] = np.asarray(deep, np.float32)
    if reparameterisation is not None:
        key = jax.random.fold_in(jax.random.key(seed), 1)
        found = reparameterisation.init(key, {PROMPT: np.asarray(prompt), **found})
        del found[PROMPT]
    return found


def evaluations(train_steps: int, eval_period: int) -> int:
    """How often `fit` evaluates: every `eval_period` steps (0: never) and after the last."""
    return -(-train_steps // eval_period) if eval_period else 1


def check_resumable(model_dir: Any, identity: Mapping[str, Any], train_steps: int) -> None:
    """Raises where MODEL_DIR holds another run, or this one at a step that it is not to reach.

    By the header of the newest checkpoint: nothing is restored yet, and nothing written but the
    lock, where there is a folder. Also raises where another run is writing to it, or where what
    lies there is no run's.
    """
    if not hosts.shared(lambda: pathlib.Path(model_dir).exists()):
        return

    def newest() -> tuple[dict[str, Any], int] | None:
        for step in reversed(checkpoint.steps(model_dir)):
            with contextlib.suppress(checkpoint.CorruptFile):
                return checkpoint.Arrays(checkpoint.step_path(model_dir, step)).metadata, step
        return None

    with own_folder(model_dir):
        if found := hosts.shared(newest):
            check_identity(found[0]["identity"], identity, model_dir, found[1], train_steps)


def check_identity(
    stored: Mapping[str, Any],
    ours: Mapping[str, Any],
    model_dir: Any,
    step: int,
    train_steps: int,
) -> None:
    """Raises where a checkpoint of `step` is not one of the run that `ours` describes."""
    if differ := checkpoint.differences(stored, ours):
        raise ValueError(
            f"MODEL_DIR {str(model_dir)!r} holds another run: {'; '.join(differ)}. Use another "
            f"MODEL_DIR, or give the same settings to go on"
        )
    if step > train_steps:
        raise ValueError(
            f"MODEL_DIR {str(model_dir)!r} is at step {step} already, TRAIN_STEPS is "
            f"{train_steps}. Use another MODEL_DIR for a shorter run"
        )


def _check_finite(state: train_step.State, save, model_dir, trained_now) -> None:
    bad = int(state["bad_step"])
    if bad < 0:
        return
    kept = ""
    if save and model_dir is not None:
        path = pathlib.Path(model_dir) / "prompts" / f"{bad - 1}.safetensors"
        save(path.with_suffix(""), trained_now(), {"step": bad - 1})
        if path.is_file():  # Not of a run without a prompt.
            kept = f"; what was trained until then lies in {path}"
    raise Diverged(f"the loss or its gradient was not finite at step {bad}{kept}")
