"""Attention within segments, one after the other: what attention of whole rows gives."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from softprompt import products, segments
from softprompt.segments import Segmented

# Segments of three of the sizes, one at the very end, one alone in its row, one in two parts.
ROWS = (
    [1] * 11 + [2] * 30 + [3] * 7,
    [1] * 14 + [2] * 26 + [0] * 8,
    [1] * 48,
    [0] * 3 + [1] * 5 + [2] * 9 + [1] * 20 + [0] * 11,
    [0] * 48,
)


def drawn(dtype=jnp.float32, rows=ROWS, heads=3, width=8, seed=0):
    """Queries, keys and values of `rows`, their segments, and a bias of differences."""
    rng = np.random.default_rng(seed)
    numbers = jnp.array(rows, jnp.int32)
    count, length = numbers.shape
    shape = (count, heads, length, width)
    operands = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(3)]
    place = np.arange(length)
    table = rng.normal(size=(heads, 2 * length)).astype(np.float32)
    return operands, numbers, jnp.asarray(table[:, place[None] - place[:, None] + length])


def expected(query, key, value, bias, numbers):
    """By one softmax over all pairs, in float32."""
    query, key, value = (x.astype(jnp.float32) for x in (query, key, value))
    logits = jnp.einsum("baqd,basd->baqs", query, key) + bias
    inside = (numbers[:, :, None] == numbers[:, None, :]) & (numbers > 0)[:, None, :]
    weights = jax.nn.softmax(jnp.where(inside[:, None], logits, -1e9), -1)
    y = jnp.einsum("baqs,basd->baqd", weights, value)
    return jnp.where((numbers > 0)[:, None, :, None], y, 0)


def attended(query, key, value, bias, numbers):
    return segments.attend(query, key, value, Segmented.of(bias, numbers))


def gradients(function, operands, bias, numbers, of):
    """Of a weighted sum of what positions get, in the arguments `of`."""
    share = np.random.default_rng(9).normal(size=operands[0].shape).astype(np.float32)

    def total(*given):
        return (function(*given, numbers).astype(jnp.float32) * share).sum()

    with jax.default_matmul_precision("highest"):
        return jax.jit(jax.grad(total, of))(*operands, bias)


@pytest.mark.parametrize("dtype, close", [(jnp.float32, 1e-5), (jnp.bfloat16, 4e-2)])
def test_positions_get_what_whole_rows_give(dtype, close):
    operands, numbers, bias = drawn(dtype)
    got = jax.jit(attended)(*operands, bias, numbers)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32), expected(*operands, bias, numbers), atol=close
    )


@pytest.mark.parametrize("dtype, close", [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-1)])
@pytest.mark.parametrize("of", [(0, 1, 2), (0, 1, 2, 3)], ids=["prompt", "backbone"])
def test_gradients_are_those_of_whole_rows(dtype, close, of):
    """Also the bias's, where the backbone itself is trained."""
    operands, numbers, bias = drawn(dtype)
    got = gradients(attended, operands, bias, numbers, of)
    want = gradients(expected, operands, bias, numbers, of)
    for one, other in zip(got, want, strict=True):
        assert np.abs(other.astype(jnp.float32)).max() > 0.1
        np.testing.assert_allclose(
            one.astype(jnp.float32), other.astype(jnp.float32), atol=close, rtol=close
        )


def test_scores_far_from_each_other_stay_numbers():
    (query, key, value), numbers, bias = drawn()
    query = query * 200
    got = gradients(attended, (query, key, value), bias, numbers, (0, 1, 2))
    want = gradients(expected, (query, key, value), bias, numbers, (0, 1, 2))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-2, rtol=1e-3)


def test_members_of_a_population_get_what_each_gets_alone():
    """Every one with its own rows, and once more with rows that all share."""
    many = [drawn(rows=ROWS[k:] + ROWS[:k], seed=k) for k in range(2)]
    bias = many[0][2]
    operands = [jnp.stack(x) for x in zip(*(one[0] for one in many), strict=True)]
    for numbers, axis in ((jnp.stack([one[1] for one in many]), 0), (many[0][1], None)):

        def found(*given, axis=axis, numbers=numbers):
            return jax.vmap(attended, (0, 0, 0, None, axis))(*given, numbers)

        got = gradients(lambda *given: found(*given[:-1]), operands, bias, numbers, (0, 1, 2))
        share = np.random.default_rng(9).normal(size=operands[0].shape).astype(np.float32)
        for k in range(2):
            own = numbers[k] if axis == 0 else numbers

            def total(*given, own=own, share=share[k]):
                return (expected(*given, bias, own) * share).sum()

            with jax.default_matmul_precision("highest"):
                want = jax.grad(total, (0, 1, 2))(*(x[k] for x in operands))
            for one, other in zip(got, want, strict=True):
                np.testing.assert_allclose(one[k], other, atol=1e-5)


def test_short_rows_other_devices_and_many_threads_do_with_whole_rows(monkeypatch):
    x = jnp.zeros((2, segments.LONG, 8))
    monkeypatch.setattr(segments, "_cores", lambda: 6)
    for name in ("device_count", "local_device_count"):
        monkeypatch.setattr(segments.jax, name, lambda: 1)
    monkeypatch.setattr(products, "platform", lambda: "cpu")
    assert segments.suits(x, heads=6)
    assert not segments.suits(x[:, 1:], heads=6)
    assert not segments.suits(x, heads=5)
    monkeypatch.setattr(segments.jax, "process_count", lambda: 2)
    assert not segments.suits(x, heads=6)
    monkeypatch.undo()
    monkeypatch.setattr(products, "platform", lambda: "gpu")
    assert not segments.suits(x, heads=99)


DEVICES = """
import jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import test_segments
from softprompt import partition, segments

segments._cores = lambda: 1
mesh = partition.make_mesh(data=2, model=2)
place = lambda x, *axes: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))
operands, numbers, bias = test_segments.drawn(rows=test_segments.ROWS[:4], heads=4)
arguments = operands, bias, numbers, (0, 1, 2)
want = test_segments.gradients(test_segments.attended, *arguments)
operands = [place(x, "data", "model") for x in operands]
numbers, bias = place(numbers, "data"), place(bias)
got = test_segments.gradients(test_segments.attended, operands, bias, numbers, (0, 1, 2))
for one, other in zip(got, want):
    np.testing.assert_allclose(one, other, atol=1e-5)

def total(*given):
    return test_segments.attended(*given).sum()

def of_many(*given):  # Of members, each of which has rows on all devices.
    return jax.vmap(jax.grad(total, (0, 1, 2)), (0, 0, 0, None, 0))(*given)

one = jax.grad(total, (0, 1, 2)), (*operands, bias, numbers)
both = lambda x, *axes: place(jnp.stack([x, x[::-1]]), None, "data", *axes)
many = of_many, (*(both(x, "model") for x in operands), bias, both(numbers))
for function, given in (one, many):
    program = jax.jit(function).lower(*given).compile().as_text()
    assert "all-" not in program and "collective-" not in program
for x, y in zip(jax.jit(one[0])(*one[1]), jax.jit(many[0])(*many[1])):
    np.testing.assert_allclose(y, jnp.stack([x, x[::-1]]), atol=1e-5)

assert segments._axes(mesh, 4, 4) == ("data", "model")
assert segments._axes(mesh, 3, 4) is None  # Three rows on two devices.
assert segments._axes(mesh, 4, 3) is None  # Three heads on two devices.
assert not segments.suits(jnp.zeros((4, 512, 8)), 8)  # Nothing says where they lie.
assert segments.suits(place(jnp.zeros((4, 512, 8)), "data"), 8)
segments._cores = lambda: 20  # Five threads for the four heads of a device.
assert not segments.suits(place(jnp.zeros((4, 512, 8)), "data"), 8)
"""


def test_devices_do_their_own_rows_and_heads_and_send_nothing(monkeypatch, request):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    done = subprocess.run(
        [sys.executable, "-c", DEVICES],
        capture_output=True,
        text=True,
        cwd=request.path.parent,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
