"""Tuning from Python: one prompt, or many in one run."""

import inspect
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optax

from softprompt import (
    data,
    eval_task,
    evaluation,
    inputs,
    optim,
    prompted,
    report,
    train,
    train_step,
)
from softprompt import population as populations
from softprompt import prompt as prompts
from softprompt.api import LENGTHS, Data, examples_of, label_list, predictor_of
from softprompt.backbone import Backbone
from softprompt.inputs import Shared
from softprompt.prompt import Prompt
from softprompt.reparameterise import Mlp
from softprompt.settings import are_settings, check_kinds, check_settings, check_type
from softprompt.tree import Flat

Path = str | os.PathLike


def tune(
    backbone: Backbone,
    train_data: Data,
    validation_data: Data | None = None,
    labels: Sequence[str] | None = None,
    prompt_length: int = 100,
    train_steps: int = 1000,
    batch_size: int = 32,
    learning_rate: float | optax.Schedule = 0.3,
    prompt_init: prompts.Initializer | None = None,
    loss: str | None = None,
    eval_period: int = 0,
    patience: int = 0,
    log_period: int = 100,
    checkpoint_period: int = 1000,
    model_dir: Path | None = None,
    lengths: Mapping[str, int] = LENGTHS,
    seed: int = 0,
    prompt_depth: int | str = 1,
    reparameterisation: Mlp | None = None,
    microbatches: int = 1,
    length_buckets: int = 1,
    pack_length: int | str = 0,
) -> Prompt:
    """Tunes a prompt for a frozen backbone and returns the best one.

    Args:
      backbone: stays as it is, bit for bit.
      train_data: (text, target) pairs, or the name of a seqio task.
      validation_data: likewise; chooses the best step (by accuracy, or the task's metrics).
      labels: the legal targets; training and validation then rank them, and the prompt starts
        from their embeddings. Without, targets are free text.
      learning_rate: constant, or a schedule of the step; Adafactor as in the paper.
      prompt_init: see `softprompt.prompt`; default class labels, or sampled vocabulary without.
      loss: 'labels' (the default with labels) tells the right label from the others, for
        `classify`; 'tokens' is the paper's, of the target text, for `generate` too.
      model_dir: where checkpoints, prompts and figures go; the same call goes on from there.
      prompt_depth: encoder layers that read the prompt anew, or 'all'; 1 is the input alone.
      reparameterisation: a network that the prompt is trained behind (`reparameterise.Mlp()`).
      microbatches: equal parts that a batch is computed in, one after the other, to save memory.
      length_buckets, pack_length: batches of examples of like lengths, or packed rows, where
        lengths differ much: see `inputs.batches`.

    Returns:
      The prompt of the best validation, or of the last step without `validation_data`. Where
      SIGTERM stopped the run, `metadata["status"]` is 'interrupted'.
    """
    settings = _plain({k: v for k, v in locals().items() if k != "backbone"})
    arguments, about = _tuning(backbone, Shared(), **settings)
    result = train.fit(**arguments)
    if model_dir is not None and not result.interrupted:
        report.attempt(model_dir, backbone)
    note = {"step": result.best_step, "metrics": result.metrics}
    if result.interrupted:
        note["status"] = populations.INTERRUPTED
    best = result.best
    return Prompt(best[train.PROMPT], {**about, **note}, best.get(train.DEEP))


def tune_many(
    backbone: Backbone,
    members: Sequence[Mapping[str, Any]],
    model_dir: Path | None = None,
    **common: Any,
) -> list[Prompt]:
    """Tunes many prompts in one run over one backbone, each as `tune` would alone.

    Every step takes a batch of each member through the backbone at once, so memory grows with
    their number.

    Args:
      members: the arguments of `tune` that each one has for itself (`{"seed": 1}`), and perhaps its
        "name", which is its folder in `model_dir`; default its number.
      common: arguments of `tune` that all have in common.

    Returns:
      The best prompt of each member; `metadata["status"]` is 'finished', 'stopped early',
      'diverged' or 'interrupted'.
    """
    expected = "a list such as [{'seed': 0}, {'seed': 1}]"
    check_kinds(members=(members, are_settings(members), expected))
    check_type("model_dir", model_dir, Path | None, "a path or None")
    defaults = inspect.signature(tune).parameters
    known = [k for k in defaults if k not in ("backbone", "model_dir")]
    named, abouts, shared = [], [], Shared()
    for number, own in enumerate(members):
        settings = _plain({**common, **own})
        name = _folder_name(settings.pop("name", number))
        if odd := [k for k in settings if k not in known]:
            raise ValueError(
                f"member {name!r} has {', '.join(odd)}, which is none of its settings: name, "
                f"{', '.join(known)}"
            )
        if "train_data" not in settings:
            raise ValueError(f"member {name!r} has no train_data")
        whole = {k: p.default for k, p in defaults.items() if k != "backbone"} | settings
        whole["model_dir"] = None if model_dir is None else pathlib.Path(model_dir) / name
        arguments, about = _tuning(backbone, shared, **whole)
        named.append(populations.Member.of(name, arguments))
        abouts.append(about)
    found = []
    for about, outcome in zip(abouts, populations.fit(backbone, named), strict=True):
        result = outcome.result
        note = {"step": result.best_step, "metrics": result.metrics, "status": outcome.status}
        found.append(Prompt(result.best[train.PROMPT], {**about, **note}))
    return found


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """NumPy's numbers and texts as Python's own."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in settings.items()}


def _folder_name(name: Any) -> str:
    """A member's name, if it is that of a folder directly in `model_dir`."""
    name = str(name)
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError(
            f"a member has the name {name!r}, expected that of a folder in model_dir: without "
            f"slashes, and not '.' or '..'"
        )
    return name


def _tuning(
    backbone: Backbone,
    shared: Shared,
    train_data: Data,
    validation_data: Data | None,
    labels: Sequence[str] | None,
    prompt_length: int,
    train_steps: int,
    batch_size: int,
    learning_rate: float | optax.Schedule,
    prompt_init: prompts.Initializer | None,
    loss: str | None,
    eval_period: int,
    patience: int,
    log_period: int,
    checkpoint_period: int,
    model_dir: Path | None,
    lengths: Mapping[str, int],
    seed: int,
    prompt_depth: int | str,
    reparameterisation: Mlp | None,
    microbatches: int,
    length_buckets: int,
    pack_length: int | str,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments of `train.fit` for those of `tune`, and what the prompt's metadata say.

    Calls with the same `shared` tokenise the same data and compile the same predictor once.
    """
    check_settings(
        "float32", lengths, prompt_length=(prompt_length, 1), train_steps=(train_steps, 1),
        batch_size=(batch_size, 1), eval_period=(eval_period, 0), patience=(patience, 0),
        log_period=(log_period, 1), checkpoint_period=(checkpoint_period, 0), seed=(seed, 0),
        microbatches=(microbatches, 1), length_buckets=(length_buckets, 1),
        pack_length=(0 if pack_length == "auto" else pack_length, 0),
    )  # fmt: skip
    check_type("model_dir", model_dir, Path | None, "a path or None")
    check_type("prompt_init", prompt_init, Callable | None, "an initialiser, a function, or None")
    check_type("reparameterisation", reparameterisation, Mlp | None, "reparameterise.Mlp() or None")
    if patience and not eval_period:
        raise ValueError(
            f"patience is {patience}, but nothing is evaluated before the end: eval_period is 0"
        )
    labels = None if labels is None else label_list(labels)
    examples, judged = shared(examples_of, train_data, "train", backbone, lengths, labels)
    labels = labels or judged.labels
    if isinstance(train_data, str) and validation_data is None:
        validation_data = train_data
    init = prompt_init or (prompts.class_labels if labels else prompts.sampled_vocab)
    source = prompts.Source(backbone.embedding(), backbone.vocabulary, labels, backbone)
    initial = prompts.initial(init, seed, prompt_length, source)
    deep = prompts.deep_rows(backbone, initial, prompt_depth)
    loss = loss or (eval_task.LABELS if labels else eval_task.TOKENS)
    label_ids = eval_task.training_labels(loss, [examples], [labels], backbone.vocabulary)
    slots = prompted.slots(backbone.cfg.vocab_size, prompt_length)
    batch_size = train_step.rows_for(batch_size, backbone.mesh, microbatches)
    batches = inputs.batches(
        [examples], [1.0], batch_size, seed, slots, backbone.mesh, microbatches, pack_length,
        length_buckets, 0 if label_ids is None else label_ids.shape[1],
    )  # fmt: skip
    if pack_length:
        pack_length = batches.length

    run_evaluation, judged_by = None, None
    if validation_data is not None:
        held_out = shared(examples_of, validation_data, "validation", backbone, lengths, labels)[1]
        judged_by = data.fingerprint([held_out.examples])
        if patience:
            eval_task.check_figures(f"patience is {patience}", [held_out])
        predictor = shared(
            predictor_of, backbone, prompt_length, labels, lengths, batch_size,
            train.evaluations(train_steps, eval_period),
        )  # fmt: skip

        def run_evaluation(flat: Flat, step: int) -> dict[str, float]:
            return evaluation.evaluate(predictor, flat, [held_out])

    about = prompts.describe(
        backbone, examples.name, prompt_length, init, loss, seed, deep, reparameterisation
    )
    noted = {**about, **source.origin}
    arguments = dict(
        backbone=backbone,
        batches=batches,
        optimizer=optim.adafactor(learning_rate),
        train_steps=train_steps,
        prompt=initial,
        evaluate=run_evaluation,
        eval_period=eval_period,
        patience=patience,
        log_period=log_period,
        checkpoint_period=checkpoint_period,
        model_dir=model_dir,
        save=prompts.saver(noted, labels),
        identity={
            **about,
            "batch_size": batch_size,
            "pack_length": pack_length,
            "packed_rows": batches.shape[0] if pack_length else None,
            "length_buckets": length_buckets,
            "task_feature_lengths": dict(lengths),
            "examples": data.fingerprint([examples]),
            "held_out": judged_by,
            "labels": labels and list(labels),
            "learning_rate": _rates(learning_rate, train_steps),
        },
        seed=seed,
        microbatches=microbatches,
        label_ids=label_ids,
        deep=deep,
        reparameterisation=reparameterisation,
    )
    return arguments, noted


def _rates(learning_rate: float | optax.Schedule, train_steps: int) -> float | list[float]:
    """What tells one learning rate from another: a schedule's values along the run."""
    if not callable(learning_rate):
        return learning_rate
    return [float(learning_rate(train_steps * i // 8)) for i in range(9)]
