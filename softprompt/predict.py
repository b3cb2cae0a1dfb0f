"""What predicts without training: `softprompt eval | infer | baseline`, from gin's values to files.

Gin files name these functions `launch.eval`, `launch.infer` and `launch.baseline`.
"""

import dataclasses
import glob
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from softprompt import backbone as backbones
from softprompt import (
    baselines,
    checkpoint,
    data,
    evaluation,
    partition,
    prompt,
    provenance,
    report,
    tree,
    voting,
)
from softprompt import train as training
from softprompt.backbone import Backbone
from softprompt.logbook import Progress, say, track
from softprompt.settings import UserData, check_settings, load_tasks, use_vocabulary
from softprompt.vocabulary import AnyVocabulary

Path = str | os.PathLike
# A prompt's file and what is in it; None and None for the bare backbone.
Read = tuple[Path | None, prompt.Prompt | None]


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


def _read(
    backbone: Backbone, files: Sequence[Path | None], ignore_fingerprint: bool, deep: bool
) -> list[Read]:
    """The prompts in `files`; one that is deep is an error unless `deep`."""
    return [
        (file, None if file is None else prompt.load_for(file, backbone, ignore_fingerprint, deep))
        for file in files
    ]


def _alone(backbone: Backbone, read: Read) -> tuple[tree.Flat, int]:
    """Parameters with one prompt, and its length (0 for None)."""
    file, found = read
    if found is None:
        return dict(backbone.params), 0
    trained_on = found.metadata.get("backbone_weights", backbone.weights)
    if trained_on != backbone.weights:
        say(f"{file}: trained on {trained_on} weights, these are {backbone.weights}")
    flat, [length] = prompt.attach(backbone, [found.array], found.deep)
    return flat, length


def _together(backbone: Backbone, read: Sequence[Read]) -> tuple[tree.Flat, list[int]]:
    """Parameters with a bank of the prompts, and the length of each."""
    return prompt.attach(backbone, [found and found.array for _, found in read])


def _target_prefix(read: Sequence[Read], vocabulary: AnyVocabulary) -> tuple[int, ...]:
    """Ids before every target, where the prompts were trained with TARGET_SENTINEL."""
    given = {str(file): found for file, found in read if found is not None}
    kinds = {bool(found.metadata.get("target_sentinel")) for found in given.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"of the prompts {', '.join(given)} some were trained with TARGET_SENTINEL, some "
            f"without: they cannot predict together"
        )
    return (vocabulary.sentinel(0),) if kinds == {True} else ()


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


def _told_apart(files: Sequence[str]) -> list[str]:
    """What tells paths apart: without the folders that all of them begin or end with.

    Worked example: runs/a/best.npy and runs/b/best.npy are `a` and `b`.
    """
    paths = [pathlib.PurePath(file).parts for file in files]

    def alike(paths: Sequence[Sequence[str]]) -> int:
        steps = zip(*paths, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda names: len(set(names)) == 1, steps))

    first, last = alike(paths), alike([path[::-1] for path in paths])
    names = ["/".join(path[first : len(path) - last]) for path in paths]
    return names if all(names) else list(files)


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
    files = _listed(prompt_files) if together else [prompt_file]
    read = _read(backbone, files, ignore_fingerprint, deep=not together)
    flat, length = _together(backbone, read) if together else _alone(backbone, read[0])
    tasks = [
        evaluation.from_task(source, split, task_feature_lengths, vocabulary) for source in sources
    ]
    for task in tasks:
        if message := data.cut_message(task.examples, task_feature_lengths):
            say(message)
    predictor = evaluation.Predictor(
        backbone, length, eval_mode, batch_size, task_feature_lengths["targets"], beams,
        prefix=_target_prefix(read, vocabulary),
    )  # fmt: skip
    if together:
        for task in tasks:
            evaluation.check_metric(best_metric, [task])
        alone = [_alone(backbone, one) for one in read] if measure_cost else []
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

    reports = voting.evaluate(predictor, flat, tasks, _told_apart(files), choose, folder)
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
        )  # fmt: skip
        for n in {n for _, n in alone}
    }
    singles = [(predictors[n], params) for params, n in alone]
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
    if folder is not None:
        said = {"task": name, "split": split, "ensemble": [str(file) for file in files]}
        _keep_facts(folder, predictor.backbone, said, {task.name: task.labels for task in tasks})
        report.attempt(folder)
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
    backbone, vocabulary, sources = _opened(
        initial_checkpoint_path, vocabulary_file, mesh, dtype, weights,
        mixture_or_task_name, mixture_or_task_module, user_data,
    )  # fmt: skip
    predictor = evaluation.Predictor(
        backbone, 0, eval_mode, batch_size, task_feature_lengths["targets"]
    )
    figures: dict[str, float] = {}
    for source in sources:
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
        figures |= evaluation.judged(task, predictions, len(sources) > 1)
        if eval_output_dir is not None:
            path = pathlib.Path(eval_output_dir) / "predictions" / f"{task.name}.jsonl"
            evaluation.write_predictions(path, task, predictions, scores)
    labels = {source.name: evaluation.label_classes(source) for source in sources}
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
    files = [prompt_file] if named is None else named.files
    read = _read(backbone, files, ignore_fingerprint, deep=named is None)
    flat, length = _alone(backbone, read[0]) if named is None else _together(backbone, read)
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
        _target_prefix(read, backbone.vocabulary),
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
