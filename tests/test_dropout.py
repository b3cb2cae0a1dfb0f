"""Dropout: what is drawn, where it falls, and that a step drops what is drawn for it before."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import TINY

from softprompt import backbone as backbones
from softprompt import dropout, partition, t5, t5_layers, train, train_step
from softprompt.prompted import PromptedT5, slots

UNEVEN = dataclasses.replace(TINY, num_encoder_layers=3, num_decoder_layers=2, dropout_rate=0.25)

SHALLOW = dataclasses.replace(UNEVEN, num_encoder_layers=2, num_decoder_layers=1)


@pytest.fixture(scope="module")
def shallow():
    return backbones.random(SHALLOW, 1, mesh=partition.make_mesh(devices=1))


def test_masks_keep_their_share_one_for_all_positions():
    cfg, rows, length, targets = UNEVEN, 64, 7, 5
    masks = dropout.draw(jax.random.key(0), cfg, rows, length, targets)
    encoder = dropout.of_encoder(masks, cfg, length)
    decoder = dropout.of_decoder(masks, cfg, targets, length)
    assert (len(encoder), len(decoder)) == (1 + 3, 1 + 2)
    per_head, per_place = (rows, cfg.num_heads, 1), (rows, 1, cfg.emb_dim)
    expected = {
        "weights": (*per_head, length),
        "attended": per_place,
        "cross_weights": None,
        "cross_attended": None,
        "hidden": (rows, 1, cfg.mlp_dim),
        "out": per_place,
    }
    cross = {"cross_weights": (*per_head, length), "cross_attended": per_place}
    of_stacks = (
        (encoder, expected),
        (decoder, {**expected, **cross, "weights": (*per_head, targets)}),
    )
    drawn = []
    for stack, shapes in of_stacks:
        for kept in stack:
            assert {k: x if x is None else x.shape for k, x in kept._asdict().items()} == shapes
            drawn.append(np.concatenate([np.ravel(x) for x in kept if x is not None]))
            assert abs(drawn[-1].mean() - 0.75) < 5 * np.sqrt(0.25 * 0.75 / drawn[-1].size)
    least = min(map(len, drawn))
    found = np.corrcoef([x[:least] for x in drawn])
    assert np.abs(found - np.eye(7)).max() < 0.03, "every layer draws its own"
    assert dropout.of_encoder(None, cfg, length) == [dropout.Kept()] * 4


def test_what_is_dropped_is_zero_and_the_rest_makes_up_for_it():
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    kept = np.array([[[True, False, True, True]], [[False, True, True, False]]])
    found = dropout.drop(jnp.asarray(x), jnp.asarray(kept), 0.2)
    np.testing.assert_allclose(found, np.where(kept, x / 0.8, 0), rtol=1e-6)
    assert dropout.drop(jnp.asarray(x, jnp.bfloat16), jnp.asarray(kept), 0.2).dtype == jnp.bfloat16


def test_layers_of_the_same_weights_drop_each_its_own():
    cfg = dataclasses.replace(TINY, dropout_rate=0.5)
    encoder = t5.Encoder(cfg)
    x, rows = jnp.ones((2, 5, cfg.emb_dim)), (jnp.ones((2, 5), jnp.int32), False)
    params = encoder.init(jax.random.key(0), x, *rows)["params"]
    params |= {f"layers_{i}": params["layers_0"] for i in range(cfg.num_encoder_layers)}
    masks = dropout.draw(jax.random.key(1), cfg, 2, 5, 3)
    seen = []

    def same_input(layer, found):
        seen.append(found)
        return x

    encoder.apply({"params": params}, x, *rows, masks, same_input)
    assert len(seen) == cfg.num_encoder_layers - 1 > 1
    assert np.abs(seen[0] - seen[1]).max() > 0.1


PLACES = ("weights", "attended", "cross_weights", "cross_attended", "hidden", "out")


@pytest.mark.parametrize(
    "decoder, place", [(d, p) for d in (False, True) for p in PLACES if d or p[:5] != "cross"]
)
def test_what_a_layer_drops_whole_is_as_if_that_part_were_not_there(decoder, place):
    cfg = dataclasses.replace(TINY, dropout_rate=0.25)
    layer = t5_layers.DecoderLayer(cfg) if decoder else t5_layers.EncoderLayer(cfg)
    x, encoded = (jax.random.normal(jax.random.key(i), (2, 5, cfg.emb_dim)) for i in range(2))
    bias = jnp.zeros((1, 1, 5, 5))
    inputs = (x, encoded, bias, bias) if decoder else (x, bias)
    params = layer.init(jax.random.key(2), *inputs, dropout.Kept(), method="whole")
    nothing = jnp.zeros((2, 1, 1, 1) if place.endswith("weights") else (2, 1, 1), bool)
    found = layer.apply(params, *inputs, dropout.Kept(**{place: nothing}), method="whole")
    lacks = {"weights": "self", "attended": "self", "hidden": "mlp", "out": "mlp"}
    lacks = lacks.get(place, "cross")

    def without(layer, x):
        if decoder:
            first, norm = layer.self_attention, layer.pre_self_attention_layer_norm
        else:
            first, norm = layer.attention, layer.pre_attention_layer_norm
        if lacks != "self":
            x = x + first(norm(x), first.keys_values(norm(x)), bias)
        if decoder and lacks != "cross":
            y = layer.pre_cross_attention_layer_norm(x)
            x = x + layer.encoder_decoder_attention(y, layer.cross(encoded, 5), bias)
        return x if lacks == "mlp" else x + layer.mlp(layer.pre_mlp_layer_norm(x))

    np.testing.assert_allclose(found, layer.apply(params, x, method=without), atol=1e-5)


def test_a_stack_drops_its_input_and_its_output():
    # Without the scale that makes up for what is dropped nothing but masks is seen.
    cfg = dataclasses.replace(TINY, dropout_rate=0.0)
    encoder = t5.Encoder(cfg)
    x = jax.random.normal(jax.random.key(0), (2, 5, cfg.emb_dim))
    rows = jnp.ones((2, 5), jnp.int32), False
    params = encoder.init(jax.random.key(1), x, *rows)
    ends, *layers = dropout.draw(jax.random.key(2), UNEVEN, 2, 5, 3)
    masks = [ends, *map(jnp.ones_like, layers)]
    ends = dropout.of_encoder(masks, cfg, 5)[0]
    expected = encoder.apply(params, x * ends.attended, *rows) * ends.out
    np.testing.assert_array_equal(encoder.apply(params, x, *rows, masks), expected)
    assert 0 < ends.attended.mean() < 1 and 0 < ends.out.mean() < 1
    assert np.abs(expected - encoder.apply(params, x, *rows) * ends.out).max() > 0.1


@pytest.mark.parametrize(
    "form, microbatches", [("tokens", 1), ("packed", 2), ("labels", 2), ("packed labels", 1)]
)
def test_a_step_drops_what_is_drawn_for_it_before(shallow, form, microbatches):
    mesh, rows = shallow.mesh, 3
    module, rng = PromptedT5(SHALLOW, rows), np.random.default_rng(0)
    ids = rng.integers(2, 60, (4, 9)).astype(np.int32)
    ids[:, :rows] = slots(SHALLOW.vocab_size, rows)
    batch = {"encoder_ids": ids}
    labels = np.array([[5, 1], [9, 1], [7, 1]], np.int32) if "labels" in form else None
    batch["targets"] = np.tile(np.array([5, 1], np.int32), (4, 2 if "packed" in form else 1))
    if "packed" in form:
        batch["encoder_segments"] = np.repeat([[1, 2]], 4, 0).repeat([5, 4], 1).astype(np.int32)
        batch["decoder_segments"] = np.repeat([[1, 1, 2, 2]], 4, 0).astype(np.int32)
    batch = partition.place_rows(batch, mesh)
    prompt = rng.uniform(-0.5, 0.5, (rows, SHALLOW.emb_dim)).astype(np.float32)
    trainable = {train.PROMPT: partition.place(prompt, partition.replicated(mesh))}
    optimizer = optax.sgd(0.1)
    step = jax.jit(
        train_step.make_step(
            module, optimizer, seed=7, label_ids=labels, microbatches=microbatches
        )
    )  # fmt: skip
    state = train_step.init_state(trainable, optimizer, mesh)
    inside = step(state, shallow.params, batch)
    key = train_step.step_key(7, state["step"])
    by_rows = partition.batch_sharding(mesh)
    given = train_step.with_dropout(batch, SHALLOW, key, labels, by_rows)
    assert all(x.sharding.is_equivalent_to(by_rows, 2) for x in given[train_step.MASKS])
    before = step(state, shallow.params, given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), inside, before)
    other = train_step.with_dropout(batch, SHALLOW, train_step.step_key(8, state["step"]), labels)
    assert float(step(state, shallow.params, other)["loss_sum"]) != float(before["loss_sum"])


def test_microbatches_drop_what_the_whole_batch_drops(shallow):
    rng = np.random.default_rng(0)
    batch = {
        "encoder_ids": rng.integers(2, 60, (4, 9)).astype(np.int32),
        "targets": rng.integers(2, 60, (4, 3)).astype(np.int32),
    }
    batch["encoder_ids"][:, :3] = slots(SHALLOW.vocab_size, 3)
    optimizer = optax.sgd(1.0)
    trainable = {train.PROMPT: jnp.asarray(rng.normal(size=(3, SHALLOW.emb_dim)), jnp.float32)}
    ends = []
    for parts in (1, 4):
        step = train_step.make_step(PromptedT5(SHALLOW, 3), optimizer, microbatches=parts)
        state = train_step.init_state(trainable, optimizer, shallow.mesh)
        ends.append(jax.jit(step)(state, shallow.params, batch)["trainable"][train.PROMPT])
    assert float(jnp.abs(ends[0] - trainable[train.PROMPT]).max()) > 1e-3
    for end in ends[1:]:
        np.testing.assert_allclose(end, ends[0], atol=1e-5)
