"""What is evaluated without training: `softprompt eval | baseline`, from gin's values to files.

Gin files name these functions `launch.eval` and `launch.baseline`.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from softprompt import backbone as backbones
from softprompt import (
    banks,
    baselines,
    checkpoint,
    data,
    eval_task,
    evaluation,
    hosts,
    lengths,
    partition,
    provenance,
    report,
    selection,
    tree,
    voting,
)
from softprompt.backbone import Backbone
from softprompt.logbook import say
from softprompt.settings import (
    BUILTIN,
    UserData,
    check_kinds,
    check_path,
    check_settings,
    load_tasks,
    use_vocabulary,
)
from softprompt.vocabulary import AnyVocabulary

Path = str | os.PathLike


def _opened(
    initial_checkpoint_path: str,
    vocabulary_file: str | None,
    mesh: Callable[[], jax.sharding.Mesh],
    dtype: str,
    weights: str | None,
    mixture_or_task_name: str,
    mixture_or_task_module: str | Sequence[str] | None,
    user_data: UserData | None,
) -> tuple[Backbone, AnyVocabulary, Sequence[Any]]:
    """The backbone, its vocabulary, and the seqio tasks that an evaluation's settings name."""
    backbone = backbones.load(
        initial_checkpoint_path,
        dtype,
        mesh=mesh(),
        vocabulary_file=vocabulary_file,
        weights=weights,
    )
    vocabulary = use_vocabulary(backbone)
    found = load_tasks(mixture_or_task_name, mixture_or_task_module, user_data)
    return backbone, vocabulary, [task for task, _ in found]


def eval(
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    initial_checkpoint_path: str,
    prompt_file: Path | None = None,
    prompt_files: Sequence[Path] | None = None,
    best_metric: str | None = None,
    measure_cost: bool = False,
    eval_output_dir: Path | None = None,
    mixture_or_task_module: str | Sequence[str] | None = BUILTIN,
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
    check_path("PROMPT_FILE", prompt_file, optional=True)
    kinds = prompt_files is None or isinstance(prompt_files, str | list | tuple)
    named = kinds and all(isinstance(path, str | os.PathLike) for path in prompt_files or ())
    check_kinds(PROMPT_FILES=(prompt_files, named, "a path, a pattern or a list of them"))
    backbone, vocabulary, sources = _opened(
        initial_checkpoint_path, vocabulary_file, mesh, dtype, weights,
        mixture_or_task_name, mixture_or_task_module, user_data,
    )  # fmt: skip
    together = prompt_files is not None
    if together and (prompt_file is not None or beams > 1):
        raise ValueError(
            f"PROMPT_FILES vote without PROMPT_FILE and by greedy texts; got PROMPT_FILE "
            f"{prompt_file!r}, BEAMS {beams}"
        )
    files = banks.listed(prompt_files) if together else [prompt_file]
    read = banks.read(backbone, files, ignore_fingerprint, deep=not together)
    flat, length = banks.together(backbone, read) if together else banks.alone(backbone, read[0])
    tasks = [
        eval_task.from_task(source, split, task_feature_lengths, vocabulary) for source in sources
    ]
    if beams > 1 and eval_mode == evaluation.RANK and None not in [task.labels for task in tasks]:
        raise ValueError(f"BEAMS is {beams}, but EVAL_MODE 'rank' ranks labels: leave out one")
    prompts = {path: x for path, x in flat.items() if path.startswith("prompt/")}
    own = {
        "backbone_fingerprint": backbone.fingerprint,
        "prompt_fingerprint": tree.fingerprint(prompts) if prompts else None,
        "examples": data.fingerprint([task.examples for task in tasks]),
    }
    hosts.agree("data", own)
    for task in tasks:
        if message := data.cut_message(task.examples, task_feature_lengths):
            say(message)
    evaluation.say_generated(eval_mode, tasks)
    predictor = evaluation.Predictor(
        backbone, length, eval_mode, batch_size, task_feature_lengths["targets"], beams,
        prefix=banks.target_prefix(backbone, read),
        evaluations=lengths.MANY_EVALUATIONS if measure_cost else 1,
    )  # fmt: skip
    if together:
        for task in tasks:
            task.check_predicted()
            eval_task.check_metric(best_metric, [task])
        alone = [banks.alone(backbone, one) for one in read] if measure_cost else []
        return _ensemble(
            mixture_or_task_name, predictor, flat, tasks, files, best_metric, split,
            eval_output_dir, alone,
        )  # fmt: skip
    figures = evaluation.evaluate(predictor, flat, tasks, eval_output_dir)
    labels = {task.name: task.labels for task in tasks}
    _report(mixture_or_task_name, split, figures, eval_output_dir, backbone, labels)
    return figures


def _ensemble(
    name: str,
    predictor: evaluation.Predictor,
    flat: tree.Flat,
    tasks: Sequence[eval_task.EvalTask],
    files: Sequence[str],
    best_metric: str | None,
    split: str,
    folder: Path | None,
    alone: Sequence[tuple[tree.Flat, int]],
) -> dict[str, float]:
    """Reports the ensemble of `files`, and its cost against the parameters and lengths `alone`."""

    def choose(figures: Mapping[str, float]) -> float:
        found = selection.choose_metric(figures, best_metric)
        return 0.0 if found is None else found  # Without figures all are alike.

    reports = voting.evaluate(predictor, flat, tasks, banks.told_apart(files), choose, folder)
    figures: dict[str, float] = {}
    # Prompts of one length share a compiled predictor.
    predictors = {
        n: evaluation.Predictor(
            predictor.backbone,
            n,
            predictor.mode,
            predictor.batch_size,
            predictor.decode_length,
            prefix=predictor.prefix,
            evaluations=predictor.evaluations,
        )  # fmt: skip
        for n in {n for _, n in alone}
    }
    singles = [(predictors[n], params) for params, n in alone]
    for task in tasks:
        found = dataclasses.asdict(reports[task.name])
        if singles:
            found |= voting.cost(predictor, flat, singles, task)
        figures |= task.named(found["ensemble"], len(tasks) > 1)
        say(f"{task.name}, {split}\n{reports[task.name].table()}")
        say(json.dumps({"task": task.name, "split": split, **found}))
        if folder is not None:
            path = pathlib.Path(folder) / f"{task.name}.json"
            checkpoint.write_atomically(path, json.dumps(found, indent=2).encode())
            text = reports[task.name].table() + "\n"
            checkpoint.write_atomically(path.with_suffix(".md"), text.encode())
    if folder is not None:
        said = {"task": name, "split": split, "ensemble": [str(file) for file in files]}
        _keep_facts(folder, predictor.backbone, said, {task.name: task.labels for task in tasks})
        report.attempt(folder)
    return figures


def check_baseline(settings: Mapping[str, Any]) -> None:
    """Raises where one of `baseline`'s arguments makes no sense, by its name in gin files."""
    method, seed = settings["method"], settings["seed"]
    if method not in baselines.METHODS:
        raise ValueError(f"METHOD is {method!r}, expected one of {', '.join(baselines.METHODS)}")
    check_settings(
        settings["dtype"], settings["task_feature_lengths"],
        EVAL_BATCH_SIZE=(settings["batch_size"], 1), SHOTS=(settings["shots"], 0), SEED=(seed, 0),
    )  # fmt: skip


def baseline(
    method: str,
    mixture_or_task_name: str,
    task_feature_lengths: Mapping[str, int],
    initial_checkpoint_path: str,
    eval_output_dir: Path | None = None,
    mixture_or_task_module: str | Sequence[str] | None = BUILTIN,
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
    check_baseline(dict(locals()))
    backbone, vocabulary, sources = _opened(
        initial_checkpoint_path, vocabulary_file, mesh, dtype, weights,
        mixture_or_task_name, mixture_or_task_module, user_data,
    )  # fmt: skip
    predictor = evaluation.Predictor(
        backbone, 0, eval_mode, batch_size, task_feature_lengths["targets"],
        prefix=banks.target_prefix(backbone, []),
    )  # fmt: skip
    figures: dict[str, float] = {}
    counts: list[int] = []
    for source in sources:
        task = eval_task.from_task(source, split, task_feature_lengths, vocabulary)
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
            found, columns = evaluation.outputs(predictor, backbone.params, task)
        else:
            task.check_predicted()
            if task.judge_scores is not None:
                left_out = task.judge_scores(np.zeros(len(task.examples)))
                say(f"{task.name}: {method} scores no targets: without {', '.join(left_out)}")
            train_set = data.from_task(source, "train", task_feature_lengths)
            if method == "majority":
                predictions = baselines.majority(train_set, task, vocabulary)
            else:
                predictions, count = baselines.probe(backbone, train_set, task, seed)
                counts.append(count)
            found, columns = task.figures(predictions), {"prediction": predictions}
        figures |= task.named(found, len(sources) > 1)
        if eval_output_dir is not None:
            path = pathlib.Path(eval_output_dir) / "predictions" / f"{task.name}.jsonl"
            evaluation.write_predictions(path, task, columns)
    labels = {source.name: eval_task.label_classes(source) for source in sources}
    _report(
        mixture_or_task_name, split, figures, eval_output_dir, backbone, labels, method=method,
        trainable_parameters=sum(counts), parameters_per_task=max(counts, default=0),
        # What text priming keeps is text.
        bytes_per_task=None if method == "priming" else 4 * max(counts, default=0),
    )  # fmt: skip
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
    path = None if folder is None else pathlib.Path(folder) / f"{name}.json"
    if path is not None and path.exists():
        say(f"{path} is replaced, as are the predictions beside it")
    say(json.dumps({**said, **figures}))
    if path is None:
        return
    checkpoint.write_atomically(path, json.dumps(figures, indent=2).encode())
    _keep_facts(folder, backbone, said, labels)
    report.attempt(folder)


def _keep_facts(
    folder: Path,
    backbone: Backbone,
    said: Mapping[str, Any],
    labels: Mapping[str, Sequence[str] | None],
) -> None:
    """Writes how an evaluation was made, unless the folder is a training run's, whose own stay."""
    folder = pathlib.Path(folder)
    if not (folder / "train.jsonl").exists():
        of = {"backbone": backbone.name, "backbone_fingerprint": backbone.fingerprint}
        provenance.write(folder, backbone, {**of, **said, "labels": labels})
