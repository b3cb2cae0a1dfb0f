"""`softprompt convert` and `softprompt inspect`: backbones and prompts from format to format."""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import numpy as np

from softprompt import analysis, formats, prompt, tree
from softprompt import backbone as backbones
from softprompt.formats import Stored, hf, native, prompts, t5x
from softprompt.logbook import say

BACKBONES = {"softprompt": native.save, "hf": hf.save, "t5x": t5x.save}
PROMPTS = {"prompt": prompts.write, "npy": prompts.write_numpy, "peft": prompts.write_peft}
SUFFIXES = {"prompt": ".safetensors", "npy": ".npy"}


def convert(
    source: str,
    output: str | os.PathLike,
    to: str,
    dtype: str | None = None,
    vocabulary_file: str | None = None,
    relative_max_distance: int | None = None,
    backbone: str | None = None,
) -> None:
    """Converts a backbone or a prompt; `output` appears whole or not at all.

    Args:
      source: what `formats.open_stored` or `prompts.read` takes.
      output: folder (or, for the prompt formats 'prompt' and 'npy', file) that does not exist yet.
      to: 'softprompt', 'hf' or 't5x' for a backbone; 'prompt', 'npy' or 'peft' for a prompt.
      dtype: of the weights written; None keeps what is stored (the values of int8 as float32).
      backbone: for a prompt, the backbone it belongs to: its width is checked, its name and
        fingerprint are written beside it.

    Raises:
      ValueError: something is not there, does not fit, or would be overwritten.
      checkpoint.CorruptFile: a torn or altered file.
    """
    output = pathlib.Path(output)
    if to not in {**BACKBONES, **PROMPTS}:
        raise ValueError(f"--to is {to!r}, expected one of {', '.join({**BACKBONES, **PROMPTS})}")
    if output.exists():
        raise ValueError(f"{str(output)!r} exists already; choose another place, or remove it")
    for flag, value, formats_ in (
        ("--dtype", dtype, BACKBONES),
        ("--vocabulary_file", vocabulary_file, BACKBONES),
        ("--relative_max_distance", relative_max_distance, BACKBONES),
        ("--backbone", backbone, PROMPTS),
    ):
        if value is not None and to not in formats_:
            raise ValueError(f"{flag} has no meaning for --to {to}")
    if to in PROMPTS and SUFFIXES.get(to, "") != output.suffix and to in SUFFIXES:
        raise ValueError(f"{str(output)!r} should end with {SUFFIXES[to]!r} for --to {to}")
    scratch = output.with_name(f".{output.name}.{os.getpid()}{SUFFIXES.get(to, '')}")
    try:
        if to in PROMPTS:
            summary = _convert_prompt(source, scratch, to, backbone)
        else:
            if not _is_backbone(source):
                raise ValueError(f"{source!r} is a prompt, --to {to} is for backbones")
            summary = _convert_backbone(
                formats.open_stored(source, vocabulary_file, relative_max_distance),
                scratch, to, dtype, vocabulary_file, relative_max_distance,
            )  # fmt: skip
        os.replace(scratch, output)
    except OSError as error:
        raise ValueError(f"cannot write {str(output)!r}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        with contextlib.suppress(OSError):
            scratch.unlink()
    say(f"{output}: {summary}")


def _is_backbone(source: str) -> bool:
    path = pathlib.Path(source)
    if path.suffix in SUFFIXES.values():
        return False
    return not (path.is_file() or (path / prompts.ADAPTER_CONFIG).is_file())


def _convert_backbone(
    stored: Stored,
    output: pathlib.Path,
    to: str,
    dtype: str | None,
    vocabulary_file: str | None,
    relative_max_distance: int | None,
) -> str:
    """Writes a backbone, reads it again, and compares."""
    backbones.check(stored)
    BACKBONES[to](output, stored, dtype)
    again = formats.open_stored(output, vocabulary_file, relative_max_distance)
    found = _fingerprint(again)
    if dtype is None and found != (expected := _fingerprint(stored)):
        raise ValueError(
            f"what was written has the fingerprint {found}, the source {expected}: please report "
            f"this as a bug"
        )
    lost = {
        name: value
        for name, value in stored.cfg.to_json().items()
        if again.cfg.to_json()[name] != value
    }
    if set(lost) - {"relative_max_distance"}:
        raise ValueError(
            f"{to} cannot record {lost} of {stored.where!r}: it would be another model"
        )
    notes = [f"fingerprint {found}", f"{_count(again) / 1e6:.1f}M parameters"]
    if lost:
        notes.append(f"this format does not record {lost}: give it again when reading")
    if stored.prompts:
        notes.append(f"without the prompt {', '.join(stored.prompts)}: --to prompt writes it")
    if stored.vocabulary is None:
        notes.append("without a vocabulary, for the source has none (--vocabulary_file gives one)")
    elif again.vocabulary is None:
        notes.append(f"this format has no place for the vocabulary {stored.vocabulary.path}")
    return "; ".join(notes)


def _fingerprint(stored: Stored) -> str:
    found = tree.Fingerprint()
    for path in sorted(stored.shapes):
        found.add(path, stored.read(path))
    return str(found)


def _count(stored: Stored) -> int:
    return sum(int(np.prod(shape)) for shape in stored.shapes.values())


def _convert_prompt(source: str, output: pathlib.Path, to: str, backbone: str | None) -> str:
    array, deep, metadata = prompts.read_deep(source)
    if deep is not None and to != "prompt":
        raise ValueError(
            f"{source!r} is a deep prompt, with rows for {len(deep) + 1} encoder layers; --to {to} "
            f"holds the input's alone, choose --to prompt"
        )
    if note := metadata.get("note"):
        say(f"{source}: {note}")
    if backbone is not None:
        owner = backbones.load(backbone)
        prompt.check_backbone(source, array, metadata, owner)
        metadata |= {"backbone": owner.name, "backbone_fingerprint": owner.fingerprint}
    if deep is not None:
        prompts.write(output, array, metadata, deep)
    else:
        PROMPTS[to](output, array, metadata)
    said = f"prompt of {array.shape[0]} vectors of width {array.shape[1]}"
    if to != "prompt" and metadata.get("backbone_fingerprint"):
        said += (
            "; this format does not record its backbone's fingerprint, nor its labels or figures"
        )
    return said


def inspect(
    path: str,
    backbone: str | None = None,
    vocabulary_file: str | None = None,
    neighbours: int = 5,
) -> list[str]:
    """Lines that say what a prompt or a backbone is.

    For a prompt also each vector's norm and its nearest vocabulary tokens: in `backbone`, or in the
    embedded one where the prompt was trained for it.
    """
    if neighbours < 1:
        raise ValueError(f"--neighbours is {neighbours}, expected at least 1")
    if path == "embedded" or _is_backbone(path) and not _holds_prompt(path):
        stored = formats.open_stored(path, vocabulary_file)
        backbones.check(stored)
        return _describe(stored)
    array, deep, metadata = prompts.read_deep(path)
    facts = {"shape": list(array.shape), **metadata}
    if deep is not None:
        facts["deep_shape"] = list(deep.shape)
    lines = [json.dumps(facts, indent=2, sort_keys=True)]
    found = [analysis.Named(pathlib.PurePath(path).name, path, array, metadata)]
    words = analysis.words_for(found, backbone, vocabulary_file)
    if words is None:
        return [*lines, "--backbone=PATH shows each vector's nearest tokens in that backbone"]
    ids, cosines = analysis.nearest_tokens(array, words.embedding, neighbours)
    lines.append(f"nearest tokens by cosine in {words.name} (norm of the vector in brackets)")
    for i, (row, near, close) in enumerate(zip(array, ids, cosines, strict=True)):
        pieces = map(words.vocabulary.piece, near)
        tokens = "  ".join(f"{p} {c:.2f}" for p, c in zip(pieces, close, strict=True))
        lines.append(f"{i:4d} ({np.linalg.norm(row):.2f})  {tokens}")
    return lines


def _holds_prompt(path: str) -> bool:
    """Whether a folder is a T5X checkpoint with a prompt (it may hold the backbone too)."""
    if "://" in path or t5x.holds(pathlib.Path(path)):
        return any(name in t5x.Arrays(path).shapes for name in t5x.PROMPTS)
    return False


def _describe(stored: Stored) -> Sequence[str]:
    facts: dict[str, Any] = {
        "name": stored.name,
        "parameters": _count(stored),
        "architecture": stored.cfg.to_json(),
        "fingerprint": stored.fingerprint,
        "vocabulary": stored.vocabulary and stored.vocabulary.path,
        "metadata": dict(stored.metadata),
    }
    card = pathlib.Path(stored.where).parent / native.CARD_FILE
    if card.is_file():
        facts["model_card"] = card.read_text(encoding="utf-8").splitlines()
    return [json.dumps(facts, indent=2, sort_keys=True, default=str, ensure_ascii=False)]
