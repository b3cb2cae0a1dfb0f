"""Sharding over a device mesh (data × model) from one table of logical axis names.

One device is a 1×1 mesh, not another branch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from softprompt import tree

# Logical axis of a parameter or batch -> mesh axis (None: replicated). Heads shard through
# "joined_kv"; "heads" alone is the relative bias, too small to be worth a shard.
LOGICAL_AXIS_RULES: tuple[tuple[str, str | None], ...] = (
    ("batch", "data"),
    ("vocab", "model"),
    ("joined_kv", "model"),
    ("mlp", "model"),
    ("heads", None),
    ("relpos_buckets", None),
    ("embed", None),
    ("prompt", None),
)

# Bytes: see `place_frozen`.
ALIGNMENT = 64


def make_mesh(
    data: int = -1,
    model: int = 1,
    devices: int | None = None,
    among: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of `data × model` devices; `data = -1` takes what `model` leaves of all devices.

    `devices` takes so many, the first ones of `among` (default: those that JAX has).
    """
    for name, value, free in (("DATA_PARTITIONS", data, -1), ("MODEL_PARTITIONS", model, 1)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < 1 and value != free:
            rest = " or -1 for all that are left" if free < 0 else ""
            raise ValueError(f"{name} is {value!r}, expected a number of devices{rest}")
    # Each host's devices are neighbours, so that its rows of a batch are neighbours too.
    found = jax.devices() if among is None else among
    if devices is not None and not 0 < devices <= len(found):
        raise ValueError(f"a mesh of {devices} devices was asked for, there are {len(found)}")
    available = sorted(found, key=lambda d: (d.process_index, d.id))[:devices]
    if data == -1:
        data = max(1, len(available) // model)
    if data * model != len(available):
        raise ValueError(
            f"a mesh of {data} (data) x {model} (model) needs {data * model} devices, "
            f"got {len(available)}"
        )
    return Mesh(np.array(available).reshape(data, model), ("data", "model"))


def spec(axes: tuple[str, ...]) -> PartitionSpec:
    """Mesh axes of logical `axes`; a name that the table lacks is an error."""
    rules = dict(LOGICAL_AXIS_RULES)
    unknown = [name for name in axes if name not in rules]
    if unknown:
        raise ValueError(f"no sharding rule for the logical axes {unknown}; rules: {rules}")
    return PartitionSpec(*(rules[name] for name in axes))


def shardings(variables: Mapping[str, Any], mesh: Mesh) -> dict[str, NamedSharding]:
    """A sharding for each flat parameter path, from a module's (abstract) variables.

    `variables` holds `params` and `params_axes`, as `module.init` under `jax.eval_shape` returns
    them. A dimension that its mesh axis does not divide is an error naming both.
    """
    params = tree.flatten(variables["params"])
    axes = tree.flatten(variables["params_axes"])
    result = {}
    for path, x in params.items():
        names = axes[f"{path}_axes"].names
        partition = spec(names)
        for size, name, mesh_axis in zip(x.shape, names, partition, strict=True):
            if mesh_axis and size % mesh.shape[mesh_axis]:
                raise ValueError(
                    f"{path}: its axis {name!r} has {size} entries, which {mesh.shape[mesh_axis]} "
                    f"devices of the mesh axis {mesh_axis!r} do not divide; choose another "
                    f"number of model partitions"
                )
        result[path] = NamedSharding(mesh, partition)
    return result


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of a batch over the data axis."""
    return NamedSharding(mesh, spec(("batch",)))


def local_rows(mesh: Mesh, count: int) -> slice:
    """Which of a batch's `count` rows lie on this process's devices; the others' it need not read.

    All of them where there is one process, or where the model axis spans all.
    """
    found = batch_sharding(mesh).addressable_devices_indices_map((count,)).values()
    spans = sorted({rows.indices(count)[:2] for (rows,) in found})
    if any(end != start for (_, end), (start, _) in zip(spans, spans[1:], strict=False)):
        raise ValueError(
            f"a process's rows of a batch are no neighbours on this mesh: {spans}; give each "
            f"process one block of the data axis"
        )
    return slice(spans[0][0], spans[-1][1])


def place_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A global batch, of the rows (`local_rows`) that each process has."""
    rows = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(rows, x) for k, x in batch.items()}


def place(x: Any, sharding: NamedSharding) -> jax.Array:
    """A global array of a value that every process has whole; its devices get their shards."""
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def place_frozen(x: np.ndarray, dtype: Any, sharding: NamedSharding) -> jax.Array:
    """`place` of a copy of `x` as `dtype`: one copy of each shard, which a CPU's devices share.

    XLA takes an array on the host as it is where its address is a multiple of `ALIGNMENT`, and
    copies it for each device where it is not. What is shared is never written: a program that is
    given it to reuse (donation) takes memory of its own.
    """
    copies: dict[Any, np.ndarray] = {}

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        key = span(index, x.shape)
        if key not in copies:
            copies[key] = _aligned(x[index], dtype)
        return copies[key]

    return jax.make_array_from_callback(x.shape, sharding, shard)


def span(index: tuple[slice, ...], shape: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """The first entry and the end of a shard along each axis of an array, to tell shards apart."""
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _aligned(x: np.ndarray, dtype: Any) -> np.ndarray:
    room = np.empty(x.size * np.dtype(dtype).itemsize + ALIGNMENT, np.uint8)
    start = -room.ctypes.data % ALIGNMENT
    held = room[start : start + len(room) - ALIGNMENT].view(dtype).reshape(x.shape)
    np.copyto(held, x, casting="unsafe")
    return held


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, PartitionSpec())
