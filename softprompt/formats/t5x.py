"""T5X's checkpoint folders: an index `checkpoint` (msgpack) beside zarr arrays, or Orbax's OCDBT.

In T5X's own format the index holds small arrays inline (all of them in its oldest versions) and
tensorstore specifications of the others. Paths are those of T5X's minimal T5, which are ours; the
prompt, where there is one, is `prompt/bank` (ours) or `encoder/prompt/prompt/prompt`
(google-research/prompt-tuning).
"""

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
from flax import serialization, traverse_util

from softprompt import checkpoint
from softprompt.formats.stored import Stored
from softprompt.t5_config import T5Config
from softprompt.vocabulary import open_vocabulary

INDEX = "checkpoint"
OCDBT = "manifest.ocdbt"
FORMAT_VERSION = 3
PROMPTS = ("prompt/bank", "encoder/prompt/prompt/prompt")
# Larger arrays lie in zarr folders of their own.
INLINE_BYTES = 1 << 14


def holds(folder: pathlib.Path) -> bool:
    """Whether this is a T5X checkpoint."""
    return any((folder / file).is_file() for file in (INDEX, OCDBT, f"state/{OCDBT}"))


class Arrays:
    """The parameters (`target`) of a checkpoint: shapes at once, values one at a time.

    Args:
      where: a folder, or a URL that tensorstore reads (`gs://bucket/…/checkpoint_1000000`).
    """

    def __init__(self, where: str):
        import tensorstore as ts

        self._ts = ts
        self.where = where.rstrip("/")
        url = self.where
        if "://" not in url:
            url = pathlib.Path(url).resolve().as_uri()
        try:
            self._store = ts.KvStore.open(f"{url}/").result()
            index = self._store.read(INDEX).result()
            entries = self._from_index(index.value) if index.state == "value" else self._ocdbt()
        except (ValueError, OSError, NotImplementedError) as error:
            if isinstance(error, checkpoint.CorruptFile):
                raise
            raise ValueError(f"{where!r} is no T5X checkpoint: {_line(error)}") from None
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise checkpoint.CorruptFile(
                f"{self.where + '/' + INDEX!r} is no T5X index: {_line(error)}"
            ) from None
        self._entries = entries
        self.shapes = {
            path: tuple(x.shape if isinstance(x, np.ndarray) else x["metadata"]["shape"])
            for path, x in entries.items()
        }

    def _from_index(self, content: bytes) -> dict[str, Any]:
        try:
            index = serialization.msgpack_restore(content)
            tree = index.get("optimizer", index)
            target = tree["target"]
        except Exception as error:
            raise checkpoint.CorruptFile(
                f"{self.where + '/' + INDEX!r} is torn or no T5X index: {_line(error)}"
            ) from None
        flat = traverse_util.flatten_dict(
            target, is_leaf=lambda _, x: isinstance(x, Mapping) and "driver" in x
        )
        entries = {}
        for names, x in flat.items():
            path = "/".join(names)
            if isinstance(x, Mapping):
                name = x.get("path") or x["kvstore"].get("path")
                name = name.rstrip("/").rsplit("/", 1)[-1]
                entries[path] = {"kvstore": self._store, "name": name, "metadata": x["metadata"]}
            elif isinstance(x, str):  # Orbax's index: "PLACEHOLDER://target.…"
                entries[path] = self._zarr(self._store, x.split("://")[-1])
            else:
                entries[path] = np.asarray(x)
        return entries

    def _ocdbt(self) -> dict[str, Any]:
        keys = {key.decode() for key in self._store.list().result()}
        base = next((k.removesuffix(OCDBT) for k in (OCDBT, f"state/{OCDBT}") if k in keys), None)
        if base is None:
            raise ValueError(f"it holds neither {INDEX!r} nor {OCDBT!r}")
        spec = {"driver": "ocdbt", "base": self._store.url + base}
        store = self._ts.KvStore.open(spec).result()
        names = [k.decode().removesuffix("/.zarray") for k in store.list().result()
                 if k.endswith(b"/.zarray")]  # fmt: skip
        found = {n.removeprefix("target.").replace(".", "/"): n for n in names
                 if n.startswith("target.")}  # fmt: skip
        return {path: self._zarr(store, name) for path, name in found.items()}

    def _zarr(self, store: Any, name: str) -> dict[str, Any]:
        content = store.read(f"{name}/.zarray").result()
        if content.state != "value":
            raise checkpoint.CorruptFile(f"{self.where!r}: the array {name!r} is missing")
        return {"kvstore": store, "name": name, "metadata": json.loads(content.value)}

    def read(self, path: str) -> np.ndarray:
        """One parameter's value."""
        entry = self._entries[path]
        if isinstance(entry, np.ndarray):
            return entry
        store, name = entry["kvstore"], entry["name"]
        what, prefix = repr(f"{self.where}/{name}"), f"{name}/"
        try:
            spec = {"driver": "zarr", "kvstore": (store / prefix).spec().to_json()}
            array = self._ts.open(spec, open=True).result()
        except (ValueError, OSError) as error:
            raise checkpoint.CorruptFile(f"{what} is missing or torn: {_line(error)}") from None
        chunks = array.chunk_layout.read_chunk.shape
        expected = math.prod(-(-n // c) for n, c in zip(array.shape, chunks, strict=True))
        # Tensorstore reads a chunk that is not there as zeros.
        keys = store.list(self._ts.KvStore.KeyRange(prefix, prefix[:-1] + "0")).result()
        there = sum(not key.split(b"/")[-1].startswith(b".") for key in keys)
        if there != expected:
            raise checkpoint.CorruptFile(
                f"{what} has {there} chunks, expected {expected} (shape {list(array.shape)} in "
                f"chunks of {list(chunks)})"
            )
        try:
            value = array.read().result()
        except (ValueError, OSError) as error:
            raise checkpoint.CorruptFile(f"{what} is torn: {_line(error)}") from None
        if value.shape != self.shapes[path]:
            raise checkpoint.CorruptFile(
                f"{what} has shape {value.shape}, the index says {self.shapes[path]}"
            )
        return value


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def open_stored(
    where: str,
    vocabulary_file: str | os.PathLike | None = None,
    relative_max_distance: int | None = None,
) -> Stored:
    """Opens a checkpoint; the architecture is read off the shapes.

    What shapes do not tell is taken as T5 has it: gated GELU where the MLP is gated, else ReLU; a
    tied head scaled by 1/sqrt(H); the distance of the last relative bucket, 128 unless given.
    """
    arrays = Arrays(where)
    shapes = {path: shape for path, shape in arrays.shapes.items() if path not in PROMPTS}
    folder = pathlib.PurePosixPath(where.rstrip("/"))
    return Stored(
        where=where,
        name=f"{folder.parent.name}/{folder.name}",
        cfg=_architecture(where, shapes, relative_max_distance or 128),
        shapes=shapes,
        read=arrays.read,
        vocabulary=None if vocabulary_file is None else open_vocabulary(vocabulary_file),
        metadata={"source": where},
        prompts=tuple(path for path in PROMPTS if path in arrays.shapes),
    )


def _architecture(where: str, shapes: Mapping[str, tuple[int, ...]], max_distance: int) -> T5Config:
    def layers(stack: str) -> int:
        parts = (path.split("/") for path in shapes if path.startswith(f"{stack}/layers_"))
        return len({part[1] for part in parts})

    try:
        vocab_size, emb_dim = shapes["token_embedder/embedding"]
        heads, buckets = shapes["encoder/relpos_bias/rel_embedding"]
        inner = shapes["encoder/layers_0/attention/query/kernel"][1]
        gated = "encoder/layers_0/mlp/wi_0/kernel" in shapes
        mlp_dim = shapes["encoder/layers_0/mlp/wo/kernel"][0]
    except KeyError as error:
        raise ValueError(
            f"{where!r} is no T5 of T5X's minimal kind: it has no parameter {error.args[0]!r} (it "
            f"has, for example, {', '.join(sorted(shapes)[:3])})"
        ) from None
    return T5Config(
        vocab_size=vocab_size,
        emb_dim=emb_dim,
        num_heads=heads,
        num_encoder_layers=layers("encoder"),
        num_decoder_layers=layers("decoder"),
        head_dim=inner // heads,
        mlp_dim=mlp_dim,
        mlp_activations=("gelu", "linear") if gated else ("relu",),
        logits_via_embedding="decoder/logits_dense/kernel" not in shapes,
        relative_buckets=buckets,
        relative_max_distance=max_distance,
    )


def save(folder: str | os.PathLike, source: Stored, dtype: str | None = None) -> None:
    """Writes a checkpoint that T5X restores: format version 3, zarr compressed by gzip.

    Weights as they are, or as 'float32' or 'bfloat16'.
    """
    import tensorstore as ts

    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    target = {}
    for path in source.shapes:
        value = source.read_as(path, dtype)
        if value.nbytes <= INLINE_BYTES:
            target[path] = value
            continue
        name = f"target.{path.replace('/', '.')}"
        spec = {
            "driver": "zarr",
            "kvstore": {"driver": "file", "path": name},
            "metadata": {
                "shape": list(value.shape),
                "chunks": [min(n, 4096) for n in value.shape],
                "compressor": {"id": "gzip", "level": 1},
                "dtype": "bfloat16" if value.dtype == ml_dtypes.bfloat16 else value.dtype.str,
            },
        }
        place = {"driver": "file", "path": f"{folder.resolve() / name}/"}
        # A chunk of zeros is written too: what is not there counts as lost.
        full = {**spec, "kvstore": place, "store_data_equal_to_fill_value": True}
        ts.open(full, create=True, delete_existing=True).result().write(value).result()
        target[path] = spec
    nested = traverse_util.unflatten_dict(target, sep="/")
    state = {"state": {"step": np.int32(0)}, "target": nested}
    index = serialization.msgpack_serialize({"version": FORMAT_VERSION, "optimizer": state})
    checkpoint.write_atomically(folder / INDEX, index)
