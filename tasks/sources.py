"""Where the tasks' rows come from: JSON Lines in a folder the user names, else TFDS.

Both give the same rows (the fields of the TFDS configuration), and the same Python functions turn
them into text, so a task reads the same whichever way its data came.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from softprompt.importing import import_seqio
from softprompt.tasks import catalogue, records
from softprompt.tasks.catalogue import INT, Definition
from softprompt.tasks.preprocessors import TextFn
from softprompt.tasks.records import Row

_data_dir: str | None = None


def use_data_dir(folder: str | os.PathLike | None) -> None:
    """Names the folder of local data sets, over SOFTPROMPT_DATA_DIR; it must be there."""
    global _data_dir
    if folder is not None and not os.path.isdir(folder):
        raise ValueError(f"--data_dir {str(folder)!r}: there is no such folder")
    _data_dir = None if folder is None else str(folder)


def local_file(folder: str, split: str) -> pathlib.Path | None:
    """The file of a split in the user's data folder; None where no such folder is named.

    A named folder that lacks the file is an error: TFDS is never taken in its place.
    """
    root = _data_dir or os.environ.get("SOFTPROMPT_DATA_DIR")
    if not root:
        return None
    place = pathlib.Path(root) / folder
    for name in (f"{split}.jsonl", f"{split}.jsonl.gz"):
        if (place / name).is_file():
            return place / name
    there = sorted(p.name for p in place.iterdir()) if place.is_dir() else []
    raise ValueError(
        f"the data folder {root!r} has no {folder}/{split}.jsonl (or .jsonl.gz); "
        + (f"{folder} holds {', '.join(there)}" if there else f"there is no folder {folder}")
    )


def tfds_rows(tfds_name: str, split: str, task: str) -> Iterator[Row]:
    """Rows of a TFDS split, as Python values."""
    try:
        dataset = import_seqio().LazyTfdsLoader(tfds_name).load(split, shuffle_files=False)
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"the data of {task} is not at hand: TFDS cannot give {tfds_name} ({reason}). Name a "
            f"folder of JSON Lines by --data_dir or SOFTPROMPT_DATA_DIR, or a folder of prepared "
            f"TFDS data by --tfds_data_dir"
        ) from None
    for number, fields in enumerate(dataset.as_numpy_iterator(), 1):
        yield Row(_python(fields), f"{tfds_name}/{split}", number)


def _python(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, Mapping):
        return {k: _python(v) for k, v in value.items()}
    if isinstance(value, np.ndarray):
        return [_python(v) for v in value.tolist()]
    return value.item() if isinstance(value, np.generic) else value


@dataclasses.dataclass(frozen=True)
class Spec:
    """A text-to-text task over rows.

    Attributes:
      name: of the task.
      folder: of its JSON Lines files, inside the user's data folder.
      text: row to text-to-text examples.
      tfds_name: None where TFDS does not have it.
      metric_fns, postprocess_fn: as seqio's.
      extras: fields besides `inputs` and `targets`, with their kinds.
      splits: split names, or a mapping to the names of the source.
      tfds_splits: names of splits that TFDS calls otherwise.
      train_text: another text function for the split 'train'.
    """

    name: str
    folder: str
    text: TextFn
    metric_fns: Sequence[Callable]
    postprocess_fn: Callable
    tfds_name: str | None = None
    extras: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"idx": INT})
    splits: Sequence[str] | Mapping[str, str] = ("train", "validation", "test")
    tfds_splits: Mapping[str, str] = dataclasses.field(default_factory=dict)
    train_text: TextFn | None = None


def _find(spec: Spec, split: str) -> tuple[str, pathlib.Path | None]:
    """What the source calls a split, and its file in the user's folder, None if it is TFDS's.

    Raises:
      ValueError: it has none, and TFDS does not know the task either.
    """
    source = spec.splits[split] if isinstance(spec.splits, Mapping) else split
    path = local_file(spec.folder, source)
    if path is None and spec.tfds_name is None:
        raise ValueError(
            f"the data of {spec.name} is not at hand: name a folder that has "
            f"{spec.folder}/{source}.jsonl by --data_dir or SOFTPROMPT_DATA_DIR"
        )
    return source, path


def rows(spec: Spec, split: str) -> Iterator[Row]:
    """Rows of a task's split, from the user's folder or TFDS."""
    source, path = _find(spec, split)
    if path is not None:
        return records.read(path)
    return tfds_rows(spec.tfds_name, spec.tfds_splits.get(source, source), spec.name)


_specs: dict[str, Spec] = {}


def check_local(task: str, split: str) -> bool:
    """Whether a folder of the user's has a benchmark task's split (of other tasks, False).

    Raises:
      ValueError: it has not, and TFDS does not know the task either.
    """
    spec = _specs.get(task)
    return spec is not None and _find(spec, split)[1] is not None


def check_at_hand(task: str, split: str) -> None:
    """Raises, and reads no rows, where a benchmark task's split is not at hand.

    Without a folder of the user's, TFDS must have prepared it: nothing is downloaded to find out.
    """
    spec = _specs.get(task)
    if spec is None:
        raise ValueError(f"{task!r} is not a benchmark task that this package brings")
    source, path = _find(spec, split)
    if path is not None:
        return
    try:
        prepared = import_seqio().LazyTfdsLoader(spec.tfds_name).builder.data_path.exists()
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise ValueError(f"TFDS cannot give {spec.tfds_name} ({reason})") from None
    if not prepared:
        raise ValueError(
            f"TFDS has not prepared {spec.tfds_name}: run `tfds build {spec.tfds_name}`, or name a "
            f"folder that has {spec.folder}/{source}.jsonl by --data_dir"
        )


def define(spec: Spec) -> None:
    """Defines a benchmark task."""
    _specs[spec.name] = spec

    def examples(split: str) -> Iterator[dict[str, Any]]:
        text = spec.train_text if split == "train" and spec.train_text else spec.text
        for row in rows(spec, split):
            try:
                yield from text(row)
            except (TypeError, KeyError, AttributeError) as error:
                raise ValueError(f"{row.where}: this is no row of {spec.name}: {error!r}") from None

    catalogue.add(
        Definition(
            spec.name, examples, tuple(spec.splits), list(spec.metric_fns), spec.postprocess_fn,
            spec.extras, lambda split: _find(spec, split)[1],
        )
    )  # fmt: skip


def define_both(spec: Spec, **overrides: Any) -> None:
    """Defines `<name>_named` as T5 words it, and `<name>` without the task's name."""
    from softprompt.tasks.preprocessors import drop_name

    named = dataclasses.replace(spec, name=f"{spec.name}_named", **overrides)
    define(named)
    define(
        dataclasses.replace(
            named,
            name=spec.name,
            text=drop_name(named.text),
            train_text=named.train_text and drop_name(named.train_text),
        )
    )
