"""Backbones: a frozen T5's parameters, its architecture, its vocabulary and its fingerprint."""

import concurrent.futures
import dataclasses
import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softprompt import checkpoint, formats, int8, partition, tree
from softprompt.logbook import track
from softprompt.prompted import BANK_AXES, PromptedT5
from softprompt.t5_config import T5Config
from softprompt.vocabulary import AnyVocabulary

WEIGHTS = (None, "int8")


@dataclasses.dataclass(frozen=True)
class Backbone:
    """A T5 ready for prompting.

    Attributes:
      name: what it calls itself.
      cfg: its architecture.
      params: flat tree of its parameters, on the mesh; with scales, where weights are int8.
      vocabulary: None where the source has none.
      fingerprint: of the values as they are stored, whatever type they are loaded as; a prompt
        remembers it, and beside it `weights`.
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

    @property
    def weights(self) -> str:
        """The type that the matrices are kept as: 'float32', 'bfloat16', 'float16' or 'int8'."""
        return str(self.params["token_embedder/embedding"].dtype)

    def embedding(self) -> np.ndarray:
        """The token embedding `[V, H]` in float32, on the host. Collective: see `hosts`."""
        return np.asarray(int8.value(self.params, "token_embedder/embedding"), np.float32)


def abstract(cfg: T5Config) -> dict[str, Any]:
    """Shapes and logical axes (`params`, `params_axes`) of a T5, without computing.

    Kept for an architecture, not to be changed: a run asks several times.
    """
    return _abstract(T5Config.from_json(cfg.to_json()))


@functools.cache
def _abstract(cfg: T5Config) -> dict[str, Any]:
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    stacks = {"encoder": cfg.num_encoder_layers, "decoder": cfg.num_decoder_layers}
    # The layers of a stack are alike: tracing them all would take most of a second.
    one = dataclasses.replace(cfg, num_encoder_layers=1, num_decoder_layers=1)
    key = jax.eval_shape(jax.random.key, 0)  # Not computed either.
    found = jax.eval_shape(PromptedT5(one).init, key, ids, ids)
    for variables in found.values():
        for stack, layers in stacks.items():
            layer = variables[stack]["layers_0"]
            variables[stack] |= {f"layers_{i}": layer for i in range(layers)}
    return found


def prompt_layout(cfg: T5Config, mesh: Mesh, rows: int) -> jax.ShapeDtypeStruct:
    """Shape, type and sharding of a prompt bank `[rows, H]`."""
    place = NamedSharding(mesh, partition.spec(BANK_AXES))
    return jax.ShapeDtypeStruct((rows, cfg.emb_dim), jnp.float32, sharding=place)


def layout(
    cfg: T5Config, mesh: Mesh, weights: str | None = None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape, type and sharding of every array of a backbone in memory, before it is there.

    Args:
      weights: 'int8' for matrices as int8 with scales, None for `cfg.dtype`.

    A scale is cut over the mesh as its matrix is, but for the axis that it spans.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"WEIGHTS is {weights!r}, expected None (as DTYPE) or 'int8'")
    variables = abstract(cfg)
    found, stored = {}, tree.flatten(variables["params"])
    for path, place in partition.shardings(variables, mesh).items():
        shape = stored[path].shape
        narrow = weights == "int8" and int8.kept(path)
        dtype = jnp.int8 if narrow else cfg.dtype
        found[path] = jax.ShapeDtypeStruct(shape, dtype, sharding=place)
        if narrow:
            axis, spec = int8.scale_axis(path), list(place.spec)
            shape, spec[axis] = tuple(1 if i == axis else n for i, n in enumerate(shape)), None
            spread = NamedSharding(mesh, PartitionSpec(*spec))
            found[path + int8.SCALE] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=spread)
    return found


def load(
    path: str | os.PathLike = "embedded",
    dtype: Any = jnp.float32,
    dropout_rate: float = 0.0,
    mesh: Mesh | None = None,
    vocabulary_file: str | os.PathLike | None = None,
    relative_max_distance: int | None = None,
    weights: str | None = None,
    remat: str = "none",
) -> Backbone:
    """Loads a backbone onto `mesh` (default: all devices as data), weights as `dtype`.

    Tensor by tensor, straight into the sharded arrays: of several processes each reads every
    tensor (the fingerprint is of them all) and keeps the shards of its own devices. With `weights`
    'int8' kernels, embedding and head are kept as int8 with float32 scales (see `int8`), the rest
    and all activations as `dtype`; a source that holds int8 is taken as it is. `remat` is one of
    `t5_config.REMAT`. `path`,
    `vocabulary_file` and `relative_max_distance`: see `formats.open_stored`.

    Raises:
      ValueError: nothing there, or names or shapes that do not fit the stated architecture.
      checkpoint.CorruptFile: a torn or altered file.
    """
    stored = formats.open_stored(path, vocabulary_file, relative_max_distance)
    mesh = mesh or partition.make_mesh()
    cfg = dataclasses.replace(
        stored.cfg, dropout_rate=dropout_rate, dtype=jnp.dtype(dtype), remat=remat
    )
    check(stored)
    shapes = layout(cfg, mesh, weights)
    fingerprint, params = tree.Fingerprint(), {}
    count = len(stored.shapes)
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        for name in track(sorted(stored.shapes), f"loading {stored.name}", "tensors", count):
            x = np.asarray(stored.read(name))
            hashed = beside.submit(fingerprint.add, name, x)
            arrays = {name: x}
            if name + int8.SCALE in shapes:
                pair = stored.read_int8(name) or int8.quantize(name, x.astype(np.float32))
                arrays = dict(zip((name, name + int8.SCALE), pair, strict=True))
            for key, x in arrays.items():
                x, into = np.asarray(x), shapes[key]
                params[key] = partition.place_frozen(x, into.dtype, into.sharding)
                # One tensor at a time: the copy is done before the next one is read.
                params[key].block_until_ready()
            hashed.result()
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
    weights: str | None = None,
    frozen: bool = False,
) -> Backbone:
    """A freshly initialised backbone in float32, for pre-training and tests.

    With `weights` 'int8', or as `frozen`, it is laid out as `load` would have it.
    """
    if vocabulary is not None:
        check_vocabulary(vocabulary, cfg)
    mesh = mesh or partition.make_mesh()
    shapes = layout(cfg, mesh, weights)
    ids = jnp.zeros((1, 8), jnp.int32)

    def init():
        params = tree.flatten(PromptedT5(cfg).init(jax.random.key(seed), ids, ids)["params"])
        if weights is None and not frozen:
            return params
        found = {}
        for path, x in params.items():
            if path + int8.SCALE in shapes:
                found[path], found[path + int8.SCALE] = int8.quantize(path, x, jnp)
            else:
                found[path] = x.astype(cfg.dtype)
        return found

    places = {path: x.sharding for path, x in shapes.items()}
    first = mesh.local_devices[0]
    if frozen and first.platform == "cpu":  # One copy for all of its devices, as `load` has it.
        params = jax.jit(init, out_shardings=jax.sharding.SingleDeviceSharding(first))()
        for path in list(params):
            x = np.asarray(params.pop(path))
            params[path] = partition.place_frozen(x, x.dtype, places[path])
    else:
        params = jax.jit(init, out_shardings=places)()
    return Backbone(name, cfg, params, vocabulary, tree.fingerprint(params), mesh)


def check_vocabulary(vocabulary: AnyVocabulary, cfg: T5Config) -> None:
    """Raises unless every id of the vocabulary has an embedding row."""
    if vocabulary.size > cfg.vocab_size:
        raise ValueError(
            f"the vocabulary {vocabulary.path!r} has {vocabulary.size} ids, but the embedding has "
            f"{cfg.vocab_size} rows"
        )
