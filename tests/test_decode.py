"""Cached decoding equals uncached; beams find what exhaustive search finds; labels are ranked."""

import dataclasses
import functools
import itertools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY

from softprompt import backbone as backbones
from softprompt import decode, eval_task, losses, partition, t5_layers, tree
from softprompt.prompted import PromptedT5
from softprompt.vocabulary import EOS_ID

LENGTH = 6
# So few tokens that every sequence can be tried.
VOCAB = 12


@pytest.fixture(scope="module")
def model():
    rows = 3
    rng = np.random.default_rng(3)
    cfg = dataclasses.replace(TINY, vocab_size=VOCAB)
    params = dict(backbones.random(cfg, 1, mesh=partition.make_mesh(devices=1)).params)
    params["prompt/bank"] = rng.normal(size=(rows, cfg.emb_dim)).astype(np.float32)
    slots = VOCAB + np.arange(rows)
    ids = np.array([[*slots, 9, 4, 8, 1], [*slots, 3, 1, 0, 0], [0] * 7], np.int32)
    return PromptedT5(cfg, rows), tree.unflatten(params), ids


def greedy(module, params, ids, length):
    return decode.greedy(module, params, decode.encode(module, params, ids), length)


def forced(model, ids, out):
    """Log-probabilities `[B, L, V]` without a cache, feeding `out` shifted right."""
    module, params, _ = model
    logits = jax.jit(module.apply)(
        {"params": params}, ids, losses.shift_right(jnp.asarray(out, jnp.int32))
    )
    return np.asarray(jax.nn.log_softmax(logits))


def test_cached_greedy_equals_uncached(model):
    module, params, ids = model
    cached = np.asarray(jax.jit(functools.partial(greedy, module, length=LENGTH))(params, ids))
    out = np.zeros((2, LENGTH), np.int32)
    done = np.zeros(2, bool)
    for i in range(LENGTH):
        chosen = forced(model, ids[:2], out)[:, i].argmax(-1)
        out[:, i] = np.where(done, 0, chosen)
        done |= chosen == EOS_ID
    np.testing.assert_array_equal(cached[:2], out)
    assert (cached[2] == 0).all(), "a padding row says nothing"
    assert (cached[:2] != 0).any()


@pytest.mark.parametrize("length", [LENGTH, 16])
def test_greedy_encodes_once_and_projects_cross_attention_once(model, length):
    module, params, ids = model
    assert t5_layers.few(module.cfg, length) == (length == LENGTH)
    jaxpr = jax.make_jaxpr(functools.partial(greedy, module, length=length))(params, ids)
    (loop,) = [e for e in equations(jaxpr.jaxpr) if e.primitive.name == "while"]
    inside, everywhere = products(loop.params["body_jaxpr"].jaxpr), products(jaxpr.jaxpr)
    # The encoder's output [3, 7, 24] meets kernels of all heads, [24, 32], outside the loop alone.
    projection = {(3, 7, 24), (24, 32)}
    assert inside
    assert projection in everywhere
    assert projection not in inside


def equations(jaxpr):
    """All equations, those of the programs within it too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from equations(inner)


def products(jaxpr):
    """The operands' shapes of every matrix product."""
    found = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    return [{x.aval.shape for x in e.invars} for e in found]


def test_room_for_more_tokens_changes_none(model):
    """Short decoding does without the cross-attention's keys and values, long decoding has them."""
    module, params, ids = model
    short, long = (np.asarray(greedy(module, params, ids, n)) for n in (LENGTH, 16))
    np.testing.assert_array_equal(short, long[:, :LENGTH])


@pytest.mark.parametrize("few", [True, False])
def test_a_wide_beam_finds_the_best_of_all_sequences(model, few, monkeypatch):
    """Without and with the cross-attention's keys and values."""
    monkeypatch.setattr(t5_layers, "few", lambda cfg, queries: few)
    module, params, ids = model
    length, alpha = 3, 0.6
    search = jax.jit(functools.partial(decode.beam, module, length=length, beams=144, alpha=alpha))
    found, scores = search(params, decode.encode(module, params, ids[:2]))
    # Every sequence that ends within the length, padded after its end.
    outs = [
        tuple(head) + (EOS_ID,) + (0,) * (length - n - 1)
        for n in range(length)
        for head in itertools.product([t for t in range(VOCAB) if t != EOS_ID], repeat=n)
    ]
    outs = np.array(outs, np.int32)
    # A padding token may be said before the end: count up to EOS, not where ids are positive.
    counted = np.arange(length) <= (outs == EOS_ID).argmax(1)[:, None]
    for row in range(2):
        log_p = forced(model, np.repeat(ids[row : row + 1], len(outs), 0), outs)
        picked = np.take_along_axis(log_p, outs[..., None], 2)[..., 0] * counted
        score = picked.sum(1) / ((5 + counted.sum(1)) / 6) ** alpha
        np.testing.assert_array_equal(found[row], outs[score.argmax()])
        np.testing.assert_allclose(scores[row], score.max(), rtol=1e-4)


def test_sampling_obeys_temperature_top_k_and_seed(model):
    module, params, ids = model
    many = decode.encode(module, params, np.repeat(ids[:1], 64, 0))
    run = jax.jit(
        lambda key, temperature, k: decode.sample(
            module, params, many, 1, jax.random.split(key, 64), temperature, k, 1.0
        ),
        static_argnums=(1, 2),
    )
    first = forced(model, ids[:1], np.zeros((1, 1)))[0, 0]
    top = set(np.argsort(-first)[:3].tolist())
    drawn = np.asarray(run(jax.random.key(0), 1.0, 3))[:, 0]
    assert set(drawn.tolist()) <= top and len(set(drawn.tolist())) > 1
    cold = np.asarray(run(jax.random.key(0), 1e-4, 0))[:, 0]
    assert set(cold.tolist()) == {int(first.argmax())}
    np.testing.assert_array_equal(run(jax.random.key(0), 1.0, 3)[:, 0], drawn)
    assert not np.array_equal(run(jax.random.key(1), 1.0, 3)[:, 0], drawn)


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = jnp.log(jnp.array([[0.5, 0.3, 0.15, 0.05]]))
    kept = lambda p: np.isfinite(decode.restrict(logits, 0, p))[0].tolist()  # noqa: E731
    assert kept(0.4) == [True, False, False, False]
    assert kept(0.6) == [True, True, False, False]
    assert kept(0.9) == [True, True, True, False]
    assert np.isfinite(decode.restrict(logits, 2, 1.0))[0].tolist() == [True, True, False, False]


def test_label_scores_equal_those_of_separate_passes(model):
    module, params, ids = model
    label_ids = np.array([[5, 1, 0, 0], [7, 3, 9, 1], [2, 8, 1, 0]], np.int32)
    packed = jax.jit(functools.partial(decode.score_labels, module))(params, ids, label_ids)
    for i, label in enumerate(label_ids):
        out = np.tile(label, (len(ids), 1))
        log_p = forced(model, ids, out)
        alone = (np.take_along_axis(log_p, out[..., None], 2)[..., 0] * (out > 0)).sum(1)
        np.testing.assert_allclose(packed[:2, i], alone[:2], rtol=1e-4)


def test_labels_with_the_same_tokens_are_refused(vocabulary):
    with pytest.raises(ValueError, match="'yes' and 'yes ' have the same tokens"):
        eval_task.encode_labels(["yes", "yes "], vocabulary)
