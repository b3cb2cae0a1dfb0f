"""Our own format: a folder of `model.safetensors` (parameters by path) and `spiece.model`.

Architecture, name, fingerprint and provenance are in the file's metadata. Weights may be stored in
float32, bfloat16, or int8 with one float32 scale per channel.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors

from softprompt import checkpoint, int8, tree
from softprompt.formats.stored import Stored
from softprompt.t5_config import T5Config
from softprompt.vocabulary import AnyVocabulary, ByteVocabulary, Vocabulary, open_vocabulary

EMBEDDED = pathlib.Path(__file__).parent.parent / "embedded" / "backbone"
MODEL_FILE = "model.safetensors"
VOCABULARY_FILE = "spiece.model"
# What a person should know of a backbone: its data, licences, training and limits.
CARD_FILE = "MODEL_CARD.md"
SCALE = int8.SCALE


def holds(folder: pathlib.Path) -> bool:
    """Whether this is a folder of ours."""
    try:
        with safetensors.safe_open(folder / MODEL_FILE, "numpy") as file:
            return "fingerprint" in (file.metadata() or {})
    except (safetensors.SafetensorError, OSError):
        # A torn file of ours is still ours, to be named as such: nobody else's lacks a config.
        return (folder / MODEL_FILE).is_file() and not (folder / "config.json").exists()


def open_stored(
    folder: str | os.PathLike, vocabulary_file: str | os.PathLike | None = None
) -> Stored:
    """Opens a folder that `save` wrote; `vocabulary_file` takes the place of its vocabulary."""
    folder = pathlib.Path(folder)
    arrays = checkpoint.Arrays(folder / MODEL_FILE)
    metadata = arrays.metadata
    names = set(arrays.shapes)

    def read(path: str) -> np.ndarray:
        x = arrays.read(path)
        return x * arrays.read(path + SCALE) if path + SCALE in names else x

    def read_int8(path: str) -> tuple[np.ndarray, np.ndarray] | None:
        if path + SCALE not in names:
            return None
        return arrays.read(path), arrays.read(path + SCALE)

    return Stored(
        where=str(folder / MODEL_FILE),
        name=metadata["name"],
        cfg=T5Config.from_json(metadata["architecture"]),
        shapes={k: shape for k, shape in arrays.shapes.items() if not k.endswith(SCALE)},
        read=read,
        read_int8=read_int8,
        vocabulary=(
            open_vocabulary(vocabulary_file)
            if vocabulary_file is not None
            else _vocabulary(folder, metadata)
        ),
        fingerprint=metadata["fingerprint"],
        metadata={"stored_as": metadata["stored_as"], **metadata["provenance"]},
    )


def _vocabulary(folder: pathlib.Path, metadata: Mapping[str, Any]) -> AnyVocabulary | None:
    if metadata.get("vocabulary") == ByteVocabulary.BYTES:
        return ByteVocabulary()
    path = folder / VOCABULARY_FILE
    return Vocabulary(path) if path.is_file() else None


def save(folder: str | os.PathLike, source: Stored, dtype: str | None = None) -> str:
    """Writes a backbone folder, weights as they are or as 'float32', 'bfloat16' or 'int8'.

    `source.metadata` becomes the file's provenance. Returns the fingerprint, which is that of the
    values a reader gets (rounded, if stored so).
    """
    if dtype == "int8":
        values = quantize({path: source.read_as(path, "float32") for path in source.shapes})
    else:
        values = {path: source.read_as(path, dtype) for path in source.shapes}
    fingerprint = tree.fingerprint(dequantize(values))
    bytes_ = isinstance(source.vocabulary, ByteVocabulary)
    metadata = {
        "name": source.name,
        "architecture": source.cfg.to_json(),
        "fingerprint": fingerprint,
        "stored_as": dtype or str(values["token_embedder/embedding"].dtype),
        "vocabulary": ByteVocabulary.BYTES if bytes_ else VOCABULARY_FILE,
        "provenance": {k: v for k, v in source.metadata.items() if k != "stored_as"},
    }
    folder = pathlib.Path(folder)
    vocabulary = None
    if source.vocabulary is not None and not bytes_:
        vocabulary = pathlib.Path(source.vocabulary.path).read_bytes()
    checkpoint.write(folder / MODEL_FILE, values, metadata)
    if vocabulary is not None:
        checkpoint.write_atomically(folder / VOCABULARY_FILE, vocabulary)
    return fingerprint


def quantize(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices as int8 with a float32 scale per output channel (per row of the embedding)."""
    stored = {}
    for path, x in values.items():
        if x.ndim != 2 or x.size < 4096:
            stored[path] = x
            continue
        stored[path], stored[path + SCALE] = int8.quantize(path, x)
    return stored


def dequantize(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `quantize` up to rounding; other arrays pass through."""
    return {
        path: x * stored[path + SCALE] if path + SCALE in stored else x
        for path, x in stored.items()
        if not path.endswith(SCALE)
    }
