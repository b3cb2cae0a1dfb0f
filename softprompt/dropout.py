"""Dropout as T5 has it: what a step keeps is drawn before it, and given to the model.

A layer drops some of its attention's weights, of its MLP's hidden values and of its outputs: by one
mask for all queries and one for all positions, as T5's own code has it, and flaxformer for the
encoder's output too. Alphabet of shapes: see `t5`.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from softprompt.t5_config import T5Config

Array = jax.Array
# Of `draw`; where a model is given none, nothing is dropped.
Masks = Sequence[Array]


class Kept(NamedTuple):
    """What is kept in a layer: masks that broadcast against it, or None where all is kept."""

    weights: Array | None = None  # [B, A, 1, S]
    attended: Array | None = None  # [B, 1, H]
    cross_weights: Array | None = None  # [B, A, 1, T]
    cross_attended: Array | None = None  # [B, 1, H]
    hidden: Array | None = None  # [B, 1, F], F the width inside the MLP
    out: Array | None = None  # [B, 1, H]


def draw(
    key: Array,
    cfg: T5Config,
    rows: int,
    length: int,
    targets: int,
    sharding: jax.sharding.Sharding | None = None,
) -> Masks:
    """Masks `[B, W]` of a step, True where it keeps: of `length` positions and `targets` a row.

    First of what enters and leaves the stacks, then of every layer: what the encoder's keeps, and
    behind it what the decoder's does (`of_encoder` and `of_decoder` take them apart). Each is drawn
    by the same program, from keys that follow one another. Called outside of a step that program is
    compiled by itself, and XLA compiles the step in about half of the time that it takes with its
    masks drawn inside. `sharding` is theirs.
    """
    width = _width(_shapes(cfg, length)) + _width(_shapes(cfg, targets, length))
    found = []
    for _ in range(1 + max(cfg.num_encoder_layers, cfg.num_decoder_layers)):
        key, kept = _next(key, 1 - cfg.dropout_rate, (rows, width), sharding)
        found.append(kept)
    return found


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _next(
    key: Array, share: float, shape: tuple[int, int], sharding: jax.sharding.Sharding | None
) -> tuple[Array, Array]:
    """The next key, and a mask of which `share` is True."""
    key, own = jax.random.split(key)
    kept = jax.random.bernoulli(own, share, shape)
    return key, kept if sharding is None else jax.lax.with_sharding_constraint(kept, sharding)


def of_encoder(masks: Masks | None, cfg: T5Config, length: int) -> list[Kept]:
    """What the encoder keeps of `length` positions, all of them without `masks`.

    First of its input (as `attended`) and output (`out`), then of each layer.
    """
    return _cut(masks, cfg.num_encoder_layers, _shapes(cfg, length), 0)


def of_decoder(masks: Masks | None, cfg: T5Config, targets: int, length: int) -> list[Kept]:
    """What the decoder keeps of `targets` positions that read `length`: see `of_encoder`."""
    first = _width(_shapes(cfg, length))
    return _cut(masks, cfg.num_decoder_layers, _shapes(cfg, targets, length), first)


def _cut(
    masks: Masks | None, layers: int, shapes: dict[str, tuple[int, ...]], first: int
) -> list[Kept]:
    """The parts of each mask from its column `first`.

    Gathered, not sliced: a mesh cuts some of them over its model axis, and through slices that cut
    would reach all others.
    """
    if masks is None:
        return [Kept()] * (layers + 1)
    found = []
    for mask in masks[: layers + 1]:
        kept, start = {}, first
        for name, shape in shapes.items():
            places = np.arange(start, start + np.prod(shape))
            kept[name] = jnp.take(mask, places, axis=1, mode="clip").reshape(len(mask), *shape)
            start += len(places)
        found.append(Kept(**kept))
    return found


def _shapes(cfg: T5Config, length: int, encoded: int = 0) -> dict[str, tuple[int, ...]]:
    """The shape of a row of each mask of a layer with `length` positions, that reads `encoded`."""
    found = {
        "weights": (cfg.num_heads, 1, length),
        "attended": (1, cfg.emb_dim),
        "hidden": (1, cfg.mlp_dim),
        "out": (1, cfg.emb_dim),
    }
    if encoded:
        found |= {"cross_weights": (cfg.num_heads, 1, encoded), "cross_attended": (1, cfg.emb_dim)}
    return found


def _width(shapes: dict[str, tuple[int, ...]]) -> int:
    return sum(int(np.prod(shape)) for shape in shapes.values())


def drop(x: Array, kept: Array | None, rate: float) -> Array:
    """`x` with what is not `kept` at 0, and the rest scaled by as much as fell away on average.

    A product with the mask: the backward pass of a choice would keep a mask as large as `x`.
    """
    return x if kept is None else x * jnp.where(kept, 1 / (1 - rate), 0.0).astype(x.dtype)
