"""The binaries behind `softprompt train | eval | infer | baseline`, as gin files name them.

Training, from gin's values to a run, is here; what predicts without it is in `predict` and
`infer`.
"""

import dataclasses
import functools
import os
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from softprompt import backbone as backbones
from softprompt import (
    config,
    cooccurrence,
    data,
    eval_task,
    evaluation,
    hosts,
    inputs,
    int8,
    optim,
    partition,
    prompt,
    prompted,
    provenance,
    reparameterise,
    report,
    train_settings,
    train_step,
    tree,
)
from softprompt import train as training
from softprompt.backbone import Backbone
from softprompt.formats import Stored, native
from softprompt.infer import infer
from softprompt.inputs import Shared
from softprompt.logbook import duration, say, size
from softprompt.predict import baseline, eval
from softprompt.settings import (
    BUILTIN,
    UserData,
    load_tasks,
    use_vocabulary,
)
from softprompt.vocabulary import open_vocabulary

Path = str | os.PathLike

# What gin files may name.
__all__ = ["UserData", "baseline", "eval", "infer", "train"]


def _load_backbone(
    path: str | None,
    architecture: str | None,
    vocabulary_file: str | None,
    mesh: jax.sharding.Mesh,
    dtype: str,
    dropout_rate: float,
    seed: int,
    weights: str | None,
    remat: str,
    frozen: bool,
) -> Backbone:
    from softprompt import t5_config

    if path is not None:
        loaded = backbones.load(
            path, dtype, dropout_rate, mesh, vocabulary_file, weights=weights, remat=remat
        )
        if architecture is not None:
            expected = t5_config.config(architecture).to_json()
            if loaded.cfg.to_json() != expected:
                raise ValueError(
                    f"INITIAL_CHECKPOINT_PATH {path!r} holds the architecture "
                    f"{loaded.cfg.to_json()}, ARCHITECTURE {architecture!r} is {expected}"
                )
        return loaded
    if architecture is None:
        raise ValueError("give INITIAL_CHECKPOINT_PATH, or ARCHITECTURE to start from scratch")
    vocabulary = open_vocabulary(vocabulary_file) if vocabulary_file else None
    cfg = dataclasses.replace(t5_config.config(architecture, dropout_rate, dtype), remat=remat)
    return backbones.random(cfg, seed, vocabulary, mesh, architecture, weights, frozen)


def train(
    model_dir: Path,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    train_steps: int,
    batch_size: int = 32,
    pack_length: int | str = 0,
    length_buckets: int = 1,
    initial_checkpoint_path: str | None = None,
    architecture: str | None = None,
    vocabulary_file: str | None = None,
    embeddings_file: Path | None = None,
    mixture_or_task_module: str | Sequence[str] | None = BUILTIN,
    user_data: UserData | None = None,
    text_corpus: Path | None = None,
    prompt_length: int = 100,
    prompt_init: prompt.Initializer = prompt.random_uniform,
    prompt_depth: int | str = 1,
    reparameterisation: reparameterise.Mlp | None = None,
    trainable: Sequence[str] = ("prompt/.*",),
    frozen: Sequence[str] = (".*",),
    optimizer: Callable[[], optax.GradientTransformation] = optim.adafactor,
    mesh: Callable[[], jax.sharding.Mesh] = partition.make_mesh,
    dropout_rate: float = 0.0,
    dtype: str = "float32",
    stream: bool = False,
    eval_split: str = "validation",
    eval_examples: int | None = None,
    eval_mode: str = evaluation.GENERATE,
    eval_batch_size: int = 32,
    eval_period: int = 0,
    best_metric: str | None = None,
    patience: int = 0,
    checkpoint_period: int = 1000,
    keep_checkpoints: int = 2,
    log_period: int = 100,
    seed: int = 0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    loss: str = eval_task.TOKENS,
    target_sentinel: bool = False,
    backbone_name: str | None = None,
    backbone_dtype: str = "float32",
    backbone_steps: Sequence[int] = (),
    weights: str | None = None,
    remat: str = "none",
    microbatches: int = 1,
    fit: Callable[..., training.Result] = training.fit,
    shared: Shared | None = None,
) -> training.Result:
    """Trains a prompt (or whatever `trainable` names) on a seqio task or mixture.

    A random backbone may start from the token embeddings of `embeddings_file` (`softprompt
    embeddings`). `text_corpus` is the folder of text shards of the pre-training tasks. With
    `stream`, batches are read as they are needed (pre-training text) and the evaluation is the loss
    on the first `eval_examples` of `eval_split`; else examples lie in memory, packed into rows of
    `pack_length` tokens if that is not 0 (see `packing.Packing`; 'auto': see `packing.row_length`),
    or in batches of at most `length_buckets` shapes (see `lengths.bucketed_batches`), and the
    task's own metrics are evaluated. `loss` is that of the target 'tokens' or that of the right one
    among the task's 'labels', behind the first sentinel with `target_sentinel` (Lester et al. 2021,
    section 3.3: what span corruption taught a backbone to begin with). A trained backbone is stored
    as `backbone_name` in `backbone_dtype`, and once more as it was at each of `backbone_steps`
    (multiples of `eval_period`). `weights`, `remat` and `microbatches` save memory: see
    docs/memory.md. Writes to `model_dir` what the README lists. `fit` takes the place of
    `train.fit`; what it has in common with other calls of this function is read and compiled once
    with the same `shared`.
    """
    settings = dict(locals())
    shared = shared or Shared()
    began = time.monotonic()
    train_settings.check(settings)
    folder = pathlib.Path(model_dir)
    devices = mesh()
    backbone = shared(
        _load_backbone,
        initial_checkpoint_path, architecture, vocabulary_file, devices, dtype, dropout_rate,
        seed if initial_checkpoint_path is None else 0, weights, remat,
        training.prompt_alone(trainable),
    )  # fmt: skip
    vocabulary = use_vocabulary(backbone)
    prefix = (vocabulary.sentinel(0),) if target_sentinel else ()
    # What predicts with what was trained asks its metadata.
    sentinel = {"target_sentinel": True} if target_sentinel else {}
    if embeddings_file is not None:
        params = cooccurrence.start_from(backbone.params, embeddings_file)
        fingerprint = tree.fingerprint(params)
        backbone = dataclasses.replace(backbone, params=params, fingerprint=fingerprint)
    shards = None
    if text_corpus is not None:
        from softprompt.tasks import pretraining

        pretraining.use_corpus(text_corpus)
        shards = pretraining.sizes("train")
    if stream:
        from softprompt.tasks import registry  # noqa: F401 (streams are seqio's)
    tasks = shared(load_tasks, mixture_or_task_name, mixture_or_task_module, user_data)
    rates = [rate for _, rate in tasks]
    class_labels = [eval_task.label_classes(task) for task, _ in tasks]
    initial = deep = None
    origin: dict[str, Any] = {"initialisation": None}
    if prompt_length:
        source = prompt.Source(backbone.embedding(), vocabulary, class_labels[0], backbone)
        initial = prompt.initial(prompt_init, seed, prompt_length, source)
        origin = source.origin
        deep = prompt.deep_rows(backbone, initial, prompt_depth)
    given, batch_size = batch_size, train_step.rows_for(batch_size, devices, microbatches)
    if batch_size != given and not pack_length:  # Of packed rows their own line tells.
        say(
            f"BATCH_SIZE {given} is rounded up to {batch_size} rows: as many for each of "
            f"{devices.shape['data']} data partitions x {microbatches} microbatches"
        )
    if stream:
        own = partition.local_rows(devices, batch_size)
        batches = data.stream_batches(
            mixture_or_task_name, "train", task_feature_lengths, batch_size, seed, own
        )
        held_out = [
            data.first_examples(task, eval_split, task_feature_lengths, eval_examples or 256)
            for task, _ in tasks
        ]
        # Text that is streamed is known by how it begins.
        parts = [data.first_examples(task, "train", task_feature_lengths, 64) for task, _ in tasks]
        label_ids = eval_task.training_labels(loss, parts, class_labels, vocabulary, prefix)
    else:
        parts = [shared(data.from_task, task, "train", task_feature_lengths) for task, _ in tasks]
        parts = [data.prefix_targets(part, prefix) for part in parts]
        for part in parts:
            if message := data.cut_message(part, task_feature_lengths):
                say(message)
        label_ids = eval_task.training_labels(loss, parts, class_labels, vocabulary, prefix)
        slots = prompted.slots(backbone.cfg.vocab_size, prompt_length)
        batches = inputs.batches(
            parts, rates, batch_size, seed, slots, devices, microbatches,
            pack_length, length_buckets, 0 if label_ids is None else label_ids.shape[1],
        )  # fmt: skip
        if pack_length:
            pack_length = batches.length
        held_out = [
            shared(eval_task.from_task, task, eval_split, task_feature_lengths, vocabulary)
            for task, _ in tasks
            if eval_split in task.splits
        ]
        _check_split(eval_split, [task for task, _ in tasks])
        eval_task.check_metric(best_metric, held_out)
        if patience:
            eval_task.check_figures(f"PATIENCE is {patience}", held_out)
        evaluation.say_generated(eval_mode, held_out)
    # Nothing is sampled: the predictor needs no seed.
    predictor = shared(
        evaluation.Predictor,
        backbone, prompt_length, eval_mode, eval_batch_size, task_feature_lengths["targets"],
        1, 0.0, 0, 1.0, 0, prefix, training.evaluations(train_steps, eval_period),
    )  # fmt: skip
    save_backbone = functools.partial(
        _save_backbone, backbone, backbone_name, backbone_dtype,
        {
            "task": mixture_or_task_name,
            "batch_size": batch_size,
            "task_feature_lengths": dict(task_feature_lengths),
            "seed": seed,
            **sentinel,
        },
    )  # fmt: skip

    def run_evaluation(flat: tree.Flat, step: int) -> dict[str, float]:
        if step in backbone_steps:
            save_backbone(folder / "backbones" / str(step), flat, {"step": step})
        if stream:
            found = [predictor.loss(flat, examples) for examples in held_out]
            return {"loss": float(np.mean(found))}
        return evaluation.evaluate(predictor, flat, held_out, folder / "eval", step)

    about = prompt.describe(
        backbone, mixture_or_task_name, prompt_length, prompt_init, loss, seed, deep,
        reparameterisation,
    )  # fmt: skip
    about |= sentinel
    cost = _cost(backbone, initial, deep, reparameterisation, trainable, backbone_dtype)
    identity = {
        **about,
        "batch_size": batch_size,
        "pack_length": pack_length,
        # Rounded up for the mesh and the microbatches: what a batch holds depends on it.
        "packed_rows": batches.shape[0] if pack_length else None,
        "length_buckets": length_buckets,
        "trainable": list(trainable),
        "frozen": list(frozen),
        "task_feature_lengths": dict(task_feature_lengths),
        "examples": data.fingerprint(parts),
        "shards": shards,
        "rates": rates if len(rates) > 1 else None,
        "labels": class_labels,
        "eval_split": eval_split,
        "eval_mode": eval_mode,
        "held_out": data.fingerprint([x if stream else x.examples for x in held_out]),
        "dropout_rate": dropout_rate,
        "z_loss": z_loss,
        "label_smoothing": label_smoothing,
        "best_metric": best_metric,
        "bindings": config.bindings("optim")
        | config.bindings("prompt")
        | config.bindings("similarity"),
        # Else what the backbone's weights tell.
        "dtype": dtype if weights == "int8" else None,
    }
    read = ("backbone_fingerprint", "examples", "held_out", "shards", "labels", "rates")
    hosts.agree("data", {name: identity[name] for name in read})
    training.check_resumable(folder, identity, train_steps)
    task_labels = {task.name: own for (task, _), own in zip(tasks, class_labels, strict=True)}
    # What an initial prompt was chosen by is no part of the run's identity: rounding may change it.
    about = {**about, **origin}
    provenance.write(folder, backbone, {**about, "labels": task_labels, **cost})
    count = tree.count({k: backbone.params[k] for k in int8.parameters(backbone.params)})
    say(
        f"backbone {backbone.name} ({count / 1e6:.1f}M parameters in {backbone.weights}, "
        f"fingerprint {backbone.fingerprint}), mesh {dict(devices.shape)}, prompt length "
        f"{prompt_length}, task {mixture_or_task_name}, "
        f"ready after {duration(time.monotonic() - began)}"
    )
    say(
        f"trainable parameters {cost['trainable_parameters']:,} "
        f"({100 * cost['trainable_parameters'] / count:.3g}% of the backbone's); kept for the "
        f"task: {cost['parameters_per_task']:,} ({size(cost['bytes_per_task'])})"
    )
    # What is loaded in fewer bits than it is stored in has another one than the backbone.
    before = tree.fingerprint(backbone.params) if backbone.weights != "float32" else None
    result = fit(
        backbone,
        batches,
        optimizer(),
        train_steps,
        prompt=initial,
        trainable=trainable,
        frozen=frozen,
        evaluate=run_evaluation if held_out else None,
        eval_period=eval_period,
        best_metric="-loss" if stream and best_metric is None else best_metric,
        patience=patience,
        checkpoint_period=checkpoint_period,
        keep=keep_checkpoints,
        log_period=log_period,
        model_dir=folder,
        # Labels given for the initialisation come before the task's own.
        save=prompt.saver(about, config.macros().get("CLASS_LABELS") or class_labels[0]),
        identity=identity,
        seed=seed,
        z_loss=z_loss,
        label_smoothing=label_smoothing,
        label_ids=label_ids,
        microbatches=microbatches,
        **({} if deep is None else {"deep": deep}),
        **({} if reparameterisation is None else {"reparameterisation": reparameterisation}),
    )
    if result.interrupted:
        return result
    if not any(tree.matches(path, trainable) for path in backbone.params):
        after = tree.fingerprint(backbone.params)
        path = folder / "prompts" / "best.safetensors"
        say(f"backbone fingerprint before {before or backbone.fingerprint}, after {after}")
        kept = size(path.stat().st_size) if hosts.first() else None
        which = "best prompt" if result.best_metric is not None else "prompt, which nothing judged,"
        say(f"{which} of step {result.best_step}: {path} ({kept})")
    else:
        out = folder / "backbone"
        note = {"step": result.best_step, "metrics": result.metrics}
        print_name = save_backbone(out, {**backbone.params, **result.best}, note)
        say(f"tuned backbone of step {result.best_step}: {out} (fingerprint {print_name})")
    if written := report.attempt(folder, backbone):
        say(f"report: {written}")
    return result


def _check_split(split: str | None, tasks: Sequence[Any]) -> None:
    """Raises where no task has the split to evaluate on that was asked for; says which have not.

    'none' asks for no evaluation, and one's own data may be without 'validation', the default.
    """
    lacking = [task for task in tasks if split not in task.splits]
    if not lacking or split in (None, "none"):
        return
    told = "; ".join(f"{task.name} has {', '.join(task.splits)}" for task in lacking)
    if len(lacking) == len(tasks) and split != "validation":
        raise ValueError(f"EVAL_SPLIT is {split!r}: {told}. 'none' trains without an evaluation")
    say(f"not evaluated, for want of a split {split!r}: {told}")


def _save_backbone(
    start: Backbone,
    name: str | None,
    dtype: str,
    about: Mapping[str, Any],
    path: pathlib.Path,
    params: tree.Flat,
    note: Mapping[str, Any],
) -> str:
    """Stores what `start` was trained to, without its prompt, and its origins; its fingerprint."""
    arrays = {k: v for k, v in params.items() if not k.startswith("prompt/")}
    if start.weights == "int8":
        arrays = {k: int8.value(arrays, k) for k in int8.parameters(arrays)}
    origin = {"name": start.name, "fingerprint": start.fingerprint, **start.metadata}
    note = {**about, "trained_from": origin, "commit": provenance.commit(), **note}
    stored = Stored.of(name or start.name, start.cfg, arrays, start.vocabulary, note)
    return native.save(path, stored, dtype)


def _cost(
    backbone: Backbone,
    initial: np.ndarray | None,
    deep: np.ndarray | None,
    reparameterisation: reparameterise.Mlp | None,
    trainable: Sequence[str],
    dtype: str,
) -> dict[str, int]:
    """How many parameters train, and how many, in how many bytes, are kept for the task.

    A network that the prompt trains behind trains too, but is not kept; where backbone weights
    train, all of them are kept, as `dtype`.
    """
    kept: tree.Flat = {}
    if initial is not None:
        kept = {training.PROMPT: initial} | ({} if deep is None else {training.DEEP: deep})
    bytes_kept = 4 * tree.count(kept)
    shapes = kept
    if reparameterisation is not None and kept:
        init = functools.partial(reparameterisation.init, prompt=kept)
        shapes = jax.eval_shape(init, jax.random.key(0))
    if any(tree.matches(path, trainable) for path in backbone.params):
        shapes, kept = {**backbone.params, **shapes}, {**backbone.params, **kept}
        bytes_kept += train_settings.STORED_AS[dtype] * tree.count(backbone.params)
    trained = {path: x for path, x in shapes.items() if tree.matches(path, trainable)}
    return {
        "trainable_parameters": tree.count(trained),
        "parameters_per_task": tree.count(kept),
        "bytes_per_task": bytes_kept,
    }


def label_count(settings: Mapping[str, Any]) -> int:
    """How many labels the task that `train`'s arguments name has, read off its definition."""
    if settings["mixture_or_task_name"] is None:
        raise ValueError("LOSS 'labels' needs MIXTURE_OR_TASK_NAME, whose number of labels decides")
    tasks = load_tasks(
        settings["mixture_or_task_name"],
        settings["mixture_or_task_module"],
        settings["user_data"],
    )
    counts = [len(eval_task.label_classes(task) or ()) for task, _ in tasks]
    if not min(counts):
        raise ValueError(f"the task {settings['mixture_or_task_name']!r} has no labels")
    return max(counts)
