"""Self-attention of an encoder's rows, segment by segment, for a CPU.

Taken as a whole, the scores of a batch are its largest arrays: from some length on they leave a
CPU's cache, and most of a packed row's are of pairs in different examples. Here no array is larger
than the scores of one segment, and the backward pass computes these again, as FlashAttention does
(Dao et al. 2022, arXiv 2205.14135, section 3.1). Alphabet of shapes: see `t5`.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from softprompt import partition, products
from softprompt.products import einsum

Array = jax.Array
# Shorter rows are as fast as a whole.
LONG = 256
# Shares of a row that segments are rounded up to, each compiled by itself: the set of four that
# costs least for SuperGLUE's tasks in the rows of `packing.row_length`, with a prompt of 100.
SHARES = (0.33, 0.48, 0.6, 1.0)


class Segmented(NamedTuple):
    """The bias of positions, of which only the difference matters, in rows of segments."""

    bias: Array  # [A, T, T]
    segments: Array  # [B, T], 0 is padding
    extents: Array  # [B, T]: the length of a segment where it begins, 0 elsewhere

    @classmethod
    def of(cls, bias: Array, segments: Array) -> "Segmented":
        """With the extents of `segments`; what lies between the ends of one counts."""
        place = jnp.arange(segments.shape[1])
        same = within(segments)
        first, last = jnp.argmax(same, 2), segments.shape[1] - 1 - jnp.argmax(same[:, :, ::-1], 2)
        begins = (first == place) & (segments > 0)
        return cls(bias, segments, jnp.where(begins, last - place + 1, 0))


def within(segments: Array) -> Array:
    """`[B, T, T]`: which positions each of `segments` `[B, T]` may attend to, those of its own."""
    return (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)


def suits(x: Array, heads: int) -> bool:
    """Whether attention within segments of packed rows `x` `[B, T, H]` is faster one by one.

    A segment's products are shared out among a device's threads by its heads alone. Hosts may have
    other processors each, and must run one program: of several none does.
    """
    if products.platform() != "cpu" or x.shape[1] < LONG or jax.process_count() > 1:
        return False
    mesh = jax.typeof(x).sharding.mesh
    axes = _axes(mesh, x.shape[0], heads)
    if axes is None:
        return False
    own = heads // (mesh.shape[axes[1]] if axes[1] else 1)
    return -(-_cores() // jax.local_device_count()) <= own


def _cores() -> int:
    """Those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _axes(mesh: Any, rows: int, heads: int) -> tuple[str | None, str | None] | None:
    """Mesh axes of `rows` and `heads`; None where each device cannot do its own."""
    if mesh.empty:  # Of several devices, nothing says which one holds what.
        return (None, None) if jax.device_count() == 1 else None
    data, model = partition.spec(("batch", "joined_kv"))
    named = {data, model} <= set(mesh.axis_names)
    if not named or rows % mesh.shape[data] or heads % mesh.shape[model]:
        return None
    return data, model


def _sizes(length: int) -> tuple[int, ...]:
    """What segments of rows of `length` are rounded up to, shortest first."""
    return tuple(sorted({min(length, -(-int(length * share) // 16) * 16) for share in SHARES}))


def attend(query: Array, key: Array, value: Array, segmented: Segmented) -> Array:
    """What each position gets, `[B, A, T, D]`, for queries, keys and values of that shape.

    Positions of no segment get zeros. For rows that `suits` says yes to.
    """
    # Positions first: what is cut out of a row then lies together.
    operands = (x.swapaxes(1, 2) for x in (query, key, value))
    return _attend(*operands, segmented).swapaxes(1, 2)


@jax.custom_vjp
def _attend(query, key, value, segmented):
    return _forward(query, key, value, segmented)[0]


def _forward(query, key, value, segmented):
    """What positions get, and the logarithm of their softmax's denominator, `[B, T, A]`."""
    dtype = query.dtype

    def of_segment(only, bias, query, key, value):
        logits = einsum("aqd,asd->aqs", query, key, jnp.float32) + bias + only
        top = logits.max(-1)
        weights = jnp.exp(logits - top[..., None])
        total = weights.sum(-1)
        y = einsum("aqs,asd->aqd", weights.astype(dtype), value, jnp.float32)
        return (y / total[..., None]).astype(dtype), top + jnp.log(total)

    results = (query, jax.ShapeDtypeStruct(query.shape[:-1], jnp.float32))
    return _of_segments(of_segment, results, segmented, query, key, value)


def _attend_forward(*given):
    query, key, value, segmented = jax.tree.map(lambda x: x.value, given)
    if given[3].bias.perturbed:  # Where the backbone itself is trained.
        whole = functools.partial(_whole, segmented.segments)
        y, back = jax.vjp(whole, query, key, value, segmented.bias)
        return y, (back, None)
    y, log_total = _forward(query, key, value, segmented)
    return y, (None, (query, key, value, y, log_total, segmented))


def _attend_backward(saved, grad):
    back, kept = saved
    if isinstance(grad, SymbolicZero):
        return (None,) * 4
    if back is not None:
        *grads, of_bias = back(grad)
        return *grads, Segmented(of_bias, None, None)
    query, key, value, y, log_total, segmented = kept
    dtype = query.dtype

    def of_segment(only, bias, query, key, value, y, log_total, grad):
        # Of every key its queries: two of the three products below take them so.
        logits = einsum("asd,aqd->asq", key, query, jnp.float32) + bias
        # A query outside gives no weight to anything, as a key outside gets none.
        weights = jnp.exp(logits + only[:, None] + (only - log_total)[:, None])
        of_weights = einsum("asd,aqd->asq", value, grad, jnp.float32)
        mean = (grad.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)
        of_logits = (weights * (of_weights - mean[:, None])).astype(dtype)
        return (
            einsum("asq,asd->aqd", of_logits, key, dtype),
            einsum("asq,aqd->asd", of_logits, query, dtype),
            einsum("asq,aqd->asd", weights.astype(dtype), grad, dtype),
        )

    operands = query, key, value, y, log_total, grad
    segmented = segmented._replace(bias=segmented.bias.swapaxes(1, 2))
    grads = _of_segments(of_segment, (query, key, value), segmented, *operands)
    return *grads, None


_attend.defvjp(_attend_forward, _attend_backward, symbolic_zeros=True)


def _whole(segments: Array, query: Array, key: Array, value: Array, bias: Array) -> Array:
    """`attend` with all scores of all rows at once."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))
    bias = bias + products.where_not(within(segments)[:, None], query.dtype)
    y = products.attention(query, key, value, bias).swapaxes(1, 2)
    return jnp.where((segments > 0)[:, :, None, None], y, 0)


def _of_segments(
    of_segment: Callable[..., Sequence[Array]],
    results: Sequence[Any],
    segmented: Segmented,
    *operands: Array,
) -> list[Array]:
    """`of_segment` of every segment, in arrays `[B, T, A, …]` of the shapes of `results`.

    It takes what leaves logits of keys inside as they are and others at -inf `[S]`, the bias, and
    the operands' parts `[A, S, …]`, and gives such parts of the results, of which those inside
    count.
    """
    shapes = [(x.shape[3:], x.dtype) for x in results]

    @custom_vmap
    def rows(segmented, *operands):
        return _of_rows(of_segment, shapes, segmented, operands)

    @rows.def_vmap
    def more_rows(count, batched, *given):
        """Of a further leading axis, of which vmap makes one: as many times the rows."""
        segmented, *operands = given
        if batched[0].bias:
            raise NotImplementedError("a bias for each of many models")

        def merged(x, has):
            x = x if has else jnp.broadcast_to(x, (count, *x.shape))
            return x.reshape(-1, *x.shape[2:])

        of_rows = jax.tree.map(
            merged, (segmented[1:], operands), (batched[0][1:], list(batched[1:]))
        )
        found = rows(Segmented(segmented.bias, *of_rows[0]), *of_rows[1])
        return [x.reshape(count, -1, *x.shape[1:]) for x in found], [True] * len(found)

    mesh = jax.typeof(operands[0]).sharding.mesh
    if mesh.empty:
        return rows(segmented, *operands)
    rows_on, heads_on = _axes(mesh, operands[0].shape[0], operands[0].shape[2])
    own, row = PartitionSpec(rows_on, None, heads_on), PartitionSpec(rows_on)
    places = (Segmented(PartitionSpec(heads_on), row, row), *[own] * len(operands))
    share = jax.shard_map(
        rows, mesh=mesh, in_specs=places, out_specs=[own] * len(results), check_vma=False
    )
    return share(segmented, *operands)


def _of_rows(of_segment, shapes, segmented: Segmented, operands: Sequence[Array]) -> list[Array]:
    """`_of_segments` of the rows and heads that a device has: those of one size, then the next."""
    count, length, heads = operands[0].shape[:3]
    results = [jnp.zeros((count, length, heads, *rest), dtype) for rest, dtype in shapes]
    # Unsigned: what is cut out at a signed index is compiled for negative ones too.
    places = jnp.arange(count * length, dtype=jnp.uint32)
    extents, shorter = segmented.extents.reshape(-1), 0
    for size in _sizes(length):
        begins = (shorter < extents) & (extents <= size)
        order = jnp.sort(jnp.where(begins, places, len(places)))
        results = _of_size(of_segment, size, order, begins.sum(), segmented, operands, results)
        shorter = size
    return results


def _of_size(of_segment, size, order, count, segmented: Segmented, operands, results):
    """`results` with those of the `count` segments of a size, which begin at the places `order`."""
    length = segmented.segments.shape[1]

    def part(x, row, start):
        at = (row, start, *[jnp.uint32(0)] * (x.ndim - 2))
        return jax.lax.dynamic_slice(x, at, (1, size, *x.shape[2:]))[0]

    def cut(i):
        """Where a segment lies, and what has an array of its own until it is used.

        XLA would cut it out for every score again.
        """
        row, first = jnp.divmod(jax.lax.dynamic_index_in_dim(order, i, keepdims=False), length)
        start = jnp.minimum(first, length - size)
        number = jax.lax.dynamic_slice(segmented.segments, (row, first), (1, 1))
        only = jnp.where(part(segmented.segments, row, start) == number[0], 0.0, -jnp.inf)
        return i, row, start, only, [part(x, row, start).T for x in operands if x.ndim == 3]

    def one(carry):
        (i, row, start, only, narrow), results = carry
        narrow = iter(narrow)
        # Products are faster with heads first, and cutting positions out with these first.
        parts = [
            next(narrow) if x.ndim == 3 else part(x, row, start).swapaxes(0, 1) for x in operands
        ]
        found = of_segment(only, segmented.bias[:, :size, :size], *parts)

        def put(old, new):
            new = new.swapaxes(0, 1)
            kept = (only == 0).reshape(size, *[1] * (new.ndim - 1))
            new = jnp.where(kept, new, part(old, row, start))[None]
            at = (row, start, *[jnp.uint32(0)] * (new.ndim - 2))
            return jax.lax.dynamic_update_slice(old, new, at)

        return cut(i + 1), list(map(put, results, found))

    begin = (cut(jnp.uint32(0)), results)
    return jax.lax.while_loop(lambda carry: carry[0][0] < count, one, begin)[1]
