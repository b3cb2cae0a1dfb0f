"""What every format gives and takes: a backbone whose tensors are read one at a time."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from softprompt import hosts
from softprompt.t5_config import T5Config
from softprompt.vocabulary import AnyVocabulary


@dataclasses.dataclass(frozen=True)
class Stored:
    """A backbone on disk, or about to be written.

    Attributes:
      where: its path, for messages.
      name: what it calls itself.
      cfg: its architecture.
      shapes: shape of every parameter by our path, checked against the architecture by the reader.
      read: our path to that parameter's value, in the type it is stored in.
      vocabulary: None where the source brings none.
      fingerprint: that the stored values must have, where the format records it.
      metadata: whatever else the source says of itself.
      read_int8: our path to int8 values and scales (see `int8`), None where not stored so.
      prompts: paths of prompts that lie beside it.
    """

    where: str
    name: str
    cfg: T5Config
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    vocabulary: AnyVocabulary | None
    fingerprint: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    read_int8: Callable[[str], tuple[np.ndarray, np.ndarray] | None] = lambda path: None
    prompts: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        name: str,
        cfg: T5Config,
        params: Mapping[str, Any],
        vocabulary: AnyVocabulary | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> "Stored":
        """Parameters in memory, to be written."""
        shapes = {path: tuple(x.shape) for path, x in params.items()}
        return cls(
            name, name, cfg, shapes, lambda path: hosts.fetch(params[path]), vocabulary,
            metadata=metadata or {},
        )  # fmt: skip

    def read_as(self, path: str, dtype: str | None) -> np.ndarray:
        """A parameter in the type that a writer was asked for (None: as it is stored)."""
        x = np.asarray(self.read(path))
        return x if dtype is None else x.astype(storage_type(dtype))


def storage_type(dtype: str) -> Any:
    """NumPy's type of 'float32' or 'bfloat16'.

    Raises:
      ValueError: any other name.
    """
    types = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
    if dtype not in types:
        raise ValueError(f"cannot store weights as {dtype!r}; choose {', '.join(types)}")
    return types[dtype]
