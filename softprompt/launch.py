"""The binaries behind `softprompt train | eval | infer | baseline`: from gin's values to a run."""

import dataclasses
import functools
import glob
import json
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
    baselines,
    checkpoint,
    config,
    cooccurrence,
    data,
    evaluation,
    hosts,
    int8,
    lengths,
    optim,
    partition,
    prompt,
    prompted,
    provenance,
    reparameterise,
    report,
    tree,
    voting,
)
from softprompt import train as training
from softprompt.backbone import Backbone
from softprompt.formats import Stored, native
from softprompt.logbook import Progress, duration, say, size, track
from softprompt.settings import UserData, check_settings, load_tasks, use_vocabulary
from softprompt.vocabulary import AnyVocabulary, open_vocabulary

Path = str | os.PathLike


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
) -> Backbone:
    from softprompt import t5

    if path is not None:
        loaded = backbones.load(
            path, dtype, dropout_rate, mesh, vocabulary_file, weights=weights, remat=remat
        )
        if architecture is not None:
            expected = t5.config(architecture).to_json()
            if loaded.cfg.to_json() != expected:
                raise ValueError(
                    f"INITIAL_CHECKPOINT_PATH {path!r} holds the architecture "
                    f"{loaded.cfg.to_json()}, ARCHITECTURE {architecture!r} is {expected}"
                )
        return loaded
    if architecture is None:
        raise ValueError("give INITIAL_CHECKPOINT_PATH, or ARCHITECTURE to start from scratch")
    vocabulary = open_vocabulary(vocabulary_file) if vocabulary_file else None
    cfg = dataclasses.replace(t5.config(architecture, dropout_rate, dtype), remat=remat)
    return backbones.random(cfg, seed, vocabulary, mesh, architecture, weights)


class Shared:
    """Calls `function(*arguments)` once, and gives its result again for equal arguments.

    Runs of one process share a backbone, tokenised tasks and compiled predictors by it.
    """

    def __init__(self):
        self._found: dict[Any, Any] = {}

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        key = (function, *map(self._key, arguments))
        if key not in self._found:
            # The arguments are kept, for the identity of a dead object may be taken again.
            self._found[key] = (function(*arguments), arguments)
        return self._found[key][0]

    @staticmethod
    def _key(argument: Any) -> Any:
        if isinstance(argument, Backbone):
            return id(argument)
        try:
            hash(argument)
        except TypeError:
            return repr(argument)
        return argument


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
    mixture_or_task_module: str | Sequence[str] | None = "softprompt.tasks.registry",
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
    loss: str = evaluation.TOKENS,
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
    `pack_length` tokens if that is not 0 (see `data.Packing`; 'auto': see `lengths.pack_length`),
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
    shared = shared or Shared()
    began = time.monotonic()
    check_settings(
        dtype,
        task_feature_lengths,
        TRAIN_STEPS=(train_steps, 1),
        BATCH_SIZE=(batch_size, 1),
        PROMPT_LENGTH=(prompt_length, 0),
        PACK_LENGTH=(0 if pack_length == "auto" else pack_length, 0),
        LENGTH_BUCKETS=(length_buckets, 1),
        EVAL_BATCH_SIZE=(eval_batch_size, 1),
        EVAL_PERIOD=(eval_period, 0),
        PATIENCE=(patience, 0),
        CHECKPOINT_PERIOD=(checkpoint_period, 0),
        KEEP_CHECKPOINTS=(keep_checkpoints, 1),
        LOG_PERIOD=(log_period, 1),
        MICROBATCHES=(microbatches, 1),
    )
    if not prompt_length and (prompt_depth != 1 or reparameterisation is not None):
        raise ValueError("PROMPT_LENGTH is 0: there is no prompt to be deep or reparameterised")
    folder = pathlib.Path(model_dir)
    devices = mesh()
    backbone = shared(
        _load_backbone,
        initial_checkpoint_path, architecture, vocabulary_file, devices, dtype, dropout_rate,
        seed if initial_checkpoint_path is None else 0, weights, remat,
    )  # fmt: skip
    vocabulary = use_vocabulary(backbone)
    prefix = (vocabulary.sentinel(0),) if target_sentinel else ()
    if embeddings_file is not None:
        params = cooccurrence.start_from(backbone.params, embeddings_file)
        fingerprint = tree.fingerprint(params)
        backbone = dataclasses.replace(backbone, params=params, fingerprint=fingerprint)
    if text_corpus is not None:
        from softprompt.tasks import pretraining

        pretraining.use_corpus(text_corpus)
    tasks = shared(load_tasks, mixture_or_task_name, mixture_or_task_module, user_data)
    batch_size = training.rows_for(batch_size, devices, microbatches)
    own = partition.local_rows(devices, batch_size)
    slots = prompted.slots(backbone.cfg.vocab_size, prompt_length)

    class_labels = [evaluation.label_classes(task) for task, _ in tasks]
    initial = deep = None
    if prompt_length:
        initial = prompt_init(
            jax.random.key(seed),
            prompt_length,
            prompt.Source(
                backbone.embedding(),
                vocabulary,
                class_labels[0],
                backbone,
            ),
        )
        deep = prompt.deep_rows(backbone, initial, prompt_depth)
    if stream:
        batches = data.stream_batches(
            mixture_or_task_name, "train", task_feature_lengths, batch_size, seed, own
        )
        parts = held_out = [
            data.first_examples(task, eval_split, task_feature_lengths, eval_examples or 256)
            for task, _ in tasks
        ]
        label_ids = evaluation.training_labels(loss, parts, class_labels, vocabulary, prefix)
    else:
        parts = [shared(data.from_task, task, "train", task_feature_lengths) for task, _ in tasks]
        parts = [data.prefix_targets(part, prefix) for part in parts]
        for part in parts:
            if message := data.cut_message(part, task_feature_lengths):
                say(message)
        rates = [rate for _, rate in tasks]
        label_ids = evaluation.training_labels(loss, parts, class_labels, vocabulary, prefix)
        drawing = (parts, rates, batch_size, seed, slots)
        if pack_length:
            over = devices.shape["data"] * microbatches
            if pack_length == "auto":
                pack_length = lengths.pack_length(*drawing, over)
            width = 0 if label_ids is None else label_ids.shape[1]
            batches = data.Packing(*drawing, pack_length, over, label_length=width)
            own = partition.local_rows(devices, batches.shape[0])
            batches = dataclasses.replace(batches, own=own)
            share, count = batches.fill()
            say(
                f"packing: {batches.shape[0]} rows of {pack_length}, {100 * share:.0f}% full, "
                f"{count:.1f} examples a batch"
            )
        elif length_buckets > 1:
            batches = lengths.bucketed_batches(*drawing, length_buckets, own)
            share, shapes = lengths.padding(batches(0))
            say(f"length buckets: rows of {shapes}, {100 * share:.0f}% full")
        else:
            batches = data.train_batches(*drawing, own)
        held_out = [
            shared(evaluation.from_task, task, eval_split, task_feature_lengths, vocabulary)
            for task, _ in tasks
            if eval_split in task.splits
        ]
        evaluation.check_metric(best_metric, held_out)
    # Nothing is sampled: the predictor needs no seed.
    predictor = shared(
        evaluation.Predictor,
        backbone, prompt_length, eval_mode, eval_batch_size, task_feature_lengths["targets"],
        1, 0.0, 0, 1.0, 0, prefix,
    )  # fmt: skip

    def save_backbone(path: pathlib.Path, params: tree.Flat, note: dict[str, Any]) -> str:
        arrays = {k: v for k, v in params.items() if not k.startswith("prompt/")}
        if backbone.weights == "int8":
            arrays = {k: int8.value(arrays, k) for k in int8.parameters(arrays)}
        name = backbone_name or backbone.name
        positions = note["step"] * batch_size * sum(task_feature_lengths.values())
        origin = {"trained_from": _origin(backbone), "seed": seed, "commit": provenance.commit()}
        note = {"task": mixture_or_task_name, "positions": positions, **origin, **note}
        stored = Stored.of(name, backbone.cfg, arrays, vocabulary, note)
        return native.save(path, stored, backbone_dtype)

    def run_evaluation(flat: tree.Flat, step: int) -> dict[str, float]:
        if step in backbone_steps:
            save_backbone(folder / "backbones" / str(step), flat, {"step": step})
        if stream:
            found = [predictor.loss(flat, examples) for examples in held_out]
            return {"loss": float(np.mean(found))}
        return evaluation.evaluate(predictor, flat, held_out, folder / "eval", step)

    if odd := [k for k in backbone_steps if not eval_period or k % eval_period]:
        raise ValueError(
            f"BACKBONE_STEPS {odd} are no multiples of EVAL_PERIOD, which is {eval_period}"
        )
    only_prompt = all(pattern.startswith("prompt/") for pattern in trainable)
    about = {
        "backbone": backbone.name,
        "backbone_fingerprint": backbone.fingerprint,
        "backbone_weights": backbone.weights,
        "task": mixture_or_task_name,
        "prompt_length": prompt_length,
        "initialisation": getattr(prompt_init, "__name__", str(prompt_init)),
        "loss": loss,
        **({"target_sentinel": True} if target_sentinel else {}),
        "seed": seed,
        **({} if deep is None else {"prompt_depth": len(deep) + 1}),
        **({} if reparameterisation is None else {"network": vars(reparameterisation)}),
    }

    # Labels given for the initialisation come before the task's own.
    labels = config.macros().get("CLASS_LABELS") or class_labels[0]

    def save(path: pathlib.Path, trained: dict[str, np.ndarray], note: dict[str, Any]) -> None:
        if training.PROMPT in trained:
            array, further = trained[training.PROMPT], trained.get(training.DEEP)
            note = {**about, "class_labels": labels, **note}
            prompt.save(f"{path}.safetensors", array, note, further)

    task_labels = {task.name: own for (task, _), own in zip(tasks, class_labels, strict=True)}
    cost = _cost(backbone, initial, deep, reparameterisation, trainable, backbone_dtype)
    provenance.write(folder, backbone, {**about, "labels": task_labels, **cost})
    count = tree.count({k: backbone.params[k] for k in int8.parameters(backbone.params)})
    # What is loaded in fewer bits than it is stored in has another one than the backbone.
    before = tree.fingerprint(backbone.params) if backbone.weights != "float32" else None
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
        save=save,
        identity={
            **about,
            "batch_size": batch_size,
            "pack_length": pack_length,
            "length_buckets": length_buckets,
            "trainable": list(trainable),
        },
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
    if only_prompt:
        after = tree.fingerprint(backbone.params)
        path = folder / "prompts" / "best.safetensors"
        say(f"backbone fingerprint before {before or backbone.fingerprint}, after {after}")
        kept = size(path.stat().st_size) if hosts.first() else None
        say(f"best prompt of step {result.best_step}: {path} ({kept})")
    else:
        out = folder / "backbone"
        note = {"step": result.best_step, "metrics": result.metrics}
        print_name = save_backbone(out, {**backbone.params, **result.best}, note)
        say(f"tuned backbone of step {result.best_step}: {out} (fingerprint {print_name})")
    if written := report.attempt(folder, backbone):
        say(f"report: {written}")
    return result


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
        widths = {"float32": 4, "bfloat16": 2, "int8": 1}
        bytes_kept += widths[dtype] * tree.count(backbone.params)
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
    counts = [len(evaluation.label_classes(task) or ()) for task, _ in tasks]
    if not min(counts):
        raise ValueError(f"the task {settings['mixture_or_task_name']!r} has no labels")
    return max(counts)


def _origin(backbone: Backbone) -> dict[str, Any]:
    """Where a trained backbone started, with that one's own origins."""
    return {"name": backbone.name, "fingerprint": backbone.fingerprint, **backbone.metadata}


def _prompted(
    backbone: Backbone, prompt_file: Path | None, ignore_fingerprint: bool
) -> tuple[tree.Flat, int]:
    """Parameters with the prompt in `prompt_file`, and its length (0 for None)."""
    if prompt_file is None:
        return dict(backbone.params), 0
    found = prompt.load_for(prompt_file, backbone, ignore_fingerprint)
    trained_on = found.metadata.get("backbone_weights", backbone.weights)
    if trained_on != backbone.weights:
        say(f"{prompt_file}: trained on {trained_on} weights, these are {backbone.weights}")
    flat, [length] = prompt.attach(backbone, [found.array], found.deep)
    return flat, length


def _banked(
    backbone: Backbone, prompt_files: Sequence[Path | None], ignore_fingerprint: bool
) -> tuple[tree.Flat, list[int]]:
    """Parameters with a bank of the prompts in `prompt_files`, and the length of each."""
    arrays: list[np.ndarray | None] = []
    for path in prompt_files:
        array = None
        if path is not None:
            array = prompt.load_for(path, backbone, ignore_fingerprint, deep=False).array
        arrays.append(array)
    return prompt.attach(backbone, arrays)


def _target_prefix(files: Sequence[Path | None], vocabulary: AnyVocabulary) -> tuple[int, ...]:
    """Ids before every target, where the prompts in `files` were trained with TARGET_SENTINEL."""
    given = [file for file in files if file is not None]
    found = {bool(prompt.load_deep(file)[2].get("target_sentinel")) for file in given}
    if len(found) > 1:
        raise ValueError(
            f"of the prompts {', '.join(map(str, given))} some were trained with TARGET_SENTINEL, "
            f"some without: they cannot predict together"
        )
    return (vocabulary.sentinel(0),) if found == {True} else ()


def _listed(prompt_files: str | Sequence[Path]) -> list[str]:
    """The files that paths and patterns (`runs/*/prompts/best.safetensors`) name, in order."""
    found: list[str] = []
    for path in [prompt_files] if isinstance(prompt_files, str) else map(str, prompt_files):
        named = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not named:
            raise ValueError(f"PROMPT_FILES: no file fits the pattern {path!r}")
        found += named
    if len(found) < 2:
        raise ValueError(f"PROMPT_FILES names {len(found)} files, expected two or more")
    return found


def eval(
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    initial_checkpoint_path: str,
    prompt_file: Path | None = None,
    prompt_files: Sequence[Path] | None = None,
    best_metric: str | None = None,
    measure_cost: bool = False,
    eval_output_dir: Path | None = None,
    mixture_or_task_module: str | Sequence[str] | None = "softprompt.tasks.registry",
    user_data: UserData | None = None,
    split: str = "validation",
    eval_mode: str = evaluation.GENERATE,
    batch_size: int = 32,
    beams: int = 1,
    mesh: Callable[[], jax.sharding.Mesh] = partition.make_mesh,
    dtype: str = "float32",
    vocabulary_file: str | None = None,
    ignore_fingerprint: bool = False,
    weights: str | None = None,
) -> dict[str, float]:
    """Evaluates a prompt (None: the bare backbone) on a task's split; prints figures as JSON.

    With `prompt_files` all of them vote (see `voting`): figures are those of each prompt, of
    their average, of the best by `best_metric`, and of the ensemble; `measure_cost` compares the
    ensemble's speed with that of separate runs. The majority vote's figures are returned.
    """
    check_settings(dtype, task_feature_lengths, BATCH_SIZE=(batch_size, 1), BEAMS=(beams, 1))
    backbone = backbones.load(
        initial_checkpoint_path,
        dtype,
        mesh=mesh(),
        vocabulary_file=vocabulary_file,
        weights=weights,
    )
    vocabulary = use_vocabulary(backbone)
    files = None if prompt_files is None else _listed(prompt_files)
    if files is None:
        flat, length = _prompted(backbone, prompt_file, ignore_fingerprint)
    elif prompt_file is not None or beams > 1:
        raise ValueError(
            f"PROMPT_FILES vote without PROMPT_FILE and by greedy texts; got PROMPT_FILE "
            f"{prompt_file!r}, BEAMS {beams}"
        )
    else:
        flat, length = _banked(backbone, files, ignore_fingerprint)
    tasks = [
        evaluation.from_task(task, split, task_feature_lengths, vocabulary)
        for task, _ in load_tasks(mixture_or_task_name, mixture_or_task_module, user_data)
    ]
    for task in tasks:
        if message := data.cut_message(task.examples, task_feature_lengths):
            say(message)
    predictor = evaluation.Predictor(
        backbone, length, eval_mode, batch_size, task_feature_lengths["targets"], beams,
        prefix=_target_prefix(files or [prompt_file], vocabulary),
    )  # fmt: skip
    if files is not None:
        for task in tasks:
            evaluation.check_metric(best_metric, [task])
        alone = []
        if measure_cost:
            alone = [_prompted(backbone, file, ignore_fingerprint) for file in files]
        return _ensemble(predictor, flat, tasks, files, best_metric, split, eval_output_dir, alone)
    figures = evaluation.evaluate(predictor, flat, tasks, eval_output_dir)
    labels = {task.name: task.labels for task in tasks}
    _report(mixture_or_task_name, split, figures, eval_output_dir, backbone, labels)
    return figures


def _ensemble(
    predictor: evaluation.Predictor,
    flat: tree.Flat,
    tasks: Sequence[evaluation.EvalTask],
    files: Sequence[str],
    best_metric: str | None,
    split: str,
    folder: Path | None,
    alone: Sequence[tuple[tree.Flat, int]],
) -> dict[str, float]:
    """Reports the ensemble of `files`, and its cost against the parameters and lengths `alone`."""

    def choose(figures: Mapping[str, float]) -> float:
        return training.choose_metric(figures, best_metric)

    reports = voting.evaluate(predictor, flat, tasks, files, choose, folder)
    figures: dict[str, float] = {}
    shared = Shared()
    singles = [
        (
            shared(
                evaluation.Predictor,
                predictor.backbone, (n,), predictor.mode, predictor.batch_size,
                predictor.decode_length,
            ),
            params,
        )
        for params, n in alone
    ]  # fmt: skip
    for task in tasks:
        found = dataclasses.asdict(reports[task.name])
        if singles:
            found |= voting.cost(predictor, flat, singles, task)
        prefix = f"{task.name}/" if len(tasks) > 1 else ""
        figures |= {prefix + name: value for name, value in found["ensemble"].items()}
        say(f"{task.name}, {split}\n{reports[task.name].table()}")
        say(json.dumps({"task": task.name, "split": split, **found}))
        if folder is not None:
            path = pathlib.Path(folder) / f"{task.name}.json"
            checkpoint.write_atomically(path, json.dumps(found, indent=2).encode())
            text = reports[task.name].table() + "\n"
            checkpoint.write_atomically(path.with_suffix(".md"), text.encode())
    return figures


def baseline(
    method: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    initial_checkpoint_path: str,
    eval_output_dir: Path | None = None,
    mixture_or_task_module: str | Sequence[str] | None = "softprompt.tasks.registry",
    user_data: UserData | None = None,
    split: str = "validation",
    eval_mode: str = evaluation.RANK,
    batch_size: int = 32,
    shots: int = 4,
    description: str = "",
    seed: int = 0,
    mesh: Callable[[], jax.sharding.Mesh] = partition.make_mesh,
    dtype: str = "float32",
    vocabulary_file: str | None = None,
    weights: str | None = None,
) -> dict[str, float]:
    """Evaluates what prompt tuning is held against (see `baselines`); prints figures as JSON."""
    if method not in baselines.METHODS:
        raise ValueError(f"METHOD is {method!r}, expected one of {', '.join(baselines.METHODS)}")
    check_settings(dtype, task_feature_lengths, BATCH_SIZE=(batch_size, 1), SHOTS=(shots, 0))
    backbone = backbones.load(
        initial_checkpoint_path,
        dtype,
        mesh=mesh(),
        vocabulary_file=vocabulary_file,
        weights=weights,
    )
    vocabulary = use_vocabulary(backbone)
    found = load_tasks(mixture_or_task_name, mixture_or_task_module, user_data)
    predictor = evaluation.Predictor(
        backbone, 0, eval_mode, batch_size, task_feature_lengths["targets"]
    )
    figures: dict[str, float] = {}
    for source, _ in found:
        task = evaluation.from_task(source, split, task_feature_lengths, vocabulary)
        scores = None
        if method in ("none", "priming"):
            if method == "priming":
                train_set = data.from_task(source, "train", task_feature_lengths)
                primed, lost = baselines.prime(
                    train_set, task.examples, vocabulary, shots,
                    task_feature_lengths["inputs"], seed, description,
                )  # fmt: skip
                for what, n in lost.items():
                    if n:
                        wanted = f"all {shots} shots" if what == "shots" else f"the {what}"
                        say(f"{task.name}: {n} of {len(primed)} inputs have no room for {wanted}")
                task = dataclasses.replace(task, examples=primed)
            predictions, scores = predictor.predict(backbone.params, task)
        else:
            train_set = data.from_task(source, "train", task_feature_lengths)
            if method == "majority":
                predictions = baselines.majority(train_set, task, vocabulary)
            else:
                predictions = baselines.probe(backbone, train_set, task, seed)
        figures |= evaluation.judged(task, predictions, len(found) > 1)
        if eval_output_dir is not None:
            path = pathlib.Path(eval_output_dir) / "predictions" / f"{task.name}.jsonl"
            evaluation.write_predictions(path, task, predictions, scores)
    labels = {source.name: evaluation.label_classes(source) for source, _ in found}
    _report(mixture_or_task_name, split, figures, eval_output_dir, backbone, labels, method=method)
    return figures


def _report(
    name: str,
    split: str,
    figures: Mapping[str, float],
    folder: Path | None,
    backbone: Backbone,
    labels: Mapping[str, Sequence[str] | None],
    **note: Any,
) -> None:
    """Prints figures as JSON, and keeps them in `<folder>/<name>.json` and a report."""
    said = {"task": name, "split": split, **note}
    say(json.dumps({**said, **figures}))
    if folder is None:
        return
    folder = pathlib.Path(folder)
    checkpoint.write_atomically(folder / f"{name}.json", json.dumps(figures, indent=2).encode())
    if not (folder / "train.jsonl").exists():  # A training run's own facts stay.
        of = {"backbone": backbone.name, "backbone_fingerprint": backbone.fingerprint}
        provenance.write(folder, backbone, {**of, **said, "labels": labels})
    report.attempt(folder)


INFER_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class _Named:
    """The prompts of a mixed file: what each is used with, and which one is whose."""

    files: Sequence[Path]
    templates: Sequence[str]
    labels: Sequence[Sequence[str] | None]
    which: Sequence[int]


def _named_prompts(
    rows: Sequence[Any],
    prompts: Mapping[str, Any],
    field: str,
    default: Path | None,
    template: str,
    labels: Sequence[str] | None,
) -> _Named:
    """The prompts that rows name in `field`: names of `prompts`, or paths.

    A row without the field takes the prompt `default`.
    """
    known = {}
    for name, value in prompts.items():
        own = {"file": value} if isinstance(value, str | os.PathLike) else value
        if not isinstance(own, Mapping) or not {"file"} <= set(own) <= {
            "file", "template", "labels",
        }:  # fmt: skip
            raise ValueError(
                f"PROMPTS[{name!r}] is {value!r}, expected a path or {{'file': …, 'template': …, "
                f"'labels': […]}}"
            )
        known[name] = (own["file"], own.get("template", template), own.get("labels", labels))
    places: dict[str, int] = {}
    found, which = [], []
    for row in rows:
        name = row.get(field, default)
        if name is None:
            raise ValueError(f"{row.where}: no field {field!r} names its prompt")
        name = str(name)
        if name not in places:
            there = name in known or "://" in name or pathlib.Path(name).exists()
            if not there:
                raise ValueError(
                    f"{row.where}: {field} is {name!r}, which is neither a file nor one of PROMPTS "
                    f"({', '.join(known) or 'none given'})"
                )
            places[name] = len(found)
            found.append(known.get(name, (name, template, labels)))
        which.append(places[name])
    files, templates, sets = zip(*found, strict=True)
    return _Named(files, templates, sets, which)


def infer(
    input_file: Path,
    output_file: Path,
    initial_checkpoint_path: str,
    prompt_file: Path | None = None,
    prompts: Mapping[str, Any] | None = None,
    prompt_field: str = "prompt",
    template: str = "{text}",
    labels: Sequence[str] | None = None,
    task_feature_lengths: Mapping[str, int] | None = None,
    batch_size: int = 32,
    beams: int = 1,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    mesh: Callable[[], jax.sharding.Mesh] = partition.make_mesh,
    dtype: str = "float32",
    vocabulary_file: str | None = None,
    ignore_fingerprint: bool = False,
    weights: str | None = None,
) -> int:
    """Predicts a text (or, with `labels`, the likeliest label) for each row of a JSONL or CSV file.

    Each output line is the row's fields and `prediction`. A run that was stopped goes on where its
    output file ends. With `prompts` (`{}` if there are only paths) rows of many tasks share
    batches: each names its prompt in `prompt_field`, by a path or by a name in `prompts`, whose
    value is a path or `{'file': …, 'template': …, 'labels': […]}`. Returns the number of rows.
    """
    from softprompt.tasks import records

    lengths = task_feature_lengths or {"inputs": 512, "targets": 64}
    check_settings(dtype, lengths, BATCH_SIZE=(batch_size, 1), BEAMS=(beams, 1), TOP_K=(top_k, 0))
    rows = list(track(records.read(input_file), f"reading {input_file}", "rows"))
    named = None
    if prompts is not None:
        named = _named_prompts(rows, prompts, prompt_field, prompt_file, template, labels)
        texts = [
            records.fill(named.templates[k], row) for k, row in zip(named.which, rows, strict=True)
        ]
    else:
        texts = [records.fill(template, row) for row in rows]
    backbone = backbones.load(
        initial_checkpoint_path,
        dtype,
        mesh=mesh(),
        vocabulary_file=vocabulary_file,
        weights=weights,
    )
    if named is None:
        flat, length = _prompted(backbone, prompt_file, ignore_fingerprint)
    else:
        flat, length = _banked(backbone, named.files, ignore_fingerprint)
    mode = evaluation.RANK if labels else evaluation.GENERATE
    predictor = evaluation.Predictor(
        backbone,
        length,
        mode,
        batch_size,
        lengths["targets"],
        beams,
        temperature,
        top_k,
        top_p,
        seed,
        _target_prefix([prompt_file] if named is None else named.files, backbone.vocabulary),
    )
    partial = pathlib.Path(f"{output_file}.partial")
    done = _complete_lines(partial)
    if done:
        say(f"going on after {done} rows of {partial}")
    partial.parent.mkdir(parents=True, exist_ok=True)
    progress = Progress("predicting", len(rows), "rows", every=0, start=done)
    with open(partial, "a", encoding="utf-8") as out:
        while done < len(rows):
            chunk = slice(done, done + INFER_CHUNK)
            pairs = [(text, "") for text in texts[chunk]]
            examples = data.from_pairs(pairs, backbone.vocabulary, lengths, str(input_file))
            if message := data.cut_message(examples, lengths):
                say(message)
            if named is None:
                task = evaluation.EvalTask(examples, labels, lambda _: {})
                predictions, _ = predictor.predict(flat, task)
            else:
                which = named.which[chunk]
                predictions = predictor.predict_mixed(flat, examples, which, named.labels)
            for row, predicted in zip(rows[chunk], predictions, strict=True):
                out.write(json.dumps({**row, "prediction": predicted}, ensure_ascii=False))
                out.write("\n")
            out.flush()
            done += len(predictions)
            progress.update(done)
    os.replace(partial, output_file)
    say(f"{len(rows)} predictions in {output_file}")
    return len(rows)


def _complete_lines(path: pathlib.Path) -> int:
    """Number of whole lines of a file; a torn last line is cut off."""
    if not path.exists():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        checkpoint.write_atomically(path, whole)
    return whole.count(b"\n")
