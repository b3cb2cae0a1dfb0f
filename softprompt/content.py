"""What a run reads, known by its content: files may lie elsewhere, but must not have changed.

Gin's settings name files, which say nothing of what is in them. Rows that TFDS or seqio gives, and
backbones that are not on this machine, have no file to look into, and are left out.
"""

import functools
import hashlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from softprompt import checkpoint
from softprompt.formats import native
from softprompt.settings import USER_DATA, UserData, load_tasks
from softprompt.tasks import catalogue

BACKBONE = "INITIAL_CHECKPOINT_PATH"
# What the rows of a user's task are read from: known by the splits that a run reads.
USER_FILES = tuple(name for name in USER_DATA.values() if name.endswith("_FILE"))


def of(macros: Mapping[str, Any]) -> dict[str, str | None]:
    """Digests of what the run that gin's macros describe reads; None for what is not there.

    By name: `TASK/SPLIT`, macros that end in _FILE or _FILES, the backbone's. A backbone of our
    format is known by the fingerprint of its weights, another one by its files' names and sizes
    (`files of …`), which tell less: its path counts too.

    Raises:
      ValueError: the task is unknown, or its settings are malformed.
    """
    found: dict[str, str | None] = {}
    for task in tasks(macros):
        definition = catalogue.tasks.get(task.name)
        for split in splits(macros) if definition else ():
            if split in definition.splits and (path := _file(definition, split)) is not None:
                found[f"{task.name}/{split}"] = _digest(path)
    for name, value in macros.items():
        if name.endswith(("_FILE", "_FILES")) and name not in USER_FILES:
            paths = value if isinstance(value, list | tuple) else [value]
            digests = [_digest(path) for path in paths]
            if digests and None not in digests:
                found[name] = " ".join(digests)
    return found | _of_backbone(macros.get(BACKBONE))


def elsewhere(found: Mapping[str, str | None]) -> set[str]:
    """Macros that name files whose content, which is `found`, says all: where they lie is open."""
    return {*found, *USER_FILES}


def tasks(macros: Mapping[str, Any]) -> list[Any]:
    """The tasks of the run that gin's macros describe, defined if need be."""
    user = UserData(**{k: macros[name] for k, name in USER_DATA.items() if name in macros})
    modules = macros.get("MIXTURE_OR_TASK_MODULE")
    return [task for task, _ in load_tasks(macros["MIXTURE_OR_TASK_NAME"], modules, user)]


def splits(macros: Mapping[str, Any]) -> list[str]:
    """The splits of its task that a run reads, if they are there."""
    return ["train", macros["EVAL_SPLIT"]] if "EVAL_SPLIT" in macros else [macros["SPLIT"]]


def _file(definition: catalogue.Definition, split: str) -> Any:
    """The file of a task's rows, '' where it is missing; None where they come from elsewhere."""
    try:
        return definition.file(split)
    except ValueError:
        return ""


def _digest(path: Any) -> str | None:
    """Of a file's bytes, 16 characters; None where there is no such file."""
    if not isinstance(path, str | os.PathLike) or not os.path.isfile(path):
        return None
    about = os.stat(path)
    return _digest_once(os.path.abspath(path), about.st_size, about.st_mtime_ns)


@functools.cache
def _digest_once(path: str, *state: int) -> str:
    """`state` tells whether the file is still what it was when it was last looked into."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def _of_backbone(path: Any) -> dict[str, str]:
    if not isinstance(path, str | os.PathLike):
        return {}
    folder = native.EMBEDDED if str(path) == "embedded" else pathlib.Path(path)
    if native.holds(folder):
        return {BACKBONE: checkpoint.Arrays(folder / native.MODEL_FILE).metadata["fingerprint"]}
    if not folder.is_dir():
        return {}
    # Not of folders within it: what is run may be written there.
    sizes = sorted(f"{p.name} {p.stat().st_size}" for p in folder.iterdir() if p.is_file())
    return {f"files of {BACKBONE}": hashlib.sha256("\n".join(sizes).encode()).hexdigest()[:16]}
