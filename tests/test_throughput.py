"""Throughput: analytic operation counts against those of the compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from softprompt import throughput
from softprompt.prompted import PromptedT5


def compiled_flops(cfg, rows, inputs, targets) -> float:
    module = PromptedT5(cfg)
    ids = jnp.ones((rows, inputs), jnp.int32), jnp.ones((rows, targets), jnp.int32)
    params = jax.eval_shape(module.init, jax.random.key(0), *ids)
    cost = jax.jit(module.apply).lower(params, *ids).compile().cost_analysis()
    return (cost[0] if isinstance(cost, list) else cost)["flops"]


@pytest.mark.parametrize("targets", [4, 16])
def test_forward_flops_are_those_of_the_compiled_program(targets):
    ours = throughput.forward_flops(TINY, np.full(3, 64), np.full(3, targets))
    # XLA counts the pointwise operations too, which weigh more in so narrow a model.
    assert compiled_flops(TINY, 3, 64, targets) == pytest.approx(ours, rel=0.25)
    assert ours < compiled_flops(TINY, 3, 64, targets)


def test_padding_is_no_work():
    meter = throughput.Meter(TINY, 2, 1)
    meter.add({"encoder_ids": np.array([[5, 6, 0, 0]]), "targets": np.array([[7, 0]])})
    assert meter._tokens == 3
    assert meter._flops == 2 * throughput.forward_flops(TINY, np.array([2]), np.array([1]))
    assert 0 < meter.read()["mfu"]
    assert meter.read()["tokens_per_second"] == 0


def test_a_loss_among_labels_decodes_all_of_them():
    labels = np.array([[7, 1, 0], [8, 9, 1]])
    meter = throughput.Meter(TINY, 2, 1)
    meter.add({"encoder_ids": np.array([[5, 6, 0], [0] * 3]), "targets": np.zeros((2, 2))}, labels)
    assert meter._tokens == 2
    expected = throughput.forward_flops(TINY, np.array([2, 0]), np.array([5, 0]))
    assert meter._flops == 2 * expected


def test_packed_examples_count_as_they_would_alone():
    rows = {
        "encoder_ids": np.full((2, 6), 9),
        "encoder_segments": np.array([[1, 1, 1, 2, 2, 0], [1, 1, 2, 3, 3, 3]]),
        "targets": np.full((2, 4), 9),
        "decoder_segments": np.array([[1, 2, 2, 0], [1, 2, 3, 0]]),
    }
    inputs, targets = throughput.example_lengths(rows)
    assert inputs.tolist() == [3, 2, 0, 2, 1, 3] and targets.tolist() == [1, 2, 0, 1, 1, 1]
    meter = throughput.Meter(TINY, 2, 1)
    meter.add(rows)
    alone = np.array([[3, 1], [2, 2], [2, 1], [1, 1], [3, 1]]).T
    assert meter._tokens == alone.sum()
    assert meter._flops == pytest.approx(2 * throughput.forward_flops(TINY, *alone))
    meter.restart()
    meter.add(rows, np.array([[7, 1, 0], [8, 9, 1]]))
    assert meter._tokens == alone.sum()
    alone[1] = 5
    assert meter._flops == pytest.approx(2 * throughput.forward_flops(TINY, *alone))


def test_a_cpu_that_is_split_into_devices_counts_once(monkeypatch):
    monkeypatch.setattr(throughput, "peak", lambda dtype: 1e9)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: 1.0)
    found = []
    for devices in (1, 8):
        meter = throughput.Meter(TINY, 2, devices)
        meter.add({"encoder_ids": np.array([[5, 6]]), "targets": np.array([[7]])})
        found.append(meter.read()["mfu"])
    assert found[0] == found[1] > 0
