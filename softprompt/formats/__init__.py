"""Backbones and prompts in the formats of others: tables that are read in both directions.

Each module knows one format: `native` (ours), `hf` (Hugging Face), `t5x` (T5X checkpoints).
`open_stored` finds out which one a path holds.
"""

import os
import pathlib

from softprompt.formats import hf, native, t5x
from softprompt.formats.stored import Stored

__all__ = ["Stored", "open_stored"]


def open_stored(
    path: str | os.PathLike,
    vocabulary_file: str | os.PathLike | None = None,
    relative_max_distance: int | None = None,
) -> Stored:
    """Opens a backbone without reading its weights.

    Args:
      path: 'embedded', a folder (ours, Hugging Face's or a T5X checkpoint), a `gs://` URL of a T5X
        checkpoint, or a model name of the Hugging Face hub such as `google/flan-t5-small`.
      vocabulary_file: a SentencePiece model, 'bytes' or 'embedded', for sources that bring none
        (T5X); it takes the place of one that is there.
      relative_max_distance: for T5X checkpoints of models that differ from T5's 128.

    Raises:
      ValueError: nothing there, or nothing that this project reads; the message says what is.
    """
    if not isinstance(path, str | os.PathLike):
        raise ValueError(f"INITIAL_CHECKPOINT_PATH is {path!r}; expected {READ}")
    if str(path) == "embedded":
        return native.open_stored(native.EMBEDDED, vocabulary_file)
    if "://" in str(path):
        return t5x.open_stored(str(path), vocabulary_file, relative_max_distance)
    folder = pathlib.Path(path)
    if not folder.exists():
        if hf.is_hub_name(str(path)):
            return hf.open_stored(hf.download(str(path)), vocabulary_file, name=str(path))
        raise ValueError(
            f"the backbone {str(path)!r} (INITIAL_CHECKPOINT_PATH) does not exist; expected {READ}"
        )
    if native.holds(folder):
        return native.open_stored(folder, vocabulary_file)
    if hf.holds(folder):
        return hf.open_stored(folder, vocabulary_file)
    if t5x.holds(folder):
        return t5x.open_stored(str(folder), vocabulary_file, relative_max_distance)
    holds = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
    raise ValueError(
        f"{str(path)!r} holds no backbone"
        + (f" (it holds: {holds})" if holds else "")
        + f"; expected {READ}"
    )


READ = (
    "'embedded', a folder with model.safetensors (ours, or Hugging Face's with its config.json), a "
    "T5X checkpoint, or a model name of the Hugging Face hub"
)
