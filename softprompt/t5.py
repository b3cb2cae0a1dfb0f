"""T5 encoder-decoder in Flax linen: T5 1.0 (ReLU, tied head) and T5 1.1 (gated GELU, untied head).

Parameter tree and logical axis names are those of T5X's minimal T5, so its checkpoints fit leaf by
leaf. Architecture: Raffel et al. 2020 (arXiv 1910.10683), section 2.1; T5 1.1: Shazeer 2020
(arXiv 2002.05202). Alphabet: B rows, T encoder length, L decoder length, H model width,
V vocabulary rows, A heads, D head width.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning
from jax.ad_checkpoint import checkpoint_name

from softprompt.int8 import SCALE
from softprompt.products import Matrix, divide, exponentials, int8_product, multiply, product

Array = jax.Array
# (number of an encoder layer, its input `[B, T, H]`) -> that input, perhaps another one.
Before = Callable[[int, Array], Array]

MASKED = -1e10
# What the backward pass recomputes: activation functions; all but dense layers; whole layers.
REMAT = ("none", "minimal", "full")
DENSE = "dense"


# Fields of `T5Config` that belong to a run, not to the architecture.
RUN_FIELDS = ("dropout_rate", "dtype", "remat")


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of a T5. `vocab_size` counts embedding rows, padding rows included."""

    vocab_size: int
    emb_dim: int
    num_heads: int
    num_encoder_layers: int
    num_decoder_layers: int
    head_dim: int
    mlp_dim: int
    # ("gelu", "linear") is T5 1.1's gated GELU, ("relu",) is T5 1.0.
    mlp_activations: tuple[str, ...] = ("gelu", "linear")
    # T5 1.0 reads logits off the embedding, scaled by 1/sqrt(H).
    logits_via_embedding: bool = False
    # Number of relative-position buckets, and the distance from which all share the last one.
    relative_buckets: int = 32
    relative_max_distance: int = 128
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    # One of `REMAT`.
    remat: str = "none"

    def to_json(self) -> dict[str, Any]:
        """The architecture alone (no dropout, dtype or remat), as plain JSON values."""
        sizes = dataclasses.asdict(self)
        for name in RUN_FIELDS:
            del sizes[name]
        sizes["mlp_activations"] = list(self.mlp_activations)
        return sizes

    @classmethod
    def from_json(cls, sizes: dict[str, Any], **overrides) -> "T5Config":
        """Inverse of `to_json`; unknown or missing names are an error naming them."""
        fields = [f for f in dataclasses.fields(cls) if f.name not in RUN_FIELDS]
        names = {f.name for f in fields}
        required = {f.name for f in fields if f.default is dataclasses.MISSING}
        unknown, missing = sorted(set(sizes) - names), sorted(required - set(sizes))
        if unknown or missing:
            raise ValueError(
                f"not a T5 architecture: unknown names {unknown}, missing names {missing}"
            )
        if "mlp_activations" in sizes:
            sizes = dict(sizes, mlp_activations=tuple(sizes["mlp_activations"]))
        return cls(**sizes, **overrides)


def _t5_1_1(emb_dim, num_heads, layers, head_dim, mlp_dim, vocab_size=32128) -> T5Config:
    encoder_layers, decoder_layers = layers if isinstance(layers, tuple) else (layers, layers)
    return T5Config(
        vocab_size, emb_dim, num_heads, encoder_layers, decoder_layers, head_dim, mlp_dim
    )


def _t5_1_0(emb_dim, num_heads, layers, head_dim, mlp_dim) -> T5Config:
    return T5Config(
        32128, emb_dim, num_heads, layers, layers, head_dim, mlp_dim,
        mlp_activations=("relu",), logits_via_embedding=True,
    )  # fmt: skip


# H, heads, layers, head width, MLP width. Raffel et al. 2020, section 3.7, and the released
# configurations of T5 and T5 1.1. The three with a small vocabulary are this project's own family.
SIZES = {
    "t5_1_1_small": _t5_1_1(512, 6, 8, 64, 1024),
    "t5_1_1_base": _t5_1_1(768, 12, 12, 64, 2048),
    "t5_1_1_large": _t5_1_1(1024, 16, 24, 64, 2816),
    "t5_1_1_xl": _t5_1_1(2048, 32, 24, 64, 5120),
    "t5_1_1_xxl": _t5_1_1(4096, 64, 24, 64, 10240),
    "t5_small": _t5_1_0(512, 8, 6, 64, 2048),
    "t5_base": _t5_1_0(768, 12, 12, 64, 3072),
    "t5_large": _t5_1_0(1024, 16, 24, 64, 4096),
    "t5_xl": _t5_1_0(1024, 32, 24, 128, 16384),
    "t5_xxl": _t5_1_0(1024, 128, 24, 128, 65536),
    "t5_1_1_nano": _t5_1_1(128, 2, (4, 2), 64, 256, vocab_size=8192),
    "t5_1_1_embedded": _t5_1_1(256, 4, (4, 2), 64, 512, vocab_size=8192),
    "t5_1_1_mini": _t5_1_1(512, 6, (6, 2), 64, 1024, vocab_size=8192),
}


def config(size: str, dropout_rate: float = 0.0, dtype: Any = jnp.float32) -> T5Config:
    """The configuration of a named size (a key of `SIZES`)."""
    if size not in SIZES:
        raise ValueError(f"unknown T5 size {size!r}; choose one of {', '.join(SIZES)}")
    return dataclasses.replace(SIZES[size], dropout_rate=dropout_rate, dtype=jnp.dtype(dtype))


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


class Kept(NamedTuple):
    """What dropout keeps in a layer: masks that broadcast against it, or None where all is kept.

    One mask for all queries and one for all positions, as T5's own code has it, and flaxformer for
    the encoder's output too.
    """

    weights: Array | None = None  # [B, A, 1, S]
    attended: Array | None = None  # [B, 1, H]
    cross_weights: Array | None = None  # [B, A, 1, T]
    cross_attended: Array | None = None  # [B, 1, H]
    hidden: Array | None = None  # [B, 1, F], F the width inside the MLP
    out: Array | None = None  # [B, 1, H]


def draw_kept(
    key: Array | None, cfg: T5Config, layers: int, rows: int, length: int, encoded: int = 0
) -> list[Kept]:
    """What a stack keeps of `length` positions, of a decoder that reads `encoded` ones.

    First of its input (as `attended`) and output (`out`), then of each layer. Without a key all is
    kept. One draw for each, one after the other from keys of the same form: the kernels that XLA
    compiles for one layer are then those of all. Its parts are gathered, not sliced: a mesh cuts
    some of them over its model axis, and through slices that cut would reach all others.
    """
    if key is None:
        return [Kept()] * (layers + 1)
    shapes = {
        "weights": (cfg.num_heads, 1, length),
        "attended": (1, cfg.emb_dim),
        "hidden": (1, cfg.mlp_dim),
        "out": (1, cfg.emb_dim),
    }
    if encoded:
        shapes |= {"cross_weights": (cfg.num_heads, 1, encoded), "cross_attended": (1, cfg.emb_dim)}
    ends = np.cumsum([np.prod(shape) for shape in shapes.values()])
    found = []
    for _ in range(layers + 1):
        key, own = jax.random.split(key)
        drawn = jax.random.bernoulli(own, 1 - cfg.dropout_rate, (rows, ends[-1]))
        kept = {}
        for (name, shape), end in zip(shapes.items(), ends, strict=True):
            places = np.arange(end - np.prod(shape), end)
            kept[name] = jnp.take(drawn, places, axis=1, mode="clip").reshape(rows, *shape)
        found.append(Kept(**kept))
    return found


def drop(x: Array, kept: Array | None, rate: float) -> Array:
    """`x` with what is not `kept` at 0, and the rest scaled by as much as fell away on average.

    A product with the mask: the backward pass of a choice would keep a mask as large as `x`.
    """
    return x if kept is None else x * jnp.where(kept, 1 / (1 - rate), 0.0).astype(x.dtype)


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
        self, x: Array, source: KV | Direct, bias: Array, kept: Array | None = None
    ) -> Array:
        """Attends from `x` `[B, Q, H]` to `source`; `bias` broadcasts to `[B, A, Q, S]`.

        `kept` `[B, A, 1, S]`: see `Kept`.
        """
        cfg = self.cfg
        query = self._heads(self.query(x))
        # Logits and softmax in float32 whatever the activations are.
        if isinstance(source, Direct):
            kernel, scale = source.key
            if scale is not None:
                query, scale = (query * scale).astype(cfg.dtype), jnp.ones(())
            query = multiply("baqd,ahd->baqh", query, (kernel, scale), cfg.dtype)
            logits = product("baqh,bhs->baqs", query, source.turned, jnp.float32)
        else:
            logits = product("baqd,basd->baqs", query, source.key, jnp.float32)
        logits = logits + bias.astype(jnp.float32)
        # The softmax divides what it weighs instead of its weights, of which there are more.
        weights, total = exponentials(logits, cfg.dtype)
        if isinstance(source, Direct):
            weights = drop(weights, kept, cfg.dropout_rate)
            y = divide(product("baqs,bsh->baqh", weights, source.x, jnp.float32), total, cfg.dtype)
            y = multiply("baqh,adh->baqd", y, source.value, cfg.dtype)
        else:
            # One mask for all queries may as well fall on the values.
            kept = None if kept is None else kept.swapaxes(2, 3)
            value = drop(source.value, kept, cfg.dropout_rate)
            y = divide(product("baqs,basd->baqd", weights, value, jnp.float32), total, cfg.dtype)
        y = y.swapaxes(1, 2)
        return self.out(y.reshape(*y.shape[:-2], -1))


@functools.partial(jax.checkpoint, static_argnums=0)
def _activated(activations: tuple[str, ...], parts: list[Array]) -> Array:
    """The product of the parts, each through its activation.

    The backward pass computes it again: kept, a layer's widest arrays would lie in memory twice.
    """
    y = 1.0
    for activation, z in zip(activations, parts, strict=True):
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
            parts.append(dense(x, jnp.float32))
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

    def whole(self, x: Array, bias: Array, kept: Kept) -> Array:
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
    outputs of its dense layers, so that no matrix of weights is multiplied again (T5X's names).
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


class TokenEmbedder(nn.Module):
    """Embedding table `[V, H]`, shared by encoder and decoder (and the head of T5 1.0)."""

    cfg: T5Config

    def setup(self):
        self.embedding = partitioning.param_with_axes(
            "embedding",
            nn.initializers.normal(1.0),
            (self.cfg.vocab_size, self.cfg.emb_dim),
            jnp.float32,
            axes=("vocab", "embed"),
        )

    def __call__(self, ids: Array) -> Array:
        # Tied to the ids: else a loop's bfloat16 table is widened as a whole before it, on a CPU.
        table, ids = jax.lax.optimization_barrier((self.embedding, ids))
        rows = jnp.take(table, ids, axis=0, mode="clip")
        if rows.dtype == jnp.int8:
            rows = rows * jnp.take(self._scale(), ids, axis=0, mode="clip")
        return rows.astype(self.cfg.dtype)

    def _scale(self) -> Array:
        """Scales `[V, 1]` of an embedding kept as int8."""
        return self.get_variable("params", f"embedding{SCALE}")

    def attend(self, x: Array) -> Array:
        if self.embedding.dtype == jnp.int8:
            scale = self._scale().reshape(-1)
            return int8_product("btk,vk->btv", x, self.embedding, scale, jnp.float32)
        return jnp.dot(x, self.embedding.astype(x.dtype).T, preferred_element_type=jnp.float32)


class Encoder(nn.Module):
    """Encoder stack over embedded inputs."""

    cfg: T5Config

    def setup(self):
        cfg = self.cfg
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=True)
        layer = layer_class(EncoderLayer, cfg.remat)
        self.layers = [layer(cfg) for _ in range(cfg.num_encoder_layers)]
        self.encoder_norm = LayerNorm(cfg.dtype)

    def __call__(
        self, x: Array, mask: Array, deterministic: bool, before: Before | None = None
    ) -> Array:
        """`x` `[B, T, H]`, `mask` broadcastable to `[B, 1, T, T]`, True where attention may go.

        `before(i, x)` gives what layer i > 0 is to read instead of `x`.
        """
        positions = jnp.arange(x.shape[1])
        bias = self.relpos_bias(positions, positions) + jnp.where(mask, 0.0, MASKED)
        rate = 0.0 if deterministic else self.cfg.dropout_rate
        key = self.make_rng("dropout") if rate else None
        ends, *kept = draw_kept(key, self.cfg, len(self.layers), *x.shape[:2])
        x = drop(x, ends.attended, rate)
        for i, layer in enumerate(self.layers):
            if before is not None and i:
                x = before(i, x)
            x = layer.whole(x, bias, kept[i])
        return drop(self.encoder_norm(x), ends.out, rate)


class Decoder(nn.Module):
    """Decoder stack over embedded inputs: whole sequences, or one position with a cache."""

    cfg: T5Config

    def setup(self):
        cfg = self.cfg
        self.relpos_bias = RelativePositionBias(cfg, bidirectional=False)
        layer = layer_class(DecoderLayer, cfg.remat, "one")
        self.layers = [layer(cfg) for _ in range(cfg.num_decoder_layers)]
        self.decoder_norm = LayerNorm(cfg.dtype)
        if not cfg.logits_via_embedding:
            shape = (cfg.emb_dim, cfg.vocab_size)
            self.logits_dense = Dense(shape, ("embed", "vocab"), cfg.dtype)

    def __call__(
        self, y: Array, encoded: Array, mask: Array, cross_mask: Array, deterministic: bool
    ) -> Array:
        """Normed output `[B, L, H]` for embedded targets `[B, L, H]` and `encoded` `[B, T, H]`."""
        positions = jnp.arange(y.shape[1])
        bias = self.relpos_bias(positions, positions) + jnp.where(mask, 0.0, MASKED)
        cross_bias = jnp.where(cross_mask, 0.0, MASKED)
        rate = 0.0 if deterministic else self.cfg.dropout_rate
        key = self.make_rng("dropout") if rate else None
        ends, *kept = draw_kept(key, self.cfg, len(self.layers), *y.shape[:2], encoded.shape[1])
        y = drop(y, ends.attended, rate)
        for layer, of_layer in zip(self.layers, kept, strict=True):
            y = layer.whole(y, encoded, bias, cross_bias, of_layer)
        return drop(self.decoder_norm(y), ends.out, rate)

    def cross(self, encoded: Array, queries: int) -> Sequence[KV | Direct]:
        """What each layer attends to: see `DecoderLayer.cross`."""
        return [layer.cross(encoded, queries) for layer in self.layers]

    def step(
        self,
        y: Array,
        index: Array,
        cache: list[KV],
        cross: Sequence[KV | Direct],
        cross_mask: Array,
    ) -> tuple[Array, list[KV]]:
        """One position `y` `[B, 1, H]` at `index`, with `cache` entries `[B, A, L, D]`."""
        length = cache[0][0].shape[2]
        positions = jnp.arange(length)
        bias = self.relpos_bias(index[None], positions)
        bias = bias + jnp.where(positions <= index, 0.0, MASKED)
        cross_bias = jnp.where(cross_mask, 0.0, MASKED)
        updated = []
        for layer, cached, source in zip(self.layers, cache, cross, strict=True):
            y, kv = layer.one(y, index, cached, source, bias, cross_bias)
            updated.append(kv)
        return self.decoder_norm(y), updated


class T5(nn.Module):
    """T5 in the pieces that prompting needs: embed, encode embeddings, decode, one cached step."""

    cfg: T5Config

    def setup(self):
        self.token_embedder = TokenEmbedder(self.cfg)
        self.encoder = Encoder(self.cfg)
        self.decoder = Decoder(self.cfg)

    def embed(self, ids: Array) -> Array:
        """`[..., H]` for ids `[...]`; ids beyond V read the last row (the caller replaces them)."""
        return self.token_embedder(ids)

    def encode(
        self,
        x: Array,
        segments: Array,
        deterministic: bool = True,
        before: Before | None = None,
    ) -> Array:
        """`[B, T, H]` for embeddings `[B, T, H]`; `before`: see `Encoder`.

        `segments` `[B, T]` numbers the examples of a row from 1; 0 is padding. Attention stays
        within a segment, and T5's bias needs only differences of positions.
        """
        mask = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
        return self.encoder(x, mask[:, None], deterministic, before)

    def decode(
        self,
        encoded: Array,
        encoder_segments: Array,
        decoder_ids: Array,
        decoder_segments: Array | None = None,
        deterministic: bool = True,
        cross_segments: Array | None = None,
    ) -> Array:
        """Logits `[B, L, V]` float32 for decoder inputs `[B, L]` (targets shifted right).

        `decoder_segments` `[B, L]` numbers the sequences of a decoder row (default: one);
        `cross_segments` `[B, L]` says which encoder segment each of its positions attends to
        (default: the one of its own number).
        """
        if decoder_segments is None:
            decoder_segments = jnp.ones_like(decoder_ids)
        if cross_segments is None:
            cross_segments = decoder_segments
        causal = jnp.tril(jnp.ones((decoder_ids.shape[1],) * 2, bool))
        mask = causal & (decoder_segments[:, :, None] == decoder_segments[:, None, :])
        cross = cross_segments[:, :, None] == encoder_segments[:, None, :]
        y = self.decoder(
            self.embed(decoder_ids), encoded, mask[:, None], cross[:, None], deterministic
        )
        return self._logits(y)

    def _logits(self, y: Array) -> Array:
        if self.cfg.logits_via_embedding:
            return self.token_embedder.attend(y) / np.sqrt(self.cfg.emb_dim)
        return self.decoder.logits_dense(y, jnp.float32)

    def start_decoding(self, encoded: Array, length: int) -> tuple[list[KV], Sequence[KV | Direct]]:
        """Empty cache for `length` positions, and what each layer's cross-attention reads."""
        cfg = self.cfg
        shape = (encoded.shape[0], cfg.num_heads, length, cfg.head_dim)
        cache = [
            KV(jnp.zeros(shape, cfg.dtype), jnp.zeros(shape, cfg.dtype))
            for _ in range(cfg.num_decoder_layers)
        ]
        return cache, self.decoder.cross(encoded, length)

    def decode_step(
        self,
        ids: Array,
        index: Array,
        cache: list[KV],
        cross: Sequence[KV | Direct],
        encoder_segments: Array,
    ) -> tuple[Array, list[KV]]:
        """Logits `[B, V]` after feeding ids `[B]` at position `index`, and the updated cache."""
        cross_mask = (encoder_segments > 0)[:, None, None, :]
        y, cache = self.decoder.step(self.embed(ids)[:, None], index, cache, cross, cross_mask)
        return self._logits(y)[:, 0], cache
