"""Weights as int8 with float32 scales: the rule by which a matrix becomes 8 bits, and back.

A matrix at `path` becomes int8 values at `path` and its scales at `path:scale`, one per output
channel (per row of the embedding): `[1, out]` for a kernel `[in, out]`, `[V, 1]` for the embedding.
Files (`formats.native`) and models in memory share it; `t5` computes with the int8 values.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from softprompt import hosts

SCALE = ":scale"
LARGEST = 127


def scale_axis(path: str) -> int:
    """The axis of a matrix that one scale spans."""
    return 1 if path.endswith("embedding") else 0


def kept(path: str) -> bool:
    """Whether a model in memory holds this parameter as int8: kernels, embedding and head."""
    return path.endswith("/kernel") or path == "token_embedder/embedding"


def quantize(path: str, x: Any, xp: Any = np) -> tuple[Any, Any]:
    """Values in -127 … 127 and float32 scales of a matrix; `xp` is numpy or jax.numpy."""
    largest = xp.abs(x).max(axis=scale_axis(path), keepdims=True)
    scale = xp.maximum(largest, 1e-12) / np.float32(LARGEST)
    return xp.rint(x / scale).astype(np.int8), scale.astype(np.float32)


def value(flat: Mapping[str, Any], path: str) -> np.ndarray:
    """The parameter at `path` on the host, float32 where it is kept as int8, else as it is."""
    x = hosts.fetch(flat[path])
    return x if path + SCALE not in flat else x * hosts.fetch(flat[path + SCALE])


def parameters(flat: Mapping[str, Any]) -> list[str]:
    """The paths of a flat tree without those of scales."""
    return [path for path in flat if not path.endswith(SCALE)]
