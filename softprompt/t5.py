"""T5 encoder-decoder in Flax linen: T5 1.0 (ReLU, tied head) and T5 1.1 (gated GELU, untied head).

Parameter tree and logical axis names are those of T5X's minimal T5, so its checkpoints fit leaf by
leaf. Architecture: Raffel et al. 2020 (arXiv 1910.10683), section 2.1; T5 1.1: Shazeer 2020
(arXiv 2002.05202). Alphabet: B rows, T encoder length, L decoder length, H model width,
V vocabulary rows, A heads, D head width.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from softprompt import dropout
from softprompt.dropout import Masks, drop
from softprompt.int8 import SCALE
from softprompt.products import MASKED, int8_product, where_not
from softprompt.segments import Segmented, suits, within
from softprompt.t5_config import T5Config
from softprompt.t5_layers import (
    KV,
    DecoderLayer,
    Dense,
    Direct,
    EncoderLayer,
    LayerNorm,
    RelativePositionBias,
    layer_class,
)

Array = jax.Array
# (number of an encoder layer, its input `[B, T, H]`) -> that input, perhaps another one.
Before = Callable[[int, Array], Array]


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
        self,
        x: Array,
        segments: Array,
        packed: bool,
        dropout_masks: Masks | None = None,
        before: Before | None = None,
    ) -> Array:
        """`x` `[B, T, H]` with `segments` `[B, T]`; `packed`: see `T5.encode`.

        `dropout_masks`: see `dropout.draw`. `before(i, x)` gives what layer i > 0 is to read in
        place of `x`.
        """
        positions = jnp.arange(x.shape[1])
        bias = self.relpos_bias(positions, positions)
        if packed and suits(x, self.cfg.num_heads):
            bias = Segmented.of(bias[0], segments)
        else:
            bias = bias + where_not(within(segments)[:, None], self.cfg.dtype)
        rate = self.cfg.dropout_rate
        ends, *kept = dropout.of_encoder(dropout_masks, self.cfg, x.shape[1])
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
        self,
        y: Array,
        encoded: Array,
        mask: Array,
        cross_mask: Array,
        dropout_masks: Masks | None = None,
    ) -> Array:
        """Normed output `[B, L, H]` for embedded targets `[B, L, H]` and `encoded` `[B, T, H]`."""
        positions = jnp.arange(y.shape[1])
        bias = self.relpos_bias(positions, positions) + where_not(mask, self.cfg.dtype)
        cross_bias = jnp.where(cross_mask, 0.0, MASKED)
        rate = self.cfg.dropout_rate
        ends, *kept = dropout.of_decoder(dropout_masks, self.cfg, y.shape[1], encoded.shape[1])
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
        bias = bias + where_not(positions <= index, self.cfg.dtype)
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
        dropout_masks: Masks | None = None,
        before: Before | None = None,
        packed: bool = True,
    ) -> Array:
        """`[B, T, H]` for embeddings `[B, T, H]`; `dropout_masks`, `before`: see `Encoder`.

        `segments` `[B, T]` numbers the examples of a row from 1; 0 is padding. Attention stays
        within a segment, and T5's bias needs only differences of positions. Rows that are not
        `packed` hold an example each: less is compiled for them.
        """
        return self.encoder(x, segments, packed, dropout_masks, before)

    def decode(
        self,
        encoded: Array,
        encoder_segments: Array,
        decoder_ids: Array,
        decoder_segments: Array | None = None,
        dropout_masks: Masks | None = None,
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
            self.embed(decoder_ids), encoded, mask[:, None], cross[:, None], dropout_masks
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
