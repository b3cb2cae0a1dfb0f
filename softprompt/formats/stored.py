"""What every format gives: a backbone that is open, but not yet read."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from softprompt.t5 import T5Config
from softprompt.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class Stored:
    """A backbone on disk.

    Attributes:
      where: its path, for messages.
      name: what it calls itself.
      cfg: its architecture.
      shapes: shape of every parameter by our path, checked against the architecture by the reader.
      read: our path to that parameter's value, in the type it is stored in.
      vocabulary: None where the source brings none.
      fingerprint: that the stored values must have, where the format records it.
      metadata: whatever else the source says of itself.
    """

    where: str
    name: str
    cfg: T5Config
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], np.ndarray]
    vocabulary: Vocabulary | None
    fingerprint: str | None = None
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
