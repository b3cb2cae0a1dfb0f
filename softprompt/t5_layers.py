"""The layers of a T5: attention, MLP, norm and relative bias.

See `t5` for sources and the alphabet of shapes; Q queries attend to S positions.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning
from jax.ad_checkpoint import checkpoint_name

from softprompt import segments
from softprompt.dropout import Kept, drop
from softprompt.int8 import SCALE
from softprompt.products import Matrix, attention, divide, exponentials, multiply, product
from softprompt.t5_config import REMAT, T5Config

Array = jax.Array
# The name of dense layers' outputs for `layer_class`.
DENSE = "dense"


class Dense(nn.Module):
    """Linear map without bias on the last axis; kernel `[in, out]`."""

    shape: tuple[int, int]
    axes: tuple[str, str]
    dtype: Any
    scale: float = 1.0

    def setup(self):
        init = nn.initializers.normal(self.scale / np.sqrt(self.shape[0]))
        self.kernel = partitioning.param_with_axes(
            "kernel", init, self.shape, jnp.float32, axes=self.axes
        )

    def __call__(self, x: Array, out_dtype: Any = None) -> Array:
        """`[B, S, out]` for `x` `[B, S, in]`."""
        matrix = self.kernel, None if self._scale() is None else self._scale().reshape(-1)
        y = multiply("btk,kn->btn", x.astype(self.dtype), matrix, out_dtype or self.dtype)
        return checkpoint_name(y, DENSE)

    def of_heads(self, heads: int) -> Matrix:
        """The kernel as `[A, in, D]` and its scales as `[A, 1, D]`, out = A * D."""

        def split(x):
            return None if x is None else x.reshape(x.shape[0], heads, -1).swapaxes(0, 1)

        return split(self.kernel), split(self._scale())

    def _scale(self) -> Array | None:
        """Scales `[1, out]` of a kernel kept as int8."""
        if self.kernel.dtype != jnp.int8:
            return None
        return self.get_variable("params", f"kernel{SCALE}")


class LayerNorm(nn.Module):
    """Root-mean-square norm without mean or bias, computed in float32."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6)
        scale = partitioning.param_with_axes(
            "scale", nn.initializers.ones, x.shape[-1:], jnp.float32, axes=("embed",)
        )
        return x.astype(self.dtype) * scale.astype(self.dtype)


class KV(NamedTuple):
    """Keys and values, each `[B, A, S, D]`, of S positions that are attended to."""

    key: Array
    value: Array

    def of_rows(self, function: Callable[[Array], Array]) -> "KV":
        """With `function` of every array that has a row for each of the batch."""
        return KV(*map(function, self))


class Direct(NamedTuple):
    """S positions that are attended to without keys and values: see `Attention.direct`."""

    x: Array  # [B, S, H]
    turned: Array  # The same as [B, H, S]: scores are faster so on a CPU.
    key: Matrix  # [A, H, D]
    value: Matrix  # [A, D, H]

    def of_rows(self, function: Callable[[Array], Array]) -> "Direct":
        """With `function` of every array that has a row for each of the batch."""
        return self._replace(x=function(self.x), turned=function(self.turned))


class Attention(nn.Module):
    """Multi-head attention. T5 has no 1/sqrt(D): it is folded into the query's initialiser."""

    cfg: T5Config

    def setup(self):
        cfg = self.cfg
        inner = cfg.num_heads * cfg.head_dim
        into = ((cfg.emb_dim, inner), ("embed", "joined_kv"), cfg.dtype)
        self.query = Dense(*into, cfg.head_dim**-0.5)
        self.key = Dense(*into)
        self.value = Dense(*into)
        self.out = Dense((inner, cfg.emb_dim), ("joined_kv", "embed"), cfg.dtype)

    def _heads(self, x: Array) -> Array:
        """`[B, S, A * D]` as `[B, A, S, D]`.

        Heads come first: products over a cache that is kept otherwise copy it at every step.
        """
        return x.reshape(*x.shape[:-1], self.cfg.num_heads, self.cfg.head_dim).swapaxes(1, 2)

    def keys_values(self, x: Array) -> KV:
        """Keys and values `[B, A, S, D]` of `x` `[B, S, H]`."""
        return KV(self._heads(self.key(x)), self._heads(self.value(x)))

    def direct(self, x: Array) -> Direct:
        """What attends to `x` `[B, S, H]` without its keys and values.

        A score is q·(K e) = (Kᵀ q)·e, and a weighted sum of values V e is V times that of the e.
        """
        value, scale = self.value.of_heads(self.cfg.num_heads)
        key = self.key.of_heads(self.cfg.num_heads)
        return Direct(x, x.swapaxes(1, 2), key, (value.swapaxes(1, 2), scale))

    def __call__(
        self,
        x: Array,
        source: KV | Direct,
        bias: Array | segments.Segmented,
        kept: Array | None = None,
    ) -> Array:
        """Attends from `x` `[B, Q, H]` to `source`; `bias` broadcasts to `[B, A, Q, S]`.

        A `Segmented` bias, of keys and values alone, keeps attention within segments; positions of
        none get nothing. `kept` `[B, A, 1, S]`: see `Kept`.
        """
        query = self._heads(self.query(x))
        if isinstance(source, Direct):
            y = self._directly(query, source, bias, kept)
        else:
            # One mask for all queries may as well fall on the values.
            kept = None if kept is None else kept.swapaxes(2, 3)
            value = drop(source.value, kept, self.cfg.dropout_rate)
            attend = segments.attend if isinstance(bias, segments.Segmented) else attention
            y = attend(query, source.key, value, bias)
        y = y.swapaxes(1, 2)
        return self.out(y.reshape(*y.shape[:-2], -1))

    def _directly(self, query: Array, source: Direct, bias: Array, kept: Array | None) -> Array:
        """`products.attention` without keys and values: see `direct`."""
        cfg = self.cfg
        kernel, scale = source.key
        if scale is not None:
            query, scale = (query * scale).astype(cfg.dtype), jnp.ones(())
        query = multiply("baqd,ahd->baqh", query, (kernel, scale), cfg.dtype)
        logits = product("baqh,bhs->baqs", query, source.turned, jnp.float32)
        weights, total = exponentials(logits + bias.astype(jnp.float32), cfg.dtype)
        weights = drop(weights, kept, cfg.dropout_rate)
        y = divide(product("baqs,bsh->baqh", weights, source.x, jnp.float32), total, cfg.dtype)
        return multiply("baqh,adh->baqd", y, source.value, cfg.dtype)


@functools.partial(jax.checkpoint, static_argnums=0)
def _activated(activations: tuple[str, ...], parts: list[Array]) -> Array:
    """The product of the parts, each through its activation, in float32.

    The backward pass computes it again: kept, a layer's widest arrays would lie in memory twice.
    """
    y = 1.0
    for activation, z in zip(activations, parts, strict=True):
        z = z.astype(jnp.float32)
        y = y * (z if activation == "linear" else getattr(jax.nn, activation)(z))
    return y


class Mlp(nn.Module):
    """Feed-forward block: `wi` (T5 1.0) or the gated pair `wi_0`, `wi_1` (T5 1.1), then `wo`."""

    cfg: T5Config

    @nn.compact
    def __call__(self, x: Array, kept: Array | None = None) -> Array:
        """`[B, S, H]` for `x` `[B, S, H]`; `kept` `[B, 1, F]`: see `Kept`."""
        cfg = self.cfg
        parts = []
        for i in range(len(cfg.mlp_activations)):
            name = "wi" if len(cfg.mlp_activations) == 1 else f"wi_{i}"
            shape = (cfg.emb_dim, cfg.mlp_dim)
            dense = Dense(shape, ("embed", "mlp"), cfg.dtype, name=name)
            parts.append(dense(x))
        y = _activated(cfg.mlp_activations, parts)
        y = drop(y, kept, cfg.dropout_rate)
        return Dense((cfg.mlp_dim, cfg.emb_dim), ("mlp", "embed"), cfg.dtype, name="wo")(y)


def relative_buckets(
    distance: Array, bidirectional: bool, buckets: int = 32, max_distance: int = 128
) -> Array:
    """T5's bucket of each `key position - query position` (Raffel et al. 2020, section 2.1).

    Half of the buckets hold exact distances, the other half grow logarithmically up to
    `max_distance`. Looked up in a table made by NumPy, so that bucket edges do not depend
    on a device's logarithm.
    """
    buckets = buckets // 2 if bidirectional else buckets
    exact = buckets // 2
    n = np.arange(max_distance + 1)
    with np.errstate(divide="ignore"):
        log = np.log(n / exact + np.finfo(np.float32).eps) / np.log(max_distance / exact)
    large = exact + (log * (buckets - exact)).astype(np.int64)
    table = jnp.asarray(np.where(n < exact, n, np.minimum(large, buckets - 1)), jnp.int32)
    past = -distance
    size = jnp.abs(past) if bidirectional else jnp.maximum(past, 0)
    bucket = table[jnp.minimum(size, max_distance)]
    return bucket + jnp.where(past < 0, buckets, 0) if bidirectional else bucket


class RelativePositionBias(nn.Module):
    """Learnt attention bias per head and bucketed distance, shared by all layers of a stack."""

    cfg: T5Config
    bidirectional: bool

    @nn.compact
    def __call__(self, queries: Array, keys: Array) -> Array:
        """`[1, A, Q, S]` for query positions `[Q]` and key positions `[S]`."""
        init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
        table = partitioning.param_with_axes(
            "rel_embedding",
            init,
            (self.cfg.num_heads, self.cfg.relative_buckets),
            jnp.float32,
            axes=("heads", "relpos_buckets"),
        )
        buckets = relative_buckets(
            keys[None, :] - queries[:, None],
            self.bidirectional,
            self.cfg.relative_buckets,
            self.cfg.relative_max_distance,
        )
        return table[:, buckets][None]


class EncoderLayer(nn.Module):
    """Self-attention and MLP, each pre-normed and residual."""

    cfg: T5Config

    def setup(self):
        cfg = self.cfg
        self.pre_attention_layer_norm = LayerNorm(cfg.dtype)
        self.attention = Attention(cfg)
        self.pre_mlp_layer_norm = LayerNorm(cfg.dtype)
        self.mlp = Mlp(cfg)

    def whole(self, x: Array, bias: Array | segments.Segmented, kept: Kept) -> Array:
        rate = self.cfg.dropout_rate
        y = self.pre_attention_layer_norm(x)
        y = self.attention(y, self.attention.keys_values(y), bias, kept.weights)
        x = x + drop(y, kept.attended, rate)
        y = self.mlp(self.pre_mlp_layer_norm(x), kept.hidden)
        return x + drop(y, kept.out, rate)


def few(cfg: T5Config, queries: int) -> bool:
    """Whether so many positions of a row attend at less cost without keys and values.

    For S positions of the encoder those cost A·(H + Q)·D·S multiply-adds, twice; without them it is
    A·Q·H·S. Up to 64 queries, of heads 64 wide, that is less at any width of the model: labels of a
    few tokens spare a ninth of the whole forward pass.
    """
    return queries * cfg.emb_dim < (cfg.emb_dim + queries) * cfg.head_dim


class DecoderLayer(nn.Module):
    """Causal self-attention, attention to the encoder, and MLP."""

    cfg: T5Config

    def setup(self):
        cfg = self.cfg
        self.pre_self_attention_layer_norm = LayerNorm(cfg.dtype)
        self.self_attention = Attention(cfg)
        self.pre_cross_attention_layer_norm = LayerNorm(cfg.dtype)
        self.encoder_decoder_attention = Attention(cfg)
        self.pre_mlp_layer_norm = LayerNorm(cfg.dtype)
        self.mlp = Mlp(cfg)

    def self_keys_values(self, x: Array) -> KV:
        return self.self_attention.keys_values(self.pre_self_attention_layer_norm(x))

    def cross(self, encoded: Array, queries: int) -> KV | Direct:
        """What `queries` positions of a row, at once or one by one, had best attend to."""
        attention = self.encoder_decoder_attention
        make = attention.direct if few(self.cfg, queries) else attention.keys_values
        return make(encoded)

    def whole(
        self, x: Array, encoded: Array, self_bias: Array, cross_bias: Array, kept: Kept
    ) -> Array:
        """All positions at once: `x` `[B, L, H]` and `encoded` `[B, T, H]`."""
        kv, cross = self.self_keys_values(x), self.cross(encoded, x.shape[1])
        return self(x, kv, cross, self_bias, cross_bias, kept)

    def one(
        self,
        y: Array,
        index: Array,
        cached: KV,
        cross: KV | Direct,
        self_bias: Array,
        cross_bias: Array,
    ) -> tuple[Array, KV]:
        """One position `y` `[B, 1, H]` at `index`, and `cached` with its keys and values."""
        kv = KV(
            *(
                jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), index, axis=2)
                for old, x in zip(cached, self.self_keys_values(y), strict=True)
            )
        )
        return self(y, kv, cross, self_bias, cross_bias, Kept()), kv

    def __call__(
        self,
        x: Array,
        self_kv: KV,
        cross: KV | Direct,
        self_bias: Array,
        cross_bias: Array,
        kept: Kept,
    ) -> Array:
        rate = self.cfg.dropout_rate
        y = self.pre_self_attention_layer_norm(x)
        y = self.self_attention(y, self_kv, self_bias, kept.weights)
        x = x + drop(y, kept.attended, rate)
        y = self.pre_cross_attention_layer_norm(x)
        y = self.encoder_decoder_attention(y, cross, cross_bias, kept.cross_weights)
        x = x + drop(y, kept.cross_attended, rate)
        y = self.mlp(self.pre_mlp_layer_norm(x), kept.hidden)
        return x + drop(y, kept.out, rate)


def layer_class(layer: type[nn.Module], remat: str, *others: str) -> type[nn.Module]:
    """A layer class that is traced once for all layers of a stack, and keeps what `remat` says.

    For the backward pass of its method `whole`, 'full' keeps the layer's inputs, 'minimal' also the
    outputs of its dense layers, so that hardly a matrix of weights is multiplied again (T5X's
    names).
    `others` are methods that are traced once too.
    """
    if remat not in REMAT:
        raise ValueError(f"REMAT is {remat!r}, expected one of {', '.join(REMAT)}")
    if remat != "none":
        policy = None
        if remat == "minimal":
            policy = jax.checkpoint_policies.save_only_these_names(DENSE)
        layer = nn.remat(layer, policy=policy, methods=["whole"])
    return nn.jit(layer, methods=["whole", *others])
