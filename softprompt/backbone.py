"""Backbones: a frozen T5's parameters, its architecture, its vocabulary and its fingerprint.

Our own format is a folder of `model.safetensors` (parameters by path; architecture, name and
provenance in the metadata) and `spiece.model`. Weights may be stored in float32, bfloat16, or int8
with one float32 scale per channel; they are always used in the floating type that is asked for.
"""

import dataclasses
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import Mesh

from softprompt import checkpoint, partition, tree
from softprompt.prompted import PromptedT5
from softprompt.t5 import T5Config
from softprompt.vocabulary import Vocabulary

EMBEDDED = pathlib.Path(__file__).parent / "embedded" / "backbone"
MODEL_FILE = "model.safetensors"
VOCABULARY_FILE = "spiece.model"
SCALE = ":scale"


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A T5 ready for prompting.

    Attributes:
      name: what it calls itself.
      cfg: its architecture.
      params: flat tree of its parameters, on the mesh.
      vocabulary: None where the source has none.
      fingerprint: of the stored values; a prompt remembers it.
      mesh: the devices it lies on.
      metadata: provenance, as stored.
    """

    name: str
    cfg: T5Config
    params: dict[str, jax.Array]
    vocabulary: Vocabulary | None
    fingerprint: str
    mesh: Mesh
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def abstract(cfg: T5Config, rows: int = 0) -> dict[str, Any]:
    """Shapes and logical axes (`params`, `params_axes`) of a prompted T5, without computing."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(PromptedT5(cfg, rows).init, jax.random.key(0), ids, ids)


def resolve(path: str | os.PathLike) -> pathlib.Path:
    """The folder of a backbone; 'embedded' names the one that the package carries."""
    folder = EMBEDDED if str(path) == "embedded" else pathlib.Path(path)
    if not (folder / MODEL_FILE).is_file():
        if not folder.exists():
            state = "does not exist"
        else:
            holds = (
                ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
            )
            state = f"holds no {MODEL_FILE}" + (f" (it holds: {holds})" if holds else "")
        raise ValueError(
            f"INITIAL_CHECKPOINT_PATH {str(path)!r} {state}; expected 'embedded' or a folder with "
            f"{MODEL_FILE} and {VOCABULARY_FILE}"
        )
    return folder


def load(
    path: str | os.PathLike = "embedded",
    dtype: Any = jnp.float32,
    dropout_rate: float = 0.0,
    mesh: Mesh | None = None,
) -> Backbone:
    """Loads a backbone onto `mesh` (default: all devices as data), weights as `dtype`.

    Raises:
      ValueError: nothing there, or names or shapes that do not fit the stated architecture.
      checkpoint.CorruptFile: a torn or altered file.
    """
    folder = resolve(path)
    mesh = mesh or partition.make_mesh()
    stored, metadata = checkpoint.read(folder / MODEL_FILE)
    cfg = T5Config.from_json(
        metadata["architecture"], dropout_rate=dropout_rate, dtype=jnp.dtype(dtype)
    )
    values = dequantize(stored)
    variables = abstract(cfg)
    tree.check_same_paths(values, tree.flatten(variables["params"]), str(folder / MODEL_FILE))
    fingerprint = tree.fingerprint(values)
    if fingerprint != metadata["fingerprint"]:
        raise checkpoint.CorruptFile(
            f"{str(folder / MODEL_FILE)!r} has the fingerprint {fingerprint}, its metadata says "
            f"{metadata['fingerprint']}"
        )
    vocabulary = None
    if (folder / VOCABULARY_FILE).is_file():
        vocabulary = Vocabulary(folder / VOCABULARY_FILE)
        check_vocabulary(vocabulary, cfg)
    places = partition.shardings(variables, mesh)
    params = {name: jax.device_put(x.astype(cfg.dtype), places[name]) for name, x in values.items()}
    return Backbone(metadata["name"], cfg, params, vocabulary, fingerprint, mesh, metadata)


def random(
    cfg: T5Config,
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    mesh: Mesh | None = None,
    name: str = "random",
) -> Backbone:
    """A freshly initialised backbone, for pre-training and tests."""
    if vocabulary is not None:
        check_vocabulary(vocabulary, cfg)
    mesh = mesh or partition.make_mesh()
    variables = abstract(cfg)
    ids = jnp.zeros((1, 8), jnp.int32)

    def init(key):
        return tree.flatten(PromptedT5(cfg).init(key, ids, ids)["params"])

    params = jax.jit(init, out_shardings=partition.shardings(variables, mesh))(jax.random.key(seed))
    return Backbone(name, cfg, params, vocabulary, tree.fingerprint(params), mesh)


def save(
    folder: str | os.PathLike,
    name: str,
    cfg: T5Config,
    params: dict[str, Any],
    vocabulary_file: str | os.PathLike | None,
    dtype: str = "float32",
    provenance: dict[str, Any] | None = None,
) -> str:
    """Writes a backbone folder, weights stored as 'float32', 'bfloat16' or 'int8'.

    Returns its fingerprint, which is that of the values a reader gets (rounded, if stored so).
    """
    values = {path: np.asarray(jax.device_get(x), np.float32) for path, x in params.items()}
    if dtype == "int8":
        stored = quantize(values)
    elif dtype in ("float32", "bfloat16"):
        to = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
        stored = {path: x.astype(to) for path, x in values.items()}
    else:
        raise ValueError(f"cannot store weights as {dtype!r}; choose float32, bfloat16 or int8")
    fingerprint = tree.fingerprint(dequantize(stored))
    metadata = {
        "name": name,
        "architecture": cfg.to_json(),
        "fingerprint": fingerprint,
        "stored_as": dtype,
        "provenance": provenance or {},
    }
    folder = pathlib.Path(folder)
    checkpoint.write(folder / MODEL_FILE, stored, metadata)
    if vocabulary_file is not None:
        checkpoint.write_atomically(
            folder / VOCABULARY_FILE, pathlib.Path(vocabulary_file).read_bytes()
        )
    return fingerprint


def quantize(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Matrices as int8 with a float32 scale per output channel (per row of the embedding)."""
    stored = {}
    for path, x in values.items():
        if x.ndim != 2 or x.size < 4096:
            stored[path] = x
            continue
        axis = 1 if path.endswith("embedding") else 0
        scale = np.maximum(np.abs(x).max(axis=axis, keepdims=True), 1e-12) / np.float32(127)
        stored[path] = np.rint(x / scale).astype(np.int8)
        stored[path + SCALE] = scale.astype(np.float32)
    return stored


def dequantize(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inverse of `quantize` up to rounding; other arrays pass through as float32."""
    return {
        path: x.astype(np.float32) * stored.get(path + SCALE, np.float32(1))
        for path, x in stored.items()
        if not path.endswith(SCALE)
    }


def check_vocabulary(vocabulary: Vocabulary, cfg: T5Config) -> None:
    """Raises unless every id of the vocabulary has an embedding row."""
    if vocabulary.size > cfg.vocab_size:
        raise ValueError(
            f"the vocabulary {vocabulary.path!r} has {vocabulary.size} ids, but the embedding has "
            f"{cfg.vocab_size} rows"
        )


def describe(folder: str | os.PathLike) -> str:
    """What a stored backbone says of itself, as indented JSON."""
    _, metadata = checkpoint.read(resolve(folder) / MODEL_FILE)
    return json.dumps(metadata, indent=2, sort_keys=True)
