"""What the folder of a run holds: figures, predictions, its prompt's portrait, how it was made."""

import dataclasses
import json
import math
import os
import pathlib
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from softprompt import analysis, checkpoint


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions of one task: rows of `evaluation.write_predictions`, at a step if any."""

    task: str
    step: int | None
    rows: Sequence[Mapping[str, Any]]
    labels: Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a run trained, None for what its folder does not tell.

    Attributes:
      best_step: the step that was chosen.
      trained: number of parameters that were trained.
      stored: bytes that are kept for the task, of its prompt or its backbone.
    """

    best_step: int | None = None
    trained: int | None = None
    stored: int | None = None


@dataclasses.dataclass(frozen=True)
class Run:
    """What the folder of a run (training, evaluation or baseline) holds.

    Attributes:
      facts: run.json or, where a Python call left none, what the best prompt says of itself.
      config: the operative gin configuration.
      train, evaluations: figures by step.
      weights: what was trained.
      portrait: what `analysis.analyse` says of the best prompt.
      ensembles: `voting.Report` of every task, where prompts voted.
    """

    folder: pathlib.Path
    facts: Mapping[str, Any]
    config: str
    train: Sequence[Mapping[str, float]]
    evaluations: Sequence[Mapping[str, float]]
    weights: Weights
    predictions: Sequence[Predictions]
    portrait: Mapping[str, Any] | None
    ensembles: Mapping[str, Mapping[str, Any]]


def json_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file, none where there is none; a torn last line is left out.

    Raises:
      CorruptFile: another line is no JSON; the message names the file and the line.
    """
    if not path.is_file():
        return []
    found = []
    # No splitlines: it also splits at separators that JSON's strings may hold.
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            found.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise checkpoint.CorruptFile(
                    f"{str(path)!r}, line {number}: no JSON: {error}"
                ) from None
    return found


def json_object(path: pathlib.Path) -> dict[str, Any]:
    """The object in a JSON file, an empty one where there is none."""
    return checkpoint.read_object(path) if path.is_file() else {}


def read(folder: pathlib.Path, words: analysis.Words | None = None) -> Run:
    """What the folder of a run holds.

    Raises:
      ValueError: it holds no run.
    """
    train = json_lines(folder / "train.jsonl")
    if train and not {"step", "loss"} <= set(train[0]):
        train = []  # Another program's: a data set, say.
    evaluations = json_lines(folder / "eval" / "metrics.jsonl")
    trains = bool(train or evaluations)
    files = sorted((folder / "eval" if trains else folder).glob("predictions/*.jsonl"))
    if not trains and not files and not (folder / "run.json").is_file():
        raise ValueError(
            f"{str(folder)!r} is no folder of a run, sweep, population or transfer: it holds "
            f"none of train.jsonl, run.json, predictions, results.csv and population.csv"
        )
    portrait = _portrait(folder, words)
    facts = json_object(folder / "run.json")
    if not facts and portrait:
        facts = dict(portrait["prompts"][0]["metadata"])
    weights = read_weights(folder, facts)
    # Of an evaluation that was no ensemble's, others in the same folder say nothing.
    ensembles = _ensembles(folder, files) if trains or "ensemble" in facts or not facts else {}
    if ensembles and not trains:
        several = len(ensembles) > 1
        evaluations = [
            {
                (f"{task}/" if several else "") + name: value
                for task, found in ensembles.items()
                for name, value in found["ensemble"].items()
            }
        ]
    elif not trains and facts.get("task"):
        # An evaluation leaves its figures without a step.
        figures = json_object(folder / f"{facts['task']}.json")
        evaluations = [figures] if figures else []
    config = folder / "config.gin"
    return Run(
        folder,
        facts,
        config.read_text(encoding="utf-8") if config.is_file() else "",
        train,
        evaluations,
        weights,
        _predictions(files, trains, weights.best_step, facts.get("labels") or {}),
        portrait,
        ensembles,
    )


def _ensembles(folder: pathlib.Path, files: Sequence[pathlib.Path]) -> dict[str, dict[str, Any]]:
    """What an evaluation of an ensemble said of each task that it left predictions of."""
    found = {path.stem: json_object(folder / f"{path.stem}.json") for path in files}
    return {task: facts for task, facts in found.items() if "ensemble" in facts}


def read_weights(folder: pathlib.Path, facts: Mapping[str, Any]) -> Weights:
    """What the run in a folder trained, by its facts or, without them, the headers of its files."""
    best = folder / "checkpoints" / "best.safetensors"
    prompt = folder / "prompts" / "best.safetensors"
    step = arrays = None
    if best.is_file():
        arrays = checkpoint.Arrays(best)
        step = arrays.metadata["best"]["step"]
    elif prompt.is_file():
        arrays = checkpoint.Arrays(prompt)
        step = arrays.metadata.get("step")
    trained = arrays and sum(math.prod(shape) for shape in arrays.shapes.values())
    kept = [p for p in (prompt, folder / "backbone" / "model.safetensors") if p.is_file()]
    stored = sum(p.stat().st_size for p in kept) if kept else None
    return Weights(
        step, facts.get("trainable_parameters", trained), facts.get("bytes_per_task", stored)
    )


def _portrait(folder: pathlib.Path, words: analysis.Words | None) -> dict[str, Any] | None:
    """What the best prompt looks like, kept in `analysis.json`."""
    best = folder / "prompts" / "best.safetensors"
    if not best.is_file():
        return None
    found = analysis.read([best])
    kept = json_object(folder / "analysis.json")
    if words is None and kept.get("backbone"):
        [before, *_] = kept["prompts"]
        if before["metadata"].get("sha256") == found[0].metadata["sha256"]:
            return kept
    facts = analysis.analyse(found, words or analysis.words_for(found, None))
    text = json.dumps(facts, indent=1, ensure_ascii=False)
    checkpoint.write_atomically(folder / "analysis.json", text.encode())
    return facts


def _predictions(
    files: Sequence[pathlib.Path], trains: bool, best_step: int | None, labels: Mapping[str, Any]
) -> list[Predictions]:
    """Of every task the predictions of the best step, or else of its last."""
    by_task: dict[str, dict[int | None, pathlib.Path]] = {}
    for path in files:
        stepped = re.fullmatch(r"(.+)-(\d+)", path.stem) if trains else None
        task, step = (stepped[1], int(stepped[2])) if stepped else (path.stem, None)
        by_task.setdefault(task, {})[step] = path
    found = []
    for task, steps in sorted(by_task.items()):
        step = best_step if best_step in steps else max(steps, key=lambda s: -1 if s is None else s)
        rows = json_lines(steps[step])
        own = labels.get(task) or (rows and list(rows[0].get("scores", ()))) or None
        found.append(Predictions(task, step, rows, own))
    return found


# Commands that make many runs.
MANY = (["sweep"], ["population"], ["transfer"], ["reproduce"])


def command_line(facts: Mapping[str, Any], folder: str | os.PathLike | None = None) -> str | None:
    """The command of run.json, quoted for a shell, in its directory; None if there is none.

    With `folder`, a run that was one of many is made alone, from its own configuration there.
    """
    command = facts.get("command")
    if not command:
        return None
    program, *arguments = command
    name = pathlib.PurePath(program).name
    if name == "__main__.py" and pathlib.PurePath(program).parent.name == "softprompt":
        name = "softprompt"
    if folder is not None and name == "softprompt" and arguments[:1] in MANY:
        binary = "baseline" if "method" in facts else "eval" if "split" in facts else "train"
        config = os.path.abspath(pathlib.Path(folder) / "config.gin")
        arguments = [binary, f"--gin_file={config}", *_data_flags(arguments)]
    words = [name] if name == "softprompt" else ["python", program]
    variables = [f"{k}={shlex.quote(v)}" for k, v in facts.get("variables", {}).items()]
    opening = [*variables, shlex.join([*words, *arguments[:1]])]
    # A flag a line, as one would type a long command.
    line = " \\\n  ".join([" ".join(opening), *map(shlex.quote, arguments[1:])])
    directory = facts.get("directory")
    return f"cd {shlex.quote(directory)}\n{line}" if directory else line


def _data_flags(arguments: Sequence[str]) -> list[str]:
    flags = ("--data_dir", "--tfds_data_dir", "--seqio_additional_cache_dirs")
    # The value may be a word of its own.
    pairs = zip(arguments, [*arguments[1:], ""], strict=True)
    words = [f"{word}={after}" if word in flags else word for word, after in pairs]
    return [word for word in words if word.startswith(tuple(f"{flag}=" for flag in flags))]
