"""The prompted T5: a backbone, a prompt bank, and slots that address its rows.

Encoder input ids `< V` are tokens; an id `V + r` is a *slot*, filled by row r of the bank
`[N·P, H]`. A prepended prompt is P slots before the tokens; different prompts per row, in the
middle of a text, or several in one packed row need no further model code.

A *deep* prompt has rows for the inputs of further encoder layers too: `prompt/deep`
`[D - 1, N·P, H]` replaces the hidden states at the slots before the layers 1 … D - 1, whatever the
layer before made of them (Jia et al. 2022, arXiv 2203.12119, section 3.2, "deep"; for language
models Liu et al. 2022, arXiv 2110.07602, who give every layer keys and values instead).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.linen import partitioning

from softprompt.dropout import Masks
from softprompt.t5 import T5, Before
from softprompt.t5_config import T5Config

Array = jax.Array
# Parameters that are the prompt: its bank `[N·P, H]`, and the rows of deeper layers.
PROMPT, DEEP = "prompt/bank", "prompt/deep"
# Logical axes of a bank: see `partition`.
BANK_AXES = ("prompt", "embed")


class PromptBank(nn.Module):
    """Rows of N prompts, `[N·P, H]`, kept and injected in float32 precision of the parameters.

    The rows of deeper layers, `deep` `[D - 1, N·P, H]`, are never initialised here: they take part
    where the parameters hold them.
    """

    rows: int
    width: int

    def setup(self):
        # Lester et al. 2021, section 2: "random uniform" draws from [-0.5, 0.5].
        self.bank = partitioning.param_with_axes(
            "bank",
            lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -0.5, 0.5),
            (self.rows, self.width),
            axes=BANK_AXES,
        )

    def __call__(self, x: Array, ids: Array, first_slot: int) -> Array:
        """Puts bank rows where `ids` `[B, T]` are slots; elsewhere keeps `x` `[B, T, H]`."""
        return _place(self.bank, x, ids - first_slot)

    def before(self, ids: Array, first_slot: int) -> Before | None:
        """What puts the deep rows before the encoder's layers; None where there are none."""
        if not self.has_variable("params", "deep"):
            return None
        deep = self.get_variable("params", "deep")
        row = ids - first_slot
        return lambda layer, x: _place(deep[layer - 1], x, row) if layer <= len(deep) else x


def _place(rows: Array, x: Array, row: Array) -> Array:
    """`rows` `[R, H]` in place of `x` `[B, T, H]` where `row` `[B, T]` is not negative."""
    found = jnp.take(rows, jnp.clip(row, 0, len(rows) - 1), axis=0)
    return jnp.where((row >= 0)[..., None], found.astype(x.dtype), x)


class PromptedT5(nn.Module):
    """T5 whose encoder inputs may hold slots.

    Parameters are those of the T5 (same tree, at the root), `prompt/bank` `[rows, H]`, and of a
    deep prompt `prompt/deep` `[D - 1, rows, H]`; with `rows = 0` it is a plain T5.
    """

    cfg: T5Config
    rows: int = 0

    def setup(self):
        self.t5 = T5(self.cfg)
        nn.share_scope(self, self.t5)
        if self.rows:
            self.prompt = PromptBank(self.rows, self.cfg.emb_dim)

    def encode(
        self,
        encoder_ids: Array,
        encoder_segments: Array | None = None,
        dropout_masks: Masks | None = None,
    ) -> tuple[Array, Array]:
        """Encoder output `[B, T, H]` and segments `[B, T]` for ids `[B, T]` (0 is padding)."""
        packed = encoder_segments is not None
        if not packed:
            encoder_segments = (encoder_ids > 0).astype(jnp.int32)
        x = self.t5.embed(encoder_ids)
        before = None
        if self.rows:
            x = self.prompt(x, encoder_ids, self.cfg.vocab_size)
            before = self.prompt.before(encoder_ids, self.cfg.vocab_size)
        encoded = self.t5.encode(x, encoder_segments, dropout_masks, before, packed)
        return encoded, encoder_segments

    def layer_inputs(self, encoder_ids: Array) -> Array:
        """What every encoder layer but the first reads, `[layers - 1, B, T, H]`."""
        found = []

        def keep(layer: int, x: Array) -> Array:
            del layer
            found.append(x)
            return x

        x = self.prompt(self.t5.embed(encoder_ids), encoder_ids, self.cfg.vocab_size)
        self.t5.encode(x, (encoder_ids > 0).astype(jnp.int32), before=keep, packed=False)
        return jnp.stack(found)

    def __call__(
        self,
        encoder_ids: Array,
        decoder_ids: Array,
        encoder_segments: Array | None = None,
        decoder_segments: Array | None = None,
        dropout_masks: Masks | None = None,
    ) -> Array:
        """Logits `[B, L, V]` for encoder ids `[B, T]` and decoder inputs `[B, L]`.

        Nothing is dropped without `dropout_masks` (`dropout.draw`).
        """
        encoded, segments = self.encode(encoder_ids, encoder_segments, dropout_masks)
        return self.t5.decode(encoded, segments, decoder_ids, decoder_segments, dropout_masks)

    def start_decoding(self, encoded: Array, length: int):
        """See `T5.start_decoding`."""
        return self.t5.start_decoding(encoded, length)

    def decode_step(self, ids, index, cache, cross, encoder_segments):
        """See `T5.decode_step`."""
        return self.t5.decode_step(ids, index, cache, cross, encoder_segments)


def bank_slots(vocab_size: int, lengths: Sequence[int]) -> list[np.ndarray]:
    """Slot ids of each of the prompts whose rows follow one another in a bank."""
    starts = np.cumsum([0, *lengths])
    return [slots(vocab_size, n, int(start)) for n, start in zip(lengths, starts, strict=False)]


def slots(vocab_size: int, count: int, first_row: int = 0) -> np.ndarray:
    """Slot ids `[count]` of the bank's rows from `first_row`, for a model of `vocab_size` rows."""
    return np.arange(vocab_size + first_row, vocab_size + first_row + count, dtype=np.int32)
