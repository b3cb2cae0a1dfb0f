"""Prompt files, read for a backbone: one alone, or several in one bank."""

import glob
import itertools
import os
import pathlib
from collections.abc import Sequence

from softprompt import prompt, tree
from softprompt.backbone import Backbone
from softprompt.logbook import say

Path = str | os.PathLike
# A prompt's file and what is in it; None and None for the bare backbone.
Read = tuple[Path | None, prompt.Prompt | None]


def read(
    backbone: Backbone, files: Sequence[Path | None], ignore_fingerprint: bool, deep: bool
) -> list[Read]:
    """The prompts in `files`; one that is deep is an error unless `deep`.

    Says which were trained on weights of another type.
    """
    found = [
        (file, None if file is None else prompt.load_for(file, backbone, ignore_fingerprint, deep))
        for file in files
    ]
    for file, one in found:
        trained_on = one and one.metadata.get("backbone_weights", backbone.weights)
        if one is not None and trained_on != backbone.weights:
            say(f"{file}: trained on {trained_on} weights, these are {backbone.weights}")
    return found


def alone(backbone: Backbone, read: Read) -> tuple[tree.Flat, int]:
    """Parameters with one prompt, and its length (0 for None)."""
    _, found = read
    if found is None:
        return dict(backbone.params), 0
    flat, [length] = prompt.attach(backbone, [found.array], found.deep)
    return flat, length


def together(backbone: Backbone, read: Sequence[Read]) -> tuple[tree.Flat, list[int]]:
    """Parameters with a bank of the prompts, and the length of each."""
    return prompt.attach(backbone, [found and found.array for _, found in read])


def target_prefix(backbone: Backbone, read: Sequence[Read]) -> tuple[int, ...]:
    """Ids before every target, where the prompts were trained with TARGET_SENTINEL.

    Without any prompt, where the backbone was.
    """
    given = {str(file): found.metadata for file, found in read if found is not None}
    kinds = {bool(x.get("target_sentinel")) for x in given.values() or [backbone.metadata]}
    if len(kinds) > 1:
        raise ValueError(
            f"{', '.join(given)}: some of these prompts were trained with TARGET_SENTINEL, some "
            f"without; they cannot predict together"
        )
    return (backbone.vocabulary.sentinel(0),) if kinds == {True} else ()


def listed(prompt_files: str | Sequence[Path]) -> list[str]:
    """The files that paths and patterns (`runs/*/prompts/best.safetensors`) name, in order."""
    found: list[str] = []
    for path in [prompt_files] if isinstance(prompt_files, str) else map(str, prompt_files):
        named = sorted(glob.glob(path)) if glob.has_magic(path) else [path]
        if not named:
            raise ValueError(f"PROMPT_FILES: no file fits the pattern {path!r}")
        found += named
    places = [os.path.realpath(path) for path in found]
    if twice := sorted({p for p, at in zip(found, places, strict=True) if places.count(at) > 1}):
        raise ValueError(f"PROMPT_FILES names a file more than once: {', '.join(twice)}")
    if len(found) < 2:
        files = "file" if len(found) == 1 else "files"
        raise ValueError(f"PROMPT_FILES names {len(found)} {files}, expected two or more")
    return found


def told_apart(files: Sequence[str]) -> list[str]:
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
