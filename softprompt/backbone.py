"""Backbones: a frozen T5's parameters, its architecture, its vocabulary and its fingerprint."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from softprompt import checkpoint, formats, partition, tree
from softprompt.logbook import track
from softprompt.prompted import PromptedT5
from softprompt.t5 import T5Config
from softprompt.vocabulary import AnyVocabulary


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
      metadata: its provenance, as the source states it.
    """

    name: str
    cfg: T5Config
    params: dict[str, jax.Array]
    vocabulary: AnyVocabulary | None
    fingerprint: str
    mesh: Mesh
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict)


def abstract(cfg: T5Config, rows: int = 0) -> dict[str, Any]:
    """Shapes and logical axes (`params`, `params_axes`) of a prompted T5, without computing."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(PromptedT5(cfg, rows).init, jax.random.key(0), ids, ids)


def load(
    path: str | os.PathLike = "embedded",
    dtype: Any = jnp.float32,
    dropout_rate: float = 0.0,
    mesh: Mesh | None = None,
    vocabulary_file: str | os.PathLike | None = None,
    relative_max_distance: int | None = None,
) -> Backbone:
    """Loads a backbone onto `mesh` (default: all devices as data), weights as `dtype`.

    Tensor by tensor, straight into the sharded arrays: of several processes each reads every
    tensor (the fingerprint is of them all) and keeps the shards of its own devices. `path`,
    `vocabulary_file` and `relative_max_distance`: see `formats.open_stored`.

    Raises:
      ValueError: nothing there, or names or shapes that do not fit the stated architecture.
      checkpoint.CorruptFile: a torn or altered file.
    """
    stored = formats.open_stored(path, vocabulary_file, relative_max_distance)
    mesh = mesh or partition.make_mesh()
    cfg = dataclasses.replace(stored.cfg, dropout_rate=dropout_rate, dtype=jnp.dtype(dtype))
    variables = abstract(cfg)
    check(stored)
    places = partition.shardings(variables, mesh)
    fingerprint, params = tree.Fingerprint(), {}
    count = len(stored.shapes)
    for name in track(sorted(stored.shapes), f"loading {stored.name}", "tensors", count):
        x = stored.read(name)
        fingerprint.add(name, x)
        params[name] = partition.place(np.asarray(x).astype(cfg.dtype), places[name])
        # One tensor at a time: the copy is done before the next one is read.
        params[name].block_until_ready()
    if stored.fingerprint not in (None, str(fingerprint)):
        raise checkpoint.CorruptFile(
            f"{stored.where!r} is corrupt: its weights have the fingerprint {fingerprint}, its "
            f"metadata says {stored.fingerprint}"
        )
    return Backbone(
        stored.name, cfg, params, stored.vocabulary, str(fingerprint), mesh, dict(stored.metadata)
    )


def check(stored: formats.Stored) -> None:
    """Raises unless the names, the shapes and the vocabulary fit the stated architecture."""
    expected = tree.flatten(abstract(stored.cfg)["params"])
    tree.check_same_paths(stored.shapes, {k: x.shape for k, x in expected.items()}, stored.where)
    if stored.vocabulary is not None:
        check_vocabulary(stored.vocabulary, stored.cfg)


def random(
    cfg: T5Config,
    seed: int = 0,
    vocabulary: AnyVocabulary | None = None,
    mesh: Mesh | None = None,
    name: str = "random",
) -> Backbone:
    """A freshly initialised backbone, for pre-training and tests."""
    if vocabulary is not None:
        check_vocabulary(vocabulary, cfg)
    mesh = mesh or partition.make_mesh()
    variables = abstract(cfg)
    ids = jnp.zeros((1, 8), jnp.int32)

    def init():
        return tree.flatten(PromptedT5(cfg).init(jax.random.key(seed), ids, ids)["params"])

    params = jax.jit(init, out_shardings=partition.shardings(variables, mesh))()
    return Backbone(name, cfg, params, vocabulary, tree.fingerprint(params), mesh)


def check_vocabulary(vocabulary: AnyVocabulary, cfg: T5Config) -> None:
    """Raises unless every id of the vocabulary has an embedding row."""
    if vocabulary.size > cfg.vocab_size:
        raise ValueError(
            f"the vocabulary {vocabulary.path!r} has {vocabulary.size} ids, but the embedding has "
            f"{cfg.vocab_size} rows"
        )
