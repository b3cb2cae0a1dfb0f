"""Decoding with a key-value cache, and rank classification.

Each function is pure and jittable. The encoder runs once (`encode`, which may be a program of its
own: a decoding loop is best compiled otherwise, see `xla.loop_options`), what cross-attention reads
is made once, and the loop stops when every row is done.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from softprompt import losses
from softprompt.dropout import Masks
from softprompt.prompted import PromptedT5
from softprompt.vocabulary import EOS_ID, PAD_ID

Array = jax.Array
Params = dict[str, Any]
# (logits [B, V], position) -> ids [B]
Choose = Callable[[Array, Array], Array]


class Encoded(NamedTuple):
    """What decoding starts from: the encoder's output `[B, T, H]`, and segments `[B, T]`."""

    output: Array
    segments: Array


def encode(module: PromptedT5, params: Params, encoder_ids: Array) -> Encoded:
    """What `greedy`, `sample` and `beam` start from, of rows `[B, T]` of ids and prompt slots."""
    return Encoded(*module.apply({"params": params}, encoder_ids, method="encode"))


def _start(module: PromptedT5, params: Params, encoded: Encoded, length: int, beams: int = 1):
    variables = {"params": params}
    segments = encoded.segments
    cache, cross = module.apply(variables, encoded.output, length, method="start_decoding")
    if beams > 1:
        tile = lambda x: jnp.repeat(x, beams, axis=0)  # noqa: E731
        cache, segments = jax.tree.map(tile, (cache, segments))
        cross = [source.of_rows(tile) for source in cross]

    def step(ids, index, cache):
        return module.apply(variables, ids, index, cache, cross, segments, method="decode_step")

    return step, cache


def _loop(
    module: PromptedT5,
    params: Params,
    encoded: Encoded,
    length: int,
    choose: Choose,
    scored: bool = False,
) -> tuple[Array, Array]:
    """Ids `[B, length]`, one chosen after the other until EOS; what follows EOS is padding.

    With `scored` also their log-likelihood `[B]` (EOS included), else zeros.
    """
    step, cache = _start(module, params, encoded, length)
    rows = encoded.segments.shape[0]
    ids = jnp.full((rows, length), PAD_ID, jnp.int32)
    # A row without any input is batch padding: it is done before it begins.
    done = ~jnp.any(encoded.segments > 0, axis=1)

    def more(carry):
        index, _, _, done, _, _ = carry
        return (index < length) & ~jnp.all(done)

    def body(carry):
        index, ids, last, done, scores, cache = carry
        logits, cache = step(last, index, cache)
        chosen = choose(logits, index).astype(jnp.int32)
        if scored:
            found = losses.token_log_likelihood(logits, chosen)
            scores = scores + jnp.where(done, 0.0, found)
        chosen = jnp.where(done, PAD_ID, chosen)
        ids = jax.lax.dynamic_update_slice_in_dim(ids, chosen[:, None], index, axis=1)
        return index + 1, ids, chosen, done | (chosen == EOS_ID), scores, cache

    first = jnp.full((rows,), PAD_ID, jnp.int32)
    carry = (jnp.int32(0), ids, first, done, jnp.zeros(rows), cache)
    _, ids, _, _, scores, _ = jax.lax.while_loop(more, body, carry)
    return ids, scores


def greedy(module: PromptedT5, params: Params, encoded: Encoded, length: int) -> Array:
    """The likeliest token at every position: ids `[B, length]`."""
    return _loop(module, params, encoded, length, _likeliest)[0]


def greedy_scored(
    module: PromptedT5, params: Params, encoded: Encoded, length: int
) -> tuple[Array, Array]:
    """`greedy`, and the log-likelihood `[B]` of what it found in nats (EOS included)."""
    return _loop(module, params, encoded, length, _likeliest, scored=True)


def _likeliest(logits: Array, _: Array) -> Array:
    """The first of the largest, by two plain reductions: no CPU vectorises argmax."""
    places = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    largest = logits == logits.max(-1, keepdims=True)
    return jnp.where(largest, places, logits.shape[-1] - 1).min(-1)


def sample(
    module: PromptedT5,
    params: Params,
    encoded: Encoded,
    length: int,
    keys: Array,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Array:
    """Random ids `[B, length]`.

    Args:
      keys: `[B]`, of each row: what it draws depends on its key, not on the rows beside it.
      temperature: divides the logits; must be positive (`greedy` is the limit 0).
      top_k: keep the k likeliest tokens (0: all).
      top_p: keep the smallest set of tokens whose probability reaches p (Holtzman et al. 2020).
    """
    if temperature <= 0:
        raise ValueError(f"temperature is {temperature}, expected more than 0; use greedy for 0")
    if not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(f"got top_k {top_k}, top_p {top_p}; expected top_k >= 0, 0 < top_p <= 1")

    def choose(logits, index):
        own = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        allowed = restrict(logits / temperature, top_k, top_p)
        return jax.vmap(jax.random.categorical)(own, allowed)

    return _loop(module, params, encoded, length, choose)[0]


def restrict(logits: Array, top_k: int, top_p: float) -> Array:
    """Logits `[B, V]` with all but the top-k / top-p tokens at -inf."""
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(ordered)
        # The token that crosses p is kept, so the set is never empty.
        before = jnp.cumsum(probability, axis=-1) - probability
        least = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < least, -jnp.inf, logits)
    return logits


def beam(
    module: PromptedT5,
    params: Params,
    encoded: Encoded,
    length: int,
    beams: int = 4,
    alpha: float = 0.6,
) -> tuple[Array, Array]:
    """Beam search: the best ids `[B, length]` and their scores `[B]`.

    A finished hypothesis of n tokens (EOS included) scores its log-probability divided by
    `((5 + n) / 6) ** alpha` (Wu et al. 2016, equation 14). Hypotheses that reach `length` without
    EOS count only for rows where none finished.
    """
    step, cache = _start(module, params, encoded, length, beams)
    rows = encoded.segments.shape[0]

    def penalty(n):
        return ((5.0 + n) / 6.0) ** alpha

    def take(x, which):
        return jnp.take_along_axis(x, which[..., None] if x.ndim == 3 else which, axis=1)

    def body(carry):
        index, last, alive, alive_scores, finished, finished_scores, cache = carry
        logits, cache = step(last.reshape(-1), index, cache)
        vocab = logits.shape[-1]
        scores = jax.nn.log_softmax(logits).reshape(rows, beams, vocab) + alive_scores[..., None]
        # 2K candidates hold at least K that do not end here.
        top, flat = jax.lax.top_k(scores.reshape(rows, -1), 2 * beams)
        parent, token = flat // vocab, (flat % vocab).astype(jnp.int32)
        ids = jax.lax.dynamic_update_slice_in_dim(take(alive, parent), token[..., None], index, 2)
        ends = token == EOS_ID

        ended_scores = jnp.where(ends, top / penalty(index + 1), -jnp.inf)
        all_scores = jnp.concatenate([finished_scores, ended_scores], axis=1)
        finished_scores, kept = jax.lax.top_k(all_scores, beams)
        finished = take(jnp.concatenate([finished, ids], axis=1), kept)

        alive_scores, kept = jax.lax.top_k(jnp.where(ends, -jnp.inf, top), beams)
        alive, last, parent = take(ids, kept), take(token, kept), take(parent, kept)
        origin = (jnp.arange(rows)[:, None] * beams + parent).reshape(-1)
        cache = jax.tree.map(lambda x: x[origin], cache)
        return index + 1, last, alive, alive_scores, finished, finished_scores, cache

    def more(carry):
        index, _, _, alive_scores, _, finished_scores, _ = carry
        # Log-probabilities only fall: the best an alive beam can still score.
        hope = alive_scores[:, 0] / penalty(length)
        settled = finished_scores[:, -1] > hope
        empty = ~jnp.any(encoded.segments > 0, axis=1)
        return (index < length) & ~jnp.all(settled | empty)

    ids = jnp.full((rows, beams, length), PAD_ID, jnp.int32)
    start = jnp.full((rows, beams), -jnp.inf)
    carry = (
        jnp.int32(0),
        jnp.full((rows, beams), PAD_ID, jnp.int32),
        ids,
        start.at[:, 0].set(0.0),
        ids,
        start,
        cache,
    )
    _, _, alive, alive_scores, finished, finished_scores, _ = jax.lax.while_loop(more, body, carry)
    some = jnp.isfinite(finished_scores[:, 0])
    best = jnp.where(some[:, None], finished[:, 0], alive[:, 0])
    return best, jnp.where(some, finished_scores[:, 0], alive_scores[:, 0] / penalty(length))


def score_labels(
    module: PromptedT5,
    params: Params,
    encoder_ids: Array,
    label_ids: Array,
    dropout_masks: Masks | None = None,
    segments: Array | None = None,
    count: int = 1,
) -> Array:
    """Log-likelihood `[B, C]` of each label (with EOS, padded by 0) for each row.

    `label_ids` are `[C, L]`, or `[B, C, L]` where every row has its own; a label of padding alone
    scores 0. All labels of a row lie in one decoder row as segments, so that what cross-attention
    reads is made once per row, not once per label. `dropout_masks` (`dropout.draw`) are of decoder
    rows as long as all their labels. With `segments` `[B, T]`, rows hold up to `count` packed
    examples: `[B, count, C]`, and only the scores of segments that a row has mean anything.
    """
    rows = encoder_ids.shape[0]
    labels, length = label_ids.shape[-2:]
    variables = {"params": params}
    packed = segments is not None
    encoded, segments = module.apply(
        variables, encoder_ids, segments, dropout_masks, method="encode"
    )
    of_rows = jnp.broadcast_to(label_ids, (rows, labels, length))
    of_rows = jnp.tile(of_rows, (1, count, 1)).reshape(-1, length)

    def in_each_row(x):
        return jnp.tile(x[None], (rows, 1))

    example = jnp.repeat(jnp.arange(1, count + 1, dtype=segments.dtype), labels * length)
    logits = module.apply(
        variables,
        encoded,
        segments,
        losses.shift_right(of_rows).reshape(rows, -1),
        in_each_row(jnp.repeat(jnp.arange(1, count * labels + 1), length)),
        dropout_masks,
        in_each_row(example),
        method=lambda m, *args: m.t5.decode(*args),
    )
    targets = of_rows.reshape(rows, -1)
    likelihood = losses.token_log_likelihood(logits, targets) * (targets > 0)
    scores = likelihood.reshape(rows, count, labels, length).sum(-1)
    return scores if packed else scores[:, 0]
